"""Stop plans and the audit, on inputs made by hand."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from stableopd.rollout.stops import (
    Finding,
    StopLogps,
    StopPlan,
    audit,
    plan_stops,
    stop_ids_of,
)
from stableopd.types import ConfigError, ModelError, Rollout, SamplingSettings, StopReason

CHATML = "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
CHATML_IDS = {"<|endoftext|>": 50, "<|im_start|>": 51, "<|im_end|>": 52}


class FakeTokenizer:
    def __init__(
        self,
        special: dict[str, int] | None = None,
        template: Any = None,
        eos: str | None = "<|endoftext|>",
        bos: str | None = None,
        pad_token_id: int | None = None,
    ) -> None:
        self.special = dict(CHATML_IDS if special is None else special)
        self.chat_template = template
        self.eos_token, self.bos_token, self.pad_token_id = eos, bos, pad_token_id
        self.eos_token_id = self.special.get(eos or "")
        self.all_special_tokens = [token for token in (eos, bos) if token]

    def get_vocab(self) -> dict[str, int]:
        return {"a": 0, "b": 1, **self.special}

    def get_added_vocab(self) -> dict[str, int]:
        return dict(self.special)

    def convert_ids_to_tokens(self, token_id: int) -> str | None:
        return {i: token for token, i in self.get_vocab().items()}.get(token_id)


def model(generation: Any = None, config: Any = None, name: str = "org/student") -> Any:
    return SimpleNamespace(
        generation_config=SimpleNamespace(eos_token_id=generation),
        config=SimpleNamespace(eos_token_id=config, name_or_path=name),
    )


def rollout(reason: StopReason) -> Rollout:
    return Rollout("p", (1,), (2, 3), "x", reason, (-1.0, -1.0), SamplingSettings(2))


def run(
    plan: StopPlan | None = None,
    tokenizer: FakeTokenizer | None = None,
    teacher: FakeTokenizer | None = None,
    golden: tuple[tuple[int, ...], ...] = (),
    rollouts: tuple[Rollout, ...] = (),
    budget: int = 4,
    logps: StopLogps | None = None,
) -> dict[str, Finding]:
    plan = plan or plan_stops((50,), (50,), 50, "event", 60)
    findings = audit(plan, tokenizer or FakeTokenizer(), teacher, golden, rollouts, budget, logps)  # type: ignore[arg-type]
    names = [finding.name for finding in findings]
    assert len(names) == len(set(names))
    for finding in findings:
        assert bool(finding.fix) == (finding.level != "OK")
    return {finding.name: finding for finding in findings}


@pytest.mark.parametrize(
    ("generation", "config", "eos", "expected"),
    [
        (7, 3, None, (7,)),  # the generation config goes before the config
        (None, 3, None, (3,)),
        (None, [9, 3], None, (3, 9)),
        ([9, 7, 9], 3, None, (7, 9)),
        ([9, 7], None, 8, (7, 8, 9)),
        (7, None, 7, (7,)),
        (None, None, 5, (5,)),
        (0, 3, None, (0,)),  # id 0 is an id
        (None, None, 0, (0,)),
        ([], 4, None, (4,)),
    ],
)
def test_stop_ids_of(generation, config, eos, expected):
    tokenizer: Any = SimpleNamespace(eos_token_id=eos)
    assert stop_ids_of(model(generation, config), tokenizer) == expected


def test_stop_ids_of_a_model_without_a_generation_config():
    tokenizer: Any = SimpleNamespace(eos_token_id=None)
    bare: Any = SimpleNamespace(config=SimpleNamespace(eos_token_id=3))
    assert stop_ids_of(bare, tokenizer) == (3,)
    bare.generation_config = None
    assert stop_ids_of(bare, tokenizer) == (3,)


def test_a_model_without_any_stop_id_is_refused():
    tokenizer: Any = SimpleNamespace(eos_token_id=None)
    with pytest.raises(ModelError, match=r"org/student names no stop token.*generation_config"):
        stop_ids_of(model(), tokenizer)


def test_event_plan_is_the_union():
    plan = plan_stops([52, 50, 52], [51, 50], 52, "event", 60)
    assert plan == StopPlan(
        mode="event",
        student_ids=(50, 52),
        teacher_ids=(50, 51),
        decode_ids=(50, 51, 52),
        event_ids=(50, 51, 52),
        label_id=52,
    )


def test_token_plan_is_the_students_own():
    plan = plan_stops([50], [51, 52], 50, "token", 60)
    assert plan.decode_ids == (50,)
    assert plan.event_ids == ()
    assert plan.teacher_ids == (51, 52)


@pytest.mark.parametrize("mode", ["event", "token"])
def test_plan_without_a_teacher(mode):
    plan = plan_stops([50, 52], None, None, mode, 60)
    assert plan.teacher_ids is None
    assert plan.decode_ids == (50, 52)
    assert plan.event_ids == ((50, 52) if mode == "event" else ())


@pytest.mark.parametrize(("eos", "label"), [(52, 52), (50, 50), (51, 50), (None, 50), (0, 50)])
def test_label_is_the_students_eos_or_its_first_stop(eos, label):
    # 51 is a stop of the teacher alone, so that the student never wrote it.
    assert plan_stops([52, 50], [51], eos, "event", 60).label_id == label


def test_label_may_be_id_zero():
    assert plan_stops([0, 5], None, 0, "event", 60).label_id == 0


def test_plans_are_frozen():
    plan = plan_stops([50], None, None, "event", 60)
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.label_id = 3  # type: ignore[misc]


@pytest.mark.parametrize("mode", ["event", "token"])
@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        ([50, 60], [50], "stop id 60 of the student lies outside the 60 tokens"),
        ([50], [50, 61], "stop id 61 of the teacher lies outside the 60 tokens"),
        ([-1], [50], "stop id -1 of the student"),
    ],
)
def test_ids_outside_the_shared_vocabulary_are_refused(mode, student, teacher, message):
    with pytest.raises(ModelError, match=message):
        plan_stops(student, teacher, None, mode, 60)
    assert plan_stops([59], [0], None, mode, 60).student_ids == (59,)


def test_a_plan_needs_a_student_stop_and_a_known_mode():
    with pytest.raises(ModelError, match="no stop id"):
        plan_stops([], [50], None, "event", 60)
    with pytest.raises(ConfigError, match=r"objective\.stop must be 'event' or 'token'"):
        plan_stops([50], [50], None, "both", 60)


def test_equal_stop_ids_are_fine_in_both_modes():
    for mode in ("event", "token"):
        finding = run(plan_stops((50,), (50,), 50, mode, 60))["stop ids"]
        assert finding.level == "OK"
        assert "both stop with 50 (<|endoftext|>)" in finding.message


def test_different_stop_ids_are_an_event_or_a_warning():
    event = run(plan_stops((50,), (52,), 50, "event", 60))["stop ids"]
    assert event.level == "OK"
    assert "the event of ids {50, 52} is scored" in event.message
    token = run(plan_stops((50,), (52,), 50, "token", 60))["stop ids"]
    assert token.level == "WARN"
    assert "50 (<|endoftext|>), the teacher with 52 (<|im_end|>)" in token.message
    assert "truncation collapse, cause A" in token.message
    assert "-25 nats" in token.message
    assert 'objective.stop = "event"' in token.fix


def test_a_subset_of_the_teachers_ids_still_differs():
    assert run(plan_stops((50,), (50, 52), 50, "token", 60))["stop ids"].level == "WARN"


def test_an_unknown_teacher_is_said_to_be_unknown():
    finding = run(plan_stops((50,), None, 50, "token", 60))["stop ids"]
    assert finding.level == "OK"
    assert "no stop ids of a teacher are known" in finding.message


@pytest.mark.parametrize(
    ("pad", "text"),
    [
        (None, "no pad token"),
        (50, "the pad token is the stop token 50; labels are masked by length"),
        (7, "the pad token 7 is not a stop token"),
    ],
)
def test_pad_id(pad, text):
    finding = run(tokenizer=FakeTokenizer(pad_token_id=pad))["pad id"]
    assert finding.level == "OK"
    assert text in finding.message


def test_without_inputs_the_audit_says_only_what_it_knows():
    assert list(run()) == ["stop ids", "pad id"]


def test_the_order_is_fixed():
    findings = run(
        teacher=FakeTokenizer(),
        golden=((1, 50),),
        rollouts=(rollout(StopReason.STOP),),
        logps=StopLogps(-1.0, -1.0, 3),
    )
    assert list(findings) == [
        "stop ids",
        "pad id",
        "golden stop label",
        "golden length",
        "truncation",
        "stop log-probs",
        "chat tokens",
    ]
    assert {finding.level for finding in findings.values()} == {"OK"}


@pytest.mark.parametrize(
    ("missing", "level"), [(0, "OK"), (1, "OK"), (2, "WARN"), (9, "WARN"), (10, "FAIL")]
)
def test_golden_stop_labels(missing, level):
    # Exactly a tenth is still tolerated; a stop in the middle or an empty solution is no end.
    unended = ((), (50, 1)) * 5
    golden = unended[:missing] + ((1, 50),) * (10 - missing)
    finding = run(golden=golden)["golden stop label"]
    assert finding.level == level
    if missing:
        assert f"{missing} of 10" in finding.message
        assert f"({10 * missing}%)" in finding.message
    if level != "OK":
        assert "id 50" in finding.fix


def test_a_golden_solution_may_end_with_any_id_that_ends_a_rollout():
    golden = ((1, 52),) * 4
    event = run(plan_stops((50,), (52,), 50, "event", 60), golden=golden)
    assert event["golden stop label"].level == "OK"
    token = run(plan_stops((50,), (52,), 50, "token", 60), golden=golden)
    assert token["golden stop label"].level == "FAIL"


@pytest.mark.parametrize(("over", "level"), [(0, "OK"), (1, "OK"), (2, "WARN"), (10, "WARN")])
def test_golden_lengths(over, level):
    # A solution that fills the budget of 4 with its stop still fits.
    golden = ((1, 1, 1, 1, 1, 50),) * over + ((1, 1, 1, 50),) * (10 - over)
    finding = run(golden=golden)["golden length"]
    assert finding.level == level
    assert f"{over} of 10 golden solutions ({10 * over}%) exceed the budget of 4" in finding.message
    assert f"the longest has {6 if over else 4}" in finding.message


@pytest.mark.parametrize(("cut", "level"), [(0, "OK"), (1, "OK"), (2, "WARN"), (4, "WARN")])
def test_truncation(cut, level):
    rollouts = (rollout(StopReason.LENGTH),) * cut + (rollout(StopReason.STOP),) * (4 - cut)
    finding = run(rollouts=rollouts)["truncation"]
    assert finding.level == level
    assert f"{cut} of 4 rollouts of the untrained student ({25 * cut}%)" in finding.message


@pytest.mark.parametrize(
    ("student", "teacher", "level"),
    [
        (-0.5, -5.5, "OK"),  # exactly 5 nats
        (-0.5, -5.75, "WARN"),
        (-0.5, -25.0, "WARN"),
        (-9.0, -0.5, "OK"),  # a teacher fonder of stopping is no trouble
        (-0.5, -math.inf, "WARN"),
        (-0.5, math.nan, "WARN"),
    ],
)
def test_stop_log_probs(student, teacher, level):
    for mode in ("event", "token"):
        plan = plan_stops((50,), (52,), 50, mode, 60)
        finding = run(plan, logps=StopLogps(student, teacher, 7))["stop log-probs"]
        assert finding.level == level
        assert "at 7 stops" in finding.message
        assert f"{student:.2f} nats" in finding.message
        assert f"{teacher:.2f}" in finding.message
        if level == "WARN":
            assert ('objective.stop = "event"' in finding.fix) == (mode == "token")


def test_no_stop_seen_is_not_a_measurement():
    finding = run(logps=StopLogps(math.nan, math.nan, 0))["stop log-probs"]
    assert finding.level == "OK"
    assert "not measured" in finding.message


def test_equal_chat_tokens():
    finding = run(tokenizer=FakeTokenizer(template=CHATML), teacher=FakeTokenizer(template=CHATML))
    assert finding["chat tokens"].level == "OK"
    assert finding["chat tokens"].message.startswith("2 special tokens")


def test_chat_tokens_that_mean_something_else_to_the_teacher():
    # The same id 51 opens a turn for the one and marks the user for the other.
    teacher = FakeTokenizer(
        {"<|endoftext|>": 50, "<User>": 51, "<|im_end|>": 52}, "<User>{{ content }}<|im_end|>"
    )
    finding = run(tokenizer=FakeTokenizer(template=CHATML), teacher=teacher)["chat tokens"]
    assert finding.level == "WARN"
    assert "<|im_start|> (51 to the student, absent to the teacher)" in finding.message
    assert "<User> (absent to the student, 51 to the teacher)" in finding.message
    assert "<|im_end|>" not in finding.message
    assert "data.chat_template" in finding.fix


def test_tokens_outside_the_templates_do_not_count():
    teacher = FakeTokenizer({**CHATML_IDS, "<tool>": 53, "<|endoftext|>": 40}, CHATML)
    finding = run(tokenizer=FakeTokenizer(template=CHATML), teacher=teacher)["chat tokens"]
    assert finding.level == "OK"


def test_a_template_may_write_tokens_through_variables_or_be_one_of_several():
    student = FakeTokenizer(template={"default": "{{ bos_token }}hi", "tool": CHATML}, bos="<s>")
    student.special["<s>"] = 40
    teacher = FakeTokenizer()
    finding = run(tokenizer=student, teacher=teacher)["chat tokens"]
    assert finding.level == "WARN"
    assert "<s> (40 to the student, absent to the teacher)" in finding.message
    assert "<|im_end|>" not in finding.message


def test_no_chat_template_uses_no_special_tokens():
    finding = run(teacher=FakeTokenizer({"<|endoftext|>": 3}))["chat tokens"]
    assert finding.level == "OK"
    assert "use none" in finding.message


def real_tokenizer(*special: str) -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(["a", "b", "<unk>"])}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(vocabulary, unk_token="<unk>")), eos_token="<end>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    tokenizer.chat_template = CHATML + "{{ eos_token }}"
    return tokenizer


def test_real_tokenizers():
    student = real_tokenizer("<|im_start|>", "<|im_end|>")  # <end> is 3, the others 4 and 5
    teacher = real_tokenizer("<|im_end|>", "<|im_start|>")
    ids = stop_ids_of(model(5), student)
    assert ids == (3, 5)
    plan = plan_stops(ids, stop_ids_of(model(), teacher), student.eos_token_id, "event", 6)
    findings = {f.name: f for f in audit(plan, student, teacher, (), (), 4, None)}
    assert "the student stops with 3 (<end>), 5 (<|im_end|>)" in findings["stop ids"].message
    chat = findings["chat tokens"].message
    assert "<|im_end|> (5 to the student, 4 to the teacher)" in chat
    assert "<|im_start|> (4 to the student, 5 to the teacher)" in chat
    assert "<end>" not in chat
    same = {f.name: f for f in audit(plan, student, student, (), (), 4, None)}
    assert same["chat tokens"].message.startswith("3 special tokens")


def test_many_differing_chat_tokens_are_counted():
    special = {f"<t{i}>": 10 + i for i in range(8)}
    template = "".join(special)
    teacher = FakeTokenizer({token: i + 1 for token, i in special.items()}, template, eos=None)
    finding = run(tokenizer=FakeTokenizer(special, template, eos=None), teacher=teacher)[
        "chat tokens"
    ]
    assert finding.message.count("to the student") == 5
    assert "3 more" in finding.message

"""The doctor's checks of tokens, data and behaviour, on inputs made by hand."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pytest

import tiny
from stableopd import config as configuration
from stableopd.config import RepetitionConfig
from stableopd.doctor import behaviour, lessons, tokens
from stableopd.doctor.scoring import TokenScores
from stableopd.models import LanguageModel
from stableopd.rollout.stops import StopLogps, plan_stops
from stableopd.training.answer_checks import failing_answers, golden_answers, known_answers
from stableopd.types import Message, Prompt, Rollout, SamplingSettings, StopReason
from tiny import VOCABULARY, V, make_llama, make_tokenizer

TEMPLATE = "{% for m in messages %}#{{ m.content }}{% endfor %}="
NONE = np.empty(0)
PLAN = plan_stops([tiny.EOS], None, tiny.EOS, "event", V)


def model(tokenizer=None, template=None, **options):
    tokenizer = tokenizer or make_tokenizer()
    tokenizer.chat_template = template
    return LanguageModel("name", make_llama(**options), tokenizer, 128)


def only(check):
    (finding,) = check.findings
    return finding


def parsed(**sections):
    table = {"student": {"model": "s"}, "teacher": {"model": "t"}, "data": {"train": "d"}}
    for section, fields in sections.items():
        table.setdefault(section, {}).update(fields)
    return configuration.parse(table)


def rollout(text, ids=None, reason=StopReason.STOP):
    ids = tuple(range(len(text))) if ids is None else ids
    return Rollout("p", (3,), ids, text, reason, (0.0,) * len(ids), SamplingSettings(9))


def scores(student, teacher=(), kl=(), overlap=()):
    columns = (student, student, teacher, teacher, kl, overlap)
    return TokenScores(*(np.array(c, dtype=float) for c in columns))


class TestTokens:
    def test_tokens_behind_the_others_ids_contradict_nothing(self):
        more = model(make_tokenizer(VOCABULARY | {"<new>": V}))
        check = tokens.tokenizers(model(), more, ["1+1=2"])
        assert [f.level for f in check.findings] == ["OK", "OK"]
        assert f"{V} and {V + 1} tokens" in check.findings[0].message
        assert check.numbers["num_differing_ids"] == 0

    def test_one_id_with_two_meanings(self):
        swapped = VOCABULARY | {"a": VOCABULARY["j"], "j": VOCABULARY["a"]}
        check = tokens.tokenizers(model(), model(make_tokenizer(swapped)), [])
        assert only(check).level == "FAIL"
        assert "'a' to the student and 'j' to the teacher" in only(check).message
        assert check.numbers["num_differing_ids"] == 2

    def test_texts_that_are_split_differently(self):
        from tokenizers import Regex, pre_tokenizers

        other = make_tokenizer()
        other.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[0-9]+"), "isolated")
        check = tokens.tokenizers(model(), model(other), ["a", "12"])
        assert check.findings[0].level == "WARN"
        # "12" and four probes, of which each holds what WordLevel does not know as one word.
        assert check.numbers["num_split_differently"] == 5
        assert check.findings[1].level == "OK"

    def test_texts_that_do_not_come_back(self):
        check = tokens.tokenizers(model(), None, ["1+1=2", "a~b"])
        assert only(check).level == "WARN"
        assert "1 of 2 texts" in only(check).message
        assert "'a~b'" in only(check).message
        assert tokens.tokenizers(model(), None, []).findings == ()

    def test_vocabulary(self):
        check = tokens.vocabulary(model(rows=V + 8), model(rows=V + 100))
        assert only(check).level == "OK"
        assert f"the first {V + 8} are compared" in only(check).message
        assert check.numbers["shared"] == V + 8
        check = tokens.vocabulary(model(rows=V + 8), model(rows=V - 1), [3, V - 1])
        assert only(check).level == "FAIL"
        assert f"of the teacher to {V} rows" in only(check).fix
        assert f"'j' (id {V - 1})" in only(check).message
        check = tokens.vocabulary(model(rows=V + 8), model(rows=V - 1), [3, V - 2])
        assert only(check).level == "OK"
        assert only(tokens.vocabulary(model(), None)).level == "OK"

    @pytest.mark.parametrize(
        ("mine", "theirs", "setting", "level", "words"),
        [
            (None, None, "auto", "OK", "neither"),
            (TEMPLATE, None, "auto", "WARN", "the teacher has none"),
            (TEMPLATE, None, "none", "OK", "the teacher has none"),
            (None, TEMPLATE, "auto", "WARN", "the student has none"),
            (TEMPLATE, TEMPLATE, "none", "WARN", 'is "none"'),
            (TEMPLATE, TEMPLATE, "auto", "OK", "in the same way"),
            (TEMPLATE, TEMPLATE + "?", "auto", "WARN", "'#1+1='"),
            (TEMPLATE, "{{ raise_exception('no') }}", "auto", "WARN", "fails"),
        ],
    )
    def test_chat_templates(self, mine, theirs, setting, level, words):
        student, teacher = model(template=mine), model(template=theirs)
        found = tokens.chat_templates(student, teacher, Prompt("0", "1+1"), setting)
        assert (found.level, bool(found.fix)) == (level, level != "OK")
        assert words in found.message

    def test_sampling(self):
        student = model()
        student.model.generation_config.top_p = 0.9
        found = tokens.sampling(student, parsed())
        assert found.level == "OK"
        assert "(top_p 0.9) is not used in training" in found.message
        cut = {"top_k": 5, "allow_off_policy_sampling": True}
        assert tokens.sampling(student, parsed(rollout=cut)).level == "WARN"
        only_gold = parsed(rollout=cut, objective={"method": "sft"})
        assert tokens.sampling(student, only_gold).level == "OK"


class TestLessons:
    @pytest.mark.parametrize(
        ("budget", "student", "teacher", "level", "over"),
        [
            (10, None, None, "OK", None),
            (10, 16, None, "OK", 0),
            (11, 16, None, "FAIL", 1),
            (13, 99, 16, "FAIL", 2),
        ],
    )
    def test_contexts(self, budget, student, teacher, level, over):
        check, context = lessons.contexts([6, 2, 4], budget, True, student, teacher)
        assert only(check).level == level
        assert check.numbers.get("num_too_long") == over
        assert context == (teacher or student)
        if over:
            assert "set rollout.max_new_tokens to 10 or less" in only(check).fix
            again, _ = lessons.contexts([6, 2, 4], budget, False, student, teacher)
            assert only(again).level == "WARN"

    def test_solutions_that_cannot_be_used(self):
        prompts = [Prompt("a", "1", "2<eos>3"), Prompt("b", "1", "2"), Prompt("c", "1")]
        encoded, refused = lessons.encode_solutions(prompts, make_tokenizer(), PLAN)
        assert encoded == [(1, (VOCABULARY["2"], tiny.EOS))]
        (said,) = refused
        assert "prompt a: the stop token" in said
        for given, level in ((True, "FAIL"), (False, "WARN")):
            check = lessons.solutions(prompts, encoded, refused, parsed(), given)
            assert (only(check).level, only(check).message) == (level, said)

    @pytest.mark.parametrize(
        ("with_solution", "method", "level"),
        [(3, "stable_opd", "OK"), (2, "stable_opd", "FAIL"), (2, "opd", "OK"), (0, "opd", "OK")],
    )
    def test_missing_solutions(self, with_solution, method, level):
        prompts = [Prompt(str(i), "1", "2" if i < with_solution else None) for i in range(3)]
        encoded, _ = lessons.encode_solutions(prompts, make_tokenizer(), PLAN)
        settings = parsed(objective={"method": method}, rollout={"max_new_tokens": 1})
        check = lessons.solutions(prompts, encoded, [], settings, True)
        assert only(check).level == level
        # With its stop a solution has two tokens, and one is allowed.
        assert check.numbers["fitting_share"] == 0
        assert check.numbers["num_missing"] == 3 - with_solution
        settings = parsed(objective={"method": method}, rollout={"max_new_tokens": 2})
        check = lessons.solutions(prompts, encoded, [], settings, True)
        assert check.numbers["fitting_share"] == pytest.approx(with_solution / 3)

    def test_golden_answers(self):
        marked = ("exact", "#")
        right, wrong = Prompt("a", "1", "so #7", "7"), Prompt("b", "1", "so #", "7")
        finding, _ = golden_answers([right] * 9 + [wrong], marked)
        assert finding.level == "OK"
        finding, numbers = golden_answers([right] * 8 + [wrong] * 2, marked)
        assert finding.level == "WARN"
        assert numbers == {"num_graded": 10, "right_share": 0.8}
        assert golden_answers([Prompt("c", "1", "2")], marked) is None

    @pytest.mark.parametrize(
        ("solution", "grader", "fix"),
        [
            ("so \\boxed{7}", ("exact", ""), 'data.grader = "math"'),
            ("it is 8 - 1\n#### 7", ("exact", ""), 'data.grader = "math"'),
            ("it is 7 or 8\n#### seven", ("math", ""), 'data.answer_marker = "####"'),
            ("who knows", ("exact", ""), "data.answer"),
        ],
    )
    def test_the_grader_that_would_do_is_named(self, solution, grader, fix):
        answer = "seven" if "seven" in solution else "7"
        finding, _ = golden_answers([Prompt("a", "1", solution, answer)], grader)
        assert finding.level == "WARN"
        assert fix in finding.fix

    def test_a_solution_that_continues_the_thought_of_its_prompt(self):
        prompts = [Prompt("a", "1", "let me see</think>7", "7"), Prompt("b", "1", "it is 7", "7")]
        _, numbers = golden_answers(prompts, ("math", ""), [True, True])
        assert numbers["right_share"] == 0.5

    def test_right_answers_are_graded_against_themselves(self):
        answers = ("7", "\\$18.90", "}{", "7")
        prompts = [Prompt(str(i), "1", None, answer) for i, answer in enumerate(answers)]
        found = failing_answers(prompts, ("math", ""))
        assert (found.num_graded, found.num_answers) == (4, 4)
        assert [p.id for p in found.failing] == ["2"]
        finding = known_answers(prompts, ("math", ""))
        assert finding.level == "WARN"
        assert "'}{' of 2" in finding.message
        assert known_answers(prompts[:2], ("math", "")).level == "OK"
        assert known_answers([Prompt("a", "1")], ("math", "")) is None
        # The marker within the answer: what follows the last one is never all of it.
        assert len(failing_answers([Prompt("a", "1", None, "so #7")], ("exact", "#")).failing) == 1

    def test_right_answers_that_take_long_are_not_all_looked_at(self):
        prompts = [Prompt(str(i), "1", None, f"x + {i}") for i in range(50)]
        found = failing_answers(prompts, ("math", ""), seconds=0.0)
        assert found.num_graded < found.num_answers == 50
        assert not found.failing

    def test_the_teachers_own_answers(self):
        prompts = [Prompt(str(i), "1", None, "7") for i in range(4)]
        patient = SimpleNamespace(
            prompts=prompts,
            prompt_ids=[(3,)] * 4,
            student=SimpleNamespace(tokenizer=make_tokenizer()),
            config=parsed(data={"train": "x.jsonl", "grader": "math"}),
        )
        told = [dataclasses.replace(rollout("ab"), completion=c) for c in ("7", "8", "?", "no")]
        check = lessons.teacher_answers(patient, range(4), told)
        assert only(check).level == "WARN"
        assert check.numbers == {"num_graded": 4, "num_right": 1, "num_without_answer": 2}
        check = lessons.teacher_answers(patient, [0, 1], told[:2])
        assert only(check).level == "OK"
        assert check.numbers["num_without_answer"] == 0


class TestBehaviour:
    def test_mean_stop_logps(self):
        rollouts = [rollout("ab"), rollout("ab", reason=StopReason.LENGTH), rollout("a")]
        told = [scores([-1, -2], [-3, -4]), scores([-9, -9], [-9, -9]), scores([-4], [-6])]
        assert behaviour.mean_stop_logps(rollouts, told) == StopLogps(-3, -5, 2)
        assert behaviour.mean_stop_logps(rollouts[1:2], told[1:2]) is None
        assert behaviour.mean_stop_logps(rollouts[:1], [scores([-1, -2])]) is None
        assert behaviour.mean_stop_logps([], []) is None

    @pytest.mark.parametrize(
        ("mode", "is_given", "level"),
        [("token", True, "WARN"), ("event", True, "OK"), ("event", False, "WARN")],
    )
    def test_stop_scoring(self, mode, is_given, level):
        plan = plan_stops([1], [2], 1, mode, 9)
        event, token = StopLogps(-0.5, -1.0, 3), StopLogps(-0.6, -20.0, 3)
        check = behaviour.stop_scoring(plan, event, token, is_given)
        assert only(check).level == level
        assert "-0.50 and -1.00, by the stop's own id -0.60 and -20.00" in only(check).message
        assert check.numbers["token_gap"] == pytest.approx(19.4 - 0.5)
        close = behaviour.stop_scoring(plan, event, StopLogps(-0.6, -3.0, 3), is_given)
        assert only(close).level == "OK"
        same = plan_stops([1], [1], 1, mode, 9)
        assert behaviour.stop_scoring(same, event, event, is_given).findings == ()

    def test_golden_ends(self):
        told = [scores([-1, -1], [-1, -6]), scores([-3], [-4])]
        check = behaviour.golden_ends(told)
        assert only(check).level == "OK"
        assert check.numbers["student_stop_logp"] == -2
        assert check.numbers["teacher_stop_logp"] == -5
        assert check.numbers["teacher_logp"] == pytest.approx(-11 / 3)
        assert only(behaviour.golden_ends([scores([0], [-5.1])])).level == "WARN"
        assert only(behaviour.golden_ends([scores([-5.1])])).level == "WARN"
        assert only(behaviour.golden_ends([scores([-9], [-1])])).level == "OK"

    def test_scaled_repetition(self):
        paper = RepetitionConfig()
        # The demo's and the paper's pairs are points of the same curve.
        assert behaviour.scaled_repetition(paper, 1.0, 96) == RepetitionConfig(64, 3.0)
        assert behaviour.scaled_repetition(paper, 1.0, 10_000).ratio == pytest.approx(9.1)
        assert behaviour.scaled_repetition(paper, 1.01, 10_000) == paper
        assert behaviour.scaled_repetition(paper, 0.0, 10) == RepetitionConfig(8, 3.0)

    def test_repetition(self):
        ids = (5, 6) * 20
        loop, plain = rollout("ab" * 20, ids), rollout("".join(map(chr, range(40, 80))))
        settings = RepetitionConfig(30, 2.0, ngram=4)
        check, used = behaviour.repetition([loop, plain], settings, 40)
        assert used == settings
        assert only(check).level == "WARN"
        assert check.numbers["repetition_rate"] == 0.5
        # All but the first two of the 4-grams, of which the first ends at the fourth token.
        assert check.numbers["repetitive_share"] == pytest.approx((40 - 5) / 80)
        assert check.numbers["chars_per_token"] == 1
        check, used = behaviour.repetition([plain], RepetitionConfig(40, 2.0), 40)
        assert [f.name for f in check.findings] == ["repetition", "RepRate window"]
        assert used.window_chars == 27

    def test_teacher_rollouts(self):
        settings = RepetitionConfig(30, 2.0)
        stops, cut = rollout("ab"), rollout("ab", reason=StopReason.LENGTH)
        loop = rollout("ab" * 20)
        for given, level in (([stops, stops, cut], "OK"), ([stops, cut], "WARN")):
            check = behaviour.teacher_rollouts(given, [stops], settings, 2)
            assert only(check).level == level
        check = behaviour.teacher_rollouts([stops] * 3 + [loop], [stops], settings, 9)
        assert only(check).level == "WARN"
        assert "loops by itself" in only(check).message
        assert check.numbers["mean_length"] == pytest.approx((3 * 2 + 40) / 4)

    def test_alignment(self):
        told = [scores([-1, -2], [-3, -4], [0.5, 1.0], [0.5, 0.25]), scores([-3], [-2], [0], [0])]
        check = behaviour.alignment(told, 100)
        assert check.numbers["k"] == 16
        assert check.numbers["overlap"] == 0.25
        assert check.numbers["kl_student_teacher"] == 0.5
        assert check.numbers["student_logp"] == -2
        assert check.numbers["teacher_logp"] == -3
        assert only(check).level == "WARN"
        assert "2604.13016" in only(check).fix
        sure = [dataclasses.replace(s, kl=s.kl * 0.9) for s in told]
        assert only(behaviour.alignment(sure, 100)).level == "OK"
        broken = behaviour.alignment([scores([0], [0], [math.nan], [0.1])], 100)
        assert only(broken).level == "WARN"


def test_messages_are_compared_as_texts():
    prompt = Prompt("0", (Message("user", "1"), Message("assistant", "2"), Message("user", "3")))
    both = model(template=TEMPLATE)
    assert tokens.chat_templates(both, both, prompt, "auto").level == "OK"

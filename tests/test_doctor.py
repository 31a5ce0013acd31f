"""The command as a user runs it: what it prints, its numbers and its exit code."""

from __future__ import annotations

import json
import shutil

import pytest

import tiny
from stableopd import embedded
from stableopd.doctor.command import run_doctor
from stableopd.doctor.examine import ORDER
from stableopd.doctor.patient import BUILT_IN, NO_DATA, settings_of
from stableopd.types import ConfigError, DataError, ModelError
from tiny import V


def doctor(capsys, *arguments, **options):
    """Exit code, findings by name, numbers."""
    code = run_doctor(*map(str, arguments), as_json=True, **options)
    told = json.loads(capsys.readouterr().out)
    names = [finding["name"] for finding in told["findings"]]
    assert len(names) == len(set(names))
    assert names == sorted(names, key=ORDER.index)
    for finding in told["findings"]:
        assert bool(finding["fix"]) == (finding["level"] != "OK"), finding
        assert finding["message"].endswith(".")
    levels = [finding["level"] for finding in told["findings"]]
    assert (told["num_fail"], told["num_warn"]) == (levels.count("FAIL"), levels.count("WARN"))
    assert code == int(told["num_fail"] > 0)
    return code, {finding["name"]: finding for finding in told["findings"]}, told["numbers"]


@pytest.fixture
def world(tmp_path):
    return tiny.make_world(tmp_path / "w")


def test_the_embedded_pair(capsys):
    code, found, numbers = doctor(capsys, "embedded", "embedded")
    assert code == 0
    # With this seed's draws the teacher's own eight rollouts earn a warning, too.
    warned = {name for name, f in found.items() if f["level"] != "OK"}
    assert warned == {"loops", "teacher rollouts"}
    assert "the teacher likes loops better than the student" in found["loops"]["message"]
    assert "stable_opd" in found["loops"]["fix"]
    # docs/log.md, over 200 problems: the teacher .115, .854, .9996, ...; the student .11 to .16.
    loops = numbers["loops"]
    assert loops["num_completions"] == 8
    assert loops["copies"] == [0, 1, 2, 3, 5]
    assert all(0.04 < p < 0.25 for p in loops["student_probability"])
    assert loops["teacher_probability"][1] == pytest.approx(0.87, abs=0.08)
    assert all(p > 0.97 for p in loops["teacher_probability"][2:])
    assert numbers["stops"]["student_ids"] == numbers["stops"]["teacher_ids"] == [1]
    assert numbers["stops"]["student_event"] == numbers["stops"]["student_token"]
    assert numbers["stops"]["student_event"] == pytest.approx(-0.15, abs=0.1)
    assert numbers["golden"]["fitting_share"] == numbers["golden"]["right_share"] == 1
    assert numbers["student"]["truncation_rate"] == 0
    assert numbers["student"]["num_rollouts"] == numbers["teacher"]["num_rollouts"] == 8
    assert 0.1 < numbers["overlap"]["kl_student_teacher"] < 0.5
    assert numbers["overlap"]["student_entropy"] > numbers["overlap"]["teacher_entropy"]
    assert numbers["memory"]["student_bytes"] == 162_496 * 4


def test_the_student_alone(capsys):
    code, found, numbers = doctor(capsys, "embedded", num_prompts=2)
    assert code == 0
    assert "is left out" in found["teacher"]["message"]
    assert not {"overlap", "teacher rollouts", "stop log-probs", "tokenizers"} & set(found)
    assert not {"overlap", "teacher"} & set(numbers)
    assert "teacher_logp" not in numbers["loops"]
    assert numbers["memory"]["teacher_bytes"] == numbers["memory"]["reference_bytes"] == 0


def test_the_table(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    assert run_doctor("embedded", "embedded", num_prompts=2) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "Before a run: student embedded, teacher embedded" in out
    assert "Fix: use objective.method" in out
    assert out.splitlines()[-1] == "0 FAIL, 2 WARN, 22 OK"


def test_a_configuration_and_what_a_run_leaves_behind(capsys, world):
    config = tiny.write_config(world, repetition={"window_chars": 4, "ratio": 1.5})
    before = tiny.files_in(world)
    code, found, numbers = doctor(capsys, config=config, num_prompts=3)
    assert tiny.files_in(world) == before
    assert code == 0
    assert numbers["prompts"]["num_prompts"] == 20
    assert numbers["student"]["num_rollouts"] == 3
    assert numbers["memory"]["reference_bytes"] == numbers["memory"]["student_bytes"] > 0
    # One token an answer and random models: nothing that a run could not survive.
    assert found["golden solutions"]["level"] == "OK"
    assert "RepRate window" not in found
    # The same again gives the same.
    assert doctor(capsys, config=config, num_prompts=3)[2]["student"] == numbers["student"]


def test_without_data(capsys, world):
    _, found, numbers = doctor(capsys, world / "student", world / "teacher", num_prompts=2)
    assert found["prompts"]["level"] == "WARN"
    assert f"{len(BUILT_IN)} built-in prompts" in found["prompts"]["message"]
    assert not {"golden solutions", "round trip"} & set(found)
    # The default budget is more than these models read, but nobody asked for it.
    assert found["context"]["level"] == "WARN"
    assert "context holds no more" in found["rollouts"]["message"]
    room = 128 - max(len(text) for text in BUILT_IN)
    assert numbers["student"]["mean_length"] <= room + 60
    assert found["RepRate window"]["level"] == "WARN"


def test_prompts_and_budgets_that_do_not_fit(capsys, world):
    rows = [*tiny.sums(3), {"prompt": "1" * 130, "solution": "2" * 20, "answer": "2"}]
    tiny.write_rows(world / "train.jsonl", rows)
    config = tiny.write_config(
        world, rollout={"max_prompt_tokens": 100, "max_new_tokens": 8}, objective={"method": "opd"}
    )
    code, found, numbers = doctor(capsys, config=config, num_prompts=2)
    assert code == 1
    assert found["prompts"]["level"] == found["context"]["level"] == "FAIL"
    assert "1 exceed rollout.max_prompt_tokens = 100" in found["prompts"]["message"]
    assert numbers["context"]["num_too_long"] == 1
    assert found["context"]["fix"] == "leave the long prompts out."
    assert found["golden length"]["level"] == "WARN"
    # The prompts that fit are tried.
    assert numbers["student"]["num_rollouts"] == 2
    code, found, _ = doctor(
        capsys, world / "student", data=str(world / "train.jsonl"), max_new_tokens=127
    )
    assert (code, found["context"]["level"]) == (1, "FAIL")


def test_a_student_that_never_stops(capsys, world):
    config = tiny.write_config(world, rollout={"max_new_tokens": 1})
    _, found, numbers = doctor(capsys, config=config, num_prompts=2)
    assert numbers["student"]["truncation_rate"] == 1
    assert found["truncation"]["level"] == "WARN"
    assert "no rollout of the student stopped" in found["stop log-probs"]["message"]
    assert "student_event" not in numbers["stops"]


def test_an_adapter(capsys, world):
    pytest.importorskip("peft")
    config = tiny.write_config(world, student={"model": str(world / "student"), "lora_rank": 2})
    code, found, numbers = doctor(capsys, config=config, num_prompts=2)
    sizes = numbers["memory"]
    assert code == 0
    assert sizes["reference_bytes"] == 0
    assert 0 < sizes["gradients_bytes"] * 2 == sizes["adamw_bytes"] < sizes["student_bytes"]
    assert "overlap" in found


def test_tokenizers_that_differ(capsys, world):
    swapped = tiny.VOCABULARY | {"1": tiny.VOCABULARY["2"], "2": tiny.VOCABULARY["1"]}
    tiny.make_tokenizer(swapped).save_pretrained(world / "teacher")
    data = str(world / "train.jsonl")
    code, found, numbers = doctor(
        capsys, world / "student", world / "teacher", data=data, max_new_tokens=8
    )
    assert code == 1
    assert found["tokenizers"]["level"] == "FAIL"
    assert "the first is id 4, '1' to the student and '2' to the teacher" in str(found)
    assert numbers["tokenizers"]["num_differing_ids"] == 2
    # What needs no teacher goes on.
    assert {"truncation", "repetition", "loops", "golden length", "memory"} <= set(found)
    assert not {"overlap", "teacher rollouts", "stop scoring"} & set(found)


def test_stop_ids_that_cannot_be_used(capsys, world):
    file = world / "teacher" / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": V + 7}))
    config = tiny.write_config(world)
    code, found, numbers = doctor(capsys, config=config)
    assert code == 1
    assert found["stop ids"]["level"] == "FAIL"
    assert f"stop id {V + 7}" in found["stop ids"]["message"]
    assert numbers["stops"]["teacher_ids"] is None
    assert "overlap" in found


def test_a_vocabulary_that_is_too_small(capsys, world):
    small = tiny.make_llama(0, rows=12)  # "=" has id 15
    tiny.save_model(world / "student", small)
    code, found, _ = doctor(capsys, config=tiny.write_config(world))
    assert code == 1
    assert found["vocabulary"]["level"] == "FAIL"
    assert f"resize the embeddings of the student to {V} rows" in found["vocabulary"]["fix"]
    assert "left out" in found["rollouts"]["message"]


def test_pads_and_names_that_differ_are_no_fault(capsys, world):
    shutil.copytree(world / "teacher", world / "another-name")
    padded = tiny.make_llama(0, rows=V + 6, sharp=8)
    tiny.save_model(world / "student", padded)
    config = tiny.write_config(world, teacher={"model": str(world / "another-name")})
    _, found, numbers = doctor(capsys, config=config)
    assert found["tokenizers"]["level"] == "OK"
    assert found["vocabulary"]["level"] == "OK"
    assert f"the first {V} are compared" in found["vocabulary"]["message"]
    assert numbers["vocabulary"] == {
        "student_logits": V + 6,
        "teacher_logits": V,
        "tokenizer_ids": V,
        "shared": V,
        "num_needed": 16,  # the last of "0123456789+-="
    }


def test_what_cannot_be_loaded(world, tmp_path):
    with pytest.raises(ModelError, match="not a model folder"):
        run_doctor(str(tmp_path / "none"))
    with pytest.raises(ModelError, match=r"teacher\.model"):
        run_doctor(str(world / "student"), str(tmp_path / "none"))
    with pytest.raises(DataError, match=r"none\.jsonl"):
        run_doctor(str(world / "student"), data=str(tmp_path / "none.jsonl"))


def test_settings():
    with pytest.raises(ConfigError, match="nothing to examine"):
        settings_of()
    with pytest.raises(ConfigError, match="--num-prompts 0"):
        settings_of("a", num_prompts=0)
    with pytest.raises(ConfigError, match="max_new_tokens = -3"):
        settings_of("a", max_new_tokens=-3)
    alone = settings_of("a")
    assert alone.config.data.train == NO_DATA
    assert (alone.config.objective.method, alone.has_budget, alone.is_given) == (
        "sft",
        False,
        False,
    )
    pair = settings_of("a", 'b "c" é', "d.jsonl", None, ["objective.stop=token"], 7, 3, "none")
    assert pair.config.teacher.model == 'b "c" é'
    assert pair.config.data.train == "d.jsonl"
    assert (pair.config.objective.method, pair.config.objective.stop) == ("stable_opd", "token")
    assert (pair.config.rollout.max_new_tokens, pair.config.data.chat_template) == (7, "none")
    assert (pair.has_budget, pair.num_prompts) == (True, 3)
    demo = settings_of("embedded", "embedded")
    assert (demo.config.rollout.max_new_tokens, demo.config.data.train) == (96, "embedded")
    given = settings_of(config=embedded.path("demo"), max_new_tokens=50)
    assert (given.is_given, given.config.rollout.max_new_tokens) == (True, 50)
    assert settings_of("embedded").config.teacher.model == ""

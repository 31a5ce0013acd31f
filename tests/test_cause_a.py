"""Truncation collapse by stop ids that differ, on the embedded models: found, made, and avoided.

The teacher is the embedded one but stops with `<turn>`, as a post-trained model stops with another
id than its base. Nothing else distinguishes the two stops.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import tiny
from stableopd import config, embedded
from stableopd.doctor.command import run_doctor
from stableopd.rollout.stops import stop_ids_of
from stableopd.training.loop import train as steps
from stableopd.training.setup import prepare

sys.path.insert(0, str(Path(__file__).parent.parent / "recipes" / "collapse-and-cure"))

import worlds

END, TURN = 1, 18
STEPS = 15


def make_pair(folder: Path) -> Path:
    """Write the embedded student and teacher with one token more, the teacher's stop."""
    for role in ("student", "teacher"):
        tiny.save_model(folder / role, *worlds.other_stop(f"different-{role}", folder))
    return folder


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return make_pair(tmp_path_factory.mktemp("pair"))


def test_the_pair_differs_in_its_stops_alone(pair):
    models = {}
    for role in ("student", "teacher"):
        model = AutoModelForCausalLM.from_pretrained(pair / role)
        tokenizer = AutoTokenizer.from_pretrained(pair / role)
        models[role] = model
        golden = tokenizer("47+8-3+6:47+8=55;55-3=52;52+6=58;#58", return_tensors="pt")
        before = AutoModelForCausalLM.from_pretrained(embedded.path(role))
        with torch.no_grad():
            new, old = (
                torch.softmax(m(input_ids=golden["input_ids"]).logits[0, -1], -1)
                for m in (model, before)
            )
        stop = END if role == "student" else TURN
        assert new[stop].item() == pytest.approx(old[END].item(), rel=0.01)
        assert new[stop].item() > 0.8
        assert new[END + TURN - stop].item() < 1e-4
        assert stop_ids_of(model, tokenizer) == (stop,)


@pytest.mark.parametrize(
    ("stop", "levels"), [("event", ["WARN", "WARN", "OK"]), ("token", ["WARN", "WARN", "WARN"])]
)
def test_the_doctor_finds_it(pair, capsys, stop, levels):
    code = run_doctor(
        *(str(pair / role) for role in ("student", "teacher")),
        data="embedded",
        max_new_tokens=96,
        overrides=["data.answer_marker=;#", f"objective.stop={stop}"],
        as_json=True,
    )
    told = json.loads(capsys.readouterr().out)
    found = {finding["name"]: finding for finding in told["findings"]}
    assert code == 0
    names = ("stop ids", "stop scoring", "stop log-probs")
    assert [found[name]["level"] for name in names] == levels
    assert "the student stops with 1 (<end>), the teacher with 18" in found["stop ids"]["message"]
    for name in names[:2]:
        assert 'objective.stop = "event"' in found[name]["fix"]
    stops = told["numbers"]["stops"]
    assert (stops["student_ids"], stops["teacher_ids"]) == ([END], [TURN])
    assert stops["student_token"] == pytest.approx(stops["student_event"], abs=0.01)
    assert stops["teacher_event"] > -2
    assert stops["teacher_token"] < -10


def train(pair: Path, run: Path, stop: str) -> list[dict]:
    """Steps of plain OPD with the demo's settings, at a rate at which 15 of them are enough."""
    changes = {
        "run.output": str(run),
        "run.steps": STEPS,
        "run.save_every": STEPS,
        "run.device": "cpu",
        "student.model": str(pair / "student"),
        "teacher.model": str(pair / "teacher"),
        "objective.method": "opd",
        "objective.stop": stop,
        "optimizer.learning_rate": 1e-3,
        "optimizer.warmup_steps": 5,
        "rollout.prompts_per_step": 8,
        "eval.data": "",
    }
    overrides = [f"{field}={json.dumps(value)}" for field, value in changes.items()]
    prepared = prepare(config.load(embedded.path("demo"), overrides))
    return list(steps(prepared, lambda: False))


def mean(lines: list[dict], name: str) -> float:
    return sum(line[name] for line in lines) / len(lines)


def test_plain_opd_by_token_runs_away_and_by_event_does_not(pair, tmp_path):
    runs = {stop: train(pair, tmp_path / stop, stop) for stop in ("token", "event")}
    first, last = (
        {s: lines[part] for s, lines in runs.items()} for part in (slice(2), slice(-2, None))
    )
    for stop in runs:
        assert mean(first[stop], "rollout/truncation_rate") == 0
        assert mean(first[stop], "stop/student_logp") == pytest.approx(-0.15, abs=0.05)
    # Log-probs of the teacher at the student's first stops: forbidden, or almost as likely.
    assert mean(first["token"], "stop/teacher_logp") < -10
    assert mean(first["event"], "stop/teacher_logp") > -1.5
    # Three seeds: .66 to .75 at step 15; .00 with the event.
    assert mean(last["token"], "rollout/truncation_rate") > 0.4
    assert mean(last["token"], "rollout/mean_length") > 65
    assert mean(last["token"], "stop/student_logp") < -3
    assert mean(last["event"], "rollout/truncation_rate") == 0
    assert mean(last["event"], "rollout/mean_length") < 35
    assert mean(last["event"], "stop/student_logp") > -1

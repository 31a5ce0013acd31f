"""`StableOPDTrainer` in two processes against the same run in one; a hang fails by its limit."""

import pytest
import torch
from accelerate.state import AcceleratorState

import parallel_parts
import trl_steps

# TRL 1.16 and peft 0.21 ask transformers 5.23 for a setting by its former name.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")

server = parallel_parts.server  # a fixture

OPTIONS = {"environment": {"CI": "1"}, "limit": 120}


@pytest.fixture(autouse=True)
def _no_telemetry(monkeypatch):
    monkeypatch.setenv("CI", "1")
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def assert_adds_up(log):
    for line in log:
        terms = line["loss/divergence"] + 0.5 * line["loss/golden"]
        assert line["loss"] == pytest.approx(terms + 2.0 * line["loss/reference_kl"], rel=1e-6)


def test_two_processes_are_one_where_some_micro_batches_have_no_solution(server, tmp_path):
    log, lines, weights = trl_steps.train(str(tmp_path / "one"), 1)
    assert [line["golden/share"] for line in log] == [1 / 8, 0, 7 / 8]
    assert log[1]["loss/golden"] == 0 < log[0]["loss/golden"]
    assert_adds_up(log)
    for found in server.call("trl_steps:train", str(tmp_path / "two"), 2, **OPTIONS):
        assert_adds_up(found[0])
        for line, expected in zip(found[0], log, strict=True):
            names = {name for name in expected if name.startswith(("loss", "golden/", "rollout/"))}
            assert {n: line[n] for n in names} == pytest.approx({n: expected[n] for n in names})
        assert [line.keys() for line in found[1]] == [line.keys() for line in lines]
        assert [line["step"] for line in found[1]] == [1, 2, 3]
        for name, weight in weights.items():
            torch.testing.assert_close(found[2][name], weight, rtol=0, atol=1e-9)


def test_what_is_not_finite_in_one_process_ends_all(server, tmp_path):
    found = server.call("trl_steps:fail", str(tmp_path), **OPTIONS)
    assert found[0] == found[1]
    message, is_unchanged = found[0]
    assert "loss/divergence is nan" in message
    assert is_unchanged


def test_data_that_one_process_cannot_use_end_all(server, tmp_path):
    found = server.call("trl_steps:refuse", str(tmp_path), **OPTIONS)
    assert found[0] == found[1]
    assert "row 1" in found[0]

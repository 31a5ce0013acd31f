"""Steps of two processes against the same steps of one: the same losses, norms, weights."""

import pytest
import torch

import parallel_parts
from parallel_steps import LEARNING_RATE, NUM_STEPS, take_steps

server = parallel_parts.server  # a fixture

CASES = {
    "all terms": {"objective": {"beta_reference": 0.3}},
    "tied": {"tied": True, "objective": {"reference_kl": "k3"}},
    "gkd in one batch": {"method": "gkd", "micro_batch_tokens": 10**6},
    "two updates": {"objective": {"updates_per_batch": 2, "aggregation": "token"}},
    "group rewards": {"method": "grpo", "micro_batch_tokens": 1},
    "adapter": {"lora": True, "objective": {"beta_reference": 0.3}},
    "checkpointing": {"checkpointing": True},
    "one golden solution": {"num_golden": 1, "objective": {"golden_stop_label": False}},
    "one rollout": {"num_rollouts": 1, "num_golden": 0},
    "nothing counts": {
        "method": "opd",
        "only_truncated": True,
        "objective": {"mask_truncated": True, "first_n": 3},
    },
    "truncated and golden": {
        "only_truncated": True,
        "num_golden": 1,
        "objective": {"mask_truncated": True, "aggregation": "constant"},
    },
    "no work at all": {"method": "sft", "num_golden": 0},
}


# Llama's norms compute in float32, and processes run them over other shapes: one rounding in each
# of five norms, forward and backward. Adam turns those of a gradient into as much of a step of
# LEARNING_RATE, NUM_STEPS times.
ROUNDING = 10 * 2.0**-24


def assert_same(found, expected):
    results, weights = found
    for result, other in zip(results, expected[0], strict=True):
        assert result.losses == pytest.approx(other.losses, rel=ROUNDING, abs=1e-12)
        assert result.grad_norm == pytest.approx(other.grad_norm, rel=ROUNDING, abs=1e-12)
        assert result.token_means == pytest.approx(other.token_means, rel=1e-6)
        for name in ("student_logps", "teacher_logps", "advantages"):
            pairs = zip(getattr(result, name), getattr(other, name), strict=True)
            assert all(list(a) == pytest.approx(list(b), abs=1e-5) for a, b in pairs), name
    assert weights.keys() == expected[1].keys()
    largest = NUM_STEPS * LEARNING_RATE * ROUNDING
    for name, weight in weights.items():
        torch.testing.assert_close(weight, expected[1][name], rtol=0, atol=largest)


@pytest.fixture(scope="module")
def found(server):
    """What every process of two gave for each case, by whether the weights were sharded."""
    return {
        shards: server.call("parallel_steps:take_all", CASES, shards) for shards in (False, True)
    }


@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_two_processes_are_one(found, case, shards):
    expected = take_steps(CASES[case])
    for one in found[shards]:
        assert_same(one[case], expected)
    # The cases do what their names say: weights move, but where there is nothing to learn from.
    norms = [result.grad_norm for result in expected[0]]
    assert (max(norms) > 1e-3) == (case not in ("nothing counts", "no work at all"))


@pytest.mark.parametrize(("shards", "offloads"), [(True, True), (False, False)])
def test_three_processes_and_weights_on_the_cpu(server, shards, offloads):
    cases = {"all terms": CASES["all terms"]}
    expected = take_steps(cases["all terms"])
    for one in server.call("parallel_steps:take_all", cases, shards, offloads, num=3):
        assert_same(one["all terms"], expected)


@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("broken", ["teacher", "student"])
def test_what_is_not_finite_in_one_process_ends_all(server, broken, shards):
    found = server.call("parallel_steps:fail", broken, shards)
    words = {"teacher": "the teacher gave a log-prob that is not finite", "student": "is nan"}
    for message, is_shared, num_states in found:
        assert words[broken] in message
        assert is_shared
        assert num_states == 0
    assert found[0] == found[1]


@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("lora", [False, True])
def test_a_checkpoint_is_put_back_while_a_run_goes_on(server, tmp_path, lora, shards):
    for found in server.call("parallel_steps:put_back", str(tmp_path), shards, lora):
        assert found == [True] * 4


def test_processes_that_have_read_different_things_are_refused(server):
    assert server.call("parallel_steps:differ", [1, 1]) == [None, None]
    words = (
        "process 1 of 2 has read another data set than the main process; give all machines the "
        "same files and the same command."
    )
    assert server.call("parallel_steps:differ", [1, 2]) == [(words, True)] * 2

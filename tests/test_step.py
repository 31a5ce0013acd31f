import copy
import math

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from stableopd.config import load
from stableopd.rollout.sampler import TransformersSampler
from stableopd.teacher.local import FrozenModel
from stableopd.training.devices import clock
from stableopd.training.loop import train
from stableopd.training.setup import prepare
from stableopd.training.step import step
from stableopd.training.terms import Players
from stableopd.types import StopReason, TrainingError
from step_parts import (
    AGGREGATIONS,
    SETTINGS,
    STOPS,
    Counted,
    flat,
    make_golden,
    make_rollouts,
    model,
    objective,
    players,
    run,
    work,
)
from tiny import EOS, PAD, V, make_tokenizer, make_world, save_model, write_config


def test_scoring_time_is_that_of_all_updates(monkeypatch):
    ticks = iter(range(1000))
    monkeypatch.setattr("time.perf_counter", lambda: float(next(ticks)))
    one = run(players(model(0), model(1)), work(objective("opd")), micro_batch_tokens=10**6)
    two = objective("opd", updates_per_batch=2)
    both = run(players(model(0), model(1)), work(two), micro_batch_tokens=10**6)
    assert (one.score_s, both.score_s) == (1.0, 2.0)


def test_the_clock_waits_for_a_device_that_computes_by_itself(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.accelerator, "synchronize", waited.append)
    assert clock(torch.device("cpu")) <= clock(torch.device("cuda", 1))
    assert waited == [torch.device("cuda", 1)]


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("switches", [{}, {"first_n": 3, "mask_truncated": True}])
def test_micro_batches_change_nothing(aggregation, switches):
    chosen = objective(aggregation=aggregation, beta_reference=0.3, **switches)
    results, parameters = [], []
    for micro_batch_tokens in (10**6, 40, 1):
        student = model(0)
        who = players(student, model(1, 48), model(2))
        results.append(run(who, work(chosen), micro_batch_tokens=micro_batch_tokens))
        parameters.append(flat(student))
    for result, found in zip(results[1:], parameters[1:], strict=True):
        torch.testing.assert_close(found, parameters[0], rtol=0, atol=1e-9)
        assert result.losses == pytest.approx(results[0].losses, rel=1e-9)
        assert result.student_logps == tuple(map(pytest.approx, results[0].student_logps))
        assert result.advantages == tuple(
            pytest.approx(values, abs=1e-5) for values in results[0].advantages
        )
        assert result.token_means == pytest.approx(results[0].token_means, rel=1e-9)
    assert (parameters[0] - flat(model(0))).abs().max() > 1e-3


def test_the_padding_id_changes_nothing():
    found = []
    for pad in (PAD, EOS, 17):
        student = model(0)
        who = players(student, model(1, 48), model(2))
        run(Players(**{**vars(who), "pad_id": pad}), work(objective()), micro_batch_tokens=10**6)
        found.append(flat(student))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize(
    ("chosen", "rows"),
    [
        (objective("stable_opd"), 13),  # 3 prompts with 6 rollouts, 1 with 3 golden solutions
        (objective("opd"), 9),
        (objective("sft"), 4),
        (objective("grpo"), 9),
        (objective("gkd"), 9),
        (objective("stable_opd", lambda_gold=0), 9),
    ],
)
def test_a_term_without_weight_is_not_computed(chosen, rows):
    student = model(0)
    counted = Counted(student)
    teacher = None if chosen.method in ("sft", "grpo") else model(1)
    reference = model(2) if chosen.beta_reference else None
    result = run(players(student, teacher, reference), work(chosen), micro_batch_tokens=10**6)
    assert (counted.calls, counted.rows) == (2, rows)  # prompts, then completions
    weights = {
        "opd": chosen.lambda_policy,
        "golden": chosen.lambda_gold,
        "reference_kl": chosen.beta_reference,
        "divergence": chosen.lambda_divergence,
    }
    assert set(result.losses) - {"total"} == {name for name, weight in weights.items() if weight}


def test_teacher_and_reference_are_called_once_an_update_and_never_changed():
    teacher, reference = model(1), model(2)
    before = flat(teacher), flat(reference)
    calls = Counted(teacher), Counted(reference)
    chosen = objective(updates_per_batch=3)
    run(players(model(0), teacher, reference), work(chosen), micro_batch_tokens=10**6)
    assert [(c.calls, c.rows) for c in calls] == [(6, 27), (6, 27)]
    assert torch.equal(flat(teacher), before[0])
    assert torch.equal(flat(reference), before[1])
    assert all(p.grad is None for p in (*teacher.parameters(), *reference.parameters()))


def fails(who, batch, words):
    before = flat(who.student)
    optimizer = torch.optim.AdamW(who.student.parameters(), lr=0.1)
    with pytest.raises(TrainingError, match=words):
        step(who, optimizer, batch, micro_batch_tokens=40, grad_clip=1.0)
    assert torch.equal(flat(who.student), before)
    assert not optimizer.state_dict()["state"]


def test_a_loss_that_is_not_finite():
    rewards = torch.tensor([1.0, 0.0, math.inf, 0.0, 0.0, 0.0])
    batch = work(objective("grpo"), rewards=rewards)
    fails(players(model(0)), batch, r"loss/opd is -inf; this update was not made")


def test_a_gradient_that_is_not_finite():
    rewards = torch.full((6,), 1e200, dtype=torch.float64)
    batch = work(objective("grpo"), rewards=rewards)
    fails(players(model(0)), batch, "the norm of the gradient is (inf|nan)")


@pytest.mark.parametrize("method", ["opd", "gkd"])
def test_a_teacher_that_is_not_finite(method):
    teacher = model(1)
    with torch.no_grad():
        teacher.lm_head.weight[5, 5] = math.nan
    fails(players(model(0), teacher), work(objective(method)), "the teacher gave a log-prob")


def test_a_student_that_is_not_finite():
    student = model(0)
    with torch.no_grad():
        student.model.embed_tokens.weight[make_golden()[0].completion_ids[0]] = math.nan
    before = student.lm_head.weight.clone()
    with pytest.raises(TrainingError, match="loss/golden is nan"):
        run(players(student), work(objective("sft")))
    assert torch.equal(student.lm_head.weight, before)


@pytest.mark.parametrize("fields", [{}, {"first_n": 2}, {"aggregation": "constant"}])
def test_where_nothing_counts_nothing_moves(fields):
    cut_off = [r for r in make_rollouts() if r.stop_reason is StopReason.LENGTH]
    student = model(0)
    before = flat(student)
    batch = work(objective("opd", mask_truncated=True, **fields), rollouts=cut_off)
    result = run(players(student, model(1)), batch)
    assert result.losses == {"opd": 0.0, "total": 0.0}
    assert result.grad_norm == 0.0
    assert torch.equal(flat(student), before)


def test_a_step_without_golden_solutions():
    student = model(0)
    result = run(players(student), work(objective("sft"), golden=[]))
    assert result.losses == {"total": 0}
    assert result.grad_norm == 0.0


@pytest.mark.parametrize("baseline", ["none", "kl"])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_zero_distance(baseline, temperature):
    student = model(0)
    teacher = FrozenModel(copy.deepcopy(student), V, temperature)
    who = Players(**{**vars(players(student, temperature=temperature)), "teacher": teacher})
    before = flat(student)
    result = run(who, work(objective("opd", baseline=baseline)))
    assert all(abs(a) < 1e-12 for values in result.advantages for a in values)
    assert result.grad_norm < 1e-12
    assert result.token_means["overlap/ratio"] == 1.0
    torch.testing.assert_close(flat(student), before, rtol=0, atol=1e-12)


def test_zero_distance_of_the_divergence():
    student = model(0)
    result = run(players(student, copy.deepcopy(student)), work(objective("gkd")))
    assert abs(result.losses["total"]) < 1e-12
    assert result.grad_norm < 1e-9


def test_the_reference_holds_back_nothing_at_the_start():
    student = model(0)
    with_it = run(players(student, None, copy.deepcopy(student)), work(objective("grpo")))
    chosen = objective("grpo", beta_reference=100.0)
    student = model(0)
    without = run(players(student, None, copy.deepcopy(student)), work(chosen))
    assert without.losses["reference_kl"] == pytest.approx(0.0, abs=1e-12)
    assert without.grad_norm == pytest.approx(with_it.grad_norm, rel=1e-6)


def test_gradients_are_clipped_and_the_norm_is_told_before():
    chosen, moved = objective("sft"), []
    for grad_clip in (1e9, 0.5):
        student = model(0)
        before = flat(student)
        result = run(players(student), work(chosen), lr=1.0, grad_clip=grad_clip)
        moved.append((result.grad_norm, (flat(student) - before).norm().item()))
    (norm, whole), (same_norm, clipped) = moved
    assert norm == pytest.approx(same_norm)
    assert whole == pytest.approx(norm, rel=1e-9)
    assert clipped == pytest.approx(0.5, rel=1e-4)


# loss/total and grad_norm of five steps. Another number here is a `(changes results)`.
PINNED = (
    (5.264465885061186, 20.93716446675563),
    (3.1204427912259765, 15.402936867257436),
    (3.09306422190341, 18.78793287735179),
    (2.748317852375592, 14.112376324306274),
    (2.025358001986137, 8.67593540160325),
)


def test_pinned_run():
    student, teacher, reference = model(0, sharp=8), model(1, 48, sharp=8), model(0, sharp=8)
    who = players(student, teacher, reference)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2, weight_decay=0.0)
    sampler = TransformersSampler(student, make_tokenizer(), STOPS, V)
    prompts = [(f"p{i}", (3 + i, 13, 3 + i, 15)) for i in range(4)]
    found = []
    for number in range(5):
        rollouts = sampler.sample(prompts, 2, SETTINGS, seed=number)
        batch = work(objective(), rollouts)
        result = step(who, optimizer, batch, micro_batch_tokens=40, grad_clip=1.0)
        found.append((result.losses["total"], result.grad_norm))
    assert found == [pytest.approx(pair, rel=1e-5) for pair in PINNED]


@pytest.mark.parametrize("method", ["sft", "grpo", "opd"])
def test_models_that_no_term_needs_are_not_loaded(tmp_path, method):
    world = make_world(tmp_path / "w")
    teacher = world / ("teacher" if method == "opd" else "none")
    fields = {"method": method}
    config = write_config(world, teacher={"model": str(teacher)}, objective=fields)
    who = prepare(load(config)).players
    assert (who.teacher is None) == (method != "opd")
    assert who.reference is None
    assert not (world / "run").exists()


def test_gradient_checkpointing_changes_nothing_not_even_dropout(tmp_path):
    world = make_world(tmp_path / "w")
    torch.manual_seed(0)
    sizes = {"vocab_size": V, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
    gpt2 = GPT2LMHeadModel(GPT2Config(**sizes, eos_token_id=EOS, bos_token_id=EOS))
    assert gpt2.config.resid_pdrop == 0.1
    save_model(world / "student", gpt2)
    norms = {}
    for saves_memory in (False, True):
        fields = {"gradient_checkpointing": saves_memory, "model": str(world / "student")}
        config = write_config(world, student=fields, run={"output": str(world / f"{saves_memory}")})
        prepared = prepare(load(config))
        layers = prepared.student.model.transformer.h
        again = []
        layers[0].mlp.register_forward_pre_hook(
            lambda *_, again=again: again.append(torch._C._current_graph_task_id() != -1)
        )
        norms[saves_memory] = [line["grad_norm"] for line in train(prepared, lambda: False)]
        # With checkpointing layers are computed again while a backward pass runs.
        assert any(again) == saves_memory
    assert norms[True] == pytest.approx(norms[False], rel=1e-5)

import copy
import math
import random
from types import SimpleNamespace

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from stableopd.config import load, parse
from stableopd.objective.advantage import group_reward
from stableopd.rollout.sampler import TransformersSampler
from stableopd.teacher.local import FrozenModel
from stableopd.training.loop import train
from stableopd.training.setup import prepare
from stableopd.training.step import step
from stableopd.training.terms import Players, Work
from stableopd.types import Rollout, SamplingSettings, Sequence, StopReason, TrainingError
from tiny import (
    END,
    EOS,
    PAD,
    V,
    make_llama,
    make_tokenizer,
    make_world,
    save_model,
    write_config,
)

STOPS = (EOS, END)
MAX_LENGTH = 9
SETTINGS = SamplingSettings(MAX_LENGTH)


def objective(method="stable_opd", **fields):
    table = {"student": {"model": "s"}, "teacher": {"model": "t"}, "data": {"train": "d"}}
    return parse(table | {"objective": {"method": method, **fields}}).objective


def model(seed, width=32, sharp=30.0):
    return make_llama(seed, width, sharp=sharp).double()


def make_rollouts(seed=0):
    """Three prompts with two rollouts each; stops of both ids, and two that were cut off."""
    draw = random.Random(seed)
    rollouts = []
    for i, (length, stop) in enumerate([(4, EOS), (9, 0), (2, END), (6, EOS), (9, 0), (1, EOS)]):
        body = tuple(draw.randrange(3, V) for _ in range(length - bool(stop)))
        prompt = tuple(draw.randrange(3, V) for _ in range(3 + i // 2))
        reason = StopReason.STOP if stop else StopReason.LENGTH
        ids = (*body, stop) if stop else body
        rollouts.append(Rollout(f"p{i // 2}", prompt, ids, "", reason, (0.0,) * length, SETTINGS))
    return rollouts


def make_golden(seed=1):
    draw = random.Random(seed)
    return [
        Sequence((3, 4, 5), (*(draw.randrange(3, V) for _ in range(length)), EOS), True, i)
        for i, length in enumerate((3, 7, 1))
    ]


def players(student, teacher=None, reference=None, temperature=1.0, event=True):
    return Players(
        student=student,
        num_tokens=V,
        teacher=None if teacher is None else FrozenModel(teacher, V),
        reference=None if reference is None else FrozenModel(reference, V, temperature),
        stop_ids=torch.tensor(STOPS if event else (EOS,)),
        stop_is_event=event,
        temperature=temperature,
        pad_id=PAD,
    )


def work(chosen, rollouts=None, golden=None, rewards=None):
    uses_rollouts = chosen.lambda_policy or chosen.lambda_divergence or chosen.beta_reference
    rollouts = (make_rollouts() if rollouts is None else rollouts) if uses_rollouts else []
    golden = make_golden() if golden is None else golden
    if chosen.advantage == "group_reward" and rewards is None:
        rewards = group_reward(torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 1.0]), 2)
    return Work(chosen, rollouts, golden, rewards, MAX_LENGTH)


def run(who, batch, lr=0.1, micro_batch_tokens=40, grad_clip=1e9):
    optimizer = torch.optim.SGD([p for p in who.student.parameters() if p.requires_grad], lr)
    return step(who, optimizer, batch, micro_batch_tokens=micro_batch_tokens, grad_clip=grad_clip)


def flat(student):
    return torch.cat([p.detach().reshape(-1) for p in student.parameters()]).clone()


# The same mathematics once more: one sequence at a time, unpadded, whole softmax, torch alone.


def distribution(language_model, prompt_ids, completion_ids, temperature=1.0):
    """Probabilities of "stop" and of all other tokens, and the places of the targets there."""
    ids = torch.tensor([[*prompt_ids, *completion_ids]])
    logits = language_model(input_ids=ids).logits[0, len(prompt_ids) - 1 : -1]
    probs = torch.softmax(logits / temperature, -1)
    others = [i for i in range(V) if i not in STOPS]
    merged = torch.cat([probs[:, list(STOPS)].sum(1, keepdim=True), probs[:, others]], 1)
    places = [0 if i in STOPS else 1 + others.index(i) for i in completion_ids]
    return merged, torch.tensor(places)


def kl(p, q):
    return (p * (p / q).log()).sum(-1)


def renormalised(p, q, k):
    best = q.topk(k).indices
    p, q = p.gather(1, best), q.gather(1, best)
    return p / p.sum(1, keepdim=True), q / q.sum(1, keepdim=True)


def divergence(chosen, p, q):
    if chosen.top_k:
        p, q = renormalised(p, q, chosen.top_k)
    middle = (p + q) / 2
    return {
        "reverse_kl": lambda: kl(p, q),
        "forward_kl": lambda: kl(q, p),
        "jensen_shannon": lambda: kl(p, middle) / 2 + kl(q, middle) / 2,
    }[chosen.divergence]()


def mean(values, aggregation):
    """The mean of lists of counted values, one list a sequence."""
    values = [v for v in values if len(v)]
    if not values:
        return torch.zeros(())
    if aggregation == "sequence":
        return sum(v.mean() for v in values) / len(values)
    total = sum(v.sum() for v in values)
    if aggregation == "token":
        return total / sum(len(v) for v in values)
    return total / (len(values) * MAX_LENGTH)


def reference_value(chosen, p, q, logp, ref_logp):
    return {
        "exact": lambda: kl(p, q),
        "k1": lambda: logp - ref_logp,
        "k2": lambda: (logp - ref_logp) ** 2 / 2,
        "k3": lambda: (ref_logp - logp).exp() - 1 - (ref_logp - logp),
    }[chosen.reference_kl]()


def dense_losses(batch, student, teacher, reference, counts, temperature=1.0, old=None):
    """Unweighted terms; `counts(i, rollout)` are the places of a rollout that the policy counts."""
    chosen, terms, logps = batch.objective, {"opd": [], "reference_kl": [], "divergence": []}, []
    for i, r in enumerate(batch.rollouts):
        p, places = distribution(student, r.prompt_ids, r.completion_ids, temperature)
        at = (torch.arange(len(places)), places)
        logp = p[at].log()
        logps.append(logp.detach())
        before = logp.detach() if old is None else old[i]
        q = ref = None
        if teacher is not None:
            q = distribution(teacher, r.prompt_ids, r.completion_ids)[0].detach()
            terms["divergence"].append(divergence(chosen, p, q))
        if reference is not None:
            ref = distribution(reference, r.prompt_ids, r.completion_ids, temperature)[0].detach()
            terms["reference_kl"].append(reference_value(chosen, p, ref, logp, ref[at].log()))
        credit = torch.full_like(before, 0.0 if batch.rewards is None else float(batch.rewards[i]))
        if batch.rewards is None and q is not None:
            credit = q[at].log() - before
        if chosen.baseline == "kl":
            credit = credit + kl(p, q).detach()
        if reference is not None and chosen.reference_kl == "k1":
            weight = chosen.beta_reference / chosen.lambda_policy
            credit = credit - weight * (before - ref[at].log())
        if chosen.prefix_gain:
            spent = torch.stack([credit[:t].abs().sum() for t in range(len(credit))])
            share = spent / credit.abs().sum()
            credit = credit * (1 + chosen.prefix_gain * (1 - share))
        ratio = (logp - before).exp()
        gain = ratio * credit
        if chosen.clip is not None:
            bounded = ratio.clamp(1 - chosen.clip, 1 + chosen.clip) * credit
            gain = torch.stack([gain, bounded]).amin(0)
        terms["opd"].append(-gain[counts(i, r)])
    golden = []
    for s in batch.golden:
        p, places = distribution(student, s.prompt_ids, s.completion_ids, temperature)
        loss = -p[torch.arange(len(places)), places].log()
        golden.append(loss if chosen.golden_stop_label else loss[:-1])
    losses = {name: mean(values, chosen.aggregation) for name, values in terms.items()}
    return {**losses, "golden": mean(golden, chosen.aggregation)}, logps


def weighted(chosen, losses):
    beta = 0.0 if chosen.reference_kl == "k1" else chosen.beta_reference
    return (
        chosen.lambda_policy * losses["opd"]
        + chosen.lambda_gold * losses["golden"]
        + chosen.lambda_divergence * losses["divergence"]
        + beta * losses["reference_kl"]
    )


def everything(_, rollout):
    return slice(None)


def compare(chosen, counts=everything, temperature=1.0, lr=0.1, needs_teacher=True, rel=1e-9):
    """Do a step, and the same densely; losses, gradient norm and parameters agree."""
    student, batch = model(0), work(chosen)
    teacher = model(1, 48) if needs_teacher else None
    reference = model(2) if chosen.beta_reference else None
    twin = copy.deepcopy(student)
    result = run(players(student, teacher, reference, temperature), batch, lr)
    old = losses = None
    for _ in range(chosen.updates_per_batch):
        losses, logps = dense_losses(batch, twin, teacher, reference, counts, temperature, old)
        old = logps if old is None else old
        total = weighted(chosen, losses)
        gradients = torch.autograd.grad(total, list(twin.parameters()))
        norm = math.sqrt(sum(float(g.square().sum()) for g in gradients))
        with torch.no_grad():
            for parameter, gradient in zip(twin.parameters(), gradients, strict=True):
                parameter -= lr * gradient
    assert result.losses["total"] == pytest.approx(total.item(), rel=rel)
    assert result.grad_norm == pytest.approx(norm, rel=rel)
    assert norm > 0.01
    for name, value in result.losses.items():
        if name != "total":
            assert value == pytest.approx(losses[name].item(), rel=rel, abs=1e-12), name
    torch.testing.assert_close(flat(student), flat(twin), rtol=rel, atol=rel)
    for mine, theirs in zip(result.student_logps, old or [], strict=False):
        assert mine == pytest.approx(theirs.tolist(), rel=1e-5)  # kept in float32
    return result


AGGREGATIONS = ("sequence", "token", "constant")


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("method", ["stable_opd", "gkd", "grpo", "sft"])
def test_losses_and_gradients_equal_the_dense_formula(method, aggregation):
    chosen = objective(method, aggregation=aggregation)
    result = compare(chosen, needs_teacher=method in ("stable_opd", "gkd"))
    names = {
        "stable_opd": {"opd", "golden", "reference_kl"},
        "gkd": {"divergence"},
        "grpo": {"opd"},
        "sft": {"golden"},
    }[method]
    assert set(result.losses) == names | {"total"}


@pytest.mark.parametrize(
    "fields",
    [
        {"method": "stable_opd", "reference_kl": "k1", "beta_reference": 0.7, "lambda_policy": 2},
        {"method": "stable_opd", "reference_kl": "k2", "beta_reference": 0.7},
        {"method": "stable_opd", "reference_kl": "k3", "beta_reference": 0.01},
        {"method": "stable_opd", "lambda_gold": 0.3, "lambda_divergence": 0.5},
        {"method": "opd", "baseline": "kl"},
        {"method": "opd", "baseline": "kl", "lambda_divergence": 0.5},
        {"method": "opd", "prefix_gain": 0.5},
        {"method": "gkd", "divergence": "forward_kl"},
        {"method": "gkd", "divergence": "jensen_shannon"},
        {"method": "gkd", "top_k": 4},
        {"method": "gkd", "top_k": 4, "divergence": "forward_kl", "beta_reference": 0.2},
    ],
    ids=str,
)
def test_switches_equal_the_dense_formula(fields):
    compare(objective(**fields))


def test_grpo_with_a_reference_as_reward():
    compare(objective("grpo", beta_reference=0.3, reference_kl="k1"), needs_teacher=False)


@pytest.mark.parametrize("method", ["stable_opd", "gkd"])
def test_temperature_is_that_of_student_and_reference_and_not_the_teachers(method):
    compare(objective(method, beta_reference=0.2), temperature=0.6)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_first_n(aggregation):
    compare(objective(first_n=2, aggregation=aggregation), counts=lambda i, r: slice(0, 2))


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_mask_truncated(aggregation):
    cut_off = (1, 4)
    compare(
        objective(mask_truncated=True, aggregation=aggregation),
        counts=lambda i, r: slice(0, 0 if i in cut_off else None),
    )


def test_mask_truncated_with_first_n():
    compare(
        objective("opd", mask_truncated=True, first_n=3),
        counts=lambda i, r: slice(0, 0 if i in (1, 4) else 3),
    )


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_golden_stop_label_off(aggregation):
    compare(objective(golden_stop_label=False, aggregation=aggregation))


def test_the_golden_stop_label_is_worth_its_own_cross_entropy():
    golden, student = make_golden(), model(0)
    p, places = distribution(student, golden[1].prompt_ids, golden[1].completion_ids)
    logps = p[torch.arange(8), places].log()
    for stop_label, counted in ((True, logps), (False, logps[:-1])):
        chosen = objective("sft", golden_stop_label=stop_label)
        result = run(players(copy.deepcopy(student)), work(chosen, golden=golden[1:2]))
        assert result.losses["golden"] == pytest.approx(-counted.mean().item(), rel=1e-9)


def test_two_updates_clip_the_ratio():
    chosen = objective("stable_opd", updates_per_batch=2, clip=0.1)
    # The log-probs of the first update are kept in float32.
    result = compare(chosen, lr=0.2, rel=1e-6)
    first = compare(objective("stable_opd"), lr=0.2)
    assert result.student_logps == first.student_logps
    assert result.advantages == first.advantages
    # With a ratio of 1 everywhere the policy term would be minus the mean advantage again.
    assert abs(result.losses["opd"] - first.losses["opd"]) > 0.01
    unclipped = compare(objective("stable_opd", updates_per_batch=2, clip=1.0), lr=0.2, rel=1e-6)
    assert abs(result.losses["opd"] - unclipped.losses["opd"]) > 0.01


def test_scoring_time_is_that_of_all_updates(monkeypatch):
    ticks = iter(range(1000))
    monkeypatch.setattr("time.perf_counter", lambda: float(next(ticks)))
    one = run(players(model(0), model(1)), work(objective("opd")), micro_batch_tokens=10**6)
    two = objective("opd", updates_per_batch=2)
    both = run(players(model(0), model(1)), work(two), micro_batch_tokens=10**6)
    assert (one.score_s, both.score_s) == (1.0, 2.0)


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


class Counted:
    """How often a model is called."""

    def __init__(self, language_model):
        self.calls = 0
        language_model.base_model.register_forward_pre_hook(self._count)

    def _count(self, *_):
        self.calls += 1


@pytest.mark.parametrize(
    ("chosen", "calls"),
    [
        (objective("stable_opd"), 2),  # rollouts and golden solutions
        (objective("opd"), 1),
        (objective("sft"), 1),
        (objective("grpo"), 1),
        (objective("gkd"), 1),
        (objective("stable_opd", lambda_gold=0), 1),
    ],
)
def test_a_term_without_weight_is_not_computed(chosen, calls):
    student = model(0)
    counted = Counted(student)
    teacher = None if chosen.method in ("sft", "grpo") else model(1)
    reference = model(2) if chosen.beta_reference else None
    result = run(players(student, teacher, reference), work(chosen), micro_batch_tokens=10**6)
    assert counted.calls == calls
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
    assert [c.calls for c in calls] == [3, 3]
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
    (4.799827855714491, 21.409519574752704),
    (3.3593444564465047, 14.221975436917639),
    (3.01721646154879, 15.906335964040629),
    (2.494955291073864, 11.51294124270661),
    (1.925542091283685, 15.469071188953329),
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
        calls = Counted(SimpleNamespace(base_model=layers[0].mlp))
        norms[saves_memory] = [line["grad_norm"] for line in train(prepared, lambda: False)]
        norms[f"calls {saves_memory}"] = calls.calls
    assert norms[True] == pytest.approx(norms[False], rel=1e-5)
    # Layers are computed again for the gradient, so checkpointing was on.
    assert norms["calls True"] > norms["calls False"]

import copy
import math

import pytest
import torch

from stableopd.objective import logprobs
from step_parts import (
    AGGREGATIONS,
    MAX_LENGTH,
    STOPS,
    flat,
    make_golden,
    model,
    objective,
    players,
    run,
    work,
)
from tiny import V


@pytest.fixture(autouse=True, params=["chunks", "sweep"])
def way_of_scoring(request, monkeypatch):
    """Everything here holds for both ways to score tokens."""
    if request.param == "sweep":
        monkeypatch.setattr(logprobs, "SWEEP_VOCABULARY", 0)
        monkeypatch.setattr(logprobs, "SWEEP_ELEMENTS", 0)


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

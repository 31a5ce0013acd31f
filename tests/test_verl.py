"""The losses inside the real verl against our own trainer's, values and gradients.

Runs in an environment of its own (`make verl`); nothing of verl is replaced. The models are tiny,
random and in float64, so that agreement is agreement and not luck.
"""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("verl", reason="verl is not installed; `make verl` runs this")
pytestmark = pytest.mark.verl

from verl.trainer.ppo.core_algos import get_policy_loss_fn

import step_parts
import verl_parts as parts
from stableopd.config import RepetitionConfig
from stableopd.integrations.verl import distillation_loss
from stableopd.integrations.verl.tokens import event_logps
from stableopd.objective import loss
from stableopd.training.batch import rollout_sequences
from stableopd.training.metrics import step_metrics
from stableopd.training.terms import Tally, terms_of
from stableopd.types import ConfigError


def gradient(value: torch.Tensor, student) -> torch.Tensor:
    found = torch.autograd.grad(value, list(student.parameters()))
    return torch.cat([g.reshape(-1) for g in found])


def agree(world: parts.World, splits: tuple[slice, ...] = (slice(None),)) -> list[dict]:
    ours, _, _ = world.ours()
    theirs, metrics = world.verl(splits)
    assert theirs.item() == pytest.approx(ours.item(), rel=1e-7, abs=1e-7)
    expected = gradient(ours, world.student)
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(gradient(theirs, world.student), expected, rtol=1e-6, atol=3e-6)
    return metrics


@pytest.mark.parametrize("event", [True, False])
@pytest.mark.parametrize("aggregation", ["sequence", "constant"])
def test_opd_and_golden(event, aggregation):
    agree(parts.World(event, beta_reference=0, aggregation=aggregation))


@pytest.mark.parametrize("event", [True, False])
@pytest.mark.parametrize("aggregation", ["sequence", "token", "constant"])
def test_opd_alone(event, aggregation):
    agree(parts.World(event, method="opd", aggregation=aggregation))


@pytest.mark.parametrize(
    ("form", "parameter"),
    [("clip", 0.3), ("soft_log", None), ("tanh", 0.7), ("power", 0.5), ("floor", 0.3)],
)
def test_bounded_advantages(form, parameter):
    fields = {} if parameter is None else {"advantage_parameter": parameter}
    agree(parts.World(method="opd", advantage=form, **fields))


@pytest.mark.parametrize("reference_kl", ["k1", "k2", "k3"])
def test_reference_term_is_kept(reference_kl):
    """In pure distillation verl drops its own; ours reaches the gradient."""
    world = parts.World(event=False, reference_kl=reference_kl, beta_reference=0.5)
    (metrics,) = agree(world)
    _, found, _ = world.ours()
    shown = metrics["stableopd/loss/reference_kl"].aggregate()
    assert shown == pytest.approx(found["reference_kl"].item(), abs=1e-5)


def test_reference_reward_with_the_stop_event():
    """At a stop the reward compares the sampled id, as the reference's event is unknown in verl."""
    with_it = parts.World(beta_reference=0.5)
    without = parts.World(beta_reference=0)
    change = with_it.verl()[0] - without.verl()[0]
    by_hand = 0.0
    for i in range(len(with_it.rollouts)):
        gap = with_it.response(with_it.student, i) - with_it.response(with_it.reference, i)
        by_hand += 0.5 * gap.mean().item() / len(with_it.rollouts)
    assert change.item() == pytest.approx(by_hand, abs=1e-5)


@pytest.mark.parametrize(
    "fields",
    [
        {"first_n": 3},
        {"first_n": 3, "aggregation": "constant"},
        {"prefix_gain": 0.5},
        {"golden_stop_label": False, "lambda_gold": 0.3},
        {"lambda_policy": 2.0, "lambda_gold": 0.1},
    ],
)
def test_switches(fields):
    agree(parts.World(beta_reference=0, **fields))


@pytest.mark.parametrize("event", [True, False])
def test_several_updates_and_the_clip(event):
    """Off-policy the ratio and the clip are ours; at stop events the ratio is 1."""
    world = parts.World(event, old_seed=3, beta_reference=0, updates_per_batch=2, clip=0.1)
    if event:
        work = step_parts.work(world.objective, rollouts=world.rollouts, golden=world.golden)
        who = step_parts.players(world.student, world.teacher)
        tally = Tally()
        terms_of(who, work, tally, rollout_sequences(world.rollouts), None)
        for i, r in enumerate(world.rollouts):
            if r.completion_ids[-1] in parts.STOPS:
                world.old_logps[i][-1] = tally.per_rollout["student"][i][-1]
    agree(world)


def test_micro_batches_add_up():
    whole = parts.World(beta_reference=0).verl()[0]
    split = parts.World(beta_reference=0).verl((slice(0, 4), slice(4, 5), slice(5, None)))[0]
    assert split.item() == pytest.approx(whole.item(), abs=1e-9)


def test_padding_rows_change_nothing():
    """verl fills a batch up with rows whose mask is 0."""
    world = parts.World(beta_reference=0)
    actor, distillation, _ = parts.configs(True, parts.N, beta_reference=0)
    data = world.data()
    output = parts.model_output(world.student, actor, distillation, data, True)
    whole, _ = distillation_loss(actor, distillation, output, data)
    mask = [torch.ones(len(s.completion_ids)).long() for s in world.sequences]
    mask[1] = torch.zeros_like(mask[1])
    data["response_mask"] = parts.jagged(mask)
    masked, found = distillation_loss(actor, distillation, output, data)
    assert not masked[1].any()
    keep = [i for i in range(len(mask)) if i != 1]
    assert torch.equal(masked[keep], whole[keep])
    assert len(found["stableopd/rollout/truncation_rate"]) == len(world.rollouts) - 1


def test_metrics_are_ours():
    """The numbers in verl's dictionary are those that our trainer logs for the same step."""
    world = parts.World(beta_reference=0, method="stable_opd")
    world.fields |= {"ngram": 1}
    _, (metrics,) = world.verl()
    result = step_parts.run(parts.step_players(world), parts.step_work(world))
    line = step_metrics(result, world.rollouts, None, RepetitionConfig(ngram=1), len(parts.STOPS))
    names = [k.removeprefix("stableopd/") for k in metrics if k.startswith("stableopd/")]
    assert {"rollout/truncation_rate", "rollout/repetitive_share", "loss/golden"} <= set(names)
    assert {"advantage/repetitive_mean", "advantage/regular_mean", "loss/opd"} <= set(names)
    for name in names:
        value = metrics[f"stableopd/{name}"]
        value = value.aggregate() if hasattr(value, "aggregate") else sum(value) / len(value)
        assert value == pytest.approx(line[name], rel=1e-6), name


def test_an_underflow_is_a_floor_and_not_a_nan():
    """A probability that float32 cannot hold counts as its smallest, and has no gradient."""
    mass_N = torch.tensor([0.0, 0.5], requires_grad=True)
    ids_N = torch.tensor([5, 1])
    support_NK = torch.tensor([[5, 5], [2, 1]])
    teacher_NK = torch.full((2, 2), -1.0)
    logp_N, teacher_N, is_event_N = event_logps(ids_N, support_NK, teacher_NK, mass_N, (1, 2))
    assert is_event_N.tolist() == [False, True]
    assert logp_N[0].item() == pytest.approx(-87.34, abs=0.01)
    assert logp_N[1].item() == pytest.approx(math.log(0.5))
    assert teacher_N.tolist() == pytest.approx([-1.0, math.log(2.0) - 1.0])
    logp_N.sum().backward()
    assert mass_N.grad is not None
    assert mass_N.grad.tolist() == [0.0, 2.0]


def test_half_precision_is_refused():
    half = torch.tensor([0.5], dtype=torch.bfloat16)
    one = torch.tensor([[5]])
    with pytest.raises(ConfigError, match="bfloat16"):
        event_logps(one[0], one, one.double(), half, (1,))


def test_the_policy_loss_is_the_clipped_surrogate():
    draw = torch.Generator().manual_seed(0)
    logp, old, advantages = (
        torch.randn(4, 6, generator=draw, dtype=torch.float64) for _ in range(3)
    )
    # Where r is above 3 and A negative, dual clipping would cap the loss.
    old[0, 0], advantages[0, 0] = logp[0, 0] - 2.0, -1.0
    mask = torch.arange(6) < torch.tensor([[6], [2], [4], [1]])
    actor, _, _ = parts.configs(extra=("actor_rollout_ref.actor.policy_loss.loss_mode=stableopd",))
    found = get_policy_loss_fn(actor.policy_loss.loss_mode)
    logp.requires_grad_()
    arguments = {"old_log_prob": old, "log_prob": logp, "advantages": advantages}
    mode = "seq-mean-token-mean"
    value, _ = found(**arguments, response_mask=mask, loss_agg_mode=mode, config=actor)
    value_N = loss.policy_gradient(logp[mask], old[mask], advantages[mask], 0.2)
    by_hand = loss.masked_mean(
        value_N, torch.ones_like(value_N).bool(), mask.nonzero()[:, 0], "sequence", 4.0
    )
    assert value.item() == pytest.approx(by_hand.item(), abs=1e-7)
    vanilla, _ = get_policy_loss_fn("vanilla")(
        **arguments, response_mask=mask, loss_agg_mode=mode, config=actor
    )
    assert vanilla.item() < value.item() - 0.01

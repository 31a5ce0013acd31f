"""The whole estimator, exactly: every rollout of a tiny world is enumerated with its probability.

The world has 4 tokens and rollouts of at most 5; a model is a free hidden state for each prefix and
one output head for all. The expected gradient of the sampled loss, built from the project's own
functions, is compared with gradients of the objective written here in plain loops.
"""

import functools
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from stableopd.objective.advantage import shaped
from stableopd.objective.divergence import k1, k2, k3, reverse_kl
from stableopd.objective.heads import Against, Head
from stableopd.objective.logprobs import score_tokens
from stableopd.objective.loss import denominator, masked_mean, policy_gradient
from stableopd.objective.loss import golden_cross_entropy as cross_entropy

VOCABULARY = 4
LAMBDA, GOLD, BETA = 0.7, 0.4, 0.3


@dataclass(frozen=True)
class World:
    """Every prefix that can be reached, and every rollout, cut off at `max_length`."""

    stops: tuple[int, ...]
    max_length: int

    @functools.cached_property
    def rollouts(self):
        done, growing = [], [()]
        while growing:
            longer = [(*p, v) for p in growing for v in range(VOCABULARY)]
            ends = [p[-1] in self.stops or len(p) == self.max_length for p in longer]
            done += [p for p, end in zip(longer, ends, strict=True) if end]
            growing = [p for p, end in zip(longer, ends, strict=True) if not end]
        return done

    @functools.cached_property
    def states(self):
        prefixes = {y[:t] for y in self.rollouts for t in range(len(y))}
        return {p: i for i, p in enumerate(sorted(prefixes))}

    @functools.cached_property
    def golden(self):
        solutions = [(1, self.stops[-1]), (0, 1, 0, self.stops[0]), (0, 0, 1, 1, 0)]
        return [y for y in solutions if len(y) <= self.max_length]

    def path(self, y):
        """(state, token) along a completion."""
        return [(self.states[y[:t]], y[t]) for t in range(len(y))]

    def groups(self, event):
        """The outcomes at one position, each a list of ids."""
        if not event:
            return [[v] for v in range(VOCABULARY)]
        return [[v] for v in range(VOCABULARY) if v not in self.stops] + [list(self.stops)]


TWO_STOPS, ONE_STOP = World((3, 2), 5), World((3,), 4)
SMALL, SHORT = World((3, 2), 4), World((3, 2), 2)


def model(world, width, seed):
    """Hidden state of each prefix, head weight, bias."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [(len(world.states), width), (VOCABULARY, width), (VOCABULARY,)]
    return [torch.randn(*s, generator=generator, dtype=torch.float64) for s in sizes]


def table(parameters):
    """Log-probs of every state, (S, V); for torch tensors and numpy arrays alike."""
    hidden, weight, bias = parameters
    logits = hidden @ weight.T + bias
    xp = torch if isinstance(hidden, torch.Tensor) else np
    return logits - xp.log(xp.exp(logits).sum(1))[:, None]


def event_table(logp, groups):
    """{(state, id): log-prob of the outcome to which the id belongs}."""
    xp = torch if isinstance(logp, torch.Tensor) else np
    where = [(s, v, group) for s in range(logp.shape[0]) for group in groups for v in group]
    return {(s, v): xp.log(sum(xp.exp(logp[s, u]) for u in group)) for s, v, group in where}


def numbers(parameters, groups):
    return event_table(table([p.numpy() for p in parameters]), groups)


def kl(student, other, state, groups):
    """KL(student || other) of two event tables at one state."""
    xp = torch if isinstance(student[state, 0], torch.Tensor) else np
    pairs = [(student[state, g[0]], other[state, g[0]]) for g in groups]
    return sum(xp.exp(a) * (a - b) for a, b in pairs)


def probabilities(world, old):
    """How often the old student writes each rollout: by tokens, as it is sampled."""
    logp = table([p.numpy() for p in old])
    return [float(np.exp(sum(logp[s, v] for s, v in world.path(y)))) for y in world.rollouts]


def visits(world, old):
    """How often each state is met in one rollout."""
    found = np.zeros(len(world.states))
    for y, p in zip(world.rollouts, probabilities(world, old), strict=True):
        found[[s for s, _ in world.path(y)]] += p
    return found


@dataclass(frozen=True)
class Terms:
    event: bool
    aggregation: str = "constant"
    divisor: float = 5.0
    reference: str = "none"  # none, exact, k1 (as reward), k2, k3
    golden: str = "none"  # none, all, no stop (its label masked)
    clip: float | None = 0.2


def expected_loss(world, student, old, teacher, reference, terms, batches=None):
    """Probability-weighted sum of the sampled loss over all micro-batches of rollouts.

    A micro-batch is one rollout, or what `batches` holds: (probability, rows of the rollouts).
    """
    completions = [*world.rollouts, *world.golden]
    flat = [(row, s, v) for row, y in enumerate(completions) for s, v in world.path(y)]
    row, state, token = torch.tensor(flat).T
    stops = torch.tensor(world.stops)

    def score(parameters, against=()):
        arguments = {"stop_ids": stops, "stop_is_event": terms.event, "chunk_elements": 900}
        head = Head(*parameters[1:])
        return score_tokens(parameters[0][state], head, token, against=against, **arguments)

    ref = Against(reference[0][state], Head(*reference[1:]), (reverse_kl,))
    found = score(student, [Against(teacher[0][state], Head(*teacher[1:])), ref])
    with torch.no_grad():
        old_logp = score(old).logp_N
    taught, referred = found.others
    advantage = shaped("log_ratio", taught.logp_N, old_logp)
    if terms.reference == "k1":
        advantage = advantage - BETA / LAMBDA * k1(found.logp_N, referred.logp_N).detach()
    value = LAMBDA * policy_gradient(found.logp_N, old_logp, advantage, terms.clip)
    if terms.reference == "exact":
        value = value + BETA * referred.comparisons[0]
    elif terms.reference == "k2":
        value = value + BETA * k2(found.logp_N, referred.logp_N)
    elif terms.reference == "k3":
        value = value + BETA * k3(found.logp_N, referred.logp_N)

    total = torch.zeros((), dtype=torch.float64)
    if batches is None:
        batches = [(p, [y]) for y, p in enumerate(probabilities(world, old))]
    for p, rows in batches:
        places = [(row == y).nonzero().flatten() for y in rows]
        here = torch.cat(places)
        new_row = torch.cat([torch.full_like(x, i) for i, x in enumerate(places)])
        every = torch.ones_like(here, dtype=torch.bool)
        mean = masked_mean(value[here], every, new_row, terms.aggregation, terms.divisor)
        total = total + p * mean
    if terms.golden != "none":
        counted = row >= len(world.rollouts)
        if terms.golden == "no stop":
            counted &= ~torch.isin(token, stops)
        lengths = torch.bincount(row[counted]).tolist()
        divisor = denominator(lengths, terms.aggregation, world.max_length)
        value = GOLD * cross_entropy(found.logp_N)
        total = total + masked_mean(value, counted, row, terms.aggregation, divisor)
    return total


def golden_objective(world, student, terms):
    if terms.golden == "none":
        return 0.0
    keep = range(VOCABULARY) if terms.golden == "all" else set(range(VOCABULARY)) - {*world.stops}
    logps = [[student[s, v] for s, v in world.path(y) if v in keep] for y in world.golden]
    if terms.aggregation == "sequence":
        return -GOLD * sum(sum(x) / len(x) for x in logps) / len(logps)
    size = sum(map(len, logps)) if terms.aggregation == "token" else len(logps) * world.max_length
    return -GOLD * sum(map(sum, logps)) / size


def kl_objective(world, parameters, old, teacher, reference, terms):
    """(a) KL at a fixed distribution of states, for a fixed divisor."""
    groups = world.groups(terms.event)
    student = event_table(table(parameters), groups)
    taught, referred = (numbers(m, groups) for m in (teacher, reference))
    total = 0.0
    for s, often in enumerate(visits(world, old)):
        total = total + often * LAMBDA * kl(student, taught, s, groups)
        if terms.reference == "k3":
            total = total + often * BETA * kl(referred, student, s, groups)
        elif terms.reference != "none":
            total = total + often * BETA * kl(student, referred, s, groups)
    return total / terms.divisor + golden_objective(world, student, terms)


def surrogate(world, parameters, old, teacher, reference, terms):
    """(b) J = sum_y pi_old(y) (-1/|y|) sum_t min(r A, clip(r) A), with the reference."""
    groups = world.groups(terms.event)
    student = event_table(table(parameters), groups)
    was, taught, referred = (numbers(m, groups) for m in (old, teacher, reference))
    xp = torch if isinstance(parameters[0], torch.Tensor) else np
    total = 0.0
    for y, p in zip(world.rollouts, probabilities(world, old), strict=True):
        inner = 0.0
        for s, v in world.path(y):
            ratio, a = xp.exp(student[s, v] - was[s, v]), taught[s, v] - was[s, v]
            if terms.reference == "k1":
                a = a - BETA / LAMBDA * (was[s, v] - referred[s, v])
            bound = None if terms.clip is None else 1 + terms.clip * np.sign(a)
            clipped = bound is not None and bool((ratio - bound) * a > 0)
            inner = inner - LAMBDA * (bound if clipped else ratio) * a
            if terms.reference == "exact":
                inner = inner + BETA * kl(student, referred, s, groups)
            elif terms.reference == "k2":
                inner = inner + BETA * (student[s, v] - referred[s, v]) ** 2 / 2
        total = total + p * inner / len(y) / terms.divisor
    return total + golden_objective(world, student, terms)


def cast(world, drift=0.0):
    """The world, student, old student (the same but for `drift`), teacher, reference."""
    student = model(world, 3, 1)
    old = [p + drift * q for p, q in zip(student, model(world, 3, 9), strict=True)]
    return world, student, old, model(world, 5, 2), model(world, 2, 3)


def gradient(objective, models, terms, **more):
    """By autograd, at the student's parameters."""
    world, student, *rest = models
    own = [p.clone().requires_grad_() for p in student]
    return torch.autograd.grad(objective(world, own, *rest, terms, **more), own)


def compare(objective, models, terms):
    """The sampled loss follows the objective; returns its gradient."""
    want = gradient(objective, models, terms)
    found = gradient(expected_loss, models, terms)
    torch.testing.assert_close(found, want, rtol=1e-9, atol=1e-12)
    assert all(g.abs().max() > 1e-3 for g in want)
    return want


def test_the_enumeration_is_complete():
    assert [len(w.rollouts) for w in (TWO_STOPS, ONE_STOP, SHORT)] == [94, 121, 10]
    for world in (TWO_STOPS, ONE_STOP, SHORT):
        old = cast(world)[2]
        assert sum(probabilities(world, old)) == pytest.approx(1.0)
        assert visits(world, old)[world.states[()]] == pytest.approx(1.0)


@pytest.mark.parametrize("golden", ["none", "all", "no stop"])
@pytest.mark.parametrize("reference", ["none", "exact", "k1", "k2", "k3"])
@pytest.mark.parametrize("event", [False, True])
@pytest.mark.parametrize(("aggregation", "divisor"), [("constant", 5.0), ("token", 7.0)])
def test_fixed_divisors_give_the_gradient_of_the_kl(aggregation, divisor, event, reference, golden):
    terms = Terms(event, aggregation, divisor, reference, golden)
    compare(kl_objective, cast(TWO_STOPS), terms)


@pytest.mark.parametrize("golden", ["none", "all", "no stop"])
@pytest.mark.parametrize("reference", ["none", "exact", "k1", "k2"])
@pytest.mark.parametrize("event", [False, True])
def test_sequence_means_give_the_gradient_of_the_surrogate(event, reference, golden):
    terms = Terms(event, "sequence", 1.0, reference, golden)
    compare(surrogate, cast(TWO_STOPS), terms)


def test_one_stop_id():
    models = cast(ONE_STOP)
    found = []
    for event in (False, True):
        compare(surrogate, models, Terms(event, "sequence", 1.0, "k1", "no stop"))
        fixed = Terms(event, "constant", 4.0, "exact", "all")
        found.append(compare(kl_objective, models, fixed))
    torch.testing.assert_close(*found)  # the event is inert where the ids agree


@pytest.mark.parametrize("event", [False, True])
def test_after_an_update_the_clipped_surrogate_is_still_followed(event):
    """The student has moved on from the one that drew the rollouts: ratios on both sides of 1."""
    models = cast(TWO_STOPS, drift=0.3)
    free, clipped = (
        compare(surrogate, models, Terms(event, "sequence", 1.0, "exact", "all", clip))
        for clip in (None, 0.2)
    )
    assert all((a - b).abs().max() > 1e-3 for a, b in zip(free, clipped, strict=True))


@pytest.mark.parametrize("aggregation", ["sequence", "constant"])
def test_clipping_does_nothing_at_ratio_one(aggregation):
    models = cast(TWO_STOPS)
    free, wide, narrow = (
        gradient(expected_loss, models, Terms(True, aggregation, 2.0, "k1", "none", clip))
        for clip in (None, 0.2, 0.01)
    )
    torch.testing.assert_close(wide, free, rtol=0, atol=0)
    torch.testing.assert_close(narrow, free, rtol=0, atol=0)


def finite_differences(objective, models, terms, step=1e-5):
    """Central differences of an objective in numpy, parameter by parameter."""
    world, student, *rest = models
    arrays = [p.numpy().copy() for p in student]
    found = [np.zeros_like(a) for a in arrays]
    for array, gradient in zip(arrays, found, strict=True):
        for place in np.ndindex(array.shape):
            ends = []
            for sign in (1, -1):
                array[place] += sign * step
                ends.append(objective(world, arrays, *rest, terms))
                array[place] -= sign * step
            gradient[place] = (ends[0] - ends[1]) / (2 * step)
    return found


@pytest.mark.parametrize("event", [False, True])
@pytest.mark.parametrize(
    ("objective", "aggregation", "reference", "drift"),
    [
        (kl_objective, "constant", "exact", 0.0),
        (surrogate, "sequence", "k1", 0.0),
        (surrogate, "sequence", "k2", 0.3),
    ],
)
def test_finite_differences_in_numpy(objective, aggregation, reference, drift, event):
    terms = Terms(event, aggregation, 1.0, reference, "all")
    models = cast(SMALL, drift)
    want = tuple(torch.from_numpy(x) for x in finite_differences(objective, models, terms))
    found = gradient(expected_loss, models, terms)
    torch.testing.assert_close(found, want, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(("aggregation", "divisor"), [("sequence", 2.0), ("constant", 2.0 * 2)])
@pytest.mark.parametrize("event", [False, True])
def test_a_batch_of_two_rollouts_estimates_the_same(aggregation, divisor, event):
    models = cast(SHORT)
    p = probabilities(SHORT, models[2])
    pairs = [(p[i] * p[j], [i, j]) for i in range(len(p)) for j in range(len(p))]
    one, two = (
        gradient(expected_loss, models, Terms(event, aggregation, d, "exact"), batches=b)
        for d, b in ((divisor / 2, None), (divisor, pairs))
    )
    torch.testing.assert_close(one, two)


@pytest.mark.parametrize("aggregation", ["sequence", "constant"])
def test_k1_as_reward_and_k2_are_the_same_estimator_and_k3_is_not(aggregation):
    first, second, third = (
        gradient(expected_loss, cast(TWO_STOPS), Terms(True, aggregation, 1.0, reference))
        for reference in ("k1", "k2", "k3")
    )
    torch.testing.assert_close(first, second)
    assert all((a - b).abs().max() > 1e-3 for a, b in zip(first, third, strict=True))


def stop_mismatch():
    """A student that stops with 3 and teachers that stop with 2, all with probability .2."""
    generator = torch.Generator().manual_seed(4)
    regular = torch.rand(len(TWO_STOPS.states), 2, generator=generator, dtype=torch.float64) + 0.2
    regular = 0.8 * regular / regular.sum(1, keepdim=True)
    rare = torch.full_like(regular[:, :1], 1e-11)
    common = 0.2 - rare
    identity = [torch.eye(4).double(), torch.zeros(4).double()]
    student = torch.cat([regular, rare, common], 1).log()
    teachers = [torch.cat([r, common, rare], 1).log() for r in (regular, regular.flip(1))]
    return [student, *identity], [[t, *identity] for t in teachers]


def change_of_stopping(student, teacher, event, aggregation):
    """Descent's effect on log P(any stop) of each state: minus gradient times gradient."""
    models = (TWO_STOPS, student, student, teacher, student)
    slope = gradient(expected_loss, models, Terms(event, aggregation, 1.0))[0]
    own = student[0].clone().requires_grad_()
    stop = torch.logsumexp(torch.log_softmax(own, 1)[:, list(TWO_STOPS.stops)], 1)
    (direction,) = torch.autograd.grad(stop.sum(), own)
    return -(slope * direction).sum(1), slope


@pytest.mark.parametrize("aggregation", ["constant", "sequence"])
def test_other_stop_ids_scored_as_tokens_teach_the_student_not_to_stop(aggregation):
    student, teachers = stop_mismatch()
    for teacher in teachers:
        change, _ = change_of_stopping(student, teacher, False, aggregation)
        assert (change < 0).all()


def test_scored_as_an_event_equal_stopping_is_never_unlearnt():
    student, (agreeing, differing) = stop_mismatch()
    change, slope = change_of_stopping(student, agreeing, True, "constant")
    torch.testing.assert_close(slope, torch.zeros_like(slope), rtol=0, atol=1e-12)
    assert change.abs().max() < 1e-12
    change, _ = change_of_stopping(student, differing, True, "constant")
    assert (change > 0).all()  # the rest of the distribution costs, stopping does not

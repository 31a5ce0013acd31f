"""Head, log_distribution and score_tokens against a dense formula written here."""

import itertools
import math

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from stableopd.objective.divergence import forward_kl, jensen_shannon, reverse_kl, top_k_overlap
from stableopd.objective.heads import Against, Head
from stableopd.objective.logprobs import log_distribution, score_tokens

N, V, D = 7, 9, 4
STOPS = {1: [5], 2: [5, 2], 3: [7, 0, 5]}
HEADS = list(itertools.product([False, True], [False, True], [None, 1.5], [1.0, 0.6], [1.0, 0.7]))


def rand(*shape, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    made = torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu")
    return scale * made.to(torch.get_default_device())


def leaf(tensor):
    return tensor.clone().requires_grad_()


def outcomes(vocabulary, stop_ids, event):
    """The distribution's support: single ids, and all stop ids as one where stop is an event."""
    if not event:
        return [[v] for v in range(vocabulary)]
    return [[v] for v in range(vocabulary) if v not in stop_ids] + [list(stop_ids)]


def dense(logits, target, stop_ids, event, temperature=1.0):
    """Log-prob, entropy and stop log-prob, position by position and outcome by outcome."""
    logps, entropies, stops = [], [], []
    for row, wanted in zip(logits / temperature, target.tolist(), strict=True):
        weight = (row - row.max().detach()).exp()
        p = weight / weight.sum()
        groups = outcomes(len(row), stop_ids, event)
        mass = [sum(p[v] for v in group) for group in groups]
        (own,) = [m for m, group in zip(mass, groups, strict=True) if wanted in group]
        logps.append(own.log())
        entropies.append(-sum(m * m.log() for m in mass))
        stops.append(sum(p[v] for v in stop_ids).log())
    return torch.stack(logps), torch.stack(entropies), torch.stack(stops)


def dense_logits(hidden, weight, bias, scale, softcap):
    logits = hidden @ weight.T
    if bias is not None:
        logits = logits + bias
    logits = logits * scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def parameters(tied, biased):
    """Leaves: (embedding, mixer) of a tiny tied model or (hidden, weight), and maybe a bias."""
    first = rand(V, D, seed=1) if tied else rand(N, D, seed=1)
    second = rand(D, D, seed=2) if tied else rand(V, D, seed=2)
    return [leaf(first), leaf(second)] + ([leaf(rand(V, seed=3))] if biased else [])


def forward(leaves, tied):
    """Hidden states, head weight and bias of the model that the leaves describe."""
    bias = leaves[2] if len(leaves) == 3 else None
    if not tied:
        return leaves[0], leaves[1], bias
    inputs = torch.tensor([3, 1, 4, 1, 5, 0, 2])
    return torch.tanh(leaves[0][inputs] @ leaves[1]), leaves[0], bias


TARGET = torch.tensor([5, 0, 8, 2, 2, 7, 3])


def score(hidden, head, stops, event=True, target=TARGET, rows=None, **arguments):
    """score_tokens with `rows` positions to a chunk."""
    if rows is not None:
        arguments["chunk_elements"] = rows * head.weight_VD.shape[0]
    stop_ids = torch.tensor(stops)
    return score_tokens(hidden, head, target, stop_ids=stop_ids, stop_is_event=event, **arguments)


def close(found, wanted, tolerance=1e-10):
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("event", [False, True])
@pytest.mark.parametrize(("tied", "biased", "softcap", "scale", "temperature"), HEADS)
def test_values_and_gradients_equal_the_dense_formula(
    tied, biased, softcap, scale, temperature, event
):
    leaves, weights = parameters(tied, biased), rand(N, seed=9)
    hidden, weight, bias = forward(leaves, tied)
    head = Head(weight, bias, scale, softcap)
    found = score(hidden, head, STOPS[3], event, rows=3, temperature=temperature)
    found_grads = torch.autograd.grad((weights * found.logp_N).sum(), leaves)

    hidden, weight, bias = forward(leaves, tied)
    logits = dense_logits(hidden, weight, bias, scale, softcap)
    logp, entropy, stop = dense(logits, TARGET, STOPS[3], event, temperature)
    close(found.logp_N, logp)
    close(found.entropy_N, entropy.detach())
    close(found.stop_logp_N, stop.detach())
    assert not found.entropy_N.requires_grad
    assert not found.stop_logp_N.requires_grad
    for got, want in zip(
        found_grads, torch.autograd.grad((weights * logp).sum(), leaves), strict=True
    ):
        close(got, want)


@pytest.mark.parametrize(("tied", "biased", "softcap", "scale", "temperature"), HEADS)
def test_gradcheck_in_chunks(tied, biased, softcap, scale, temperature):
    other = Against(
        rand(N, 2, seed=5), Head(rand(V, 2, seed=6), softcap=softcap), (reverse_kl,), temperature
    )

    def scores(*leaves):
        hidden, weight, bias = forward(leaves, tied)
        head = Head(weight, bias, scale, softcap)
        found = score(hidden, head, STOPS[2], rows=4, temperature=temperature, against=[other])
        return found.logp_N, found.others[0].comparisons[0]

    assert torch.autograd.gradcheck(scores, parameters(tied, biased), fast_mode=True)


def test_full_gradcheck_of_every_entry():
    def scores(hidden, weight, bias):
        head = Head(weight, bias, 0.6, 1.5)
        return score(hidden, head, STOPS[3], rows=2, temperature=0.7).logp_N

    assert torch.autograd.gradcheck(scores, parameters(False, True))


@pytest.mark.parametrize("elements", [0, V, 3 * V, 4 * V - 1, N * V, N * V + 5 * V, 2**23])
def test_chunk_size_changes_nothing(elements):
    def run(budget):
        leaves = parameters(True, True)
        hidden, weight, bias = forward(leaves, True)
        beside = [
            Against(rand(N, 3, seed=5), Head(rand(V, 3, seed=6)), (jensen_shannon,), 1.3),
            Against(rand(N, 5, seed=7), Head(rand(V, 5, seed=8)), (forward_kl, reverse_kl)),
            Against(rand(N, 2, seed=9), Head(rand(V, 2, seed=10))),
        ]
        head = Head(weight, bias)
        found = score(hidden, head, STOPS[2], against=beside, chunk_elements=budget)
        compared = [c for other in found.others for c in other.comparisons]
        values = (found.logp_N, *compared)
        loss = sum((rand(N, seed=20 + i) * v).sum() for i, v in enumerate(values))
        grads = torch.autograd.grad(loss, leaves)
        plain = [x for s in (found, *found.others) for x in (s.entropy_N, s.stop_logp_N)]
        return *values, *plain, *(s.logp_N for s in found.others), *grads

    assert len(run(elements)) == 1 + 3 + 8 + 3 + 3
    for got, want in zip(run(elements), run(V * N * 100), strict=True):
        close(got, want, 1e-12)


class LargestTensor(TorchDispatchMode):
    """Records the size of all that any operation makes, and which of it is still alive."""

    def __init__(self):
        super().__init__()
        self.largest, self.made = 0, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else [result]:
            if isinstance(x, torch.Tensor):
                self.largest = max(self.largest, x.numel())
                storage = x.untyped_storage()
                self.made[storage.data_ptr()] = (StorageWeakRef(storage), storage.nbytes())
        return result

    def bytes_alive(self, inputs):
        known = {x.untyped_storage().data_ptr() for x in inputs}
        made = [self.made[place] for place in self.made.keys() - known]
        return sum(size for ref, size in made if not ref.expired())


@pytest.mark.parametrize("event", [False, True])
def test_no_tensor_of_all_tokens_by_vocabulary_is_made(event):
    tokens, vocabulary, width, rows = 64, 40, 4, 6
    hidden, weight = leaf(rand(tokens, width)), leaf(rand(vocabulary, width, seed=1))
    bias = leaf(rand(vocabulary, seed=2))
    other = Against(rand(tokens, 3), Head(rand(vocabulary, 3, seed=4)), (jensen_shannon,))
    target = torch.arange(tokens) % vocabulary
    inputs = (hidden, weight, bias, target, other.hidden_ND, other.head.weight_VD)

    def largest(elements):
        with LargestTensor() as seen:
            arguments = {"against": [other], "chunk_elements": elements}
            found = score(hidden, Head(weight, bias), [3, 8], event, target, **arguments)
            alive = seen.bytes_alive(inputs)
            (found.logp_N.sum() + found.others[0].comparisons[0].sum()).backward()
        return seen.largest, alive

    biggest, alive = largest(rows * vocabulary + 7)
    assert biggest <= max(rows * vocabulary, vocabulary * width, tokens * width)
    # Between the passes live the seven (N,) results and the targets: no tile of any chunk.
    assert alive <= 9 * tokens * 8
    biggest, alive = largest(2**23)  # the recorder does see a dense one
    assert biggest == tokens * vocabulary
    assert alive >= tokens * vocabulary * 8


@pytest.mark.parametrize("elements", [2 * V, 2**23])
def test_padded_vocabulary(elements):
    hidden, weight, bias = leaf(rand(N, D)), leaf(rand(V + 3, D, seed=1)), leaf(rand(V + 3, seed=2))
    head = Head(weight, bias, 0.6, 1.5).restricted_to(V)
    found = score(hidden, head, [5], chunk_elements=elements)
    logits = dense_logits(hidden, weight[:V], bias[:V], 0.6, 1.5)
    logp, entropy, _ = dense(logits, TARGET, [5], True)
    close(found.logp_N, logp)
    close(found.entropy_N, entropy.detach())
    found.logp_N.sum().backward()
    assert weight.grad.shape == (V + 3, D)
    for grad in (weight.grad, bias.grad):
        assert torch.count_nonzero(grad[V:]) == 0
        assert (grad[:V].reshape(V, -1).abs().sum(1) > 0).all()


def test_restricting_keeps_the_rest_and_refuses_more_rows_than_there_are():
    weight = rand(V, D)
    same = Head(weight, None, 0.3, 2.0).restricted_to(V)
    assert torch.equal(same.weight_VD, weight)
    assert (same.bias_V, same.scale, same.softcap) == (None, 0.3, 2.0)
    with pytest.raises(ValueError, match="9 rows, not 10"):
        Head(weight).restricted_to(V + 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [1.0, 0.05])
def test_extreme_logits_stay_finite(dtype, temperature):
    rows = [[1e4, -1e4, -1e4, -1e4], [-1e4, 1e4, 1e4, 0.0], [0.0, 1.0, -1e4, 1e4], [-1e4] * 4]
    for target, stops in itertools.product(range(4), ([0], [1, 2], [2, 1, 3])):
        hidden = leaf(torch.tensor(rows, dtype=dtype))
        other = torch.tensor(rows[1:] + rows[:1], dtype=dtype)
        eye = leaf(torch.eye(4, dtype=dtype))
        compares = (reverse_kl, forward_kl, jensen_shannon)
        arguments = {
            "temperature": temperature,
            "against": [Against(other, Head(eye), compares, temperature)],
        }
        targets = torch.full((4,), target)
        found = score(hidden, Head(eye), stops, True, targets, rows=2, **arguments)
        (beside,) = found.others
        values = [x for s in (found, beside) for x in (s.logp_N, s.entropy_N, s.stop_logp_N)]
        values += beside.comparisons
        assert all(v.isfinite().all() for v in values)
        (found.logp_N.sum() + sum(c.sum() for c in beside.comparisons)).backward()
        assert hidden.grad.isfinite().all()
        assert eye.grad.isfinite().all()
        assert (found.entropy_N >= 0).all()
        assert (found.entropy_N <= math.log(4) + 1e-6).all()


@pytest.mark.parametrize("event", [False, True])
def test_no_tokens(event):
    hidden, weight = leaf(rand(0, D)), leaf(rand(V, D))
    other = Against(rand(0, 2), Head(rand(V, 2)), (reverse_kl,))
    nothing = torch.zeros(0, dtype=torch.long)
    found = score(hidden, Head(weight), [1, 2], event, nothing, rows=1, against=[other])
    beside = found.others[0]
    values = [x for s in (found, beside) for x in (s.logp_N, s.entropy_N, s.stop_logp_N)]
    assert [v.shape for v in (*values, *beside.comparisons)] == [(0,)] * 7
    (found.logp_N.sum() + found.others[0].comparisons[0].sum()).backward()
    assert hidden.grad.shape == (0, D)
    assert torch.count_nonzero(weight.grad) == 0


@pytest.mark.parametrize("size", [1, 2, 3])
def test_every_member_of_the_event_counts_as_the_event(size):
    hidden, head, stop_ids = rand(V, D), Head(rand(V, D, seed=1)), STOPS[size]
    everything = torch.arange(V)
    found = {event: score(hidden, head, stop_ids, event, everything) for event in (False, True)}
    plain = torch.log_softmax(head.logits(hidden), -1)
    stop = torch.logsumexp(plain[:, stop_ids], -1)
    for v in range(V):
        close(found[False].logp_N[v], plain[v, v])
        close(found[True].logp_N[v], stop[v] if v in stop_ids else plain[v, v])
    for scores in found.values():
        close(scores.stop_logp_N, stop)
    close(found[False].entropy_N, -(plain.exp() * plain).sum(-1))
    if size == 1:
        assert torch.equal(found[True].entropy_N, found[False].entropy_N)
    else:  # merging outcomes can only lose entropy
        assert (found[True].entropy_N < found[False].entropy_N).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [0, 1, 2, 3])
def test_the_distribution_sums_to_one_and_leaves_the_rest_alone(size, dtype):
    logits = (5 * rand(20, V)).to(dtype)
    event = None if size == 0 else torch.tensor(STOPS[size])
    logp, plain = log_distribution(logits, 0.7, event), torch.log_softmax(logits / 0.7, -1)
    torch.testing.assert_close(logp.exp().sum(-1), torch.ones(20, dtype=dtype))
    ids = STOPS.get(size, [])
    kept = [v for v in range(V) if v not in ids]
    assert torch.equal(logp[:, kept], plain[:, kept])
    if size:
        torch.testing.assert_close(logp[:, ids[0]].exp(), plain[:, ids].exp().sum(-1))
        assert torch.count_nonzero(logp[:, ids[1:]].exp()) == 0


def test_against_sees_both_merged_distributions_and_sends_nothing_to_the_other():
    hidden, weight = leaf(rand(N, D)), leaf(rand(V, D, seed=1))
    other_hidden, other_weight = leaf(rand(N, D + 3, seed=2)), leaf(rand(V, D + 3, seed=3))
    other_bias = leaf(rand(V, seed=4))
    head = Head(weight)
    other_head = Head(other_weight, other_bias, 0.5, 3.0)
    seen = []

    def spy(logp, other):
        seen.append((logp.detach(), other))
        return reverse_kl(logp, other)

    def twice_overlap(logp, other):
        return 2 * top_k_overlap(logp, other, 3)

    against = [
        Against(rand(N, 2), Head(rand(V, 2, seed=5))),
        Against(other_hidden, other_head, (spy, twice_overlap), 1.9),
    ]
    found = score(hidden, head, STOPS[2], temperature=0.7, against=against)
    assert found.comparisons == found.others[0].comparisons == ()
    beside = found.others[1]
    mine = dense_logits(hidden, weight, None, 1.0, None) / 0.7
    theirs = dense_logits(other_hidden, other_weight, other_bias, 0.5, 3.0).detach()
    groups = outcomes(V, STOPS[2], True)
    p = [torch.softmax(mine, -1)[:, g].sum(-1) for g in groups]
    q = [torch.softmax(theirs / 1.9, -1)[:, g].sum(-1) for g in groups]
    wanted = sum(a * (a / b).log() for a, b in zip(p, q, strict=True))
    close(beside.comparisons[0], wanted)
    for got, want in zip(
        (beside.logp_N, beside.entropy_N, beside.stop_logp_N),
        dense(theirs, TARGET, STOPS[2], True, 1.9),
        strict=True,
    ):
        close(got, want)
        assert not got.requires_grad
    ((logp, other),) = seen
    assert logp.shape == other.shape == (N, V)
    assert not other.requires_grad
    assert not beside.comparisons[1].requires_grad
    close(beside.comparisons[1], 2 * top_k_overlap(logp, other, 3))
    beside.comparisons[0].sum().backward()
    close(hidden.grad, torch.autograd.grad(wanted.sum(), hidden)[0])
    assert [x.grad for x in (other_hidden, other_weight, other_bias)] == [None] * 3


@pytest.mark.parametrize("elements", [2 * V, 2**23])
def test_low_precision_weights_give_float32_results(elements):
    hidden, weight = leaf(rand(N, D).float()), leaf(rand(V, D, seed=1).bfloat16())
    found = score(hidden, Head(weight), [5], chunk_elements=elements)
    assert found.logp_N.dtype == torch.float32
    found.logp_N.sum().backward()
    assert weight.grad.dtype == torch.bfloat16
    assert hidden.grad.dtype == torch.float32


def test_chunks_under_autocast_equal_one_piece_under_autocast():
    def run(elements):
        hidden, weight = leaf(rand(N, D).float()), leaf(rand(V, D, seed=1).float())
        with torch.autocast(hidden.device.type, torch.bfloat16):
            found = score(hidden, Head(weight), [5], chunk_elements=elements)
        found.logp_N.sum().backward()
        return found.logp_N.detach(), hidden.grad

    for got, want in zip(run(2 * V), run(2**23), strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_without_gradient_no_graph_is_made():
    hidden, head = leaf(rand(N, D)), Head(leaf(rand(V, D, seed=1)))
    with torch.no_grad():
        quiet = score(hidden, head, STOPS[2], rows=1)
    loud = score(hidden, head, STOPS[2], rows=1)
    frozen = score(hidden.detach(), Head(head.weight_VD.detach()), STOPS[2], rows=1)
    assert loud.logp_N.requires_grad
    for scores in (quiet, frozen):
        assert not scores.logp_N.requires_grad
        close(scores.logp_N, loud.logp_N.detach(), 1e-14)

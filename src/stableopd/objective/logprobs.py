"""From hidden states and an output head to numbers per token.

Small vocabularies, and comparisons that need whole distributions, go in chunks over the tokens: a
(tokens, vocabulary) tensor exists for one chunk at a time, the forward pass drops it, and the
backward pass computes it again. Large vocabularies go through `swept.py`, which gives the same
numbers in less time and memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils import checkpoint as recompute

from stableopd.objective.heads import Against, Head
from stableopd.objective.swept import can_sweep, score_by_sweep
from stableopd.types import Scores

__all__ = ["log_distribution", "score_tokens"]

# Log-prob given to the ids that were merged into the stop event. exp() of it is 0 in float32 and
# float64, and unlike -inf it leaves no 0 * inf behind in a divergence or its gradient.
NEVER = -1e4

# Elements of one (tokens, vocabulary) tile: more than 32 MiB in float32 after rounding down to
# whole tokens. glibc gives blocks from this size on back to the system when they are freed; smaller
# tiles broke its heap into pieces, up to the dense formula's peak (benchmarks/bench_loss.py).
CHUNK_ELEMENTS = 2**23 + 2**18

# From this vocabulary, and this many logits on, a sweep is faster (benchmarks/bench_loss.py).
SWEEP_VOCABULARY, SWEEP_ELEMENTS = 4096, 2**20


def log_distribution(
    logits_NV: Tensor, temperature: float = 1.0, event_ids: Tensor | None = None
) -> Tensor:
    """Log-probs over the vocabulary, with all stop ids merged into one event.

    logp = log_softmax(logits / temperature); then, with E the event ids,
    logp[first of E] = logsumexp_{e in E} logp[e], and the rest of E is never drawn.

    Args:
        logits_NV: Logits, (N, V); carries gradient.
        temperature: Divides the logits; positive.
        event_ids: Ids of the stop event, (E,); None or a single id changes nothing.

    Returns:
        Log-probs in nats, (N, V), which sum to one; gradient reaches the logits. Merged ids hold a
        value whose exp() is 0.

    Source:
        Scoring "stop" as one event is the cure of arXiv 2609.20511.
    """
    if temperature != 1.0:
        logits_NV = logits_NV / temperature
    logp_NV = torch.log_softmax(logits_NV, dim=-1)
    if event_ids is None or event_ids.numel() < 2:
        return logp_NV
    stop_N = torch.logsumexp(logp_NV[:, event_ids], dim=-1)
    merged_NV = logp_NV.index_fill(1, event_ids, NEVER)
    return merged_NV.index_copy(1, event_ids[:1], stop_N.unsqueeze(1))


def score_tokens(
    hidden_ND: Tensor,
    head: Head,
    target_N: Tensor,
    *,
    stop_ids: Tensor,
    stop_is_event: bool,
    temperature: float = 1.0,
    against: Sequence[Against] = (),
    chunk_elements: int = 0,
) -> Scores:
    """Score given tokens: log-prob, entropy, log-prob of stopping, divergences.

    Args:
        hidden_ND: Hidden states that predict the tokens, (N, D); carries gradient.
        head: Output head; its parameters carry gradient.
        target_N: Ids of the tokens, (N,).
        stop_ids: Ids that end a completion, (E,) and at least one.
        stop_is_event: Whether a token among `stop_ids` counts as the event "stop", whose
            probability is the sum over `stop_ids`, or as that one token.
        temperature: Temperature of the distribution.
        against: Other models to score at the same positions and compare with.
        chunk_elements: Elements of the largest (tokens, vocabulary) tile, in chunks always; 0 for
            the fastest way.

    Returns:
        `Scores` with (N,) tensors, in nats; its `others` hold the same for each of `against`, and
        there the comparisons. The scored model's `logp_N` and the comparisons (each decides for
        itself) carry gradient to the scored model; nothing else does.
    """
    vocabulary = head.weight_VD.shape[0]
    is_large = vocabulary >= SWEEP_VOCABULARY and target_N.numel() * vocabulary >= SWEEP_ELEMENTS
    sweeps = all(isinstance(a.head, Head) and can_sweep(a.compares) for a in against)
    if chunk_elements == 0 and is_large and sweeps:
        return score_by_sweep(
            hidden_ND,
            head,
            target_N,
            stop_ids=stop_ids,
            stop_is_event=stop_is_event,
            temperature=temperature,
            against=against,
        )
    chunk = max(1, (chunk_elements or CHUNK_ELEMENTS) // vocabulary)
    distribution = (stop_ids, stop_is_event, temperature)
    return _score_in_chunks(hidden_ND, head, target_N, *distribution, against, chunk)


def _score_in_chunks(
    hidden_ND: Tensor,
    head: Head,
    target_N: Tensor,
    stop_ids: Tensor,
    stop_is_event: bool,
    temperature: float,
    against: Sequence[Against],
    chunk: int,
) -> Scores:
    """Score by whole distributions, `chunk` tokens at a time."""
    event_ids = stop_ids if stop_is_event else None
    if stop_is_event:
        target_N = torch.where(torch.isin(target_N, stop_ids), stop_ids[0], target_N)
    models = [(a.head, a.temperature, a.compares) for a in against]

    def dense(target_n: Tensor, hidden_nD: Tensor, *others_nD: Tensor) -> tuple[Tensor, ...]:
        logp_nV = log_distribution(head.logits(hidden_nD), temperature, event_ids)
        columns = _columns(logp_nV, target_n, stop_ids)
        for (other, other_temperature, compares), other_nD in zip(models, others_nD, strict=True):
            with torch.no_grad():
                other_nV = log_distribution(other.logits(other_nD), other_temperature, event_ids)
                columns.extend(_columns(other_nV, target_n, stop_ids))
            columns.extend(compare(logp_nV, other_nV) for compare in compares)
        return tuple(columns)

    inputs = (target_N, hidden_ND, *(a.hidden_ND.detach() for a in against))
    columns = _in_chunks(dense, inputs, chunk)
    others: list[Scores] = []
    place = 3
    for _, _, compares in models:
        comparisons = columns[place + 3 : place + 3 + len(compares)]
        others.append(Scores(columns[place], columns[place + 1], columns[place + 2], comparisons))
        place += 3 + len(compares)
    return Scores(columns[0], columns[1], columns[2], others=tuple(others))


def _columns(logp_nV: Tensor, target_n: Tensor, stop_ids: Tensor) -> list[Tensor]:
    """Log-prob of the targets (with gradient), entropy and log-prob of stopping (without)."""
    logp_n = logp_nV.gather(1, target_n.unsqueeze(1)).squeeze(1)
    with torch.no_grad():
        entropy_n = -(logp_nV.exp() * logp_nV).sum(-1)
        stop_n = torch.logsumexp(logp_nV[:, stop_ids], dim=-1)
    return [logp_n, entropy_n, stop_n]


def _in_chunks(
    dense: Callable[..., tuple[Tensor, ...]], inputs: tuple[Tensor, ...], chunk: int
) -> tuple[Tensor, ...]:
    """Apply `dense` to slices of the inputs; several slices are recomputed in the backward pass."""
    num_tokens = inputs[0].shape[0]
    if num_tokens <= chunk:
        return dense(*inputs)
    parts: list[tuple[Tensor, ...]] = []
    for start in range(0, num_tokens, chunk):
        slices = [x[start : start + chunk] for x in inputs]
        if torch.is_grad_enabled():
            part: Any = cast(Any, recompute).checkpoint(
                dense, *slices, use_reentrant=False, preserve_rng_state=False
            )
            parts.append(part)
        else:
            parts.append(dense(*slices))
    return tuple(torch.cat(columns) for columns in zip(*parts, strict=True))

"""Scores of tokens from the sums that one sweep over the vocabulary finds.

The same numbers as `logprobs.score_tokens` takes from whole distributions, for the comparisons
that need sums alone: KL in both directions, and the agreement of the likeliest tokens. The stop
event enters by its few ids: with P = sum_{e in E} p(e),

    entropy of the merged distribution = entropy + sum_e p(e) log p(e) - P log P,

and KL likewise.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from stableopd.objective import divergence
from stableopd.objective.heads import Against, Divergence, Head
from stableopd.objective.sweep import Request, Sums, sweep
from stableopd.types import Scores

__all__ = ["can_sweep", "score_by_sweep"]


def can_sweep(compares: Sequence[Divergence]) -> bool:
    """Whether all of some comparisons follow from the sums of a sweep.

    Args:
        compares: As in `Against`.

    Returns:
        True for `divergence.reverse_kl`, `detached_reverse_kl`, `forward_kl` and a
        `functools.partial` of `top_k_agreement` with its k.
    """
    known = (divergence.reverse_kl, divergence.detached_reverse_kl, divergence.forward_kl)
    return all(compare in known or _num_top(compare) for compare in compares)


def _num_top(compare: Any) -> int:
    """The k of `top_k_agreement`; 0 for another comparison."""
    is_it = isinstance(compare, functools.partial) and compare.func is divergence.top_k_agreement
    return compare.keywords["k"] if is_it else 0


def score_by_sweep(
    hidden_ND: Tensor,
    head: Head,
    target_N: Tensor,
    *,
    stop_ids: Tensor,
    stop_is_event: bool,
    temperature: float = 1.0,
    against: Sequence[Against] = (),
    tile_elements: int = 0,
) -> Scores:
    """Score tokens as `score_tokens` does, where `can_sweep` allows it.

    Args:
        hidden_ND: Hidden states that predict the tokens, (N, D); carries gradient.
        head: Output head; its parameters carry gradient.
        target_N: Ids of the tokens, (N,).
        stop_ids: Ids that end a completion, (E,).
        stop_is_event: Whether stopping is scored as one event.
        temperature: Temperature of the distribution.
        against: Other models to score at the same positions.
        tile_elements: As in `sweep`.

    Returns:
        As `score_tokens`.
    """
    extra = stop_ids.numel() if stop_is_event else 0
    requests = [_request(other, extra) for other in against]
    event_ids = stop_ids if stop_is_event and stop_ids.numel() > 1 else None
    mine, *theirs = [
        _Model(sums, target_N, stop_ids, event_ids)
        for sums in sweep(hidden_ND, head, temperature, target_N, stop_ids, requests, tile_elements)
    ]
    others: list[Scores] = []
    for model, other in zip(theirs, against, strict=True):
        comparisons = tuple(_comparison(compare, mine, model) for compare in other.compares)
        with torch.no_grad():
            others.append(model.scores(comparisons))
    return mine.scores((), tuple(others))


def _request(other: Against, extra: int) -> Request:
    kinds, num_top = other.compares, max(map(_num_top, other.compares), default=0)
    gap = divergence.reverse_kl in kinds or divergence.detached_reverse_kl in kinds
    # Members of the event leave the likeliest tokens, and the event comes in.
    return Request(other, gap, divergence.forward_kl in kinds, num_top and num_top + extra)


class _Model:
    """The distribution of one model at all positions, as far as its sums tell it."""

    def __init__(
        self, sums: Sums, target_N: Tensor, stop_ids: Tensor, event_ids: Tensor | None
    ) -> None:
        self.sums, self.event_ids = sums, event_ids
        self.lse_N = sums.max_N + sums.log_total_N
        self.stop_logp_NE = sums.stop_NE - sums.log_total_N[:, None]
        self.event_logp_N = torch.logsumexp(self.stop_logp_NE, -1)
        self.logp_N = sums.target_N - sums.log_total_N
        if event_ids is not None:
            self.logp_N = torch.where(
                torch.isin(target_N, event_ids), self.event_logp_N, self.logp_N
            )

    def scores(self, comparisons: tuple[Tensor, ...], others: tuple[Scores, ...] = ()) -> Scores:
        """As `score_tokens` gives them; gradient in `logp_N` and the comparisons alone."""
        with torch.no_grad():
            entropy_N = self.sums.log_total_N - self.sums.mean_N
            if self.event_ids is not None:
                entropy_N = entropy_N + self.merged(self.stop_logp_NE, self.event_logp_N)
            # A sharp distribution may round below zero.
            entropy_N = entropy_N.clamp(min=0.0)
        stop_logp_N = self.event_logp_N.detach()
        return Scores(self.logp_N, entropy_N, stop_logp_N, comparisons, others)

    def merged(self, value_NE: Tensor, event_N: Tensor) -> Tensor:
        """What sum_v p(v) value(v) loses at the ids of the event, less what the event adds."""
        apart_N = (self.stop_logp_NE.exp() * value_NE).sum(-1)
        return apart_N - self.event_logp_N.exp() * event_N

    def likeliest(self, k: int) -> tuple[Tensor, Tensor]:
        """Log-probs and ids of the k likeliest tokens, the event among them under its first id."""
        top_NK, ids_NK = self.sums.top_NK, self.sums.top_ids_NK
        assert top_NK is not None
        assert ids_NK is not None
        logp_NK = top_NK - self.sums.log_total_N[:, None]
        if self.event_ids is not None:
            is_member_NK = torch.isin(ids_NK, self.event_ids)
            logp_NK = logp_NK.masked_fill(is_member_NK, -torch.inf)
            logp_NK = torch.cat([logp_NK, self.event_logp_N[:, None]], 1)
            event_N1 = self.event_ids[:1].expand(len(ids_NK), 1)
            ids_NK = torch.cat([ids_NK, event_N1], 1)
        logp_NK, place_NK = logp_NK.topk(min(k, logp_NK.shape[1]), dim=1)
        return logp_NK, ids_NK.gather(1, place_NK)


def _comparison(compare: Divergence, mine: _Model, other: _Model) -> Tensor:
    num_top = _num_top(compare)
    if num_top:
        with torch.no_grad():
            return divergence.agreement(*mine.likeliest(num_top), *other.likeliest(num_top))
    if compare is divergence.forward_kl:
        return _kl(other, mine, other.sums.counter_gap_N)
    value_N = _kl(mine, other, other.sums.gap_N)
    return value_N.detach() if compare is divergence.detached_reverse_kl else value_N


def _kl(one: _Model, two: _Model, gap_N: Tensor | None) -> Tensor:
    """KL(one || two) = sum_v p_1(v) (z_1(v) - z_2(v)) - log Z_1 + log Z_2."""
    assert gap_N is not None
    kl_N = gap_N - one.lse_N + two.lse_N
    if one.event_ids is None:
        return kl_N
    ratio_NE, event_N = one.stop_logp_NE - two.stop_logp_NE, one.event_logp_N - two.event_logp_N
    return kl_N - one.merged(ratio_NE, event_N)

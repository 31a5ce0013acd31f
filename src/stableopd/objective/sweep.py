"""Several heads at the same positions, summed up in one sweep over the vocabulary.

Log-probs, entropies, KLs and the likeliest tokens of large vocabularies come from sums over the
vocabulary. Here a tile of logits (some positions by some columns, small enough for the cache) is
made for every head, added to running sums, and dropped; the backward pass makes the student's tiles
again and writes the gradient of each column of the head once. Autograd records nothing within a
sweep, so memory grows with the tokens by a few numbers each, and with the vocabulary not at all.

All sums are relative to the largest logit so far, as in a streaming softmax:

    d_v = z_v - max z,   total = sum_v e^d_v,   mean = sum_v p(v) d_v with p(v) = e^d_v / total

`swept.py` makes log-probs and divergences of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, cast

import torch
from torch import Tensor

from stableopd.objective.heads import Against, Head
from stableopd.objective.likeliest import BLOCK, block_maxima, block_size, likeliest
from stableopd.objective.tiles import TiledHead

__all__ = ["Request", "Sums", "sweep"]

# Elements of a tile. Some float32 tiles of 4 MB stay in a CPU's last cache, and narrower ones cost
# calls (measured: 2^18 to 2^20 alike). Elsewhere every call is a launch, and 128 MB are little.
TILE_ELEMENTS, TILE_ELEMENTS_DEVICE = 2**20, 2**25
MAX_ROWS = 1024


@dataclass(frozen=True)
class Request:
    """What is asked of another head, beside its own sums.

    Attributes:
        against: The head, its hidden states and temperature.
        gap: Whether `Sums.gap_N` is wanted.
        counter_gap: Whether `Sums.counter_gap_N` is wanted.
        num_top: How many of the likeliest tokens are wanted, of this head and of the student.
    """

    against: Against
    gap: bool = False
    counter_gap: bool = False
    num_top: int = 0


@dataclass(frozen=True)
class Sums:
    """What a sweep finds of one head.

    Attributes:
        max_N: max_v z_v, (N,); no gradient.
        log_total_N: log sum_v e^d_v, (N,).
        mean_N: sum_v p(v) d_v, (N,); no gradient.
        target_N: d of the target, (N,).
        stop_NE: d of the stop ids, (N, E).
        gap_N: Of another head: sum_v p(v) (z_v - z'_v), p and z the student's, (N,); or None.
        counter_gap_N: Of another head: sum_v p'(v) (z'_v - z_v), (N,); or None.
        top_NK: d of the likeliest tokens, in falling order, (N, K); or None. No gradient.
        top_ids_NK: Their ids, (N, K); or None.
    """

    max_N: Tensor
    log_total_N: Tensor
    mean_N: Tensor
    target_N: Tensor
    stop_NE: Tensor
    gap_N: Tensor | None = None
    counter_gap_N: Tensor | None = None
    top_NK: Tensor | None = None
    top_ids_NK: Tensor | None = None


def sweep(
    hidden_ND: Tensor,
    head: Head,
    temperature: float,
    target_N: Tensor,
    stop_ids: Tensor,
    requests: Sequence[Request] = (),
    tile_elements: int = 0,
) -> list[Sums]:
    """Sum up the student's head, and others at the same positions, over the vocabulary.

    Args:
        hidden_ND: The student's hidden states, (N, D); carries gradient.
        head: Its head; the parameters carry gradient.
        temperature: Divides the student's logits.
        target_N: Ids of the tokens, (N,).
        stop_ids: Stop ids, (E,).
        requests: Other heads; no gradient is sent there.
        tile_elements: Elements of a tile; 0 chooses by the device.

    Returns:
        The student's sums, then those of each request. `log_total_N`, `target_N` and `stop_NE` of
        the student and the gaps carry gradient to the student. max z is taken as a constant: what
        does not depend on it (log-probs, divergences) has the right gradient.
    """
    models = [Against(hidden_ND, head, (), temperature), *(r.against for r in requests)]
    num_top = [r.num_top for r in requests]
    device = TILE_ELEMENTS if hidden_ND.device.type == "cpu" else TILE_ELEMENTS_DEVICE
    job = _Job(
        heads=[TiledHead(model) for model in models],
        requests=list(requests),
        num_top=[max(num_top, default=0), *num_top],
        target_N=target_N,
        stop_ids=cast(list[int], cast(Any, stop_ids).tolist()),
        tile_elements=tile_elements or device,
    )
    apply = cast(Callable[..., tuple[Any, ...]], cast(Any, _Sweep).apply)
    values = apply(hidden_ND, head.weight_VD, head.bias_V, job)
    return [Sums(*values[9 * i : 9 * i + 9]) for i in range(len(models))]


@dataclass
class _Job:
    """A sweep's heads, the student's first, and what is asked of them."""

    heads: list[TiledHead]
    requests: list[Request]
    num_top: list[int]
    target_N: Tensor
    stop_ids: list[int]
    tile_elements: int

    def row_groups(self) -> Iterator[slice]:
        """Positions that are swept together."""
        size = max(1, min(MAX_ROWS, self.tile_elements // BLOCK))
        for start in range(0, self.target_N.numel(), size):
            yield slice(start, min(start + size, self.target_N.numel()))

    def column_groups(self, rows: slice) -> Iterator[slice]:
        """Columns of a tile; whole blocks, but for the last tile."""
        vocabulary = self.heads[0].num_tokens
        size = max(1, self.tile_elements // (rows.stop - rows.start) // BLOCK) * BLOCK
        for start in range(0, vocabulary, size):
            yield slice(start, min(start + size, vocabulary))

    def places(self, rows: slice, columns: slice) -> tuple[Tensor, Tensor]:
        """Place of each target in a tile, (R, 1), and whether it is there."""
        place_R1 = self.target_N[rows, None] - columns.start
        width = columns.stop - columns.start
        return place_R1.clamp(0, width - 1), (place_R1 >= 0) & (place_R1 < width)

    def stops(self, columns: slice) -> list[tuple[int, int]]:
        """The stop ids in a tile: place among the stop ids, and column of the tile."""
        ids = enumerate(self.stop_ids)
        return [(e, i - columns.start) for e, i in ids if columns.start <= i < columns.stop]


def _dot(one_RC: Tensor, two_RC: Tensor) -> Tensor:
    return cast(Tensor, cast(Any, torch.linalg).vecdot(one_RC, two_RC))


class _Running:
    """The sums of one head at some positions, as far as the sweep has come."""

    def __init__(self, head: TiledHead, job: _Job, rows: slice, num_top: int) -> None:
        size, self.head, self.num_top = rows.stop - rows.start, head, num_top
        zeros_R = head.hidden_ND.new_zeros(size, dtype=head.tile_type)
        self.max_R = torch.full_like(zeros_R, -math.inf)
        self.total_R, self.first_R = zeros_R, zeros_R
        self.target_R1, self.stop_RE = zeros_R[:, None], zeros_R.new_zeros(size, len(job.stop_ids))
        self.gap_R, self.counter_gap_R = zeros_R, zeros_R
        self.blocks: list[Tensor] = []

    def read(self, z_RC: Tensor, job: _Job, rows: slice, columns: slice) -> None:
        """Keep the logits of targets and stops, and the largest one of each block."""
        place_R1, is_here_R1 = job.places(rows, columns)
        self.target_R1 = torch.where(is_here_R1, z_RC.gather(1, place_R1), self.target_R1)
        for e, column in job.stops(columns):
            self.stop_RE[:, e] = z_RC[:, column]
        if self.num_top:
            self.blocks.append(block_maxima(z_RC, block_size(z_RC.device)))

    def add_(self, z_RC: Tensor) -> tuple[Tensor, Tensor]:
        """Add a tile, which becomes d; gives e^d, and what the sums so far were multiplied by."""
        max_R = torch.maximum(self.max_R, z_RC.amax(1))
        # Where nothing was added before, all sums are 0, and -inf stays out of them.
        moved_R = torch.where(self.total_R > 0, self.max_R - max_R, 0.0)
        shrunk_R, self.max_R = moved_R.exp(), max_R
        d_RC = z_RC.sub_(max_R[:, None])
        weight_RC = torch.exp(d_RC, out=self.head.buffer("weights", tuple(d_RC.shape)))
        earlier_R = shrunk_R * (self.first_R + moved_R * self.total_R)
        self.first_R = earlier_R + _dot(weight_RC, d_RC)
        self.total_R = shrunk_R * self.total_R + weight_RC.sum(1)
        return weight_RC, shrunk_R

    def result(self, rows: slice) -> list[Tensor | None]:
        """The fields of `Sums` up to `stop_NE`, then the likeliest tokens."""
        max_R1 = self.max_R[:, None]
        top_RK, ids_RK = None, None
        if self.num_top:
            best_RB, block = torch.cat(self.blocks, 1), block_size(max_R1.device)
            logit_RK, ids_RK = likeliest(best_RB, block, self.num_top, self.head, rows)
            top_RK = logit_RK - max_R1
        target_R, stop_RE = (self.target_R1 - max_R1).squeeze(1), self.stop_RE - max_R1
        mean_R = self.first_R / self.total_R
        return [self.max_R, self.total_R.log(), mean_R, target_R, stop_RE, top_RK, ids_RK]


def _sum_rows(job: _Job, rows: slice) -> list[Tensor | None]:
    """Sweep some positions: nine results for each head, in the order of the fields of `Sums`."""
    pairs = zip(job.heads, job.num_top, strict=True)
    mine, *others = [_Running(head, job, rows, num_top) for head, num_top in pairs]
    for columns in job.column_groups(rows):
        tiles = [one.head.tile(rows, columns) for one in (mine, *others)]
        for one, z_RC in zip((mine, *others), tiles, strict=True):
            one.read(z_RC, job, rows, columns)
        gaps: list[Tensor | None] = []
        for one, z_RC, request in zip(others, tiles[1:], job.requests, strict=True):
            is_asked = request.gap or request.counter_gap
            out_RC = one.head.buffer("gap", tuple(z_RC.shape)) if is_asked else None
            gaps.append(None if out_RC is None else torch.sub(tiles[0], z_RC, out=out_RC))
        weight_RC, shrunk_R = mine.add_(tiles[0])
        for one, z_RC, gap_RC, request in zip(others, tiles[1:], gaps, job.requests, strict=True):
            other_RC, other_shrunk_R = one.add_(z_RC)
            if gap_RC is not None and request.gap:
                one.gap_R = shrunk_R * one.gap_R + _dot(weight_RC, gap_RC)
            if gap_RC is not None and request.counter_gap:
                earlier_R = other_shrunk_R * one.counter_gap_R
                one.counter_gap_R = earlier_R - _dot(other_RC, gap_RC)
    sums = mine.result(rows)
    results = [*sums[:5], None, None, *sums[5:]]
    for one, request in zip(others, job.requests, strict=True):
        sums = one.result(rows)
        gap_R = one.gap_R / mine.total_R if request.gap else None
        counter_gap_R = one.counter_gap_R / one.total_R if request.counter_gap else None
        results += [*sums[:5], gap_R, counter_gap_R, *sums[5:]]
    return results


NUM_FIELDS = 9
# Places of some fields in `Sums`.
MAX, LOG_TOTAL, TARGET, STOP, GAP, COUNTER_GAP = 0, 1, 3, 4, 5, 6


class _Sweep(torch.autograd.Function):
    """`_sum_rows` over all positions, and its gradient in the student's head and hidden states."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, job: _Job):
        with torch.autocast(hidden_ND.device.type, enabled=False):
            parts = [_sum_rows(job, rows) for rows in job.row_groups()]
        columns = zip(*parts, strict=True)
        values = [None if c[0] is None else torch.cat(cast(list[Tensor], c)) for c in columns]
        with_gradient = {LOG_TOTAL, TARGET, STOP}
        for start in range(NUM_FIELDS, len(values), NUM_FIELDS):
            with_gradient |= {start + GAP, start + COUNTER_GAP}
        rest = [v for i, v in enumerate(values) if v is not None and i not in with_gradient]
        ctx.mark_non_differentiable(*rest)
        ctx.set_materialize_grads(False)
        kept = [
            values[start + field]
            for start in range(0, len(values), NUM_FIELDS)
            for field in (MAX, LOG_TOTAL, GAP)
        ]
        ctx.save_for_backward(*kept)
        ctx.job = job
        ctx.types = [None if x is None else x.dtype for x in (hidden_ND, weight_VD, bias_V)]
        return tuple(values)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None):
        job, kept = ctx.job, ctx.saved_tensors
        slopes = [
            _Slope(*kept[3 * i : 3 * i + 3], *(grads[NUM_FIELDS * i + f] for f in GRADIENTS))
            for i in range(len(job.heads))
        ]
        out = _Gradients(job, ctx.needs_input_grad)
        with torch.autocast(job.target_N.device.type, enabled=False):
            for rows in job.row_groups():
                mine, *others = [slope.at(rows) for slope in slopes]
                for columns in job.column_groups(rows):
                    out.add(rows, columns, _slope_of_tile(job, rows, columns, mine, others))
        found = [x if x is None else x.to(t) for x, t in zip(out.all(), ctx.types, strict=True)]
        return *found, None


GRADIENTS = (LOG_TOTAL, TARGET, STOP, GAP, COUNTER_GAP)


@dataclass(frozen=True)
class _Slope:
    """What the backward pass knows of one head: its sums, and the gradient of each."""

    max_N: Tensor
    log_total_N: Tensor
    gap_N: Tensor | None
    by_log_total_N: Tensor | None
    by_target_N: Tensor | None
    by_stop_NE: Tensor | None
    by_gap_N: Tensor | None
    by_counter_gap_N: Tensor | None

    def at(self, rows: slice) -> _Slope:
        """The same at some positions."""
        values: Any = [getattr(self, f.name) for f in fields(self)]
        some: list[Any] = [None if v is None else v[rows] for v in values]
        return _Slope(*some)


def _slope_of_tile(
    job: _Job, rows: slice, columns: slice, mine: _Slope, others: list[_Slope]
) -> Tensor:
    """The gradient of a tile of the student's logits.

    d log_total / dz = p,   d gap / dz = p (1 + z - z' - gap),   d counter gap / dz = -p'.
    """
    z_RC = job.heads[0].tile(rows, columns)
    flat_R = torch.zeros_like(mine.max_N) if mine.by_log_total_N is None else mine.by_log_total_N
    factor: Tensor | None = None
    later: list[tuple[Tensor, Tensor]] = []
    scale_R = (-mine.log_total_N).exp()
    for head, slope in zip(job.heads[1:], others, strict=True):
        if slope.by_gap_N is None and slope.by_counter_gap_N is None:
            continue
        other_RC = head.tile(rows, columns)
        if slope.by_gap_N is not None and slope.gap_N is not None:
            flat_R = flat_R + slope.by_gap_N * (1.0 - slope.gap_N)
            gap_RC = torch.sub(z_RC, other_RC, out=head.buffer("gap", tuple(z_RC.shape)))
            gap_RC.mul_((slope.by_gap_N * scale_R)[:, None])
            factor = gap_RC if factor is None else factor.add_(gap_RC)
        if slope.by_counter_gap_N is not None:
            other_RC.sub_(slope.max_N[:, None]).exp_()
            later.append((other_RC, slope.by_counter_gap_N * (-slope.log_total_N).exp()))
    out_RC = job.heads[0].buffer("weights", tuple(z_RC.shape))
    torch.sub(z_RC, mine.max_N[:, None], out=out_RC).exp_()
    flat_R1 = (flat_R * scale_R)[:, None]
    out_RC.mul_(flat_R1 if factor is None else factor.add_(flat_R1))
    for other_RC, by_R in later:
        out_RC.addcmul_(other_RC, by_R[:, None], value=-1.0)
    if mine.by_target_N is not None:
        place_R1, is_here_R1 = job.places(rows, columns)
        out_RC.scatter_add_(1, place_R1, torch.where(is_here_R1, mine.by_target_N[:, None], 0.0))
    if mine.by_stop_NE is not None:
        for e, column in job.stops(columns):
            out_RC[:, column] += mine.by_stop_NE[:, e]
    return job.heads[0].straighten_(out_RC, z_RC)


class _Gradients:
    """The gradients of hidden states, weight and bias, as far as the sweep has come."""

    def __init__(self, job: _Job, needed: Sequence[bool]) -> None:
        self.head = job.heads[0]
        like = self.head.hidden_ND.new_empty(0, dtype=self.head.tile_type)
        shapes = (self.head.hidden_ND.shape, self.head.weight_VD.shape, (self.head.num_tokens,))
        pairs = zip(shapes, needed[:3], strict=True)
        self.hidden_ND, self.weight_VD, self.bias_V = [
            like.new_zeros(tuple(shape)) if is_needed else None for shape, is_needed in pairs
        ]

    def add(self, rows: slice, columns: slice, slope_RC: Tensor) -> None:
        """Add what the gradient of a tile of logits brings."""
        hidden_RD, weight_CD = self.head.hidden_ND[rows], self.head.weight(columns)
        cast_RC = slope_RC.to(self.head.type)
        if self.hidden_ND is not None:
            _add_product_(self.hidden_ND[rows], cast_RC, weight_CD)
        if self.weight_VD is not None:
            _add_product_(self.weight_VD[columns], cast_RC.T, hidden_RD)
        if self.bias_V is not None:
            self.bias_V[columns] += slope_RC.sum(0)

    def all(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The three gradients."""
        return self.hidden_ND, self.weight_VD, self.bias_V


def _add_product_(out: Tensor, one: Tensor, two: Tensor) -> None:
    if out.dtype == one.dtype:
        out.addmm_(one, two)
    else:
        out.add_(one @ two)

"""Embedding lookup, the plan of its gradient and the dense gradient, in plain PyTorch.

These functions say what the ops compute. They run on every device, never wait for it, and give the same bits for any
number of threads, so they are also the fallback where neither the extension nor Triton is there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from embedkernels.reference import random

# What embedding_grad does with the sums; csrc/grad_mode.h has the same numbers.
DENSE, ACCUMULATE, ROWS, PADDED_ROWS = range(4)

# The segmented sum holds a few copies of a slab of gradient rows in fp32; columns are cut so that one copy stays
# below this many elements (64 MiB).
_SLAB = 1 << 24


def embedding(ids: Tensor, weight: Tensor) -> Tensor:
    """Rows of ``weight`` (V, D) at ``ids`` (any shape, in [0, V)): (*ids.shape, D)."""
    return weight.index_select(0, ids.reshape(-1)).reshape(*ids.shape, weight.shape[1])


def embedding_plan(
    ids: Tensor, num_rows: int, padding_idx: int = -1, vocab_start: int = 0, ignored: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Which gradient rows meet in which row of the table, from the ids alone.

    An id is kept if ``id - vocab_start`` lies in [0, num_rows), ``id != padding_idx`` and its position is not
    ignored. Every output has a shape that follows from N = ids.numel(), so nothing waits for the device.

    Args:
        ids: int32 or int64, any shape, N elements.
        num_rows: rows of the table (of the shard, where the table is split).
        padding_idx: the id that gets no gradient, -1 for none.
        vocab_start: the id of the table's first row.
        ignored: bool, N elements, True where a position gets no gradient.

    Returns:
        order: int32 (N), positions in the flattened ids; the kept ones first, sorted stably by id.
        segment_ids: int32 (N), the distinct kept rows, ascending, in the first ``count`` elements.
        segment_offsets: int32 (N + 1), segment s is ``order[segment_offsets[s]:segment_offsets[s + 1]]``.
        count: int32 (1), number of segments.
        Elements past the kept ones (``segment_ids``: past ``count``; ``segment_offsets``: past ``count + 1``) mean
        nothing.
    """
    ids = ids.reshape(-1)
    n = ids.numel()
    if vocab_start:
        ids = ids.long()  # the bounds may not fit int32
    keep = (ids >= vocab_start) & (ids < vocab_start + num_rows)
    if padding_idx >= 0:
        keep = keep & (ids != padding_idx)
    if ignored is not None:
        keep = keep & ~ignored.reshape(-1)
    local = ids - vocab_start if vocab_start else ids
    # Dropped ids sort behind all rows. A GPU's radix sort works by the key's width: 2 bytes take half the passes.
    narrow = num_rows < 1 << 15 and ids.device.type in ("cpu", "cuda")
    keys = torch.where(keep, local, num_rows).to(torch.int16 if narrow else torch.int32)
    keys, order = torch.sort(keys, stable=True)

    first = keys < num_rows
    kept = first.sum(dtype=torch.int32)
    first[1:] &= keys[1:] != keys[:-1]
    segments = first.cumsum(0, dtype=torch.int64)
    # Positions that start no segment write to a last element that is cut off.
    target = torch.where(first, segments - 1, n + 1)
    count = first.sum(dtype=torch.int32).reshape(1)
    segment_ids = keys.new_zeros(n + 2, dtype=torch.int32).scatter_(0, target, keys.to(torch.int32))
    offsets = kept.expand(n + 2).clone()
    offsets.scatter_(0, target, torch.arange(n, dtype=torch.int32, device=ids.device))
    return order.to(torch.int32), segment_ids[:n], offsets[: n + 1], count


def planned_rows(order: Tensor, segment_ids: Tensor, segment_offsets: Tensor, count: Tensor) -> Tensor:
    """The table's row of every position of a plan, -1 where the id was dropped: int64 (N). Never waits."""
    n = order.numel()
    rows = torch.full((n + 1,), -1, dtype=torch.int64, device=order.device)
    if n == 0:
        return rows[:n]
    at = torch.arange(n, device=order.device)
    segment, kept = _segment_of_each(segment_offsets, count, at)
    # What a plan holds behind its last segment means nothing: those places write to an element that is cut off.
    target = torch.where(at < kept, order, n).long()
    values = segment_ids.gather(0, segment.clamp(min=0)).long()
    return rows.scatter_(0, target, torch.where(at < kept, values, -1))[:n]


def _segment_of_each(segment_offsets: Tensor, count: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
    """The segment that each place ``at`` of the sorted order lies in, and how many places lie in one."""
    n = at.numel()
    kept = segment_offsets.gather(0, count.long())
    # Behind the last segment a plan's elements mean nothing: give them values that sort behind all places.
    starts = torch.where(at < count, segment_offsets[:n], n + 1).long()
    return torch.searchsorted(starts, at, right=True) - 1, kept


def segment_sums(
    grad_rows: Tensor, order: Tensor, segment_offsets: Tensor, count: Tensor, sources: Tensor | None = None,
    weights: Tensor | None = None, scale_by_freq: bool = False,
) -> Tensor:  # fmt: skip
    """The sum of every segment's gradient rows, added in fp32 (fp64 for double) in a fixed tree.

    Args:
        grad_rows: (R, D), floating point; R = N without ``sources``.
        order, segment_offsets, count: of a plan, see :func:`embedding_plan`.
        sources: (N), the row of ``grad_rows`` that belongs to a position; what lies outside adds nothing.
        weights: (N), factor of a position's row.
        scale_by_freq: multiply every sum by 1 / (number of its positions).

    Returns:
        (N, D) in fp32 (fp64 for double): row s is the sum of segment s for s < count, and zero after that.
    """
    n, width = order.numel(), grad_rows.shape[1]
    wide = torch.float64 if grad_rows.dtype == torch.float64 else torch.float32
    if n == 0 or grad_rows.shape[0] == 0:
        return grad_rows.new_zeros((n, width), dtype=wide)
    at = torch.arange(n, device=grad_rows.device)
    segment, kept = _segment_of_each(segment_offsets, count, at)
    # Where a sum of 2**k neighbours may still take in the 2**k before it.
    depth = max(n - 1, 0).bit_length()
    joins = [(segment[1 << k :] == segment[: -(1 << k)])[:, None] for k in range(depth)]
    places = torch.where(at < kept, order, 0).long()
    live = at < kept
    rows = places
    if sources is not None:
        rows = sources.gather(0, places).long()
        live = live & (rows >= 0) & (rows < grad_rows.shape[0])
        rows = torch.where(live, rows, 0)
    factors = None if weights is None else weights.gather(0, places).to(wide)[:, None]
    alive = at < count
    # The last place of every segment, where its sum ends up, and the segment's size.
    ends = torch.where(alive, segment_offsets[1:], 1).long() - 1
    sizes = torch.where(alive, segment_offsets[1:] - segment_offsets[:-1], 1)
    shares = sizes.to(wide).reciprocal()[:, None]

    slabs = []
    step = max(1, _SLAB // n)
    for begin in range(0, width, step):
        sums = grad_rows[:, begin : begin + step].index_select(0, rows).to(wide)
        if factors is not None:
            sums = sums * factors
        sums = torch.where(live[:, None], sums, 0)
        for k, join in enumerate(joins):
            sums = torch.cat((sums[: 1 << k], torch.where(join, sums[1 << k :] + sums[: -(1 << k)], sums[1 << k :])))
        total = torch.where(alive[:, None], sums.index_select(0, ends), 0)
        slabs.append(total * shares if scale_by_freq else total)
    return torch.cat(slabs, dim=1) if slabs else grad_rows.new_zeros((n, 0), dtype=wide)


def embedding_grad_dense(
    grad_rows: Tensor, order: Tensor, segment_ids: Tensor, segment_offsets: Tensor, count: Tensor, num_rows: int,
    sources: Tensor | None = None, weights: Tensor | None = None, scale_by_freq: bool = False,
) -> Tensor:  # fmt: skip
    """The dense gradient (num_rows, D) in the dtype of ``grad_rows``; see :func:`segment_sums`. Differentiable."""
    sums = segment_sums(grad_rows, order, segment_offsets, count, sources, weights, scale_by_freq)
    at = torch.arange(order.numel(), device=grad_rows.device)
    # What is no segment of this table goes to a row that is cut off.
    target = torch.where((at < count) & (segment_ids < num_rows), segment_ids, num_rows).long()
    out = grad_rows.new_zeros((num_rows + 1, grad_rows.shape[1]))
    return out.index_copy(0, target, sums.to(out.dtype))[:num_rows]


def embedding_grad(
    out: Tensor, grad_rows: Tensor, order: Tensor, segment_ids: Tensor, segment_offsets: Tensor, count: Tensor,
    mode: int, sources: Tensor | None, weights: Tensor | None, scale_by_freq: bool, seed: Tensor | None,
) -> None:  # fmt: skip
    """Write the sums of :func:`segment_sums` into ``out``.

    Args:
        out: (V, D), of another dtype than ``grad_rows`` if need be; in the modes of rows (C, D).
        mode: ``DENSE``: every row of the table, zeros included. ``ACCUMULATE``: added to the rows that have a
            segment, in fp32, rounded once; no other row is touched. ``ROWS``: row s is that of segment s, for
            s < count; the rest is left as it is. ``PADDED_ROWS``: the same, and the rest is zeros.
        seed: int64 (1), for bfloat16 sums that are added: round stochastically
            (:func:`embedkernels.reference.random.round_stochastic`).
    """
    if mode in (DENSE, PADDED_ROWS):
        out.zero_()
    capacity = out.shape[0]
    if order.numel() == 0 or capacity == 0:
        return
    sums = segment_sums(grad_rows, order, segment_offsets, count, sources, weights, scale_by_freq)
    at = torch.arange(order.numel(), device=out.device)
    target = at if mode in (ROWS, PADDED_ROWS) else segment_ids.long()
    live = (at < count) & (target < capacity)
    # Rows ascend: if the first is none of this table's, none is. Places that are no segment do again what the first
    # does, or put back what is there.
    first = torch.where(live[0], target[0], 0)
    target = torch.where(live, target, first)
    old = out.index_select(0, target)
    sums = torch.where(live[:, None], sums, sums[:1])
    if mode == ACCUMULATE:
        sums = old.to(sums.dtype) + sums
    new = sums.to(out.dtype) if seed is None else random.round_stochastic(sums, target, seed)
    out.index_copy_(0, target, torch.where(live[0], new, old))

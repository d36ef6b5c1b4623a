"""Embedding lookup, the plan of its gradient and the dense gradient, in plain PyTorch.

These functions say what the ops compute. They run on every device, never wait for it, and give the same bits for any
number of threads, so they are also the fallback where neither the extension nor Triton is there.
"""

from __future__ import annotations

import torch
from torch import Tensor

# The segmented sum holds a few copies of a slab of gradient rows in fp32; columns are cut so that one copy stays
# below this many elements (64 MiB).
_SLAB = 1 << 24


def embedding(ids: Tensor, weight: Tensor) -> Tensor:
    """Rows of ``weight`` (V, D) at ``ids`` (any shape, in [0, V)): (*ids.shape, D)."""
    return weight.index_select(0, ids.reshape(-1)).reshape(*ids.shape, weight.shape[1])


def embedding_plan(
    ids: Tensor, num_rows: int, padding_idx: int = -1, vocab_start: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Which gradient rows meet in which row of the table, from the ids alone.

    An id is kept if ``id - vocab_start`` lies in [0, num_rows) and ``id != padding_idx``. Every output has a shape
    that follows from N = ids.numel(), so nothing waits for the device.

    Args:
        ids: int32 or int64, any shape, N elements.
        num_rows: rows of the table (of the shard, where the table is split).
        padding_idx: the id that gets no gradient, -1 for none.
        vocab_start: the id of the table's first row.

    Returns:
        order: int32 (N), positions in the flattened ids; the kept ones first, sorted stably by id.
        segment_ids: int32 (N), the distinct kept rows, ascending, in the first ``count`` elements.
        segment_offsets: int32 (N + 1), segment s is ``order[segment_offsets[s]:segment_offsets[s + 1]]``.
        count: int32 (1), number of segments.
        Elements past ``count`` (``segment_offsets``: past ``count + 1``) mean nothing.
    """
    ids = ids.reshape(-1)
    n = ids.numel()
    if vocab_start:
        ids = ids.long()  # the bounds may not fit int32
    keep = (ids >= vocab_start) & (ids < vocab_start + num_rows)
    if padding_idx >= 0:
        keep = keep & (ids != padding_idx)
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


def embedding_grad_dense(
    grad_rows: Tensor, order: Tensor, segment_ids: Tensor, segment_offsets: Tensor, count: Tensor, num_rows: int
) -> Tensor:
    """Sum of the gradient rows of every row of the table, added in fp32 (fp64 for double) in a fixed tree.

    Args:
        grad_rows: (N, D), floating point.
        order, segment_ids, segment_offsets, count: a plan, see :func:`embedding_plan`.
        num_rows: rows of the table.

    Returns:
        (num_rows, D) in the dtype of ``grad_rows``; rows without a gradient are zero.
    """
    n, width = grad_rows.shape
    out = grad_rows.new_zeros((num_rows + 1, width))
    if n == 0:
        return out[:num_rows]
    at = torch.arange(n, device=grad_rows.device)
    segment, kept = _segment_of_each(segment_offsets, count, at)
    last = torch.cat((segment[1:] != segment[:-1], segment.new_ones(1, dtype=torch.bool)))
    last = (last & (at + 1 < kept)) | (at + 1 == kept)
    rows = torch.where(last, segment_ids.gather(0, segment.clamp(min=0)), num_rows).long()
    # Where a sum of 2**k neighbours may still take in the 2**k before it.
    depth = max(n - 1, 0).bit_length()
    joins = [(segment[1 << k :] == segment[: -(1 << k)])[:, None] for k in range(depth)]
    order = torch.where(at < kept, order, 0).long()

    wide = torch.float64 if grad_rows.dtype == torch.float64 else torch.float32
    step = max(1, _SLAB // n)
    for begin in range(0, width, step):
        sums = grad_rows[:, begin : begin + step].index_select(0, order).to(wide)
        for k, join in enumerate(joins):
            sums = torch.cat((sums[: 1 << k], torch.where(join, sums[1 << k :] + sums[: -(1 << k)], sums[1 << k :])))
        # Every segment's last element holds its sum; all others go to the row that is cut off.
        out[:, begin : begin + step].index_copy_(0, rows, sums.to(out.dtype))
    return out[:num_rows]

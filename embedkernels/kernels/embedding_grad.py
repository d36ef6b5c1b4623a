"""Gradient of an embedding table: for every row that ids meet in, Σ weight[i]·grad[source[i]] over its positions i.

A plan (``embedkernels.reference.embedding``) lists the positions sorted by row: segment s is order[offsets[s]:
offsets[s + 1]] and belongs to row segment_ids[s]. The sorted positions are cut into tiles of the same size whatever
the ids, so that one hot row keeps as many programs busy as many cold ones. No atomics, no wait for the device.

``embedding_grad_tile_kernel``, grid (tiles + rows of ``out`` / ZERO_ROWS, D / BLOCK_D).
    The first programs walk one tile each, adding rows in fp32. A segment that begins and ends in the tile goes
    straight to ``out``. At most two segments of a tile are cut by its edges. The sum of one that began in an earlier
    tile is left in carry[tile, 0]; the sum of one that begins here and goes on is left in carry[tile, 1], and
    owner[tile] says which segment that is (-1: none).
    The other programs write zeros to the rows of ``out`` that have no segment; only DENSE and PADDED_ROWS have them.
``embedding_grad_carry_kernel``, grid (tiles, D / CARRY_COLUMNS).
    The tile that owns a cut segment adds carry[tile, 1] and carry[later tiles, 0] up to the segment's end.

So every row of ``out`` is written at most once: by the tile that holds its segment, by the owner of its cut segment,
or as zeros. What is added to what follows from the plan and the tile size, which follows from N and the dtype of the
sums: the same bits in every run. What is not asked for (sources, weights and so on) is not in the compiled kernel.

Bytes (e, o = element sizes of the gradient rows and of ``out``, K kept positions in U segments): K·D·e, and 4·K + 8·U
of plan; V·D·o in DENSE, U·D·o in ROWS, 2·U·D·o in ACCUMULATE. The workspace is two sums a tile, of which only cut
segments use any: 8·D bytes for every 64 positions, N·D/8, and at most MAX_TILES of them. In fp64 tiles are twice as
long as in fp32 and their sums twice as large. Each tile finds its first segment by bisection of the offsets.

N < 2**31; addresses are 64-bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from embedkernels.kernels.embedding import column_block
from embedkernels.kernels.random import ROUNDS

# What becomes of the sum of a segment. The same numbers as in embedkernels/reference/embedding.py.
DENSE = tl.constexpr(0)  # written to its row of the table; every other row is written as zeros
ACCUMULATE = tl.constexpr(1)  # added to its row of the table; no other row is touched
ROWS = tl.constexpr(2)  # written to row s of ``out`` for segment s; rows from ``count`` on are left as they are
PADDED_ROWS = tl.constexpr(3)  # the same, and rows from ``count`` on are written as zeros

# Rows per tile: at least MIN_ROWS (which, like MAX_TILES, bounds the workspace); above that as few as leave MAX_TILES
# tiles, which bounds the carries of one segment (they are added by one program).
MIN_ROWS = 64
MAX_TILES = 1024
# Rows in flight: loaded before the first of them is added.
GROUP = 8
ZERO_ROWS = 64
# Carries of one segment that are added at a time, and the columns of a program: narrow, since a hot segment's carries
# are added by one row of programs.
CARRY_ROWS = 64
CARRY_COLUMNS = 64
CARRY_WARPS = 4


@triton.jit
def _below(values_ptr, length, bound):
    """How many of ``length`` ascending values are less than ``bound``."""
    low = length * 0
    high = length
    while low < high:
        middle = low + (high - low) // 2
        less = tl.load(values_ptr + middle) < bound
        low = tl.where(less, middle + 1, low)
        high = tl.where(less, high, middle)
    return low


@triton.jit
def _write_zeros(
    out_ptr, segment_ids_ptr, count, first, num_rows, columns, inside,
    D: tl.constexpr, MODE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Zeros to the rows first .. first + BLOCK of ``out`` that have no segment."""
    zeros = tl.zeros(columns.shape, dtype=out_ptr.dtype.element_ty)
    here = out_ptr + first.to(tl.int64) * D + columns
    end = first + tl.minimum(BLOCK, num_rows - first)
    if MODE == DENSE:
        # Segments are distinct rows in ascending order: at most ``first`` of them lie below ``first``.
        segment = _below(segment_ids_ptr, tl.minimum(count, first), first)
        used = tl.load(segment_ids_ptr + segment, mask=segment < count, other=-1)
        for row in range(first, end):
            if row == used:
                segment += 1
                used = tl.load(segment_ids_ptr + segment, mask=segment < count, other=-1)
            else:
                tl.store(here, zeros, mask=inside)
            here += D
    else:
        for row in range(first, end):
            if row >= count:
                tl.store(here, zeros, mask=inside)
            here += D


@triton.jit
def _row_of(segment_ids_ptr, segment, count, MODE: tl.constexpr):
    """The row of ``out`` that a segment belongs to; means nothing from ``count`` on."""
    if (MODE == DENSE) | (MODE == ACCUMULATE):
        return tl.load(segment_ids_ptr + segment, mask=segment < count, other=0)
    else:
        return segment


@triton.jit
def _exists(row, num_rows, columns):
    """Whether there is such a row, for every column: Triton 3.9 interprets no scalar as a mask of a block."""
    rows = tl.full(columns.shape, row, tl.int32)
    return (rows >= 0) & (rows < num_rows)


@triton.jit
def _rounded_up_or_down(value, row, first_column, seed):
    """fp32 to bf16: up with the probability that what is cut off is of a unit in the last place.

    The 16 bits of column d of a row: of word d % 8 // 2 of counter (d // 8, row), the low half where d is even.
    ``first_column`` and the columns are multiples of 8. Infinities and NaN are rounded to nearest.
    """
    group = first_column // 8 + tl.arange(0, value.shape[0] // 8)
    zero = tl.zeros(group.shape, dtype=tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, zero + group.to(tl.uint32), zero + row.to(tl.uint32), zero, zero, ROUNDS)
    words = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
    random = tl.interleave(words & 0xFFFF, words >> 16)
    bits = value.to(tl.uint32, bitcast=True)
    rounded = ((bits + random) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return tl.where((bits & 0x7F800000) == 0x7F800000, value.to(tl.bfloat16), rounded)


@triton.jit
def _finished(total, before, positions, row, first_column, seed, dtype: tl.constexpr):
    """What is written for a segment whose sum is ``total``.

    before: what the row holds, or None; positions: how many the segment has, to divide by, or None; seed: of
    stochastic rounding, or None for rounding to nearest.
    """
    if positions is not None:
        if total.dtype == tl.float32:
            total *= tl.div_rn(1.0, positions.to(tl.float32))
        else:
            total *= 1.0 / positions.to(tl.float64)
    if before is not None:
        total += before.to(total.dtype)
    if seed is not None:
        return _rounded_up_or_down(total, row, first_column, seed)
    else:
        return total.to(dtype)


@triton.jit
def _walk_tile(
    out_ptr, carry_ptr, grad_ptr, order_ptr, segment_ids_ptr, segment_offsets_ptr, sources_ptr, weights_ptr, count,
    seed, tile, begin, end, num_rows, num_sources, first_column, columns, inside, stride,
    D: tl.constexpr, MODE: tl.constexpr, SCALE: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Add the rows begin .. end of the sorted order; returns the segment that goes on beyond ``end``, or -1."""
    # The last segment that begins at or before ``begin``; none is empty, so there are at most begin + 1 of them.
    segment = _below(segment_offsets_ptr, tl.minimum(count, begin + 1), begin + 1) - 1
    start = tl.load(segment_offsets_ptr + segment)
    stop = tl.load(segment_offsets_ptr + segment + 1)
    # Where the sum goes, -1 for the carry of a segment that began in an earlier tile.
    row = tl.where(start < begin, -1, _row_of(segment_ids_ptr, segment, count, MODE))
    carry_at = carry_ptr + tile.to(tl.int64) * (2 * D) + columns
    total = tl.zeros(columns.shape, dtype=carry_ptr.dtype.element_ty)
    for at in range(begin, end, GROUP):
        positions = ()
        for i in tl.static_range(GROUP):
            positions = positions + (tl.load(order_ptr + at + i, mask=at + i < end, other=0),)
        sources = positions
        if sources_ptr is not None:
            sources = ()
            for i in tl.static_range(GROUP):
                sources = sources + (tl.load(sources_ptr + positions[i], mask=at + i < end, other=-1),)
        factors = ()
        if weights_ptr is not None:
            for i in tl.static_range(GROUP):
                factor = tl.load(weights_ptr + positions[i], mask=at + i < end, other=0.0)
                if sources_ptr is not None:  # what a missing row is taken as is zero, which infinity would make NaN
                    factor = tl.where((sources[i] >= 0) & (sources[i] < num_sources), factor, 0.0)
                factors = factors + (factor,)
        group = ()
        for i in tl.static_range(GROUP):
            here = grad_ptr + sources[i].to(tl.int64) * stride + columns
            if sources_ptr is None:
                live = tl.full(columns.shape, at + i, tl.int32) < end
            else:
                live = _exists(sources[i], num_sources, columns)
            group = group + (tl.load(here, mask=inside & live, other=0.0),)

        before = ()
        if MODE == ACCUMULATE:
            # What the rows that are finished in this group hold: also in flight before the first row is added.
            ahead = segment
            ahead_stop = stop
            ahead_row = row
            for i in tl.static_range(GROUP):
                ends = at + i + 1 == ahead_stop
                live = _exists(tl.where(ends, ahead_row, -1), num_rows, columns)
                out_at = out_ptr + ahead_row.to(tl.int64) * D + columns
                before = before + (tl.load(out_at, mask=inside & live, other=0.0),)
                if ends:
                    ahead += 1
                    ahead_stop = tl.load(segment_offsets_ptr + ahead + 1, mask=ahead < count, other=-1)
                    ahead_row = _row_of(segment_ids_ptr, ahead, count, MODE)

        for i in tl.static_range(GROUP):
            value = group[i].to(total.dtype)
            total += value * factors[i] if weights_ptr is not None else value
            # A tile is a whole number of groups unless it ends with the last segment, after which ``stop`` is -1:
            # nothing stops beyond ``end``.
            if at + i + 1 == stop:
                if row < 0:
                    tl.store(carry_at, total, mask=inside)
                elif row < num_rows:  # a plan may be a larger table's
                    out_at = out_ptr + row.to(tl.int64) * D + columns
                    old = before[i] if MODE == ACCUMULATE else None
                    length = stop - start if SCALE else None
                    done = _finished(total, old, length, row, first_column, seed, out_ptr.dtype.element_ty)
                    tl.store(out_at, done, mask=inside)
                total = tl.zeros(columns.shape, dtype=carry_ptr.dtype.element_ty)
                start = stop
                segment += 1
                stop = tl.load(segment_offsets_ptr + segment + 1, mask=segment < count, other=-1)
                row = _row_of(segment_ids_ptr, segment, count, MODE)
    owned = -1
    if (start < end) & (stop > end):
        if start >= begin:
            tl.store(carry_at + D, total, mask=inside)
            owned = segment
        else:
            tl.store(carry_at, total, mask=inside)
    return owned


@triton.jit(do_not_specialize=["tiles", "tile_rows", "num_rows", "num_sources"])
def embedding_grad_tile_kernel(
    out_ptr, carry_ptr, owner_ptr, grad_ptr, order_ptr, segment_ids_ptr, segment_offsets_ptr, count_ptr, sources_ptr,
    weights_ptr, seed_ptr, tiles, tile_rows, num_rows, num_sources, grad_stride_n,
    D: tl.constexpr, BLOCK_D: tl.constexpr, MODE: tl.constexpr, SCALE: tl.constexpr, CONTIGUOUS: tl.constexpr,
    GROUP: tl.constexpr, ZERO_ROWS: tl.constexpr,
):  # fmt: skip
    """One tile of the sorted positions, or ZERO_ROWS rows of ``out``. Pointers to what is not asked for are None."""
    tile = tl.program_id(0)
    first_column = tl.program_id(1) * BLOCK_D
    columns = first_column + tl.arange(0, BLOCK_D)
    inside = columns < D
    count = tl.load(count_ptr)
    if tile < tiles:
        kept = tl.load(segment_offsets_ptr + count)
        begin = tile * tile_rows
        owned = -1
        if begin < kept:
            stride = D if CONTIGUOUS else grad_stride_n
            end = begin + tl.minimum(tile_rows, kept - begin)
            seed = None if seed_ptr is None else tl.load(seed_ptr)
            owned = _walk_tile(
                out_ptr, carry_ptr, grad_ptr, order_ptr, segment_ids_ptr, segment_offsets_ptr, sources_ptr,
                weights_ptr, count, seed, tile, begin, end, num_rows, num_sources, first_column, columns, inside,
                stride, D, MODE, SCALE, GROUP,
            )  # fmt: skip
        tl.store(owner_ptr + tile, owned, mask=tl.program_id(1) == 0)
    elif (MODE == DENSE) | (MODE == PADDED_ROWS):
        first = (tile - tiles) * ZERO_ROWS
        _write_zeros(out_ptr, segment_ids_ptr, count, first, num_rows, columns, inside, D, MODE, ZERO_ROWS)


@triton.jit(do_not_specialize=["tile_rows", "num_rows"])
def embedding_grad_carry_kernel(
    out_ptr, carry_ptr, owner_ptr, segment_ids_ptr, segment_offsets_ptr, seed_ptr, tile_rows, num_rows,
    D: tl.constexpr, BLOCK_D: tl.constexpr, MODE: tl.constexpr, SCALE: tl.constexpr, CARRY_ROWS: tl.constexpr,
):  # fmt: skip
    """The cut segment that begins in a tile, if there is one."""
    tile = tl.program_id(0)
    segment = tl.load(owner_ptr + tile)
    if segment >= 0:
        row = _row_of(segment_ids_ptr, segment, segment + 1, MODE)
        if row < num_rows:
            first_column = tl.program_id(1) * BLOCK_D
            columns = first_column + tl.arange(0, BLOCK_D)
            inside = columns < D
            out_at = out_ptr + row.to(tl.int64) * D + columns
            before = tl.load(out_at, mask=inside, other=0.0) if MODE == ACCUMULATE else None
            stop = tl.load(segment_offsets_ptr + segment + 1)
            positions = stop - tl.load(segment_offsets_ptr + segment) if SCALE else None
            last = (stop - 1) // tile_rows
            total = tl.zeros((CARRY_ROWS, BLOCK_D), dtype=carry_ptr.dtype.element_ty)
            for at in range(tile + 1, last + 1, CARRY_ROWS):
                rows = at + tl.arange(0, CARRY_ROWS)
                here = carry_ptr + rows[:, None].to(tl.int64) * (2 * D) + columns[None, :]
                total += tl.load(here, mask=(rows <= last)[:, None] & inside[None, :], other=0.0)
            head = tl.load(carry_ptr + tile.to(tl.int64) * (2 * D) + D + columns, mask=inside, other=0.0)
            seed = None if seed_ptr is None else tl.load(seed_ptr)
            done = _finished(
                head + tl.sum(total, axis=0), before, positions, row, first_column, seed, out_ptr.dtype.element_ty
            )
            tl.store(out_at, done, mask=inside)


def tile_rows(n: int, wide: torch.dtype = torch.float32) -> int:
    """Sorted positions per tile, where sums are of dtype ``wide``."""
    return max(MIN_ROWS, triton.next_power_of_2(triton.cdiv(n, MAX_TILES))) * wide.itemsize // 4


def group_rows(mode: int) -> int:
    """Gradient rows in flight: half of GROUP where each may meet a row of ``out``, which then is in flight too."""
    return GROUP // 2 if mode == ACCUMULATE else GROUP


def tile_warps(block_d: int) -> int:
    """Eight columns per thread: 16 bytes of a 16-bit dtype."""
    return max(1, block_d // 256)


def embedding_grad(
    out: Tensor,
    grad_rows: Tensor,
    order: Tensor,
    segment_ids: Tensor,
    segment_offsets: Tensor,
    count: Tensor,
    mode: int,
    sources: Tensor | None = None,
    weights: Tensor | None = None,
    scale_by_freq: bool = False,
    seed: Tensor | None = None,
) -> None:
    """Write the sums of a plan's segments into ``out``, added in fp32 (fp64 for double) and rounded once.

    Args:
        out: (V, D) or, in ROWS and PADDED_ROWS, (C, D), contiguous. Segments of rows that it lacks are left out. Of
            the dtype of ``grad_rows``, or one of them is fp32 and the other a 16-bit dtype.
        grad_rows: (R, D), any row stride, the elements of a row neighbours. R is N without ``sources``.
        order, segment_ids, segment_offsets, count: a plan of N ids.
        mode: DENSE, ACCUMULATE, ROWS or PADDED_ROWS.
        sources: int32 (N), the row of ``grad_rows`` for each position; one outside of it adds nothing.
        weights: fp32 (fp64 for double) (N), the factor of each position.
        scale_by_freq: divide every sum by the number of its positions.
        seed: int64 of one element, for stochastic rounding; ACCUMULATE into bf16 only.
    """
    num_rows, width = out.shape
    n = order.numel()
    wide = torch.float64 if grad_rows.dtype == torch.float64 else torch.float32
    rows = tile_rows(n, wide)
    tiles = triton.cdiv(n, rows)
    programs = tiles + (triton.cdiv(num_rows, ZERO_ROWS) if mode in (DENSE, PADDED_ROWS) else 0)
    if programs == 0 or out.numel() == 0:
        return
    block_d = column_block(width)
    stride = grad_rows.stride(0)
    carry = torch.empty((tiles, 2, width), dtype=wide, device=out.device)
    owner = torch.empty(tiles, dtype=torch.int32, device=out.device)
    embedding_grad_tile_kernel[(programs, triton.cdiv(width, block_d))](
        out, carry, owner, grad_rows, order, segment_ids, segment_offsets, count, sources, weights, seed, tiles, rows,
        num_rows, grad_rows.shape[0], stride, CONTIGUOUS=stride == width, MODE=mode, SCALE=scale_by_freq,
        GROUP=group_rows(mode), ZERO_ROWS=ZERO_ROWS, D=width, BLOCK_D=block_d, num_warps=tile_warps(block_d),
        num_stages=1,
    )  # fmt: skip
    if tiles > 1:
        embedding_grad_carry_kernel[(tiles, triton.cdiv(width, CARRY_COLUMNS))](
            out, carry, owner, segment_ids, segment_offsets, seed, rows, num_rows, D=width, BLOCK_D=CARRY_COLUMNS,
            MODE=mode, SCALE=scale_by_freq, CARRY_ROWS=CARRY_ROWS, num_warps=CARRY_WARPS, num_stages=1,
        )  # fmt: skip

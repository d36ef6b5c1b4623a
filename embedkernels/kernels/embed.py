"""Input embeddings in one pass: y = dropout(norm(scale·W[ids] + T[type_ids] + P[position_ids] + extra)) · mask.

``embed_fwd_kernel`` gathers, adds, normalises, drops and writes each row once; grid (N / BLOCK_N, column chunks).
``embed_bwd_kernel`` turns the gradient of y into the gradient of the summed row, which is that of every table's row,
and adds up the gradients of the norm's weight and bias; grid (programs, column chunks), a program walks every
programs-th tile of rows. Nothing of size N·D is saved between the two: the rows are gathered again, x-hat comes from
the saved mean and rstd, and the dropout mask from its seed.

Bytes (e = element size; rows met again come from the caches): forward N·D·e of W read at most, N·D·e written;
backward N·D·e of gradient and at most N·D·e of W read, N·D·e written. Rows that are given instead of looked up, and
``extra``, are read once in each direction. Both are bound by memory.

With a norm, a row fits one tile up to ``WIDEST`` columns. Beyond that, and without a norm beyond ``CHUNK``, columns
are cut into chunks, and a first kernel computes the per-row sums that the norm needs (``embed_stats_kernel``,
``embed_projection_kernel``).

Sums over rows are deterministic: a program adds its rows in order and stores one partial row, and
``embed_bwd_reduce_kernel`` adds the partial rows in order. No atomics.

Addresses are 64-bit; rows are numbered in 32 bits, and a loop's last step past them fits too (``MOST_ROWS``).
Each kernel's seventeen arguments from ``ids_ptr`` to ``places`` are the sources of a row.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from embedkernels.kernels.ids import EMBED, report_bad_id
from embedkernels.kernels.launch import Launcher, blocks
from embedkernels.kernels.random import keep_scale, row_keep_mask
from embedkernels.kernels.sinusoids import constants, sinusoid_rows
from embedkernels.reference.sinusoids import MOST_POSITIONS

MOST_ROWS = 2**30 - 2**16
_MOST_POSITIONS = tl.constexpr(MOST_POSITIONS)
# By the number that the kernels know a norm by.
NORMS = ("none", "layer", "rms")
WIDEST = 8192
CHUNK = 1024
# Backward, when every program leaves a partial row of the norm's gradients: as many programs as fill half of the
# multiprocessors' threads, but each with a few tiles; and beyond one for each multiprocessor no more than leave
# partial rows, written and read, of 1/20 of the gradients in and out.
WARPS_PER_SM = 32
TILES_PER_PROGRAM = 4
PARTIAL_SHARE = 20
# The sum of those rows: narrow columns, so that enough programs share it, and many loads in flight in each.
REDUCE_ROWS = 128
REDUCE_COLUMNS = 16
# What may change from launch to launch without a new compilation.
VARYING = ("n", "token_rows", "position_rows", "position_start", "position_period", "type_rows", "type_period",
           "extra_period", "places", "mask_period")  # fmt: skip


@triton.jit
def _table(table_ptr, table_rows, ids, live, rows, columns, errors, D: tl.constexpr, TABLE: tl.constexpr,
           REPORT: tl.constexpr):  # fmt: skip
    """(BLOCK_N, BLOCK_D) fp32 rows of a table; an id out of range is never used as an address and gives zeros."""
    known = live & (ids >= 0) & (ids < table_rows)
    if REPORT:
        # Every chunk of a row meets the same ids: the first one reports.
        bad = live & (known == 0) & (tl.program_id(1) == 0)
        report_bad_id(bad, ids, rows.to(tl.int64), table_rows, TABLE, EMBED, errors[0], errors[1])
    at = table_ptr + ids[:, None] * D + columns[None, :]
    return tl.load(at, mask=known[:, None] & (columns < D)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _sinusoids(constants_ptr, padding, ids, live, rows, columns, errors, D: tl.constexpr, ROUNDED: tl.constexpr,
               REPORT: tl.constexpr):  # fmt: skip
    """(BLOCK_N, BLOCK_D) fp32 rows of fixed positions; zeros for ``padding`` and where an id is out of range."""
    known = live & (ids >= 0) & (ids < _MOST_POSITIONS)
    if REPORT:
        bad = live & (known == 0) & (tl.program_id(1) == 0)
        report_bad_id(bad, ids, rows.to(tl.int64), _MOST_POSITIONS, 1, EMBED, errors[0], errors[1])
    x = sinusoid_rows(constants_ptr, ids.to(tl.int32), columns, D, ROUNDED)
    return tl.where((known & (ids != padding))[:, None], x, 0.0)


@triton.jit
def _shared(rows, period):
    """The number of what a row shares with those ``period`` before and after it. Unsigned: half the instructions."""
    return (rows.to(tl.uint32) % period.to(tl.uint32)).to(tl.int32)


@triton.jit
def _every_row(row_ptr, columns, D: tl.constexpr, BLOCK_N: tl.constexpr):
    """(BLOCK_N, BLOCK_D) fp32, one row of memory in every row of the tile.

    Loaded in the tile's own shape: a (BLOCK_D,) load has another layout, and shared memory would lie between the two.
    """
    at = row_ptr + tl.zeros((BLOCK_N, 1), dtype=tl.int32) + columns[None, :]
    return tl.load(at, mask=(columns < D)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _summed_rows(rows, live, columns, sources, errors, D: tl.constexpr, GIVEN: tl.constexpr, SCALE: tl.constexpr,
                 POSITION: tl.constexpr, TYPE: tl.constexpr, SINUSOIDS: tl.constexpr, PACKED: tl.constexpr,
                 EXTRA: tl.constexpr, REPORT: tl.constexpr):  # fmt: skip
    """((factor·W[ids] + T[type_ids]) + P[position_ids]) + extra of a tile, in fp32.

    GIVEN: the rows themselves stand in the place of W, and there are no ids. POSITION and TYPE: 0 no such table,
    1 implicit ids (position_start + s; type 0), 2 ids from memory. SINUSOIDS: 0 a learned table, else constants of
    ``kernels.sinusoids`` stand in its place, and the position whose row is zeros in that of its size; 2 where angles
    are rounded. PACKED: row r is that of the place packed[r] among the ids. EXTRA: whether there is such a term. What
    is the same in every sequence is stored once:
    row r uses number r % period. ``errors`` is (flag_ptr, record_ptr).
    """
    (ids_ptr, weight_ptr, token_rows, position_ids_ptr, position_weight_ptr, position_rows, position_start,
     position_period, type_ids_ptr, type_weight_ptr, type_rows, type_period, extra_ptr, extra_period,
     factor, packed_ptr, places) = sources  # fmt: skip
    if PACKED:
        chosen = tl.load(packed_ptr + rows, mask=live, other=0).to(tl.int64)
        known = live & (chosen >= 0) & (chosen < places)
        if REPORT:
            bad = live & (known == 0) & (tl.program_id(1) == 0)
            report_bad_id(bad, chosen, rows.to(tl.int64), places, 3, EMBED, errors[0], errors[1])
        live = known
        rows = tl.where(known, chosen, 0).to(tl.int32)
    if GIVEN:
        x = _table(weight_ptr, token_rows, rows.to(tl.int64), live, rows, columns, errors, D, 0, False)
    else:
        ids = tl.load(ids_ptr + rows, mask=live, other=0).to(tl.int64)
        x = _table(weight_ptr, token_rows, ids, live, rows, columns, errors, D, 0, REPORT)
    if SCALE:
        x *= factor
    if TYPE == 1:
        row = _every_row(type_weight_ptr, columns, D, rows.shape[0])
        if PACKED:
            row = tl.where(live[:, None], row, 0.0)
        x += row
    if TYPE == 2:
        ids = tl.load(type_ids_ptr + _shared(rows, type_period), mask=live, other=0).to(tl.int64)
        x += _table(type_weight_ptr, type_rows, ids, live, rows, columns, errors, D, 2, REPORT)
    if POSITION:
        if POSITION == 1:
            ids = (position_start + _shared(rows, position_period)).to(tl.int64)
        else:
            ids = tl.load(position_ids_ptr + _shared(rows, position_period), mask=live, other=0).to(tl.int64)
        if SINUSOIDS:
            x += _sinusoids(position_weight_ptr, position_rows, ids, live, rows, columns, errors, D, SINUSOIDS == 2,
                            REPORT and POSITION == 2)  # fmt: skip
        else:
            x += _table(position_weight_ptr, position_rows, ids, live, rows, columns, errors, D, 1,
                        REPORT and POSITION == 2)  # fmt: skip
    if EXTRA:
        ids = _shared(rows, extra_period).to(tl.int64)
        x += _table(extra_ptr, extra_period, ids, live, rows, columns, errors, D, 0, False)
    return x


@triton.jit
def _norm_input(rows, live, first, columns, sources, errors, seed_ptr, p, scale, D: tl.constexpr,
                BLOCK_D: tl.constexpr, GIVEN: tl.constexpr, SCALE: tl.constexpr, POSITION: tl.constexpr,
                TYPE: tl.constexpr, SINUSOIDS: tl.constexpr, PACKED: tl.constexpr, EXTRA: tl.constexpr,
                DROPOUT: tl.constexpr, REPORT: tl.constexpr):  # fmt: skip
    """The summed rows, after the dropout where that comes before the norm (DROPOUT == 2)."""
    x = _summed_rows(rows, live, columns, sources, errors, D, GIVEN, SCALE, POSITION, TYPE, SINUSOIDS, PACKED, EXTRA,
                     REPORT)  # fmt: skip
    if DROPOUT == 2:
        x = tl.where(row_keep_mask(tl.load(seed_ptr), rows, first, p, BLOCK_D), x * scale, 0.0)
    return x


@triton.jit(do_not_specialize=VARYING)
def embed_stats_kernel(
    mean_ptr, rstd_ptr, ids_ptr, weight_ptr, token_rows, position_ids_ptr, position_weight_ptr, position_rows,
    position_start, position_period, type_ids_ptr, type_weight_ptr, type_rows, type_period, extra_ptr, extra_period,
    factor, packed_ptr, places, n, eps, seed_ptr, p, scale, D: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, GIVEN: tl.constexpr, SCALE: tl.constexpr, POSITION: tl.constexpr, TYPE: tl.constexpr,
    SINUSOIDS: tl.constexpr, PACKED: tl.constexpr, EXTRA: tl.constexpr, NORM: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """Mean and 1/std of summed rows wider than a tile: one walk for the mean, one for the centred squares.

    For an RMSNorm the mean is not taken, and rstd is 1 / the root mean square.
    """
    sources = (ids_ptr, weight_ptr, token_rows, position_ids_ptr, position_weight_ptr, position_rows, position_start,
               position_period, type_ids_ptr, type_weight_ptr, type_rows, type_period, extra_ptr, extra_period,
               factor, packed_ptr, places)  # fmt: skip
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    live = rows < n
    mean = tl.zeros((BLOCK_N,), dtype=tl.float32)
    if NORM == 1:
        total = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
        for first in range(0, D, BLOCK_D):
            columns = first + tl.arange(0, BLOCK_D)
            total += _norm_input(rows, live, first, columns, sources, (), seed_ptr, p, scale, D, BLOCK_D, GIVEN,
                                 SCALE, POSITION, TYPE, SINUSOIDS, PACKED, EXTRA, DROPOUT, False)  # fmt: skip
        mean = tl.sum(total, axis=1) / D
    squares = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    for first in range(0, D, BLOCK_D):
        columns = first + tl.arange(0, BLOCK_D)
        x = _norm_input(rows, live, first, columns, sources, (), seed_ptr, p, scale, D, BLOCK_D, GIVEN, SCALE,
                        POSITION, TYPE, SINUSOIDS, PACKED, EXTRA, DROPOUT, False)  # fmt: skip
        centred = tl.where((columns < D)[None, :], x - mean[:, None], 0.0)
        squares += centred * centred
    if NORM == 1:
        tl.store(mean_ptr + rows, mean, mask=live)
    tl.store(rstd_ptr + rows, 1.0 / tl.sqrt(tl.sum(squares, axis=1) / D + eps), mask=live)


@triton.jit(do_not_specialize=VARYING)
def embed_fwd_kernel(
    out_ptr, mean_ptr, rstd_ptr, ids_ptr, weight_ptr, token_rows, position_ids_ptr, position_weight_ptr,
    position_rows, position_start, position_period, type_ids_ptr, type_weight_ptr, type_rows, type_period, extra_ptr,
    extra_period, factor, packed_ptr, places, n, norm_weight_ptr, norm_bias_ptr, eps, seed_ptr, p, scale, mask_ptr,
    mask_period, flag_ptr, record_ptr, D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    GIVEN: tl.constexpr, SCALE: tl.constexpr, POSITION: tl.constexpr, TYPE: tl.constexpr, SINUSOIDS: tl.constexpr,
    PACKED: tl.constexpr, EXTRA: tl.constexpr, NORM: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr,
    DROPOUT: tl.constexpr, MASK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One tile of y. Mean and rstd are written with it, or read where WIDE.

    NORM: 0 none, 1 LayerNorm, 2 RMSNorm, which has no mean. DROPOUT: 0 none, 1 after the norm, 2 before it.
    """
    sources = (ids_ptr, weight_ptr, token_rows, position_ids_ptr, position_weight_ptr, position_rows, position_start,
               position_period, type_ids_ptr, type_weight_ptr, type_rows, type_period, extra_ptr, extra_period,
               factor, packed_ptr, places)  # fmt: skip
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    live = rows < n
    first = tl.program_id(1) * BLOCK_D
    columns = first + tl.arange(0, BLOCK_D)
    inside = columns < D
    y = _norm_input(rows, live, first, columns, sources, (flag_ptr, record_ptr), seed_ptr, p, scale, D, BLOCK_D,
                    GIVEN, SCALE, POSITION, TYPE, SINUSOIDS, PACKED, EXTRA, DROPOUT, True)  # fmt: skip
    if NORM:
        if WIDE:
            rstd = tl.load(rstd_ptr + rows, mask=live, other=0.0)
            if NORM == 1:
                y -= tl.load(mean_ptr + rows, mask=live, other=0.0)[:, None]
        else:
            if NORM == 1:
                mean = tl.sum(y, axis=1) / D
                tl.store(mean_ptr + rows, mean, mask=live)
                y = tl.where(inside[None, :], y - mean[:, None], 0.0)
            rstd = 1.0 / tl.sqrt(tl.sum(y * y, axis=1) / D + eps)
            tl.store(rstd_ptr + rows, rstd, mask=live)
        y = y * rstd[:, None]
        if WEIGHT:
            y *= _every_row(norm_weight_ptr, columns, D, BLOCK_N)
        if BIAS:
            y += _every_row(norm_bias_ptr, columns, D, BLOCK_N)
    if DROPOUT == 1:
        y = tl.where(row_keep_mask(tl.load(seed_ptr), rows, first, p, BLOCK_D), y * scale, 0.0)
    if MASK:
        y *= tl.load(mask_ptr + _shared(rows, mask_period), mask=live, other=0).to(tl.float32)[:, None]
    at = out_ptr + rows[:, None].to(tl.int64) * D + columns[None, :]
    tl.store(at, y.to(out_ptr.dtype.element_ty), mask=live[:, None] & inside[None, :])


@triton.jit
def _upstream(
    grad_ptr, seed_ptr, rows, live, first, columns, p, scale, mask_ptr, mask_period, D: tl.constexpr,
    BLOCK_D: tl.constexpr, DROPOUT: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """Gradient of the norm's output: that of y, through the mask, and the dropout's drawn again."""
    at = grad_ptr + rows[:, None].to(tl.int64) * D + columns[None, :]
    grad = tl.load(at, mask=live[:, None] & (columns < D)[None, :], other=0.0).to(tl.float32)
    if MASK:
        grad *= tl.load(mask_ptr + _shared(rows, mask_period), mask=live, other=0).to(tl.float32)[:, None]
    if DROPOUT == 1:
        grad = tl.where(row_keep_mask(tl.load(seed_ptr), rows, first, p, BLOCK_D), grad * scale, 0.0)
    return grad


@triton.jit(do_not_specialize=VARYING)
def embed_projection_kernel(
    projection_ptr, grad_ptr, mean_ptr, rstd_ptr, ids_ptr, weight_ptr, token_rows, position_ids_ptr,
    position_weight_ptr, position_rows, position_start, position_period, type_ids_ptr, type_weight_ptr, type_rows,
    type_period, extra_ptr, extra_period, factor, packed_ptr, places, n, norm_weight_ptr, seed_ptr, p, scale,
    mask_ptr, mask_period, D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, GIVEN: tl.constexpr,
    SCALE: tl.constexpr, POSITION: tl.constexpr, TYPE: tl.constexpr, SINUSOIDS: tl.constexpr, PACKED: tl.constexpr,
    EXTRA: tl.constexpr, NORM: tl.constexpr, WEIGHT: tl.constexpr, DROPOUT: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """For rows wider than a tile, with g = grad·weight: projection[0] = mean(g·x-hat), projection[1] = mean(g)."""
    sources = (ids_ptr, weight_ptr, token_rows, position_ids_ptr, position_weight_ptr, position_rows, position_start,
               position_period, type_ids_ptr, type_weight_ptr, type_rows, type_period, extra_ptr, extra_period,
               factor, packed_ptr, places)  # fmt: skip
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    live = rows < n
    if NORM == 1:
        mean = tl.load(mean_ptr + rows, mask=live, other=0.0)
    rstd = tl.load(rstd_ptr + rows, mask=live, other=0.0)
    along = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    level = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    for first in range(0, D, BLOCK_D):
        columns = first + tl.arange(0, BLOCK_D)
        grad = _upstream(grad_ptr, seed_ptr, rows, live, first, columns, p, scale, mask_ptr, mask_period, D, BLOCK_D,
                         DROPOUT, MASK)  # fmt: skip
        x = _norm_input(rows, live, first, columns, sources, (), seed_ptr, p, scale, D, BLOCK_D, GIVEN, SCALE,
                        POSITION, TYPE, SINUSOIDS, PACKED, EXTRA, DROPOUT, False)  # fmt: skip
        if WEIGHT:
            grad *= _every_row(norm_weight_ptr, columns, D, BLOCK_N)
        if NORM == 1:
            x -= mean[:, None]
            level += grad
        along += grad * (x * rstd[:, None])
    tl.store(projection_ptr + rows, tl.sum(along, axis=1) / D, mask=live)
    if NORM == 1:
        tl.store(projection_ptr + n + rows, tl.sum(level, axis=1) / D, mask=live)


@triton.jit(do_not_specialize=VARYING)
def embed_bwd_kernel(
    grad_rows_ptr, partial_ptr, projection_ptr, grad_ptr, mean_ptr, rstd_ptr, ids_ptr, weight_ptr, token_rows,
    position_ids_ptr, position_weight_ptr, position_rows, position_start, position_period, type_ids_ptr,
    type_weight_ptr, type_rows, type_period, extra_ptr, extra_period, factor, packed_ptr, places, n, norm_weight_ptr,
    seed_ptr, p, scale, mask_ptr, mask_period, row_scale, D: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, GIVEN: tl.constexpr, SCALE: tl.constexpr, POSITION: tl.constexpr, TYPE: tl.constexpr,
    SINUSOIDS: tl.constexpr, PACKED: tl.constexpr, EXTRA: tl.constexpr, NORM: tl.constexpr, WEIGHT: tl.constexpr,
    DROPOUT: tl.constexpr, MASK: tl.constexpr, WIDE: tl.constexpr, NEED_ROWS: tl.constexpr, NEED_NORM: tl.constexpr,
):  # fmt: skip
    """Gradient of the summed rows times row_scale, and this program's part of those of the norm's weight and bias.

    With x-hat = (x - mean)·rstd and g = grad·weight: dx = rstd·(g - x-hat·mean(g·x-hat) - mean(g)), and over the
    rows dweight = Σ grad·x-hat, dbias = Σ grad. In an RMSNorm there is no mean, and no mean(g) either.
    """
    sources = (ids_ptr, weight_ptr, token_rows, position_ids_ptr, position_weight_ptr, position_rows, position_start,
               position_period, type_ids_ptr, type_weight_ptr, type_rows, type_period, extra_ptr, extra_period,
               factor, packed_ptr, places)  # fmt: skip
    weight_sum = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    bias_sum = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    for start in range(tl.program_id(0) * BLOCK_N, n, tl.num_programs(0) * BLOCK_N):
        rows = start + tl.arange(0, BLOCK_N)
        live = rows < n
        # The shift gives 0, as rows are numbered below 2^31. Not knowing that, the compiler works addresses out again
        # instead of keeping one for each table in registers through the loop.
        first = (tl.program_id(1) + (start >> 31)) * BLOCK_D
        columns = first + tl.arange(0, BLOCK_D)
        inside = columns < D
        # x-hat before the gradient: together they would need more registers. Beyond the last row or column x-hat is
        # arbitrary, but grad is zero there and multiplies it everywhere.
        if NORM:
            x = _norm_input(rows, live, first, columns, sources, (), seed_ptr, p, scale, D, BLOCK_D, GIVEN, SCALE,
                            POSITION, TYPE, SINUSOIDS, PACKED, EXTRA, DROPOUT, False)  # fmt: skip
            if NORM == 1:
                mean = tl.load(mean_ptr + rows, mask=live, other=0.0)
                x -= mean[:, None]
            rstd = tl.load(rstd_ptr + rows, mask=live, other=0.0)
            x_hat = x * rstd[:, None]
        grad = _upstream(grad_ptr, seed_ptr, rows, live, first, columns, p, scale, mask_ptr, mask_period, D, BLOCK_D,
                         DROPOUT, MASK)  # fmt: skip
        if NORM:
            if NEED_NORM:
                weight_sum += grad * x_hat
                bias_sum += grad
            if NEED_ROWS:
                if WEIGHT:
                    grad *= _every_row(norm_weight_ptr, columns, D, BLOCK_N)
                if WIDE:
                    along = tl.load(projection_ptr + rows, mask=live, other=0.0)
                    if NORM == 1:
                        level = tl.load(projection_ptr + n + rows, mask=live, other=0.0)
                else:
                    along = tl.sum(grad * x_hat, axis=1) / D
                    if NORM == 1:
                        level = tl.sum(grad, axis=1) / D
                grad -= x_hat * along[:, None]
                if NORM == 1:
                    grad -= level[:, None]
                grad *= rstd[:, None]
        if NEED_ROWS:
            if DROPOUT == 2:
                # Read anew, so that the mask is drawn anew and not kept in registers since it was applied to x.
                seed = tl.load(seed_ptr, volatile=True)
                grad = tl.where(row_keep_mask(seed, rows, first, p, BLOCK_D), grad * scale, 0.0)
            if SCALE:
                grad *= row_scale
            at = grad_rows_ptr + rows[:, None].to(tl.int64) * D + columns[None, :]
            tl.store(at, grad.to(grad_rows_ptr.dtype.element_ty), mask=live[:, None] & inside[None, :])
    if NEED_NORM:
        columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        inside = columns < D
        at = partial_ptr + tl.program_id(0).to(tl.int64) * (2 * D) + columns
        tl.store(at, tl.sum(weight_sum, axis=0), mask=inside)
        tl.store(at + D, tl.sum(bias_sum, axis=0), mask=inside)


@triton.jit(do_not_specialize=["programs"])
def embed_bwd_reduce_kernel(
    norm_weight_grad_ptr, norm_bias_grad_ptr, partial_ptr, programs, D: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """Sum of the programs' partial rows (programs, 2, D) in a fixed order; grid (D / BLOCK_D, 2)."""
    columns = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = columns < D
    which = tl.program_id(1)
    total = tl.zeros((BLOCK_P, BLOCK_D), dtype=tl.float32)
    for start in range(0, programs, BLOCK_P):
        part = start + tl.arange(0, BLOCK_P)
        at = partial_ptr + part[:, None].to(tl.int64) * (2 * D) + which * D + columns[None, :]
        total += tl.load(at, mask=(part < programs)[:, None] & inside[None, :], other=0.0)
    grad = tl.sum(total, axis=0)
    # Branches, not a mask: Triton 3.9 interprets no vector & scalar as a mask.
    if WEIGHT:
        if which == 0:
            at = norm_weight_grad_ptr + columns
            tl.store(at, grad.to(norm_weight_grad_ptr.dtype.element_ty), mask=inside)
    if BIAS:
        if which == 1:
            at = norm_bias_grad_ptr + columns
            tl.store(at, grad.to(norm_bias_grad_ptr.dtype.element_ty), mask=inside)


_launch_stats, _launch_fwd, _launch_projection, _launch_bwd, _launch_bwd_reduce = (
    Launcher(kernel)
    for kernel in (
        embed_stats_kernel, embed_fwd_kernel, embed_projection_kernel, embed_bwd_kernel, embed_bwd_reduce_kernel,
    )
)  # fmt: skip


_keep_scale = functools.cache(keep_scale)


@dataclass(frozen=True)
class Tile:
    """How rows are cut: rows and columns of a tile, warps, and whether a row takes several tiles."""

    block_n: int
    block_d: int
    num_warps: int
    chunks: int


@functools.cache
def tile(width: int, itemsize: int, norm: bool, backward: bool, heavy: bool = False, sinusoids: bool = False) -> Tile:
    """The tile of a row width.

    Forward: 32 bytes of a row per thread. Backward: 16, since two running sums stay in registers beside the row. At
    most 512 threads: with more, a thread has too few registers for what the widest rows leave it to hold. Backward of
    a norm: up to 8 rows and 512 threads, since every program leaves a partial row.

    Args:
        heavy: see :meth:`Inputs.tile`. 16 bytes of a row per thread, and several rows only where they are narrow.
        sinusoids: where a thread's columns are of narrow rows, the backward of a norm has registers for only 4.
    """
    block = max(16, triton.next_power_of_2(width))
    if block > (WIDEST if norm else CHUNK):
        return Tile(1 if norm or backward else 2, CHUNK, 4, blocks(width, CHUNK))
    per_warp = 32 * (16 if backward or heavy else 32) // itemsize
    if sinusoids and norm and backward and block < 2 * per_warp:
        per_warp = 32 * 4
    if backward and norm and not heavy:
        warps = 4
        while warps < 16 and warps * per_warp < 8 * block:
            warps *= 2
    else:
        fewest = 2 if backward or heavy else 4
        warps = 4 if block < fewest * per_warp else min(16, block // per_warp)
    return Tile(max(1, warps * per_warp // block), block, warps, 1)


def partial_rows(n: int, itemsize: int, t: Tile, multiprocessors: int) -> int:
    """How many programs share the backward of n rows of a norm, each leaving a partial row."""
    most = max(1, multiprocessors * WARPS_PER_SM // (t.num_warps * t.chunks))
    # A partial row has two sums of 4 bytes for each column, written and read.
    light = max(multiprocessors // t.chunks, 2 * n * itemsize // (16 * PARTIAL_SHARE), 1)
    return min(most, light, blocks(blocks(n, t.block_n), TILES_PER_PROGRAM))


class Inputs(NamedTuple):
    """What both kernels read beside the gradient. Tensors are contiguous.

    Attributes:
        ids: N elements; None where ``weight`` holds the rows themselves.
        weight: (V, D), or (N, D) without ids.
        scale: factor of the rows of ``weight``.
        position_weight: (rows, D) or None.
        sinusoids: a layout of fixed positions in the place of a table, or ``"none"``.
        zero_position: with sinusoids, the position whose row is zeros; -1 for none.
        position_ids: of N or S elements, None for position_start + s.
        length: S.
        type_weight: (rows, D) or None; type_ids of N or S elements, None for type 0.
        extra: (N or S, D) or None.
        mask: N or S elements, floating point or uint8, or None.
        packed: int32 or int64 (M,), the places among the N of the rows to make, or None for all.
        norm: ``"none"``, ``"layer"`` or ``"rms"``.
        dropout_p, dropout_first, seed: dropout and whether it comes before the norm; its seed.
        memo: what launches found out before for inputs of the same shapes, dtypes, device and settings, or None.
    """

    ids: Tensor | None
    weight: Tensor
    scale: float
    position_weight: Tensor | None
    sinusoids: str
    zero_position: int
    position_ids: Tensor | None
    position_start: int
    length: int
    type_weight: Tensor | None
    type_ids: Tensor | None
    extra: Tensor | None
    mask: Tensor | None
    packed: Tensor | None
    norm: str
    dropout_p: float
    dropout_first: bool
    seed: Tensor | None
    memo: dict[Any, Any] | None = None

    def sources(self) -> tuple[Any, ...]:
        """The kernels' arguments from ``ids_ptr`` to ``places``; ``weight`` stands in for what is not there."""
        ids, weight, position_weight, position_ids = self.ids, self.weight, self.position_weight, self.position_ids
        type_weight, type_ids, extra, packed = self.type_weight, self.type_ids, self.extra, self.packed
        token_rows = len(weight)
        position_rows = 0
        if position_weight is not None:
            position_rows = len(position_weight)
        elif self.sinusoids == "none":
            position_weight = weight
        else:
            position_weight = constants(weight.shape[1], self.sinusoids, weight.device)
            position_rows = self.zero_position
        return (
            weight if ids is None else ids, weight, token_rows,
            weight if position_ids is None else position_ids, position_weight, position_rows, self.position_start,
            self.length if position_ids is None else position_ids.numel(),
            weight if type_ids is None else type_ids, weight if type_weight is None else type_weight,
            token_rows if type_weight is None else len(type_weight), 1 if type_ids is None else type_ids.numel(),
            weight if extra is None else extra, token_rows if extra is None else len(extra), self.scale,
            weight if packed is None else packed, token_rows if ids is None else ids.numel(),
        )  # fmt: skip

    def dropout(self) -> tuple[Any, ...]:
        """The kernels' arguments ``seed_ptr``, ``p`` and ``scale``."""
        return self.weight if self.seed is None else self.seed, self.dropout_p, _keep_scale(self.dropout_p)

    def masked(self) -> tuple[Any, ...]:
        """The kernels' arguments ``mask_ptr`` and ``mask_period``."""
        return (self.weight, 1) if self.mask is None else (self.mask, self.mask.numel())

    def tile(self, backward: bool) -> Tile:
        """That of the forward or the backward kernel. Heavy is what needs more registers than BERT's sum does."""
        sinusoids = self.sinusoids != "none"
        heavy = sinusoids or self.dropout_first or self.extra is not None or self.packed is not None
        weight = self.weight
        return tile(weight.shape[1], weight.itemsize, self.norm != "none", backward, heavy, sinusoids)

    def known(self, what: Any, t: Tile) -> Any:
        """What was remembered with the same tile, or None."""
        found = None if self.memo is None else self.memo.get(what)
        return found[1] if found is not None and found[0] is t else None

    def remember(self, what: Any, t: Tile, found: Any) -> None:
        """For :meth:`known`."""
        if self.memo is not None:
            self.memo[what] = t, found

    def flags(self, width: int) -> dict[str, Any]:
        """The constexprs that every kernel but the last has."""
        sinusoids = self.sinusoids
        return {
            "D": width,
            "GIVEN": self.ids is None,
            "SCALE": self.scale != 1.0,
            "POSITION": (
                0 if self.position_weight is None and sinusoids == "none" else 1 if self.position_ids is None else 2
            ),
            "SINUSOIDS": 0 if sinusoids == "none" else 2 if sinusoids == "fairseq" else 1,
            "TYPE": 0 if self.type_weight is None else 1 if self.type_ids is None else 2,
            "EXTRA": self.extra is not None,
            "PACKED": self.packed is not None,
            "NORM": NORMS.index(self.norm),
            "DROPOUT": 0 if self.dropout_p == 0.0 else 2 if self.dropout_first else 1,
            "MASK": self.mask is not None,
        }


def embed_forward(
    inputs: Inputs, out: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None, eps: float,
    errors: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Fill ``out`` (N, D); returns the rows' mean and rstd, fp32 (N), each empty where the norm has none."""
    width = inputs.weight.shape[1]
    n = out.numel() // width
    norm = inputs.norm != "none"
    t = inputs.tile(False)
    mean = torch.empty(n if inputs.norm == "layer" else 0, dtype=torch.float32, device=out.device)
    rstd = torch.empty(n if norm else 0, dtype=torch.float32, device=out.device)
    grid = (blocks(n, t.block_n), t.chunks)
    sources, dropout = inputs.sources(), inputs.dropout()
    arguments = (
        out, mean, rstd, *sources, n,
        inputs.weight if norm_weight is None else norm_weight, inputs.weight if norm_bias is None else norm_bias,
        eps, *dropout, *inputs.masked(), *errors,
    )  # fmt: skip
    known = inputs.known("forward", t)
    if known is None:
        constexprs = {
            **inputs.flags(width), "BLOCK_N": t.block_n, "BLOCK_D": t.block_d, "WEIGHT": norm_weight is not None,
            "BIAS": norm_bias is not None, "WIDE": t.chunks > 1,
        }  # fmt: skip
        known = constexprs, _launch_fwd.find(arguments, constexprs, num_warps=t.num_warps, num_stages=1)
        inputs.remember("forward", t, known)
    constexprs, launch = known
    if norm and t.chunks > 1:
        _launch_stats(
            grid[:1], (mean, rstd, *sources, n, eps, *dropout), constexprs, num_warps=t.num_warps, num_stages=1
        )
    launch(grid, arguments)
    return mean, rstd


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    # Interpreted, a few programs are enough to have partial rows to add.
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def embed_backward(
    inputs: Inputs, grad: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None, mean: Tensor, rstd: Tensor,
    row_scale: float, need_rows: bool, need_norm: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of the summed rows (N, D) in the tables' dtype and of the norm's weight and bias in their own.

    ``grad`` is (N, D), contiguous. The rows' gradients are multiplied by ``row_scale``, which is 1 unless
    ``inputs.scale`` is not. What is not needed or not there comes back empty.
    """
    width = inputs.weight.shape[1]
    n = grad.numel() // width
    device = grad.device
    norm = inputs.norm != "none"
    t = inputs.tile(True)
    tiles = blocks(n, t.block_n)
    programs = partial_rows(n, inputs.weight.itemsize, t, _multiprocessors(device)) if need_norm else tiles
    grad_rows = inputs.weight.new_empty((n if need_rows else 0, width))
    # What a variant does not use is some memory of the same type.
    partial = projection = mean
    if need_norm:
        partial = torch.empty((programs, 2, width), dtype=torch.float32, device=device)
    projected = norm and need_rows and t.chunks > 1
    if projected:
        projection = torch.empty((2, n), dtype=torch.float32, device=device)
    shared = (
        grad, mean, rstd, *inputs.sources(), n, inputs.weight if norm_weight is None else norm_weight,
        *inputs.dropout(), *inputs.masked(),
    )  # fmt: skip
    arguments = (grad_rows, partial, projection, *shared, row_scale)
    constexprs = inputs.known((need_rows, need_norm), t)
    if constexprs is None:
        constexprs = {
            **inputs.flags(width), "BLOCK_N": t.block_n, "BLOCK_D": t.block_d, "WEIGHT": norm_weight is not None,
            "WIDE": t.chunks > 1, "NEED_ROWS": need_rows, "NEED_NORM": need_norm,
        }  # fmt: skip
        inputs.remember((need_rows, need_norm), t, constexprs)
    if projected:
        _launch_projection((tiles,), (projection, *shared), constexprs, num_warps=t.num_warps, num_stages=1)
    _launch_bwd((programs, t.chunks), arguments, constexprs, num_warps=t.num_warps, num_stages=1)
    weight_grad, bias_grad = [
        p.new_empty(p.shape) if need_norm and p is not None else inputs.weight.new_empty(0)
        for p in (norm_weight, norm_bias)
    ]
    if need_norm:
        _launch_bwd_reduce(
            (blocks(width, REDUCE_COLUMNS), 2), (weight_grad, bias_grad, partial, programs),
            {
                "D": width, "BLOCK_P": REDUCE_ROWS, "BLOCK_D": REDUCE_COLUMNS, "WEIGHT": norm_weight is not None,
                "BIAS": norm_bias is not None,
            },
            num_warps=4,
        )  # fmt: skip
    return grad_rows, weight_grad, bias_grad

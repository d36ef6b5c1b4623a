"""Attention, forward: out = dropout(softmax(scale · q kᵀ)) v over the keys that count.

``attention_fwd_kernel`` runs one program per (BLOCK_M queries, head, batch row), in one dimension. It visits the key
blocks once with a running maximum and sum (Milakov and Gimelshein, 2018; Dao, FlashAttention, 2022): first those that
are visible as a whole, without any mask, then those that a length, a hole or the diagonal cuts. Blocks outside the
batch row's bounds are never visited. Scores are held in base 2, where an exponential is one instruction; everything
but the operands of the two products is fp32.

Bound, per (batch row, head), with P visible pairs: 4·P·D FLOPs, and at least (2·Sq + 2·Sk·Hkv/H)·D·e bytes for
elements of e bytes. At Sq = Sk = S, no mask and bf16 that is S/2 FLOPs per byte: above S = 590 (989 TFLOP/s over
3.35 TB/s on an H100) the tensor cores bound it, below that memory and, in practice, the launch. Beside the products
a pair costs one exponential: at D = 64 the exponential units are busy as long as the tensor cores. Dropout adds a
quarter of a Philox call to each pair, some 12 integer instructions, which is more than that.

Saved for the backward: ``lse`` (B, H, Sq) fp32, the base-2 logarithm of the sum of exponentials, +inf for a query
without keys.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from embedkernels.kernels.attention_blocks import (
    key_block_ranges,
    load_bounds,
    load_key_block,
    load_limits,
    product,
    row_offset,
    split_program,
    tile_keep_mask,
    tile_offsets,
    visible_pairs,
    with_columns,
)
from embedkernels.kernels.attention_ranges import ranges_stride
from embedkernels.kernels.attention_specs import every, listed
from embedkernels.kernels.attention_tiles import block_d, tiles_for
from embedkernels.kernels.launch import Launcher, blocks
from embedkernels.kernels.random import keep_scale, rounded
from embedkernels.kernels.specs import CompileSpec

LOG2_E = 1.4426950408889634


@triton.jit
def _attend(state, q, n0, m0, keys, limits, scale_log2, dropout,
            D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
            CAUSAL: tl.constexpr, WINDOW: tl.constexpr, RANGES: tl.constexpr, HAS_MASK: tl.constexpr,
            DROPOUT: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    """``state`` (weighted sum of v, sum of exponentials, highest score) after the keys of the block at n0."""
    acc, total, highest = state
    k, v, valid = load_key_block(n0, keys, D, BLOCK_D, BLOCK_N, HAS_MASK, MASKED)
    s = product(q, tl.trans(k))
    if MASKED:
        visible = visible_pairs(valid, m0, n0, limits, BLOCK_M, BLOCK_N, CAUSAL, WINDOW, RANGES)
        s = tl.where(visible, s, float("-inf"))
    # One fused multiply-add per score: scaling first would round scores in the hundreds.
    new_highest = tl.maximum(highest, tl.max(s, 1) * scale_log2)
    pivot = new_highest
    if MASKED:
        # A row that has seen no key yet: exp2(-inf - -inf) would be NaN.
        pivot = tl.where(new_highest == float("-inf"), 0.0, new_highest)
    p = tl.exp2(s * scale_log2 - pivot[:, None])
    alpha = tl.exp2(highest - pivot)
    total = total * alpha + tl.sum(p, 1)
    if DROPOUT:
        seed, row, dropout_p = dropout
        p = tl.where(tile_keep_mask(seed, m0, n0, row, dropout_p, BLOCK_M, BLOCK_N, KEYS_FIRST=False), p, 0.0)
    acc = product(p.to(v.dtype), v, acc * alpha[:, None])
    return acc, total, new_highest


@triton.jit(do_not_specialize=["ranges_stride_b", "Sq", "Sk", "query_offset", "window_offset"])
def attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, bounds_ptr, mask_ptr, ranges_ptr, seed_ptr,
    q_stride_b, q_stride_h, q_stride_s,
    k_stride_b, k_stride_h, k_stride_s,
    v_stride_b, v_stride_h, v_stride_s,
    out_stride_b, out_stride_h, out_stride_s,
    mask_stride_b, ranges_stride_b,
    H, Sq, Sk, query_offset, window_offset, scale_log2, dropout_p, keep_scale,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, RANGES: tl.constexpr, HAS_BOUNDS: tl.constexpr,
    HAS_MASK: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    n_blocks = tl.cdiv(Sq, BLOCK_M)
    block, b, h = split_program(n_blocks, H)
    if CAUSAL:
        block = n_blocks - 1 - block  # the longest rows first
    m0 = block * BLOCK_M
    row = b * H + h
    row_ok = m0 + tl.arange(0, BLOCK_M) < Sq
    ok = with_columns(row_ok, D, BLOCK_D)
    q_tile = q_ptr + row_offset(b, h, m0, (q_stride_b, q_stride_h, q_stride_s))
    q = tl.load(q_tile + tile_offsets(q_stride_s, BLOCK_M, BLOCK_D), mask=ok, other=0.0)
    seed = 0
    if DROPOUT:
        seed = tl.load(seed_ptr)
    dropout = (seed, row, dropout_p)

    start, end, holes = load_bounds(bounds_ptr, b, Sk, HAS_BOUNDS)
    limits, edges = load_limits(
        ranges_ptr, b, ranges_stride_b, m0, Sq, Sk, query_offset, window_offset, BLOCK_M, RANGES
    )
    first, lead, full_first, full_last, masked = key_block_ranges(
        start, end, holes, m0, Sq, limits, edges, BLOCK_M, BLOCK_N, CAUSAL, WINDOW, RANGES
    )
    keys = (
        k_ptr + b.to(tl.int64) * k_stride_b + (h // GROUP).to(tl.int64) * k_stride_h,
        v_ptr + b.to(tl.int64) * v_stride_b + (h // GROUP).to(tl.int64) * v_stride_h,
        k_stride_s, v_stride_s, mask_ptr + b.to(tl.int64) * mask_stride_b, start, end,
    )  # fmt: skip
    state = (
        tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32),
        tl.zeros([BLOCK_M], dtype=tl.float32),
        tl.full([BLOCK_M], float("-inf"), dtype=tl.float32),
    )
    for i in range(full_first, full_last):
        state = _attend(state, q, i * BLOCK_N, m0, keys, limits, scale_log2, dropout, D, BLOCK_D, BLOCK_M, BLOCK_N,
                        CAUSAL, WINDOW, RANGES, HAS_MASK, DROPOUT, MASKED=False)  # fmt: skip
    for i in range(masked):
        n0 = tl.where(i < lead, first + i, full_last + i - lead) * BLOCK_N
        state = _attend(state, q, n0, m0, keys, limits, scale_log2, dropout, D, BLOCK_D, BLOCK_M, BLOCK_N,
                        CAUSAL, WINDOW, RANGES, HAS_MASK, DROPOUT, MASKED=True)  # fmt: skip

    acc, total, highest = state
    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    out = acc * (keep_scale / total)[:, None]
    # +inf where there was nothing to attend to: the backward's exp2(s - lse) is then 0.
    lse = tl.where(empty, float("inf"), highest + tl.log2(total))
    out_tile = out_ptr + row_offset(b, h, m0, (out_stride_b, out_stride_h, out_stride_s))
    tl.store(out_tile + tile_offsets(out_stride_s, BLOCK_M, BLOCK_D), out.to(out_ptr.dtype.element_ty), mask=ok)
    tl.store(lse_ptr + tl.cast(row, tl.int64) * Sq + m0 + tl.arange(0, BLOCK_M), lse, mask=row_ok)


_launch = Launcher(attention_fwd_kernel)


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: Tensor | None,
    key_mask: Tensor | None,
    ranges: Tensor | None,
    seed: Tensor | None,
    out: Tensor,
    lse: Tensor,
    *,
    scale: float,
    is_causal: bool,
    query_offset: int,
    window_offset: int | None,
    dropout_p: float,
) -> None:
    """Launch: fills ``out`` and ``lse``. Inputs as the op has checked them: unit last stride, near rows."""
    batch, heads, num_queries, head_size = query.shape
    heads_kv, num_keys = key.shape[1], key.shape[2]
    if query.numel() == 0:
        return
    dropout_p = rounded(dropout_p)
    tile = tiles_for(query, dropout_p > 0).forward
    arguments = (
        query, key, value, out, lse,
        # Pointers that a variant does not use still need a value.
        lse if bounds is None else bounds,
        lse if key_mask is None else key_mask.view(torch.uint8),
        lse if ranges is None else ranges,
        lse if seed is None else seed,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *out.stride()[:3],
        0 if key_mask is None else key_mask.stride(0), ranges_stride(ranges),
        heads, num_queries, num_keys, query_offset, 0 if window_offset is None else window_offset, scale * LOG2_E,
        dropout_p, keep_scale(dropout_p),
    )  # fmt: skip
    constexprs = {
        "GROUP": heads // heads_kv, "D": head_size, "BLOCK_D": block_d(head_size), "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n, "CAUSAL": is_causal, "WINDOW": window_offset is not None,
        "RANGES": ranges is not None, "HAS_BOUNDS": bounds is not None, "HAS_MASK": key_mask is not None,
        "DROPOUT": dropout_p > 0,
    }  # fmt: skip
    grid = (blocks(num_queries, tile.block_m) * heads * batch,)
    _launch(grid, arguments, constexprs, **tile.options())


def compile_specs() -> list[CompileSpec]:
    """The variants that stand for all."""
    return listed(attention_fwd_kernel, "forward")


def every_variant() -> list[CompileSpec]:
    """All variants that can be launched."""
    return every(attention_fwd_kernel, "forward")

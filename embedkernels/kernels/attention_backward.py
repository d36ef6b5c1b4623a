"""Attention, backward: dq, dk and dv from q, k, v, out, its gradient and the forward's lse.

With P the probabilities, dP = dropout(grad · vᵀ) and delta = rowsum(grad · out): dv = dropout(P)ᵀ grad,
dS = P · (dP - delta), dq = scale · dS k, dk = scale · dSᵀ q (Dao, FlashAttention-2, 2023). Three launches:

- ``attention_bwd_preprocess_kernel``, one program per 32 queries: (lse, delta) pairs, padded to whole blocks.
- ``attention_bwd_dkdv_kernel``, one program per (BLOCK_N keys, key head, batch row): walks the query blocks of every
  query head of its group, in order. It computes Sᵀ = k qᵀ, so that Pᵀ and dSᵀ enter the next product as they are:
  the transpose of a product is never an operand.
- ``attention_bwd_dq_kernel``, one program per (BLOCK_M queries, head, batch row): walks the key blocks as the
  forward does.

No atomics and a fixed order of every sum: two runs give the same bits. The price is that S and dP are computed twice,
7 products in place of 5: 14·P·D FLOPs per (batch row, head) with P visible pairs, against at least
(8·Sq + 8·Sk·Hkv/H)·D·e bytes for elements of e bytes. At Sq = Sk = S, no mask and bf16: 0.44·S FLOPs per byte.

delta is taken from out as it was stored, as in PyTorch's fused kernels. Where a softmax is all but one-hot,
dP - delta cancels, and the rounding of a 16-bit out shows in dq and dk as it does in theirs.

Dropout's scale 1/(1-p) is left to the ends: dP stays unscaled, delta is multiplied by 1-p, and dq, dk and dv are
scaled once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from embedkernels.kernels.attention_blocks import (
    ROW_PADDING,
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
from embedkernels.kernels.attention_forward import LOG2_E
from embedkernels.kernels.attention_ranges import ranges_stride
from embedkernels.kernels.attention_specs import every, listed
from embedkernels.kernels.attention_tiles import block_d, tiles_for
from embedkernels.kernels.launch import Launcher, blocks
from embedkernels.kernels.random import keep_scale, rounded
from embedkernels.kernels.specs import CompileSpec

PREPROCESS_BLOCK_M = 32  # divides ROW_PADDING


@triton.jit(do_not_specialize=["Sq"])
def attention_bwd_preprocess_kernel(
    out_ptr, grad_ptr, lse_ptr, rows_ptr,
    out_stride_b, out_stride_h, out_stride_s,
    grad_stride_b, grad_stride_h, grad_stride_s,
    H, Sq, keep_probability,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    padded = tl.cdiv(Sq, ROW_PADDING) * ROW_PADDING
    block, b, h = split_program(padded // BLOCK_M, H)
    m0 = block * BLOCK_M
    m = m0 + tl.arange(0, BLOCK_M)
    ok = with_columns(m < Sq, D, BLOCK_D)
    out_tile = out_ptr + row_offset(b, h, m0, (out_stride_b, out_stride_h, out_stride_s))
    grad_tile = grad_ptr + row_offset(b, h, m0, (grad_stride_b, grad_stride_h, grad_stride_s))
    out = tl.load(out_tile + tile_offsets(out_stride_s, BLOCK_M, BLOCK_D), mask=ok, other=0.0)
    grad = tl.load(grad_tile + tile_offsets(grad_stride_s, BLOCK_M, BLOCK_D), mask=ok, other=0.0)
    delta = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1) * keep_probability
    row = (b * H + h).to(tl.int64)
    lse = tl.load(lse_ptr + row * Sq + m, mask=m < Sq, other=float("inf"))
    pairs = rows_ptr + (row * padded + m) * 2
    tl.store(pairs, lse)
    tl.store(pairs + 1, delta)


@triton.jit
def _load_rows(rows_ptr, row, Sq, m0, BLOCK_M: tl.constexpr):
    """(lse, delta) of the queries [m0, m0 + BLOCK_M) of a head, (BLOCK_M,) each."""
    padded = tl.cdiv(Sq, ROW_PADDING) * ROW_PADDING
    pairs = tl.arange(0, BLOCK_M)[:, None] * 2 + tl.arange(0, 2)[None, :]
    return tl.split(tl.load(rows_ptr + (tl.cast(row, tl.int64) * padded + m0) * 2 + pairs))


@triton.jit
def _collect(state, k, v, i, m_first, span, lead, skip, n0, h0, row0, queries, limits, scale_log2, dropout,
             GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
             BLOCK_N: tl.constexpr, DROPOUT: tl.constexpr, DIAGONAL: tl.constexpr, WINDOW: tl.constexpr,
             RANGES: tl.constexpr):  # fmt: skip
    """``state`` (dk, dv) after query block i of the loop over the group's heads, ``span`` blocks of each.

    With RANGES, the first ``lead`` blocks of a head and those that follow are ``skip`` blocks apart.
    """
    dk, dv = state
    q_ptr, grad_ptr, rows_ptr, q_stride_h, q_stride_s, grad_stride_h, grad_stride_s, Sq = queries
    g = 0
    if GROUP > 1:
        # The pipeline prepares the first round of a loop that may have none: never divide by 0.
        g = i // tl.maximum(span, 1)
    m_block = i - g * span
    if RANGES:
        m_block += tl.where(m_block < lead, 0, skip)
    m0 = (m_first + m_block) * BLOCK_M
    m64 = tl.cast(m0, tl.int64)
    h64 = tl.cast(h0 + g, tl.int64)
    ok = with_columns(m0 + tl.arange(0, BLOCK_M) < Sq, D, BLOCK_D)
    q_tile = q_ptr + h64 * q_stride_h + m64 * q_stride_s
    grad_tile = grad_ptr + h64 * grad_stride_h + m64 * grad_stride_s
    q = tl.load(q_tile + tile_offsets(q_stride_s, BLOCK_M, BLOCK_D), mask=ok, other=0.0)
    grad = tl.load(grad_tile + tile_offsets(grad_stride_s, BLOCK_M, BLOCK_D), mask=ok, other=0.0)
    lse, delta = _load_rows(rows_ptr, row0 + g, Sq, m0, BLOCK_M)
    p = tl.exp2(product(k, tl.trans(q)) * scale_log2 - lse[None, :])
    if DIAGONAL:
        first_query = tl.arange(0, BLOCK_N) + (n0 - limits[1] - m0)
        p = tl.where(first_query[:, None] <= tl.arange(0, BLOCK_M)[None, :], p, 0.0)
    if WINDOW:
        last_query = tl.arange(0, BLOCK_N) + (n0 - limits[0] - m0)
        p = tl.where(last_query[:, None] >= tl.arange(0, BLOCK_M)[None, :], p, 0.0)
    if RANGES:
        m = tl.arange(0, BLOCK_M)[None, :]
        p = tl.where((m >= limits[0][:, None] - m0) & (m < limits[1][:, None] - m0), p, 0.0)
    dp = product(v, tl.trans(grad))
    dropped = p
    if DROPOUT:
        seed, dropout_p = dropout
        keep = tile_keep_mask(seed, m0, n0, row0 + g, dropout_p, BLOCK_N, BLOCK_M, KEYS_FIRST=True)
        dropped = tl.where(keep, p, 0.0)
        dp = tl.where(keep, dp, 0.0)
    dv = product(dropped.to(grad.dtype), grad, dv)
    ds = p * (dp - delta[None, :])
    dk = product(ds.to(q.dtype), q, dk)
    return dk, dv


@triton.jit(do_not_specialize=["ranges_stride_b", "Sq", "Sk", "query_offset", "window_offset"])
def attention_bwd_dkdv_kernel(
    q_ptr, k_ptr, v_ptr, grad_ptr, rows_ptr, dk_ptr, dv_ptr, bounds_ptr, mask_ptr, ranges_ptr, seed_ptr,
    q_stride_b, q_stride_h, q_stride_s,
    k_stride_b, k_stride_h, k_stride_s,
    v_stride_b, v_stride_h, v_stride_s,
    grad_stride_b, grad_stride_h, grad_stride_s,
    dk_stride_b, dk_stride_h, dk_stride_s,
    dv_stride_b, dv_stride_h, dv_stride_s,
    mask_stride_b, ranges_stride_b,
    H_kv, Sq, Sk, query_offset, window_offset, scale_log2, dk_scale, dv_scale, dropout_p,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, RANGES: tl.constexpr, HAS_BOUNDS: tl.constexpr,
    HAS_MASK: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    block, b, h_kv = split_program(tl.cdiv(Sk, BLOCK_N), H_kv)
    n0 = block * BLOCK_N
    n = n0 + tl.arange(0, BLOCK_N)
    start, end, _ = load_bounds(bounds_ptr, b, Sk, HAS_BOUNDS)
    keys = (
        k_ptr + row_offset(b, h_kv, 0, (k_stride_b, k_stride_h, k_stride_s)),
        v_ptr + row_offset(b, h_kv, 0, (v_stride_b, v_stride_h, v_stride_s)),
        k_stride_s, v_stride_s, mask_ptr + b.to(tl.int64) * mask_stride_b, start, end,
    )  # fmt: skip
    k, v, valid = load_key_block(n0, keys, D, BLOCK_D, BLOCK_N, HAS_MASK, MASKED=True)
    seed = 0
    if DROPOUT:
        seed = tl.load(seed_ptr)
    dropout = (seed, dropout_p)

    # Query blocks: [m_first, m_full) holds the diagonal, [m_full, m_blocks) sees the whole key block. With a window
    # all of them, up to the last that sees a key of the block, are taken for cut.
    m_blocks = tl.cdiv(Sq, BLOCK_M)
    m_first = 0
    m_full = 0
    if CAUSAL:
        m_first = tl.minimum(tl.maximum(n0 - query_offset, 0) // BLOCK_M, m_blocks)
        m_full = tl.minimum(tl.cdiv(tl.maximum(n0 + BLOCK_N - 1 - query_offset, 0), BLOCK_M), m_blocks)
    if WINDOW:
        m_blocks = tl.minimum(tl.cdiv(tl.maximum(n0 + BLOCK_N - window_offset, 0), BLOCK_M), m_blocks)
        m_first = tl.minimum(m_first, m_blocks)
        m_full = m_blocks
    limits = (window_offset, query_offset)
    lead = 0
    skip = 0
    if RANGES:
        # [m_first, m_first + lead) and [m_first + lead + skip, m_blocks) are cut; those between see the whole block.
        firsts = ranges_ptr + b.to(tl.int64) * ranges_stride_b + Sq
        ends = firsts + Sq + Sk
        last = tl.minimum(n0 + BLOCK_N, Sk) - 1
        limits = (tl.load(firsts + n, mask=n < Sk, other=0), tl.load(ends + n, mask=n < Sk, other=0))
        m_first = tl.load(firsts + n0) // BLOCK_M
        m_blocks = tl.maximum(tl.cdiv(tl.load(ends + last), BLOCK_M), m_first)
        lead = tl.maximum(tl.minimum(tl.cdiv(tl.load(firsts + last), BLOCK_M), m_blocks) - m_first, 0)
        skip = tl.maximum(tl.load(ends + n0) // BLOCK_M - m_first - lead, 0)
    if (n0 >= end) | (n0 + BLOCK_N <= start):
        m_first = m_blocks
        m_full = m_blocks
        lead = 0
        skip = 0
    queries = (
        q_ptr + b.to(tl.int64) * q_stride_b, grad_ptr + b.to(tl.int64) * grad_stride_b, rows_ptr,
        q_stride_h, q_stride_s, grad_stride_h, grad_stride_s, Sq,
    )  # fmt: skip
    h0 = h_kv * GROUP
    row0 = (b * H_kv + h_kv) * GROUP
    state = (tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32), tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32))
    # One loop over (head of the group, query block): nested loops would cost some 30 registers.
    if CAUSAL or WINDOW or RANGES:
        span = m_full - m_first
        if RANGES:
            span = m_blocks - m_first - skip
            m_full = m_first + lead
        for i in range(GROUP * span):
            state = _collect(state, k, v, i, m_first, span, lead, skip, n0, h0, row0, queries, limits, scale_log2,
                             dropout, GROUP, D, BLOCK_D, BLOCK_M, BLOCK_N, DROPOUT, CAUSAL, WINDOW,
                             RANGES)  # fmt: skip
    if not WINDOW:
        span = m_blocks - m_full
        if RANGES:
            span = skip
        for i in range(GROUP * span):
            state = _collect(state, k, v, i, m_full, span, 0, 0, n0, h0, row0, queries, limits, scale_log2, dropout,
                             GROUP, D, BLOCK_D, BLOCK_M, BLOCK_N, DROPOUT, DIAGONAL=False, WINDOW=False,
                             RANGES=False)  # fmt: skip

    # A key's row of dk and dv depends on no other key, so that masked keys need no care before here.
    dk, dv = state
    dk = tl.where(valid[:, None], dk * dk_scale, 0.0)
    dv = tl.where(valid[:, None], dv * dv_scale, 0.0)
    ok = with_columns(n < Sk, D, BLOCK_D)
    dk_tile = dk_ptr + row_offset(b, h_kv, n0, (dk_stride_b, dk_stride_h, dk_stride_s))
    dv_tile = dv_ptr + row_offset(b, h_kv, n0, (dv_stride_b, dv_stride_h, dv_stride_s))
    tl.store(dk_tile + tile_offsets(dk_stride_s, BLOCK_N, BLOCK_D), dk.to(dk_ptr.dtype.element_ty), mask=ok)
    tl.store(dv_tile + tile_offsets(dv_stride_s, BLOCK_N, BLOCK_D), dv.to(dv_ptr.dtype.element_ty), mask=ok)


@triton.jit
def _distribute(dq, q, grad, lse, delta, n0, m0, keys, limits, scale_log2, dropout,
                D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                CAUSAL: tl.constexpr, WINDOW: tl.constexpr, RANGES: tl.constexpr, HAS_MASK: tl.constexpr,
                DROPOUT: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    """``dq`` after the keys of the block at n0."""
    k, v, valid = load_key_block(n0, keys, D, BLOCK_D, BLOCK_N, HAS_MASK, MASKED)
    p = tl.exp2(product(q, tl.trans(k)) * scale_log2 - lse[:, None])
    if MASKED:
        visible = visible_pairs(valid, m0, n0, limits, BLOCK_M, BLOCK_N, CAUSAL, WINDOW, RANGES)
        p = tl.where(visible, p, 0.0)
    dp = product(grad, tl.trans(v))
    if DROPOUT:
        seed, row, dropout_p = dropout
        dp = tl.where(tile_keep_mask(seed, m0, n0, row, dropout_p, BLOCK_M, BLOCK_N, KEYS_FIRST=False), dp, 0.0)
    ds = p * (dp - delta[:, None])
    return product(ds.to(k.dtype), k, dq)


@triton.jit(do_not_specialize=["ranges_stride_b", "Sq", "Sk", "query_offset", "window_offset"])
def attention_bwd_dq_kernel(
    q_ptr, k_ptr, v_ptr, grad_ptr, rows_ptr, dq_ptr, bounds_ptr, mask_ptr, ranges_ptr, seed_ptr,
    q_stride_b, q_stride_h, q_stride_s,
    k_stride_b, k_stride_h, k_stride_s,
    v_stride_b, v_stride_h, v_stride_s,
    grad_stride_b, grad_stride_h, grad_stride_s,
    dq_stride_b, dq_stride_h, dq_stride_s,
    mask_stride_b, ranges_stride_b,
    H, Sq, Sk, query_offset, window_offset, scale_log2, dq_scale, dropout_p,
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
    ok = with_columns(m0 + tl.arange(0, BLOCK_M) < Sq, D, BLOCK_D)
    q_tile = q_ptr + row_offset(b, h, m0, (q_stride_b, q_stride_h, q_stride_s))
    grad_tile = grad_ptr + row_offset(b, h, m0, (grad_stride_b, grad_stride_h, grad_stride_s))
    q = tl.load(q_tile + tile_offsets(q_stride_s, BLOCK_M, BLOCK_D), mask=ok, other=0.0)
    grad = tl.load(grad_tile + tile_offsets(grad_stride_s, BLOCK_M, BLOCK_D), mask=ok, other=0.0)
    lse, delta = _load_rows(rows_ptr, row, Sq, m0, BLOCK_M)
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
    dq = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    for i in range(full_first, full_last):
        dq = _distribute(dq, q, grad, lse, delta, i * BLOCK_N, m0, keys, limits, scale_log2, dropout, D, BLOCK_D,
                         BLOCK_M, BLOCK_N, CAUSAL, WINDOW, RANGES, HAS_MASK, DROPOUT, MASKED=False)  # fmt: skip
    for i in range(masked):
        n0 = tl.where(i < lead, first + i, full_last + i - lead) * BLOCK_N
        dq = _distribute(dq, q, grad, lse, delta, n0, m0, keys, limits, scale_log2, dropout, D, BLOCK_D,
                         BLOCK_M, BLOCK_N, CAUSAL, WINDOW, RANGES, HAS_MASK, DROPOUT, MASKED=True)  # fmt: skip
    dq_tile = dq_ptr + row_offset(b, h, m0, (dq_stride_b, dq_stride_h, dq_stride_s))
    dq = (dq * dq_scale).to(dq_ptr.dtype.element_ty)
    tl.store(dq_tile + tile_offsets(dq_stride_s, BLOCK_M, BLOCK_D), dq, mask=ok)


_launch_preprocess, _launch_dkdv, _launch_dq = (
    Launcher(kernel)
    for kernel in (attention_bwd_preprocess_kernel, attention_bwd_dkdv_kernel, attention_bwd_dq_kernel)
)


def backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    bounds: Tensor | None,
    key_mask: Tensor | None,
    ranges: Tensor | None,
    seed: Tensor | None,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    *,
    scale: float,
    is_causal: bool,
    query_offset: int,
    window_offset: int | None,
    dropout_p: float,
) -> None:
    """Launch: fills ``dq``, and ``dk`` with ``dv``, if given. Inputs as the op has checked them."""
    batch, heads, num_queries, head_size = query.shape
    if heads == 0:  # no query looks at any key
        for gradient in (dk, dv):
            if gradient is not None:
                gradient.zero_()
        return
    dropout_p = rounded(dropout_p)
    heads_kv, num_keys = key.shape[1], key.shape[2]
    group, width = heads // heads_kv, block_d(head_size)
    tiles = tiles_for(query, dropout_p > 0)
    padding = ROW_PADDING.value
    rows = torch.empty(
        (batch, heads, blocks(num_queries, padding) * padding, 2), dtype=torch.float32, device=query.device
    )
    if rows.numel():
        _launch_preprocess(
            (rows.numel() // (2 * PREPROCESS_BLOCK_M),),
            (out, grad, lse, rows, *out.stride()[:3], *grad.stride()[:3], heads, num_queries, 1 - dropout_p),
            {"D": head_size, "BLOCK_D": width, "BLOCK_M": PREPROCESS_BLOCK_M},
            num_warps=_preprocess_warps(width),
        )  # fmt: skip
    masks = (
        # Pointers that a variant does not use still need a value.
        rows if bounds is None else bounds,
        rows if key_mask is None else key_mask.view(torch.uint8),
        rows if ranges is None else ranges,
        rows if seed is None else seed,
    )
    inputs = (*query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *grad.stride()[:3])
    mask_strides = (0 if key_mask is None else key_mask.stride(0), ranges_stride(ranges))
    features = {
        "GROUP": group, "D": head_size, "BLOCK_D": width, "CAUSAL": is_causal,
        "WINDOW": window_offset is not None, "RANGES": ranges is not None, "HAS_BOUNDS": bounds is not None,
        "HAS_MASK": key_mask is not None, "DROPOUT": dropout_p > 0,
    }  # fmt: skip
    kept = keep_scale(dropout_p)
    lower = 0 if window_offset is None else window_offset
    if dk is not None and dv is not None and dk.numel():
        tile = tiles.dkdv
        arguments = (
            query, key, value, grad, rows, dk, dv, *masks, *inputs, *dk.stride()[:3], *dv.stride()[:3],
            *mask_strides, heads_kv, num_queries, num_keys, query_offset, lower, scale * LOG2_E, scale * kept, kept,
            dropout_p,
        )  # fmt: skip
        constexprs = {**features, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n}
        grid = (blocks(num_keys, tile.block_n) * heads_kv * batch,)
        _launch_dkdv(grid, arguments, constexprs, **tile.options())
    if dq is not None and dq.numel():
        tile = tiles.dq
        arguments = (
            query, key, value, grad, rows, dq, *masks, *inputs, *dq.stride()[:3],
            *mask_strides, heads, num_queries, num_keys, query_offset, lower, scale * LOG2_E, scale * kept, dropout_p,
        )  # fmt: skip
        constexprs = {**features, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n}
        grid = (blocks(num_queries, tile.block_m) * heads * batch,)
        _launch_dq(grid, arguments, constexprs, **tile.options())


def _preprocess_warps(width: int) -> int:
    return 8 if width > 64 else 4


def compile_specs() -> list[CompileSpec]:
    """The variants that stand for all; the preprocessing by width."""
    specs = [*listed(attention_bwd_dkdv_kernel, "dkdv"), *listed(attention_bwd_dq_kernel, "dq")]
    kernel = attention_bwd_preprocess_kernel
    for dtype in ("bf16", "fp32"):
        for width in (16, 32, 64, 128):
            constexprs = {"D": width, "BLOCK_D": width, "BLOCK_M": PREPROCESS_BLOCK_M}
            signature = {
                name: ("*fp32" if name in ("lse_ptr", "rows_ptr") else "*" + dtype)
                if name.endswith("_ptr")
                else ("fp32" if name == "keep_probability" else "i32")
                for name in kernel.arg_names
                if name not in constexprs
            }
            aligned = frozenset(name for name in signature if name.endswith("_ptr") or "_stride_" in name)
            name = f"{kernel.__name__}[d{width},{dtype}]"
            specs.append(CompileSpec(name, kernel, signature, constexprs, _preprocess_warps(width), 3, aligned))
    return specs


def every_variant() -> list[CompileSpec]:
    """All variants that can be launched of the two kernels that have any."""
    return [*every(attention_bwd_dkdv_kernel, "dkdv"), *every(attention_bwd_dq_kernel, "dq")]

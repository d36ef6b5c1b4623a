"""Rotary position embedding of query and key heads in one launch, forward and backward.

Grid (tokens / BLOCK_T, query and key heads / HEADS): a program loads the cosines and sines of BLOCK_T tokens once and
rotates HEADS heads with them. Bytes (e = element size): N·(H + Hkv)·D·e read and as many written; the tables are read
once for each block of heads, mostly from the L2 cache.

The backward pass is the same kernel with the transposed map. Arithmetic is in fp32. Addresses are 64-bit.
"""

from __future__ import annotations

import functools

import triton
import triton.language as tl
from torch import Tensor

from embedkernels.kernels.launch import Launcher, blocks
from embedkernels.kernels.specs import CompileSpec

_WARPS = 4
# Heads that one program takes, with their loads in flight at once.
_HEADS = 4
# Bytes of one head's tile: two 16-byte pieces for each thread.
_TILE_BYTES = 2 * 16 * 32 * _WARPS


@triton.jit
def _entries(
    table_ptr, at, live, ROTARY: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """The table's entries for the first and the second elements of all pairs, (BLOCK_T, HALF) in fp32."""
    pair = tl.arange(0, HALF)[None, :]
    inside = live & (pair < ROTARY // 2)
    if FULL and INTERLEAVED:
        both = tl.arange(0, 2 * HALF)[None, :]
        entries = tl.load(table_ptr + at + both, mask=live & (both < ROTARY), other=0.0).to(tl.float32)
        first, second = tl.split(tl.reshape(entries, [at.shape[0], HALF, 2]))
    elif FULL:
        first = tl.load(table_ptr + at + pair, mask=inside, other=0.0).to(tl.float32)
        second = tl.load(table_ptr + at + ROTARY // 2 + pair, mask=inside, other=0.0).to(tl.float32)
    else:
        first = tl.load(table_ptr + at + pair, mask=inside, other=0.0).to(tl.float32)
        second = first
    return first, second


@triton.jit
def _turn(a, b, cos_a, cos_b, sin_a, sin_b, ADJOINT: tl.constexpr):
    if ADJOINT:
        return a * cos_a + b * sin_b, b * cos_b - a * sin_a
    else:
        return a * cos_a - b * sin_a, b * cos_b + a * sin_b


@triton.jit
def _heads(
    out_ptr, x_ptr, out_at, x_at, stride_out_h, stride_h, first_head, H, live, cos_a, cos_b, sin_a, sin_b,
    D: tl.constexpr, ROTARY: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr, HEADS: tl.constexpr,
    INTERLEAVED: tl.constexpr, ADJOINT: tl.constexpr,
):  # fmt: skip
    """HEADS heads from ``first_head`` on; ``x_at`` and ``out_at`` are where the tokens' head 0 begins."""
    pair = tl.arange(0, HALF)[None, :]
    both = tl.arange(0, 2 * HALF)[None, :]
    for i in tl.static_range(HEADS):
        head = (first_head + i).to(tl.int64)
        # A comparison of vectors: Triton 3.9 interprets no vector & scalar as a mask.
        there = live & (tl.zeros(live.shape, dtype=tl.int64) + head < H)
        x = x_ptr + head * stride_h + x_at
        out = out_ptr + head * stride_out_h + out_at
        if INTERLEAVED:
            inside = there & (both < ROTARY)
            tile = tl.load(x + both, mask=inside, other=0.0).to(tl.float32)
            a, b = tl.split(tl.reshape(tile, [tile.shape[0], HALF, 2]))
            a, b = _turn(a, b, cos_a, cos_b, sin_a, sin_b, ADJOINT)
            tile = tl.reshape(tl.join(a, b), [tile.shape[0], 2 * HALF])
            tl.store(out + both, tile.to(out_ptr.dtype.element_ty), mask=inside)
        else:
            inside = there & (pair < ROTARY // 2)
            a = tl.load(x + pair, mask=inside, other=0.0).to(tl.float32)
            b = tl.load(x + ROTARY // 2 + pair, mask=inside, other=0.0).to(tl.float32)
            a, b = _turn(a, b, cos_a, cos_b, sin_a, sin_b, ADJOINT)
            tl.store(out + pair, a.to(out_ptr.dtype.element_ty), mask=inside)
            tl.store(out + ROTARY // 2 + pair, b.to(out_ptr.dtype.element_ty), mask=inside)
        if ROTARY < D:
            rest = ROTARY + tl.arange(0, REST)[None, :]
            inside = there & (rest < D)
            tl.store(out + rest, tl.load(x + rest, mask=inside, other=0.0), mask=inside)


@triton.jit
def rope_kernel(
    query_out_ptr, key_out_ptr, query_ptr, key_ptr, cos_ptr, sin_ptr, tokens, S, H, H_KV,
    stride_qob, stride_qoh, stride_qos, stride_kob, stride_koh, stride_kos,
    stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_ks,
    stride_cb, stride_cs, stride_sb, stride_ss,
    D: tl.constexpr, ROTARY: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr, BLOCK_T: tl.constexpr,
    HEADS: tl.constexpr, INTERLEAVED: tl.constexpr, FULL: tl.constexpr, ADJOINT: tl.constexpr,
):  # fmt: skip
    """BLOCK_T tokens of HEADS query heads or, from block ceil(H / HEADS) on, of key heads."""
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    live = (token < tokens)[:, None]
    b, s = (token // S)[:, None], (token % S)[:, None]
    cos_a, cos_b = _entries(cos_ptr, b * stride_cb + s * stride_cs, live, ROTARY, HALF, INTERLEAVED, FULL)
    sin_a, sin_b = _entries(sin_ptr, b * stride_sb + s * stride_ss, live, ROTARY, HALF, INTERLEAVED, FULL)
    query_blocks = tl.cdiv(H, HEADS)
    block = tl.program_id(1)
    if block < query_blocks:
        _heads(
            query_out_ptr, query_ptr, b * stride_qob + s * stride_qos, b * stride_qb + s * stride_qs,
            stride_qoh, stride_qh, block * HEADS, H, live, cos_a, cos_b, sin_a, sin_b,
            D, ROTARY, HALF, REST, HEADS, INTERLEAVED, ADJOINT,
        )  # fmt: skip
    else:
        _heads(
            key_out_ptr, key_ptr, b * stride_kob + s * stride_kos, b * stride_kb + s * stride_ks,
            stride_koh, stride_kh, (block - query_blocks) * HEADS, H_KV, live, cos_a, cos_b, sin_a, sin_b,
            D, ROTARY, HALF, REST, HEADS, INTERLEAVED, ADJOINT,
        )  # fmt: skip


_launch = Launcher(rope_kernel)


@functools.cache
def tile(head_size: int, rotary_dim: int, itemsize: int) -> dict[str, int]:
    """The sizes that a launch fixes: HALF and REST columns, BLOCK_T tokens, HEADS heads."""
    half = triton.next_power_of_2(rotary_dim // 2)
    rest = triton.next_power_of_2(max(head_size - rotary_dim, 1))
    return {
        "HALF": half,
        "REST": rest,
        "BLOCK_T": max(1, min(128, _TILE_BYTES // itemsize // max(2 * half, rest))),
        "HEADS": _HEADS,
    }


def rope(
    query_out: Tensor, key_out: Tensor | None, query: Tensor, key: Tensor | None, cos: Tensor, sin: Tensor,
    *, rotary_dim: int, interleaved: bool, adjoint: bool,
) -> None:  # fmt: skip
    """Fill ``query_out`` and ``key_out``.

    Args:
        query_out, query: (B, H, S, D), last stride 1, B, H, S and D positive.
        key_out, key: (B, Hkv, S, D), the same; None for no key.
        cos, sin: (B or 1, S, R) or (B or 1, S, R/2), last stride 1.
        rotary_dim: R, even, positive, at most D.
        interleaved, adjoint: see ``reference.rope``.
    """
    batch, heads, length, head_size = query.shape
    # Without a key no program gets as far as its pointers.
    heads_kv = 0 if key is None else key.shape[1]
    k, k_out = (query, query_out) if key is None or key_out is None else (key, key_out)
    sizes = tile(head_size, rotary_dim, query.itemsize)
    grid = (
        blocks(batch * length, sizes["BLOCK_T"]),
        blocks(heads, _HEADS) + blocks(heads_kv, _HEADS),
    )
    cos_stride, sin_stride = (
        (table.stride(0) if table.shape[0] == batch else 0, table.stride(1)) for table in (cos, sin)
    )
    arguments = (
        query_out, k_out, query, k, cos, sin, batch * length, length, heads, heads_kv,
        *query_out.stride()[:3], *k_out.stride()[:3], *query.stride()[:3], *k.stride()[:3], *cos_stride, *sin_stride,
    )  # fmt: skip
    constexprs = {
        "D": head_size, "ROTARY": rotary_dim, "INTERLEAVED": interleaved, "FULL": cos.shape[-1] == rotary_dim,
        "ADJOINT": adjoint, **sizes,
    }  # fmt: skip
    _launch(grid, arguments, constexprs, num_warps=_WARPS)


_POINTERS = ("query_out_ptr", "key_out_ptr", "query_ptr", "key_ptr")
_TABLES = ("cos_ptr", "sin_ptr")
_SCALARS = (
    "tokens", "S", "H", "H_KV", "stride_qob", "stride_qoh", "stride_qos", "stride_kob", "stride_koh", "stride_kos",
    "stride_qb", "stride_qh", "stride_qs", "stride_kb", "stride_kh", "stride_ks", "stride_cb", "stride_cs",
    "stride_sb", "stride_ss",
)  # fmt: skip


def compile_specs() -> list[CompileSpec]:
    """Head sizes from 16 to 256, both orders of pairs, partial rotation, both directions, tables of both widths."""
    specs = []
    for dtype, table, head_size, rotary, interleaved, full, adjoint in (
        ("bf16", "bf16", 16, 16, False, True, False),
        ("bf16", "bf16", 64, 64, False, True, False),
        ("bf16", "bf16", 64, 64, False, True, True),
        ("bf16", "fp32", 128, 128, False, True, False),
        ("bf16", "bf16", 128, 128, True, True, False),
        ("bf16", "bf16", 128, 128, True, True, True),
        ("bf16", "fp32", 128, 64, True, False, False),
        ("bf16", "bf16", 80, 32, False, True, True),
        ("bf16", "bf16", 256, 256, False, True, True),
        ("bf16", "fp32", 256, 64, True, True, False),
        ("fp32", "fp32", 64, 64, False, True, False),
        ("fp32", "fp32", 128, 128, True, True, True),
        ("fp32", "fp32", 96, 96, False, False, True),
    ):
        words = (
            f"d{head_size}", f"r{rotary}", "interleaved" if interleaved else "halves", "full" if full else "half",
            "backward" if adjoint else "forward", dtype, f"{table} tables",
        )  # fmt: skip
        signature = {
            **dict.fromkeys(_POINTERS, f"*{dtype}"),
            **dict.fromkeys(_TABLES, f"*{table}"),
            **dict.fromkeys(_SCALARS, "i32"),
        }
        specs.append(
            CompileSpec(
                f"rope_kernel[{','.join(words)}]",
                rope_kernel,
                signature,
                {
                    "D": head_size, "ROTARY": rotary, "INTERLEAVED": interleaved, "FULL": full, "ADJOINT": adjoint,
                    **tile(head_size, rotary, 2 if dtype == "bf16" else 4),
                },
                num_warps=_WARPS,
                divisible_by_16=frozenset(name for name in signature if name.startswith("stride") or "ptr" in name),
            )
        )  # fmt: skip
    return specs

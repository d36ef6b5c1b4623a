"""Device functions that the attention kernels share: which key blocks to visit, how to load them, what to drop."""

import os

import triton
import triton.language as tl

from embedkernels.kernels.random import ROUNDS

_INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")

# Rows of the backward's scratch are padded to this many queries per head, so that its loads need no mask. A multiple
# of every BLOCK_M.
ROW_PADDING = tl.constexpr(128)


@triton.jit
def split_program(n_blocks, H):
    """This program's (block, batch, head) in a one-dimensional grid of n_blocks · H · B programs.

    One dimension, because the other two end at 65535. Neighbours share a head, so its keys stay in the L2 cache.
    """
    program = tl.program_id(0)
    block = program % n_blocks
    row = program // n_blocks
    return block, row // H, row % H


@triton.jit
def row_offset(b, h, s, strides):
    """Offset of row (b, h, s) in 64 bits. ``strides`` is (batch, head, sequence)."""
    offset = b.to(tl.int64) * strides[0] + h.to(tl.int64) * strides[1]
    return offset + tl.cast(s, tl.int64) * strides[2]


@triton.jit
def tile_offsets(stride_s, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """Offsets of a (ROWS, BLOCK_D) tile from its first element: 32 bits, the ops refuse larger row strides."""
    return tl.arange(0, ROWS)[:, None] * stride_s + tl.arange(0, BLOCK_D)[None, :]


@triton.jit
def with_columns(row_ok, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Mask of a tile from that of its rows: the columns beyond D, if there are any, are off."""
    ok = row_ok[:, None]
    if D != BLOCK_D:
        ok = ok & (tl.arange(0, BLOCK_D)[None, :] < D)
    return ok


@triton.jit
def product(a, b, acc=None):
    """a · b, added to ``acc`` if there is one; fp32 operands are not rounded to tf32."""
    if _INTERPRETED:
        # It multiplies the bits of bf16 numbers as integers.
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def load_bounds(bounds_ptr, b, Sk, HAS_BOUNDS: tl.constexpr):
    """First key, end of the keys, and whether any key in between is masked, for batch row b."""
    if HAS_BOUNDS:
        start = tl.load(bounds_ptr + b * 3)
        end = tl.load(bounds_ptr + b * 3 + 1)
        holes = tl.load(bounds_ptr + b * 3 + 2)
    else:
        start = 0
        end = Sk
        holes = 0
    return start, end, holes


@triton.jit
def load_limits(ranges_ptr, b, ranges_stride_b, m0, Sq, Sk, query_offset, window_offset, BLOCK_M: tl.constexpr,
                RANGES: tl.constexpr):  # fmt: skip
    """What the queries [m0, m0 + BLOCK_M) see, for :func:`visible_pairs` and for :func:`key_block_ranges`.

    With RANGES the first key and the end of the keys of every query, (BLOCK_M,) each, and of the first and the last
    query; else the offsets.
    """
    limits = (window_offset, query_offset)
    edges = (0, 0, 0, 0)
    if RANGES:
        # Of each of Sq queries the first key, of each of Sk keys the first query; then the ends of these.
        firsts = ranges_ptr + b.to(tl.int64) * ranges_stride_b
        ends = firsts + Sq + Sk
        m = m0 + tl.arange(0, BLOCK_M)
        last = tl.minimum(m0 + BLOCK_M, Sq) - 1
        limits = (tl.load(firsts + m, mask=m < Sq, other=0), tl.load(ends + m, mask=m < Sq, other=0))
        edges = (tl.load(firsts + m0), tl.load(ends + m0), tl.load(firsts + last), tl.load(ends + last))
    return limits, edges


@triton.jit
def key_block_ranges(start, end, holes, m0, Sq, limits, edges, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                     CAUSAL: tl.constexpr, WINDOW: tl.constexpr, RANGES: tl.constexpr):  # fmt: skip
    """The key blocks that the queries [m0, m0 + BLOCK_M) visit.

    Returns (first, lead, full_first, full_last, masked): the blocks [full_first, full_last) are visible as a whole;
    the ``masked`` others are ``lead`` blocks from ``first`` on, then those from ``full_last`` on.
    """
    visible_end = end
    full_end = end
    if CAUSAL:
        visible_end = tl.minimum(end, tl.maximum(tl.minimum(m0 + BLOCK_M, Sq) + limits[1], 0))
        full_end = tl.minimum(end, tl.maximum(m0 + 1 + limits[1], 0))
    visible_start = start
    full_start = start
    if WINDOW:
        visible_start = tl.maximum(start, m0 + limits[0])
        full_start = tl.maximum(start, tl.minimum(m0 + BLOCK_M, Sq) - 1 + limits[0])
    if RANGES:
        # Neither a first key nor an end is less than that of the query before.
        visible_start = tl.maximum(start, edges[0])
        full_end = tl.minimum(end, edges[1])
        full_start = tl.maximum(start, edges[2])
        visible_end = tl.minimum(end, edges[3])
    first = visible_start // BLOCK_N
    last = tl.maximum(tl.cdiv(visible_end, BLOCK_N), first)
    full_first = tl.minimum(tl.cdiv(full_start, BLOCK_N), last)
    full_last = tl.maximum(full_end // BLOCK_N, full_first)
    if holes != 0:
        full_last = full_first
    lead = full_first - first
    return first, lead, full_first, full_last, lead + last - full_last


@triton.jit
def load_key_block(n0, keys, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, HAS_MASK: tl.constexpr,
                   MASKED: tl.constexpr):  # fmt: skip
    """(BLOCK_N, BLOCK_D) tiles of k and v from key n0 on, and which of the keys count.

    ``keys`` is (k_ptr and v_ptr at the head's first row, their row strides, mask_ptr at the batch row, start, end).
    Keys that do not count are never read; without MASKED all of them do.
    """
    k_ptr, v_ptr, k_stride_s, v_stride_s, mask_ptr, start, end = keys
    n = n0 + tl.arange(0, BLOCK_N)
    n64 = tl.cast(n0, tl.int64)
    k_ptrs = k_ptr + n64 * k_stride_s + tile_offsets(k_stride_s, BLOCK_N, BLOCK_D)
    v_ptrs = v_ptr + n64 * v_stride_s + tile_offsets(v_stride_s, BLOCK_N, BLOCK_D)
    valid = (n >= start) & (n < end)
    if MASKED:
        if HAS_MASK:
            valid = valid & (tl.load(mask_ptr + n, mask=valid, other=0) != 0)
        ok = with_columns(valid, D, BLOCK_D)
        k = tl.load(k_ptrs, mask=ok, other=0.0)
        v = tl.load(v_ptrs, mask=ok, other=0.0)
    elif D != BLOCK_D:
        ok = tl.arange(0, BLOCK_D)[None, :] < D
        k = tl.load(k_ptrs, mask=ok, other=0.0)
        v = tl.load(v_ptrs, mask=ok, other=0.0)
    else:
        k = tl.load(k_ptrs)
        v = tl.load(v_ptrs)
    return k, v, valid


@triton.jit
def visible_pairs(valid, m0, n0, limits, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr,
                  WINDOW: tl.constexpr, RANGES: tl.constexpr):  # fmt: skip
    """(BLOCK_M, BLOCK_N) or (1, BLOCK_N): True where a query sees a key. ``valid`` (BLOCK_N,): keys that count."""
    visible = valid[None, :]
    if CAUSAL:
        last_key = tl.arange(0, BLOCK_M) + (m0 + limits[1] - n0)
        visible = visible & (tl.arange(0, BLOCK_N)[None, :] <= last_key[:, None])
    if WINDOW:
        first_key = tl.arange(0, BLOCK_M) + (m0 + limits[0] - n0)
        visible = visible & (tl.arange(0, BLOCK_N)[None, :] >= first_key[:, None])
    if RANGES:
        n = tl.arange(0, BLOCK_N)[None, :]
        visible = visible & (n >= limits[0][:, None] - n0) & (n < limits[1][:, None] - n0)
    return visible


@triton.jit
def tile_keep_mask(seed, q0, k0, row, p, ROWS: tl.constexpr, COLUMNS: tl.constexpr, KEYS_FIRST: tl.constexpr):
    """Dropout mask of a tile: (queries, keys) from (q0, k0) on, or (keys, queries) if KEYS_FIRST.

    ``row`` is batch · H + head. The mask is that of ``reference.attention.attention_keep_mask``: one Philox call
    serves the four pairs {q, q + 8} × {k, k + 8}. NVIDIA's tensor cores, up to sm_90, leave all four in one thread,
    in the tile and in its transpose alike, so that no word moves between threads and none is computed twice.
    Compiled for sm_90, the forward at D = 64 is 1312 instructions without dropout, 2104 with this, 3288 with a call
    per pair, and 2400 with a call per four keys, or per 2 x 2 neighbours, which go through shared memory.
    """
    r = tl.arange(0, ROWS // 2)[:, None]
    c = tl.arange(0, COLUMNS // 2)[None, :]
    if KEYS_FIRST:
        k_group = k0 // 2 + r + tl.zeros_like(c)
        q_group = q0 // 2 + c + tl.zeros_like(r)
    else:
        q_group = q0 // 2 + r + tl.zeros_like(c)
        k_group = k0 // 2 + c + tl.zeros_like(r)
    head = tl.zeros_like(k_group) + row
    w0, w1, w2, w3 = tl.philox(seed, k_group, q_group, head, tl.zeros_like(k_group), ROUNDS)
    # (row group, column group, bit of q, bit of k); then each bit goes to its place between the eights.
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    words = tl.reshape(words, (ROWS // 16, 8, COLUMNS // 16, 8, 2, 2))
    if KEYS_FIRST:
        words = tl.permute(words, (0, 5, 1, 2, 4, 3))
    else:
        words = tl.permute(words, (0, 4, 1, 2, 5, 3))
    words = tl.reshape(words, (ROWS, COLUMNS))
    # Equal to keep_from_bits, without converting every word to a float, which runs at a quarter of the rate.
    # The last word that is dropped, not the first that is kept: at p = 1 that one would need 33 bits.
    dropped = tl.maximum(tl.ceil(p * 16777216.0), 1.0).to(tl.int64) << 8
    return words > (dropped - 1).to(tl.uint32)

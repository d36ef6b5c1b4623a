"""Dropout bits inside a kernel; ``embedkernels.reference.random`` draws the same ones in plain PyTorch."""

import ctypes

import triton
import triton.language as tl

ROUNDS = tl.constexpr(7)


def rounded(p: float) -> float:
    """A probability as the kernels get it, in float32: what is close enough to 1 is 1, and then nothing is kept."""
    return ctypes.c_float(p).value


def keep_scale(p: float) -> float:
    """What kept elements are multiplied by: 1 / (1 - p), and 0 at p = 1, where nothing is kept."""
    p = rounded(p)
    return 1.0 / (1.0 - p) if p < 1.0 else 0.0


@triton.jit
def keep_from_bits(bits, p):
    """True where the upper 24 bits, read as a fraction, are at least ``p``."""
    return (bits >> 8).to(tl.float32) * 5.9604644775390625e-08 >= p


@triton.jit
def row_keep_mask(seed, rows, first_column, p, COLUMNS: tl.constexpr):
    """Dropout mask of a tile of ``embed``: (R, COLUMNS) bool, True where the element survives.

    Element (r, c) uses word c % 4 of counter (c // 4, r, 0, 0): one Philox call serves four neighbours. ``rows`` is
    (R,) int32, not negative; ``first_column`` and COLUMNS are multiples of 4.
    """
    group = first_column // 4 + tl.arange(0, COLUMNS // 4)
    zero = tl.zeros((rows.shape[0], COLUMNS // 4), dtype=tl.uint32)
    c0 = zero + group.to(tl.uint32)[None, :]
    c1 = zero + rows.to(tl.uint32)[:, None]
    w0, w1, w2, w3 = tl.philox(seed, c0, c1, zero, zero, ROUNDS)
    even = tl.interleave(keep_from_bits(w0, p), keep_from_bits(w2, p))
    odd = tl.interleave(keep_from_bits(w1, p), keep_from_bits(w3, p))
    return tl.interleave(even, odd)

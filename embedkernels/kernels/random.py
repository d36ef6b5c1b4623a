"""Dropout bits inside a kernel; ``embedkernels.reference.random`` draws the same ones in plain PyTorch."""

import triton
import triton.language as tl

ROUNDS = tl.constexpr(7)


@triton.jit
def keep_from_bits(bits, p):
    """True where the upper 24 bits, read as a fraction, are at least ``p``."""
    return (bits >> 8).to(tl.float32) * 5.9604644775390625e-08 >= p


@triton.jit
def row_keep_mask(seed, row, COLUMNS: tl.constexpr):
    """Random words of one row of ``embed``: (COLUMNS,) uint32, element c from word c % 4 of counter c // 4.

    ``row`` is an int64 scalar. COLUMNS is a multiple of 4.
    """
    c0 = tl.arange(0, COLUMNS // 4)
    c1 = tl.zeros_like(c0) + (row & 0xFFFFFFFF).to(tl.uint32).to(tl.int32, bitcast=True)
    c2 = tl.zeros_like(c0) + (row >> 32).to(tl.int32)
    w0, w1, w2, w3 = tl.philox(seed, c0, c1, c2, tl.zeros_like(c0), ROUNDS)
    return tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))

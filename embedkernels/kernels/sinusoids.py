"""Fixed sinusoidal positions inside a kernel, to a few units of float32's last place below 2^24.

An angle of thousands of turns has lost its sine when it is rounded to float32. The kernel counts in turns and keeps
the fraction: positions and frequencies are cut into parts of 12 bits, whose products are exact, whole turns are taken
off each product, and what is left is added with its rounding error. No slow path, no local memory.
"""

from __future__ import annotations

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from embedkernels.reference.sinusoids import frequencies

# Rows of the constants: the frequency in turns (of fairseq the angle per position), negative where the column is a
# cosine; what rounding took off it; and 1.
_ROWS = 3
# 1 / (2·pi) in parts of 11 bits and the rest.
_TURN_1 = tl.constexpr(0.1590576171875)
_TURN_2 = tl.constexpr(9.72747802734375e-05)
_TURN_3 = tl.constexpr(5.112412189826888e-08)


@triton.jit
def _fraction(turns):
    """Without whole turns: in [-1/2, 1/2]."""
    return turns - tl.floor(turns + 0.5)


@triton.jit
def _upper_half(x):
    """``x`` cut to its first 12 significant bits; what is cut off has 12 too."""
    return (x.to(tl.int32, bitcast=True) & -4096).to(tl.float32, bitcast=True)


@triton.jit
def _sine_of_turns(phase, a, b, c):
    """sin(2·pi·(phase + a + b + c)) for parts whose sum may not be rounded: 0 or 1/4, below 1, below 1, small."""
    half = tl.floor(2.0 * (a + b + c) + (2.0 * phase + 0.5))
    a += phase - 0.5 * half
    total = a + b
    of_b = total - a
    lost = (a - (total - of_b)) + (b - of_b)
    x = (total + (lost + c)) * 6.283185307179586
    x2 = x * x
    terms = 8.3333487e-3 + x2 * (-1.9842772e-4 + x2 * (2.7609619e-6 - x2 * 2.5201581e-8))
    value = x + x * x2 * (-1.6666667e-1 + x2 * terms)
    return tl.where((half.to(tl.int32) & 1) == 1, -value, value)


@triton.jit
def sinusoid_rows(constants_ptr, positions, columns, D: tl.constexpr, ROUNDED: tl.constexpr):
    """(N, BLOCK_D) fp32 rows for ``positions``, (N,) integers. ROUNDED: angles are rounded to fp32, as fairseq's are.

    Constants are loaded in the tile's own shape: another layout would pass through shared memory.
    """
    inside = (columns < D)[None, :]
    at = constants_ptr + tl.zeros((positions.shape[0], 1), dtype=tl.int32) + columns[None, :]
    signed = tl.load(at, mask=inside, other=0.0)
    phase = tl.where(signed < 0.0, 0.25, 0.0)
    frequency = tl.abs(signed)
    if ROUNDED:
        angle = positions.to(tl.float32)[:, None] * frequency
        high = _upper_half(angle)
        # An explicit fma with a 1 from memory: a subtraction would be contracted with the product, and not rounded.
        low = tl.fma(angle, tl.load(constants_ptr + 2 * D), -high)
        rest = high * _TURN_3 + (low * (_TURN_2 + _TURN_3) + _fraction(low * _TURN_1))
        return _sine_of_turns(phase, _fraction(high * _TURN_1), _fraction(high * _TURN_2), rest)
    else:
        first = _upper_half(frequency)
        second = frequency - first
        low = (positions & 4095).to(tl.float32)[:, None]
        high = (positions & -4096).to(tl.float32)[:, None]
        return _sine_of_turns(
            phase,
            _fraction(high * first) + _fraction(low * first),
            _fraction(high * second) + low * second,
            (high + low) * tl.load(at + D, mask=inside, other=0.0),
        )


@functools.cache
def constants(width: int, layout: str, device: torch.device) -> Tensor:
    """What :func:`sinusoid_rows` reads, (3, D) float32 on ``device``; made once.

    Raises:
        RuntimeError: it would be made while a CUDA graph is captured.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"embed: the first call with sinusoids {layout!r} of width {width} on {device} is being captured in a "
            "CUDA graph, but their frequencies must be copied there first: run the op once before the capture"
        )
    steps, phase = frequencies(width, layout)
    turns = steps if layout == "fairseq" else steps / (2 * math.pi)
    rows = torch.zeros(_ROWS, width, dtype=torch.float64, device="cpu")
    rows[0] = turns.float()
    rows[1] = turns - rows[0]
    rows[0] *= 1 - 2 * phase
    rows[2] = 1.0
    return rows.float().to(device)

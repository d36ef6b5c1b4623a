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

# Rows of the constants: three parts of the frequency in turns (of fairseq the angle per position in their place),
# the phase in turns, and 1.
_ROWS = 5
# 1 / (2·pi) in parts of 11 bits and the rest.
_TURN_1 = tl.constexpr(0.1590576171875)
_TURN_2 = tl.constexpr(9.72747802734375e-05)
_TURN_3 = tl.constexpr(5.112412189826888e-08)


@triton.jit
def _fraction(turns):
    """Without whole turns: in [-1/2, 1/2]."""
    return turns - tl.floor(turns + 0.5)


@triton.jit
def _sine_of_turns(a, b, c):
    """sin(2·pi·(a + b + c)) for parts of which a + b may not be rounded; each is below 1, c small."""
    quarter = tl.floor(4.0 * (a + b + c) + 0.5)
    a -= 0.25 * quarter
    total = a + b
    of_b = total - a
    lost = (a - (total - of_b)) + (b - of_b)
    x = (total + (lost + c)) * 6.283185307179586
    x2 = x * x
    sine = x + x * x2 * (-1.6666666e-1 + x2 * (8.3333333e-3 + x2 * (-1.9841270e-4 + x2 * 2.7557319e-6)))
    cosine = 1.0 + x2 * (-0.5 + x2 * (4.1666668e-2 + x2 * (-1.3888889e-3 + x2 * (2.4801587e-5 - x2 * 2.7557319e-7))))
    turn = quarter.to(tl.int32) & 3
    value = tl.where((turn & 1) == 1, cosine, sine)
    return tl.where((turn & 2) == 2, -value, value)


@triton.jit
def sinusoid_rows(constants_ptr, positions, columns, D: tl.constexpr, ROUNDED: tl.constexpr):
    """(N, BLOCK_D) fp32 rows for ``positions``, (N,) integers. ROUNDED: angles are rounded to fp32, as fairseq's are.

    Constants are loaded in the tile's own shape: another layout would pass through shared memory.
    """
    inside = (columns < D)[None, :]
    at = constants_ptr + tl.zeros((positions.shape[0], 1), dtype=tl.int32) + columns[None, :]
    first = tl.load(at, mask=inside, other=0.0)
    phase = tl.load(at + 3 * D, mask=inside, other=0.0)
    if ROUNDED:
        angle = positions.to(tl.float32)[:, None] * first
        high = (angle.to(tl.int32, bitcast=True) & -4096).to(tl.float32, bitcast=True)
        # An explicit fma with a 1 from memory: a subtraction would be contracted with the product, and not rounded.
        low = tl.fma(angle, tl.load(at + 4 * D, mask=inside, other=1.0), -high)
        rest = high * _TURN_3 + (low * (_TURN_2 + _TURN_3) + _fraction(low * _TURN_1))
        return _sine_of_turns(_fraction(high * _TURN_1) + phase, _fraction(high * _TURN_2), rest)
    else:
        second = tl.load(at + D, mask=inside, other=0.0)
        third = tl.load(at + 2 * D, mask=inside, other=0.0)
        low = (positions & 4095).to(tl.float32)[:, None]
        high = (positions - (positions & 4095)).to(tl.float32)[:, None]
        return _sine_of_turns(
            _fraction(_fraction(high * first) + low * first) + phase,
            _fraction(_fraction(high * second) + low * second),
            (high + low) * third,
        )


def _short(x: Tensor, bits: int) -> Tensor:
    """``x`` (float64), cut to ``bits`` significant bits."""
    mantissa, exponent = torch.frexp(x)
    return torch.ldexp(torch.trunc(mantissa * 2**bits) / 2**bits, exponent)


@functools.cache
def constants(width: int, layout: str, device: torch.device) -> Tensor:
    """What :func:`sinusoid_rows` reads, (5, D) float32 on ``device``; made once.

    Raises:
        RuntimeError: it would be made while a CUDA graph is captured.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"embed: the first call with sinusoids {layout!r} of width {width} on {device} is being captured in a "
            "CUDA graph, but their frequencies must be copied there first: run the op once before the capture"
        )
    steps, phase = frequencies(width, layout)
    rows = torch.zeros(_ROWS, width, dtype=torch.float64, device="cpu")
    if layout == "fairseq":
        rows[0] = steps
    else:
        turns = steps / (2 * math.pi)
        rows[0] = _short(turns, 12)
        rows[1] = _short(turns - rows[0], 12)
        rows[2] = turns - rows[0] - rows[1]
    rows[3] = phase * 0.25
    rows[4] = 1.0
    return rows.float().to(device)

"""The random bits behind every dropout: Philox 4x32 with 7 rounds, in plain PyTorch.

The Triton kernels draw the same bits from ``tl.philox`` (see ``embedkernels.kernels.random``), so a mask can be
computed again from its seed, here or on a device, and compared bit by bit.

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011. Seven rounds is the
paper's recommended count that passes BigCrush for Philox4x32.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDS = 7
_MASK = 0xFFFFFFFF
_KEY = (0x9E3779B9, 0xBB67AE85)
_ROUND = (0xD2511F53, 0xCD9E8D57)


def _mul_hi_lo(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a·b for ``b`` in [0, 2**32), by 16-bit halves so that int64 never overflows."""
    low = a * (b & 0xFFFF)
    high = a * (b >> 16)
    middle = (low >> 16) + (high & 0xFFFF)
    return (high >> 16) + (middle >> 16), ((middle & 0xFFFF) << 16) | (low & 0xFFFF)


def philox(seed: Tensor | int, c0: Tensor, c1: Tensor | int = 0, c2: Tensor | int = 0) -> tuple[Tensor, ...]:
    """Four words of 32 random bits for every counter (c0, c1, c2, 0).

    Args:
        seed: integer or int64 tensor of one element; its 64 bits are the key. A tensor is not waited for.
        c0, c1, c2: counters in [0, 2**32), int64 tensors (or integers) that broadcast together.

    Returns:
        four int64 tensors of the broadcast shape, each in [0, 2**32).
    """
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    zero = torch.zeros_like(c0)
    x0, x1, x2, x3 = torch.broadcast_tensors(c0 & _MASK, zero + c1, zero + c2, zero)
    for _ in range(ROUNDS):
        hi2, lo2 = _mul_hi_lo(_ROUND[1], x2)
        hi0, lo0 = _mul_hi_lo(_ROUND[0], x0)
        x0, x1, x2, x3 = hi2 ^ x1 ^ k0, lo2, hi0 ^ x3 ^ k1, lo0
        k0, k1 = (k0 + _KEY[0]) & _MASK, (k1 + _KEY[1]) & _MASK
    return x0, x1, x2, x3


def keep_scale(p: float) -> float:
    """What kept elements are multiplied by: 1 / (1 - p), and 0 where ``p``, as the float32 it is used as, is 1."""
    p = float(torch.tensor(p, dtype=torch.float32))
    return 1.0 / (1.0 - p) if p < 1.0 else 0.0


def keep_from_bits(bits: Tensor, p: float) -> Tensor:
    """True where an element survives dropout of probability ``p``: its upper 24 bits, as a fraction, are ≥ p."""
    return (bits >> 8).to(torch.float32) * 2.0**-24 >= torch.tensor(p, dtype=torch.float32, device=bits.device)


def row_keep_mask(seed: Tensor | int, rows: int, columns: int, p: float, device: torch.device) -> Tensor:
    """Dropout mask of ``embed``: element (r, c) uses word c % 4 of counter (c // 4, r low bits, r high bits).

    Returns:
        bool tensor of shape (rows, columns).
    """
    groups = (columns + 3) // 4
    c0 = torch.arange(groups, device=device, dtype=torch.int64)[None, :]
    row = torch.arange(rows, device=device, dtype=torch.int64)[:, None]
    words = philox(seed, c0, row & _MASK, row >> 32)
    bits = torch.stack(words, dim=-1).reshape(rows, groups * 4)[:, :columns]
    return keep_from_bits(bits, p)


def round_stochastic(values: Tensor, rows: Tensor, seed: Tensor | int) -> Tensor:
    """fp32 to bfloat16, up with the probability that the cut-off part is of a unit in the last place.

    The mean of what comes out is the value itself, so that sums of many small addends do not stall.

    Args:
        values: (N, D), float32.
        rows: (N), number of each row in [0, 2**32). Element (r, c) of a table always gets the same 16 bits: of
            counter (c // 8, r) word c % 8 // 2, the lower half for even c.
        seed: see :func:`philox`.

    Returns:
        bfloat16 (N, D). Infinities and NaN are rounded to nearest.
    """
    width = values.shape[1]
    groups = torch.arange((width + 7) // 8, device=values.device, dtype=torch.int64)[None, :]
    words = torch.stack(philox(seed, groups, rows.long()[:, None]), dim=-1)
    halves = torch.stack((words & 0xFFFF, words >> 16), dim=-1).reshape(values.shape[0], -1)[:, :width]
    upper = ((values.contiguous().view(torch.int32).long() + halves) >> 16).to(torch.int16)
    return torch.where(values.isfinite(), upper.view(torch.bfloat16), values.bfloat16())

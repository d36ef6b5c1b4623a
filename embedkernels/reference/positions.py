"""Positions counted over real tokens, in plain PyTorch: the specification of ``count_positions``."""

from __future__ import annotations

import torch
from torch import Tensor


def count_positions(
    tokens: Tensor, padding_idx: int | None, start: int, padding_position: int, skip: int = 0
) -> Tensor:
    """p[..., s] = start + #{t <= s : token t is real} where token s is real, else ``padding_position``.

    The arguments are those of :func:`embedkernels.count_positions`. Does not wait for the device.
    """
    # In int64: a narrower type would wrap a padding_idx that it cannot hold.
    real = tokens.long() != (0 if padding_idx is None else padding_idx)
    counted = torch.cumsum(real, dim=-1) + start
    return torch.where(real, counted, padding_position)[..., skip:]

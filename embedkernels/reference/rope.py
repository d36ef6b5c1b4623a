"""Rotary position embedding in plain PyTorch: the specification of ``rope``, and its torch backend."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(x: Tensor, cos: Tensor, sin: Tensor, rotary_dim: int, interleaved: bool, adjoint: bool = False) -> Tensor:
    """Rotate the first ``rotary_dim`` elements of every head of ``x`` in pairs; the others are copied.

    With (a, b) a pair and (c, s), (c', s') the table's entries at the places of a and b, the pair becomes
    (a·c - b·s, b·c' + a·s'). Arithmetic is in fp32 (fp64 for double), the result is rounded once.

    Args:
        x: (B, H, S, D).
        cos, sin: (B or 1, S, R) or, with one entry for both of a pair, (B or 1, S, R/2).
        rotary_dim: R, even.
        interleaved: pairs are (0, 1), (2, 3), ...; otherwise (0, R/2), (1, R/2 + 1), ...
        adjoint: the transposed map, which is the backward pass.

    Returns:
        (B, H, S, D) in the dtype of ``x``.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    turned, rest = x[..., :rotary_dim].to(wide), x[..., rotary_dim:]
    a, b = _pairs(turned, interleaved)
    (c_a, c_b), (s_a, s_b) = (_entries(table[:, None].to(wide), rotary_dim, interleaved) for table in (cos, sin))
    if adjoint:
        a, b = a * c_a + b * s_b, b * c_b - a * s_a
    else:
        a, b = a * c_a - b * s_a, b * c_b + a * s_b
    turned = torch.stack((a, b), dim=-1).flatten(-2) if interleaved else torch.cat((a, b), dim=-1)
    return torch.cat((turned.to(x.dtype), rest), dim=-1)


def _pairs(x: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """The first and the second elements of all pairs."""
    if interleaved:
        return x[..., 0::2], x[..., 1::2]
    half = x.shape[-1] // 2
    return x[..., :half], x[..., half:]


def _entries(table: Tensor, rotary_dim: int, interleaved: bool) -> tuple[Tensor, Tensor]:
    return _pairs(table, interleaved) if table.shape[-1] == rotary_dim else (table, table)

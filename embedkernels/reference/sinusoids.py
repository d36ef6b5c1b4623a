"""Fixed sinusoidal positions in plain PyTorch: the rows of the tables that transformers' models hold."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Vaswani et al., 2017 (XLM, DistilBERT); Marian, Pegasus; fairseq and tensor2tensor (M2M100, XGLM, Speech2Text).
LAYOUTS = ("interleaved", "halves", "fairseq")
# Positions are below this: integers that float32 holds.
MOST_POSITIONS = 2**24


def frequencies(width: int, layout: str) -> tuple[Tensor, Tensor]:
    """Of every column: its angle per position, and its phase in quarter turns (0 for a sine, 1 for a cosine).

    Args:
        width: D, at least 4 for ``"fairseq"``.
        layout: one of :data:`LAYOUTS`.

    Returns:
        float64 (D,) and int64 (D,), on the CPU. For ``"fairseq"`` the angles per position are exact float32 values.
    """
    column = torch.arange(width, device="cpu")
    if layout == "fairseq":
        half = width // 2
        rate = -math.log(10000) / (half - 1)
        steps = torch.exp(torch.arange(half, device="cpu").float() * rate).double()
        # An odd last column is zero: the sine of no angle.
        return torch.cat((steps, steps, steps.new_zeros(width % 2))), (column // half) % 2
    sines = (width + 1) // 2
    pair, phase = (column // 2, column % 2) if layout == "interleaved" else (column % sines, column // sines)
    return 10000.0 ** (-2.0 * pair.double() / width), phase


def sinusoids(positions: Tensor, width: int, layout: str, padding_position: int | None = None) -> Tensor:
    """Rows of a fixed sinusoidal position table.

    ``"interleaved"``: sin(p / 10000^(2i/D)) at column 2i, the cosine at 2i + 1. ``"halves"``: all sines first, then
    all cosines. ``"fairseq"``: halves with the frequencies exp(-i·ln(10000) / (D/2 - 1)), where the angle is rounded
    to float32, as the models' tables have it.

    Args:
        positions: integers of any shape, not negative.
        width: D.
        layout: one of :data:`LAYOUTS`.
        padding_position: the position whose row is zeros, or None.

    Returns:
        float64, (*positions.shape, D).
    """
    steps, phase = (x.to(positions.device) for x in frequencies(width, layout))
    angles = positions.unsqueeze(-1).double() * steps
    if layout == "fairseq":
        angles = (positions.unsqueeze(-1).float() * steps.float()).double()
    rows = torch.where(phase == 1, angles.cos(), angles.sin())
    if padding_position is not None:
        rows = rows.masked_fill((positions == padding_position).unsqueeze(-1), 0.0)
    return rows

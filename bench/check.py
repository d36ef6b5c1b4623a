"""Right before fast: a result is compared with a float64 reference before anything is timed.

The rule is the project's contract (``tests/contract.py``), evaluated on the device because tables of gigabytes are
compared: an error, as the largest absolute difference and as the root mean square, of at most ``limit`` times that of
PyTorch's own op in the same dtype, plus one unit in the last place at the tensor's largest magnitude.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

OUR_LIMIT = 2.0
# A rival may be less exact than we promise to be and is still worth a time; garbage is not.
RIVAL_LIMIT = 8.0
# A yardstick off by more than this share of the largest value speaks against the reference it is held against.
SANE = 0.1
# float64 copies of a table are made in pieces of this many elements.
PIECE = 1 << 26


@dataclass(frozen=True)
class Errors:
    """Largest absolute and root mean square difference to a float64 reference, and that reference's magnitude."""

    largest: float
    rms: float
    scale: float


@dataclass(frozen=True)
class Verdict:
    """Whether a result is right, in words if it is not, and by how much each tensor errs relative to PyTorch."""

    ok: bool
    detail: str
    ratios: dict[str, float]


def errors(actual: Tensor, expected: Tensor) -> Errors:
    """Differences of ``actual`` to ``expected`` (float64, same shape), computed where they live."""
    if expected.numel() == 0:
        return Errors(0.0, 0.0, 0.0)
    flat, want = actual.detach().reshape(-1), expected.reshape(-1)
    pieces = []  # largest difference, sum of squares, largest value; on the device, where a NaN stays one
    for start in range(0, want.numel(), PIECE):
        target = want[start : start + PIECE]
        difference = flat[start : start + PIECE].double() - target
        pieces.append(torch.stack([difference.abs().max(), difference.square().sum(), target.abs().max()]))
    table = torch.stack(pieces)
    largest, _, scale = table.max(0).values.tolist()
    return Errors(largest, (float(table[:, 1].sum()) / want.numel()) ** 0.5, scale)


def measure_yardstick(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, Errors]:
    """The errors of PyTorch's own op.

    Raises:
        ValueError: they are so large that the reference must be wrong; then nothing would be found wrong.
    """
    found = {name: errors(actual[name], want) for name, want in expected.items()}
    for name, error in found.items():
        if not error.largest <= SANE * error.scale:
            raise ValueError(f"{name}: PyTorch and the reference differ by {error.largest:.3e} of {error.scale:.3e}")
    return found


def judge(
    actual: dict[str, Tensor], expected: dict[str, Tensor], yardstick: dict[str, Errors], limit: float
) -> Verdict:
    """Compare every expected tensor.

    Args:
        actual, expected: tensors by name; the expected ones in float64.
        yardstick: the errors of PyTorch's own op, by the same names.
        limit: how many times the yardstick's error is still right.
    """
    wrong, ratios = [], {}
    for name, want in expected.items():
        if name not in actual:
            wrong.append(f"{name} is missing")
            continue
        got = actual[name]
        if got.shape != want.shape:
            wrong.append(f"{name}: shape {tuple(got.shape)}, expected {tuple(want.shape)}")
            continue
        if not bool(torch.isfinite(got).all()):
            wrong.append(f"{name}: {int((~torch.isfinite(got)).sum())} elements are not finite")
            continue
        ours, theirs = errors(got, want), yardstick[name]
        tiny = torch.finfo(got.dtype).eps * ours.scale
        ratios[name] = ours.rms / theirs.rms if theirs.rms else (1.0 if ours.rms <= tiny else float("inf"))
        if ours.largest > limit * theirs.largest + tiny:
            wrong.append(f"{name}: largest error {ours.largest:.3e}, PyTorch {theirs.largest:.3e}")
        elif ours.rms > limit * theirs.rms + tiny:
            wrong.append(f"{name}: rms error {ours.rms:.3e}, PyTorch {theirs.rms:.3e}")
    return Verdict(not wrong, "; ".join(wrong), ratios)

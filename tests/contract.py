"""The numerical contract: an op may err at most twice as much as PyTorch's own op in the same dtype.

Both errors are measured against the reference evaluated in float64, as the largest absolute difference and as the
root mean square of it. The absolute terms cover only cases where PyTorch happens to be exact: a unit in the last
place of the output's dtype at the largest magnitude for the largest difference, and a tenth of one at the root mean
square magnitude (a third of what correct rounding alone costs) for the root mean square.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Units in the last place granted beside twice PyTorch's error: at the largest magnitude of the expected tensor for
# the largest difference, at the root mean square magnitude for the root mean square.
MAX_ULPS = 1.0
RMS_ULPS = 0.1


def poisoned(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of NaN: whatever a kernel does not write shows up."""
    return torch.full(shape, float("nan"), dtype=dtype, device=device)


def errors(actual: Tensor, expected: Tensor) -> tuple[float, float]:
    """Largest absolute and root mean square difference to ``expected`` (float64)."""
    difference = (actual.detach().double().cpu() - expected.detach().double().cpu()).abs()
    if difference.numel() == 0:
        return 0.0, 0.0
    return float(difference.max()), float(difference.square().mean().sqrt())


def assert_within_contract(ours: Tensor, theirs: Tensor, expected: Tensor, what: str) -> None:
    """Fail unless ``ours`` is as close to ``expected`` as the contract asks.

    Args:
        ours: what the op under test returned.
        theirs: what PyTorch's own op returned for the same inputs in the same dtype.
        expected: the reference evaluated in float64.
        what: named in the failure.
    """
    assert ours.shape == expected.shape, f"{what}: shape {tuple(ours.shape)}, expected {tuple(expected.shape)}"
    assert ours.dtype == theirs.dtype, f"{what}: dtype {ours.dtype}, PyTorch gives {theirs.dtype}"
    assert expected.dtype == torch.float64, f"{what}: the expected tensor must be float64"
    assert torch.isfinite(ours).all(), f"{what}: {int((~torch.isfinite(ours)).sum())} elements are not finite"
    our_max, our_rms = errors(ours, expected)
    their_max, their_rms = errors(theirs, expected)
    scale_max, scale_rms = errors(expected, torch.zeros_like(expected))
    ulp = torch.finfo(ours.dtype).eps
    assert our_max <= 2 * their_max + MAX_ULPS * ulp * scale_max, (
        f"{what}: max error {our_max:.3e}, PyTorch {their_max:.3e}"
    )
    assert our_rms <= 2 * their_rms + RMS_ULPS * ulp * scale_rms, (
        f"{what}: rms error {our_rms:.3e}, PyTorch {their_rms:.3e}"
    )

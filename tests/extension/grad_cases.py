"""What embedding_grad must leave in its output, from a plan, in float64; and how far off a kernel may be."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from embedkernels.reference.embedding import ACCUMULATE, DENSE, PADDED_ROWS, ROWS
from tests.extension.cases import Plan

MODES = {"dense": DENSE, "accumulate": ACCUMULATE, "rows": ROWS, "padded_rows": PADDED_ROWS}
# (gradient rows, output)
PAIRS = (
    (torch.float32, torch.float32),
    (torch.float64, torch.float64),
    (torch.float16, torch.float16),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float32),
    (torch.bfloat16, torch.float32),
    (torch.float32, torch.float16),
    (torch.float32, torch.bfloat16),
)


@dataclass
class Expected:
    """By the definition.

    Attributes:
        out: the output in float64.
        bound: how far off each element may be: the sum's own rounding, addition by addition in any order, and that to
            the output's dtype.
        touched: rows of the output that a segment is written or added to.
    """

    out: Tensor
    bound: Tensor
    touched: Tensor


def expected_grad(
    out: Tensor,
    grad_rows: Tensor,
    made: Plan,
    mode: int,
    sources: Tensor | None = None,
    weights: Tensor | None = None,
    scale_by_freq: bool = False,
) -> Expected:
    """What ``embedding_grad`` makes of ``out``; all on the device of ``out``."""
    order, segment_ids, offsets, count = made
    segments = int(count)
    sizes = (offsets[1 : segments + 1] - offsets[:segments]).long()
    places = order[: int(sizes.sum())].long()
    segment = torch.arange(segments, device=out.device).repeat_interleave(sizes)
    if grad_rows.shape[0] == 0:
        grad_rows = grad_rows.new_zeros(1, grad_rows.shape[1])
        source = torch.full_like(places, -1)
    else:
        source = places if sources is None else sources.long()[places]
    there = (source >= 0) & (source < grad_rows.shape[0])
    addends = grad_rows[source.where(there, 0)].double()
    if weights is not None:
        addends = addends * weights.double()[places, None]
    addends = addends.masked_fill(~there[:, None], 0)
    sums = torch.zeros(segments, out.shape[1], dtype=torch.float64, device=out.device).index_add_(0, segment, addends)
    sizes_of_sums = torch.zeros_like(sums).index_add_(0, segment, addends.abs())
    if scale_by_freq:
        sums, sizes_of_sums = sums / sizes[:, None], sizes_of_sums / sizes[:, None]
    by_segment = mode in (ROWS, PADDED_ROWS)
    target = torch.arange(segments, device=out.device) if by_segment else segment_ids[:segments].long()
    there = (target >= 0) & (target < out.shape[0])
    target, sums, sizes_of_sums, sizes = (part[there] for part in (target, sums, sizes_of_sums, sizes))

    result = torch.zeros_like(out, dtype=torch.float64) if mode in (DENSE, PADDED_ROWS) else out.double()
    result[target] = result[target] + sums if mode == ACCUMULATE else sums
    wide = torch.float64 if grad_rows.dtype == torch.float64 else torch.float32
    # An addend is rounded once as a product, and once in every addition that it takes part in; the scale is rounded,
    # the product with it, and the addition of what was there.
    roundings = (sizes[:, None] + 4) * torch.finfo(wide).eps / 2
    bound = torch.zeros_like(result)
    bound[target] = roundings * sizes_of_sums
    kind = torch.finfo(out.dtype)
    bound = bound + (result.abs() + bound) * kind.eps / 2 + kind.smallest_normal * kind.eps
    if mode == ACCUMULATE:
        bound = bound + result.abs() * torch.finfo(wide).eps
    touched = torch.zeros(out.shape[0], dtype=torch.bool, device=out.device)
    touched[target] = True
    return Expected(result, bound, touched)


def assert_expected(out: Tensor, expected: Expected, what: str = "embedding_grad") -> None:
    """Fail unless every element is within its bound; where the definition says NaN (left as it was), NaN."""
    off = (out.double() - expected.out).abs()
    wrong = ~((off <= expected.bound) | (out.isnan() & expected.out.isnan()))
    if wrong.any():
        row, column = (int(place) for place in wrong.nonzero()[0])
        raise AssertionError(
            f"{what}: {int(wrong.sum())} elements are wrong, the first at ({row}, {column}):"
            f" {float(out[row, column])}, expected {float(expected.out[row, column])}"
            f" within {float(expected.bound[row, column]):.2e}"
        )

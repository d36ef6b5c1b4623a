"""Ids to try, and what a plan and a gradient must be for them."""

from __future__ import annotations

import torch
from torch import Tensor

from embedkernels.reference.random import philox

Plan = tuple[Tensor, Tensor, Tensor, Tensor]

# Each breaks something else: uniform ids make short segments, Zipf a few long ones among many short, one hot id and
# equal ids span tiles, distinct ids have one position each, sorted and reversed ids meet a stable sort's edge cases,
# padding leaves nothing, ids out of range leave holes.
DISTRIBUTIONS = (
    "uniform",
    "zipf",
    "hot",
    "equal",
    "distinct",
    "padding",
    "sorted",
    "reversed",
    "out_of_range",
    "two_rows",
)
PADDING = 1


def make_ids(distribution: str, n: int, rows: int, seed: int = 0, dtype: torch.dtype = torch.int64) -> Tensor:
    """``n`` ids for a table of ``rows`` rows."""
    random = torch.Generator().manual_seed(seed)
    uniform = torch.randint(0, rows, (n,), generator=random)
    if distribution == "zipf":
        weights = 1.0 / torch.arange(1, min(rows, 1 << 16) + 1, dtype=torch.float64)
        ids = torch.multinomial(weights, n, replacement=True, generator=random) if n else uniform
        ids = torch.randperm(len(weights), generator=random)[ids]
    elif distribution == "hot":
        ids = torch.where(torch.rand(n, generator=random) < 0.5, rows // 2, uniform)
    elif distribution == "equal":
        ids = torch.full((n,), rows - 1)
    elif distribution == "distinct":
        ids = torch.randperm(n, generator=random) * max(1, rows // max(n, 1)) % rows
    elif distribution == "padding":
        ids = torch.full((n,), PADDING)
    elif distribution == "sorted":
        ids = uniform.sort().values
    elif distribution == "reversed":
        ids = uniform.sort(descending=True).values
    elif distribution == "out_of_range":
        ids = torch.randint(-rows - 2, 2 * rows + 2, (n,), generator=random)
    elif distribution == "two_rows":
        ids = torch.randint(0, min(rows, 2), (n,), generator=random)
    else:
        ids = uniform
    return ids.to(dtype)


def kept(
    ids: Tensor, num_rows: int, padding_idx: int = -1, vocab_start: int = 0, ignored: Tensor | None = None
) -> Tensor:
    """Which ids count, by the definition: bool (N,)."""
    ids = ids.reshape(-1).cpu().long()
    local = ids - vocab_start
    keep = (local >= 0) & (local < num_rows) & (ids != padding_idx)
    return keep if ignored is None else keep & ~ignored.reshape(-1).cpu()


def check_plan(
    made: Plan,
    ids: Tensor,
    num_rows: int,
    padding_idx: int = -1,
    vocab_start: int = 0,
    ignored: Tensor | None = None,
) -> None:
    """Fail unless ``made`` is the plan, element by element."""
    order, segment_ids, offsets, count = (part.cpu() for part in made)
    n = ids.numel()
    assert [tuple(part.shape) for part in made] == [(n,), (n,), (n + 1,), (1,)]
    assert all(part.dtype == torch.int32 for part in made)
    positions = kept(ids, num_rows, padding_idx, vocab_start, ignored).nonzero().reshape(-1)
    local = (ids.reshape(-1).cpu().long() - vocab_start)[positions]
    by_row = torch.sort(local, stable=True)
    rows, sizes = torch.unique_consecutive(by_row.values, return_counts=True)
    assert int(count) == len(rows)
    assert torch.equal(order[: len(positions)].long(), positions[by_row.indices])
    assert torch.equal(segment_ids[: len(rows)].long(), rows)
    assert torch.equal(
        offsets[: len(rows) + 1].long(), torch.cat((torch.zeros(1, dtype=torch.long), sizes.cumsum(0)))
    )


def grad_reference(
    grad_rows: Tensor, ids: Tensor, num_rows: int, padding_idx: int = -1, vocab_start: int = 0
) -> Tensor:
    """The dense gradient in float64, on the device of ``grad_rows``."""
    keep = kept(ids, num_rows, padding_idx, vocab_start).to(grad_rows.device)
    rows = (ids.reshape(-1).long() - vocab_start)[keep]
    out = torch.zeros(num_rows, grad_rows.shape[1], dtype=torch.float64, device=grad_rows.device)
    return out.index_add_(0, rows, grad_rows[keep].double())


def grad_pytorch(
    grad_rows: Tensor, ids: Tensor, num_rows: int, padding_idx: int = -1, vocab_start: int = 0
) -> Tensor:
    """The dense gradient by PyTorch's own operator, in the dtype of ``grad_rows``."""
    keep = kept(ids, num_rows, padding_idx, vocab_start).to(grad_rows.device)
    rows = (ids.reshape(-1).long() - vocab_start).masked_fill(~keep.to(ids.device), 0)
    return torch.ops.aten.embedding_dense_backward(grad_rows * keep[:, None], rows, num_rows, -1, False)


def sum_reference(
    grad_rows: Tensor,
    ids: Tensor,
    num_rows: int,
    padding_idx: int = -1,
    *,
    sources: Tensor | None = None,
    weights: Tensor | None = None,
    scale_by_freq: bool = False,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """The dense gradient with sources, weights and the scale by frequency, added in ``dtype`` by ``index_add_``."""
    device = grad_rows.device
    ids = ids.reshape(-1).cpu().long()
    keep = kept(ids, num_rows, padding_idx)
    at, rows = keep.nonzero().reshape(-1).to(device), ids[keep].to(device)
    values = grad_rows[at if sources is None else sources[at].long()].to(dtype)
    if weights is not None:
        values = values * weights[at, None].to(dtype)
    out = torch.zeros(num_rows, grad_rows.shape[1], dtype=dtype, device=device).index_add_(0, rows, values)
    if scale_by_freq:
        out *= torch.bincount(rows, minlength=num_rows).clamp(min=1).to(dtype).reciprocal()[:, None]
    return out


def rounding_bits(seed: int, rows: Tensor, width: int) -> Tensor:
    """The 16 random bits of every column of the table's ``rows``: int64 (len(rows), width)."""
    groups = torch.arange((width + 7) // 8)
    words = torch.stack(philox(seed, groups[None, :], rows.long()[:, None]), dim=-1)
    halves = torch.stack((words & 0xFFFF, words >> 16), dim=-1)
    return halves.reshape(len(rows), -1)[:, :width]


def round_stochastically(values: Tensor, random16: Tensor) -> Tensor:
    """Float32 values as bfloat16: the upper half of bits + ``random16``; to nearest where they are not finite."""
    bits = (values.view(torch.int32).long() + random16) >> 16
    rounded = bits.to(torch.int16).view(torch.bfloat16)
    return torch.where(values.isfinite(), rounded, values.bfloat16())

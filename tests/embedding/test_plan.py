"""The plan: which positions meet in which row, in which order."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import embedkernels as ek
from embedkernels.ops.embedding_grad import EmbeddingPlan
from tests.embedding.cases import DISTRIBUTIONS, GRADIENT_BACKENDS, poisoned_memory


def segments(plan: EmbeddingPlan) -> list[tuple[int, list[int]]]:
    """The plan in words: (row, positions), from the elements that mean something."""
    count = int(plan.count)
    offsets = plan.segment_offsets.tolist()[: count + 1]
    order = plan.order.tolist()
    rows = plan.segment_ids.tolist()
    return [(rows[s], order[offsets[s] : offsets[s + 1]]) for s in range(count)]


def expected_segments(ids: Tensor, rows: int, padding_idx: int | None, start: int) -> list[tuple[int, list[int]]]:
    """The same, one position after the other."""
    meet: dict[int, list[int]] = {}
    for position, value in enumerate(ids.reshape(-1).tolist()):
        if start <= value < start + rows and value != padding_idx:
            meet.setdefault(value - start, []).append(position)
    return sorted(meet.items())


def check_form(plan: EmbeddingPlan, ids: Tensor, rows: int) -> None:
    n = ids.numel()
    for name, size in (("order", n), ("segment_ids", n), ("segment_offsets", n + 1), ("count", 1)):
        part = getattr(plan, name)
        assert (part.dtype, tuple(part.shape), part.device) == (torch.int32, (size,), ids.device), name
        assert part.is_contiguous(), name
    assert plan.num_rows == rows
    assert int(plan.segment_offsets[0]) == 0


@pytest.mark.parametrize("backend", GRADIENT_BACKENDS)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize(("n", "rows"), [(0, 5), (1, 1), (33, 1000), (257, 40), (5000, 1000), (5000, 1)])
def test_every_kept_position_is_in_the_segment_of_its_row_in_order(
    backend: str, distribution: str, n: int, rows: int, device: torch.device
) -> None:
    """Sorted by row, and within a row by position: the order is stable."""
    ids = DISTRIBUTIONS[distribution](n, rows).to(device)
    with poisoned_memory():
        plan = ek.embedding_plan(ids, rows, padding_idx=0, backend=backend)
    check_form(plan, ids, rows)
    assert segments(plan) == expected_segments(ids, rows, 0, 0)


@pytest.mark.parametrize("backend", GRADIENT_BACKENDS)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_ids_outside_the_shard_and_padding_are_dropped(
    backend: str, device: torch.device, data: st.DataObject
) -> None:
    """Padding and ids outside the shard are dropped: any ids, extremes of their dtype included, in any shape."""
    dtype = data.draw(st.sampled_from([torch.int32, torch.int64]))
    rows = data.draw(st.sampled_from([0, 1, 2, 7, 300, 70_000]))
    start = data.draw(st.sampled_from([0, 0, 1, 5, 2**31 - 3, 2**40]))
    info = torch.iinfo(dtype)
    near = st.integers(max(start - 3, info.min), min(start + rows + 3, info.max)) if start <= info.max else st.just(0)
    anywhere = st.integers(info.min, info.max)
    values = data.draw(st.lists(st.one_of(near, near, anywhere, st.just(info.min), st.just(info.max)), max_size=24))
    padding_idx = data.draw(st.none() | st.integers(start, start + rows + 2))
    ids = torch.tensor(values, dtype=dtype, device=device)
    if len(values) % 2 == 0:
        ids = ids.view(2, -1).t()  # not contiguous: positions are those of the flattened ids
    plan = ek.embedding_plan(ids, rows, padding_idx=padding_idx, vocab_start=start, backend=backend)
    check_form(plan, ids, rows)
    assert segments(plan) == expected_segments(ids, rows, padding_idx, start)


@pytest.mark.parametrize("rows", [1 << 15, (1 << 15) - 1, (1 << 15) + 1, 1 << 16, 1 << 20])
def test_keys_of_every_width_sort_alike(rows: int, device: torch.device) -> None:
    """The sort's keys are narrow for small tables: the largest id and the dropped ones are at the edge."""
    ids = torch.tensor([rows - 1, 0, rows, -1, rows - 1, 1, rows - 2, rows + 1], device=device)
    for backend in GRADIENT_BACKENDS:
        plan = ek.embedding_plan(ids, rows, backend=backend)
        assert segments(plan) == [(0, [1]), (1, [5]), (rows - 2, [6]), (rows - 1, [0, 4])], backend


def test_negative_padding_counts_from_the_end(device: torch.device) -> None:
    ids = torch.tensor([0, 9, 4, 9], device=device)
    assert segments(ek.embedding_plan(ids, 10, padding_idx=-1)) == [(0, [0]), (4, [2])]


@pytest.mark.gpu
@pytest.mark.parametrize("backend", GRADIENT_BACKENDS)
def test_nothing_waits_for_the_device(backend: str) -> None:
    ids = torch.randint(0, 1000, (4096,), device="cuda")
    grad = torch.randn(4096, 64, device="cuda")
    ek.embedding_grad(grad, ek.embedding_plan(ids, 1000, backend=backend), backend=backend)  # compile first
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        ek.embedding_grad(grad, ek.embedding_plan(ids, 1000, backend=backend), backend=backend)
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"ids": torch.zeros(3)}, TypeError, "ids must be int32 or int64, got torch.float32"),
        ({"ids": torch.zeros(3, dtype=torch.int16)}, TypeError, "ids must be int32 or int64, got torch.int16"),
        ({"ids": [1, 2]}, TypeError, "ids must be a Tensor, got list"),
        ({"num_embeddings": -1}, ValueError, "num_embeddings must be 0 to 2147483647, got -1"),
        ({"num_embeddings": 2**31}, ValueError, "num_embeddings must be 0 to 2147483647, got 2147483648"),
        (
            {"padding_idx": -11},
            ValueError,
            "padding_idx -11 is out of range for a table of 10 rows: expected -10 to 9",
        ),
        ({"vocab_start": -1}, ValueError, "vocab_start must be 0 to"),
        ({"vocab_start": 10, "padding_idx": -1}, ValueError, "padding_idx must not be negative with vocab_start"),
        ({"backend": "cuda"}, ValueError, "backend must be one of extension, triton, torch or auto, got 'cuda'"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, object], error: type[Exception], text: str) -> None:
    given = {"ids": torch.zeros(3, dtype=torch.int64), "num_embeddings": 10, **arguments}
    with pytest.raises(error, match=text):
        ek.embedding_plan(**given)

"""The plan: which positions meet in which row, in which order."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import embedkernels as ek
from embedkernels.ops.embedding_grad import EmbeddingPlan
from tests.embedding.cases import DISTRIBUTIONS, GRADIENT_BACKENDS, poisoned_memory
from tests.properties import examples


def segments(plan: EmbeddingPlan) -> list[tuple[int, list[int]]]:
    """The plan in words: (row, positions), from the elements that mean something."""
    count = int(plan.count)
    offsets = plan.segment_offsets.tolist()[: count + 1]
    order = plan.order.tolist()
    rows = plan.segment_ids.tolist()
    return [(rows[s], order[offsets[s] : offsets[s + 1]]) for s in range(count)]


def expected_segments(
    ids: Tensor, rows: int, padding_idx: int | None, start: int, ignored: Tensor | None = None
) -> list[tuple[int, list[int]]]:
    """The same, one position after the other."""
    meet: dict[int, list[int]] = {}
    dropped = torch.zeros_like(ids, dtype=torch.bool) if ignored is None else ignored
    for position, (value, drop) in enumerate(
        zip(ids.reshape(-1).tolist(), dropped.reshape(-1).tolist(), strict=True)
    ):
        if start <= value < start + rows and value != padding_idx and not drop:
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
@examples(60)
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
    more = data.draw(st.integers(0, 3))  # rows of the table behind the shard
    padding_idx = data.draw(st.none() | st.integers(start, start + rows + more - 1)) if rows + more else None
    ids = torch.tensor(values, dtype=dtype, device=device)
    ignored = torch.tensor(data.draw(st.lists(st.booleans(), min_size=len(values), max_size=len(values)))).to(device)
    if len(values) % 2 == 0:
        # Not contiguous: positions are those of the flattened ids.
        ids, ignored = ids.view(2, -1).t(), ignored.bool().view(2, -1).t()
    ignored, masked = ignored.bool(), data.draw(st.booleans())
    plan = ek.embedding_plan(
        ids, start + rows + more, padding_idx=padding_idx, ignore=ignored if masked else None, vocab_start=start,
        vocab_end=start + rows, backend=backend,
    )  # fmt: skip
    check_form(plan, ids, rows)
    assert segments(plan) == expected_segments(ids, rows, padding_idx, start, ignored if masked else None)


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


@pytest.mark.parametrize("backend", GRADIENT_BACKENDS)
def test_an_id_to_ignore_is_taken_as_it_is(backend: str, device: torch.device) -> None:
    """-100 marks what has no label, and is no row counted from the end."""
    ids = torch.tensor([4, -100, 9, 4, 0], device=device)
    for ignore, rest in ((4, [(0, [4]), (9, [2])]), (-100, [(0, [4]), (4, [0, 3]), (9, [2])])):
        assert segments(ek.embedding_plan(ids, 10, ignore=ignore, backend=backend)) == rest


@pytest.mark.parametrize("backend", GRADIENT_BACKENDS)
def test_opcheck(backend: str, device: torch.device) -> None:
    ids = torch.randperm(17, device=device)  # every position and row is kept: nothing is left undefined
    torch.library.opcheck(torch.ops.embedkernels.embedding_plan.default, (ids, 17, -1, 0, None, backend))


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
        ({"num_embeddings": -1}, ValueError, "num_embeddings must be 0 to .*, got -1"),
        ({"num_embeddings": 2**31}, ValueError, "at most 2147483647 rows, got 2147483648"),
        ({"num_embeddings": 2.5}, TypeError, "num_embeddings must be an int, got float"),
        (
            {"padding_idx": -11},
            ValueError,
            "padding_idx -11 is out of range for a table of 10 rows: expected -10 to 9",
        ),
        ({"vocab_start": -1}, ValueError, "must be a part of the table's 10 rows, got -1 and 10"),
        ({"vocab_start": 5, "vocab_end": 4}, ValueError, "must be a part of the table's 10 rows, got 5 and 4"),
        ({"vocab_end": 11}, ValueError, "must be a part of the table's 10 rows, got 0 and 11"),
        ({"vocab_end": "3"}, TypeError, "vocab_end must be an int, got str"),
        ({"ignore": torch.zeros(3)}, TypeError, "ignore must be a bool tensor or an int, got torch.float32"),
        (
            {"ignore": torch.zeros(4, dtype=torch.bool)},
            ValueError,
            r"ignore must have the shape of ids, \(3,\), got \(4,\)",
        ),
        ({"ignore": "x"}, TypeError, "ignore must be an int, got str"),
        (
            {"ignore": 3, "padding_idx": 2},
            ValueError,
            "give one id to ignore, as padding_idx or as ignore; got 2 and 3",
        ),
        ({"backend": "cuda"}, ValueError, "backend must be one of extension, triton, torch or auto, got 'cuda'"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, object], error: type[Exception], text: str) -> None:
    given = {"ids": torch.zeros(3, dtype=torch.int64), "num_embeddings": 10, **arguments}
    with pytest.raises(error, match=text):
        ek.embedding_plan(**given)

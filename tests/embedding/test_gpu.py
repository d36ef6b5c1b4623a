"""What only a GPU can show: sizes beyond 2**31, a second device, no waiting, and capture in a CUDA graph."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import embedkernels as ek
from tests.embedding.cases import GRADIENT_BACKENDS

pytestmark = pytest.mark.gpu

Run = Callable[[], list[Tensor]]
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


def leaf(*shape: int, device: Any, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, device=device, dtype=dtype).requires_grad_()


def with_gradients(call: Callable[[], Tensor], leaves: list[Tensor]) -> Run:
    """The call and its backward pass with a fixed upstream gradient, made once: nothing is drawn but dropout."""
    upstream = torch.randn_like(call().detach())

    def run() -> list[Tensor]:
        y = call()
        return [y.detach(), *torch.autograd.grad(y, leaves, upstream)]

    return run


def runs(device: Any, dropout_p: float) -> dict[str, Run]:
    """Forward and backward of each op on the Triton backend."""
    ids = torch.randint(0, 500, (4, 48), device=device)
    tables = {name: leaf(rows, 64, device=device) for name, rows in (("word", 500), ("position", 48), ("kind", 2))}
    norm = {name: leaf(64, device=device) for name in ("norm_weight", "norm_bias")}
    type_ids = torch.randint(0, 2, (4, 48), device=device)
    query, key, value = (leaf(2, 4, 70, 64, device=device, dtype=torch.bfloat16) for _ in range(3))
    mask = torch.arange(70, device=device) < torch.tensor([[70], [33]], device=device)
    backend: Any = "triton"
    return {
        "embed": with_gradients(
            lambda: ek.embed(
                ids, tables["word"], position_weight=tables["position"], type_weight=tables["kind"],
                type_ids=type_ids, norm="layer", dropout_p=dropout_p, padding_idx=0, backend=backend, **norm,
            ),
            [*tables.values(), *norm.values()],
        ),
        "embedding": with_gradients(
            lambda: ek.embedding(ids, tables["word"], padding_idx=0, backend=backend), [tables["word"]]
        ),
        "attention": with_gradients(
            lambda: ek.attention(query, key, value, None, dropout_p, True, key_mask=mask, backend=backend),
            [query, key, value],
        ),
    }  # fmt: skip


OPS = ["embed", "embedding", "attention"]


@contextlib.contextmanager
def syncs_are_errors() -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("op", OPS)
def test_nothing_waits_for_the_device(op: str, dropout_p: float) -> None:
    run = runs("cuda", dropout_p)[op]
    run()  # compiles, and sets up the record of bad ids
    with syncs_are_errors():
        run()
    ek.check_errors()


def captured(run: Run) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
    """A graph of ``run`` and the tensors that a replay fills; warmed up on a side stream, as PyTorch asks."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    return graph, out


@pytest.mark.parametrize("op", OPS)
def test_a_graph_gives_the_bits_of_eager(op: str) -> None:
    run = runs("cuda", 0.0)[op]
    expected = run()
    graph, out = captured(run)
    for _ in range(2):
        for tensor in out:
            tensor.fill_(float("nan"))
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(out, expected, strict=True))


@pytest.mark.parametrize("op", ["embed", "attention"])
def test_every_replay_draws_another_mask(op: str) -> None:
    """The draw of the seed is captured, and PyTorch advances the generator from replay to replay."""
    graph, out = captured(runs("cuda", 0.5)[op])
    results = []
    for _ in range(3):
        graph.replay()
        results.append([tensor.clone() for tensor in out])
    for i, first in enumerate(results):
        assert all(torch.isfinite(tensor).all() for tensor in first)
        for second in results[:i]:
            assert not torch.equal(first[0], second[0])
            assert not torch.equal(first[1], second[1])


@pytest.mark.parametrize("op", ["embed", "embedding"])
def test_a_bad_id_in_a_replay_is_raised_after_it(op: str) -> None:
    """The record belongs to no graph: it is the same before, between and after replays."""
    ids = torch.zeros(8, dtype=torch.int64, device="cuda")
    weight = torch.randn(10, 16, device="cuda")

    def run() -> list[Tensor]:
        return [getattr(ek, op)(ids, weight, backend="triton")]

    graph, out = captured(run)
    for bad in (10, 77):
        ids[5] = bad
        graph.replay()
        with pytest.raises(IndexError, match=f"^{op}: token id {bad} at position 5"):
            ek.check_errors()
        ids[5] = 3
        graph.replay()
        ek.check_errors()
        assert torch.equal(out[0], weight[ids])


@two_gpus
@pytest.mark.parametrize("op", OPS)
def test_on_a_device_that_is_not_the_current_one(op: str) -> None:
    with torch.cuda.device(1):
        run = runs("cuda:1", 0.0)[op]
        expected = run()
    with torch.cuda.device(0):
        ours = run()
        torch.cuda.synchronize(1)
    assert all(a.device == torch.device("cuda:1") for a in ours)
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
    ek.check_errors()


@two_gpus
@pytest.mark.parametrize("backend", GRADIENT_BACKENDS)
def test_the_gradient_on_a_device_that_is_not_the_current_one(backend: Any) -> None:
    ids, rows = torch.randint(0, 50, (300,), device="cuda:1"), torch.randn(300, 64, device="cuda:1")

    def run() -> Tensor:
        return ek.embedding_grad(rows, ek.embedding_plan(ids, 50, backend=backend), backend=backend)

    with torch.cuda.device(1):
        expected = run()
    with torch.cuda.device(0):
        assert torch.equal(run(), expected)


@two_gpus
def test_a_bad_id_on_another_device_is_raised() -> None:
    weight = torch.zeros(10, 4, device="cuda:1")
    with torch.cuda.device(0):
        ek.embedding(torch.tensor([10], device="cuda:1"), weight, backend="triton")
        with pytest.raises(IndexError, match="token id 10 at position 0"):
            ek.check_errors("cuda:1")
        ek.check_errors()


@pytest.mark.parametrize("op", OPS[:2])
@pytest.mark.parametrize("long", ["output", "table"])
def test_beyond_2_31_elements(op: str, long: str) -> None:
    """N·D or V·D above 2**31: the last rows are those that a 32-bit offset would miss."""
    width = 1024
    many = 2**31 // width + 1000
    rows, n = (many, 2000) if long == "table" else (2000, many)
    if torch.cuda.mem_get_info()[0] < 3 * many * width:
        pytest.skip("needs 7 GB of GPU memory")
    weight = torch.zeros(rows, width, dtype=torch.bfloat16, device="cuda")
    weight += torch.arange(rows, device="cuda").remainder(251)[:, None]  # whole numbers: exact in bfloat16
    places = torch.arange(n, device="cuda")
    ids = rows - 1 - places if long == "table" else places % rows
    call: Any = ek.embed if op == "embed" else ek.embedding
    with torch.no_grad():
        y = call(ids, weight, backend="triton")
    expected = ids.remainder(251).to(torch.bfloat16)
    for first in range(0, n, 1 << 18):
        part = slice(first, first + (1 << 18))
        assert bool((y[part] == expected[part, None]).all()), first
    ek.check_errors()


def stepped(backend: Any, ids: Tensor, rows: Tensor, table: int) -> list[Tensor]:
    """A plan and its gradient in every mode."""
    plan = ek.embedding_plan(ids, table, padding_idx=1, backend=backend)
    buffer = torch.ones(table, rows.shape[1], device="cuda")
    found = ek.embedding_grad(rows, plan, mode="rows", backend=backend)
    assert isinstance(found, ek.RowGradient)
    dense = ek.embedding_grad(rows, plan, backend=backend)
    assert isinstance(dense, Tensor)
    ek.embedding_grad(rows, plan, out=buffer, backend=backend)
    return [dense, buffer, found.values, found.count]


@pytest.mark.parametrize("backend", GRADIENT_BACKENDS)
@pytest.mark.parametrize("n", [300, 4096, 5000, 40_000, 140_000])
def test_a_captured_gradient_serves_changed_ids(backend: Any, n: int) -> None:
    """One launch of the plan or several; other ids, another number of rows in use."""
    table = 3000
    ids = torch.randint(0, table, (n,), device="cuda")
    rows = torch.randn(n, 136, device="cuda").bfloat16()
    graph, out = captured(lambda: stepped(backend, ids, rows, table))
    for draw in ("uniform", "hot", "padding"):
        ids.random_(0, table)
        if draw == "hot":
            ids[: n // 2] = 17
        elif draw == "padding":
            ids.fill_(1)
        rows.normal_()
        graph.replay()
        expected = stepped(backend, ids, rows, table)
        count = int(expected[3])
        assert torch.equal(out[0], expected[0]), draw
        assert torch.equal(out[1], expected[1]), draw
        assert torch.equal(out[2][:count], expected[2][:count]), draw
        assert int(out[3]) == count, draw


@pytest.mark.parametrize("backend", GRADIENT_BACKENDS)
@pytest.mark.parametrize("n", [1, 255, 4096, 4097, 65_536, 65_537, 200_000])
@pytest.mark.parametrize("rows", [1, 2, 40, 30_522, 128_256, 1_000_000])
def test_plans_of_every_size(backend: Any, n: int, rows: int) -> None:
    """Keys packed with positions and keys beside them, one launch and several: all are the stable sort."""
    for ids in (torch.randint(-5, rows + 5, (n,), device="cuda"), torch.randint(0, rows, (n,), device="cuda").int()):
        plan = ek.embedding_plan(ids, rows, backend=backend)
        kept = ((ids >= 0) & (ids < rows)).nonzero().reshape(-1)
        order = kept[ids[kept].long().sort(stable=True).indices]
        used, sizes = ids[order].long().unique_consecutive(return_counts=True)
        count = int(plan.count)
        assert count == used.numel()
        assert torch.equal(plan.order[: kept.numel()].long(), order)
        assert torch.equal(plan.segment_ids[:count].long(), used)
        assert torch.equal(plan.segment_offsets[1 : count + 1].long(), sizes.cumsum(0))
        assert int(plan.segment_offsets[0]) == 0


@pytest.mark.parametrize("backend", GRADIENT_BACKENDS)
@pytest.mark.parametrize("mode", ["dense", "accumulate", "rows"])
def test_a_gradient_beyond_2_31_elements(backend: Any, mode: Any) -> None:
    """N·D above 2**31, and V·D too: what a 32-bit offset would miss."""
    width, many = 1024, 2**31 // 1024 + 3
    copies = 12 if backend == "torch" else 5  # plain PyTorch adds whole rows in fp32, step by step
    if torch.cuda.mem_get_info()[0] < copies * many * width * 2:
        pytest.skip(f"needs {copies * many * width * 2 >> 30} GB of GPU memory")
    rows = torch.ones(many, width, dtype=torch.bfloat16, device="cuda")
    ids = torch.arange(many - 1, -1, -1, device="cuda")
    ids[0] = 0  # the first and the last gradient row meet in row 0; the last row of the table has none
    plan = ek.embedding_plan(ids, many, backend=backend)
    out = torch.ones(many, width, dtype=torch.bfloat16, device="cuda") if mode == "accumulate" else None
    found = ek.embedding_grad(rows, plan, mode=mode, out=out, backend=backend)
    sums = found.values[: many - 1] if isinstance(found, ek.RowGradient) else found
    extra = 1.0 if mode == "accumulate" else 0.0
    expected = torch.ones(sums.shape[0], device="cuda") + extra
    expected[0] += 1
    if mode != "rows":
        expected[-1] = extra
    assert torch.equal(sums[:, 0].float(), expected)
    assert torch.equal(sums[:, -1].float(), expected)


@pytest.mark.parametrize("backend", GRADIENT_BACKENDS)
def test_the_workspace_is_an_eighth_of_the_gradient_rows(backend: Any) -> None:
    n, width, table = 131_072, 1024, 50
    ids, rows = torch.randint(0, table, (n,), device="cuda"), torch.randn(n, width, device="cuda").bfloat16()
    plan = ek.embedding_plan(ids, table, backend=backend)
    if backend == "torch":
        pytest.skip("plain PyTorch makes copies of slabs")
    ek.embedding_grad(rows, plan, backend=backend)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = ek.embedding_grad(rows, plan, backend=backend)
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before <= n * width // 8 + (1 << 20)
    del kept

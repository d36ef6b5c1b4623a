"""The gradient of a table: as close to the truth as asked, written everywhere, the same bits every time."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import embedkernels as ek
from embedkernels.ops.backend import interpreting
from embedkernels.ops.embedding_grad import EmbeddingPlan
from tests.contract import assert_within_contract, errors
from tests.embedding.cases import (
    DISTRIBUTIONS,
    DTYPES,
    GRADIENT_BACKENDS,
    equal,
    fits,
    hot,
    poisoned_memory,
    uniform,
    zipf,
)
from tests.properties import examples

backward = torch.ops.embedkernels.embedding_backward


def expected_gradient(grad_rows: Tensor, ids: Tensor, rows: int, padding_idx: int = -1) -> Tensor:
    """In float64, one row after the other."""
    out = torch.zeros(rows, grad_rows.shape[-1], dtype=torch.float64)
    flat, values = (
        grad_rows.detach().double().cpu().reshape(ids.numel(), grad_rows.shape[-1]),
        ids.reshape(-1).tolist(),
    )
    kept = [i for i, value in enumerate(values) if 0 <= value < rows and value != padding_idx]
    return out.index_add_(0, torch.tensor([values[i] for i in kept], dtype=torch.int64), flat[kept])


def stock_gradient(grad_rows: Tensor, ids: Tensor, rows: int, padding_idx: int | None = None) -> Tensor:
    weight = torch.zeros(
        rows, grad_rows.shape[-1], dtype=grad_rows.dtype, device=grad_rows.device, requires_grad=True
    )
    F.embedding(ids, weight, padding_idx=padding_idx).backward(grad_rows)
    assert weight.grad is not None
    return weight.grad


@pytest.mark.parametrize("backend", GRADIENT_BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_contract(backend: str, dtype: torch.dtype, distribution: str, device: torch.device) -> None:
    """Many ids on few rows, few on many, and more than one block of columns."""
    for n, rows, width in [(5000, 40, 16), (700, 1000, 64)]:
        n, rows = fits(backend, device, n, 80), fits(backend, device, rows, 200)
        ids = DISTRIBUTIONS[distribution](n, rows).to(device)
        grad_rows = torch.randn(n, width, device=device).to(dtype)
        with poisoned_memory():
            ours = backward(grad_rows, ids, rows, 0, backend)
        what = f"{n} ids, {rows} rows of {width}"
        expected = expected_gradient(grad_rows, ids, rows, 0)
        assert_within_contract(ours, stock_gradient(grad_rows, ids, rows, 0), expected, what)
        assert torch.equal(ours[0], torch.zeros_like(ours[0])), f"{what}: the padding row has a gradient"


@pytest.mark.parametrize("backend", GRADIENT_BACKENDS)
def test_float64_is_added_in_float64(backend: str, device: torch.device) -> None:
    n = fits(backend, device, 3000)
    ids, grad_rows = zipf(n, 50).to(device), torch.randn(n, 33, dtype=torch.float64, device=device)
    ours = backward(grad_rows, ids, 50, -1, backend)
    assert ours.dtype == torch.float64
    assert errors(ours, expected_gradient(grad_rows, ids, 50))[0] < 1e-12


@pytest.mark.parametrize("backend", GRADIENT_BACKENDS)
@pytest.mark.parametrize("n", [0, 1, 31, 32, 33, 64, 65, 127])
def test_sizes_around_a_tile(backend: str, n: int, device: torch.device) -> None:
    """Odd row sizes, tables that end within a block of rows, segments that are cut by a tile's edge or end at it."""
    for rows, width in [(1, 3), (2, 33), (64, 1), (65, 7), (130, 3)]:
        ids, grad_rows = zipf(n, rows).to(device), torch.randn(n, width, device=device)
        with poisoned_memory():
            ours = backward(grad_rows, ids, rows, -1, backend)
        assert_within_contract(
            ours, stock_gradient(grad_rows, ids, rows), expected_gradient(grad_rows, ids, rows), f"{rows} x {width}"
        )


@pytest.mark.parametrize("backend", GRADIENT_BACKENDS)
@pytest.mark.parametrize("width", [128, 300, 384, 1100, 2048])
def test_row_sizes(backend: str, width: int, device: torch.device) -> None:
    """One block of columns, several, and a last one that is not full."""
    ids, grad_rows = hot(70, 9).to(device), torch.randn(70, width, device=device)
    with poisoned_memory():
        ours = backward(grad_rows, ids, 9, -1, backend)
    assert_within_contract(ours, stock_gradient(grad_rows, ids, 9), expected_gradient(grad_rows, ids, 9), str(width))


@pytest.mark.parametrize("backend", GRADIENT_BACKENDS)
@pytest.mark.parametrize("distribution", [equal, hot, zipf])
def test_16_bit_sums_do_not_stall(backend: str, distribution, device: torch.device) -> None:  # type: ignore[no-untyped-def]
    """Added one by one in bfloat16, a row stops growing once it is 256 times its addends."""
    n, rows = fits(backend, device, 4000, 400), 20
    ids = distribution(n, rows).to(device)
    grad_rows = (1 + 0.1 * torch.randn(n, 8, device=device)).bfloat16()
    expected = expected_gradient(grad_rows, ids, rows)
    sequential = torch.zeros(rows, 8, dtype=torch.bfloat16)
    for row, value in zip(grad_rows.cpu(), ids.tolist(), strict=True):
        sequential[value] += row
    ours = backward(grad_rows, ids, rows, -1, backend)
    for ours_error, sequential_error in zip(errors(ours, expected), errors(sequential, expected), strict=True):
        assert ours_error < sequential_error
    # Rounded once, so at most half a unit in the last place from the truth, and a little of fp32's error. Triton's
    # interpreter does not round to nearest: a whole unit.
    units = 1.001 if backend == "triton" and interpreting() else 0.501
    distance = (ours.cpu().double() - expected).abs()
    assert bool((distance <= units * torch.finfo(torch.bfloat16).eps * expected.abs()).all())


@pytest.mark.parametrize("backend", GRADIENT_BACKENDS)
def test_same_bits_in_every_run(backend: str, device: torch.device) -> None:
    n = fits(backend, device, 20_000)
    ids, grad_rows = hot(n, 300).to(device), torch.randn(n, 64, device=device)
    first = backward(grad_rows, ids, 300, -1, backend)
    for _ in range(3):
        assert torch.equal(backward(grad_rows, ids, 300, -1, backend), first)


@pytest.mark.parametrize("backend", [b for b in GRADIENT_BACKENDS if b != "triton"])
@pytest.mark.usefixtures("threads")
def test_same_bits_for_every_number_of_threads(backend: str) -> None:
    ids, grad_rows = hot(6000, 50), torch.randn(6000, 48)
    plan = ek.embedding_plan(ids, 50)
    results = []
    for count in (1, 2, 3, 8):
        torch.set_num_threads(count)
        results.append(
            (backward(grad_rows, ids, 50, -1, backend), ek.embedding_grad(grad_rows, plan, backend=backend))
        )
    for op, function in results[1:]:
        assert torch.equal(op, results[0][0])
        assert torch.equal(function, results[0][1])


@pytest.mark.parametrize("planner", GRADIENT_BACKENDS)
@pytest.mark.parametrize("backend", GRADIENT_BACKENDS)
def test_any_backend_takes_any_plan(planner: str, backend: str, device: torch.device) -> None:
    """What a plan holds behind its last segment means nothing: it may be anything."""
    ids, grad_rows = uniform(90, 60).to(device), torch.randn(90, 5, device=device)
    plan = ek.embedding_plan(ids, 30, padding_idx=3, backend=planner)
    count = int(plan.count)
    kept = int(plan.segment_offsets[count])
    for part, used in ((plan.order, kept), (plan.segment_ids, count), (plan.segment_offsets, count + 1)):
        part[used:] = torch.randint(-(2**31), 2**31, part[used:].shape)
    with poisoned_memory():
        ours = ek.embedding_grad(grad_rows, plan, backend=backend)
    expected = expected_gradient(grad_rows, ids.clamp(max=30), 30, 3)
    assert_within_contract(ours, stock_gradient(grad_rows, ids, 60)[:30], expected, f"{planner} plan")


@pytest.mark.parametrize("backend", GRADIENT_BACKENDS)
def test_a_shard_takes_its_rows_only(backend: str, device: torch.device) -> None:
    ids, grad_rows = uniform(100, 40).to(device), torch.randn(4, 25, 6, device=device)
    parts = [
        ek.embedding_grad(
            grad_rows,
            ek.embedding_plan(ids, 40, vocab_start=start, vocab_end=end, padding_idx=17, backend=backend),
            backend=backend,
        )
        for start, end in ((0, 10), (10, 20), (20, 30), (30, None))
    ]
    assert errors(torch.cat(parts), expected_gradient(grad_rows, ids, 40, 17))[0] < 1e-5


@pytest.mark.parametrize("backend", GRADIENT_BACKENDS)
def test_ids_out_of_range_are_dropped(backend: str, device: torch.device) -> None:
    ids = torch.tensor([3, -1, 10, 2**40, -(2**40), 3], device=device)
    grad_rows = torch.randn(6, 4, device=device)
    ours = backward(grad_rows, ids, 10, -1, backend)
    assert errors(ours, expected_gradient(grad_rows, ids, 10))[0] < 1e-6


@pytest.mark.parametrize("backend", GRADIENT_BACKENDS)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_gradients_and_ids_of_any_stride(backend: str, dtype: torch.dtype, device: torch.device) -> None:
    ids = uniform(48, 11).to(device, dtype).view(4, 12)
    wide = torch.randn(4, 12, 40, device=device)
    for name, grad_rows, its_ids in [
        ("slice", wide[..., 3:36], ids),
        ("transposed rows", wide.transpose(0, 1), ids.t()),
        ("transposed elements", torch.randn(33, 12, 4, device=device).permute(2, 1, 0), ids),
        ("expanded rows", torch.randn(1, 1, 33, device=device).expand(4, 12, 33), ids),
        ("expanded elements", torch.randn(4, 12, 1, device=device).expand(4, 12, 33), ids),
        ("expanded scalar", torch.randn((), device=device).expand(4, 12, 33), ids),
        ("strided ids", torch.randn(4, 6, 33, device=device), ids[:, ::2]),
    ]:
        ours = backward(grad_rows, its_ids, 11, 2, backend)
        assert errors(ours, expected_gradient(grad_rows, its_ids, 11, 2))[0] < 1e-5, name


@pytest.mark.parametrize("backend", GRADIENT_BACKENDS)
@pytest.mark.parametrize(("n", "rows", "width"), [(0, 5, 4), (5, 0, 4), (5, 5, 0), (0, 0, 0)])
def test_nothing_to_add(backend: str, n: int, rows: int, width: int, device: torch.device) -> None:
    ids, grad_rows = torch.zeros(n, dtype=torch.int64, device=device), torch.randn(n, width, device=device)
    with poisoned_memory():
        ours = backward(grad_rows, ids, rows, -1, backend)
        planned = ek.embedding_grad(grad_rows, ek.embedding_plan(ids, rows, backend=backend), backend=backend)
    expected = expected_gradient(grad_rows, ids, rows).float()
    assert torch.equal(ours.cpu(), expected)
    assert torch.equal(planned.cpu(), expected)


@pytest.mark.skipif("triton" not in GRADIENT_BACKENDS, reason="triton is not installed")
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_carries_over_many_tiles(distribution: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of one group: segments over 80 of them, more than one carry program takes at a time."""
    from embedkernels.kernels import embedding_grad as kernels

    monkeypatch.setattr(kernels, "MIN_ROWS", kernels.GROUP)
    n = 83 * kernels.GROUP + 3
    assert n > (kernels.CARRY_ROWS + 1) * kernels.tile_rows(n)
    ids, grad_rows = DISTRIBUTIONS[distribution](n, 12).to(device), torch.randn(n, 5, device=device)
    with poisoned_memory():
        ours = backward(grad_rows, ids, 12, -1, "triton")
    assert_within_contract(ours, stock_gradient(grad_rows, ids, 12), expected_gradient(grad_rows, ids, 12), "carries")


@pytest.mark.skipif("triton" not in GRADIENT_BACKENDS, reason="triton is not installed")
def test_tiles_hold_whole_groups_and_stay_few() -> None:
    """Both kernels rely on it: a tile that ended within a group would add the next tile's rows twice."""
    from embedkernels.kernels import embedding_grad as kernels

    for n in (1, 31, 32, 33, 32_768, 32_769, 1_000_000, 2**31 - 1):
        rows = kernels.tile_rows(n)
        assert rows % kernels.GROUP == 0
        assert -(-n // rows) <= kernels.MAX_TILES


@pytest.mark.gpu
@pytest.mark.parametrize("backend", GRADIENT_BACKENDS)
def test_beyond_32_bit_offsets(backend: str) -> None:
    """N·D and V·D above 2**31 elements: the last rows of both."""
    rows, width = 2**31 // 1024 + 100, 1024
    ids = torch.full((rows,), rows - 1, device="cuda")
    ids[:-2] = torch.arange(rows - 2, device="cuda")
    grad_rows = torch.ones(rows, width, dtype=torch.bfloat16, device="cuda")
    ours = backward(grad_rows, ids, rows, -1, backend)
    assert bool((ours[:-2] == 1).all())
    assert bool((ours[-2] == 0).all())
    assert bool((ours[-1] == 2).all())


@pytest.mark.parametrize("backend", GRADIENT_BACKENDS)
@examples(25)
@given(data=st.data())
def test_any_ids_at_all(backend: str, device: torch.device, data: st.DataObject) -> None:
    """Small integers add exactly in fp32: every backend must give the very number."""
    rows = data.draw(st.integers(1, 140))
    width = data.draw(st.sampled_from([1, 2, 3, 8, 17]))
    ids = torch.tensor(data.draw(st.lists(st.integers(-1, rows), max_size=100)), dtype=torch.int64, device=device)
    padding_idx = data.draw(st.integers(-1, rows - 1))
    generator = torch.Generator().manual_seed(len(ids))
    grad_rows = torch.randint(-8, 9, (len(ids), width), generator=generator).float().to(device)
    with poisoned_memory():
        ours = backward(grad_rows, ids, rows, padding_idx, backend)
    assert torch.equal(ours.cpu(), expected_gradient(grad_rows, ids, rows, padding_idx).float())


@pytest.mark.parametrize("backend", GRADIENT_BACKENDS)
def test_opcheck(backend: str, device: torch.device) -> None:
    ids = uniform(30, 9).to(device).view(3, 10)
    for grad_rows in (
        torch.randn(3, 10, 8, device=device),
        torch.randn(30, 8, device=device, requires_grad=True),
        torch.randn(3, 8, 10, device=device).transpose(1, 2),
        torch.randn(3, 10, 8, device=device).bfloat16(),
    ):
        torch.library.opcheck(backward, (grad_rows, ids, 9, 2, backend))


def test_the_gradient_of_the_gradient(device: torch.device) -> None:
    """embedding_backward is linear in the gradient rows; its own gradient looks rows up, dropped ids give zeros."""
    ids = torch.tensor([[1, 0, 3], [1, -5, 99]], device=device)
    rows = torch.randn(2, 3, 4, dtype=torch.float64, device=device, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: backward(x, ids, 5, 0), (rows,))
    assert torch.autograd.gradgradcheck(lambda x: backward(x, ids, 5, 0).pow(3), (rows,))


@pytest.mark.parametrize(
    ("shape", "dtype", "error", "text"),
    [
        ((6, 4), torch.float32, ValueError, r"one row for each of the 5 ids, got shape \(6, 4\)"),
        ((4,), torch.float32, ValueError, r"one row for each of the 5 ids, got shape \(4,\)"),
        ((), torch.float32, ValueError, r"one row for each of the 5 ids, got shape \(\)"),
        (
            (5, 4),
            torch.int64,
            TypeError,
            "must be one of float32, bfloat16, float16, float64, got torch.int64",
        ),
        ((5, 4), torch.complex64, TypeError, "got torch.complex64"),
    ],
)
def test_bad_gradients_are_named(
    shape: tuple[int, ...], dtype: torch.dtype, error: type[Exception], text: str
) -> None:
    ids = torch.zeros(5, dtype=torch.int64)
    grad_rows = torch.zeros(shape, dtype=dtype)
    with pytest.raises(error, match=f"embedding_grad: .*{text}"):
        ek.embedding_grad(grad_rows, ek.embedding_plan(ids, 3))
    with pytest.raises(error, match=f"embedding_backward: .*{text}"):
        backward(grad_rows, ids, 3, -1)


def test_bad_rows_and_ids_are_named() -> None:
    grad_rows, ids = torch.zeros(5, 4), torch.zeros(5, dtype=torch.int64)
    with pytest.raises(ValueError, match="num_rows must be 0 to 2147483647, got -1"):
        backward(grad_rows, ids, -1, -1)
    with pytest.raises(TypeError, match=r"ids must be int32 or int64, got torch\.float32"):
        backward(grad_rows, ids.float(), 3, -1)


def test_a_plan_of_another_device_is_named() -> None:
    plan = ek.embedding_plan(torch.zeros(5, dtype=torch.int64), 3)
    with pytest.raises(ValueError, match="grad_rows is on meta, the ids are on cpu"):
        ek.embedding_grad(torch.zeros(5, 4, device="meta"), plan)


def test_a_plan_cannot_be_changed() -> None:
    plan = ek.embedding_plan(torch.zeros(5, dtype=torch.int64), 3)
    assert isinstance(plan, EmbeddingPlan)
    with pytest.raises(AttributeError):
        plan.num_rows = 4  # type: ignore[misc]

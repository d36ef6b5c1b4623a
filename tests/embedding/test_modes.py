"""``embedding_grad`` into a buffer that is there, into rows alone, of bags, with weights: against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import embedkernels as ek
from embedkernels.reference import random
from tests.contract import assert_within_contract
from tests.embedding.cases import DISTRIBUTIONS, GRADIENT_BACKENDS, fits, hot, poisoned_memory, uniform, zipf
from tests.properties import examples

PAIRS = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.float64, torch.float64),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
]
EVERY_BACKEND = pytest.mark.parametrize("backend", GRADIENT_BACKENDS)


def expected_sums(
    grad_rows: Tensor, ids: Tensor, rows: int, bags: Tensor | None = None, weights: Tensor | None = None
) -> Tensor:
    """(V, D) in float64, on the CPU."""
    flat = ids.reshape(-1).cpu()
    kept = ((flat >= 0) & (flat < rows)).nonzero().reshape(-1)
    source = grad_rows.double().cpu().reshape(-1, grad_rows.shape[-1])
    picked = source[kept if bags is None else bags.cpu()[kept].long()]
    if weights is not None:
        picked = picked * weights.double().cpu()[kept][:, None]
    return torch.zeros(rows, grad_rows.shape[-1], dtype=torch.float64).index_add_(0, flat[kept].long(), picked)


def used_rows(ids: Tensor, rows: int) -> Tensor:
    flat = ids.reshape(-1).cpu().long()
    return flat[(flat >= 0) & (flat < rows)].unique()


@EVERY_BACKEND
@pytest.mark.parametrize("pair", PAIRS, ids=str)
@pytest.mark.parametrize("distribution", ["uniform", "zipf", "hot", "equal"])
def test_accumulate_adds_to_the_rows_in_use_and_touches_no_other(
    backend: Any, pair: tuple[torch.dtype, torch.dtype], distribution: str, device: torch.device
) -> None:
    """In the buffer's dtype, rounded once: as close as backward and AccumulateGrad in that dtype."""
    n, rows, width = fits(backend, device, 900, 70), 150, 24
    ids = DISTRIBUTIONS[distribution](n, rows).to(device)
    grad_rows = torch.randn(n, width, device=device).to(pair[0])
    before = torch.randn(rows, width, device=device).to(pair[1])
    used = used_rows(ids, rows)
    untouched = torch.ones(rows, dtype=torch.bool)
    untouched[used] = False
    before[untouched.to(device)] = float("nan")
    out = before.clone()
    plan = ek.embedding_plan(ids, rows, backend=backend)
    assert ek.embedding_grad(grad_rows, plan, out=out, backend=backend) is out
    assert out[untouched.to(device)].isnan().all()
    stock = torch.ops.aten.embedding_dense_backward(grad_rows, ids, rows, -1, False).to(pair[1]) + before
    expected = before.double().cpu() + expected_sums(grad_rows, ids, rows)
    assert_within_contract(out.cpu()[used], stock.cpu()[used], expected[used], f"accumulate {distribution}")


@EVERY_BACKEND
@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_dense_into_memory_that_is_given(
    backend: Any, pair: tuple[torch.dtype, torch.dtype], device: torch.device
) -> None:
    ids, grad_rows = hot(60, 40).to(device), torch.randn(60, 16, device=device).to(pair[0])
    out = torch.full((40, 16), float("nan"), dtype=pair[1], device=device)
    plan = ek.embedding_plan(ids, 40, backend=backend)
    ek.embedding_grad(grad_rows, plan, out=out, mode="dense", backend=backend)
    stock = torch.ops.aten.embedding_dense_backward(grad_rows, ids, 40, -1, False).to(pair[1])
    assert_within_contract(out, stock, expected_sums(grad_rows, ids, 40), "dense into out")


@EVERY_BACKEND
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize(("n", "rows"), [(400, 60), (50, 400)])
def test_rows_are_those_in_use_in_ascending_order(
    backend: Any, distribution: str, n: int, rows: int, device: torch.device
) -> None:
    n = fits(backend, device, n, 60)
    ids = DISTRIBUTIONS[distribution](n, rows).to(device)
    grad_rows = torch.randn(n, 8, device=device)
    plan = ek.embedding_plan(ids, rows, padding_idx=0, backend=backend)
    with poisoned_memory():
        found = ek.embedding_grad(grad_rows, plan, mode="rows", backend=backend)
    assert isinstance(found, ek.RowGradient)
    assert found.values.shape == (min(n, rows), 8)
    used = used_rows(ids, rows)
    used = used[used != 0]
    count = int(found.count)
    assert torch.equal(found.ids[:count].cpu().long(), used)
    expected = expected_sums(grad_rows, ids, rows)
    expected[0] = 0
    torch.testing.assert_close(found.values[:count].cpu().double(), expected[used], rtol=1e-5, atol=1e-5)
    sparse = found.to_sparse()
    assert sparse.is_coalesced()
    torch.testing.assert_close(sparse.to_dense().cpu().double(), expected, rtol=1e-5, atol=1e-5)
    torch._validate_sparse_coo_tensor_args(sparse.indices(), sparse.values(), sparse.shape)


@EVERY_BACKEND
def test_rows_into_memory_that_is_given(backend: Any, device: torch.device) -> None:
    """Of which what lies behind the rows in use is left alone."""
    ids, grad_rows = torch.tensor([7, 2, 7, 7], device=device), torch.randn(4, 6, device=device)
    out = torch.full((9, 6), 5.0, device=device)
    plan = ek.embedding_plan(ids, 20, backend=backend)
    found = ek.embedding_grad(grad_rows, plan, mode="rows", out=out, backend=backend)
    assert isinstance(found, ek.RowGradient)
    assert found.values.data_ptr() == out.data_ptr()
    torch.testing.assert_close(out[:2], torch.stack((grad_rows[1], grad_rows[[0, 2, 3]].sum(0))))
    assert (out[2:] == 5.0).all()


@EVERY_BACKEND
@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_bags_equal_embedding_bag(backend: Any, mode: str, device: torch.device) -> None:
    """Its gradients, the weights' included, from one gradient row per bag."""
    ids = zipf(60, 30).to(device)
    bags = torch.arange(60, device=device) // 7
    bag_sizes = torch.bincount(bags).to(torch.float64)
    table = torch.randn(30, 12, dtype=torch.float64, device=device, requires_grad=True)
    weights = torch.rand(60, dtype=torch.float64, device=device)
    if mode == "mean":
        weights = (1 / bag_sizes)[bags]
    weights.requires_grad_()
    offsets = torch.arange(0, 60, 7, device=device)
    out = F.embedding_bag(ids, table, offsets, mode="sum", per_sample_weights=weights)
    upstream = torch.randn_like(out)
    expected = torch.autograd.grad(out, (table, weights), upstream)
    plan = ek.embedding_plan(ids, 30, backend=backend)
    with torch.no_grad():
        ours = ek.embedding_grad(upstream, plan, bags=bags, per_sample_weights=weights, backend=backend)
    torch.testing.assert_close(ours, expected[0])


@EVERY_BACKEND
def test_frequencies_divide_as_in_stock(backend: Any, device: torch.device) -> None:
    ids, grad_rows = hot(80, 9).to(device), torch.randn(80, 5, device=device)
    stock = torch.ops.aten.embedding_dense_backward(grad_rows, ids, 9, 2, True)
    plan = ek.embedding_plan(ids, 9, padding_idx=2, backend=backend)
    ours = ek.embedding_grad(grad_rows, plan, scale_grad_by_freq=True, backend=backend)
    torch.testing.assert_close(ours, stock)
    torch.testing.assert_close(torch.ops.embedkernels.embedding_backward(grad_rows, ids, 9, 2, backend, True), stock)


@EVERY_BACKEND
@examples(40)
@given(data=st.data())
def test_any_sizes_and_options(backend: Any, device: torch.device, data: st.DataObject) -> None:
    """The three modes agree with float64 whatever the ids, shapes, strides, bags and weights."""
    n = data.draw(st.integers(0, 40), label="N")
    rows, width = data.draw(st.integers(0, 50), label="V"), data.draw(st.integers(1, 20), label="D")
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**16), label="seed"))
    ids = torch.randint(-2, rows + 3, (n,), generator=generator).to(
        data.draw(st.sampled_from([torch.int32, torch.int64]))
    )
    bags = weights = None
    sources = n
    if data.draw(st.booleans(), label="bags"):
        sources = data.draw(st.integers(1, 6), label="B")
        bags = torch.randint(0, sources, (n,), generator=generator)
    if data.draw(st.booleans(), label="weights"):
        weights = torch.randn(n, generator=generator)
    grad_rows = torch.randn(sources, width, generator=generator)
    layout = data.draw(st.sampled_from(["contiguous", "padded", "transposed", "expanded"]), label="layout")
    if layout == "padded":
        grad_rows = F.pad(grad_rows, (1, 2))[:, 1:-2]
    elif layout == "transposed":
        grad_rows = grad_rows.t().contiguous().t()
    elif layout == "expanded" and sources:
        grad_rows = grad_rows[:1].expand(sources, width)
    moved: list[Any] = [x if x is None else x.to(device) for x in (ids, grad_rows, bags, weights)]
    given_ids, given_rows, given_bags, given_weights = moved
    expected = expected_sums(grad_rows, ids, rows, bags, weights)
    plan = ek.embedding_plan(given_ids, rows, backend=backend)
    options: dict[str, Any] = {"bags": given_bags, "per_sample_weights": given_weights, "backend": backend}
    dense = ek.embedding_grad(given_rows, plan, **options)
    assert isinstance(dense, Tensor)
    torch.testing.assert_close(dense.cpu().double(), expected, rtol=1e-5, atol=1e-5)
    buffer = torch.randn(rows, width, generator=generator)
    out = ek.embedding_grad(given_rows, plan, out=buffer.to(device, copy=True), **options)
    assert isinstance(out, Tensor)
    torch.testing.assert_close(out.cpu().double(), buffer.double() + expected, rtol=1e-5, atol=1e-5)
    found = ek.embedding_grad(given_rows, plan, mode="rows", **options)
    assert isinstance(found, ek.RowGradient)
    torch.testing.assert_close(found.to_sparse().to_dense().cpu().double(), expected, rtol=1e-5, atol=1e-5)


@EVERY_BACKEND
def test_stochastic_rounding_draws_the_bits_of_its_seed(backend: Any, device: torch.device) -> None:
    """Element (r, c) is rounded by 16 bits of Philox's counter (c // 8, r), the same on every backend."""
    rows, width, n = 12, 21, 40
    ids, grad_rows = hot(n, rows).to(device), torch.randn(n, width, device=device)
    before = torch.randn(rows, width, device=device).bfloat16()
    plan = ek.embedding_plan(ids, rows, backend=backend)
    generator = torch.Generator(device).manual_seed(11)
    seed = torch.randint(
        0, 2**63 - 1, (1,), dtype=torch.int64, device=device, generator=torch.Generator(device).manual_seed(11)
    )
    out = ek.embedding_grad(
        grad_rows, plan, out=before.clone(), rounding="stochastic", generator=generator, backend=backend
    )
    exact = torch.zeros(rows, width, device=device)
    ek.embedding_grad(grad_rows, plan, out=exact, backend=backend)
    # The buffer and the sum are added in fp32, then rounded.
    sums = before.float() + exact
    expected = random.round_stochastic(sums, torch.arange(rows, device=device), seed)
    used = used_rows(ids, rows).to(device)
    assert isinstance(out, Tensor)
    assert torch.equal(out[used], expected[used])


@EVERY_BACKEND
def test_stochastic_rounding_lets_small_addends_count(backend: Any, device: torch.device) -> None:
    """A hundred times a tenth of a unit in the last place: to nearest nothing moves, at random the mean does."""
    ids = torch.zeros(1, dtype=torch.int64, device=device)
    plan = ek.embedding_plan(ids, 1, backend=backend)
    grad_rows = torch.full((1, 256), 2.0**-7 / 10, device=device)
    nearest, stochastic = (torch.ones(1, 256, dtype=torch.bfloat16, device=device) for _ in range(2))
    torch.manual_seed(4)
    for _ in range(100):
        ek.embedding_grad(grad_rows, plan, out=nearest, backend=backend)
        ek.embedding_grad(grad_rows, plan, out=stochastic, rounding="stochastic", backend=backend)
    assert (nearest == 1).all()
    # 256 columns of a hundred draws: the mean's standard deviation is 2**-7 * sqrt(100 * 0.09 / 256) = 0.0015.
    assert abs(float(stochastic.float().mean()) - (1 + 10 * 2.0**-7)) < 0.006


@EVERY_BACKEND
def test_runs_give_the_same_bits_in_every_mode(backend: Any, device: torch.device) -> None:
    n = fits(backend, device, 3000, 100)
    ids, grad_rows = zipf(n, 80).to(device), torch.randn(n, 40, device=device).bfloat16()
    runs = []
    for _ in range(20 if backend != "triton" or device.type == "cuda" else 3):
        plan = ek.embedding_plan(ids, 80, backend=backend)
        found = ek.embedding_grad(grad_rows, plan, mode="rows", backend=backend)
        assert isinstance(found, ek.RowGradient)
        out = ek.embedding_grad(grad_rows, plan, out=torch.ones(80, 40, device=device), backend=backend)
        dense = ek.embedding_grad(grad_rows, plan, backend=backend)
        runs.append((dense, out, found.values[: int(found.count)]))
    for run in runs[1:]:
        for one, other in zip(runs[0], run, strict=True):
            assert isinstance(one, Tensor)
            assert isinstance(other, Tensor)
            assert torch.equal(one, other)


@pytest.mark.parametrize("backend", GRADIENT_BACKENDS)
def test_the_gradient_of_weights_and_bags(backend: Any, device: torch.device) -> None:
    ids = torch.tensor([3, 1, 3, 9, 0], device=device)  # 9 is another shard's
    plan = ek.embedding_plan(ids, 4, backend=backend)
    bags = torch.tensor([0, 1, 1, 0, 0], device=device)
    rows = torch.randn(2, 3, dtype=torch.float64, device=device, requires_grad=True)
    weights = torch.rand(5, dtype=torch.float64, device=device, requires_grad=True)

    def run(rows: Tensor, weights: Tensor) -> Any:
        return ek.embedding_grad(
            rows, plan, bags=bags, per_sample_weights=weights, scale_grad_by_freq=True, backend=backend
        )

    assert torch.autograd.gradcheck(run, (rows, weights))


@pytest.mark.parametrize("backend", GRADIENT_BACKENDS)
def test_opcheck(backend: str, device: torch.device) -> None:
    ids = torch.randperm(9, device=device)
    parts = ek.embedding_plan(ids, 9, backend=backend).parts  # type: ignore[arg-type]
    rows, weights = torch.randn(9, 4, device=device, requires_grad=True), torch.rand(9, device=device)
    bags = torch.arange(9, dtype=torch.int32, device=device).flip(0)
    torch.library.opcheck(
        torch.ops.embedkernels.embedding_grad.default, (rows, *parts, 9, bags, weights, True, backend)
    )
    torch.library.opcheck(
        torch.ops.embedkernels.embedding_grad_out.default,
        (torch.ones(9, 4, device=device), rows.detach(), *parts, 1, bags, weights, False, None, backend),
    )


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"mode": "sum"}, ValueError, "mode must be dense, accumulate or rows, got 'sum'"),
    ({"mode": "accumulate"}, ValueError, "mode 'accumulate' needs an out to add to"),
    ({"out": [1.0]}, TypeError, "out must be a Tensor, got list"),
    ({"out": torch.zeros(5, 3)}, ValueError, r"out must have shape \(4, 3\), got \(5, 3\)"),
    ({"out": torch.zeros(4, 2)}, ValueError, r"out must have shape \(4, 3\), got \(4, 2\)"),
    ({"out": torch.zeros(1, 3), "mode": "rows"}, ValueError, r"out must have shape \(at least 3, 3\), got \(1, 3\)"),
    (dict.fromkeys(("out", "grad_rows"), torch.zeros(3, 3)) | {"mode": "rows"}, ValueError, "must not share memory"),
    ({"out": torch.zeros(3, 4).t()}, ValueError, r"out must be contiguous, got strides \(1, 4\)"),
    ({"out": torch.zeros(4, 3, dtype=torch.float64)}, TypeError, "got torch.float64 for torch.float32"),
    ({"out": torch.zeros(4, 3, dtype=torch.int32)}, TypeError, "got torch.int32 for torch.float32"),
    (
        {"bags": torch.zeros(2, dtype=torch.int64)},
        ValueError,
        r"bags must have shape \(3,\), one for each id, got \(2,\)",
    ),
    ({"bags": torch.zeros(3)}, TypeError, "ids must be int32 or int64, got torch.float32"),
    ({"per_sample_weights": torch.zeros(2)}, ValueError, "one element for each of the 3 ids, got 2"),
    ({"per_sample_weights": torch.zeros(3, dtype=torch.int64)}, TypeError, "got torch.int64"),
    ({"rounding": "up"}, ValueError, "rounding must be nearest or stochastic, got 'up'"),
    ({"rounding": "stochastic"}, ValueError, "stochastic rounding is for sums that are added to a bfloat16 out"),
    ({"rounding": "stochastic", "out": torch.zeros(4, 3)}, ValueError, "stochastic rounding is for sums"),
    ({"out": torch.zeros(4, 3), "grad_rows": torch.ones(3, 3, requires_grad=True)}, RuntimeError, "differentiable"),
    ({"mode": "rows", "grad_rows": torch.ones(3, 3, requires_grad=True)}, RuntimeError, "differentiable"),
]


@pytest.mark.parametrize(("arguments", "error", "text"), BAD, ids=[text for _, _, text in BAD])
def test_bad_arguments_are_named(arguments: dict[str, Any], error: type[Exception], text: str) -> None:
    plan = ek.embedding_plan(torch.tensor([1, 3, 1]), 4)
    with pytest.raises(error, match=text):
        ek.embedding_grad(**{"grad_rows": torch.ones(3, 3), "plan": plan, **arguments})


def test_a_bag_that_is_no_row_is_named() -> None:
    plan = ek.embedding_plan(torch.tensor([1, 3, 1]), 4)
    with pytest.raises(IndexError, match=r"bag id 2 at position 1 .* a table of 2 rows"):
        ek.embedding_grad(torch.ones(2, 3), plan, bags=torch.tensor([0, 2, 1]))


@EVERY_BACKEND
def test_position_and_type_tables(backend: Any, device: torch.device) -> None:
    """Few rows, each with a very long segment."""
    n = fits(backend, device, 4096, 128)
    for ids, rows in ((torch.arange(n) % 64, 64), (torch.arange(n) % 2, 2), (uniform(n, 3), 5)):
        grad_rows = torch.randn(n, 32).bfloat16().to(device)
        plan = ek.embedding_plan(ids.to(device), rows, backend=backend)
        ours = ek.embedding_grad(grad_rows, plan, backend=backend)
        assert isinstance(ours, Tensor)
        stock = torch.ops.aten.embedding_dense_backward(grad_rows, ids.to(device), rows, -1, False)
        assert_within_contract(ours, stock, expected_sums(grad_rows, ids, rows), f"{rows} rows")

"""The lookup: exact rows, checked ids, a gradient in the weight."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import embedkernels as ek
import embedkernels.ops.embedding  # defines the op
from tests.contract import assert_within_contract
from tests.embedding.cases import DTYPES, GRADIENT_BACKENDS, LOOKUP_BACKENDS, poisoned_memory, uniform

lookup = torch.ops.embedkernels.embedding


def leaf(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(rows, width, device=device).to(dtype).requires_grad_()


@pytest.mark.parametrize("backend", LOOKUP_BACKENDS)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("width", [1, 7, 16, 33, 64, 128, 1100])
def test_the_very_rows(backend: str, dtype: torch.dtype, width: int, device: torch.device) -> None:
    """Bit for bit, whatever the row size and the number of ids."""
    for n, rows in [(1, 1), (37, 1000)]:
        weight = leaf(rows, width, dtype, device)
        for ids in (uniform(n, rows).to(device), uniform(n, rows).to(device, torch.int32)):
            with poisoned_memory():
                ours = ek.embedding(ids, weight, backend=backend)
            assert torch.equal(ours, F.embedding(ids, weight))
            assert ours.is_contiguous()


@pytest.mark.parametrize("backend", LOOKUP_BACKENDS)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (6,), (2, 3, 4), (1, 1, 1, 5)])
def test_ids_of_any_shape(backend: str, shape: tuple[int, ...], device: torch.device) -> None:
    ids = torch.randint(0, 9, shape, device=device)
    weight = leaf(9, 5, torch.float32, device)
    ours, theirs = ek.embedding(ids, weight, backend=backend), F.embedding(ids, weight)
    assert torch.equal(ours, theirs)
    upstream = torch.randn_like(ours)
    (our_grad,) = torch.autograd.grad(ours, weight, upstream)
    (their_grad,) = torch.autograd.grad(theirs, weight, upstream)
    torch.testing.assert_close(our_grad, their_grad)


@pytest.mark.parametrize("backend", LOOKUP_BACKENDS)
def test_weights_and_ids_of_any_stride(backend: str, device: torch.device) -> None:
    wide = torch.randn(12, 40, device=device)
    ids = torch.randint(0, 12, (6, 8), device=device)
    for weight in (
        wide[:, 3:20],
        wide[::2].repeat(2, 1),
        torch.randn(17, 12, device=device).t(),
        wide[:, ::2],
        wide[:1].expand(12, 40),
    ):
        for its_ids in (ids, ids.t(), ids[::2, ::3], ids[:1].expand(4, 8)):
            weight = weight.detach().requires_grad_()
            ours, theirs = ek.embedding(its_ids, weight, backend=backend), F.embedding(its_ids, weight)
            assert torch.equal(ours, theirs)
            upstream = torch.randn_like(ours)
            (our_grad,) = torch.autograd.grad(ours, weight, upstream)
            (their_grad,) = torch.autograd.grad(theirs, weight, upstream)
            torch.testing.assert_close(our_grad, their_grad)


@pytest.mark.parametrize("backend", GRADIENT_BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("padding_idx", [None, 0, 5, -1])
def test_gradient_of_the_weight(
    backend: str, dtype: torch.dtype, padding_idx: int | None, device: torch.device
) -> None:
    ids = uniform(64, 11).to(device).view(4, 16)
    weight, stock = leaf(11, 33, dtype, device), leaf(11, 33, dtype, device)
    upstream = torch.randn(4, 16, 33, device=device).to(dtype)
    with ek.use_backend(backend):  # type: ignore[arg-type]
        ek.embedding(ids, weight, padding_idx=padding_idx).backward(upstream)
    F.embedding(ids, stock, padding_idx=padding_idx).backward(upstream)
    double = leaf(11, 33, torch.float64, device)
    F.embedding(ids, double, padding_idx=padding_idx).backward(upstream.double())
    assert weight.grad is not None
    assert stock.grad is not None
    assert double.grad is not None
    assert_within_contract(weight.grad, stock.grad, double.grad, "weight gradient")


@pytest.mark.parametrize("backend", LOOKUP_BACKENDS)
def test_upstream_gradients_as_autograd_makes_them(backend: str, device: torch.device) -> None:
    """Expanded by a sum, of another dtype through a cast, transposed, from two uses of one table."""
    ids = uniform(24, 7).to(device).view(2, 12)
    scale = torch.randn(2, 12, 6, device=device)
    for name, loss in {
        "sum": lambda look: look(ids).sum(),
        "mean over rows": lambda look: (look(ids).mean(1) * scale[:, 0]).sum(),
        "cast": lambda look: (look(ids).double() * scale.double()).sum(),
        "transposed": lambda look: (look(ids).transpose(1, 2).contiguous() * scale.transpose(1, 2)).sum(),
        "two uses": lambda look: (look(ids) * scale).sum() + look(ids[:1]).square().sum(),
    }.items():
        weight = leaf(7, 6, torch.float32, device)
        (ours,) = torch.autograd.grad(loss(lambda i: ek.embedding(i, weight, backend=backend)), weight)  # noqa: B023
        (theirs,) = torch.autograd.grad(loss(lambda i: F.embedding(i, weight)), weight)  # noqa: B023
        torch.testing.assert_close(ours, theirs, msg=lambda text: f"{name}: {text}")  # noqa: B023


@pytest.mark.parametrize("backend", LOOKUP_BACKENDS)
def test_gradgradcheck(backend: str, device: torch.device) -> None:
    ids = torch.tensor([[1, 0], [2, 1]], device=device)
    weight = leaf(3, 2, torch.float64, device)

    def function(weight: Tensor) -> Tensor:
        return ek.embedding(ids, weight, padding_idx=0, backend=backend).square()

    # Padding's row is looked up but gets no gradient: only the other rows can agree with finite differences.
    def without_padding(rows: Tensor) -> Tensor:
        return function(torch.cat((torch.zeros_like(rows[:1]), rows)))

    rows = weight.detach()[1:].requires_grad_()
    assert torch.autograd.gradcheck(without_padding, (rows,))
    assert torch.autograd.gradgradcheck(without_padding, (rows,))


@pytest.mark.parametrize("backend", LOOKUP_BACKENDS)
@pytest.mark.parametrize(("bad", "position"), [(10, 0), (-1, 7), (2**40, 3), (-(2**63), 5)])
def test_an_id_out_of_range_is_named(backend: str, bad: int, position: int, device: torch.device) -> None:
    ids = torch.zeros(2, 4, dtype=torch.int64, device=device)
    ids.view(-1)[position] = bad
    weight = leaf(10, 4, torch.float32, device)
    text = rf"token id {bad} at position {position} \(of the flattened ids\) .* 10 rows: valid ids are 0 to 9"
    if backend == "torch":
        with pytest.raises(IndexError, match=text):
            ek.embedding(ids, weight, backend=backend)
        return
    with poisoned_memory():
        rows = ek.embedding(ids, weight, backend=backend).view(-1, 4)
    expected = weight[0].repeat(8, 1)
    expected[position] = 0
    assert torch.equal(rows, expected)
    with pytest.raises(IndexError, match=text):
        ek.check_errors()
    ek.check_errors()  # raised once


@pytest.mark.skipif("triton" not in LOOKUP_BACKENDS, reason="triton is not installed")
def test_a_recorded_id_is_raised_by_the_next_call(device: torch.device) -> None:
    weight = leaf(10, 300, torch.float32, device)
    ek.embedding(torch.tensor([1, 44], device=device), weight, backend="triton")
    if device.type == "cuda":
        torch.cuda.synchronize()
    with pytest.raises(IndexError, match="token id 44 at position 1"):
        ek.embedding(torch.tensor([1], device=device), weight, backend="triton")


@pytest.mark.skipif("triton" not in LOOKUP_BACKENDS, reason="triton is not installed")
def test_check_ids_raises_at_once(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMBEDKERNELS_CHECK_IDS", "1")
    weight = leaf(10, 4, torch.float32, device)
    with pytest.raises(IndexError, match="token id -3 at position 0"):
        ek.embedding(torch.tensor([-3], device=device), weight, backend="triton")


@pytest.mark.gpu
def test_an_id_out_of_range_leaves_the_context_alive_and_others_rows_right() -> None:
    weight = leaf(1000, 64, torch.float32, torch.device("cuda"))
    ids = torch.randint(0, 1000, (100_000,), device="cuda")
    bad = torch.rand(100_000, device="cuda") < 0.01
    rows = ek.embedding(torch.where(bad, ids + 10**9, ids), weight, backend="triton")
    assert torch.equal(rows, torch.where(bad[:, None], 0.0, F.embedding(ids, weight)))
    with pytest.raises(IndexError, match="token id 10"):
        ek.check_errors()


@pytest.mark.parametrize("backend", LOOKUP_BACKENDS)
def test_opcheck(backend: str, device: torch.device) -> None:
    ids = uniform(30, 9).to(device).view(3, 10)
    for weight in (
        leaf(9, 8, torch.float32, device),
        leaf(9, 8, torch.bfloat16, device),
        torch.randn(8, 9, device=device).t(),
    ):
        torch.library.opcheck(lookup, (weight, ids, 2, backend))
        torch.library.opcheck(lookup, (weight, ids[:, :0].int(), -1, backend))


@pytest.mark.parametrize(("compiler", "dynamic"), [("aot_eager", False), ("aot_eager", True), ("inductor", True)])
def test_compile(compiler: str, dynamic: bool, device: torch.device) -> None:
    """In one graph, with its gradient; a bad id is still an IndexError."""
    torch.compiler.reset()
    weight = leaf(20, 8, torch.float32, device)

    @torch.compile(fullgraph=True, backend=compiler, dynamic=dynamic)
    def compiled(ids: Tensor, weight: Tensor) -> Tensor:
        return ek.embedding(ids, weight, padding_idx=3).square()

    for shape in [(2, 5), (3, 7)]:
        ids = torch.randint(0, 20, shape, device=device)
        ours, theirs = compiled(ids, weight), F.embedding(ids, weight, padding_idx=3).square()
        upstream = torch.randn_like(ours)
        (our_grad,) = torch.autograd.grad(ours, weight, upstream)
        (their_grad,) = torch.autograd.grad(theirs, weight, upstream)
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(our_grad, their_grad)
    with pytest.raises(IndexError, match="token id 20 at position 1"):  # noqa: PT012
        compiled(torch.tensor([[0, 20, 1]], device=device), weight)
        ek.check_errors()


def test_autocast_leaves_the_lookup_alone(device: torch.device) -> None:
    weight, ids = leaf(9, 8, torch.float32, device), uniform(12, 9).to(device)
    with torch.autocast(device.type, torch.bfloat16):
        ours = ek.embedding(ids, weight)
        loss = F.linear(ours, torch.eye(8, device=device)).float().square().sum()
    assert ours.dtype == torch.float32
    loss.backward()
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32
    assert bool(weight.grad.any())


def test_meta_and_fake_tensors_have_the_shape() -> None:
    rows = ek.embedding(torch.zeros(2, 3, dtype=torch.int64, device="meta"), torch.zeros(5, 4, device="meta"))
    assert (rows.device.type, tuple(rows.shape)) == ("meta", (2, 3, 4))


@pytest.mark.parametrize(
    ("ids", "weight", "error", "text"),
    [
        (torch.zeros(3), torch.zeros(4, 2), TypeError, r"ids must be int32 or int64, got torch\.float32"),
        (torch.zeros(3, dtype=torch.bool), torch.zeros(4, 2), TypeError, r"got torch\.bool"),
        ([0, 1], torch.zeros(4, 2), TypeError, "ids must be a Tensor, got list"),
        (torch.zeros(3).long(), [[1.0]], TypeError, "weight must be a Tensor, got list"),
        (torch.zeros(3).long(), torch.zeros(4), ValueError, r"weight must be 2-D \(V, D\), got shape \(4,\)"),
        (torch.zeros(3).long(), torch.zeros(2, 4, 2), ValueError, r"got shape \(2, 4, 2\)"),
        (torch.zeros(3).long(), torch.zeros(4, 2).int(), TypeError, "float16, float64, got torch.int32"),
        (torch.zeros(3).long(), torch.zeros(4, 2, device="meta"), ValueError, "ids is on cpu, weight is on meta"),
    ],
)
def test_bad_arguments_are_named(ids: object, weight: object, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=f"embedding: .*{text}"):
        ek.embedding(ids, weight)  # type: ignore[arg-type]


@pytest.mark.parametrize("padding_idx", [4, -5])
def test_padding_out_of_range_is_named(padding_idx: int) -> None:
    with pytest.raises(ValueError, match=f"padding_idx {padding_idx} is out of range for a table of 4 rows"):
        ek.embedding(torch.zeros(3).long(), torch.zeros(4, 2), padding_idx=padding_idx)


def test_an_empty_table_has_no_valid_id(device: torch.device) -> None:
    weight = torch.zeros(0, 3, device=device)
    assert ek.embedding(torch.zeros(0, dtype=torch.int64, device=device), weight).shape == (0, 3)
    with pytest.raises(IndexError, match="token id 0 at position 0"):  # noqa: PT012
        ek.embedding(torch.zeros(1, dtype=torch.int64, device=device), weight)
        ek.check_errors()

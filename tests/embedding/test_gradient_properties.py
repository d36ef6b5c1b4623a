"""What holds of the gradient whatever the sizes and the ids: errors not above PyTorch's, and equality with float64.

Sizes are drawn up to 200,000 ids and a million rows, with D of no particular multiple, on the backends that are fast
on the device at hand; Triton's interpreter gets smaller ones in test_modes.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import embedkernels as ek
from tests.contract import errors
from tests.embedding.cases import DISTRIBUTIONS, GRADIENT_BACKENDS, fits
from tests.properties import examples

FAST = [backend for backend in GRADIENT_BACKENDS if backend != "triton" or torch.cuda.is_available()]
EVERY_BACKEND = pytest.mark.parametrize("backend", GRADIENT_BACKENDS)


def sums(grad_rows: Tensor, ids: Tensor, rows: int) -> Tensor:
    """In float64, where the tensors are."""
    kept = (ids >= 0) & (ids < rows)
    out = torch.zeros(rows, grad_rows.shape[1], dtype=torch.float64, device=grad_rows.device)
    return out.index_add_(0, ids[kept].long(), grad_rows[kept].double())


def of_distribution(name: str, n: int, rows: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    return DISTRIBUTIONS[name](n, rows).to(device, dtype)


@pytest.mark.parametrize("backend", FAST)
@examples(120)
@given(data=st.data())
def test_any_size(backend: Any, device: torch.device, data: st.DataObject) -> None:
    """Dense and of rows; few columns where there are many ids, so that the reference is fast too."""
    n = data.draw(st.one_of(st.integers(0, 300), st.integers(0, 20_000), st.integers(0, 200_000)), label="N")
    rows = data.draw(st.one_of(st.integers(1, 50), st.integers(1, 40_000), st.integers(1, 1_000_000)), label="V")
    widest = max(1, min(130, 2_000_000 // max(n, rows)))
    width = data.draw(st.integers(1, widest), label="D")
    name = data.draw(
        st.sampled_from([name for name in DISTRIBUTIONS if name != "zipf" or rows <= 40_000]), label="ids"
    )
    torch.manual_seed(data.draw(st.integers(0, 2**16), label="seed"))
    ids = of_distribution(
        name, n, rows, device, data.draw(st.sampled_from([torch.int32, torch.int64]), label="dtype")
    )
    if data.draw(st.booleans(), label="some out of range") and n:
        ids[:: data.draw(st.integers(1, 5), label="every")] = data.draw(st.sampled_from([-1, rows, 2**31 - 1]))
    apart = data.draw(st.sampled_from([0, 3]), label="elements between rows")
    grad_rows = torch.randn(n, width + apart, device=device)[:, :width]
    expected = sums(grad_rows, ids, rows)
    plan = ek.embedding_plan(ids, rows, backend=backend)
    dense = ek.embedding_grad(grad_rows, plan, backend=backend)
    assert isinstance(dense, Tensor)
    # A sum of n numbers of about 1 is off by n / 2 roundings at most, each of a number of about sqrt(n).
    torch.testing.assert_close(dense.double(), expected, rtol=1e-5, atol=1e-6 * max(1.0, n**0.5))
    found = ek.embedding_grad(grad_rows, plan, mode="rows", backend=backend)
    assert isinstance(found, ek.RowGradient)
    count = int(found.count)
    used = ids[(ids >= 0) & (ids < rows)].long().unique()
    assert torch.equal(found.ids[:count].long(), used)
    assert torch.equal(found.values[:count], dense[used])


@EVERY_BACKEND
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_errors_are_not_above_pytorchs(
    backend: Any, dtype: torch.dtype, distribution: str, device: torch.device
) -> None:
    """As root mean squares over tables with long, short and single segments together."""
    if distribution == "padding":
        distribution = "equal"
    ours = theirs = 0.0
    for n, rows in ((2900, 60), (1500, 700), (300, 3)):
        n = fits(backend, device, n, 200)
        ids = DISTRIBUTIONS[distribution](n, rows).to(device)
        grad_rows = torch.randn(n, 48, device=device).to(dtype)
        expected = sums(grad_rows, ids, rows)
        plan = ek.embedding_plan(ids, rows, backend=backend)
        found = ek.embedding_grad(grad_rows, plan, backend=backend)
        assert isinstance(found, Tensor)
        stock = torch.ops.aten.embedding_dense_backward(grad_rows, ids, rows, -1, False)
        ours += errors(found, expected)[1] ** 2
        theirs += errors(stock, expected)[1] ** 2
    repeats = distribution not in ("distinct", "uniform", "ascending", "descending")
    if dtype != torch.float32 and repeats:
        assert ours < theirs
    else:
        # What is added in the same order has the same error; other orders of a few numbers are better or worse by
        # chance, by less than this.
        assert ours <= theirs * (1 + 5e-3)

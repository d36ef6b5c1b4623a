"""The ops under the function: opcheck, torch.compile, determinism, double backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import embedkernels as ek
from tests.attention import cases

OPS = torch.ops.embedkernels


@pytest.fixture(autouse=True)
def _small_tiles(device: torch.device) -> Any:
    with cases.use_tiles(None if device.type == "cuda" else cases.SMALL):
        yield


@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@pytest.mark.parametrize("rich", [False, True])
def test_opcheck_forward(layout: str, rich: bool, device: torch.device) -> None:
    ek.attention  # noqa: B018  defines the ops
    call = cases.inputs(batch=1, heads=(2, 1), lengths=(9, 20), head_size=16, layout=layout, device=device)
    mask, bounds, seed = None, None, None
    if rich:
        mask = torch.rand(1, 20, device=device) < 0.7
        bounds = OPS.attention_key_bounds(mask, None, None, 1, 20)
        seed = torch.randint(0, 2**62, (1,), device=device)
    args = (*call.leaves, bounds, mask, None, seed, 0.25, rich, 3, 0.3 if rich else 0.0)
    torch.library.opcheck(OPS.attention_forward.default, args)


@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)])
def test_opcheck_backward(needs: tuple[bool, bool], device: torch.device) -> None:
    call = cases.inputs(batch=1, heads=(2, 1), lengths=(9, 20), head_size=16, layout="transposed", device=device)
    tensors = [x.detach() for x in call.leaves]
    out, lse = OPS.attention_forward(*tensors, None, None, None, None, 0.25, True, 0, 0.0)
    args = (call.grad, *tensors, out, lse, None, None, None, None, 0.25, True, 0, 0.0, None, *needs)
    # The gradient of the backward is an error on purpose.
    torch.library.opcheck(OPS.attention_backward.default, args, test_utils=("test_schema", "test_faketensor"))


def test_opcheck_bounds(device: torch.device) -> None:
    mask = torch.rand(2, 20, device=device) < 0.7
    lengths = torch.tensor([3, 20], device=device)
    for args in ((mask, None, lengths, 2, 20), (None, lengths.int(), None, 2, 20)):
        torch.library.opcheck(OPS.attention_key_bounds.default, args)


@pytest.mark.parametrize("dynamic", [None, False, True])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_compile_in_one_graph(backend: str, dynamic: bool | None, device: torch.device) -> None:
    torch.compiler.reset()
    call = cases.inputs(heads=(4, 2), lengths=(9, 20), head_size=16, layout="transposed", device=device)
    mask = cases.masks("right", 2, 20, device)["key_mask"]

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return 2 * ek.attention(
            q, k, v, is_causal=True, enable_gqa=True, key_mask=mask, query_offset=2, backend=backend
        )

    plain = run(*call.leaves, mask)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=dynamic)(*call.leaves, mask)
    assert torch.equal(plain, compiled)
    gradients = (torch.autograd.grad(x, call.leaves, call.grad) for x in (plain, compiled))
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)


def test_compile_under_autocast_and_with_dropout(device: torch.device) -> None:
    call = cases.inputs(lengths=(9, 20), head_size=16, device=device)

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device.type, dtype=torch.bfloat16):
            return ek.attention(q, k, v, dropout_p=0.5, backend="triton")

    out = torch.compile(run, fullgraph=True, backend="aot_eager")(*call.leaves)
    assert out.dtype == torch.bfloat16
    assert torch.isfinite(torch.autograd.grad(out, call.leaves, call.grad.bfloat16())[0]).all()


def test_two_runs_give_the_same_bits(device: torch.device) -> None:
    scale = 16 if device.type == "cuda" else 1
    call = cases.inputs(
        heads=(4, 2), lengths=(33 * scale, 40 * scale), is_causal=True, dropout_p=0.2, dtype=torch.bfloat16,
        device=device, **cases.masks("holes", 2, 40 * scale, device),
    )  # fmt: skip
    for (name, a), b in zip(cases.pairs(cases.ours(call)), cases.ours(call), strict=True):
        assert torch.equal(a, b), name


def test_a_second_derivative_is_refused(device: torch.device) -> None:
    call = cases.inputs(lengths=(9, 20), head_size=16, device=device)
    out = ek.attention(*call.leaves, backend="triton")
    (dq,) = torch.autograd.grad(out, call.leaves[:1], call.grad, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative: pass backend='torch'"):
        dq.sum().backward()


def test_a_loss_that_does_not_use_the_output(device: torch.device) -> None:
    call = cases.inputs(lengths=(9, 20), head_size=16, device=device)
    out = ek.attention(*call.leaves, backend="triton")
    (out.detach().sum() + call.query.sum()).backward()
    assert torch.equal(call.query.grad, torch.ones_like(call.query))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_compile_with_any_number_of_heads(backend: str, device: torch.device) -> None:
    """One graph for every number of heads, grouped or not."""
    torch.compiler.reset()

    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=True)
    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return ek.attention(q, k, v, enable_gqa=True, backend=backend)  # type: ignore[arg-type]

    for heads in ((4, 2), (6, 3), (3, 3), (2, 2)):
        call = cases.inputs(heads=heads, lengths=(9, 20), head_size=16, device=device)
        assert torch.equal(run(*call.leaves), ek.attention(*call.leaves, enable_gqa=True, backend=backend))  # type: ignore[arg-type]

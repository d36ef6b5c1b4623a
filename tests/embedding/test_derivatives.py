"""Derivatives beyond the backward pass: forward mode, torch.func, and those of the gradient itself. Never silent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel

import embedkernels as ek
from embedkernels.ops.backend import needs_stock_autograd
from embedkernels.ops.embedding_grad import EmbeddingPlan
from tests.embedding.cases import GRADIENT_BACKENDS, uniform

Function = Callable[[Tensor], Tensor]


def calls(device: torch.device, backend: str | None) -> dict[str, tuple[Function, Function, Tensor]]:
    """By op: ours and stock's, as functions of one tensor, and the tensor."""
    ids = torch.tensor([[1, 0, 3], [1, 2, 3]], device=device)
    table = torch.randn(5, 4, dtype=torch.float64, device=device)
    positions, norm = (torch.randn(n, 4, dtype=torch.float64, device=device) for n in (3, 1))
    query, key, value = torch.randn(3, 1, 2, 3, 16, dtype=torch.float64, device=device)
    lengths = torch.tensor([2], device=device)
    mask = (torch.arange(3, device=device) < 2)[None, None, None]
    plan = ek.embedding_plan(ids, 5)
    options: dict[str, Any] = {"backend": backend}

    def stock_embed(weight: Tensor) -> Tensor:
        return F.layer_norm(F.embedding(ids, weight) + positions, (4,), norm[0], None, 1e-12)

    def stock_attention(*args: Any, **kwargs: Any) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):  # the others have no forward mode
            return F.scaled_dot_product_attention(*args, **kwargs)

    return {
        "embedding": (
            lambda w: ek.embedding(ids, w, padding_idx=0, **options), lambda w: F.embedding(ids, w, 0), table,
        ),
        "embed": (
            lambda w: ek.embed(ids, w, position_weight=positions, norm="layer", norm_weight=norm[0], **options),
            stock_embed, table,
        ),
        "embedding_grad": (
            lambda rows: ek.embedding_grad(rows, plan, **options),
            lambda rows: torch.zeros(5, 4, dtype=rows.dtype, device=device).index_add(
                0, ids.flatten(), rows.reshape(6, 4)
            ),
            torch.randn(2, 3, 4, dtype=torch.float64, device=device),
        ),
        "attention": (
            lambda q: ek.attention(q, key, value, is_causal=True, **options),
            lambda q: stock_attention(q, key, value, is_causal=True), query,
        ),
        "attention with lengths": (
            lambda k: ek.attention(query, k, value, key_lengths=lengths, **options),
            lambda k: stock_attention(query, k, value, mask), key,
        ),
    }  # fmt: skip


def tangent_of(function: Function, x: Tensor, tangent: Tensor) -> Tensor:
    with forward_ad.dual_level():
        y = forward_ad.unpack_dual(function(forward_ad.make_dual(x, tangent))).tangent
        assert y is not None
        return y.clone()


OPS = ["embedding", "embed", "embedding_grad", "attention", "attention with lengths"]


@pytest.mark.parametrize("backend", ["torch", None])
@pytest.mark.parametrize("op", OPS)
def test_forward_mode(op: str, backend: str | None, device: torch.device) -> None:
    ours, stock, x = calls(device, backend)[op]
    tangent = torch.randn_like(x)
    expected = tangent_of(stock, x, tangent)
    torch.testing.assert_close(tangent_of(ours, x, tangent), expected)
    with forward_ad.dual_level():
        torch.testing.assert_close(forward_ad.unpack_dual(ours(forward_ad.make_dual(x, tangent))).primal, stock(x))


@pytest.mark.parametrize("op", OPS)
def test_forward_mode_when_compiled(op: str, device: torch.device) -> None:
    """Right, or an error of torch.compile's: no zero tangent."""
    ours, stock, x = calls(device, None)[op]
    tangent = torch.randn_like(x)
    expected = tangent_of(stock, x, tangent)
    torch.compiler.reset()
    compiled = torch.compile(ours, backend="eager")
    torch.testing.assert_close(tangent_of(compiled, x, tangent), expected)


@pytest.mark.parametrize("backend", ["torch", None])
@pytest.mark.parametrize("op", OPS)
def test_transforms_of_torch_func(op: str, backend: str | None, device: torch.device) -> None:
    ours, stock, x = calls(device, backend)[op]
    several = torch.stack([x, x * 2])
    for transform in (
        lambda f: torch.func.grad(lambda a: f(a).square().sum())(x),
        lambda f: torch.func.jvp(f, (x,), (torch.ones_like(x),))[1],
        lambda f: torch.func.vmap(f)(several),
        lambda f: torch.func.vmap(torch.func.grad(lambda a: f(a).square().sum()))(several),
    ):
        torch.testing.assert_close(transform(ours), transform(stock))  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("backend", [backend for backend in GRADIENT_BACKENDS if backend != "torch"])
@pytest.mark.parametrize("op", OPS)
def test_a_backend_that_cannot_says_so(op: str, backend: str, device: torch.device) -> None:
    if backend == "extension" and op != "embedding_grad":
        return
    ours, _, x = calls(device, backend)[op]
    x = x.float()
    if op != "embedding_grad":
        ours = _in_float32(op, device, backend)
    text = (
        f"^{op.split()[0]}: backend '{backend}' has no forward-mode derivative and takes no transform of torch.func"
    )
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=text):
        ours(forward_ad.make_dual(x, x))
    with pytest.raises(NotImplementedError, match=text):
        torch.func.grad(lambda a: ours(a).sum())(x)


def _in_float32(op: str, device: torch.device, backend: str) -> Function:
    """Triton takes no float64."""
    ids = torch.tensor([1, 0], device=device)
    other = torch.zeros(1, 2, 3, 16, device=device)
    options: dict[str, Any] = {"backend": backend}
    return {
        "embedding": lambda w: ek.embedding(ids, w, **options),
        "embed": lambda w: ek.embed(ids, w, **options),
        "attention": lambda q: ek.attention(q, other, other, **options),
    }[op.split()[0]]


def test_a_tangent_of_any_table_counts(device: torch.device) -> None:
    ids, table = torch.tensor([1, 0], device=device), torch.randn(3, 4, device=device)
    names = ("weight", "position_weight", "type_weight", "norm_weight", "norm_bias")
    for name in names:
        tensors = {other: table[0] if "norm" in other else table for other in names}
        with forward_ad.dual_level():
            tensors[name] = forward_ad.make_dual(tensors[name], torch.randn_like(tensors[name]))
            y = forward_ad.unpack_dual(ek.embed(ids, norm="layer", norm_eps=0.1, **tensors))  # type: ignore[arg-type]
        assert y.tangent is not None, name
        assert y.tangent.ne(0).any(), name


@pytest.mark.parametrize("op", ["embedding", "embed"])
def test_under_a_transform_a_bad_id_is_still_an_index_error(op: str, device: torch.device) -> None:
    weight = torch.zeros(3, 4, device=device)
    function = getattr(ek, op)
    text = f"^{op}: token id 7 at position 1"
    ids = torch.tensor([0, 7], device=device)
    with pytest.raises(IndexError, match=text):
        torch.func.grad(lambda w: function(ids, w).sum())(weight)
    with pytest.raises(IndexError, match=text):
        torch.func.vmap(lambda i: function(i, weight))(ids)


@pytest.mark.parametrize("op", ["embedding", "embed"])
@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_under_a_transform_ids_can_be_traced(mode: str, op: str, device: torch.device) -> None:
    """Neither does the graph hold the check of the traced ids, nor does tracing wait for their values."""
    function = getattr(ek, op)
    gradient = torch.func.grad(lambda w, ids: function(ids, w).square().sum())
    weight, ids = torch.randn(10, 4, device=device), torch.tensor([1, 9], device=device)
    traced = make_fx(gradient, tracing_mode=mode)(weight, ids)
    torch.testing.assert_close(traced(weight, ids.flip(0)), gradient(weight, ids.flip(0)))
    assert "aminmax" not in traced.code


@pytest.mark.parametrize("op", ["embedding", "embed"])
def test_under_a_transform_ids_may_have_no_values(op: str) -> None:
    function = getattr(ek, op)
    weight, ids = torch.randn(10, 4, device="meta"), torch.empty(2, dtype=torch.int64, device="meta")
    assert torch.func.grad(lambda w: function(ids, w).sum())(weight).shape == (10, 4)
    with FakeTensorMode():
        weight, ids = torch.randn(10, 4), torch.zeros(2, dtype=torch.int64)
        assert torch.func.grad(lambda w: function(ids, w).sum())(weight).shape == (10, 4)


def test_attention_without_tangents_keeps_its_implementation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where other tensors of a dual level have tangents."""
    monkeypatch.setattr("embedkernels.ops.attention.sdpa_kernel", lambda *_: pytest.fail("chose an implementation"))
    x = torch.randn(1, 2, 3, 16)
    with forward_ad.dual_level():
        torch.testing.assert_close(ek.attention(x, x, x), F.scaled_dot_product_attention(x, x, x))


def test_needs_stock_autograd() -> None:
    x = torch.zeros(2)
    assert not needs_stock_autograd()
    assert not needs_stock_autograd(x, None)
    with forward_ad.dual_level():
        assert not needs_stock_autograd(x, None)
        assert needs_stock_autograd(None, x, forward_ad.make_dual(x, x))
    assert not needs_stock_autograd(x)
    seen = []
    torch.func.vmap(lambda y: seen.append(needs_stock_autograd(x)) or y)(x)
    assert seen == [True]


@pytest.mark.parametrize("backend", GRADIENT_BACKENDS)
def test_embedding_grad_is_differentiable(backend: Any, device: torch.device) -> None:
    """Its derivative is the lookup: zeros for padding and for ids of another shard."""
    ids = torch.tensor([[11, 10, 13], [11, 5, 99]], device=device)
    plan = ek.embedding_plan(ids, 20, vocab_start=10, vocab_end=15, padding_idx=13, backend=backend)
    rows = torch.randn(2, 3, 4, dtype=torch.float64, device=device, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: ek.embedding_grad(x, plan, backend=backend), (rows,))
    assert torch.autograd.gradgradcheck(lambda x: ek.embedding_grad(x, plan, backend=backend).pow(3), (rows,))
    upstream = torch.randn(5, 4, dtype=torch.float64, device=device)
    (grad,) = torch.autograd.grad(ek.embedding_grad(rows, plan, backend=backend), rows, upstream)
    expected = torch.zeros(2, 3, 4, dtype=torch.float64, device=device)
    expected[:, 0], expected[0, 1] = upstream[1], upstream[0]
    assert torch.equal(grad, expected)


@pytest.mark.parametrize("backend", GRADIENT_BACKENDS)
@pytest.mark.parametrize("planner", GRADIENT_BACKENDS)
def test_what_a_plan_holds_behind_its_segments_changes_no_derivative(
    backend: Any, planner: Any, device: torch.device
) -> None:
    ids = uniform(90, 60).to(device)
    plan = ek.embedding_plan(ids, 30, padding_idx=3, backend=planner)
    count = int(plan.count)
    kept = int(plan.segment_offsets[count])
    for part, used in ((plan.order, kept), (plan.segment_ids, count), (plan.segment_offsets, count + 1)):
        part[used:] = torch.randint(-(2**31), 2**31, part[used:].shape)
    rows = torch.randn(90, 5, device=device, requires_grad=True)
    upstream = torch.randn(30, 5, device=device)
    (grad,) = torch.autograd.grad(ek.embedding_grad(rows, plan, backend=backend), rows, upstream)
    kept_ids = (ids < 30) & (ids != 3)
    expected = torch.where(kept_ids[:, None], upstream[torch.where(kept_ids, ids, 0)], 0.0)
    assert torch.equal(grad, expected)


@pytest.mark.parametrize("backend", GRADIENT_BACKENDS)
@pytest.mark.parametrize(("n", "rows"), [(0, 4), (3, 0), (0, 0)])
def test_derivative_of_nothing(n: int, rows: int, backend: Any, device: torch.device) -> None:
    plan = ek.embedding_plan(torch.zeros(n, dtype=torch.int64, device=device), rows, backend=backend)
    grad_rows = torch.randn(n, 2, device=device, requires_grad=True)
    y = ek.embedding_grad(grad_rows, plan, backend=backend)
    (grad,) = torch.autograd.grad(y, grad_rows, torch.ones_like(y))
    assert torch.equal(grad, torch.zeros_like(grad_rows))


@pytest.mark.parametrize("backend", GRADIENT_BACKENDS)
def test_opcheck(backend: str, device: torch.device) -> None:
    plan: EmbeddingPlan = ek.embedding_plan(uniform(30, 9).to(device), 9, padding_idx=2)
    parts = (*plan.parts, plan.num_rows, None, None, False, backend)
    for rows in (torch.randn(30, 8, device=device, requires_grad=True), torch.randn(2, 15, 8, device=device)):
        torch.library.opcheck(torch.ops.embedkernels.embedding_grad, (rows, *parts))

"""Rotary position embedding: against the formula in float64, forward and backward, in every layout and dtype."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import embedkernels as ek
from embedkernels.ops.backend import triton_problem
from tests.contract import assert_within_contract
from tests.embedding.cases import DTYPES, poisoned_memory

BACKENDS = ["torch", *(["triton"] if triton_problem() is None else [])]
on_backends = pytest.mark.parametrize("backend", BACKENDS)


def stock(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """As transformers does it in Llama, and interleaved as in GPT-J and Cohere; tables of R columns."""
    turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    if interleaved:
        swapped = torch.stack((-turned[..., 1::2], turned[..., ::2]), dim=-1).flatten(-2)
    else:
        first, second = turned.chunk(2, dim=-1)
        swapped = torch.cat((-second, first), dim=-1)
    return torch.cat((turned * cos[:, None] + swapped * sin[:, None], rest), dim=-1)


def tables(batch: int, length: int, rotary: int, interleaved: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """(B, S, R) in fp32; the entries of a pair are equal, as the angle is one."""
    positions = torch.arange(batch * length, device=device).view(batch, length, 1) * 3.0 + 5
    angles = positions * 10000 ** (-torch.arange(0, rotary, 2, device=device) / rotary)
    angles = angles.repeat_interleave(2, -1) if interleaved else torch.cat((angles, angles), -1)
    return angles.cos(), angles.sin()


def heads(batch: int, count: int, length: int, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(batch, count, length, size, device=device).to(dtype)


SHAPES = {
    "usual": (2, 4, 2, 9, 16, 16),
    "large heads": (1, 2, 1, 3, 128, 128),
    "odd size": (2, 3, 3, 5, 20, 20),
    "partial": (2, 5, 1, 7, 24, 8),
    "one pair": (1, 1, 1, 4, 6, 2),
    "partial, odd": (1, 6, 2, 4, 80, 32),
    "one token": (3, 9, 3, 1, 16, 16),
    "many tokens": (2, 1, 1, 70, 4, 4),
}


@on_backends
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_within_the_contract(
    backend: Any, dtype: torch.dtype, interleaved: bool, shape: tuple[int, ...], device: torch.device
) -> None:
    batch, count, count_kv, length, size, rotary = shape
    query, key = (heads(batch, n, length, size, dtype, device).requires_grad_() for n in (count, count_kv))
    upstream = [heads(batch, n, length, size, dtype, device) for n in (count, count_kv)]
    for table_dtype in {dtype, torch.float32}:
        cos, sin = (table.to(table_dtype) for table in tables(batch, length, rotary, interleaved, device))
        with poisoned_memory():
            ours = ek.rope(query, key, cos, sin, interleaved=interleaved, backend=backend)
            our_grads = torch.autograd.grad(ours, (query, key), upstream)
        for x, our, our_grad, grad, name in zip(
            (query, key), ours, our_grads, upstream, ("query", "key"), strict=True
        ):
            theirs = stock(x, cos, sin, interleaved).to(dtype)
            (their_grad,) = torch.autograd.grad(theirs, x, grad)
            double = x.detach().double().requires_grad_()
            expected = stock(double, cos.double(), sin.double(), interleaved)
            (expected_grad,) = torch.autograd.grad(expected, double, grad.double())
            assert_within_contract(our, theirs, expected, name)
            assert_within_contract(our_grad, their_grad, expected_grad, f"gradient of {name}")


@on_backends
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
def test_entries_of_a_pair_may_differ(backend: Any, interleaved: bool, device: torch.device) -> None:
    """The gradient is then no rotation back."""
    query, key = heads(2, 3, 4, 8, torch.float32, device), heads(2, 1, 4, 8, torch.float32, device)
    cos, sin = torch.randn(2, 2, 4, 8, device=device)
    for x in (query, key):
        x.requires_grad_()
    ours = ek.rope(query, key, cos, sin, interleaved=interleaved, backend=backend)
    theirs = [stock(x, cos, sin, interleaved) for x in (query, key)]
    upstream = [torch.randn_like(x) for x in theirs]
    torch.testing.assert_close(ours, tuple(theirs))
    torch.testing.assert_close(
        torch.autograd.grad(ours, (query, key), upstream), torch.autograd.grad(theirs, (query, key), upstream)
    )


@on_backends
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
@pytest.mark.parametrize("size", [8, 12])
def test_tables_of_half_the_width(backend: Any, interleaved: bool, size: int, device: torch.device) -> None:
    query, key = (heads(2, n, 5, size, torch.float32, device) for n in (4, 2))
    cos, sin = tables(2, 5, 8, interleaved, device)
    expected = ek.rope(query, key, cos, sin, interleaved=interleaved, backend=backend)
    half = slice(None, None, 2) if interleaved else slice(0, 4)
    ours = ek.rope(query, key, cos[..., half], sin[..., half], rotary_dim=8, interleaved=interleaved, backend=backend)
    assert all(map(torch.equal, ours, expected))  # type: ignore[arg-type]


@on_backends
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
def test_inputs_and_gradients_of_any_stride(backend: Any, interleaved: bool, device: torch.device) -> None:
    """Views of projections, sliced, transposed, expanded, with a last stride that is not 1."""
    wide = torch.randn(2, 9, 5, 40, device=device)
    views = {
        "projection": wide[..., :16].transpose(1, 2),
        "sliced": wide[:, ::2, 1:, 3:19],
        "last stride 2": wide[..., :32:2],
        "transposed": torch.randn(16, 5, 9, 2, device=device).permute(3, 2, 1, 0),
        "expanded": wide[:1, :1, :, :16].expand(2, 9, 5, 16),
        "flipped batch": wide[:, :, :, 8:24].transpose(0, 1),
    }
    for name, view in views.items():
        batch, _, length, _ = view.shape
        cos, sin = tables(batch, length, 16, interleaved, device)
        transposed = (
            cos.transpose(1, 2).contiguous().transpose(1, 2),
            sin.transpose(1, 2).contiguous().transpose(1, 2),
        )
        for query, key in ((view, wide.new_ones(batch, 2, length, 16)), (wide.new_ones(batch, 2, length, 16), view)):
            query, key = query.detach().requires_grad_(), key.detach().requires_grad_()
            for its_cos, its_sin in ((cos, sin), transposed, (cos[:1], sin[:1]), (cos[0], sin[0])):
                with poisoned_memory():
                    ours = ek.rope(query, key, its_cos, its_sin, interleaved=interleaved, backend=backend)
                angles = [table if table.dim() == 3 else table[None] for table in (its_cos, its_sin)]
                theirs = [stock(x, *angles, interleaved) for x in (query, key)]
                torch.testing.assert_close(ours, tuple(theirs), msg=lambda text, name=name: f"{name}: {text}")
            for upstream in (
                [torch.randn_like(x) for x in theirs],
                [x.new_ones(()).expand(x.shape) for x in theirs],
                [torch.randn(*x.shape[:2], x.shape[3], x.shape[2], device=device).mT for x in theirs],
            ):
                torch.testing.assert_close(
                    torch.autograd.grad(ours, (query, key), upstream, retain_graph=True),
                    torch.autograd.grad(theirs, (query, key), upstream, retain_graph=True),
                    msg=lambda text, name=name: f"gradient, {name}: {text}",
                )


@pytest.mark.parametrize("order", ["BHSD", "BSHD"])
def test_outputs_lie_in_the_order_of_their_inputs(order: str, device: torch.device) -> None:
    query, key = (heads(2, n, 6, 16, torch.float32, device) for n in (4, 2))
    cos, sin = tables(2, 6, 16, False, device)
    if order == "BSHD":
        query, key = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (query, key))
    outputs = ek.rope(query, key, cos, sin, backend=BACKENDS[-1])  # type: ignore[arg-type]
    if BACKENDS[-1] == "triton":
        assert [x.stride() for x in outputs if x is not None] == [query.stride(), key.stride()]


@on_backends
def test_query_alone(backend: Any, device: torch.device) -> None:
    query = heads(2, 3, 4, 8, torch.float32, device).requires_grad_()
    cos, sin = tables(2, 4, 8, False, device)
    ours, nothing = ek.rope(query, None, cos, sin, backend=backend)
    assert nothing is None
    theirs = stock(query, cos, sin, False)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(*(torch.autograd.grad(x.square().sum(), query)[0] for x in (ours, theirs)))


@on_backends
@pytest.mark.parametrize("needs", ["query", "key", "neither", "one output"])
def test_what_needs_no_gradient_gets_none(backend: Any, needs: str, device: torch.device) -> None:
    query, key = (heads(1, n, 4, 8, torch.float32, device) for n in (3, 2))
    cos, sin = tables(1, 4, 8, False, device)
    query.requires_grad_(needs in ("query", "one output"))
    key.requires_grad_(needs in ("key", "one output"))
    ours = ek.rope(query, key, cos, sin, backend=backend)
    if needs == "neither":
        assert not any(x is not None and x.requires_grad for x in ours)
        return
    theirs = [stock(x, cos, sin, False) for x in (query, key)]
    grads: list[Tensor | None] = []
    chosen = 1 if needs in ("key", "one output") else 0
    for outputs in (ours, theirs):
        query.grad = key.grad = None
        outputs[chosen].square().sum().backward()  # type: ignore[union-attr]
        got = [x.grad for x in (query, key)]
        assert got[1 - chosen] is None
        grads.append(got[chosen])
    torch.testing.assert_close(*grads)


@on_backends
def test_any_number_of_derivatives(backend: Any, device: torch.device) -> None:
    query, key = (torch.randn(1, 2, 2, 4, device=device).requires_grad_() for _ in range(2))
    cos, sin = torch.randn(2, 1, 2, 4, device=device)

    def cubes(call: Any) -> tuple[Tensor, ...]:
        outputs = call()
        value = sum(x.pow(3).sum() for x in outputs)
        first = torch.autograd.grad(value, (query, key), create_graph=True)
        return torch.autograd.grad(sum(x.pow(2).sum() for x in first), (query, key))

    torch.testing.assert_close(
        cubes(lambda: ek.rope(query, key, cos, sin, backend=backend)),
        cubes(lambda: [stock(x, cos, sin, False) for x in (query, key)]),
    )


def test_tables_that_need_a_gradient_get_it(device: torch.device) -> None:
    query = heads(1, 2, 3, 8, torch.float32, device)
    cos, sin = (table.requires_grad_() for table in tables(1, 3, 8, False, device))
    ours, theirs = ek.rope(query, None, cos, sin)[0], stock(query, cos, sin, False)
    torch.testing.assert_close(*(torch.autograd.grad(x.square().sum(), (cos, sin)) for x in (ours, theirs)))
    if "triton" in BACKENDS:
        with pytest.raises(NotImplementedError, match="rope: backend 'triton'"):
            ek.rope(query, None, cos, sin, backend="triton")
        with torch.no_grad():
            ek.rope(query, None, cos, sin, backend="triton")


@on_backends
@pytest.mark.parametrize("empty", ["batch", "tokens", "query heads", "key heads", "all heads"])
def test_empty(backend: Any, empty: str, device: torch.device) -> None:
    batch, length = 0 if empty == "batch" else 2, 0 if empty == "tokens" else 3
    count = 0 if empty in ("query heads", "all heads") else 2
    count_kv = 0 if empty in ("key heads", "all heads") else 1
    query, key = (heads(batch, n, length, 8, torch.float32, device).requires_grad_() for n in (count, count_kv))
    cos, sin = tables(max(batch, 1), length, 8, False, device)
    cos, sin = cos[:1], sin[:1]
    ours = ek.rope(query, key, cos, sin, backend=backend)
    theirs = tuple(stock(x, cos, sin, False) for x in (query, key))
    torch.testing.assert_close(ours, theirs)
    grads = [torch.autograd.grad([x.sum() for x in outputs], (query, key)) for outputs in (ours, theirs)]
    torch.testing.assert_close(*grads)


@on_backends
def test_float64(backend: Any, device: torch.device) -> None:
    query = heads(1, 2, 3, 8, torch.float64, device)
    cos, sin = tables(1, 3, 8, False, device)
    if backend == "triton":
        with pytest.raises(TypeError, match="backend 'triton' takes float32, bfloat16 or float16"):
            ek.rope(query, None, cos, sin, backend=backend)
        return
    ours, _ = ek.rope(query, None, cos, sin, backend=backend)
    torch.testing.assert_close(ours, stock(query, cos.double(), sin.double(), False), rtol=1e-14, atol=1e-14)


@on_backends
def test_two_runs_give_the_same_bits(backend: Any, device: torch.device) -> None:
    query, key = (heads(2, n, 33, 16, torch.bfloat16, device) for n in (4, 2))
    cos, sin = tables(2, 33, 16, False, device)
    one, other = (ek.rope(query, key, cos, sin, backend=backend) for _ in range(2))
    assert all(map(torch.equal, one, other))  # type: ignore[arg-type]


Q, K = torch.zeros(2, 4, 5, 8), torch.zeros(2, 2, 5, 8)
T = torch.zeros(2, 5, 8)
BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"query": [1]}, TypeError, "rope: query must be a Tensor, got list"),
    ({"query": None}, TypeError, "rope: query must be a Tensor, got NoneType"),
    ({"query": Q[0]}, ValueError, r"query must be 4-D \(B, H, S, D\), got shape \(4, 5, 8\)"),
    ({"query": Q.long()}, TypeError, "query must be float32, bfloat16, float16 or float64, got torch.int64"),
    ({"key": K.half()}, TypeError, "key must be torch.float32 like query, got torch.float16"),
    ({"key": K[:1]}, ValueError, r"key must be \(B, Hkv, S, D\) = \(2, Hkv, 5, 8\) like query, got \(1, 2, 5, 8\)"),
    ({"key": K[:, :, 1:]}, ValueError, r"got \(2, 2, 4, 8\)"),
    ({"key": K.to("meta")}, ValueError, "query is on cpu, key is on meta"),
    ({"cos": None}, TypeError, "cos must be a Tensor, got NoneType"),
    ({"cos": T[..., None]}, ValueError, r"cos must be 3-D \(B, S, R\) or 2-D \(S, R\)"),
    ({"sin": T.to("meta")}, ValueError, "query is on cpu, sin is on meta"),
    ({"cos": T[:, 1:]}, ValueError, r"cos must be \(2 or 1, 5, 8 or 4\), got \(2, 4, 8\)"),
    ({"sin": T[:, :, :6]}, ValueError, r"sin must be \(2 or 1, 5, 8 or 4\), got \(2, 5, 6\)"),
    ({"sin": T[:, :, :4]}, ValueError, "cos and sin must have one shape and dtype"),
    ({"sin": T[:1]}, ValueError, "cos and sin must have one shape and dtype"),
    ({"cos": T.half()}, TypeError, "cos must be torch.float32 like query, or float32, got torch.float16"),
    ({"query": Q.half(), "key": K.half(), "cos": T.half()}, ValueError, "cos and sin must have one shape and dtype"),
    ({"rotary_dim": 7}, ValueError, "rotary_dim must be even and between 2 and the head size 8, got 7"),
    ({"rotary_dim": 10}, ValueError, "between 2 and the head size 8, got 10"),
    ({"rotary_dim": 0}, ValueError, "between 2 and the head size 8, got 0"),
    ({"rotary_dim": 4.0}, TypeError, "rope: rotary_dim must be an int, got float"),
    ({"backend": "extension"}, ValueError, "rope: backend must be one of triton, torch or auto, got 'extension'"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[f"{'+'.join(c)}-{m[:20]}" for c, _, m in BAD])
def test_bad_arguments_are_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    given = {"query": Q, "key": K, "cos": T, "sin": T, **change}
    with pytest.raises(error, match=message):
        ek.rope(**given)


@pytest.mark.skipif("triton" not in BACKENDS, reason="needs triton")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rotary_dim": 6}, "cos must be"), ({"cos": T[:, :4]}, "cos must be"), ({"key": K[:1]}, "key must be"),
        ({"cos": torch.zeros(3, 5, 8)}, "cos must be"),
    ],
    ids=["width", "length", "batch of key", "batch of cos"],
)  # fmt: skip
def test_the_op_itself_refuses_what_it_would_read_beyond(change: dict[str, Any], message: str) -> None:
    given = {
        "query": Q, "key": K, "cos": T, "sin": T, "rotary_dim": 8, "interleaved": False, "adjoint": False, **change,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        torch.ops.embedkernels.rope(**given)


@pytest.mark.skipif("triton" not in BACKENDS, reason="needs triton")
@pytest.mark.parametrize("with_key", [True, False])
def test_opcheck(with_key: bool, device: torch.device) -> None:
    query = heads(2, 2, 3, 8, torch.float32, device).transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    key = heads(2, 1, 3, 8, torch.float32, device).requires_grad_() if with_key else None
    cos, sin = tables(2, 3, 8, False, device)
    for adjoint in (False, True):
        torch.library.opcheck(torch.ops.embedkernels.rope, (query, key, cos, sin, 8, False, adjoint))


@pytest.mark.skipif("triton" not in BACKENDS, reason="needs triton")
def test_compiled_in_one_graph(device: torch.device) -> None:
    query, key = (heads(2, n, 5, 8, torch.float32, device).requires_grad_() for n in (2, 1))
    cos, sin = tables(2, 5, 8, False, device)

    def loss(query: Tensor, key: Tensor) -> Tensor:
        turned, turned_key = ek.rope(query, key, cos, sin, backend="triton")
        return (turned @ turned_key.mT).sum()  # type: ignore[union-attr]

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    torch.testing.assert_close(compiled(query, key), loss(query, key))
    torch.testing.assert_close(
        torch.autograd.grad(compiled(query, key), (query, key)), torch.autograd.grad(loss(query, key), (query, key))
    )


@on_backends
def test_under_torch_func(backend: Any, device: torch.device) -> None:
    query = heads(2, 2, 3, 8, torch.float32, device)
    cos, sin = tables(2, 3, 8, False, device)

    def ours(x: Tensor) -> Tensor:
        return ek.rope(x, None, cos, sin, backend=backend)[0].square().sum()

    if backend == "triton":
        with pytest.raises(NotImplementedError, match="rope: backend 'triton' has no forward-mode"):
            torch.func.grad(ours)(query)
        return
    torch.testing.assert_close(torch.func.grad(ours)(query), 2 * query)  # a rotation keeps lengths
    _, tangent = torch.func.jvp(ours, (query,), (query,))
    torch.testing.assert_close(tangent, 2 * query.square().sum())

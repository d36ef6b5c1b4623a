"""The public function: errors, choice of the backend, SDPA's semantics, layout of memory, autocast."""

from __future__ import annotations

import re
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import embedkernels as ek
from embedkernels.ops import attention as ops
from tests.attention import cases


def qkv(*shape: int, device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    return tuple(torch.randn(*(shape or (2, 2, 6, 16)), device=device, dtype=dtype) for _ in range(3))


CPU = torch.device("cpu")
Q, K, V = (torch.zeros(2, 4, 6, 16) for _ in range(3))
META = torch.ones(2, device="meta")
PAIRS = torch.ones(6, 6, dtype=torch.bool)
Q64 = Q.double()
BAD = [
    (([[0.0]], K, V), {}, TypeError, "query must be a Tensor, got list"),
    ((Q[0], K, V), {}, ValueError, "query must be 4-D (B, H, S, D), got shape (4, 6, 16)"),
    ((Q, K.long(), V), {}, TypeError, "key must be floating point, got torch.int64"),
    ((Q, K.half(), V), {}, TypeError, "must have one dtype, got torch.float32, torch.float16 and torch.float32"),
    ((Q, K[:1], V), {}, ValueError, "(B, Hkv, Sk, D) = (2, Hkv, Sk, 16), got (1, 4, 6, 16)"),
    ((Q, K[..., :8], V), {}, ValueError, "key must have the batch and head size of query"),
    ((Q, K, V[:, :, :5]), {}, ValueError, "batch, heads and length of key, (2, 4, 6), got shape (2, 4, 5, 16)"),
    ((Q, K[:, :2], V[:, :2]), {}, ValueError, "query has 4 heads, key and value have 2: pass enable_gqa=True"),
    ((Q, K[:, :3], V[:, :3]), {"enable_gqa": True}, ValueError, "a positive multiple of those of key, got 4 and 3"),
    ((Q, K.to("meta"), V), {}, ValueError, "query is on cpu, key is on meta"),
    ((Q, K, V), {"dropout_p": 1.5}, ValueError, "dropout_p must be in [0, 1], got 1.5"),
    ((Q[:, :0], K, V), {"enable_gqa": True}, ValueError, "must be a positive multiple of those of key, got 0 and 4"),
    ((Q[:, :0], K, V), {"attn_mask": PAIRS}, ValueError, "must have at least 1 head with attn_mask"),
    ((Q, K, V), {"dropout_p": "0.5"}, TypeError, "dropout_p must be a number, got str"),
    ((Q, K, V), {"dropout_p": "half"}, TypeError, "dropout_p must be a number, got str"),
    ((Q, K, V), {"scale": float("nan")}, ValueError, "scale must be between -2**100 and 2**100, got nan"),
    ((Q, K, V), {"scale": 3e38}, ValueError, "scale must be between -2**100 and 2**100, got 3e+38"),
    ((Q, K, V), {"scale": "small"}, TypeError, "scale must be a number, got str"),
    ((Q, K, V), {"query_offset": 1.5}, TypeError, "query_offset must be an int, got float"),
    ((Q, K, V), {"window": 3}, TypeError, "window must be (left, right), each a number of keys or None, got 3"),
    ((Q, K, V), {"window": (1, 2, 3)}, TypeError, "window must be (left, right)"),
    ((Q, K, V), {"window": (1.5, 0)}, TypeError, "window must be an int"),
    ((Q, K, V), {"window": (-1, 0)}, ValueError, "window must be of 0 to 2**30 keys on each side, got -1"),
    ((Q, K, V), {"window": (None, 1 << 30)}, ValueError, "window must be of 0 to 2**30 keys on each side"),
    ((Q, K, V), {"query_offset": 1 << 31}, ValueError, "query_offset must be between -2**30 and 2**30"),
    ((Q, K, V), {"key_mask": torch.ones(2, 6)}, TypeError, "True for keys that count; got torch.float32"),
    ((Q, K, V), {"key_mask": torch.ones(2, 5).bool()}, ValueError, "must have shape (2, 6) or (1, 6), got (2, 5)"),
    ((Q, K, V), {"key_lengths": torch.ones(2)}, TypeError, "must be an int32 or int64 Tensor, got torch.float32"),
    ((Q, K, V), {"key_lengths": [6, 6]}, TypeError, "key_lengths must be an int32 or int64 Tensor, got list"),
    ((Q, K, V), {"key_starts": torch.ones(3).int()}, ValueError, "key_starts must have shape (2,), got (3,)"),
    ((Q, K, V), {"key_starts": META.int()}, ValueError, "query is on cpu, key_starts is on meta"),
    ((Q, K, V), {"attn_mask": PAIRS, "query_offset": 1}, ValueError, "attn_mask excludes key_mask"),
    ((Q, K, V), {"attn_mask": PAIRS, "backend": "triton"}, RuntimeError, "'triton' does not take attn_mask"),
    ((Q, K, V), {"backend": "cudnn"}, ValueError, "backend must be one of triton, torch or auto, got 'cudnn'"),
    ((Q[..., :8], K[..., :8], V[..., :8]), {"backend": "triton"}, RuntimeError, "head size 8 is not in 16 to 128"),
    ((Q, K, V[..., :8]), {"backend": "triton"}, RuntimeError, "value has head size 8, query 16"),
    ((Q64, Q64, Q64), {"backend": "triton"}, RuntimeError, "torch.float64 is not float32, bfloat16"),
]  # fmt: skip


@pytest.mark.parametrize(("tensors", "options", "error", "message"), BAD, ids=[case[3][:40] for case in BAD])
def test_bad_arguments(tensors: Any, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)) as caught:
        ek.attention(*tensors, **options)
    assert str(caught.value).startswith("attention: ")


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_no_query_heads_and_several_key_heads_are_refused(backend: str, device: torch.device) -> None:
    query, key = torch.zeros(1, 0, 5, 16, device=device), torch.zeros(1, 2, 7, 16, device=device)
    with pytest.raises(ValueError, match="got 0 and 2"):
        ek.attention(query, key, key, enable_gqa=True, backend=backend)  # type: ignore[arg-type]
    key = key[:, :0]
    assert ek.attention(query, key, key, backend=backend).shape == (1, 0, 5, 16)  # type: ignore[arg-type]


def test_the_op_itself_gives_keys_that_no_head_reads_zeros(device: torch.device, monkeypatch: Any) -> None:
    cases.poisoned_allocations(monkeypatch)
    query = torch.zeros(1, 0, 5, 16, device=device)
    key = torch.ones(1, 2, 7, 16, device=device, requires_grad=True)
    out, _ = torch.ops.embedkernels.attention_forward(query, key, key, None, None, None, None, 0.25, False, 0, 0.0)
    (grad,) = torch.autograd.grad(out, key, torch.zeros_like(out))
    assert torch.equal(grad, torch.zeros_like(key))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_autocast_does_not_hide_mixed_dtypes(backend: str, device: torch.device) -> None:
    """Autocast leaves float64 alone: next to a float32 query, two dtypes remain."""
    q, k, v = qkv(device=device)
    text = "torch.float32, torch.float64 and torch.float64, which autocast makes torch.bfloat16, torch.float64"
    with torch.autocast(device.type, torch.bfloat16), pytest.raises(TypeError, match=re.escape(text)):
        ek.attention(q, k.double(), v.double(), backend=backend)  # type: ignore[arg-type]


@pytest.mark.parametrize("head_size", [8, 256])
def test_what_the_kernels_do_not_take_goes_to_sdpa_with_one_warning(
    head_size: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ops, "_warned", set())
    monkeypatch.setattr(ops, "choose", lambda *_: ops.Choice("triton", "the best for cuda"))
    q, k, v = qkv(2, 2, 6, head_size, device=device)
    with pytest.warns(UserWarning, match=f"head size {head_size} is not in 16 to 128"):
        out = ek.attention(q, k, v)
    assert torch.equal(out, F.scaled_dot_product_attention(q, k, v))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ek.attention(q, k, v)


def test_auto_on_a_cpu_is_sdpa_bit_for_bit() -> None:
    """Also with dropout: the same call draws the same numbers."""
    q, k, v = qkv(device=CPU)
    for options in ({}, {"is_causal": True}, {"scale": 0.3}, {"dropout_p": 0.5}):
        torch.manual_seed(0)
        mine = ek.attention(q, k, v, **options)
        torch.manual_seed(0)
        assert torch.equal(mine, F.scaled_dot_product_attention(q, k, v, **options))


def test_attn_mask_is_sdpa(device: torch.device) -> None:
    q, k, v = qkv(device=device)
    additive = torch.randn(2, 1, 6, 6, device=device, requires_grad=True)
    for mask in (additive, additive > 0):
        assert torch.equal(ek.attention(q, k, v, mask), F.scaled_dot_product_attention(q, k, v, mask))


@pytest.mark.parametrize("mask", ["none", "right", "left", "holes", "lengths", "starts"])
@pytest.mark.parametrize("order", ["any", "causal", "offset", "negative"])
def test_the_torch_backend(mask: str, order: str, device: torch.device) -> None:
    """Exact in float64, forward and backward, for every mask."""
    options: dict[str, Any] = cases.masks(mask, 2, 21, device)
    if order != "any":
        options |= {"is_causal": True, "query_offset": {"causal": 0, "offset": 3, "negative": -4}[order]}
    call = cases.inputs(heads=(4, 2), lengths=(18, 21), head_size=24, dtype=torch.float64, device=device, **options)
    out = ek.attention(*call.leaves, enable_gqa=True, backend="torch", **call.options)
    ours = (out, *torch.autograd.grad(out, call.leaves, call.grad))
    for (name, mine), exact in zip(cases.pairs(ours), cases.expected(call), strict=True):
        torch.testing.assert_close(mine, exact, rtol=1e-12, atol=1e-12, msg=name)


def test_no_mask_where_nothing_is_masked(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The torch backend leaves SDPA its fast paths wherever the sizes say that no key is hidden."""
    seen = []
    real = F.scaled_dot_product_attention

    def spy(*args: Any, **kwargs: Any) -> torch.Tensor:
        seen.append((kwargs.get("attn_mask") is not None, kwargs.get("is_causal", False)))
        return real(*args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    q, k, v = qkv(device=device)
    for options in (
        {},
        {"is_causal": True},
        {"is_causal": True, "query_offset": 5},
        {"is_causal": True, "query_offset": 4},
    ):
        ek.attention(q, k, v, backend="torch", **options)
    assert seen == [(False, False), (False, True), (False, False), (True, False)]


def test_layout_of_output_and_gradients(device: torch.device) -> None:
    """The output is (B, S, H, D) in memory; a gradient is laid out as its tensor, so that no copy follows."""
    for layout, transposed in (("contiguous", False), ("transposed", True)):
        call = cases.inputs(layout=layout, lengths=(18, 20), head_size=16, device=device)
        out, *gradients = cases.ours(call)
        assert out.transpose(1, 2).is_contiguous()
        for grad in gradients:
            assert (grad.transpose(1, 2) if transposed else grad).is_contiguous()


def test_last_stride(device: torch.device) -> None:
    """Inputs and an upstream gradient whose last stride is not 1 are copied, and give the same bits."""
    call = cases.inputs(lengths=(18, 20), head_size=16, device=device)
    plain = cases.ours(call)
    odd = [x.detach().transpose(2, 3).contiguous().transpose(2, 3).requires_grad_() for x in call.leaves]
    grad = call.grad.transpose(2, 3).contiguous().transpose(2, 3)
    for (name, a), b in zip(cases.pairs(cases.ours(cases.Call(*odd, grad))), plain, strict=True):
        assert torch.equal(a, b), name


def test_rows_too_far_apart_are_copied() -> None:
    """A row stride that would overflow the offsets within a tile: read from a copy, never at wrong addresses."""
    rows = torch.empty_strided((1, 1, 2, 16), (1 << 26, 1 << 26, 1 << 25, 1), device="meta")
    assert ops._near(rows).stride() == (32, 32, 16, 1)
    one = rows[:, :, :1]
    assert ops._near(one) is one


def test_only_what_is_needed(device: torch.device) -> None:
    """Gradients of some inputs are the same bits as of all, and the kernels of the others do not run."""
    call = cases.inputs(lengths=(18, 20), head_size=16, device=device)
    _, *every = cases.ours(call)
    for wanted in ((0,), (1,), (2,), (0, 2)):
        leaves = [x.detach().requires_grad_(i in wanted) for i, x in enumerate(call.leaves)]
        with cases.use_tiles(None if device.type == "cuda" else cases.SMALL):
            out = ek.attention(*leaves, backend="triton")
            out.backward(call.grad)
        for i, leaf in enumerate(leaves):
            assert (leaf.grad is None) if i not in wanted else torch.equal(leaf.grad, every[i])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype, device: torch.device) -> None:
    """As SDPA: inputs are cast, the output has autocast's dtype, gradients that of the inputs."""
    call = cases.inputs(lengths=(18, 20), head_size=16, device=device)
    mixed = (call.query, call.key, call.value.detach().to(dtype).requires_grad_())
    with torch.autocast(device.type, dtype=dtype):
        out = ek.attention(*mixed, backend="triton")
        sdpa = F.scaled_dot_product_attention(*mixed)
    assert out.dtype == sdpa.dtype == dtype
    gradients = torch.autograd.grad(out, mixed, call.grad.to(dtype))
    assert [g.dtype for g in gradients] == [x.dtype for x in mixed]
    low = [x.detach().to(dtype).requires_grad_() for x in mixed]
    plain = ek.attention(*low, backend="triton")
    assert torch.equal(out, plain)
    for a, b in zip(gradients, torch.autograd.grad(plain, low, call.grad.to(dtype)), strict=True):
        assert torch.equal(a.to(dtype), b)

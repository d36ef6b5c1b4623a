"""FusedMultiheadAttention is an nn.MultiheadAttention, with the same outputs and gradients."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import embedkernels as ek
from embedkernels.ops.backend import triton_problem
from tests.contract import assert_within_contract, errors

WIDTH, HEADS, BATCH = 32, 2, 6
LENGTHS = 61, 75  # so many that one implementation's largest rounding error is not twice another's by chance
BACKENDS = ["torch", *(["triton"] if triton_problem() is None else [])]


def pair(device: torch.device, **options: Any) -> tuple[ek.FusedMultiheadAttention, nn.MultiheadAttention]:
    torch.manual_seed(3)
    ours = ek.FusedMultiheadAttention(WIDTH, HEADS, device=device, **options)
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if "bias" in name:
                parameter.normal_()
    stock = nn.MultiheadAttention(WIDTH, HEADS, device=device, **options)
    stock.load_state_dict(ours.state_dict())
    return ours, stock


def inputs(
    device: torch.device,
    kind: str,
    batch_first: bool,
    dtype: torch.dtype = torch.float32,
    lengths: tuple[int, int] = (7, 9),
) -> list[Tensor]:
    """Query, key and value: one tensor, two, or three."""

    def made(length: int) -> Tensor:
        shape = (BATCH, length, WIDTH) if batch_first else (length, BATCH, WIDTH)
        return torch.randn(shape, device=device, dtype=dtype).requires_grad_()

    if kind == "self":
        return [made(lengths[0])] * 3
    key = made(lengths[1])
    return [made(lengths[0]), key, key if kind == "cross" else made(lengths[1])]


def padding_of(key: Tensor, batch_first: bool) -> Tensor:
    length = key.shape[1 if batch_first else 0]
    lengths = torch.tensor([length, length - 2, 1] * (BATCH // 3), device=key.device)
    return torch.arange(length, device=key.device) >= lengths[:, None]


def gradients(module: nn.Module, given: list[Tensor], upstream: Tensor, **options: Any) -> list[Tensor]:
    out = module(*given, need_weights=False, **options)[0]
    leaves = [*dict.fromkeys(given), *module.parameters()]
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["self", "cross", "three"])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("mask", ["none", "padding", "causal", "both"])
def test_equal_to_the_stock_module(
    backend: Any, kind: str, batch_first: bool, bias: bool, mask: str, device: torch.device
) -> None:
    ours, stock = pair(device, batch_first=batch_first, bias=bias)
    given = inputs(device, kind, batch_first, lengths=LENGTHS)
    options: dict[str, Any] = {}
    if mask in ("padding", "both"):
        options["key_padding_mask"] = padding_of(given[1], batch_first)
    if mask in ("causal", "both"):
        axis = 1 if batch_first else 0
        size = given[0].shape[axis], given[1].shape[axis]
        options["attn_mask"] = torch.ones(size, dtype=torch.bool, device=device).triu(1)
        options["is_causal"] = True
    upstream = torch.randn_like(given[0])
    assert ours.stock_reason(*given, need_weights=False, **options) is None
    wide = copy.deepcopy(stock).double()
    doubles = {x: x.detach().double().requires_grad_() for x in given}
    expected = gradients(wide, [doubles[x] for x in given], upstream.double(), **options)
    theirs = gradients(stock, given, upstream, **options)
    with ek.use_backend(backend):
        found = gradients(ours, given, upstream, **options)
    for place, (mine, other, exact) in enumerate(zip(found, theirs, expected, strict=True)):
        if exact.shape == (3 * WIDTH,):
            # A key's bias adds the same to all scores of a query: its gradient is zero, and what rounding leaves of
            # that is chance.
            _, keys, values = mine.chunk(3)
            assert errors(keys, torch.zeros_like(keys))[0] <= 1e-5 * float(values.abs().max())
            mine, other, exact = (torch.cat([x[:WIDTH], x[2 * WIDTH :]]) for x in (mine, other, exact))
        assert_within_contract(mine, other, exact, f"result {place}")


def test_other_widths_of_key_and_value(device: torch.device) -> None:
    ours, stock = pair(device, kdim=20, vdim=12, batch_first=True)
    query = torch.randn(BATCH, 7, WIDTH, device=device)
    key, value = torch.randn(BATCH, 9, 20, device=device), torch.randn(BATCH, 9, 12, device=device)
    torch.testing.assert_close(
        ours(query, key, value, need_weights=False)[0], stock(query, key, value, need_weights=False)[0]
    )


def test_without_a_batch(device: torch.device) -> None:
    ours, stock = pair(device)
    x, padding = torch.randn(7, WIDTH, device=device), torch.arange(7, device=device) > 4
    for options in ({}, {"key_padding_mask": padding}):
        found = ours(x, x, x, need_weights=False, **options)[0]
        torch.testing.assert_close(found, stock(x, x, x, need_weights=False, **options)[0])


def test_dropout_is_for_training(device: torch.device) -> None:
    ours, stock = pair(device, dropout=0.5, batch_first=True)
    (x, *_) = inputs(device, "self", True)
    torch.testing.assert_close(
        ours.eval()(x, x, x, need_weights=False)[0], stock.eval()(x, x, x, need_weights=False)[0]
    )
    ours.train()
    torch.manual_seed(1)
    one = ours(x, x, x, need_weights=False)[0]
    torch.manual_seed(1)
    assert torch.equal(one, ours(x, x, x, need_weights=False)[0])
    assert not torch.equal(one, ours(x, x, x, need_weights=False)[0])


def test_a_query_without_keys_gives_the_bias(device: torch.device) -> None:
    ours, _ = pair(device, batch_first=True)
    (x, *_) = inputs(device, "self", True)
    hidden = torch.ones(BATCH, 7, dtype=torch.bool, device=device)
    hidden[1:] = False
    out = ours(x, x, x, key_padding_mask=hidden, need_weights=False)[0]
    assert torch.equal(out[0], ours.out_proj.bias.expand(7, WIDTH))
    assert out.isfinite().all()


STOCK: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "attention weights are asked for": ({}, {"need_weights": True}),
    "attn_mask is not causal order": ({}, {"attn_mask": torch.zeros(7, 7)}),
    "key_padding_mask is torch.float32": ({}, {"key_padding_mask": torch.zeros(BATCH, 7)}),
    "the module adds keys of its own": ({"add_bias_kv": True}, {}),
    "the module adds keys": ({"add_zero_attn": True}, {}),
}


@pytest.mark.parametrize("reason", STOCK)
def test_what_the_op_has_not_runs_the_stock_forward(reason: str, device: torch.device) -> None:
    made, call = STOCK[reason]
    ours, stock = pair(device, batch_first=True, **made)
    (x, *_) = inputs(device, "self", True)
    options = {"need_weights": False, **{k: v.to(device) if isinstance(v, Tensor) else v for k, v in call.items()}}
    told = ours.stock_reason(x, x, x, **options)
    assert told is not None
    assert told.startswith(reason)
    found, expected = ours(x, x, x, **options), stock(x, x, x, **options)
    assert torch.equal(found[0], expected[0])
    assert (found[1] is None) == (expected[1] is None)


def test_in_a_transformer_layer(device: torch.device) -> None:
    """It is handed padding as a bool mask and asks for no weights; training and evaluation."""
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 64, dropout=0.0, batch_first=True, device=device)
    (x, *_) = inputs(device, "self", True)
    padding = padding_of(x, True)
    swapped = copy.deepcopy(layer)
    swapped.self_attn.__class__ = ek.FusedMultiheadAttention
    kept = ~padding
    for training in (True, False):
        found = swapped.train(training)(x, src_key_padding_mask=padding)
        expected = layer.train(training)(x, src_key_padding_mask=padding)
        torch.testing.assert_close(found[kept], expected[kept], rtol=1e-4, atol=1e-5)


def test_compile(device: torch.device) -> None:
    torch.compiler.reset()
    ours, stock = pair(device, batch_first=True)
    (x, *_) = inputs(device, "self", True)
    compiled = torch.compile(
        lambda x, padding: ours(x, x, x, key_padding_mask=padding, need_weights=False)[0],
        fullgraph=True,
        backend="aot_eager",
    )
    padding = padding_of(x, True)
    expected = stock(x, x, x, key_padding_mask=padding, need_weights=False)[0]
    torch.testing.assert_close(compiled(x, padding), expected, rtol=1e-4, atol=1e-5)


def test_states_are_exchanged_and_the_class_stays() -> None:
    ours, stock = ek.FusedMultiheadAttention(WIDTH, HEADS), nn.MultiheadAttention(WIDTH, HEADS)
    assert isinstance(ours, nn.MultiheadAttention)
    assert list(ours.state_dict()) == list(stock.state_dict())
    stock.load_state_dict(ours.state_dict())
    assert repr(ours) == "Fused" + repr(stock)


def test_bad_shapes_are_stock_s_errors() -> None:
    ours, stock = pair(torch.device("cpu"))
    x = torch.randn(2, 3, 4, WIDTH)
    for module in (ours, stock):
        with pytest.raises(AssertionError, match="query should be unbatched 2D or batched 3D tensor"):
            module(x, x, x, need_weights=False)

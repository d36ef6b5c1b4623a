"""Padding: exact for every pattern, nothing read beyond it, and zeros where there is nothing to attend to."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import embedkernels as ek
from embedkernels.ops import attention as ops  # noqa: F401  defines the ops
from tests.attention import cases
from tests.properties import examples


def bounds_of(mask: list[bool] | None, start: int | None, length: int | None, num_keys: int) -> tuple[int, int, int]:
    counts = [
        (mask is None or mask[n]) and n >= (start or 0) and (length is None or n < (start or 0) + length)
        for n in range(num_keys)
    ]
    if not any(counts):
        return 0, 0, 0
    first, end = counts.index(True), num_keys - counts[::-1].index(True)
    return first, end, int(not all(counts[first:end]))


@examples(40)
@given(data=st.data(), num_keys=st.integers(1, 9))
def test_bounds(data: st.DataObject, num_keys: int) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = 2
    number = st.integers(-3, 12)
    masks = data.draw(st.none() | st.lists(st.lists(st.booleans(), min_size=num_keys, max_size=num_keys),
                                           min_size=rows, max_size=rows))  # fmt: skip
    starts = data.draw(st.none() | st.lists(number, min_size=rows, max_size=rows))
    lengths = data.draw(st.none() | st.lists(number, min_size=rows, max_size=rows))
    if masks is None and starts is None and lengths is None:
        return
    bounds = torch.ops.embedkernels.attention_key_bounds(
        None if masks is None else torch.tensor(masks, device=device),
        None if starts is None else torch.tensor(starts, device=device, dtype=torch.int32),
        None if lengths is None else torch.tensor(lengths, device=device),
        rows,
        num_keys,
    )
    for b in range(rows):
        row = bounds_of(masks and masks[b], starts and starts[b], lengths and lengths[b], num_keys)
        assert tuple(bounds[b].tolist()) == row


def test_bounds_of_a_long_mask(device: torch.device) -> None:
    """More keys than one round of the kernel reads."""
    mask = torch.zeros(3, 2500, dtype=torch.bool, device=device)
    mask[0, 1100:2400] = True
    mask[1, 3] = mask[1, 2499] = True
    bounds = torch.ops.embedkernels.attention_key_bounds(mask, None, None, 3, 2500)
    assert bounds.tolist() == [[1100, 2400, 0], [3, 2500, 1], [0, 0, 0]]


@pytest.mark.parametrize("kind", ["right", "left", "holes", "lengths", "starts"])
def test_keys_that_do_not_count_are_never_read(kind: str, device: torch.device) -> None:
    """NaN in them changes no bit of the output or of any gradient."""
    call = cases.inputs(lengths=(18, 40), head_size=16, device=device, **cases.masks(kind, 2, 40, device))
    clean = cases.ours(call)
    visible = cases.reference.visible_keys(18, 40, device, **call.options)
    hidden = ~visible.expand(2, 1, 1, 40).transpose(2, 3)
    dirty = [x.detach().masked_fill(hidden, float("nan")).requires_grad_() for x in (call.key, call.value)]
    for (name, a), b in zip(cases.pairs(cases.ours(cases.Call(call.query, *dirty, call.grad, call.options))), clean,
                            strict=True):  # fmt: skip
        assert torch.equal(a, b), name


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_rows_without_keys_give_zeros_and_take_none(backend: str, device: torch.device) -> None:
    """A batch row of padding only, and queries before every key: zeros in the output and in every gradient."""
    call = cases.inputs(lengths=(20, 20), head_size=16, device=device)
    mask = torch.ones(2, 20, dtype=torch.bool, device=device)
    mask[0] = False
    out = ek.attention(*call.leaves, is_causal=True, query_offset=-5, key_mask=mask, backend=backend)
    dq, dk, dv = torch.autograd.grad(out, call.leaves, call.grad)
    for x in (out, dq):
        assert (x[0] == 0).all()
        assert (x[1, :, :5] == 0).all()
        assert (x[1, :, 6:] != 0).all()  # query 5 sees one key, so its dq is 0
    for x in (dk, dv):
        assert (x[0] == 0).all()
        assert (x[1, :, 15:] == 0).all()
        assert torch.isfinite(x).all()
    assert (dv[1, :, :15] != 0).all()


def test_a_mask_for_the_whole_batch(device: torch.device) -> None:
    """(1, Sk) is the same mask in every row."""
    call = cases.inputs(lengths=(18, 33), head_size=16, device=device)
    mask = cases.masks("holes", 3, 33, device)["key_mask"][1:2]
    call.options["key_mask"] = mask
    one = cases.ours(call)
    call.options["key_mask"] = mask.repeat(2, 1)
    for (name, a), b in zip(cases.pairs(one), cases.ours(call), strict=True):
        assert torch.equal(a, b), name


def test_a_mask_with_strides(device: torch.device) -> None:
    call = cases.inputs(lengths=(18, 33), head_size=16, device=device, **cases.masks("holes", 2, 33, device))
    plain = cases.ours(call)
    call.options["key_mask"] = call.options["key_mask"].t().contiguous().t()
    for (name, a), b in zip(cases.pairs(plain), cases.ours(call), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("shape", [(0, 2, 5, 7), (2, 0, 5, 7), (2, 2, 0, 7), (2, 2, 5, 0)])
def test_empty_inputs(shape: tuple[int, ...], backend: str, device: torch.device) -> None:
    batch, heads, num_queries, num_keys = shape
    call = cases.inputs(
        batch=batch, heads=(heads, heads), lengths=(num_queries, num_keys), head_size=16, device=device,
        key_lengths=torch.full((batch,), 3, device=device),
    )  # fmt: skip
    out = ek.attention(*call.leaves, backend=backend, **call.options)
    assert out.shape == (batch, heads, num_queries, 16)
    assert (out == 0).all()
    for grad, leaf in zip(torch.autograd.grad(out, call.leaves, call.grad), call.leaves, strict=True):
        assert grad.shape == leaf.shape
        assert (grad == 0).all()

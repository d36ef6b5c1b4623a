"""Forward, dq, dk and dv within the numerical contract, for every two features together."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from embedkernels.kernels.attention_tiles import shipped_tiles
from tests.attention import cases
from tests.contract import assert_within_contract

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

# Lengths: like, fewer and more queries than keys; none a multiple of a block, so that every loop has a cut block.
# Causal order with an offset as in decoding against a cache, and with a negative one, which leaves the first queries
# without keys.
FEATURES = {
    "mask": ["none", "right", "left", "holes", "lengths", "starts"],
    "order": ["any", "causal", "offset", "negative"],
    "window": [None, (4, None), (None, 3), (2, 5), (18, 9)],
    "dtype": [FP32, BF16, FP16],
    "lengths": [(33, 37), (17, 45), (41, 19)],
    "heads": [(2, 2), (2, 1), (4, 2)],
    "layout": ["contiguous", "transposed", "packed"],
    "dropout_p": [0.0, 0.3],
}
HEAD_SIZES = (16, 20, 32, 40, 64, 80, 96, 128)
CASES = [(row, HEAD_SIZES[i % len(HEAD_SIZES)]) for i, row in enumerate(cases.covering(FEATURES))]


@pytest.fixture(autouse=True)
def _poison(monkeypatch: pytest.MonkeyPatch) -> None:
    cases.poisoned_allocations(monkeypatch)


def check(call: cases.Call, tiles: Any = cases.SMALL, fused: bool = False) -> None:
    ours, theirs, expected = cases.ours(call, tiles=tiles), cases.theirs(call, fused), cases.expected(call)
    for name, mine, their, exact in zip(cases.NAMES, ours, theirs, expected, strict=True):
        assert_within_contract(mine, their, exact, name)


def build(row: dict[str, Any], head_size: int, device: torch.device) -> cases.Call:
    row = dict(row)
    mask, order, lengths = row.pop("mask"), row.pop("order"), row["lengths"]
    if device.type == "cuda":
        row["lengths"] = lengths = (lengths[0] * 9, lengths[1] * 9)
    if order != "any":
        row["is_causal"] = True
        row["query_offset"] = {"causal": 0, "offset": abs(lengths[1] - lengths[0]), "negative": -lengths[0] // 4}[
            order
        ]
    return cases.inputs(head_size=head_size, device=device, **row, **cases.masks(mask, 2, lengths[1], device))


@pytest.mark.parametrize(("row", "head_size"), CASES)
def test_every_two_features_together(row: dict[str, Any], head_size: int, device: torch.device) -> None:
    """Some queries see one key: in fp32 flash kernels are the yardstick, see ``cases.flash_in_plain_pytorch``."""
    check(build(row, head_size, device), fused=row["dtype"] == FP32)


@pytest.mark.parametrize("scale", [0.0, 0.7, -0.3])
def test_any_scale(scale: float, device: torch.device) -> None:
    """0 gives every visible key the same weight, a negative one prefers the least score."""
    mask = cases.masks("holes", 2, 21, device)
    check(cases.inputs(lengths=(18, 21), head_size=16, scale=scale, is_causal=True, device=device, **mask))


@pytest.mark.parametrize("dropout_p", [0.0, 0.9])
@pytest.mark.parametrize("scale", [1e-46, -1e-46, 1.2e-38, 1e-30])
def test_scales_next_to_0(scale: float, dropout_p: float, device: torch.device) -> None:
    """Below float32's normal numbers and just above: every visible key has the same weight."""
    call = cases.inputs(
        lengths=(18, 21), head_size=16, scale=scale, is_causal=True, dropout_p=dropout_p, device=device
    )
    check(call)


@pytest.mark.parametrize("scale", [1e-39, -1e-42])
def test_scales_below_the_normal_numbers(scale: float, device: torch.device) -> None:
    """Gradients that are no normal numbers either have few bits: as many as there are."""
    call = cases.inputs(lengths=(18, 21), head_size=16, scale=scale, dropout_p=0.9, device=device)
    for (name, mine), exact in zip(cases.pairs(cases.ours(call)), cases.expected(call), strict=True):
        atol = 1e-5 if name in ("out", "dv") else 1e-42
        torch.testing.assert_close(mine.double(), exact, rtol=1e-5, atol=atol)


@pytest.mark.parametrize("scale", [2.0**100, -(2.0**100)])
def test_the_largest_scale_gives_numbers(scale: float, device: torch.device) -> None:
    call = cases.inputs(lengths=(18, 21), head_size=16, scale=scale, dropout_p=0.9999999, device=device)
    assert all(torch.isfinite(x).all() for x in cases.ours(call))


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
@pytest.mark.parametrize("scale", [1.0, 8.0, 40.0])
def test_large_scores(scale: float, dtype: torch.dtype, device: torch.device) -> None:
    """Scores up to some hundreds: rows from nearly to wholly one-hot, where the backward's differences cancel.

    SDPA's plain implementation computes 16-bit inputs in fp32 throughout. Its fused kernels, ours, and every other
    that recomputes probabilities from what the forward has stored, take delta from the rounded output: that is the
    yardstick here.
    """
    check(cases.inputs(lengths=(40, 96), head_size=32, scale=scale, dtype=dtype, device=device), fused=True)


WINDOWS = [(0, 0), (7, 0), (0, 7), (40, 40), (None, 0), (0, None), (1000, 1000)]


@pytest.mark.parametrize("offset", [-20, 0, 12])
@pytest.mark.parametrize("is_causal", [False, True])
def test_windows(offset: int, is_causal: bool, device: torch.device) -> None:
    """Of one key to all keys, several blocks wide and beside all keys, where queries see none.

    Judged together: where few keys are seen, the largest error of one call is chance.
    """
    triples: dict[str, list[tuple[torch.Tensor, ...]]] = {name: [] for name in cases.NAMES}
    for window in WINDOWS:
        options = {"window": window, "query_offset": offset, "is_causal": is_causal}
        call = cases.inputs(batch=1, heads=(2, 1), lengths=(70, 75), head_size=32, device=device, **options)
        for name, *results in zip(
            cases.NAMES, cases.ours(call), cases.theirs(call, fused=True), cases.expected(call), strict=True
        ):
            triples[name].append(tuple(results))
    for name, several in triples.items():
        assert_within_contract(*(torch.cat([x.flatten() for x in each]) for each in zip(*several, strict=True)), name)


def test_a_window_of_one_key_is_its_value(device: torch.device) -> None:
    call = cases.inputs(lengths=(40, 45), device=device, window=(0, 0), query_offset=5)
    out, dq, dk, dv = cases.ours(call)
    assert torch.equal(out, call.value[:, :, 5:])
    assert torch.equal(dv[:, :, 5:], call.grad)
    assert all(x.abs().max() < 1e-5 for x in (dq, dk, dv[:, :, :5]))


@pytest.mark.parametrize("window", [(1 << 29, 1 << 29), (None, None)], ids=str)
def test_a_window_that_hides_nothing_gives_the_same_bits(window: Any, device: torch.device) -> None:
    call = cases.inputs(lengths=(40, 45), device=device, query_offset=3)
    same = cases.Call(*call.leaves, call.grad, {**call.options, "window": window})
    assert all(torch.equal(a, b) for a, b in zip(cases.ours(call), cases.ours(same), strict=True))


@pytest.mark.parametrize("mask", ["none", "lengths"])
def test_one_query_against_a_cache(mask: str, device: torch.device) -> None:
    call = cases.inputs(
        heads=(4, 2),
        lengths=(1, 45),
        is_causal=True,
        query_offset=44,
        device=device,
        **cases.masks(mask, 2, 45, device),
    )
    check(call)


def test_tiles_of_the_interpreter_are_the_shipped_ones_too(device: torch.device) -> None:
    """Without the override: blocks larger than the inputs."""
    check(cases.inputs(lengths=(19, 70), head_size=64, dtype=BF16, is_causal=True, device=device), tiles=None)


@pytest.mark.gpu
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("mask", ["none", "holes"])
@pytest.mark.parametrize(
    ("dtype", "width"), sorted({(dtype, width) for _, dtypes, width, _, _ in shipped_tiles() for dtype in dtypes})
)
def test_every_shipped_tile_on_the_device(
    dtype: str, width: int, mask: str, dropout_p: float, device: torch.device
) -> None:
    """The tiles of this device's family, at lengths of several blocks, in the head size that fills them."""
    call = cases.inputs(
        heads=(4, 2), lengths=(517, 645), head_size=width, dtype={"fp32": FP32, "bf16": BF16, "fp16": FP16}[dtype],
        layout="transposed", is_causal=True, query_offset=128, dropout_p=dropout_p, device=device,
        **cases.masks(mask, 2, 645, device),
    )  # fmt: skip
    check(call)


@pytest.mark.gpu
def test_offsets_beyond_32_bits(device: torch.device) -> None:
    """Keys whose rows lie 2**23 elements apart: the last of them is beyond 2**31."""
    length, stride = 300, 1 << 23
    storage = torch.empty(length * stride, dtype=BF16, device=device)
    key = torch.as_strided(storage, (1, 1, length, 64), (0, 0, stride, 1))
    call = cases.inputs(batch=1, heads=(1, 1), lengths=(length, length), head_size=64, dtype=BF16, device=device)
    key.copy_(call.key.detach())
    far = cases.ours(cases.Call(call.query, key.requires_grad_(), call.value, call.grad))
    for (name, a), b in zip(cases.pairs(far), cases.ours(call), strict=True):
        assert torch.equal(a, b), name

"""Any call at all: shapes, strides, dtypes, options and positions drawn by hypothesis, some thousand of them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import embedkernels as ek
from embedkernels.ops.backend import triton_problem
from tests.contract import assert_within_contract
from tests.embed.cases import (
    DTYPES,
    EXTRAS,
    MASKS,
    NORMS,
    PACKED,
    POSITIONS,
    RMS_NORMS,
    SCALES,
    SINUSOIDS,
    SOURCES,
    TYPES,
    Case,
    assert_contract,
    make,
)
from tests.properties import examples
from tests.rope.test_rope import stock as stock_rope

pytestmark = pytest.mark.skipif(triton_problem() is not None, reason="needs triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NORM_KINDS = {"layer": NORMS[1:], "rms": RMS_NORMS, "none": NORMS[:1]}
STRIDES = ("as it is", "turned", "cut out", "every other", "odd offset")
shapes = st.one_of(
    st.tuples(st.integers(1, 9)), st.tuples(*[st.integers(1, 5)] * 2), st.tuples(*[st.integers(1, 3)] * 3)
)
seeds = st.integers(0, 2**32 - 1)
parts = {
    "positions": st.sampled_from([*POSITIONS, *SINUSOIDS]),
    "types": st.sampled_from(TYPES),
    "source": st.sampled_from(SOURCES),
    "extra": st.sampled_from(EXTRAS),
    "mask": st.sampled_from(MASKS),
    "packed": st.sampled_from(PACKED),
    "scale": st.sampled_from(SCALES),
    "dropout_first": st.booleans(),
    "dropout_p": st.sampled_from([0.0, 0.1, 0.9]),
}


@pytest.mark.parametrize("kind", NORM_KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@examples(15)
@given(
    data=st.data(),
    shape=shapes.filter(lambda shape: math.prod(shape) >= 8),
    seed=seeds,
    id_dtype=st.sampled_from([torch.int32, torch.int64]),
    **parts,
)
def test_any_call_meets_the_contract(
    kind: str, dtype: torch.dtype, data: st.DataObject, shape: tuple[int, ...], seed: int, **options: Any
) -> None:
    """Output and every gradient. Four calls with the same options, of 8 rows or more, are judged together: among few
    elements it is chance whether one error is twice another. (Fewer and narrower rows: ``test_embed_numerics``.)

    So it is where a norm is taken of the few elements that dropout leaves: of a single one, the gradient is the
    difference of two equal numbers times 1 / its size. Rows are so wide that two dozen are left.
    """
    norm = data.draw(st.sampled_from(NORM_KINDS[kind]), label="norm")
    width = data.draw(st.integers(24, 70), label="width")
    if norm != "none" and options["dropout_first"]:
        width = max(width, math.ceil(24 / (1 - options["dropout_p"])))
    torch.manual_seed(seed)
    assert_contract(*(make(shape, width, dtype=dtype, norm=norm, device=DEVICE, **options) for _ in range(4)))


def restrided(x: Tensor, strides: str) -> Tensor:
    """The same values, laid out otherwise."""
    if strides == "turned":
        order = list(range(x.dim()))[::-1]
        return x.detach().permute(order).contiguous().permute(order)
    if strides == "cut out":
        wide = x.new_zeros([n + 3 for n in x.shape])
        inside = wide[tuple(slice(1, n + 1) for n in x.shape)]
        return inside.copy_(x.detach())
    if strides == "every other":
        wide = x.new_zeros(*x.shape[:-1], 2 * x.shape[-1])
        return wide[..., ::2].copy_(x.detach())
    if strides == "odd offset":
        flat = x.new_zeros(x.numel() + 3)
        return flat[3:].view(x.shape).copy_(x.detach())
    return x.detach().clone()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@examples(40)
@given(
    data=st.data(),
    shape=shapes,
    width=st.integers(4, 40),
    seed=seeds,
    norm=st.sampled_from([*NORMS, *RMS_NORMS]),
    **parts,
)
def test_strides_change_no_bit(
    dtype: torch.dtype, data: st.DataObject, shape: tuple[int, ...], width: int, seed: int, **options: Any
) -> None:
    """But for positions that are expanded: their gradient is added up over the batch first."""
    torch.manual_seed(seed)
    if options["positions"] == "expanded":
        options["positions"] = "one row"
    options["packed"] = "none" if options["mask"] != "none" else options["packed"]
    case = make(shape, width, dtype=dtype, device=DEVICE, **options)

    def laid_out(x: Any, name: str) -> Any:
        if not isinstance(x, Tensor) or x.dim() == 0:
            return x
        return restrided(x, data.draw(st.sampled_from(STRIDES), label=name))

    moved = Case(
        laid_out(case.ids, "ids"),
        {name: laid_out(x, name).requires_grad_(x.requires_grad) for name, x in case.parameters.items()},
        {name: laid_out(x, name) for name, x in case.options.items()},
    )
    results = []
    for each in (case, moved):
        torch.manual_seed(1)
        results.append(each.run())
    assert torch.equal(*results)
    upstream = torch.randn(results[0].shape, device=DEVICE).to(results[0].dtype)
    expected = case.gradients(results[0], upstream)
    found = moved.gradients(results[1], laid_out(upstream, "upstream"))
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


@examples(150)
@given(
    data=st.data(), shape=shapes, width=st.integers(4, 40), seed=seeds, dtype=st.sampled_from(DTYPES),
    norm=st.sampled_from([*NORMS, *RMS_NORMS]),
    **{name: strategy for name, strategy in parts.items() if name not in ("packed", "mask", "dropout_p")},
)  # fmt: skip
def test_packed_rows_are_those_of_the_whole_call(
    data: st.DataObject, shape: tuple[int, ...], width: int, seed: int, **options: Any
) -> None:
    """Any places, in any order, some of them twice: the bits of the whole call's rows."""
    torch.manual_seed(seed)
    case = make(shape, width, device=DEVICE, **options)
    last = math.prod(shape) - 1
    places = data.draw(st.lists(st.integers(0, last), max_size=2 * last + 2), label="places")
    packed = torch.tensor(places, dtype=torch.int64, device=DEVICE)
    assert torch.equal(case.run(packed=packed), case.run().reshape(-1, width)[packed])


@examples(100)
@given(
    batch=st.integers(1, 3), lengths=st.lists(st.integers(1, 6), min_size=1, max_size=4), width=st.integers(4, 40),
    seed=seeds, positions=st.sampled_from(["start", *SINUSOIDS[:3]]), norm=st.sampled_from(NORMS),
    dtype=st.sampled_from(DTYPES),
)  # fmt: skip
def test_piece_by_piece_gives_the_whole_sequence(
    batch: int, lengths: list[int], width: int, seed: int, **parts: Any
) -> None:
    """As ``generate`` feeds it: every piece with the position that its past gives it."""
    torch.manual_seed(seed)
    case = make((batch, sum(lengths)), width, types="zeros", device=DEVICE, **parts)
    whole = case.run()
    assert case.ids is not None
    first = case.options.get("position_start", 0)
    pieces, done = [], 0
    for length in lengths:
        options = {**case.options, "position_start": first + done}
        pieces.append(Case(case.ids[:, done : done + length], case.parameters, options).run())
        done += length
    assert torch.equal(torch.cat(pieces, 1), whole)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@examples(60)
@given(
    batch=st.integers(1, 3), counts=st.tuples(st.integers(1, 5), st.integers(0, 3)), length=st.integers(1, 9),
    pairs=st.integers(1, 12), rest=st.integers(0, 9), half=st.booleans(), shared=st.booleans(), fp32=st.booleans(),
    interleaved=st.booleans(), strides=st.sampled_from(STRIDES[:3]), seed=seeds,
)  # fmt: skip
def test_any_rotation_meets_the_contract(
    dtype: torch.dtype, batch: int, counts: tuple[int, int], length: int, pairs: int, rest: int, half: bool,
    shared: bool, fp32: bool, interleaved: bool, strides: str, seed: int,
) -> None:  # fmt: skip
    """Query and key (or none), tables whole or of half the columns, one for all sequences or one each."""
    torch.manual_seed(seed)

    def heads(count: int) -> Tensor:
        return torch.randn(batch, count, length, 2 * pairs + rest, device=DEVICE).to(dtype)

    query, key = (restrided(heads(count), strides).requires_grad_() if count else None for count in counts)
    angles = torch.rand(1 if shared else batch, length, pairs, device=DEVICE) * 6.3
    narrow = [x.to(torch.float32 if fp32 else dtype) for x in (angles.cos(), angles.sin())]
    wide = [x.repeat_interleave(2, -1) if interleaved else torch.cat((x, x), -1) for x in narrow]
    given = [x for x in (query, key) if x is not None]
    ours = ek.rope(
        query, key, *(narrow if half else wide), interleaved=interleaved, rotary_dim=2 * pairs, backend="triton"
    )
    assert (ours[1] is None) == (key is None)
    found = [x for x in ours if x is not None]
    upstream = [torch.randn(x.shape, device=DEVICE).to(dtype) for x in found]
    grads = torch.autograd.grad(found, given, upstream)
    triples: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {"output": [], "gradient": []}
    for x, y, grad, up in zip(given, found, grads, upstream, strict=True):
        theirs = stock_rope(x, *wide, interleaved).to(dtype)
        double = x.detach().double().requires_grad_()
        exact = stock_rope(double, *(table.double() for table in wide), interleaved)
        triples["output"].append((y, theirs, exact))
        triples["gradient"].append(
            (grad, torch.autograd.grad(theirs, x, up)[0], torch.autograd.grad(exact, double, up.double())[0])
        )
    for name, several in triples.items():
        assert_within_contract(*(torch.cat([x.flatten() for x in each]) for each in zip(*several, strict=True)), name)


@examples(600)
@given(
    data=st.data(), shape=shapes, dtype=st.sampled_from([torch.int32, torch.int64]), seed=seeds,
    padding_idx=st.integers(0, 3), start=st.integers(-3, 9), padding_position=st.integers(-1, 9),
    skip=st.integers(0, 7), strides=st.sampled_from(STRIDES),
)  # fmt: skip
def test_any_padding_is_counted(
    data: st.DataObject, shape: tuple[int, ...], dtype: torch.dtype, seed: int, padding_idx: int, start: int,
    padding_position: int, skip: int, strides: str,
) -> None:  # fmt: skip
    """The definition in one line of PyTorch: how many tokens that are no padding there are up to here."""
    torch.manual_seed(seed)
    shape = (*shape[:-1], data.draw(st.integers(skip, skip + 20), label="length"))
    tokens = restrided(torch.randint(0, 4, shape, device=DEVICE).to(dtype), strides)
    options = {"padding_idx": padding_idx, "start": start, "padding_position": padding_position, "skip": skip}
    ours = ek.count_positions(tokens, **options, backend="triton")
    real = tokens != padding_idx
    expected = torch.where(real, real.cumsum(-1) + start, padding_position)[..., skip:]
    assert torch.equal(ours.long(), expected)
    assert torch.equal(ours, ek.count_positions(tokens, **options, backend="torch"))

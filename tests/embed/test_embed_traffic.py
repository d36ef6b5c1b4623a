"""Bytes that the kernels of ``embed`` load and store, against the fewest that an op must move.

Each pass may move 5 % more than its floor: the statistics of the rows, and in the backward the programs' sums for the
norm's gradients. What is loaded again within a launch, as a row of a table for every token that has it, is served by
caches; how often that happens is exact.
"""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import embedkernels as ek
from bench import front_end
from embedkernels.kernels import embed as kernels
from tests.embed.traffic import Traffic, interpreted, recorded

pytestmark = interpreted
CPU = torch.device("cpu")
MORE = 1.05
DTYPES = ("float32", "bfloat16")


def passes(call: Any, leaves: list[torch.Tensor]) -> tuple[torch.Tensor, Traffic, Traffic]:
    """The output, and what the forward and ``embed_backward`` move: the gradients of tables are another op's."""
    with recorded() as forward:
        y = call()
    with recorded() as backward:
        torch.autograd.grad(y, leaves, torch.randn_like(y))
    backward.launches = [launch for launch in backward.launches if launch.kernel.startswith("embed_")]
    return y, forward, backward


def check(traffic: Traffic, floor: float) -> None:
    moved = traffic.moved()
    assert floor <= sum(moved.values()) <= MORE * floor, (moved, floor)


# Lengths that fill the tiles, so that every masked row would show; with a hot row and with rows that meet seldom.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("batch", "length", "rows", "width", "ids"),
    [(2, 64, 300, 128, "zipf"), (2, 16, 30, 384, "hot"), (1, 48, 2000, 768, "uniform"), (2, 16, 300, 1024, "zipf")],
    ids=str,
)
def test_bert_s_stem_moves_its_floor(
    batch: int, length: int, rows: int, width: int, ids: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the floors that the benchmark divides by, dropout included."""
    monkeypatch.setattr(kernels, "_multiprocessors", lambda _: 2)
    case = front_end.EmbedCase("", batch, length, rows, width, ids, dtype)
    x = front_end.inputs(case, CPU)
    leaves = [x.word, x.position, x.kind, x.gain, x.bias]
    _, forward, backward = passes(
        lambda: ek.embed(
            x.ids, x.word, position_weight=x.position, type_weight=x.kind, type_ids=x.types, norm="layer",
            norm_weight=x.gain, norm_bias=x.bias, dropout_p=0.1, padding_idx=0, backend="triton",
        ),
        leaves,
    )  # fmt: skip
    floors = front_end.floors(case, x)
    check(forward, floors["forward"][0])
    # Partial rows are few beside the gradients only at the sizes of the next test.
    partial = backward.moved()["store partial"]
    sums = {name: size for name, size in backward.moved().items() if "partial" not in name}
    assert floors["backward_to_rows"][0] <= sum(sums.values()) <= MORE * floors["backward_to_rows"][0]

    tokens, row = batch * length, width * x.word.element_size()
    tables = ("weight", "position_weight", "type_weight", "norm_weight")
    programs = forward.issued().pop("load seed") // 8
    assert forward.issued() == {
        **{f"load {name}": tokens * row for name in (*tables, "norm_bias")},
        "load ids": 8 * tokens, "load type_ids": 8 * tokens, "load seed": 8 * programs,
        "store out": tokens * row, "store mean": 4 * tokens, "store rstd": 4 * tokens,
    }  # fmt: skip
    programs = backward.issued().pop("load seed") // 8
    assert backward.issued() == {
        **{f"load {name}": tokens * row for name in (*tables, "grad")},
        "load ids": 8 * tokens, "load type_ids": 8 * tokens, "load seed": 8 * programs,
        "load mean": 4 * tokens, "load rstd": 4 * tokens, "store grad_rows": tokens * row,
        "store partial": partial, "load partial": partial,
        "store norm_weight_grad": row, "store norm_bias_grad": row,
    }  # fmt: skip
    t = kernels.tile(width, x.word.element_size(), True, True)
    assert partial == kernels.partial_rows(tokens, x.word.element_size(), t, 2) * 2 * width * 4


@pytest.mark.parametrize("ids", ["zipf", "uniform", "hot"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(30522, 768), (250002, 1024)])
@pytest.mark.parametrize("tokens", [16384, 65536])
@pytest.mark.parametrize("multiprocessors", [108, 132, 148])
def test_partial_rows_and_statistics_stay_small_at_training_sizes(
    multiprocessors: int, tokens: int, rows: int, width: int, dtype: str, ids: str
) -> None:
    """What the test above leaves out, written and read, by the programs of an A100, an H100 and a B200."""
    case = front_end.EmbedCase("", tokens // 128, 128, rows, width, ids, dtype)
    generator = torch.Generator().manual_seed(1)
    table = torch.empty(0, dtype=getattr(torch, dtype))
    x = SimpleNamespace(
        ids=front_end.make_ids(tokens, rows, ids, generator), types=torch.tensor([0, 1]), word=table,
        kind=torch.empty(2, 0),
    )  # fmt: skip
    t = kernels.tile(width, table.element_size(), True, True)
    programs = kernels.partial_rows(tokens, table.element_size(), t, multiprocessors)
    floor = front_end.floors(case, x)["backward_to_rows"][0]
    assert floor + 2 * programs * 2 * width * 4 + 8 * tokens <= MORE * floor


def table(rows: int, width: int, dtype: str) -> torch.Tensor:
    return torch.randn(rows, width).to(getattr(torch, dtype)).requires_grad_()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "width"), [(128, 128), (32, 768), (8, 4096)])
def test_tokens_alone_move_a_copy(tokens: int, width: int, dtype: str) -> None:
    """With a scale they have a backward too: the gradient in and out. Without one nothing is launched."""
    ids, weight = torch.randint(0, 50, (2, tokens // 2)), table(50, width, dtype)
    row, unique = width * weight.element_size(), int(ids.unique().numel())
    chunks = kernels.tile(width, weight.element_size(), False, False).chunks
    for scale in (1.0, 3.0):
        call = functools.partial(ek.embed, ids, weight, scale=scale, backend="triton")
        _, forward, backward = passes(call, [weight])
        check(forward, 8 * tokens + (unique + tokens) * row)
        issued = {"load ids": 8 * chunks * tokens, "load weight": tokens * row, "store out": tokens * row}
        assert forward.issued() == issued
        gradient = {} if scale == 1.0 else {"load grad": tokens * row, "store grad_rows": tokens * row}
        assert backward.moved() == backward.issued() == gradient


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "width"), [(128, 128), (32, 768)])
def test_an_rms_norm_of_given_rows_moves_its_floor(tokens: int, width: int, dtype: str) -> None:
    x, gain = table(tokens, width, dtype), torch.ones(width, dtype=getattr(torch, dtype)).requires_grad_()
    row = width * x.element_size()
    y, forward, backward = passes(
        lambda: ek.embed(
            None, inputs_embeds=x.view(2, -1, width), norm="rms", norm_weight=gain, backend="triton"
        ),
        [x, gain],
    )  # fmt: skip
    assert y.shape == (2, tokens // 2, width)
    check(forward, (2 * tokens + 1) * row)
    assert forward.issued() == {
        "load weight": tokens * row, "load norm_weight": tokens * row, "store out": tokens * row,
        "store rstd": 4 * tokens,
    }  # fmt: skip
    moved = backward.moved()
    assert moved.pop("store partial") == moved.pop("load partial")
    floor = (3 * tokens + 2) * row
    assert floor <= sum(moved.values()) <= MORE * floor


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["halves", "fairseq"])
@pytest.mark.parametrize(("tokens", "width"), [(128, 128), (64, 384)])
def test_sinusoids_are_not_read(tokens: int, width: int, layout: str, dtype: str) -> None:
    """As in Marian and M2M100: scaled tokens, then dropout. A row of frequencies or two stand for the table."""
    ids, weight = torch.randint(0, 50, (2, tokens // 2)), table(50, width, dtype)
    row, unique = width * weight.element_size(), int(ids.unique().numel())
    _, forward, backward = passes(
        lambda: ek.embed(ids, weight, scale=8.0, sinusoids=layout, dropout_p=0.1, backend="triton"), [weight]
    )
    check(forward, 8 * tokens + (unique + tokens) * row)
    constants = 4 * width + 4 if layout == "fairseq" else 8 * width
    assert forward.moved()["load position_weight"] == constants
    assert forward.issued()["load weight"] == forward.issued()["store out"] == tokens * row
    check(backward, 2 * tokens * row)

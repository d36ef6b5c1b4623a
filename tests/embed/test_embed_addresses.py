"""Tables, rows and ids more than 2**31 elements long: what an offset of 32 bits would miss.

Memory that nobody writes takes no room on a CPU, so that this costs virtual memory alone.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import embedkernels as ek
from embedkernels.ops.backend import triton_problem
from tests.embed.cases import Case, make

WIDTH = 1024
ROWS = 2**31 // WIDTH + 8
BACKENDS = ["torch", *(["triton"] if triton_problem() is None else [])]
FAR = [ROWS - 1, 0, ROWS - 8, 2, ROWS - 3, ROWS - 1]  # the first of the last 8 rows begins at element 2**31


def far_table(near: Tensor, ids: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """A table with the rows of ``near`` at places FAR, and ids that find there what ``ids`` found in it."""
    places = torch.tensor(FAR, device=device)[: near.shape[0]]
    table = torch.empty(ROWS, WIDTH, dtype=near.dtype, device=device)
    table[places] = near.detach()
    return table, places[ids]


def outcome(case: Case, backend: Any) -> list[Tensor]:
    torch.manual_seed(1)
    y = case.run(backend=backend)
    torch.manual_seed(2)
    return [y.detach(), *case.gradients(y, torch.randn(y.shape, device=y.device)).values()]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("norm", ["none", "both"])
@pytest.mark.parametrize("table", ["weight", "position_weight", "type_weight"])
def test_tables(table: str, norm: str, backend: Any, device: torch.device) -> None:
    """With a norm the backward reads the rows once more. The far table is frozen: its gradient is not virtual."""
    near = make((2, 3), WIDTH, dtype=torch.bfloat16, device=device, norm=norm, padding_idx=None)
    ids = {"weight": "ids", "position_weight": "position_ids", "type_weight": "type_ids"}[table]
    found = near.ids if table == "weight" else near.options[ids]
    found.remainder_(5)  # rows 0 to 4 alone
    near.parameters[table] = torch.randn(5, WIDTH, device=device).bfloat16()
    rows, there = far_table(near.parameters[table], found, device)
    far = Case(near.ids, {**near.parameters, table: rows}, dict(near.options))
    if table == "weight":
        far.ids = there
    else:
        far.options[ids] = there
    ours, expected = outcome(far, backend), outcome(near, backend)
    assert len(ours) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("part", ["inputs_embeds", "extra", "inputs_embeds of half a row"])
def test_packed_rows_of_long_sequences(part: str, backend: Any, device: torch.device) -> None:
    """Rows that are given, of a sequence whose last tokens lie beyond 2**31 elements; few of them are made."""
    places = torch.tensor(FAR, device=device)
    near = make((1, len(FAR)), WIDTH, dtype=torch.bfloat16, device=device, positions="none", types="none",
                source="given", extra="full")  # fmt: skip
    near.parameters = {name: x.detach().requires_grad_("norm" in name) for name, x in near.parameters.items()}
    name, _, half = part.partition(" ")
    if half:  # rows 2·WIDTH apart: half as many of them reach as far
        places = places // 2
        wide = torch.empty(1, ROWS // 2, 2 * WIDTH, dtype=torch.bfloat16, device=device)
        rows, length = wide[..., :WIDTH], ROWS // 2
        places[0] = places[-1] = length - 1
    else:
        rows, length = torch.empty(1, ROWS, WIDTH, dtype=torch.bfloat16, device=device), ROWS
    order = dict(zip(places.tolist(), range(len(FAR)), strict=True))  # the last of two that share a place counts
    near.parameters = {
        key: x[:, [order[place] for place in places.tolist()]].contiguous()
        if key in ("inputs_embeds", "extra")
        else x
        for key, x in near.parameters.items()
    }
    rows[0, places] = near.parameters[name].detach()[0]
    other = {"inputs_embeds": "extra", "extra": "inputs_embeds"}[name]
    far_parameters = {**near.parameters, name: rows}
    # The other part is the same for all tokens.
    far_parameters[other] = near.parameters[other] = near.parameters[other][:, :1]
    if other == "inputs_embeds":
        far_parameters[other] = near.parameters[other].expand(1, length, WIDTH)
        near.parameters[other] = near.parameters[other].expand(1, len(FAR), WIDTH)
    far = Case(None, far_parameters, {**near.options, "packed": places})
    near.options["packed"] = torch.arange(len(FAR), device=device)
    ours, expected = outcome(far, backend), outcome(near, backend)
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_ids_that_lie_far_apart(backend: Any, device: torch.device) -> None:
    storage = torch.empty(2**31 + 8, dtype=torch.int32, device=device)
    ids = storage[:: 2**30]
    assert ids.shape == (3,)
    assert ids.stride() == (2**30,)
    ids.copy_(torch.tensor([3, 1, 7]))
    weight = torch.randn(11, 16, device=device)
    assert torch.equal(ek.embed(ids, weight, backend=backend), weight[[3, 1, 7]])
    assert torch.equal(
        ek.count_positions(ids, padding_idx=1, backend=backend), torch.tensor([1, 0, 2], device=device)
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_lookups(backend: Any, device: torch.device) -> None:
    near = torch.randn(5, WIDTH, device=device).bfloat16()
    ids = torch.tensor([[0, 1, 4], [2, 3, 0]], device=device)
    rows, there = far_table(near, ids, device)
    assert torch.equal(ek.embedding(there, rows, backend=backend), near[ids])

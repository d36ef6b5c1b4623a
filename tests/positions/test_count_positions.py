"""Counted positions: those of RoBERTa and OPT, on every backend, for any padding, strides and dtype."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.opt.modeling_opt import OPTLearnedPositionalEmbedding
from transformers.models.roberta.modeling_roberta import RobertaEmbeddings

import embedkernels as ek
from embedkernels.ops.backend import triton_problem
from tests.hf.models import named_here

BACKENDS = ["torch", *(["triton"] if triton_problem() is None else [])]
on_backends = pytest.mark.parametrize("backend", BACKENDS)


def some_tokens(*shape: int, device: torch.device) -> Tensor:
    """Ids of 0 to 3 with padding (1) anywhere; one sequence is all padding, one has none."""
    tokens = torch.randint(0, 4, shape, device=device)
    if tokens.dim() > 1 and shape[0] > 2:
        tokens[1] = 1
        tokens[2] = 3
    return tokens


@on_backends
@pytest.mark.parametrize("past", [0, 5])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("length", [1, 7, 128, 300])
def test_roberta_s_positions(backend: Any, length: int, dtype: torch.dtype, past: int, device: torch.device) -> None:
    ids = some_tokens(4, length, device=device).to(dtype)
    expected = RobertaEmbeddings.create_position_ids_from_input_ids(ids, 1, past)
    ours = ek.count_positions(ids, padding_idx=1, start=1 + past, padding_position=1, backend=backend)
    assert ours.dtype == expected.dtype
    assert torch.equal(ours, expected)


@on_backends
@pytest.mark.parametrize("past", [0, 3])
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32, torch.int64], ids=str)
def test_opt_s_positions(backend: Any, dtype: torch.dtype, past: int, device: torch.device) -> None:
    """Read off OPT's own module: its table holds the number of every row."""
    mask = (some_tokens(4, 9, device=device) > 1).to(dtype)
    table = OPTLearnedPositionalEmbedding(20, 1).to(device)
    table.weight.data = torch.arange(22.0, device=device).view(22, 1)
    name = named_here("past_key_values_length", OPTLearnedPositionalEmbedding.forward)
    expected = table(mask.long(), **{name: past})[..., 0].long()
    ours = ek.count_positions(mask, start=1, padding_position=1, skip=past, backend=backend)
    assert torch.equal(ours, expected)


@on_backends
@pytest.mark.parametrize("shape", [(6,), (2, 3, 5), (0, 4), (3, 0), (0,)], ids=str)
def test_tokens_of_any_shape(backend: Any, shape: tuple[int, ...], device: torch.device) -> None:
    tokens = some_tokens(*shape, device=device)
    ours = ek.count_positions(tokens, padding_idx=1, start=-3, padding_position=9, backend=backend)
    expected = torch.where(tokens == 1, 9, torch.cumsum(tokens != 1, -1) - 3)
    assert ours.shape == shape
    assert torch.equal(ours, expected)


@on_backends
def test_tokens_of_any_stride(backend: Any, device: torch.device) -> None:
    wide = some_tokens(6, 12, device=device)
    for tokens in (wide.t(), wide[::2, 1::3], wide[:1].expand(6, 12), wide.flip(1).t()):
        ours = ek.count_positions(tokens, padding_idx=1, backend=backend)
        assert ours.is_contiguous()
        assert torch.equal(ours, ek.count_positions(tokens.contiguous(), padding_idx=1, backend="torch"))


@pytest.mark.skipif("triton" not in BACKENDS, reason="needs triton")
def test_sequences_longer_than_a_block(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("embedkernels.kernels.positions._LARGEST_BLOCK", 16)
    tokens = some_tokens(4, 70, device=device)
    for skip in (0, 15, 16, 33, 70):
        ours = ek.count_positions(tokens, padding_idx=1, start=4, padding_position=2, skip=skip, backend="triton")
        theirs = ek.count_positions(tokens, padding_idx=1, start=4, padding_position=2, skip=skip, backend="torch")
        assert torch.equal(ours, theirs)


@on_backends
@pytest.mark.parametrize(
    ("dtype", "padding_idx"), [(torch.uint8, 300), (torch.int8, 256), (torch.int32, 2**32), (torch.uint8, -1)]
)
def test_a_padding_idx_that_no_token_can_have_is_no_token_s(
    backend: Any, dtype: torch.dtype, padding_idx: int, device: torch.device
) -> None:
    tokens = torch.tensor([44, 0, 1, -1], device=device).to(dtype)
    ours = ek.count_positions(tokens, padding_idx=padding_idx, backend=backend)
    assert ours.tolist() == [1, 2, 3, 4]


TOKENS = torch.ones(2, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"tokens": [1]}, TypeError, "tokens must be a Tensor, got list"),
        ({"tokens": TOKENS.float()}, TypeError, "tokens must be integers or bool, got torch.float32"),
        ({"tokens": TOKENS[0, 0]}, ValueError, r"tokens must be \(..., S\) .* got shape \(\)"),
        ({"padding_idx": 1.0}, TypeError, "padding_idx must be an int, got float"),
        ({"start": 0.5}, TypeError, "start must be an int, got float"),
        ({"start": 2**30}, ValueError, r"start must be below 2\*\*30 in magnitude, got 1073741824"),
        ({"padding_position": -(2**30)}, ValueError, "padding_position must be below"),
        ({"skip": 4}, ValueError, "skip must be 0 to the length 3, got 4"),
        ({"skip": -1}, ValueError, "skip must be 0 to the length 3, got -1"),
        ({"backend": "extension"}, ValueError, "backend must be one of triton, torch or auto"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_bad_arguments_are_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"count_positions: {message}"):
        ek.count_positions(**{"tokens": TOKENS, **change})


@pytest.mark.skipif("triton" not in BACKENDS, reason="needs triton")
def test_opcheck_and_compile(device: torch.device) -> None:
    tokens = some_tokens(3, 5, device=device)
    torch.library.opcheck(torch.ops.embedkernels.count_positions, (tokens, 1, 2, 0, 1))

    def positions(tokens: Tensor) -> Tensor:
        return ek.count_positions(tokens, padding_idx=1, start=1, backend="triton") * 2

    compiled = torch.compile(positions, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (5, 9):
        tokens = some_tokens(3, length, device=device)
        assert torch.equal(compiled(tokens), positions(tokens))

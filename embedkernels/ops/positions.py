"""Positions counted over real tokens, as RoBERTa, OPT and their relatives number them."""

from __future__ import annotations

import torch
from torch import Tensor

from embedkernels.ops import ids as id_errors
from embedkernels.ops.arguments import checked_int
from embedkernels.ops.backend import Backend, choose
from embedkernels.ops.eager import is_eager, shown_as
from embedkernels.reference import positions as reference

_DTYPES = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_LIMIT = 2**30


def count_positions(
    tokens: Tensor,
    *,
    padding_idx: int | None = None,
    start: int = 0,
    padding_position: int = 0,
    skip: int = 0,
    backend: Backend | None = None,
) -> Tensor:
    """Position ids that count the real tokens of every sequence, in one kernel and without waiting for the device.

    p[..., s] = start + #{t <= s : token t is real} where token s is real, else padding_position. The first real token
    has the position start + 1.

    RoBERTa's are ``count_positions(ids, padding_idx=p, start=p + past, padding_position=p)``; OPT's rows of its table
    ``count_positions(attention_mask, start=1, padding_position=1, skip=past)``.

    Args:
        tokens: integers (..., S): ids, or without ``padding_idx`` a mask, also bool, that is 0 for padding.
        padding_idx: the id of the padding token, or None.
        start, padding_position: below 2**30 in magnitude.
        skip: places at the front that are counted but left out of the result: tokens in a cache.
        backend: ``"triton"``, ``"torch"`` or None for the best there is.

    Returns:
        int64, (..., S - skip), contiguous. Without a gradient.

    Raises:
        TypeError: tokens that are not integers, numbers that are not ints.
        ValueError: tokens without an axis, 2**30 tokens or more in a sequence, numbers out of their range.

    Example:
        >>> import torch, embedkernels as ek
        >>> ek.count_positions(torch.tensor([[5, 7, 9, 1, 1]]), padding_idx=1, start=1, padding_position=1)
        tensor([[2, 3, 4, 1, 1]])
    """
    op = "count_positions"
    if not isinstance(tokens, Tensor):
        raise TypeError(f"{op}: tokens must be a Tensor, got {type(tokens).__name__}")
    if tokens.dtype not in _DTYPES:
        raise TypeError(f"{op}: tokens must be integers or bool, got {tokens.dtype}")
    if tokens.dim() == 0 or tokens.shape[-1] >= _LIMIT:
        raise ValueError(f"{op}: tokens must be (..., S) with S below {_LIMIT}, got shape {tuple(tokens.shape)}")
    if padding_idx is not None:
        padding_idx = checked_int(padding_idx, "padding_idx", op)
    start, padding_position = (
        _checked(value, name) for value, name in ((start, "start"), (padding_position, "padding_position"))
    )
    skip = checked_int(skip, "skip", op)
    if not 0 <= skip <= tokens.shape[-1]:
        raise ValueError(f"{op}: skip must be 0 to the length {tokens.shape[-1]}, got {skip}")
    id_errors.begin_without_ids(tokens.device)
    if choose(op, tokens.device, backend).backend == "torch":
        return reference.count_positions(tokens, padding_idx, start, padding_position, skip).contiguous()
    call = _launch if is_eager(tokens) else torch.ops.embedkernels.count_positions
    out: Tensor = call(tokens, 0 if padding_idx is None else padding_idx, start, padding_position, skip)
    return out


def _checked(value: int, name: str) -> int:
    value = checked_int(value, name, "count_positions")
    if not -_LIMIT < value < _LIMIT:
        raise ValueError(f"count_positions: {name} must be below 2**30 in magnitude, got {value}")
    return value


_library = torch.library.Library("embedkernels", "FRAGMENT")
_library.define(
    "count_positions(Tensor tokens, int padding_idx, SymInt start, int padding_position, SymInt skip) -> Tensor"
)


def _impl(tokens: Tensor, padding_idx: int, start: int, padding_position: int, skip: int) -> Tensor:
    id_errors.raise_pending(tokens.device)
    choose("count_positions", tokens.device, "triton")
    if not 0 <= skip <= tokens.shape[-1]:
        raise ValueError(f"count_positions: skip must be 0 to the length {tokens.shape[-1]}, got {skip}")
    return _counted(tokens, padding_idx, start, padding_position, skip)


def _counted(tokens: Tensor, padding_idx: int, start: int, padding_position: int, skip: int) -> Tensor:
    from embedkernels.kernels import positions as kernels

    out = _fake(tokens, padding_idx, start, padding_position, skip)
    if out.numel() > 0:
        if tokens.dtype == torch.bool:
            tokens = tokens.view(torch.uint8)
        if tokens.dim() != 2:
            tokens = tokens.reshape(-1, tokens.shape[-1])
        kernels.count_positions(out, tokens, padding_idx, start, padding_position, skip)
    return out


_launch = shown_as("embedkernels::count_positions")(_counted)


def _fake(tokens: Tensor, padding_idx: int, start: int, padding_position: int, skip: int) -> Tensor:  # noqa: ARG001
    return tokens.new_empty((*tokens.shape[:-1], tokens.shape[-1] - skip), dtype=torch.int64)


_library.impl("count_positions", _impl, "CompositeExplicitAutograd")
torch.library.register_fake("embedkernels::count_positions", _fake, lib=_library)

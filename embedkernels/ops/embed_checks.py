"""What ``embed`` and the ops under it refuse, with the argument's name, what came and what was expected."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from embedkernels.ops.arguments import checked_int, checked_number
from embedkernels.ops.embedding_grad import check_ids_tensor

if TYPE_CHECKING:
    from embedkernels.kernels.embed import Inputs


def sequence_length(ids: Tensor) -> int:
    """S, the last axis; 1 for a lone id."""
    return ids.shape[-1] if ids.dim() else 1


def check_call(
    ids: Tensor, weight: Tensor, position_weight: Tensor | None, position_ids: Tensor | None, position_start: int,
    type_weight: Tensor | None, type_ids: Tensor | None, norm: str | None, norm_weight: Tensor | None,
    norm_bias: Tensor | None, norm_eps: float, dropout_p: float,
) -> tuple[int, float, float]:  # fmt: skip
    """The arguments of the public function. Returns position_start, norm_eps and dropout_p, as numbers."""
    _check_tables(ids, weight, position_weight, type_weight)
    _check_more_ids("position_ids", position_ids, ids, "position_weight", position_weight)
    _check_more_ids("type_ids", type_ids, ids, "type_weight", type_weight)
    position_start = checked_int(position_start, "position_start", "embed")
    _check_start(position_weight, position_ids, position_start)
    check_implicit_ids(ids, position_weight, position_ids, position_start, type_weight, type_ids)
    if norm not in (None, "layer"):
        raise ValueError(f"embed: norm must be None or 'layer', got {norm!r}")
    check_norm_parameters(norm is not None, norm_weight, norm_bias, weight)
    norm_eps = checked_number(norm_eps, "norm_eps", "embed")
    if not 0.0 <= norm_eps < math.inf:
        raise ValueError(f"embed: norm_eps must be finite and not negative, got {norm_eps}")
    return position_start, norm_eps, checked_dropout(dropout_p)


def check_implicit_ids(
    ids: Tensor, position_weight: Tensor | None, position_ids: Tensor | None, position_start: int,
    type_weight: Tensor | None, type_ids: Tensor | None,
) -> None:  # fmt: skip
    """IndexError where position_start + s, or type 0, is no row of its table."""
    length = sequence_length(ids)
    if position_weight is not None and position_ids is None and position_start + length > position_weight.shape[0]:
        rows = position_weight.shape[0]
        raise IndexError(
            f"embed: {length} positions from position_start {position_start} reach position "
            f"{position_start + length - 1}, but position_weight has {rows} rows: expected a sequence of at most "
            f"{max(0, rows - position_start)}"
        )
    if type_weight is not None and type_ids is None and type_weight.shape[0] == 0:
        raise IndexError("embed: type_ids is None, which is type 0 everywhere, but type_weight has 0 rows")


def check_norm_parameters(norm: bool, norm_weight: Tensor | None, norm_bias: Tensor | None, weight: Tensor) -> None:
    """The kernels read D elements of each, in one dtype."""
    for name, parameter in (("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        if parameter is None:
            continue
        _check_is_tensor(name, parameter)
        if not norm:
            raise ValueError(f"embed: {name} is given, but norm is None")
        if tuple(parameter.shape) != (weight.shape[1],):
            raise ValueError(f"embed: {name} must be (D,) = ({weight.shape[1]},), got {tuple(parameter.shape)}")
        if parameter.dtype not in (weight.dtype, torch.float32):
            raise TypeError(f"embed: {name} must be {weight.dtype} like weight, or float32, got {parameter.dtype}")
        _check_device(name, parameter, weight)
    if norm_weight is not None and norm_bias is not None and norm_weight.dtype != norm_bias.dtype:
        raise TypeError(
            f"embed: norm_weight is {norm_weight.dtype}, norm_bias is {norm_bias.dtype}: expected one dtype"
        )


def checked_dropout(dropout_p: float) -> float:
    """``dropout_p`` as a number."""
    dropout_p = checked_number(dropout_p, "dropout_p", "embed")
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"embed: dropout_p must be in [0, 1], got {dropout_p}")
    return dropout_p


def kernel_inputs(
    ids: Tensor, weight: Tensor, position_weight: Tensor | None, position_ids: Tensor | None, position_start: int,
    type_weight: Tensor | None, type_ids: Tensor | None,
) -> Inputs:  # fmt: skip
    """What the kernels gather from. Guards what addresses rest on: the ops can be called without ``embed``."""
    from embedkernels.kernels.embed import MOST_ROWS, Inputs

    n, length = ids.numel(), sequence_length(ids)
    if n > MOST_ROWS:
        raise ValueError(f"embed: ids has {n} elements, at most {MOST_ROWS} are supported")
    _check_tables(ids, weight, position_weight, type_weight)
    for name, given in (("position_ids", position_ids), ("type_ids", type_ids)):
        if given is None:
            continue
        if given.numel() not in (n, length):
            raise ValueError(f"embed: {name} must have {n} or {length} elements, got {given.numel()}")
        if given.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"embed: {name} must be int32 or int64, got {given.dtype}")
        _check_device(name, given, weight)
    if position_start < 0:
        raise ValueError(f"embed: position_start must not be negative, got {position_start}")
    check_implicit_ids(ids, position_weight, position_ids, position_start, type_weight, type_ids)
    return Inputs(
        ids.contiguous(), weight.contiguous(), contiguous(position_weight), contiguous(position_ids), position_start,
        length, contiguous(type_weight), contiguous(type_ids),
    )  # fmt: skip


def check_seed(dropout_p: float, seed: Tensor | None, weight: Tensor) -> None:
    """The kernels read one int64 where there is dropout."""
    if checked_dropout(dropout_p) == 0.0:
        return
    if seed is None or seed.dtype != torch.int64 or seed.numel() != 1:
        got = "None" if seed is None else f"{seed.dtype} {tuple(seed.shape)}"
        raise ValueError(f"embed: seed must be int64 with 1 element where dropout_p is positive, got {got}")
    _check_device("seed", seed, weight)


def check_saved(grad: Tensor, ids: Tensor, weight: Tensor, norm: bool, mean: Tensor, rstd: Tensor) -> None:
    """What the backward reads beside the inputs."""
    n, width = ids.numel(), weight.shape[1]
    if grad.numel() != n * width:
        raise ValueError(f"embed: grad must have {n} x {width} elements, got shape {tuple(grad.shape)}")
    _check_device("grad", grad, weight)
    for name, saved in (("mean", mean), ("rstd", rstd)):
        if norm and (saved.dtype != torch.float32 or saved.numel() != n):
            raise ValueError(f"embed: {name} must be float32 ({n},), got {saved.dtype} {tuple(saved.shape)}")
        _check_device(name, saved, weight)


def contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _check_is_tensor(name: str, given: object) -> None:
    if not isinstance(given, Tensor):
        raise TypeError(f"embed: {name} must be a Tensor, got {type(given).__name__}")


def _check_device(name: str, tensor: Tensor, weight: Tensor) -> None:
    if tensor.device != weight.device:
        raise ValueError(f"embed: {name} is on {tensor.device}, weight is on {weight.device}")


def _check_tables(ids: Tensor, weight: Tensor, position_weight: Tensor | None, type_weight: Tensor | None) -> None:
    check_ids_tensor(ids, "embed")
    _check_is_tensor("weight", weight)
    if weight.dim() != 2 or weight.shape[1] == 0:
        raise ValueError(f"embed: weight must be 2-D (V, D) with D >= 1, got shape {tuple(weight.shape)}")
    if not weight.is_floating_point():
        raise TypeError(f"embed: weight must be floating point, got {weight.dtype}")
    _check_device("ids", ids, weight)
    _check_table("position_weight", position_weight, weight)
    _check_table("type_weight", type_weight, weight)


def _check_table(name: str, table: Tensor | None, weight: Tensor) -> None:
    if table is None:
        return
    _check_is_tensor(name, table)
    if table.dim() != 2 or table.shape[1] != weight.shape[1]:
        raise ValueError(
            f"embed: {name} must be 2-D (rows, D) with D = {weight.shape[1]} as in weight, "
            f"got shape {tuple(table.shape)}"
        )
    if table.dtype != weight.dtype:
        raise TypeError(f"embed: {name} must be {weight.dtype} like weight, got {table.dtype}")
    _check_device(name, table, weight)


def _check_more_ids(name: str, given: Tensor | None, ids: Tensor, table_name: str, table: Tensor | None) -> None:
    if given is None:
        return
    _check_is_tensor(name, given)
    if table is None:
        raise ValueError(f"embed: {name} is given, but {table_name} is None")
    if given.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"embed: {name} must be int32 or int64, got {given.dtype}")
    pairs = zip(reversed(given.shape), reversed(ids.shape), strict=False)
    if given.dim() > ids.dim() or not all(size in (1, wanted) for size, wanted in pairs):
        raise ValueError(
            f"embed: {name} must broadcast to the shape of ids, {tuple(ids.shape)}, got shape {tuple(given.shape)}"
        )
    if given.device != ids.device:
        raise ValueError(f"embed: {name} is on {given.device}, ids is on {ids.device}")


def _check_start(table: Tensor | None, position_ids: Tensor | None, start: int) -> None:
    if start < 0:
        raise ValueError(f"embed: position_start must not be negative, got {start}")
    if position_ids is not None and start != 0:
        raise ValueError(f"embed: position_start must be 0 where position_ids is given, got {start}")
    if table is None and start != 0:
        raise ValueError(f"embed: position_start is {start}, but position_weight is None")

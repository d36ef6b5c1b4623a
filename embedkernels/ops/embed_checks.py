"""What ``embed`` and the ops under it refuse, with the argument's name, what came and what was expected."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from embedkernels.ops.arguments import checked_int, checked_number
from embedkernels.ops.embedding_plan import check_ids_tensor
from embedkernels.reference.sinusoids import LAYOUTS, MOST_POSITIONS

# Products with it should be normal numbers in float32.
_LARGEST_SCALE, _SMALLEST_SCALE = 2.0**100, 2.0**-100

NORMS = (None, "layer", "rms")
_OP_NORMS = ("none", "layer", "rms")


def check_call(
    ids: Tensor | None, weight: Tensor | None, inputs_embeds: Tensor | None, scale: float,
    position_weight: Tensor | None, sinusoids: str | None, position_padding_idx: int | None,
    position_ids: Tensor | None, position_start: int, type_weight: Tensor | None,
    type_ids: Tensor | None, extra: Tensor | None, norm: str | None, norm_weight: Tensor | None,
    norm_bias: Tensor | None, norm_eps: float, dropout_p: float, mask: Tensor | None, packed: Tensor | None,
) -> tuple[float, int, float, float]:  # fmt: skip
    """The arguments of the public function. Returns scale, position_start, norm_eps and dropout_p, as numbers."""
    if inputs_embeds is not None:
        if ids is not None or weight is not None:
            raise ValueError("embed: inputs_embeds stands in the place of ids and weight, which then must be None")
        rows = inputs_embeds
        _check_rows("inputs_embeds", rows)
        shape = rows.shape[:-1]
    else:
        rows = _checked_weight(weight)
        check_ids_tensor(ids, "embed")  # type: ignore[arg-type]
        assert ids is not None
        _check_device("ids", ids, rows)
        shape = ids.shape
    # Of tables and ids that are as they mostly are, nothing is asked twice.
    length, width = shape[-1] if shape else 1, rows.shape[-1:]
    if position_weight is not None and not _fits(position_weight, width, rows):
        _check_table("position_weight", position_weight, rows)
    if type_weight is not None and not _fits(type_weight, width, rows):
        _check_table("type_weight", type_weight, rows)
    if sinusoids is not None:
        check_sinusoids(sinusoids, position_weight, rows.shape[-1], position_padding_idx)
    count = position_rows(position_weight, sinusoids)
    if position_ids is not None:
        _check_more_ids("position_ids", position_ids, shape, rows, "position_weight" if count is None else None)
    if type_ids is not None:
        _check_more_ids("type_ids", type_ids, shape, rows, "type_weight" if type_weight is None else None)
    if type(position_start) is not int:
        position_start = checked_int(position_start, "position_start", "embed")
    if position_start != 0:
        _check_start(count is not None, position_ids, position_start)
    check_implicit_ids(length, count, position_ids, position_start, type_weight, type_ids)
    if extra is not None:
        _check_broadcast("extra", extra, (*shape, rows.shape[-1]), rows)
        if extra.dtype != rows.dtype:
            raise TypeError(f"embed: extra must be {rows.dtype} like the tables, got {extra.dtype}")
        if extra.shape[-1:] != rows.shape[-1:]:
            raise ValueError(f"embed: extra must have D = {rows.shape[-1]} columns, got shape {tuple(extra.shape)}")
    if mask is not None:
        _check_broadcast("mask", mask, shape, rows)
        if mask.dtype.is_complex:
            raise TypeError(f"embed: mask must be bool or real numbers, got {mask.dtype}")
        if mask.requires_grad and torch.is_grad_enabled():
            raise ValueError("embed: mask gets no gradient, but requires one: detach it")
    if packed is not None:
        check_packed(packed, rows)
        if mask is not None:
            raise ValueError("embed: mask and packed are both given: rows that are packed are not masked")
    if norm not in NORMS:
        raise ValueError(f"embed: norm must be None, 'layer' or 'rms', got {norm!r}")
    if norm_weight is not None or norm_bias is not None:
        check_norm_parameters(norm is not None, norm_weight, norm_bias, rows)
    norm_eps = checked_number(norm_eps, "norm_eps", "embed")
    if not 0.0 <= norm_eps < math.inf:
        raise ValueError(f"embed: norm_eps must be finite and not negative, got {norm_eps}")
    return checked_scale(scale), position_start, norm_eps, checked_dropout(dropout_p)


def _fits(table: Tensor, columns: torch.Size, rows: Tensor) -> bool:
    """Whether ``table`` is 2-D with these columns, of the dtype and on the device of ``rows``."""
    return (
        isinstance(table, Tensor)
        and table.shape[1:] == columns
        and table.dtype == rows.dtype
        and table.device == rows.device
    )


def check_sinusoids(
    sinusoids: str | None, position_weight: Tensor | None, width: int, padding_position: int | None
) -> None:
    """A known layout, wide enough, instead of a table; the position of padding is not negative."""
    if sinusoids is None:
        return
    if sinusoids not in LAYOUTS:
        raise ValueError(f"embed: sinusoids must be None or one of {', '.join(LAYOUTS)}, got {sinusoids!r}")
    if position_weight is not None:
        raise ValueError("embed: position_weight and sinusoids are both given: positions come from one of them")
    if sinusoids == "fairseq" and width < 4:
        raise ValueError(f"embed: sinusoids 'fairseq' need rows of at least 4 elements, got {width}")
    if padding_position is not None and checked_int(padding_position, "position_padding_idx", "embed") < 0:
        raise ValueError(f"embed: position_padding_idx must not be negative with sinusoids, got {padding_position}")


def checked_scale(scale: float, op: str = "embed") -> float:
    """``scale`` as a number, which must be one in float32 too."""
    scale = checked_number(scale, "scale", op)
    if not _SMALLEST_SCALE <= abs(scale) <= _LARGEST_SCALE:
        raise ValueError(f"{op}: scale must be between 2**-100 and 2**100 in magnitude, got {scale}")
    return scale


def check_packed(packed: Tensor, rows: Tensor) -> None:
    """A list of places."""
    _check_is_tensor("packed", packed)
    if packed.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"embed: packed must be int32 or int64, got {packed.dtype}")
    if packed.dim() != 1:
        raise ValueError(f"embed: packed must be 1-D, got shape {tuple(packed.shape)}")
    _check_device("packed", packed, rows)


def position_rows(position_weight: Tensor | None, sinusoids: str | None) -> int | None:
    """How many positions there are; None without positions."""
    if position_weight is not None:
        return position_weight.shape[0]
    return None if sinusoids in (None, "none") else MOST_POSITIONS


def check_implicit_ids(
    length: int, rows: int | None, position_ids: Tensor | None, position_start: int, type_weight: Tensor | None,
    type_ids: Tensor | None,
) -> None:  # fmt: skip
    """IndexError where position_start + s is none of the ``rows`` positions, or type 0 no row of its table."""
    if rows is not None and position_ids is None and position_start + length > rows:
        raise IndexError(
            f"embed: {length} positions from position_start {position_start} reach position "
            f"{position_start + length - 1}, but there are {rows}: expected a sequence of at most "
            f"{max(0, rows - position_start)}"
        )
    if type_weight is not None and type_ids is None and type_weight.shape[0] == 0:
        raise IndexError("embed: type_ids is None, which is type 0 everywhere, but type_weight has 0 rows")


def check_norm_parameters(norm: bool, norm_weight: Tensor | None, norm_bias: Tensor | None, weight: Tensor) -> None:
    """The kernels read D elements of each, in one dtype."""
    columns = weight.shape[-1:]
    for name, parameter in (("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        if parameter is None:
            continue
        if norm and isinstance(parameter, Tensor) and parameter.shape == columns and parameter.dtype == weight.dtype:
            _check_device(name, parameter, weight)
            continue
        _check_is_tensor(name, parameter)
        if not norm:
            raise ValueError(f"embed: {name} is given, but norm is None")
        if tuple(parameter.shape) != (weight.shape[-1],):
            raise ValueError(f"embed: {name} must be (D,) = ({weight.shape[-1]},), got {tuple(parameter.shape)}")
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


def check_op(
    ids: Tensor | None, weight: Tensor, scale: float, position_weight: Tensor | None, sinusoids: str,
    position_ids: Tensor | None, position_start: int, type_weight: Tensor | None, type_ids: Tensor | None,
    extra: Tensor | None, mask: Tensor | None, packed: Tensor | None, norm: str, norm_weight: Tensor | None,
    norm_bias: Tensor | None, dropout_p: float, seed: Tensor | None, grad: Tensor | None = None,
) -> None:  # fmt: skip
    """What addresses in the kernels rest on, for the ops can be called without ``embed``.

    With ``grad``, for the backward pass: without a norm it reads no rows, and ``weight`` need not have any.
    """
    if ids is not None:
        check_ids_tensor(ids, "embed")
        _check_device("ids", ids, weight)
        _checked_weight(weight)
    else:
        _check_rows("inputs_embeds", weight)
    if norm not in _OP_NORMS:
        raise ValueError(f"embed: norm must be one of {', '.join(_OP_NORMS)}, got {norm!r}")
    width = weight.shape[-1]
    shape = weight.shape[:-1] if ids is None else ids.shape
    if packed is not None:
        check_packed(packed, weight)
    if grad is not None and norm == "none":
        shape, packed = grad.shape[:-1], None
        ids = position_weight = type_weight = extra = None
        sinusoids = "none"
    n, length = math.prod(shape), shape[-1] if shape else 1
    _check_table("position_weight", position_weight, weight)
    _check_table("type_weight", type_weight, weight)
    for name, given in (("position_ids", position_ids), ("type_ids", type_ids), ("mask", mask)):
        if given is None:
            continue
        if given.numel() not in (n, length):
            raise ValueError(f"embed: {name} must have {n} or {length} elements, got {given.numel()}")
        if given.dtype not in (torch.int32, torch.int64) and name != "mask":
            raise TypeError(f"embed: {name} must be int32 or int64, got {given.dtype}")
        _check_device(name, given, weight)
    if extra is not None:
        if extra.dim() != 2 or extra.shape[0] not in (n, length) or extra.shape[1] != width:
            raise ValueError(f"embed: extra must be ({n} or {length}, {width}), got {tuple(extra.shape)}")
        if extra.dtype != weight.dtype:
            raise TypeError(f"embed: extra must be {weight.dtype} like the tables, got {extra.dtype}")
        _check_device("extra", extra, weight)
    if position_start < 0:
        raise ValueError(f"embed: position_start must not be negative, got {position_start}")
    count = position_rows(position_weight, sinusoids)
    check_implicit_ids(length, count, position_ids, position_start, type_weight, type_ids)
    if mask is not None and packed is not None:
        raise ValueError("embed: mask and packed are both given: rows that are packed are not masked")
    check_sinusoids(None if sinusoids == "none" else sinusoids, position_weight, width, None)
    check_norm_parameters(norm != "none", norm_weight, norm_bias, weight)
    check_seed(dropout_p, seed, weight)
    checked_scale(scale)


def check_seed(dropout_p: float, seed: Tensor | None, weight: Tensor) -> None:
    """The kernels read one int64 where there is dropout."""
    if checked_dropout(dropout_p) == 0.0:
        return
    if seed is None or seed.dtype != torch.int64 or seed.numel() != 1:
        got = "None" if seed is None else f"{seed.dtype} {tuple(seed.shape)}"
        raise ValueError(f"embed: seed must be int64 with 1 element where dropout_p is positive, got {got}")
    _check_device("seed", seed, weight)


def check_saved(
    grad: Tensor, ids: Tensor | None, weight: Tensor, packed: Tensor | None, norm: str, mean: Tensor, rstd: Tensor
) -> None:  # fmt: skip
    """What the backward reads beside the inputs."""
    width = weight.shape[-1]
    n = grad.numel() // width
    if norm != "none":
        counted = next((x for x in (packed, ids) if x is not None), None)
        n = weight.numel() // width if counted is None else counted.numel()
    if grad.shape[-1:] != (width,) or grad.numel() != n * width:
        raise ValueError(f"embed: grad must have {n} x {width} elements, got shape {tuple(grad.shape)}")
    _check_device("grad", grad, weight)
    for name, saved, there in (("mean", mean, norm == "layer"), ("rstd", rstd, norm != "none")):
        if there and (saved.dtype != torch.float32 or saved.numel() != n):
            raise ValueError(f"embed: {name} must be float32 ({n},), got {saved.dtype} {tuple(saved.shape)}")
        _check_device(name, saved, weight)


def _check_is_tensor(name: str, given: object) -> None:
    if not isinstance(given, Tensor):
        raise TypeError(f"embed: {name} must be a Tensor, got {type(given).__name__}")


def _check_device(name: str, tensor: Tensor, weight: Tensor) -> None:
    if tensor.device != weight.device:
        raise ValueError(f"embed: {name} is on {tensor.device}, weight is on {weight.device}")


def _checked_weight(weight: Tensor | None) -> Tensor:
    _check_is_tensor("weight", weight)
    assert weight is not None
    if weight.dim() != 2 or weight.shape[1] == 0:
        raise ValueError(f"embed: weight must be 2-D (V, D) with D >= 1, got shape {tuple(weight.shape)}")
    if not weight.is_floating_point():
        raise TypeError(f"embed: weight must be floating point, got {weight.dtype}")
    return weight


def _check_rows(name: str, rows: Tensor) -> None:
    _check_is_tensor(name, rows)
    if rows.dim() == 0 or rows.shape[-1] == 0:
        raise ValueError(f"embed: {name} must be (..., S, D) with D >= 1, got shape {tuple(rows.shape)}")
    if not rows.is_floating_point():
        raise TypeError(f"embed: {name} must be floating point, got {rows.dtype}")


def _check_table(name: str, table: Tensor | None, rows: Tensor) -> None:
    if table is None:
        return
    _check_is_tensor(name, table)
    width = rows.shape[-1]
    if table.dim() != 2 or table.shape[1] != width:
        raise ValueError(
            f"embed: {name} must be 2-D (rows, D) with D = {width} as in weight, got shape {tuple(table.shape)}"
        )
    if table.dtype != rows.dtype:
        raise TypeError(f"embed: {name} must be {rows.dtype} like weight, got {table.dtype}")
    _check_device(name, table, rows)


def _check_more_ids(name: str, given: Tensor | None, shape: torch.Size, rows: Tensor, missing: str | None) -> None:
    if given is None:
        return
    _check_is_tensor(name, given)
    if missing is not None:
        raise ValueError(f"embed: {name} is given, but {missing} is None")
    if given.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"embed: {name} must be int32 or int64, got {given.dtype}")
    if given.shape != shape or given.device != rows.device:
        _check_broadcast(name, given, shape, rows)


def _check_broadcast(name: str, given: Tensor, shape: Sequence[int], rows: Tensor) -> None:
    _check_is_tensor(name, given)
    pairs = zip(reversed(given.shape), reversed(shape), strict=False)
    if given.dim() > len(shape) or not all(size in (1, wanted) for size, wanted in pairs):
        raise ValueError(f"embed: {name} must broadcast to the shape {tuple(shape)}, got shape {tuple(given.shape)}")
    _check_device(name, given, rows)


def _check_start(positions: bool, position_ids: Tensor | None, start: int) -> None:
    if start < 0:
        raise ValueError(f"embed: position_start must not be negative, got {start}")
    if position_ids is not None and start != 0:
        raise ValueError(f"embed: position_start must be 0 where position_ids is given, got {start}")
    if not positions and start != 0:
        raise ValueError(f"embed: position_start is {start}, but position_weight is None")

"""From the checked arguments of ``embed`` to its kernels: what its ops and its autograd function both run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from embedkernels.ops import ids as id_errors
from embedkernels.ops.embed_checks import position_rows

if TYPE_CHECKING:
    from embedkernels.kernels.embed import Inputs


class Settings(NamedTuple):
    """What a call consists of beside its tensors."""

    scale: float
    sinusoids: str
    position_padding_idx: int
    position_start: int
    norm: str
    norm_eps: float
    dropout_p: float
    dropout_first: bool
    dtype: torch.dtype
    padding_idx: int


class Kind:
    """What calls have in common whose settings are the same, and their tensors but for values.

    Attributes:
        settings: of the call.
        dtype, shape: of the token table, or of the rows that stand in its place.
        position_rows, type_rows, extra_rows: rows of these parts, 0 where there are none.
        contiguous: whether all tensors of the forward are known to be.
        memo: what the launches of such calls found out.
    """

    __slots__ = ("contiguous", "dtype", "extra_rows", "memo", "position_rows", "settings", "shape", "type_rows")

    def __init__(self, settings: Settings, parts: Parts, contiguous: bool = False) -> None:
        weight, position_weight, type_weight, extra, _, _ = parts
        self.settings, self.contiguous = settings, contiguous
        self.dtype, self.shape = weight.dtype, weight.shape
        self.position_rows, self.type_rows, self.extra_rows = (
            0 if table is None else table.shape[0] for table in (position_weight, type_weight, extra)
        )
        self.memo: dict[Any, Any] = {}


class Indices(NamedTuple):
    """The tensors of a call that get no gradient; all but ``ids`` of any shape with N or S elements."""

    ids: Tensor | None
    position_ids: Tensor | None
    type_ids: Tensor | None
    mask: Tensor | None
    packed: Tensor | None
    seed: Tensor | None


class Parts(NamedTuple):
    """The tensors of a call that may get a gradient; ``extra`` is (N or S, D)."""

    weight: Tensor
    position_weight: Tensor | None
    type_weight: Tensor | None
    extra: Tensor | None
    norm_weight: Tensor | None
    norm_bias: Tensor | None


def output_shape(ids: Tensor | None, weight: Tensor, packed: Tensor | None) -> tuple[int, ...]:
    """Of y."""
    if packed is not None:
        return packed.shape[0], weight.shape[-1]
    return tuple(weight.shape) if ids is None else (*ids.shape, weight.shape[1])


def forward(kind: Kind, indices: Indices, parts: Parts) -> tuple[Tensor, Tensor, Tensor]:
    """y, and the rows' mean and rstd, each empty where the norm has none."""
    from embedkernels.kernels import embed as kernels

    settings, weight, ids, packed = kind.settings, parts.weight, indices.ids, indices.packed
    device = weight.device
    shape = weight.shape[:-1] if ids is None else ids.shape
    _check_count(max(math.prod(shape), 0 if packed is None else packed.numel()), kernels.MOST_ROWS)
    if device.type == "cpu":
        _check_ids(settings, indices, parts)
    out = weight.new_empty(output_shape(ids, weight, packed), dtype=settings.dtype)
    if out.numel() == 0:
        return out, weight.new_empty(0, dtype=torch.float32), weight.new_empty(0, dtype=torch.float32)
    norm_weight, norm_bias = parts.norm_weight, parts.norm_bias
    if not kind.contiguous:
        indices, parts = _contiguous(indices, parts)
        norm_weight, norm_bias = parts.norm_weight, parts.norm_bias
    errors = id_errors.error_state(device)
    mean, rstd = kernels.embed_forward(
        _inputs(settings, indices, parts, shape, kind.memo), out, norm_weight, norm_bias, settings.norm_eps,
        (errors.flag, errors.record),
    )  # fmt: skip
    id_errors.after_launch(device)
    return out, mean, rstd


def backward(
    grad: Tensor, kind: Kind, indices: Indices, parts: Parts, mean: Tensor, rstd: Tensor, row_scale: float,
    need_rows: bool, need_norm: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of the summed rows, and of the norm's weight and bias; see ``kernels.embed.embed_backward``."""
    from embedkernels.kernels import embed as kernels

    weight, settings = parts.weight, kind.settings
    if grad.numel() == 0:
        norm_grads = (
            p.new_zeros(p.shape) if need_norm and p is not None else weight.new_empty(0)
            for p in (parts.norm_weight, parts.norm_bias)
        )
        return (weight.new_empty((0, weight.shape[-1])), *norm_grads)  # type: ignore[return-value]
    if settings.norm == "none":
        # The gradient does not depend on the rows: they need not be there.
        shape: Sequence[int] = grad.shape[:-1]
        settings = settings._replace(sinusoids="none")
        indices = Indices(None, None, None, indices.mask, None, indices.seed)
        parts = Parts(weight, None, None, None, parts.norm_weight, parts.norm_bias)
    else:
        shape = weight.shape[:-1] if indices.ids is None else indices.ids.shape
    _check_count(max(math.prod(shape), grad.numel() // grad.shape[-1]), kernels.MOST_ROWS)
    # Saved tensors may come back from hooks with other strides than they had.
    indices, parts = _contiguous(indices, parts)
    return kernels.embed_backward(
        _inputs(settings, indices, parts, shape, kind.memo), grad if grad.is_contiguous() else grad.contiguous(),
        parts.norm_weight, parts.norm_bias, mean.contiguous(), rstd.contiguous(), row_scale, need_rows, need_norm,
    )  # fmt: skip


def _check_count(rows: int, most: int) -> None:
    """The kernels number rows in 32 bits."""
    if rows > most:
        raise ValueError(f"embed: there are {rows} rows, at most {most} are supported")


def _check_ids(settings: Settings, indices: Indices, parts: Parts) -> None:
    """Interpreted kernels on a CPU raise at once, as the other backends do there."""
    ids, position_ids, type_ids, _, packed, _ = indices
    n = parts.weight.numel() // parts.weight.shape[-1] if ids is None else ids.numel()
    for given, rows, name in (
        (packed, n, "packed"),
        (ids, parts.weight.shape[0], "token"),
        (type_ids, None if parts.type_weight is None else parts.type_weight.shape[0], "token type"),
        (position_ids, position_rows(parts.position_weight, settings.sinusoids), "position"),
    ):
        if given is not None and rows is not None:
            # As on a GPU, what is not packed is not looked at.
            used = given if packed is None or given is packed else at_places(given, packed, n)
            id_errors.check_ids(used, rows, name, "embed")


def at_places(given: Tensor, packed: Tensor, count: int) -> Tensor:
    """Ids of N or S elements at the packed places, zeros elsewhere: (N,)."""
    flat, places = given.reshape(-1), packed.long()
    return flat.new_zeros(count).index_copy(0, places, flat[places % flat.numel()]) if count else flat


def _contiguous(indices: Indices, parts: Parts) -> tuple[Indices, Parts]:
    """The same, all contiguous."""
    return (
        Indices(*[x if x is None or x.is_contiguous() else x.contiguous() for x in indices]),
        Parts(*[x if x is None or x.is_contiguous() else x.contiguous() for x in parts]),  # type: ignore[arg-type]
    )


def _inputs(settings: Settings, indices: Indices, parts: Parts, shape: Sequence[int], memo: dict[Any, Any]) -> Inputs:
    """What the kernels read, for ids (or rows without ids) of ``shape``."""
    from embedkernels.kernels.embed import Inputs

    ids, position_ids, type_ids, mask, packed, seed = indices
    weight, position_weight, type_weight, extra, _, _ = parts
    if weight.dim() != 2:
        weight = weight.view(-1, weight.shape[-1])
    return Inputs(
        ids, weight, settings.scale, position_weight, settings.sinusoids, settings.position_padding_idx, position_ids,
        settings.position_start, shape[-1] if len(shape) else 1, type_weight, type_ids, extra,
        None if mask is None else _factors(mask), packed, settings.norm, settings.dropout_p, settings.dropout_first,
        seed, memo,
    )  # fmt: skip


def _factors(mask: Tensor) -> Tensor:
    """A mask as the kernels read it: bools as bytes, and in fp32 what they would not compute with."""
    if mask.dtype == torch.bool:
        return mask.view(torch.uint8)
    return mask.float() if mask.dtype == torch.float64 else mask

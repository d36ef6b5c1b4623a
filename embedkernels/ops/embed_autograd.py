"""The backward formula of ``embed``: the kernel's row gradients, and from them those of every part of a row.

It stands behind the op, and in eager mode behind :class:`Embed`, which is called without the dispatcher.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from embedkernels.ops import embed_launch as launch
from embedkernels.ops import embedding_grad as _grad  # also defines torch.ops.embedkernels.embedding_backward
from embedkernels.ops.eager import any_requires_grad, apply, is_eager, shown_as
from embedkernels.ops.embed_launch import Indices, Kind, Parts, Settings
from embedkernels.ops.embedding_plan import EmbeddingPlan, early_plan

# The arguments of embed_forward that may get a gradient, of the 22 it has.
_PLACES = {"weight": 1, "position_weight": 3, "type_weight": 8, "extra": 10, "norm_weight": 14, "norm_bias": 15}
_ARGUMENTS = 22

_WEIGHT = 2  # its place among the arguments of Embed

_forward = shown_as("embedkernels::embed_forward")(launch.forward)
_backward = shown_as("embedkernels::embed_backward")(launch.backward)


def embed(kind: Kind, indices: Indices, parts: Parts) -> Tensor:
    """y in eager mode."""
    if any_requires_grad(*parts):
        out: Tensor = apply(Embed, kind, indices, *parts)
        return out
    return _forward(kind, indices, parts)[0]


class Embed(torch.autograd.Function):
    """``embed`` on plain tensors, as autograd records it."""

    @staticmethod
    def forward(ctx: Any, kind: Kind, indices: Indices, *parts: Tensor | None) -> Tensor:
        given = Parts(*parts)  # type: ignore[arg-type]
        out, mean, rstd = _forward(kind, indices, given)
        _keep(ctx, kind, indices, given, mean, rstd)
        if ctx.needs_input_grad[_WEIGHT] and indices.ids is not None and indices.packed is None:
            ctx.plan = early_plan(indices.ids, kind.shape[0], kind.settings.padding_idx, None)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, None, *_gradients(ctx, Needs(*ctx.needs_input_grad[2:]), grad)


def setup_context(ctx: Any, inputs: Sequence[Any], output: tuple[Tensor, Tensor, Tensor]) -> None:
    """What the op keeps for its backward."""
    (ids, weight, scale, position_weight, sinusoids, position_padding_idx, position_ids, position_start, type_weight,
     type_ids, extra, mask, packed, norm, norm_weight, norm_bias, norm_eps, dropout_p, dropout_first, seed, dtype,
     padding_idx) = inputs  # fmt: skip
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    settings = Settings(
        scale, sinusoids, position_padding_idx, position_start, norm, norm_eps, dropout_p, dropout_first, dtype,
        padding_idx,
    )  # fmt: skip
    indices = Indices(ids, position_ids, type_ids, mask, packed, seed)
    parts = Parts(weight, position_weight, type_weight, extra, norm_weight, norm_bias)
    _keep(ctx, Kind(settings, parts), indices, parts, mean, rstd)


def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    """Of the op: a gradient for each of its arguments."""
    found = _gradients(ctx, Needs(*(ctx.needs_input_grad[place] for place in _PLACES.values())), grad)
    by_place = dict(zip(_PLACES.values(), found, strict=True))
    return tuple(by_place.get(place) for place in range(_ARGUMENTS))


def double_backward(ctx: Any, *grads: Tensor | None) -> None:
    raise NotImplementedError(
        "embed: the gradient is not differentiable again on the triton backend; use backend='torch' for that"
    )


class Needs(NamedTuple):
    """Which of the tensors in :class:`Parts` need a gradient."""

    weight: bool
    position_weight: bool
    type_weight: bool
    extra: bool
    norm_weight: bool
    norm_bias: bool


def _keep(ctx: Any, kind: Kind, indices: Indices, parts: Parts, mean: Tensor, rstd: Tensor) -> None:
    ctx.set_materialize_grads(False)
    ctx.kind, ctx.plan = kind, None
    # Without a norm the gradient does not depend on the rows: do not keep what they are made of.
    kept = _NOTHING if kind.settings.norm == "none" else parts
    ctx.save_for_backward(*indices, *kept, mean, rstd)


_NOTHING = (None,) * len(Parts._fields)


def _gradients(ctx: Any, need: Needs, grad: Tensor | None) -> tuple[Tensor | None, ...]:
    """Of the six parts, None where none is needed."""
    if grad is None:
        return _NOTHING
    saved = ctx.saved_tensors
    kind, indices = ctx.kind, Indices(*saved[:6])
    settings = kind.settings
    # What is to be differentiated again is recorded in terms of ops.
    direct = is_eager(grad, *saved) and not torch.is_grad_enabled()
    # The factor is that of the token rows alone: the kernel applies it only where nothing else needs a gradient.
    others = need.position_weight or need.type_weight or need.extra
    row_scale = settings.scale if need.weight and not others else 1.0
    need_rows, need_norm = need.weight or others, need.norm_weight or need.norm_bias
    width = grad.shape[-1]
    weight_grad = bias_grad = None
    if settings.norm != "none" or settings.dropout_p > 0.0 or indices.mask is not None or row_scale != 1.0:
        parts = Parts(*saved[6:12])
        if saved[6] is None:  # only its dtype and width matter without a norm
            parts = parts._replace(weight=torch.empty((0, width), dtype=kind.dtype, device=grad.device))
        call = _backward if direct else _backward_op
        rows, weight_grad, bias_grad = call(
            grad, kind, indices, parts, saved[12], saved[13], row_scale, need_rows, need_norm
        )
    else:
        rows = grad.reshape(-1, width).to(kind.dtype)
    grads: dict[str, Tensor] = {}
    if need_rows:
        scaled = rows * settings.scale if need.weight and row_scale != settings.scale else rows
        scatter = _direct_scatter if direct else _scatter
        if indices.packed is not None:
            grads = _packed_gradients(kind, need, rows, scaled, indices, scatter)
        else:
            early = ctx.plan if direct else None
            plan = None if early is None else early.ready()
            grads = _row_gradients(kind, need, rows, scaled, indices, scatter, plan)
    return (
        *(grads.get(name) for name in ("weight", "position_weight", "type_weight", "extra")),
        weight_grad if need.norm_weight else None,
        bias_grad if need.norm_bias else None,
    )


def _backward_op(
    grad: Tensor, kind: Kind, indices: Indices, parts: Parts, mean: Tensor, rstd: Tensor, row_scale: float,
    need_rows: bool, need_norm: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    settings = kind.settings
    if settings.norm == "none":
        settings = settings._replace(sinusoids="none", position_start=0)
        indices = indices._replace(position_ids=None, type_ids=None, packed=None)
    out: tuple[Tensor, Tensor, Tensor] = torch.ops.embedkernels.embed_backward(
        grad, indices.ids, parts.weight, settings.scale, parts.position_weight, settings.sinusoids,
        settings.position_padding_idx, indices.position_ids, settings.position_start, parts.type_weight,
        indices.type_ids, parts.extra, indices.mask, indices.packed, settings.norm, parts.norm_weight,
        parts.norm_bias, mean, rstd, settings.dropout_p, settings.dropout_first, indices.seed, row_scale, need_rows,
        need_norm,
    )  # fmt: skip
    return out


def _scatter(source: Tensor, ids: Tensor, rows: int, padding_idx: int) -> Tensor:
    """Gradient of a table of ``rows`` rows at ``ids``."""
    out: Tensor = torch.ops.embedkernels.embedding_backward(source, ids, rows, padding_idx)
    return out


_direct_scatter = shown_as("embedkernels::embedding_backward")(_grad.backward)
_planned = shown_as("embedkernels::embedding_grad")(_grad.dense_grad)


def _row_gradients(
    kind: Kind, need: Needs, rows: Tensor, scaled: Tensor, indices: Indices, scatter: Callable[..., Tensor],
    plan: EmbeddingPlan | None,
) -> dict[str, Tensor]:  # fmt: skip
    """Of the parts of a row, from the gradients of all rows."""
    ids, position_ids, type_ids = indices.ids, indices.position_ids, indices.type_ids
    grads: dict[str, Tensor] = {}
    if need.weight:
        if ids is None:
            grads["weight"] = scaled.view(kind.shape)
        elif plan is not None:
            grads["weight"] = _planned(scaled, plan)
        else:
            grads["weight"] = scatter(scaled, ids, kind.shape[0], kind.settings.padding_idx)
    # What is the same in every sequence is summed over the sequences first.
    (n, width), length = rows.shape, _length(kind, ids)
    shared_positions = position_ids is None or position_ids.numel() == length
    shared_types = type_ids is not None and type_ids.numel() == length
    shared_extra = kind.extra_rows == length
    by_place = rows
    if n > length and (
        (shared_positions and need.position_weight)
        or (shared_types and need.type_weight)
        or (shared_extra and need.extra)
    ):
        by_place = rows.view(n // length, length, width).sum(0, dtype=rows.dtype)
    if need.position_weight:
        grads["position_weight"] = _table_grad(
            by_place if shared_positions else rows, position_ids, kind.settings.position_start, kind.position_rows,
            kind.settings.position_padding_idx, scatter,
        )  # fmt: skip
    if need.type_weight:
        source = by_place if shared_types else rows
        if type_ids is None:
            source = rows.sum(0, keepdim=True, dtype=rows.dtype)
        grads["type_weight"] = _table_grad(source, type_ids, 0, kind.type_rows, -1, scatter)
    if need.extra:
        source = by_place if shared_extra else rows
        # Rows that were given may have the same gradient, but no two leaves may have the same memory.
        grads["extra"] = source.clone() if need.weight and ids is None and scaled is source else source
    return grads


def _packed_gradients(
    kind: Kind, need: Needs, rows: Tensor, scaled: Tensor, indices: Indices, scatter: Callable[..., Tensor]
) -> dict[str, Tensor]:
    """Of the parts of a row, from the gradients of the rows at ``packed``: a scatter each, in a fixed order."""
    ids, position_ids, type_ids, packed = indices.ids, indices.position_ids, indices.type_ids, indices.packed
    assert packed is not None
    count = math.prod(kind.shape[:-1]) if ids is None else ids.numel()
    if count == 0:  # then no place is known, and there is nothing to index
        sizes = {"weight": kind.shape[0], "position_weight": kind.position_rows, "type_weight": kind.type_rows,
                 "extra": kind.extra_rows}  # fmt: skip
        nothing = {name: rows.new_zeros((n, rows.shape[1])) for name, n in sizes.items() if getattr(need, name)}
        return {name: grad.view(kind.shape) if name == "weight" else grad for name, grad in nothing.items()}
    known = (packed >= 0) & (packed < count)
    places = packed.clamp(0, max(0, count - 1))

    def scattered(source: Tensor, at: Tensor, size: int, padding_idx: int = -1) -> Tensor:
        # An id of -1 is dropped.
        return scatter(source, torch.where(known, at, -1), size, padding_idx)

    def chosen(given: Tensor) -> Tensor:
        return given.reshape(-1)[places % given.numel()]

    settings = kind.settings
    grads: dict[str, Tensor] = {}
    if need.weight:
        if ids is None:
            grads["weight"] = scattered(scaled, places, count).view(kind.shape)
        else:
            grads["weight"] = scattered(scaled, chosen(ids), kind.shape[0], settings.padding_idx)
    if need.position_weight:
        at = settings.position_start + places % _length(kind, ids) if position_ids is None else chosen(position_ids)
        grads["position_weight"] = scattered(rows, at, kind.position_rows, settings.position_padding_idx)
    if need.type_weight:
        kinds = torch.zeros_like(places) if type_ids is None else chosen(type_ids)
        grads["type_weight"] = scattered(rows, kinds, kind.type_rows)
    if need.extra:
        grads["extra"] = scattered(rows, places % kind.extra_rows, kind.extra_rows)
    return grads


def _length(kind: Kind, ids: Tensor | None) -> int:
    """S."""
    shape = kind.shape[:-1] if ids is None else ids.shape
    return shape[-1] if len(shape) else 1


def _table_grad(
    source: Tensor, ids: Tensor | None, start: int, rows: int, padding_idx: int, scatter: Callable[..., Tensor]
) -> Tensor:
    """Gradient of a position or type table; without ids, ``source`` belongs to the rows from ``start`` on."""
    if source.shape[0] == 0:
        return source.new_zeros((rows, source.shape[1]))
    if ids is not None:
        return scatter(source, ids, rows, padding_idx)
    grad = F.pad(source, (0, 0, start, rows - start - source.shape[0]))
    if padding_idx >= 0:
        grad[padding_idx] = 0.0
    return grad

"""The backward formula of ``embed``: the kernel's row gradients, and from them those of every part of a row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from embedkernels.ops import embedding_grad as _grad  # noqa: F401  (defines torch.ops.embedkernels.embedding_backward)


def setup_context(ctx: Any, inputs: Sequence[Any], output: tuple[Tensor, Tensor, Tensor]) -> None:
    (ids, weight, ctx.scale, position_weight, ctx.sinusoids, ctx.position_padding_idx, position_ids,
     ctx.position_start, type_weight, type_ids, extra, mask, packed, ctx.norm, norm_weight, norm_bias, _,
     ctx.dropout_p, ctx.dropout_first, seed, _, ctx.padding_idx) = inputs  # fmt: skip
    _, mean, rstd = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(mean, rstd)
    ctx.dtype, ctx.shape = weight.dtype, weight.shape
    ctx.position_rows, ctx.type_rows, ctx.extra_rows = (
        0 if table is None else table.shape[0] for table in (position_weight, type_weight, extra)
    )
    # Without a norm the gradient does not depend on the rows: do not keep what they are made of.
    tables: tuple[Tensor | None, ...] = (weight, position_weight, type_weight, extra, norm_weight, norm_bias)
    if ctx.norm == "none":
        tables = (None,) * len(tables)
    ctx.save_for_backward(ids, position_ids, type_ids, mask, packed, *tables, mean, rstd, seed)


# The arguments of embed_forward, in their order.
_ARGUMENTS = (
    "ids", "weight", "scale", "position_weight", "sinusoids", "position_padding_idx", "position_ids",
    "position_start", "type_weight", "type_ids", "extra", "mask", "packed", "norm", "norm_weight", "norm_bias",
    "norm_eps", "dropout_p", "dropout_first", "seed", "dtype", "padding_idx",
)  # fmt: skip


def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    need = dict(zip(_ARGUMENTS, ctx.needs_input_grad, strict=True))
    if grad is None:
        return (None,) * len(_ARGUMENTS)
    (ids, position_ids, type_ids, mask, packed, weight, position_weight, type_weight, extra, norm_weight, norm_bias,
     mean, rstd, seed) = ctx.saved_tensors  # fmt: skip
    # The factor is that of the token rows alone: the kernel applies it only where nothing else needs a gradient.
    others = need["position_weight"] or need["type_weight"] or need["extra"]
    row_scale = ctx.scale if need["weight"] and not others else 1.0
    need_rows, need_norm = need["weight"] or others, need["norm_weight"] or need["norm_bias"]
    width = grad.shape[-1]
    grads: dict[str, Tensor] = {}
    if ctx.norm != "none" or ctx.dropout_p > 0.0 or mask is not None or row_scale != 1.0:
        if weight is None:  # only its dtype and width matter without a norm
            weight = torch.empty((0, width), dtype=ctx.dtype, device=grad.device)
        norm = ctx.norm != "none"
        rows, weight_grad, bias_grad = torch.ops.embedkernels.embed_backward(
            grad, ids, weight, ctx.scale, position_weight, ctx.sinusoids if norm else "none",
            ctx.position_padding_idx, position_ids if norm else None, ctx.position_start if norm else 0, type_weight,
            type_ids if norm else None, extra, mask, packed if norm else None, ctx.norm, norm_weight, norm_bias, mean,
            rstd, ctx.dropout_p, ctx.dropout_first, seed, row_scale, need_rows, need_norm,
        )  # fmt: skip
        grads |= {"norm_weight": weight_grad, "norm_bias": bias_grad}
    else:
        rows = grad.reshape(-1, width).to(ctx.dtype)
    scaled = rows * ctx.scale if need["weight"] and row_scale != ctx.scale else rows
    parts = _packed_gradients if packed is not None else _gradients
    grads |= parts(ctx, need, rows, scaled, ids, position_ids, type_ids, packed)
    return tuple(grads[name] if need[name] else None for name in _ARGUMENTS)


def _gradients(
    ctx: Any, need: dict[str, bool], rows: Tensor, scaled: Tensor, ids: Tensor | None, position_ids: Tensor | None,
    type_ids: Tensor | None, packed: None,  # noqa: ARG001
) -> dict[str, Tensor]:  # fmt: skip
    """Of the parts of a row, from the gradients of all rows."""
    grads: dict[str, Tensor] = {}
    if need["weight"]:
        if ids is None:
            grads["weight"] = scaled.view(ctx.shape)
        else:
            grads["weight"] = torch.ops.embedkernels.embedding_backward(
                scaled, ids.reshape(-1), ctx.shape[0], ctx.padding_idx
            )
    # What is the same in every sequence is summed over the sequences first.
    (n, width), length = rows.shape, _length(ctx, ids)
    shared = {
        "position_weight": position_ids is None or position_ids.numel() == length,
        "type_weight": type_ids is not None and type_ids.numel() == length,
        "extra": ctx.extra_rows == length,
    }
    by_place = rows
    if n > length and any(shared[name] and need[name] for name in shared):
        by_place = rows.view(n // length, length, width).sum(0, dtype=rows.dtype)

    def source(name: str) -> Tensor:
        return by_place if shared[name] else rows

    if need["position_weight"]:
        grads["position_weight"] = _table_grad(
            source("position_weight"), position_ids, ctx.position_start, ctx.position_rows, ctx.position_padding_idx
        )
    if need["type_weight"]:
        summed = rows.sum(0, keepdim=True, dtype=rows.dtype) if type_ids is None else source("type_weight")
        grads["type_weight"] = _table_grad(summed, type_ids, 0, ctx.type_rows, -1)
    if need["extra"]:
        # Rows that were given may have the same gradient, but no two leaves may have the same memory.
        shared_memory = need["weight"] and ids is None and scaled is source("extra")
        grads["extra"] = source("extra").clone() if shared_memory else source("extra")
    return grads


def _packed_gradients(
    ctx: Any, need: dict[str, bool], rows: Tensor, scaled: Tensor, ids: Tensor | None, position_ids: Tensor | None,
    type_ids: Tensor | None, packed: Tensor,
) -> dict[str, Tensor]:  # fmt: skip
    """Of the parts of a row, from the gradients of the rows at ``packed``: a scatter each, in a fixed order."""
    count = math.prod(ctx.shape[:-1]) if ids is None else ids.numel()
    if count == 0:  # then no place is known, and there is nothing to index
        sizes = {"weight": ctx.shape[0], "position_weight": ctx.position_rows, "type_weight": ctx.type_rows,
                 "extra": ctx.extra_rows}  # fmt: skip
        nothing = {name: rows.new_zeros((size, rows.shape[1])) for name, size in sizes.items() if need[name]}
        return {name: grad.view(ctx.shape) if name == "weight" else grad for name, grad in nothing.items()}
    known = (packed >= 0) & (packed < count)
    places = packed.clamp(0, max(0, count - 1))

    def scattered(source: Tensor, at: Tensor, size: int, padding_idx: int = -1) -> Tensor:
        # An id of -1 is dropped.
        at = torch.where(known, at, -1)
        grad: Tensor = torch.ops.embedkernels.embedding_backward(source, at, size, padding_idx)
        return grad

    def chosen(given: Tensor) -> Tensor:
        return given.reshape(-1)[places % given.numel()]

    grads: dict[str, Tensor] = {}
    if need["weight"]:
        if ids is None:
            grads["weight"] = scattered(scaled, places, count).view(ctx.shape)
        else:
            grads["weight"] = scattered(scaled, chosen(ids), ctx.shape[0], ctx.padding_idx)
    if need["position_weight"]:
        at = ctx.position_start + places % _length(ctx, ids) if position_ids is None else chosen(position_ids)
        grads["position_weight"] = scattered(rows, at, ctx.position_rows, ctx.position_padding_idx)
    if need["type_weight"]:
        kinds = torch.zeros_like(places) if type_ids is None else chosen(type_ids)
        grads["type_weight"] = scattered(rows, kinds, ctx.type_rows)
    if need["extra"]:
        grads["extra"] = scattered(rows, places % ctx.extra_rows, ctx.extra_rows)
    return grads


def _length(ctx: Any, ids: Tensor | None) -> int:
    """S."""
    shape = ctx.shape[:-1] if ids is None else ids.shape
    return shape[-1] if len(shape) else 1


def _table_grad(source: Tensor, ids: Tensor | None, start: int, rows: int, padding_idx: int) -> Tensor:
    """Gradient of a position or type table; without ids, ``source`` belongs to the rows from ``start`` on."""
    if source.shape[0] == 0:
        return source.new_zeros((rows, source.shape[1]))
    if ids is not None:
        grad: Tensor = torch.ops.embedkernels.embedding_backward(source, ids, rows, padding_idx)
        return grad
    grad = F.pad(source, (0, 0, start, rows - start - source.shape[0]))
    if padding_idx >= 0:
        grad[padding_idx] = 0.0
    return grad


def double_backward(ctx: Any, *grads: Tensor | None) -> None:
    raise NotImplementedError(
        "embed: the gradient is not differentiable again on the triton backend; use backend='torch' for that"
    )

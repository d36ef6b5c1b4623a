"""``embed`` as ops of torch.library: for torch.compile and whatever else wants to see it whole.

In eager mode the function behind them runs without the dispatcher (see :mod:`embedkernels.ops.eager`).
"""

# ruff: noqa: ARG001 (every function of an op takes the arguments of its schema)

from __future__ import annotations

import math

import torch
from torch import Tensor

from embedkernels.ops import embed_autograd as autograd
from embedkernels.ops import ids as id_errors
from embedkernels.ops.backend import choose
from embedkernels.ops.embed_checks import check_op, check_saved
from embedkernels.ops.embed_launch import Indices, Kind, Parts, Settings, backward, forward, output_shape

_library = torch.library.Library("embedkernels", "FRAGMENT")
_library.define("checked_ids(Tensor ids, SymInt rows, str table, str op) -> Tensor")


def _checked_impl(ids: Tensor, rows: int, table: str, op: str) -> Tensor:
    id_errors.check_ids(ids, rows, table, op)
    return ids.clone()


_library.impl("checked_ids", _checked_impl, "CompositeExplicitAutograd")
torch.library.register_fake("embedkernels::checked_ids", lambda ids, *_: ids.clone(), lib=_library)
_SHARED = (
    "Tensor? ids, Tensor weight, float scale, Tensor? position_weight, str sinusoids, int position_padding_idx, "
    "Tensor? position_ids, SymInt position_start, Tensor? type_weight, Tensor? type_ids, Tensor? extra, "
    "Tensor? mask, Tensor? packed, str norm, Tensor? norm_weight, Tensor? norm_bias"
)
_library.define(
    f"embed_forward({_SHARED}, float norm_eps, float dropout_p, bool dropout_first, Tensor? seed, ScalarType dtype, "
    "int padding_idx) -> (Tensor, Tensor, Tensor)"
)
_library.define(
    f"embed_backward(Tensor grad, {_SHARED}, Tensor mean, Tensor rstd, float dropout_p, bool dropout_first, "
    "Tensor? seed, float row_scale, bool need_rows, bool need_norm) -> (Tensor, Tensor, Tensor)"
)


def _forward_impl(
    ids: Tensor | None, weight: Tensor, scale: float, position_weight: Tensor | None, sinusoids: str,
    position_padding_idx: int, position_ids: Tensor | None, position_start: int, type_weight: Tensor | None,
    type_ids: Tensor | None, extra: Tensor | None, mask: Tensor | None, packed: Tensor | None, norm: str,
    norm_weight: Tensor | None, norm_bias: Tensor | None, norm_eps: float, dropout_p: float, dropout_first: bool,
    seed: Tensor | None, dtype: torch.dtype, padding_idx: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    device = weight.device
    id_errors.raise_pending(device)
    choose("embed", device, "triton")
    check_op(
        ids, weight, scale, position_weight, sinusoids, position_ids, position_start, type_weight, type_ids, extra,
        mask, packed, norm, norm_weight, norm_bias, dropout_p, seed,
    )  # fmt: skip
    settings = Settings(
        scale, sinusoids, position_padding_idx, position_start, norm, norm_eps, dropout_p, dropout_first, dtype,
        padding_idx,
    )  # fmt: skip
    parts = Parts(weight, position_weight, type_weight, extra, norm_weight, norm_bias)
    return forward(Kind(settings, parts), Indices(ids, position_ids, type_ids, mask, packed, seed), parts)


def _forward_fake(
    ids: Tensor | None, weight: Tensor, scale: float, position_weight: Tensor | None, sinusoids: str,
    position_padding_idx: int, position_ids: Tensor | None, position_start: int, type_weight: Tensor | None,
    type_ids: Tensor | None, extra: Tensor | None, mask: Tensor | None, packed: Tensor | None, norm: str,
    norm_weight: Tensor | None, norm_bias: Tensor | None, norm_eps: float, dropout_p: float, dropout_first: bool,
    seed: Tensor | None, dtype: torch.dtype, padding_idx: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    shape = output_shape(ids, weight, packed)
    rows = math.prod(shape[:-1])
    mean, rstd = (
        weight.new_empty(rows if there else 0, dtype=torch.float32) for there in (norm == "layer", norm != "none")
    )
    return weight.new_empty(shape, dtype=dtype), mean, rstd


def _backward_impl(
    grad: Tensor, ids: Tensor | None, weight: Tensor, scale: float, position_weight: Tensor | None, sinusoids: str,
    position_padding_idx: int, position_ids: Tensor | None, position_start: int, type_weight: Tensor | None,
    type_ids: Tensor | None, extra: Tensor | None, mask: Tensor | None, packed: Tensor | None, norm: str,
    norm_weight: Tensor | None, norm_bias: Tensor | None, mean: Tensor, rstd: Tensor, dropout_p: float,
    dropout_first: bool, seed: Tensor | None, row_scale: float, need_rows: bool, need_norm: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    choose("embed", weight.device, "triton")
    check_op(
        ids, weight, scale, position_weight, sinusoids, position_ids, position_start, type_weight, type_ids, extra,
        mask, packed, norm, norm_weight, norm_bias, dropout_p, seed, grad=grad,
    )  # fmt: skip
    check_saved(grad, ids, weight, packed, norm, mean, rstd)
    settings = Settings(
        scale, sinusoids, position_padding_idx, position_start, norm, 0.0, dropout_p, dropout_first, grad.dtype, -1
    )
    parts = Parts(weight, position_weight, type_weight, extra, norm_weight, norm_bias)
    return backward(
        grad, Kind(settings, parts), Indices(ids, position_ids, type_ids, mask, packed, seed), parts, mean, rstd,
        row_scale, need_rows, need_norm,
    )  # fmt: skip


def _backward_fake(
    grad: Tensor, ids: Tensor | None, weight: Tensor, scale: float, position_weight: Tensor | None, sinusoids: str,
    position_padding_idx: int, position_ids: Tensor | None, position_start: int, type_weight: Tensor | None,
    type_ids: Tensor | None, extra: Tensor | None, mask: Tensor | None, packed: Tensor | None, norm: str,
    norm_weight: Tensor | None, norm_bias: Tensor | None, mean: Tensor, rstd: Tensor, dropout_p: float,
    dropout_first: bool, seed: Tensor | None, row_scale: float, need_rows: bool, need_norm: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    rows = weight.new_empty((math.prod(grad.shape[:-1]) if need_rows else 0, weight.shape[-1]))
    weight_grad, bias_grad = (
        p.new_empty(p.shape) if need_norm and p is not None else weight.new_empty(0) for p in (norm_weight, norm_bias)
    )
    return rows, weight_grad, bias_grad


_library.impl("embed_forward", _forward_impl, "CompositeExplicitAutograd")
_library.impl("embed_backward", _backward_impl, "CompositeExplicitAutograd")
torch.library.register_fake("embedkernels::embed_forward", _forward_fake, lib=_library)
torch.library.register_fake("embedkernels::embed_backward", _backward_fake, lib=_library)
torch.library.register_autograd(
    "embedkernels::embed_forward", autograd.backward, setup_context=autograd.setup_context, lib=_library
)
torch.library.register_autograd("embedkernels::embed_backward", autograd.double_backward, lib=_library)

"""Input embeddings as one op: token, token type and position rows added, normalised and dropped out in one pass."""

# ruff: noqa: ARG001 (every function of an op takes the arguments of its schema)

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from embedkernels.ops import ids as id_errors
from embedkernels.ops.backend import Backend, check_stock_autograd, choose, needs_stock_autograd
from embedkernels.ops.embed_checks import (
    check_call,
    check_norm_parameters,
    check_saved,
    check_seed,
    contiguous,
    kernel_inputs,
    sequence_length,
)
from embedkernels.ops.embedding import lookup, stock_lookup
from embedkernels.ops.embedding_grad import normalized_padding
from embedkernels.reference import embed as reference

_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_SEED_LIMIT = 2**62
_TABLES = ("token", "token type", "position")


def embed(
    ids: Tensor,
    weight: Tensor,
    *,
    position_weight: Tensor | None = None,
    position_ids: Tensor | None = None,
    position_start: int = 0,
    type_weight: Tensor | None = None,
    type_ids: Tensor | None = None,
    norm: str | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-12,
    dropout_p: float = 0.0,
    padding_idx: int | None = None,
    position_padding_idx: int | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """Input embeddings of a transformer: y = dropout(norm((W[ids] + T[type_ids]) + P[position_ids])).

    Differentiable in the three tables and in the norm's weight and bias; on the Triton backend once (its gradient
    has no derivative). Forward-mode derivatives and the transforms of ``torch.func`` run on PyTorch's own ops. On the
    Triton backend one kernel writes y, and the backward pass gathers the rows and draws the dropout mask
    again instead of reading saved activations: the tables must not change between forward and backward (PyTorch
    raises if they do). Arithmetic is in fp32, results are bitwise reproducible.

    Args:
        ids: int32 or int64, (..., S), token ids in [0, V).
        weight: W, (V, D), floating point.
        position_weight: P, (rows, D), or None for no positions.
        position_ids: int32 or int64, broadcastable to the shape of ``ids``; None for position_start + s at the s-th
            place of the last axis.
        position_start: first position where ``position_ids`` is None, for decoding with a cache.
        type_weight: T, (rows, D), or None for no token types.
        type_ids: int32 or int64, broadcastable to the shape of ``ids``; None for type 0 everywhere.
        norm: ``"layer"`` for LayerNorm over D (Ba, Kiros, Hinton, 2016), None for none.
        norm_weight, norm_bias: (D,), of the tables' dtype or fp32; None leaves that part out.
        norm_eps: added to the variance.
        dropout_p: probability of dropping an element, applied whenever it is positive (pass 0 in evaluation); kept
            elements are scaled by 1 / (1 - dropout_p). Reproducible with ``torch.manual_seed``.
        padding_idx: row of W that gets no gradient. Negative values count from the end.
        position_padding_idx: row of P that gets no gradient.
        backend: ``"triton"``, ``"torch"`` or None for the best there is.

    Returns:
        (..., S, D), contiguous, in the dtype of ``weight``; under CUDA autocast fp32 with a norm, like LayerNorm's.

    Raises:
        IndexError: an id out of its table's range (on a GPU by the next call of an op or by
            :func:`embedkernels.check_errors`; until then such an id adds zeros), or a sequence that is longer than
            the position table.
        TypeError: ids that are not int32 or int64, tables that are not floating point or differ in dtype, an
            argument of another type than it has here.
        ValueError: shapes, devices or settings that do not fit.
        NotImplementedError: ``backend="triton"`` with a forward-mode tangent or within a transform of ``torch.func``.

    Example:
        >>> import torch, embedkernels as ek
        >>> words, positions = torch.randn(100, 8), torch.randn(16, 8)
        >>> ids = torch.randint(0, 100, (2, 5))
        >>> ek.embed(ids, words, position_weight=positions, norm="layer").shape
        torch.Size([2, 5, 8])
    """
    position_start, norm_eps, dropout_p = check_call(
        ids, weight, position_weight, position_ids, position_start, type_weight, type_ids, norm, norm_weight,
        norm_bias, norm_eps, dropout_p,
    )  # fmt: skip
    padding = normalized_padding(padding_idx, weight.shape[0], "embed")
    position_padding = -1
    if position_weight is not None:
        position_padding = normalized_padding(
            position_padding_idx, position_weight.shape[0], "embed", "position_padding_idx"
        )
    in_kernels = weight.dtype in _KERNEL_DTYPES
    if backend == "triton" and not in_kernels:
        raise TypeError(f"embed: backend 'triton' takes float32, bfloat16 or float16 tables, got {weight.dtype}")
    id_errors.begin(weight.device)
    rows: Callable[..., Tensor] = functools.partial(lookup, backend=backend)
    chosen = choose("embed", weight.device, backend).backend if in_kernels else "torch"
    if needs_stock_autograd(weight, position_weight, type_weight, norm_weight, norm_bias):
        check_stock_autograd("embed", weight.device, backend)
        rows, chosen = stock_lookup, "torch"
    if chosen == "torch":
        return _composed(
            rows, ids, weight, position_weight=position_weight, position_ids=position_ids,
            position_start=position_start, type_weight=type_weight, type_ids=type_ids, norm=norm,
            norm_weight=norm_weight, norm_bias=norm_bias, norm_eps=norm_eps, dropout_p=dropout_p,
            padding_idx=padding if padding >= 0 else None,
            position_padding_idx=position_padding if position_padding >= 0 else None,
        )  # fmt: skip
    seed = None
    if dropout_p > 0.0:
        seed = torch.randint(0, _SEED_LIMIT, (1,), dtype=torch.int64, device=ids.device)
    out: Tensor = torch.ops.embedkernels.embed_forward(
        ids.contiguous(), weight, position_weight, _flat(position_ids, ids), position_start, type_weight,
        _flat(type_ids, ids), norm is not None, norm_weight, norm_bias, norm_eps, dropout_p, seed,
        weight.dtype if norm is None else reference.norm_dtype(weight.device, weight.dtype), padding,
        position_padding,
    )[0]  # fmt: skip
    return out


def _composed(rows: Callable[..., Tensor], ids: Tensor, weight: Tensor, **options: Any) -> Tensor:
    """The torch backend: ``rows`` looks up in one table after the other, and names it in its errors."""
    token, kind, position = (functools.partial(rows, table=table, op="embed") for table in _TABLES)
    return reference.embed(ids, weight, lookup=token, type_lookup=kind, position_lookup=position, **options)


def _flat(given: Tensor | None, ids: Tensor) -> Tensor | None:
    """Ids broadcast to the shape of ``ids``: their S values if every sequence has the same, else all N of them."""
    if given is None:
        return None
    given = given.expand(ids.shape)
    leading = range(ids.dim() - 1)
    if ids.numel() > 0 and all(given.shape[axis] == 1 or given.stride(axis) == 0 for axis in leading):
        for _ in leading:
            given = given[0]
    return given.reshape(-1).contiguous()


_library = torch.library.Library("embedkernels", "FRAGMENT")
_SHARED = (
    "Tensor ids, Tensor weight, Tensor? position_weight, Tensor? position_ids, SymInt position_start, "
    "Tensor? type_weight, Tensor? type_ids, bool norm, Tensor? norm_weight, Tensor? norm_bias"
)
_library.define(
    f"embed_forward({_SHARED}, float norm_eps, float dropout_p, Tensor? seed, ScalarType dtype, int padding_idx, "
    "int position_padding_idx) -> (Tensor, Tensor, Tensor)"
)
_library.define(
    f"embed_backward(Tensor grad, {_SHARED}, Tensor mean, Tensor rstd, float dropout_p, Tensor? seed, "
    "bool need_rows, bool need_norm) -> (Tensor, Tensor, Tensor)"
)


def _forward_impl(
    ids: Tensor, weight: Tensor, position_weight: Tensor | None, position_ids: Tensor | None, position_start: int,
    type_weight: Tensor | None, type_ids: Tensor | None, norm: bool, norm_weight: Tensor | None,
    norm_bias: Tensor | None, norm_eps: float, dropout_p: float, seed: Tensor | None, dtype: torch.dtype,
    padding_idx: int, position_padding_idx: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    device = weight.device
    id_errors.raise_pending(device)
    choose("embed", device, "triton")
    inputs = kernel_inputs(ids, weight, position_weight, position_ids, position_start, type_weight, type_ids)
    check_norm_parameters(norm, norm_weight, norm_bias, weight)
    check_seed(dropout_p, seed, weight)
    if device.type == "cpu":
        id_errors.check_ids(ids, weight.shape[0], "token", "embed")
        if type_weight is not None and type_ids is not None:
            id_errors.check_ids(type_ids, type_weight.shape[0], "token type", "embed")
        if position_weight is not None and position_ids is not None:
            id_errors.check_ids(position_ids, position_weight.shape[0], "position", "embed")
    out = weight.new_empty((*ids.shape, weight.shape[1]), dtype=dtype)
    if ids.numel() == 0:
        return out, weight.new_empty(0, dtype=torch.float32), weight.new_empty(0, dtype=torch.float32)
    from embedkernels.kernels import embed as kernels

    errors = id_errors.error_state(device)
    with torch.cuda.device_of(weight):
        mean, rstd = kernels.embed_forward(
            inputs,
            out,
            norm,
            contiguous(norm_weight),
            contiguous(norm_bias),
            norm_eps,
            dropout_p,
            seed,
            (errors.flag, errors.record),
        )
    id_errors.after_launch(device)
    return out, mean, rstd


def _forward_fake(
    ids: Tensor, weight: Tensor, position_weight: Tensor | None, position_ids: Tensor | None, position_start: int,
    type_weight: Tensor | None, type_ids: Tensor | None, norm: bool, norm_weight: Tensor | None,
    norm_bias: Tensor | None, norm_eps: float, dropout_p: float, seed: Tensor | None, dtype: torch.dtype,
    padding_idx: int, position_padding_idx: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    rows = ids.numel() if norm else 0
    mean, rstd = (weight.new_empty(rows, dtype=torch.float32) for _ in range(2))
    return weight.new_empty((*ids.shape, weight.shape[1]), dtype=dtype), mean, rstd


def _backward_impl(
    grad: Tensor, ids: Tensor, weight: Tensor, position_weight: Tensor | None, position_ids: Tensor | None,
    position_start: int, type_weight: Tensor | None, type_ids: Tensor | None, norm: bool,
    norm_weight: Tensor | None, norm_bias: Tensor | None, mean: Tensor, rstd: Tensor, dropout_p: float,
    seed: Tensor | None, need_rows: bool, need_norm: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    choose("embed", weight.device, "triton")
    inputs = kernel_inputs(ids, weight, position_weight, position_ids, position_start, type_weight, type_ids)
    check_norm_parameters(norm, norm_weight, norm_bias, weight)
    check_seed(dropout_p, seed, weight)
    check_saved(grad, ids, weight, norm, mean, rstd)
    if ids.numel() == 0:
        norm_grads = (
            p.new_zeros(p.shape) if need_norm and p is not None else weight.new_empty(0)
            for p in (norm_weight, norm_bias)
        )
        return (weight.new_empty((0, weight.shape[1])), *norm_grads)  # type: ignore[return-value]
    from embedkernels.kernels import embed as kernels

    with torch.cuda.device_of(weight):
        return kernels.embed_backward(
            inputs,
            grad.contiguous(),
            norm,
            contiguous(norm_weight),
            contiguous(norm_bias),
            mean,
            rstd,
            dropout_p,
            seed,
            need_rows,
            need_norm,
        )


def _backward_fake(
    grad: Tensor, ids: Tensor, weight: Tensor, position_weight: Tensor | None, position_ids: Tensor | None,
    position_start: int, type_weight: Tensor | None, type_ids: Tensor | None, norm: bool,
    norm_weight: Tensor | None, norm_bias: Tensor | None, mean: Tensor, rstd: Tensor, dropout_p: float,
    seed: Tensor | None, need_rows: bool, need_norm: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    rows = weight.new_empty((ids.numel() if need_rows else 0, weight.shape[1]))
    weight_grad, bias_grad = (
        p.new_empty(p.shape) if need_norm and p is not None else weight.new_empty(0) for p in (norm_weight, norm_bias)
    )
    return rows, weight_grad, bias_grad


def _setup_context(ctx: Any, inputs: Sequence[Any], output: tuple[Tensor, Tensor, Tensor]) -> None:
    (ids, weight, position_weight, position_ids, ctx.position_start, type_weight, type_ids, ctx.norm, norm_weight,
     norm_bias, _, ctx.dropout_p, seed, _, ctx.padding_idx, ctx.position_padding_idx) = inputs  # fmt: skip
    _, mean, rstd = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(mean, rstd)
    ctx.dtype = weight.dtype
    ctx.rows, ctx.position_rows, ctx.type_rows = (
        0 if table is None else table.shape[0] for table in (weight, position_weight, type_weight)
    )
    # Without a norm the gradient does not depend on the rows: do not keep the tables.
    tables = (weight, position_weight, type_weight, norm_weight, norm_bias) if ctx.norm else (None,) * 5
    ctx.save_for_backward(ids, position_ids, type_ids, *tables, mean, rstd, seed)


def _backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    _, need_word, need_position, _, _, need_type, _, _, need_weight, need_bias, *_ = ctx.needs_input_grad
    ids, position_ids, type_ids, weight, position_weight, type_weight, norm_weight, norm_bias, mean, rstd, seed = (
        ctx.saved_tensors
    )
    if grad is None:
        return (None,) * 16
    need_rows, need_norm = need_word or need_position or need_type, need_weight or need_bias
    weight_grad = bias_grad = None
    if ctx.norm or ctx.dropout_p > 0.0:
        if weight is None:  # only its dtype and width matter without a norm
            weight = torch.empty((0, grad.shape[-1]), dtype=ctx.dtype, device=grad.device)
        rows, weight_grad, bias_grad = torch.ops.embedkernels.embed_backward(
            grad, ids, weight, position_weight, position_ids, ctx.position_start, type_weight, type_ids, ctx.norm,
            norm_weight, norm_bias, mean, rstd, ctx.dropout_p, seed, need_rows, need_norm,
        )  # fmt: skip
    else:
        rows = grad.reshape(ids.numel(), grad.shape[-1]).to(ctx.dtype)
    word = position = kind = None
    if need_word:
        word = torch.ops.embedkernels.embedding_backward(rows, ids.reshape(-1), ctx.rows, ctx.padding_idx)
    # What is the same in every sequence is summed over the sequences first.
    n, length = ids.numel(), sequence_length(ids)
    shared_position = need_position and (position_ids is None or position_ids.numel() == length)
    shared_type = need_type and type_ids is not None and type_ids.numel() == length
    by_place = rows
    if n > length and (shared_position or shared_type):
        by_place = rows.view(n // length, length, rows.shape[1]).sum(0, dtype=rows.dtype)
    if need_position:
        source = by_place if shared_position else rows
        position = _table_grad(source, position_ids, ctx.position_start, ctx.position_rows, ctx.position_padding_idx)
    if need_type:
        if type_ids is None:
            source = rows.sum(0, keepdim=True, dtype=rows.dtype)
        else:
            source = by_place if shared_type else rows
        kind = _table_grad(source, type_ids, 0, ctx.type_rows, -1)
    return (
        None, word, position, None, None, kind, None, None, weight_grad if need_weight else None,
        bias_grad if need_bias else None, None, None, None, None, None, None,
    )  # fmt: skip


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


def _double_backward(ctx: Any, *grads: Tensor | None) -> None:
    raise NotImplementedError(
        "embed: the gradient is not differentiable again on the triton backend; use backend='torch' for that"
    )


_library.impl("embed_forward", _forward_impl, "CompositeExplicitAutograd")
_library.impl("embed_backward", _backward_impl, "CompositeExplicitAutograd")
torch.library.register_fake("embedkernels::embed_forward", _forward_fake, lib=_library)
torch.library.register_fake("embedkernels::embed_backward", _backward_fake, lib=_library)
torch.library.register_autograd("embedkernels::embed_forward", _backward, setup_context=_setup_context, lib=_library)
torch.library.register_autograd("embedkernels::embed_backward", _double_backward, lib=_library)

"""Lookup of rows in a table, with checked ids and a deterministic gradient."""

# ruff: noqa: ARG001 (every function of an op takes the arguments of its schema)

from __future__ import annotations

from typing import get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from embedkernels.ops import embedding_grad as _grad  # defines torch.ops.embedkernels.embedding_backward
from embedkernels.ops import ids as id_errors
from embedkernels.ops import table_grad
from embedkernels.ops.backend import Backend, check_stock_autograd, choose, needs_stock_autograd
from embedkernels.ops.eager import apply, is_eager
from embedkernels.ops.embedding_plan import EmbeddingPlan, check_ids_tensor, normalized_padding
from embedkernels.reference import embedding as reference


def embedding(
    ids: Tensor,
    weight: Tensor,
    *,
    padding_idx: int | None = None,
    scale_grad_by_freq: bool = False,
    grad_mode: _grad.Mode = "dense",
    plan: EmbeddingPlan | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """Rows of a table: y[...] = weight[ids[...]].

    Differentiable in ``weight``. The gradient is added in fp32 and bitwise reproducible. Forward-mode derivatives and
    the transforms of ``torch.func`` run on PyTorch's own lookup.

    Args:
        ids: int32 or int64, any shape, values in [0, V).
        weight: (V, D), float32, bfloat16, float16 or float64, any strides, on the device of ``ids``.
        padding_idx: row that gets no gradient (its values are looked up like any other's). Negative values count
            from the end of the table.
        scale_grad_by_freq: divide every row's gradient by how often its id occurs in ``ids``.
        grad_mode: what the gradient of ``weight`` is. ``"dense"``: (V, D). ``"accumulate"``: added straight to
            ``weight.main_grad``, where there is such a tensor, or to ``weight.grad`` at the end of the backward
            pass, after what other uses of the table (a tied head) have left there, without a (V, D) tensor of its
            own; dense, with one warning, where something else owns the gradient (hooks, torch.distributed,
            ``create_graph``).
            ``"rows"``: a ``torch.sparse_coo`` tensor of the rows in use, as with ``nn.Embedding(sparse=True)``; on a
            GPU padded to min(N, V) rows with zeros, so that nothing waits.
        plan: of these ids and this padding, to be used again; None makes one where a gradient is needed.
        backend: ``"triton"``, ``"torch"`` or None for the best there is; also used for the gradient.

    Returns:
        (*ids.shape, D) in the dtype of ``weight``, contiguous.

    Raises:
        IndexError: an id out of range. On a GPU by the next call of an op or by :func:`embedkernels.check_errors`;
            until then such an id gives a row of zeros.
        TypeError: ids that are not int32 or int64, weight of another dtype, padding_idx that is not an int.
        ValueError: weight that is not 2-D or is on another device, padding_idx out of range, an unknown grad_mode, a
            plan of other ids or another table.
        NotImplementedError: ``backend="triton"`` with a forward-mode tangent or within a transform of ``torch.func``.

    Example:
        >>> import torch, embedkernels as ek
        >>> weight = torch.randn(10, 4, requires_grad=True)
        >>> ek.embedding(torch.tensor([[1, 2, 0]]), weight, padding_idx=0).shape
        torch.Size([1, 3, 4])
    """
    op = "embedding"
    _check(ids, weight)
    padding = normalized_padding(padding_idx, weight.shape[0], op)
    if grad_mode not in get_args(_grad.Mode):
        raise ValueError(f"{op}: grad_mode must be dense, accumulate or rows, got {grad_mode!r}")
    if plan is not None and (plan.order.numel(), plan.num_rows) != (ids.numel(), weight.shape[0]):
        raise ValueError(
            f"{op}: plan is of {plan.order.numel()} ids and {plan.num_rows} rows, "
            f"ids has {ids.numel()} elements and weight {weight.shape[0]} rows"
        )
    if plan is not None and plan.order.device != ids.device:
        raise ValueError(f"{op}: plan is on {plan.order.device}, ids is on {ids.device}")
    id_errors.begin(weight.device)
    if needs_stock_autograd(weight):
        check_stock_autograd(op, weight.device, backend)
        return stock_lookup(ids, weight, padding_idx=padding, scale_grad_by_freq=scale_grad_by_freq)
    if not is_eager(ids, weight):
        if grad_mode == "rows" and weight.requires_grad:  # graphs hold no sparse tensors
            return stock_lookup(ids, weight, padding_idx=padding, scale_grad_by_freq=scale_grad_by_freq, sparse=True)
        if grad_mode == "accumulate":
            table_grad.warn_dense("torch.compile or a tensor subclass has to see the gradient")
        return lookup(ids, weight, padding_idx=padding, scale_by_freq=scale_grad_by_freq, backend=backend)
    if torch.is_grad_enabled() and weight.requires_grad:
        options = table_grad.Options(padding, scale_grad_by_freq, grad_mode, backend, plan)
        out: Tensor = apply(table_grad.Lookup, weight, ids, options, _forward)
        return out
    return _forward(weight, ids, backend)


def lookup(
    ids: Tensor,
    weight: Tensor,
    *,
    padding_idx: int | None = None,
    scale_by_freq: bool = False,
    backend: Backend | None = None,
    table: str = "token",
    op: str = "embedding",
) -> Tensor:
    """:func:`embedding` without its checks; errors name ``op``, and an id out of range ``table`` as well."""
    padding = -1 if padding_idx is None else padding_idx
    out: Tensor = torch.ops.embedkernels.embedding(weight, ids, padding, backend or "auto", table, op, scale_by_freq)
    return out


def stock_lookup(
    ids: Tensor,
    weight: Tensor,
    *,
    padding_idx: int | None = None,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
    table: str = "token",
    op: str = "embedding",
) -> Tensor:
    """PyTorch's own lookup, with every derivative that it has, and our error for an id out of range."""
    id_errors.check_ids(ids, weight.shape[0], table, op)
    padding = None if padding_idx is None or padding_idx < 0 else padding_idx
    return F.embedding(ids, weight, padding_idx=padding, scale_grad_by_freq=scale_grad_by_freq, sparse=sparse)


def _check(ids: Tensor, weight: Tensor, op: str = "embedding") -> None:
    check_ids_tensor(ids, op)
    if not isinstance(weight, Tensor):
        raise TypeError(f"{op}: weight must be a Tensor, got {type(weight).__name__}")
    if weight.dim() != 2:
        raise ValueError(f"{op}: weight must be 2-D (V, D), got shape {tuple(weight.shape)}")
    if weight.dtype not in _grad.DTYPES:
        raise TypeError(f"{op}: weight must be one of {_grad.names(_grad.DTYPES)}, got {weight.dtype}")
    if ids.device != weight.device:
        raise ValueError(f"{op}: ids is on {ids.device}, weight is on {weight.device}")


_library = torch.library.Library("embedkernels", "FRAGMENT")
_library.define(
    "embedding(Tensor weight, Tensor ids, int padding_idx, str backend='auto', str table='token', "
    "str op='embedding', bool scale_by_freq=False) -> Tensor"
)


def _impl(
    weight: Tensor, ids: Tensor, padding_idx: int, backend: str = "auto", table: str = "token", op: str = "embedding",
    scale_by_freq: bool = False,
) -> Tensor:  # fmt: skip
    _check(ids, weight, op)
    id_errors.raise_pending(weight.device)
    return _forward(weight, ids, backend, table, op)


def _forward(
    weight: Tensor, ids: Tensor, backend: str | None = None, table: str = "token", op: str = "embedding"
) -> Tensor:
    """The lookup itself, of checked arguments."""
    if choose("embedding", weight.device, backend).backend == "torch":
        # Reads the ids: on a GPU a sync, which the triton backend is there to avoid.
        id_errors.check_ids(ids, weight.shape[0], table, op)
        return reference.embedding(ids, weight)
    from embedkernels.kernels.embedding import embedding_forward

    out = weight.new_empty((ids.numel(), weight.shape[1]))
    if out.numel() > 0:
        state = id_errors.error_state(weight.device)
        rows = weight if weight.stride(1) == 1 else weight.contiguous()
        with torch.cuda.device_of(weight):
            named = id_errors.TABLES.index(table), id_errors.OPS.index(op)
            embedding_forward(out, ids.contiguous(), rows, (state.flag, state.record), *named)
        id_errors.after_launch(weight.device)
    return out.view(*ids.shape, weight.shape[1])


_library.impl("embedding", _impl, "CompositeExplicitAutograd")


@torch.library.register_fake("embedkernels::embedding", lib=_library)
def _fake(
    weight: Tensor, ids: Tensor, padding_idx: int, backend: str = "auto", table: str = "token", op: str = "embedding",
    scale_by_freq: bool = False,
) -> Tensor:  # fmt: skip
    return weight.new_empty((*ids.shape, weight.shape[1]))


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    weight, ids, ctx.padding_idx, ctx.backend, _, _, ctx.scale_by_freq = inputs
    ctx.num_rows = weight.shape[0]
    ctx.save_for_backward(ids)


def _backward(ctx, grad):  # type: ignore[no-untyped-def]
    (ids,) = ctx.saved_tensors
    table = torch.ops.embedkernels.embedding_backward(
        grad, ids, ctx.num_rows, ctx.padding_idx, ctx.backend, ctx.scale_by_freq
    )
    return table, None, None, None, None, None, None


torch.library.register_autograd("embedkernels::embedding", _backward, setup_context=_setup_context, lib=_library)

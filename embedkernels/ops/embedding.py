"""Lookup of rows in a table, with checked ids and a deterministic gradient."""

# ruff: noqa: ARG001 (every function of an op takes the arguments of its schema)

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from embedkernels.ops import embedding_grad as _grad  # defines torch.ops.embedkernels.embedding_backward
from embedkernels.ops import ids as id_errors
from embedkernels.ops.backend import Backend, check_stock_autograd, choose, needs_stock_autograd
from embedkernels.reference import embedding as reference


def embedding(
    ids: Tensor, weight: Tensor, *, padding_idx: int | None = None, backend: Backend | None = None
) -> Tensor:
    """Rows of a table: y[...] = weight[ids[...]].

    Differentiable in ``weight``. The gradient is dense, added in fp32 and bitwise reproducible. Forward-mode
    derivatives and the transforms of ``torch.func`` run on PyTorch's own lookup.

    Args:
        ids: int32 or int64, any shape, values in [0, V).
        weight: (V, D), float32, bfloat16, float16 or float64, any strides, on the device of ``ids``.
        padding_idx: row that gets no gradient (its values are looked up like any other's). Negative values count
            from the end of the table.
        backend: ``"triton"``, ``"torch"`` or None for the best there is; also used for the gradient.

    Returns:
        (*ids.shape, D) in the dtype of ``weight``, contiguous.

    Raises:
        IndexError: an id out of range. On a GPU by the next call of an op or by :func:`embedkernels.check_errors`;
            until then such an id gives a row of zeros.
        TypeError: ids that are not int32 or int64, weight of another dtype, padding_idx that is not an int.
        ValueError: weight that is not 2-D or is on another device, padding_idx out of range.
        NotImplementedError: ``backend="triton"`` with a forward-mode tangent or within a transform of ``torch.func``.

    Example:
        >>> import torch, embedkernels as ek
        >>> weight = torch.randn(10, 4, requires_grad=True)
        >>> ek.embedding(torch.tensor([[1, 2, 0]]), weight, padding_idx=0).shape
        torch.Size([1, 3, 4])
    """
    _check(ids, weight)
    padding = _grad.normalized_padding(padding_idx, weight.shape[0], "embedding")
    id_errors.begin(weight.device)
    if needs_stock_autograd(weight):
        check_stock_autograd("embedding", weight.device, backend)
        return stock_lookup(ids, weight, padding_idx=padding if padding >= 0 else None)
    return lookup(ids, weight, padding_idx=padding, backend=backend)


def lookup(
    ids: Tensor,
    weight: Tensor,
    *,
    padding_idx: int | None = None,
    backend: Backend | None = None,
    table: str = "token",
    op: str = "embedding",
) -> Tensor:
    """:func:`embedding` without its checks; errors name ``op``, and an id out of range ``table`` as well."""
    padding = -1 if padding_idx is None else padding_idx
    out: Tensor = torch.ops.embedkernels.embedding(weight, ids, padding, backend or "auto", table, op)
    return out


def stock_lookup(
    ids: Tensor, weight: Tensor, *, padding_idx: int | None = None, table: str = "token", op: str = "embedding"
) -> Tensor:
    """PyTorch's own lookup, with every derivative that it has, and our error for an id out of range."""
    id_errors.check_ids(ids, weight.shape[0], table, op)
    return F.embedding(ids, weight, padding_idx=padding_idx)


def _check(ids: Tensor, weight: Tensor, op: str = "embedding") -> None:
    _grad.check_ids_tensor(ids, op)
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
    "str op='embedding') -> Tensor"
)


def _impl(
    weight: Tensor, ids: Tensor, padding_idx: int, backend: str = "auto", table: str = "token", op: str = "embedding"
) -> Tensor:
    _check(ids, weight, op)
    id_errors.raise_pending(weight.device)
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
    weight: Tensor, ids: Tensor, padding_idx: int, backend: str = "auto", table: str = "token", op: str = "embedding"
) -> Tensor:
    return weight.new_empty((*ids.shape, weight.shape[1]))


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    weight, ids, ctx.padding_idx, ctx.backend, _, _ = inputs
    ctx.num_rows = weight.shape[0]
    ctx.save_for_backward(ids)


def _backward(ctx, grad):  # type: ignore[no-untyped-def]
    (ids,) = ctx.saved_tensors
    table = torch.ops.embedkernels.embedding_backward(grad, ids, ctx.num_rows, ctx.padding_idx, ctx.backend)
    return table, None, None, None, None, None


torch.library.register_autograd("embedkernels::embedding", _backward, setup_context=_setup_context, lib=_library)

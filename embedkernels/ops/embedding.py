"""Lookup of rows in a table, with checked ids and a deterministic gradient."""

# ruff: noqa: ARG001 (every function of an op takes the arguments of its schema)

from __future__ import annotations

import torch
from torch import Tensor

from embedkernels.ops import embedding_grad as _grad  # defines torch.ops.embedkernels.embedding_backward
from embedkernels.ops import ids as id_errors
from embedkernels.ops.backend import Backend, choose
from embedkernels.reference import embedding as reference


def embedding(
    ids: Tensor, weight: Tensor, *, padding_idx: int | None = None, backend: Backend | None = None
) -> Tensor:
    """Rows of a table: y[...] = weight[ids[...]].

    Differentiable in ``weight``. The gradient is dense, added in fp32 and bitwise reproducible.

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
        TypeError: ids that are not int32 or int64, weight of another dtype.
        ValueError: weight that is not 2-D or is on another device, padding_idx out of range.

    Example:
        >>> import torch, embedkernels as ek
        >>> weight = torch.randn(10, 4, requires_grad=True)
        >>> ek.embedding(torch.tensor([[1, 2, 0]]), weight, padding_idx=0).shape
        torch.Size([1, 3, 4])
    """
    _check(ids, weight)
    padding = _grad.normalized_padding(padding_idx, weight.shape[0], "embedding")
    out: Tensor = torch.ops.embedkernels.embedding(weight, ids, padding, backend or "auto")
    return out


def _check(ids: Tensor, weight: Tensor) -> None:
    _grad.check_ids_tensor(ids, "embedding")
    if not isinstance(weight, Tensor):
        raise TypeError(f"embedding: weight must be a Tensor, got {type(weight).__name__}")
    if weight.dim() != 2:
        raise ValueError(f"embedding: weight must be 2-D (V, D), got shape {tuple(weight.shape)}")
    if weight.dtype not in _grad.DTYPES:
        raise TypeError(f"embedding: weight must be one of {_grad.names(_grad.DTYPES)}, got {weight.dtype}")
    if ids.device != weight.device:
        raise ValueError(f"embedding: ids is on {ids.device}, weight is on {weight.device}")


_library = torch.library.Library("embedkernels", "FRAGMENT")
_library.define("embedding(Tensor weight, Tensor ids, int padding_idx, str backend='auto') -> Tensor")


def _impl(weight: Tensor, ids: Tensor, padding_idx: int, backend: str = "auto") -> Tensor:
    _check(ids, weight)
    id_errors.raise_pending(weight.device)
    if choose("embedding", weight.device, backend).backend == "torch":
        # Reads the ids: on a GPU a sync, which the triton backend is there to avoid.
        id_errors.check_ids(ids, weight.shape[0], "token", "embedding")
        return reference.embedding(ids, weight)
    from embedkernels.kernels.embedding import embedding_forward

    out = weight.new_empty((ids.numel(), weight.shape[1]))
    if out.numel() > 0:
        state = id_errors.error_state(weight.device)
        rows = weight if weight.stride(1) == 1 else weight.contiguous()
        with torch.cuda.device_of(weight):
            embedding_forward(out, ids.contiguous(), rows, (state.flag, state.record))
        id_errors.after_launch(weight.device)
    return out.view(*ids.shape, weight.shape[1])


_library.impl("embedding", _impl, "CompositeExplicitAutograd")


@torch.library.register_fake("embedkernels::embedding", lib=_library)
def _fake(weight: Tensor, ids: Tensor, padding_idx: int, backend: str = "auto") -> Tensor:
    return weight.new_empty((*ids.shape, weight.shape[1]))


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    weight, ids, ctx.padding_idx, ctx.backend = inputs
    ctx.num_rows = weight.shape[0]
    ctx.save_for_backward(ids)


def _backward(ctx, grad):  # type: ignore[no-untyped-def]
    (ids,) = ctx.saved_tensors
    table = torch.ops.embedkernels.embedding_backward(grad, ids, ctx.num_rows, ctx.padding_idx, ctx.backend)
    return table, None, None, None


torch.library.register_autograd("embedkernels::embedding", _backward, setup_context=_setup_context, lib=_library)

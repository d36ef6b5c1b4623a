"""The gradient of an embedding table: a plan made from the ids, and a deterministic sum of gradient rows with it.

``embedding_plan`` sorts the ids once; ``embedding_grad`` adds the gradient rows of every row of the table in fp32, in
an order that does not depend on timing, and writes the dense gradient. The op
``torch.ops.embedkernels.embedding_backward`` does both and stands behind every autograd formula that needs a
table's gradient.
"""

# ruff: noqa: ARG001 (every function of an op takes the arguments of its schema)

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from embedkernels.ops import ids as id_errors
from embedkernels.ops.arguments import checked_int
from embedkernels.ops.backend import Backend, check_stock_autograd, choose, needs_stock_autograd
from embedkernels.reference import embedding as reference

_ID_DTYPES = (torch.int32, torch.int64)
_LIMIT = 2**31
# What tables may hold: other dtypes have no arithmetic to add rows with.
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class EmbeddingPlan:
    """Which gradient rows meet in which row of a table.

    Attributes:
        order: int32 (N), positions in the flattened ids; the kept ones first, sorted stably by id.
        segment_ids: int32 (N), the distinct kept rows, ascending, in the first ``count`` elements.
        segment_offsets: int32 (N + 1), segment s is ``order[segment_offsets[s]:segment_offsets[s + 1]]``.
        count: int32 (1), number of segments; on the device, reading it waits for it.
        num_rows: rows of the table.
    """

    order: Tensor
    segment_ids: Tensor
    segment_offsets: Tensor
    count: Tensor
    num_rows: int


def names(dtypes: tuple[torch.dtype, ...]) -> str:
    """The dtypes in words, for a message."""
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def check_ids_tensor(ids: Tensor, op: str) -> None:
    """TypeError unless ``ids`` is an int32 or int64 tensor, ValueError if it has 2**31 elements or more."""
    if not isinstance(ids, Tensor):
        raise TypeError(f"{op}: ids must be a Tensor, got {type(ids).__name__}")
    if ids.dtype not in _ID_DTYPES:
        raise TypeError(f"{op}: ids must be int32 or int64, got {ids.dtype}")
    if ids.numel() >= _LIMIT:
        raise ValueError(f"{op}: ids has {ids.numel()} elements, at most {_LIMIT - 1} are supported")


def normalized_padding(padding_idx: int | None, num_rows: int, op: str, name: str = "padding_idx") -> int:
    """``padding_idx`` counted from the front, -1 for None. Negative values count from the end, as in nn.Embedding."""
    if padding_idx is None:
        return -1
    padding_idx = checked_int(padding_idx, name, op)
    if not -num_rows <= padding_idx < num_rows:
        raise ValueError(
            f"{op}: {name} {padding_idx} is out of range for a table of {num_rows} rows: "
            f"expected {-num_rows} to {num_rows - 1}"
        )
    return padding_idx % num_rows


def embedding_plan(
    ids: Tensor,
    num_embeddings: int,
    *,
    padding_idx: int | None = None,
    vocab_start: int = 0,
    backend: Backend | None = None,
) -> EmbeddingPlan:
    """Sort ids into segments, one per distinct row of the table, without waiting for the device.

    Args:
        ids: int32 or int64, any shape, fewer than 2**31 elements.
        num_embeddings: V, rows of the table, or of this shard of it.
        padding_idx: the id whose row gets no gradient; it may belong to another shard. Negative values count from
            the end of the table (only with ``vocab_start`` 0).
        vocab_start: the id of this shard's first row, not negative; ids outside [vocab_start, vocab_start + V) are
            dropped.
        backend: ``"extension"``, ``"triton"``, ``"torch"`` or None for the best there is.

    Returns:
        EmbeddingPlan: for :func:`embedding_grad`.

    Raises:
        TypeError: ids that are not int32 or int64, numbers that are not ints.
        ValueError: too many ids or rows, a negative vocab_start, or a negative padding_idx out of range.
    """
    op = "embedding_plan"
    check_ids_tensor(ids, op)
    id_errors.begin_without_ids(ids.device)
    num_embeddings = checked_int(num_embeddings, "num_embeddings", op)
    vocab_start = checked_int(vocab_start, "vocab_start", op)
    if not 0 <= num_embeddings < _LIMIT:
        raise ValueError(f"{op}: num_embeddings must be 0 to {_LIMIT - 1}, got {num_embeddings}")
    if not 0 <= vocab_start < 2**63 - _LIMIT:
        raise ValueError(f"{op}: vocab_start must be 0 to {2**63 - _LIMIT - 1}, got {vocab_start}")
    padding = -1 if padding_idx is None else checked_int(padding_idx, "padding_idx", op)
    if padding_idx is not None and padding < 0:
        if vocab_start:
            raise ValueError(f"{op}: padding_idx must not be negative with vocab_start, got {padding_idx}")
        padding = normalized_padding(padding_idx, num_embeddings, op)
    chosen = choose("embedding_grad", ids.device, backend).backend
    return _plan(ids, num_embeddings, padding, vocab_start, chosen)


def embedding_grad(grad_rows: Tensor, plan: EmbeddingPlan, *, backend: Backend | None = None) -> Tensor:
    """Dense gradient of a table: out[r] = sum of ``grad_rows`` at the positions where the ids were r.

    Added in fp32 (fp64 for double), bitwise reproducible, every row written (zeros where there is no gradient).
    Differentiable in ``grad_rows``: the derivative of this sum is the lookup.

    Args:
        grad_rows: (N, D) or (*ids.shape, D), float32, bfloat16, float16 or float64, any strides.
        plan: of the ids, on the same device.
        backend: ``"extension"``, ``"triton"``, ``"torch"`` or None for the best there is.

    Returns:
        (V, D) in the dtype of ``grad_rows``.

    Raises:
        TypeError: grad_rows of another dtype.
        ValueError: another number of rows than the plan has ids, or another device.
        NotImplementedError: a forward-mode tangent or a transform of ``torch.func`` on a backend that was asked for
            and is not ``"torch"``.
    """
    op = "embedding_grad"
    n = plan.order.numel()
    _check_grad_rows(grad_rows, n, plan.order.device, op)
    id_errors.begin_without_ids(grad_rows.device)
    parts = (plan.order, plan.segment_ids, plan.segment_offsets, plan.count)
    if needs_stock_autograd(grad_rows):
        check_stock_autograd(op, grad_rows.device, backend)
        return reference.embedding_grad_dense(grad_rows.reshape(n, grad_rows.shape[-1]), *parts, plan.num_rows)
    out: Tensor = torch.ops.embedkernels.embedding_grad(grad_rows, *parts, plan.num_rows, backend or "auto")
    return out


def _check_grad_rows(grad_rows: Tensor, n: int, device: torch.device, op: str) -> None:
    if not isinstance(grad_rows, Tensor):
        raise TypeError(f"{op}: grad_rows must be a Tensor, got {type(grad_rows).__name__}")
    if grad_rows.dtype not in DTYPES:
        raise TypeError(f"{op}: grad_rows must be one of {names(DTYPES)}, got {grad_rows.dtype}")
    if grad_rows.dim() < 1 or grad_rows.shape[:-1].numel() != n:
        raise ValueError(
            f"{op}: grad_rows must have one row for each of the {n} ids, got shape {tuple(grad_rows.shape)}"
        )
    if grad_rows.device != device:
        raise ValueError(f"{op}: grad_rows is on {grad_rows.device}, the ids are on {device}")


def _plan(ids: Tensor, num_rows: int, padding: int, start: int, backend: Backend) -> EmbeddingPlan:
    if backend == "extension":
        made = torch.ops.embedkernels_ext.embedding_plan(ids.contiguous(), num_rows, padding, start)
    else:
        # The sort is most of it, and is PyTorch's own on both.
        made = reference.embedding_plan(ids, num_rows, padding, start)
    order, segment_ids, segment_offsets, count = made
    return EmbeddingPlan(order, segment_ids, segment_offsets, count, num_rows)


def _dense(rows: Tensor, plan: EmbeddingPlan, backend: Backend) -> Tensor:
    parts = (plan.order, plan.segment_ids, plan.segment_offsets, plan.count, plan.num_rows)
    if 0 in (*rows.shape, plan.num_rows):
        return rows.new_zeros((plan.num_rows, rows.shape[1]))
    if backend == "extension":
        out: Tensor = torch.ops.embedkernels_ext.embedding_grad_dense(rows.contiguous(), *parts)
        return out
    if backend == "triton":
        from embedkernels.kernels.embedding_grad import embedding_grad_dense

        with torch.cuda.device_of(rows):
            return embedding_grad_dense(rows, *parts)
    return reference.embedding_grad_dense(rows, *parts)


def _aten_cpu(rows: Tensor, ids: Tensor, num_rows: int, padding: int) -> Tensor:
    """PyTorch's CPU kernel: each thread owns rows of the table and walks the ids in order, so it is deterministic.

    It adds in the dtype of ``rows``, hence the fp32 copy of 16-bit gradients.
    """
    out_of_range = (ids < 0) | (ids >= num_rows)
    ids = ids.masked_fill(out_of_range, padding)  # the kernel skips padding, -1 included
    wide = rows if rows.dtype == torch.float64 else rows.float()
    return torch.ops.aten.embedding_dense_backward(wide, ids, num_rows, padding, False).to(rows.dtype)


_library = torch.library.Library("embedkernels", "FRAGMENT")
_library.define(
    "embedding_backward(Tensor grad_rows, Tensor ids, SymInt num_rows, int padding_idx, str backend='auto') -> Tensor"
)
_library.define(
    "embedding_grad(Tensor grad_rows, Tensor order, Tensor segment_ids, Tensor segment_offsets, Tensor count, "
    "SymInt num_rows, str backend='auto') -> Tensor"
)


def _backward_impl(grad_rows: Tensor, ids: Tensor, num_rows: int, padding_idx: int, backend: str = "auto") -> Tensor:
    op = "embedding_backward"
    check_ids_tensor(ids, op)
    n = ids.numel()
    _check_grad_rows(grad_rows, n, ids.device, op)
    if not 0 <= num_rows < _LIMIT:
        raise ValueError(f"{op}: num_rows must be 0 to {_LIMIT - 1}, got {num_rows}")
    chosen = choose("embedding_grad", grad_rows.device, backend).backend
    width = grad_rows.shape[-1]
    rows = grad_rows.reshape(n, width)
    if 0 in (n, width, num_rows):
        return grad_rows.new_zeros((num_rows, width))
    if chosen == "torch" and rows.device.type == "cpu":
        return _aten_cpu(rows, ids.reshape(-1), num_rows, padding_idx)
    return _dense(rows, _plan(ids, num_rows, padding_idx, 0, chosen), chosen)


_library.impl("embedding_backward", _backward_impl, "CompositeExplicitAutograd")


@torch.library.register_fake("embedkernels::embedding_backward", lib=_library)
def _backward_fake(grad_rows: Tensor, ids: Tensor, num_rows: int, padding_idx: int, backend: str = "auto") -> Tensor:
    return grad_rows.new_empty((num_rows, grad_rows.shape[-1]))


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    grad_rows, ids, ctx.num_rows, ctx.padding_idx, ctx.backend = inputs
    ctx.shape = grad_rows.shape
    ctx.save_for_backward(ids)


def _double_backward(ctx, grad):  # type: ignore[no-untyped-def]
    """The op is linear in grad_rows: its adjoint looks the rows up again, zero where an id was dropped."""
    (ids,) = ctx.saved_tensors
    dropped = (ids < 0) | (ids >= ctx.num_rows) | (ids == ctx.padding_idx)
    return _rows_or_zeros(grad, ids, dropped).reshape(ctx.shape), None, None, None, None


def _rows_or_zeros(table: Tensor, ids: Tensor, dropped: Tensor) -> Tensor:
    if table.shape[0] == 0:  # then every id is dropped, and there is no row to look up in their place
        return table.new_zeros((*ids.shape, table.shape[1]))
    return F.embedding(ids.masked_fill(dropped, 0), table).masked_fill(dropped[..., None], 0)


torch.library.register_autograd(
    "embedkernels::embedding_backward", _double_backward, setup_context=_setup_context, lib=_library
)


def _grad_impl(
    grad_rows: Tensor, order: Tensor, segment_ids: Tensor, segment_offsets: Tensor, count: Tensor, num_rows: int,
    backend: str = "auto",
) -> Tensor:  # fmt: skip
    op = "embedding_grad"
    n = order.numel()
    _check_grad_rows(grad_rows, n, order.device, op)
    id_errors.raise_pending(grad_rows.device)
    chosen = choose("embedding_grad", grad_rows.device, backend).backend
    plan = EmbeddingPlan(order, segment_ids, segment_offsets, count, num_rows)
    return _dense(grad_rows.reshape(n, grad_rows.shape[-1]), plan, chosen)


_library.impl("embedding_grad", _grad_impl, "CompositeExplicitAutograd")


@torch.library.register_fake("embedkernels::embedding_grad", lib=_library)
def _grad_fake(
    grad_rows: Tensor, order: Tensor, segment_ids: Tensor, segment_offsets: Tensor, count: Tensor, num_rows: int,
    backend: str = "auto",
) -> Tensor:  # fmt: skip
    return grad_rows.new_empty((num_rows, grad_rows.shape[-1]))


def _grad_setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    grad_rows, *plan, _, _ = inputs
    ctx.shape = grad_rows.shape
    ctx.save_for_backward(*plan)


def _grad_backward(ctx, grad):  # type: ignore[no-untyped-def]
    ids = reference.planned_rows(*ctx.saved_tensors)
    return _rows_or_zeros(grad, ids, ids < 0).reshape(ctx.shape), None, None, None, None, None, None


torch.library.register_autograd(
    "embedkernels::embedding_grad", _grad_backward, setup_context=_grad_setup_context, lib=_library
)

"""Input embeddings as one op: token, token type and position rows added, normalised and dropped out in one pass."""

# ruff: noqa: ARG001 (every function of an op takes the arguments of its schema)

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from embedkernels.ops import ids as id_errors
from embedkernels.ops.backend import Backend, choose
from embedkernels.ops.embedding import embedding
from embedkernels.ops.embedding_grad import check_ids_tensor, normalized_padding
from embedkernels.reference import embed as reference

_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_SEED_LIMIT = 2**62


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
    has no derivative). There one kernel writes y, and the backward pass gathers the rows and draws the dropout mask
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
        TypeError: ids that are not int32 or int64, tables that are not floating point or differ in dtype.
        ValueError: shapes, devices or settings that do not fit.

    Example:
        >>> import torch, embedkernels as ek
        >>> words, positions = torch.randn(100, 8), torch.randn(16, 8)
        >>> ids = torch.randint(0, 100, (2, 5))
        >>> ek.embed(ids, words, position_weight=positions, norm="layer").shape
        torch.Size([2, 5, 8])
    """
    _check(
        ids, weight, position_weight, position_ids, position_start, type_weight, type_ids, norm, norm_weight,
        norm_bias, norm_eps, dropout_p,
    )  # fmt: skip
    padding = normalized_padding(padding_idx, weight.shape[0], "embed")
    position_padding = -1
    if position_weight is not None:
        position_padding = normalized_padding(position_padding_idx, position_weight.shape[0], "embed")
    in_kernels = weight.dtype in _KERNEL_DTYPES
    if backend == "triton" and not in_kernels:
        raise TypeError(f"embed: backend 'triton' takes float32, bfloat16 or float16 tables, got {weight.dtype}")
    chosen = choose("embed", weight.device, backend).backend
    if not in_kernels:
        chosen = "torch"
    if chosen == "torch":
        return _composed(
            backend, ids, weight, position_weight=position_weight, position_ids=position_ids,
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
        _output_dtype(weight, norm), padding, position_padding,
    )[0]  # fmt: skip
    return out


def _composed(backend: Backend | None, ids: Tensor, weight: Tensor, **options: Any) -> Tensor:
    """The torch backend. The lookup raises IndexError by itself: only then is it found out which table it was."""
    lookup = functools.partial(embedding, backend=backend)
    if torch.compiler.is_compiling() or ids.device.type != "cpu":
        return reference.embed(ids, weight, lookup=lookup, **options)
    try:
        return reference.embed(ids, weight, lookup=lookup, **options)
    except IndexError:
        id_errors.check_ids(ids, weight.shape[0], "token")
        for name, table in (("type", "token type"), ("position", "position")):
            if options[f"{name}_weight"] is not None and options[f"{name}_ids"] is not None:
                broadcast = options[f"{name}_ids"].expand(ids.shape)
                id_errors.check_ids(broadcast, options[f"{name}_weight"].shape[0], table)
        raise


def _output_dtype(weight: Tensor, norm: str | None) -> torch.dtype:
    """CUDA autocast runs LayerNorm in fp32 and leaves its output there; CPU autocast leaves LayerNorm alone."""
    if norm is not None and weight.device.type == "cuda" and torch.is_autocast_enabled("cuda"):
        return torch.float32
    return weight.dtype


def _length(ids: Tensor) -> int:
    return ids.shape[-1] if ids.dim() else 1


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


def _check(
    ids: Tensor, weight: Tensor, position_weight: Tensor | None, position_ids: Tensor | None, position_start: int,
    type_weight: Tensor | None, type_ids: Tensor | None, norm: str | None, norm_weight: Tensor | None,
    norm_bias: Tensor | None, norm_eps: float, dropout_p: float,
) -> None:  # fmt: skip
    check_ids_tensor(ids, "embed")
    if not isinstance(weight, Tensor):
        raise TypeError(f"embed: weight must be a Tensor, got {type(weight).__name__}")
    if weight.dim() != 2 or weight.shape[1] == 0:
        raise ValueError(f"embed: weight must be 2-D (V, D) with D >= 1, got shape {tuple(weight.shape)}")
    if not weight.is_floating_point():
        raise TypeError(f"embed: weight must be floating point, got {weight.dtype}")
    _check_device("ids", ids, weight)
    _check_table("position_weight", position_weight, weight)
    _check_table("type_weight", type_weight, weight)
    _check_more_ids("position_ids", position_ids, ids, "position_weight", position_weight)
    _check_more_ids("type_ids", type_ids, ids, "type_weight", type_weight)
    _check_positions(ids, position_weight, position_ids, position_start)
    if norm not in (None, "layer"):
        raise ValueError(f"embed: norm must be None or 'layer', got {norm!r}")
    for name, parameter in (("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        if parameter is None:
            continue
        if norm is None:
            raise ValueError(f"embed: {name} is given, but norm is None")
        if tuple(parameter.shape) != (weight.shape[1],):
            raise ValueError(f"embed: {name} must be (D,) = ({weight.shape[1]},), got {tuple(parameter.shape)}")
        if parameter.dtype not in (weight.dtype, torch.float32):
            raise TypeError(f"embed: {name} must be {weight.dtype} like weight, or float32, got {parameter.dtype}")
        _check_device(name, parameter, weight)
    if norm_weight is not None and norm_bias is not None and norm_weight.dtype != norm_bias.dtype:
        raise TypeError(
            f"embed: norm_weight is {norm_weight.dtype}, norm_bias is {norm_bias.dtype}: expected one dtype"
        )
    if norm_eps < 0.0:
        raise ValueError(f"embed: norm_eps must not be negative, got {norm_eps}")
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"embed: dropout_p must be in [0, 1], got {dropout_p}")


def _check_device(name: str, tensor: Tensor, weight: Tensor) -> None:
    if tensor.device != weight.device:
        raise ValueError(f"embed: {name} is on {tensor.device}, weight is on {weight.device}")


def _check_table(name: str, table: Tensor | None, weight: Tensor) -> None:
    if table is None:
        return
    if table.dim() != 2 or table.shape[1] != weight.shape[1]:
        raise ValueError(
            f"embed: {name} must be 2-D (rows, D) with D = {weight.shape[1]} as in weight, "
            f"got shape {tuple(table.shape)}"
        )
    if table.dtype != weight.dtype:
        raise TypeError(f"embed: {name} must be {weight.dtype} like weight, got {table.dtype}")
    _check_device(name, table, weight)


def _check_more_ids(name: str, given: Tensor | None, ids: Tensor, table_name: str, table: Tensor | None) -> None:
    if given is None:
        return
    if table is None:
        raise ValueError(f"embed: {name} is given, but {table_name} is None")
    if given.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"embed: {name} must be int32 or int64, got {given.dtype}")
    pairs = zip(reversed(given.shape), reversed(ids.shape), strict=False)
    if given.dim() > ids.dim() or not all(size in (1, wanted) for size, wanted in pairs):
        raise ValueError(
            f"embed: {name} must broadcast to the shape of ids, {tuple(ids.shape)}, got shape {tuple(given.shape)}"
        )
    _check_device(name, given, ids)


def _check_positions(ids: Tensor, table: Tensor | None, position_ids: Tensor | None, start: int) -> None:
    if start < 0:
        raise ValueError(f"embed: position_start must not be negative, got {start}")
    if position_ids is not None and start != 0:
        raise ValueError(f"embed: position_start must be 0 where position_ids is given, got {start}")
    if table is None or position_ids is not None:
        return
    length = _length(ids)
    if start + length > table.shape[0]:
        raise IndexError(
            f"embed: {length} positions from position_start {start} reach position {start + length - 1}, "
            f"but position_weight has {table.shape[0]} rows: expected a sequence of at most "
            f"{max(0, table.shape[0] - start)}"
        )


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


def _inputs(
    ids: Tensor, weight: Tensor, position_weight: Tensor | None, position_ids: Tensor | None, position_start: int,
    type_weight: Tensor | None, type_ids: Tensor | None,
) -> Any:  # fmt: skip
    """What the kernels gather from. Guards what addresses rest on: the ops can be called without ``embed``."""
    from embedkernels.kernels.embed import MOST_ROWS, Inputs

    n, length = ids.numel(), _length(ids)
    if n > MOST_ROWS:
        raise ValueError(f"embed: ids has {n} elements, at most {MOST_ROWS} are supported")
    for table in (position_weight, type_weight):
        if table is not None and (table.shape[1:] != weight.shape[1:] or table.dtype != weight.dtype):
            raise ValueError("embedkernels::embed: tables differ in their number of columns or in dtype")
    for given in (position_ids, type_ids):
        if given is not None and given.numel() not in (n, length):
            raise ValueError(f"embedkernels::embed: expected {n} or {length} ids, got {given.numel()}")

    def contiguous(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.contiguous()

    return Inputs(
        ids.contiguous(), weight.contiguous(), contiguous(position_weight), contiguous(position_ids), position_start,
        length, contiguous(type_weight), contiguous(type_ids),
    )  # fmt: skip


def _forward_impl(
    ids: Tensor, weight: Tensor, position_weight: Tensor | None, position_ids: Tensor | None, position_start: int,
    type_weight: Tensor | None, type_ids: Tensor | None, norm: bool, norm_weight: Tensor | None,
    norm_bias: Tensor | None, norm_eps: float, dropout_p: float, seed: Tensor | None, dtype: torch.dtype,
    padding_idx: int, position_padding_idx: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    device = weight.device
    id_errors.raise_pending(device)
    choose("embed", device, "triton")
    if device.type == "cpu":
        id_errors.check_ids(ids, weight.shape[0], "token")
        if type_weight is not None and type_ids is not None:
            id_errors.check_ids(type_ids, type_weight.shape[0], "token type")
        if position_weight is not None and position_ids is not None:
            id_errors.check_ids(position_ids, position_weight.shape[0], "position")
    out = weight.new_empty((*ids.shape, weight.shape[1]), dtype=dtype)
    if ids.numel() == 0:
        return out, weight.new_empty(0, dtype=torch.float32), weight.new_empty(0, dtype=torch.float32)
    from embedkernels.kernels import embed as kernels

    inputs = _inputs(ids, weight, position_weight, position_ids, position_start, type_weight, type_ids)
    errors = id_errors.error_state(device)
    with torch.cuda.device_of(weight):
        mean, rstd = kernels.embed_forward(
            inputs, out, norm, norm_weight, norm_bias, norm_eps, dropout_p, seed, (errors.flag, errors.record)
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
    if ids.numel() == 0:
        norm_grads = (
            torch.zeros_like(p) if need_norm and p is not None else weight.new_empty(0)
            for p in (norm_weight, norm_bias)
        )
        return (weight.new_empty((0, weight.shape[1])), *norm_grads)  # type: ignore[return-value]
    from embedkernels.kernels import embed as kernels

    inputs = _inputs(ids, weight, position_weight, position_ids, position_start, type_weight, type_ids)
    grad = grad.contiguous()
    with torch.cuda.device_of(weight):
        return kernels.embed_backward(
            inputs, grad, norm, norm_weight, norm_bias, mean, rstd, dropout_p, seed, need_rows, need_norm
        )


def _backward_fake(
    grad: Tensor, ids: Tensor, weight: Tensor, position_weight: Tensor | None, position_ids: Tensor | None,
    position_start: int, type_weight: Tensor | None, type_ids: Tensor | None, norm: bool,
    norm_weight: Tensor | None, norm_bias: Tensor | None, mean: Tensor, rstd: Tensor, dropout_p: float,
    seed: Tensor | None, need_rows: bool, need_norm: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    rows = weight.new_empty((ids.numel() if need_rows else 0, weight.shape[1]))
    weight_grad, bias_grad = (
        torch.empty_like(p) if need_norm and p is not None else weight.new_empty(0) for p in (norm_weight, norm_bias)
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
    n, length = ids.numel(), _length(ids)
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

"""Input embeddings as one op: token, token type and position rows added, normalised and dropped out in one pass."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from embedkernels.ops import embed_autograd as autograd
from embedkernels.ops import embed_library as _library  # noqa: F401  (defines torch.ops.embedkernels.embed_forward)
from embedkernels.ops import ids as id_errors
from embedkernels.ops.backend import Backend, check_stock_autograd, choose, needs_stock_autograd
from embedkernels.ops.eager import is_eager, signature
from embedkernels.ops.embed_checks import check_call, position_rows
from embedkernels.ops.embed_launch import Indices, Kind, Parts, Settings, at_places
from embedkernels.ops.embedding import lookup, stock_lookup
from embedkernels.ops.embedding_plan import normalized_padding
from embedkernels.reference import embed as reference
from embedkernels.reference.sinusoids import MOST_POSITIONS

_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_SEED_LIMIT = 2**62
_TABLES = ("token", "token type", "position")


def embed(
    ids: Tensor | None,
    weight: Tensor | None = None,
    *,
    inputs_embeds: Tensor | None = None,
    scale: float = 1.0,
    position_weight: Tensor | None = None,
    sinusoids: str | None = None,
    position_ids: Tensor | None = None,
    position_start: int = 0,
    type_weight: Tensor | None = None,
    type_ids: Tensor | None = None,
    extra: Tensor | None = None,
    position_first: bool = False,
    norm: str | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-12,
    dropout_p: float = 0.0,
    dropout_first: bool = False,
    mask: Tensor | None = None,
    packed: Tensor | None = None,
    padding_idx: int | None = None,
    position_padding_idx: int | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """Input embeddings of a transformer: y = drop(norm(scale·W[ids] + T[type_ids] + P[position_ids] + extra)) · mask.

    Differentiable in the three tables, ``inputs_embeds``, ``extra`` and the norm's weight and bias; on the Triton
    backend once (its gradient has no derivative). What needs no gradient costs no backward. Forward-mode derivatives
    and the transforms of ``torch.func`` run on PyTorch's own ops. On the Triton backend one kernel writes y, and the
    backward pass gathers the rows and draws the dropout mask again instead of reading saved activations: the tables
    must not change between forward and backward (PyTorch raises if they do). Arithmetic is in fp32, results are
    bitwise reproducible.

    Args:
        ids: int32 or int64, (..., S), token ids in [0, V); None with ``inputs_embeds``.
        weight: W, (V, D), floating point; None with ``inputs_embeds``.
        inputs_embeds: (..., S, D), rows in the place of W[ids].
        scale: factor of the token rows alone (BART, Gemma), a number of a magnitude between 2**-100 and 2**100.
        position_weight: P, (rows, D), or None for no positions.
        sinusoids: fixed positions in the place of P, computed where they are added: ``"interleaved"`` (Vaswani et
            al., 2017), ``"halves"`` (Marian, Pegasus) or ``"fairseq"`` (M2M100, XGLM), see
            :mod:`embedkernels.reference.sinusoids`. Positions are below 2**24; rows are exact to 1.2e-7 below 4096
            and to 6e-7 beyond.
        position_ids: int32 or int64, broadcastable to (..., S); None for position_start + s at the s-th place of the
            last axis.
        position_start: first position where ``position_ids`` is None: past tokens in a cache, and a table's offset.
        type_weight: T, (rows, D), or None for no token types.
        type_ids: int32 or int64, broadcastable to (..., S); None for type 0 everywhere.
        extra: broadcastable to (..., S, D) with D elements in its last axis, added last. Stored for every row, and
            for the backward of a norm, unless all sequences share it.
        position_first: add the position before the type. The Triton backend adds in fp32, where the order is hardly
            seen, and in one order; the torch backend rounds every sum, as Hugging Face's modules do.
        norm: ``"layer"`` for LayerNorm over D (Ba, Kiros, Hinton, 2016), ``"rms"`` for RMSNorm (Zhang, Sennrich,
            2019), None for none.
        norm_weight, norm_bias: (D,), of the tables' dtype or fp32; None leaves that part out.
        norm_eps: added to the variance, or to the mean square.
        dropout_p: probability of dropping an element, applied whenever it is positive (pass 0 in evaluation); kept
            elements are scaled by 1 / (1 - dropout_p). Reproducible with ``torch.manual_seed``.
        dropout_first: drop before the norm instead of after it.
        mask: broadcastable to (..., S), bool or a number: the factor of every row, 0 for padding. Gets no gradient.
        packed: int32 or int64 (M,), places among the flattened ids, in [0, N): only their rows are made, one after
            the other, each with the position it has in its own sequence. For padding-free training the places of the
            real tokens, ``attention_mask.flatten().nonzero()[:, 0]``, which waits for the device: once per batch.
        padding_idx: row of W that gets no gradient. Negative values count from the end.
        position_padding_idx: row of P that gets no gradient; with sinusoids the position whose row is zeros.
        backend: ``"triton"``, ``"torch"`` or None for the best there is.

    Returns:
        (..., S, D), or (M, D) with ``packed``; contiguous, in the dtype of ``weight``,
        under CUDA autocast fp32 with a
        LayerNorm, like its own.

    Raises:
        IndexError: an id out of its table's range (on a GPU by the next call of an op or by
            :func:`embedkernels.check_errors`; until then such an id adds zeros), or a sequence that is longer than
            the position table.
        TypeError: ids that are not int32 or int64, tables that are not floating point or differ in dtype, an
            argument of another type than it has here.
        ValueError: shapes, devices or settings that do not fit, a mask that needs a gradient.
        NotImplementedError: ``backend="triton"`` with a forward-mode tangent or within a transform of ``torch.func``.

    Example:
        >>> import torch, embedkernels as ek
        >>> words, positions = torch.randn(100, 8), torch.randn(16, 8)
        >>> ids = torch.randint(0, 100, (2, 5))
        >>> ek.embed(ids, words, position_weight=positions, norm="layer").shape
        torch.Size([2, 5, 8])
    """
    rows = weight if inputs_embeds is None else inputs_embeds
    key = kind = None
    if extra is None and mask is None:
        key = _key(
            (ids, weight, inputs_embeds, position_weight, position_ids, type_weight, type_ids, norm_weight, norm_bias,
             packed),
            (scale, sinusoids, position_start, norm, norm_eps, dropout_p, dropout_first, padding_idx,
             position_padding_idx, backend),
        )  # fmt: skip
        kind = None if key is None else _kinds.get(key)
    if kind is not None:
        assert rows is not None
        device = rows.device
        id_errors.begin(device)
        if choose("embed", device, backend).backend == "triton":
            indices = Indices(ids, position_ids, type_ids, None, packed, _drawn_seed(kind.settings.dropout_p, device))
            parts = Parts(rows, position_weight, type_weight, None, norm_weight, norm_bias)
            return autograd.embed(kind, indices, parts)
    numbers = check_call(
        ids, weight, inputs_embeds, scale, position_weight, sinusoids, position_padding_idx, position_ids,
        position_start, type_weight, type_ids, extra, norm, norm_weight, norm_bias, norm_eps, dropout_p, mask, packed,
    )  # fmt: skip
    assert rows is not None
    shape = rows.shape[:-1] if ids is None else ids.shape
    scale, position_start, norm_eps, dropout_p = numbers
    padding = -1 if weight is None else normalized_padding(padding_idx, weight.shape[0], "embed")
    position_padding = -1
    if sinusoids is not None and position_padding_idx is not None:
        position_padding = position_padding_idx
    elif position_weight is not None:
        position_padding = normalized_padding(
            position_padding_idx, position_weight.shape[0], "embed", "position_padding_idx"
        )
    in_kernels = rows.dtype in _KERNEL_DTYPES
    if backend == "triton" and not in_kernels:
        raise TypeError(f"embed: backend 'triton' takes float32, bfloat16 or float16 tables, got {rows.dtype}")
    eager = key is not None or is_eager(
        ids, rows, position_weight, position_ids, type_weight, type_ids, extra, norm_weight, norm_bias, mask, packed
    )
    id_errors.begin(rows.device)
    chosen = choose("embed", rows.device, backend).backend if in_kernels else "torch"
    stock = not eager and needs_stock_autograd(
        rows, position_weight, type_weight, extra, norm_weight, norm_bias, mask
    )
    if stock:
        check_stock_autograd("embed", rows.device, backend)
        chosen = "torch"
    if chosen == "torch":
        if sinusoids is not None and position_ids is not None and packed is None:
            position_ids = _checked(position_ids, MOST_POSITIONS, "position")
        if packed is not None:
            packed = _checked(packed, math.prod(shape), "packed")
            for given, count, name in (
                (ids, 0 if weight is None else weight.shape[0], "token"),
                (type_ids, 0 if type_weight is None else type_weight.shape[0], "token type"),
                (position_ids, position_rows(position_weight, sinusoids) or 0, "position"),
            ):
                if given is not None:
                    _checked(at_places(given.expand(shape), packed, math.prod(shape)), count, name)
        return _composed(
            stock_lookup if stock else functools.partial(lookup, backend=backend), ids, weight,
            inputs_embeds=inputs_embeds, scale=scale, position_weight=position_weight, sinusoids=sinusoids,
            position_ids=position_ids, position_start=position_start, type_weight=type_weight, type_ids=type_ids,
            extra=extra, position_first=position_first, norm=norm, norm_weight=norm_weight, norm_bias=norm_bias,
            norm_eps=norm_eps, dropout_p=dropout_p, dropout_first=dropout_first, mask=mask, packed=packed,
            padding_idx=padding if padding >= 0 else None,
            position_padding_idx=position_padding if position_padding >= 0 else None,
        )  # fmt: skip
    if sinusoids is not None:
        _prepare_sinusoids(rows.shape[-1], sinusoids, rows.device)
    seed = _drawn_seed(dropout_p, rows.device)
    if extra is not None:
        extra = _flat(extra, (*shape, rows.shape[-1]), 1)
    settings = Settings(
        scale, sinusoids or "none", position_padding, position_start, norm or "none", norm_eps, dropout_p,
        dropout_first and norm is not None,
        reference.norm_dtype(rows.device, rows.dtype) if norm == "layer" else rows.dtype, padding,
    )  # fmt: skip
    indices = Indices(ids, _flat(position_ids, shape), _flat(type_ids, shape), _flat(mask, shape), packed, seed)
    parts = Parts(rows, position_weight, type_weight, extra, norm_weight, norm_bias)
    if eager:
        as_given = indices.position_ids is position_ids and indices.type_ids is type_ids
        kind = Kind(settings, parts, contiguous=key is not None and as_given)
        if kind.contiguous:
            if len(_kinds) >= _MOST_KINDS:
                _kinds.clear()
            _kinds[key] = kind
        return autograd.embed(kind, indices, parts)
    out: Tensor = torch.ops.embedkernels.embed_forward(
        None if ids is None else ids.contiguous(), rows, scale, position_weight, settings.sinusoids, position_padding,
        indices.position_ids, position_start, type_weight, indices.type_ids, extra, indices.mask, packed,
        settings.norm, norm_weight, norm_bias, norm_eps, dropout_p, settings.dropout_first, seed, settings.dtype,
        padding,
    )[0]  # fmt: skip
    return out


# Calls that have passed the checks, by all that these look at: calls of one kind are not checked again.
_kinds: dict[Any, Kind] = {}
_MOST_KINDS = 1024


def _key(tensors: tuple[Tensor | None, ...], options: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """What tells kinds of calls apart in eager mode, None where a call is to be checked."""
    shapes = signature(*tensors)
    if shapes is None or not _OPTION_TYPES.issuperset(types := tuple(map(type, options))):
        return None
    # Types count, for 1 == 1.0 and no one's number of a row may be 1.0; autocast has a say in the dtype of a norm.
    return shapes, types, options, torch.is_autocast_enabled("cuda")


_OPTION_TYPES = frozenset((int, float, bool, str, type(None)))


def _drawn_seed(dropout_p: float, device: torch.device) -> Tensor | None:
    if dropout_p > 0.0:
        return torch.randint(0, _SEED_LIMIT, (1,), dtype=torch.int64, device=device)
    return None


@torch.compiler.assume_constant_result
def _prepare_sinusoids(width: int, layout: str, device: torch.device) -> None:
    """Have the frequencies on a GPU before anything runs: they must not come from memory that a CUDA graph owns."""
    if device.type == "cuda" and id_errors.is_there(device):
        from embedkernels.kernels.sinusoids import constants

        with id_errors.plain_tensors():
            constants(width, layout, device)


def _composed(rows: Callable[..., Tensor], ids: Tensor | None, weight: Tensor | None, **options: Any) -> Tensor:
    """The torch backend: ``rows`` looks up in one table after the other, and names it in its errors."""
    token, kind, position = (functools.partial(rows, table=table, op="embed") for table in _TABLES)
    return reference.embed(ids, weight, lookup=token, type_lookup=kind, position_lookup=position, **options)


def _checked(ids: Tensor, rows: int, table: str) -> Tensor:
    """``ids``, checked: by an op where torch.compile traces, whose graph would not wait for their values."""
    if torch.compiler.is_compiling():
        checked: Tensor = torch.ops.embedkernels.checked_ids(ids, rows, table, "embed")
        return checked
    id_errors.check_ids(ids, rows, table, "embed")
    return ids


def _as_wanted(given: Tensor, shape: Sequence[int], features: int) -> bool:
    """The usual cases: ids for all tokens, or for one sequence that stands for all."""
    if features > 0 or given.dim() == 0 or not given.is_contiguous() or given.shape[-1] != shape[-1]:
        return False
    return given.shape == shape or given.numel() == shape[-1]


def _flat(given: Tensor | None, shape: Sequence[int], features: int = 0) -> Tensor | None:
    """Broadcast to ``shape``, contiguous, the last ``features`` axes kept: what all sequences share is there once.

    Of the axes before, the last is the sequence: S rows if every sequence has the same, else all N of them.
    """
    if given is None:
        return None
    if not torch.compiler.is_compiling() and _as_wanted(given, shape, features):
        return given
    given = given.expand(shape)
    leading = range(given.dim() - 1 - features)
    if given.numel() > 0 and all(given.shape[axis] == 1 or given.stride(axis) == 0 for axis in leading):
        for _ in leading:
            given = given[0]
    return given.reshape(-1, *given.shape[given.dim() - features :]).contiguous()

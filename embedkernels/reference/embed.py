"""Input embeddings in plain PyTorch: the specification of ``embed``, and its torch backend."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from embedkernels.reference.positions import count_positions
from embedkernels.reference.random import keep_scale, row_keep_mask
from embedkernels.reference.sinusoids import sinusoids as fixed_rows


class Lookup(Protocol):
    """``lookup(ids, weight, padding_idx=...)`` gives weight[ids], with no gradient for the row ``padding_idx``."""

    def __call__(self, input: Tensor, weight: Tensor, /, *, padding_idx: int | None = None) -> Tensor: ...


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
    lookup: Lookup = F.embedding,
    type_lookup: Lookup | None = None,
    position_lookup: Lookup | None = None,
    seed: Tensor | int | None = None,
) -> Tensor:
    """y = dropout(norm(scale·W[ids] + T[type_ids] + P[position_ids] + extra)) · mask, op by op as Hugging Face does.

    The arguments are those of :func:`embedkernels.embed`, and these:

    Args:
        lookup: how rows are taken from a table.
        type_lookup, position_lookup: the same for one table; None is ``lookup``.
        seed: the dropout mask is that of ``reference.random.row_keep_mask``; None draws it with ``F.dropout``.

    Returns:
        (..., S, D), or (M, D) where ``packed`` has M places.
    """
    if packed is not None:
        shape = ids.shape if ids is not None else inputs_embeds.shape[:-1]  # type: ignore[union-attr]
        length = shape[-1] if shape else 1
        if position_ids is None and (position_weight is not None or sinusoids is not None):
            position_ids = torch.arange(position_start, position_start + length, device=packed.device)
            position_ids = position_ids.reshape(shape[-1:])
        # Everything at the packed places, as one sequence.
        ids, position_ids, type_ids = (
            None if x is None else x.expand(shape).reshape(-1)[packed] for x in (ids, position_ids, type_ids)
        )
        inputs_embeds, extra = (
            None if x is None else x.expand(*shape, x.shape[-1]).reshape(-1, x.shape[-1])[packed]
            for x in (inputs_embeds, extra)
        )
    if inputs_embeds is not None:
        y = inputs_embeds
    else:
        assert ids is not None
        assert weight is not None
        y = lookup(ids, weight, padding_idx=padding_idx)
    shape = y.shape[:-1]
    if scale != 1.0:
        y = y * scale

    def types(y: Tensor) -> Tensor:
        if type_weight is None:
            return y
        at = torch.zeros((1,) * len(shape), dtype=torch.int64, device=y.device) if type_ids is None else type_ids
        return y + (type_lookup or lookup)(at, type_weight)

    def positions(y: Tensor) -> Tensor:
        if position_weight is None and sinusoids is None:
            return y
        at = position_ids
        if at is None:
            length = shape[-1] if shape else 1
            at = torch.arange(position_start, position_start + length, device=y.device).reshape(shape[-1:])
        if position_weight is not None:
            return y + (position_lookup or lookup)(at, position_weight, padding_idx=position_padding_idx)
        assert sinusoids is not None
        rows = fixed_rows(at, y.shape[-1], sinusoids, position_padding_idx)
        # Models keep float32 tables, which are cast with them.
        return y + (rows if y.dtype == torch.float64 else rows.float().to(y.dtype))

    y = types(positions(y)) if position_first else positions(types(y))
    if extra is not None:
        y = y + extra

    def dropout(y: Tensor) -> Tensor:
        if dropout_p == 0.0:
            return y
        return F.dropout(y, dropout_p) if seed is None else _seeded_dropout(y, dropout_p, seed)

    if dropout_first:
        y = dropout(y)
    if norm == "layer":
        y = _layer_norm(y, norm_weight, norm_bias, norm_eps)
    elif norm == "rms":
        y = _rms_norm(y, norm_weight, norm_bias, norm_eps)
    if not dropout_first:
        y = dropout(y)
    return y if mask is None else y * mask.unsqueeze(-1).to(y.dtype)


def _layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    shape = x.shape[-1:]
    parameter = weight if weight is not None else bias
    if parameter is None or parameter.dtype == x.dtype:
        return F.layer_norm(x, shape, weight, bias, eps)
    # fp32 parameters over 16-bit tables: not every device takes the mixture.
    return F.layer_norm(x.to(parameter.dtype), shape, weight, bias, eps).to(norm_dtype(x.device, x.dtype))


def _rms_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    y = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)
    if weight is not None:
        y = weight * y
    if bias is not None:
        y = y + bias
    return y.to(x.dtype)


def norm_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """Dtype of a LayerNorm's output: CUDA autocast leaves it in fp32, CPU autocast leaves LayerNorm alone."""
    if device.type == "cuda" and torch.is_autocast_enabled("cuda"):
        return torch.float32
    return dtype


def _seeded_dropout(x: Tensor, p: float, seed: Tensor | int) -> Tensor:
    width = x.shape[-1]
    keep = row_keep_mask(seed, x.numel() // max(width, 1), width, p, x.device).reshape(x.shape)
    return torch.where(keep, x * keep_scale(p), torch.zeros((), dtype=x.dtype, device=x.device))


def positions_from_padding(ids: Tensor, padding_idx: int, past_length: int = 0) -> Tensor:
    """RoBERTa's position ids: the count of non-padding ids so far, plus ``padding_idx``; padding keeps padding_idx.

    p[..., s] = padding_idx + (past_length + #{t <= s : ids[..., t] != padding_idx}) where ids[..., s] is not padding.
    Equal to Hugging Face's ``RobertaEmbeddings.create_position_ids_from_input_ids``. Does not wait for the device.

    Args:
        ids: int32 or int64, (..., S).
        padding_idx: the id of the padding token.
        past_length: number of tokens before these, for decoding with a cache.

    Returns:
        int64, the shape of ``ids``.

    Example:
        >>> import torch
        >>> positions_from_padding(torch.tensor([[5, 7, 9, 1, 1]]), padding_idx=1)
        tensor([[2, 3, 4, 1, 1]])
    """
    return count_positions(ids, padding_idx, padding_idx + past_length, padding_idx)

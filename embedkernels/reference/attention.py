"""Attention in plain PyTorch: the specification, the torch backend, and the mask of its dropout.

out = dropout(softmax(scale · q kᵀ, over the visible keys)) v, and zeros for a query that sees no key.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from embedkernels.reference.random import keep_from_bits, keep_scale, philox

Window = tuple[int | None, int | None]


def visible_keys(
    num_queries: int,
    num_keys: int,
    device: torch.device,
    *,
    is_causal: bool = False,
    query_offset: int = 0,
    window: Window | None = None,
    key_mask: Tensor | None = None,
    key_lengths: Tensor | None = None,
    key_starts: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
) -> Tensor | None:
    """Which keys a query sees, as a mask for ``scaled_dot_product_attention``; None if that is all of them.

    Nothing here waits for the device, so a mask that hides nothing is None only where the sizes alone say so.

    Args:
        num_queries, num_keys: Sq and Sk.
        is_causal, query_offset: with is_causal, query i sees the keys up to i + query_offset.
        window: (left, right): query i sees the keys from i + query_offset - left to i + query_offset + right; None
            for no end on that side.
        key_mask: bool (B, Sk), True for keys that count.
        key_lengths, key_starts: (B,) integers: the keys in [start, start + length) count.
        cu_seqlens_q, cu_seqlens_k: (N + 1,) integers: where documents start, and the last one's end; see
            :func:`document_ranges`.

    Returns:
        bool, broadcastable to (B, H, Sq, Sk), or None.
    """
    visible: Tensor | None = None
    keys = torch.arange(num_keys, device=device)
    if key_mask is not None:
        visible = key_mask[:, None, None, :]
    if key_starts is not None or key_lengths is not None:
        given = key_starts if key_starts is not None else key_lengths
        start = given.new_zeros(given.shape) if key_starts is None else key_starts  # type: ignore[union-attr]
        inside = keys >= start.long()[:, None]
        if key_lengths is not None:
            inside = inside & (keys < (start.long() + key_lengths.long())[:, None])
        inside = inside[:, None, None, :]
        visible = inside if visible is None else visible & inside
    if cu_seqlens_q is not None:
        cu_seqlens_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
        left, right = (None, None) if window is None else window
        ranges = document_ranges(cu_seqlens_q, cu_seqlens_k, num_queries, num_keys, left, 0 if is_causal else right)
        inside = visible_in_ranges(ranges, num_queries)
        return inside if visible is None else visible & inside
    lower, upper = window_offsets(num_queries, num_keys, is_causal, query_offset, window)
    queries = torch.arange(num_queries, device=device)[:, None]
    if upper is not None:
        causal = keys <= queries + upper
        visible = causal[None, None] if visible is None else visible & causal
    if lower is not None:
        near = keys >= queries + lower
        visible = near[None, None] if visible is None else visible & near
    return visible


def document_ranges(
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    num_queries: int,
    num_keys: int,
    left: int | None = None,
    right: int | None = None,
) -> Tensor:
    """The range of keys that each query sees, and of queries that see each key, of documents packed into one row.

    Query i of a document of Lq queries and Lk keys is at its key i + Lk - Lq, and sees the keys of its document from
    ``left`` before that to ``right`` after; None for no end on that side. Tokens of no document see nothing.

    Args:
        cu_seqlens_q, cu_seqlens_k: (N + 1,) integers: where each document's queries, and keys, start, and the end.

    Returns:
        int32 (1, 2, Sq + Sk): of each query the first key, then of each key the first query; and the ends of these.
        Neither first nor end is ever less than that of the query, or key, before. An empty range may be anywhere.
    """
    sides = []
    of_q, of_k = cu_seqlens_q.long(), cu_seqlens_k.long()
    for own, other, length, other_length, back, ahead in (
        (of_q, of_k, num_queries, num_keys, left, right),
        (of_k, of_q, num_keys, num_queries, right, left),
    ):
        if own.shape[0] < 2:
            sides.append(own.new_zeros((2, length)))
            continue
        i = torch.arange(length, device=own.device)
        document = torch.searchsorted(own[1:].contiguous(), i, right=True).clamp(max=own.shape[0] - 2)
        start, end, other_start, other_end = own[document], own[document + 1], other[document], other[document + 1]
        at = i + other_end - end
        other_start = other_start.clamp(0, other_length)
        other_end = torch.maximum(other_end, other_start).clamp(max=other_length)
        first, last = other_start, other_end
        if back is not None:
            first = torch.minimum(torch.maximum(at - back, other_start), other_end)
        if ahead is not None:
            last = torch.minimum(torch.maximum(at + ahead + 1, other_start), other_end)
        before, behind = i < start, i >= end
        ranges = [torch.where(before, other_start, torch.where(behind, other_end, x)) for x in (first, last)]
        sides.append(torch.stack(ranges))
    return torch.cat(sides, 1).int()[None]


def visible_in_ranges(ranges: Tensor, num_queries: int) -> Tensor:
    """bool (B, 1, Sq, Sk) or (1, 1, Sq, Sk): True where a key is in the range of a query; see ``document_ranges``."""
    keys = torch.arange(ranges.shape[2] - num_queries, device=ranges.device)
    first, end = ranges[:, :, :num_queries, None].unbind(1)
    return ((keys >= first) & (keys < end))[:, None]


def window_offsets(
    num_queries: int, num_keys: int, is_causal: bool, query_offset: int, window: Window | None
) -> tuple[int | None, int | None]:
    """(first, last) that query i sees keys from i + first to i + last; None where that hides nothing."""
    left, right = (None, None) if window is None else window
    right = 0 if is_causal else right
    upper = None if right is None or query_offset + right >= num_keys - 1 else query_offset + right
    lower = None if left is None or query_offset - left <= 1 - num_queries else query_offset - left
    return lower, upper


def attention_keep_mask(
    seed: Tensor | int, batch: int, heads: int, num_queries: int, num_keys: int, p: float, device: torch.device
) -> Tensor:
    """Dropout mask of ``attention`` on the Triton backend: True where a probability is kept.

    Queries, and keys, are taken in groups of two that are eight apart: element (b, h, q, k) uses word
    2·⌊q / 8⌋ mod 2 + ⌊k / 8⌋ mod 2 of the counter (8·⌊k / 16⌋ + k mod 8, 8·⌊q / 16⌋ + q mod 8, b·H + h).

    Returns:
        bool (batch, heads, num_queries, num_keys).
    """
    q = torch.arange(num_queries, device=device)
    k = torch.arange(num_keys, device=device)
    head = torch.arange(batch * heads, device=device)
    group_q = (q // 16 * 8 + q % 8)[None, :, None]
    group_k = (k // 16 * 8 + k % 8)[None, None, :]
    words = torch.stack(philox(seed, group_k + 0 * group_q, group_q, head[:, None, None]), dim=-1)
    word = 2 * (q // 8 % 2)[:, None] + (k // 8 % 2)[None, :]
    bits = words.gather(-1, word.expand(batch * heads, num_queries, num_keys)[..., None])[..., 0]
    return keep_from_bits(bits, p).reshape(batch, heads, num_queries, num_keys)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    *,
    key_mask: Tensor | None = None,
    key_lengths: Tensor | None = None,
    key_starts: Tensor | None = None,
    query_offset: int = 0,
    window: Window | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    seed: Tensor | int = 0,
) -> Tensor:
    """The specification, in the dtype of the inputs. Differentiable; the arguments are those of ``ek.attention``.

    Args:
        seed: dropout keeps what :func:`attention_keep_mask` keeps.

    Returns:
        (B, H, Sq, D).
    """
    batch, heads, num_queries, head_size = query.shape
    num_keys = key.shape[2]
    key = key.repeat_interleave(heads // key.shape[1], dim=1)
    value = value.repeat_interleave(heads // value.shape[1], dim=1)
    scores = query @ key.transpose(2, 3) * (head_size**-0.5 if scale is None else scale)
    visible = visible_keys(
        num_queries, num_keys, query.device, is_causal=is_causal, query_offset=query_offset, window=window,
        key_mask=key_mask, key_lengths=key_lengths, key_starts=key_starts, cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
    )  # fmt: skip
    if visible is None:
        probabilities = scores.softmax(-1)
    else:
        # The least finite number and not -inf: a query without keys then gives zeros, forward and backward, not NaN.
        probabilities = scores.masked_fill(~visible, torch.finfo(scores.dtype).min).softmax(-1)
        probabilities = torch.where(visible, probabilities, 0.0)
    if dropout_p > 0:
        keep = attention_keep_mask(seed, batch, heads, num_queries, num_keys, dropout_p, query.device)
        probabilities = torch.where(keep, probabilities * keep_scale(dropout_p), 0.0)
    return probabilities @ value


def sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    *,
    key_mask: Tensor | None = None,
    key_lengths: Tensor | None = None,
    key_starts: Tensor | None = None,
    query_offset: int = 0,
    window: Window | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
) -> Tensor:
    """The torch backend: ``scaled_dot_product_attention``, with a mask only where one is needed.

    Returns:
        (B, H, Sq, D).
    """
    if query.shape[1] == 0:  # kills the process in torch 2.11
        return query @ key.transpose(2, 3) @ value
    grouped = False
    if query.shape[1] != key.shape[1]:  # compiled with dynamic sizes the comparison is symbolic: SDPA wants a bool
        grouped = True
    masks = (key_mask, key_lengths, key_starts, window, cu_seqlens_q)
    plain = all(mask is None for mask in masks)
    if plain and (not is_causal or query_offset == 0):
        return F.scaled_dot_product_attention(
            query, key, value, dropout_p=dropout_p, is_causal=is_causal, scale=scale, enable_gqa=grouped
        )
    visible = visible_keys(
        query.shape[2], key.shape[2], query.device, is_causal=is_causal, query_offset=query_offset, window=window,
        key_mask=key_mask, key_lengths=key_lengths, key_starts=key_starts, cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
    )  # fmt: skip
    if visible is None:
        return F.scaled_dot_product_attention(query, key, value, dropout_p=dropout_p, scale=scale, enable_gqa=grouped)
    return masked_sdpa(query, key, value, visible, dropout_p, scale, grouped)


def masked_sdpa(
    query: Tensor, key: Tensor, value: Tensor, visible: Tensor, dropout_p: float, scale: float | None, grouped: bool
) -> Tensor:
    """``scaled_dot_product_attention`` with a boolean mask, zeros for a query that sees no key."""
    if query.device.type == "cpu":
        # On a CPU every implementation gives zeros for a row without keys, forward and backward.
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=visible, dropout_p=dropout_p, scale=scale, enable_gqa=grouped
        )
    # Elsewhere some give NaN (pytorch#103749): such rows attend to everything, and are then replaced.
    sees = visible.any(-1, keepdim=True)
    out = F.scaled_dot_product_attention(
        query, key, value, attn_mask=visible | ~sees, dropout_p=dropout_p, scale=scale, enable_gqa=grouped
    )
    return torch.where(sees, out, 0.0)

"""Documents packed into one row, on a CPU: no pair of two documents is computed.

Documents of about one length are computed together, as a batch that is padded to the longest of them: a call of
``scaled_dot_product_attention`` for a single short document is mostly waiting for threads.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from embedkernels.ops.attention_checks import autocast_dtype
from embedkernels.ops.eager import is_eager
from embedkernels.reference import attention as reference

# A document joins those that are longer while it is at least this share of the longest, or shorter by no more tokens:
# then at least half of the pairs that are computed are real, but for a few.
_SHARE, _TOKENS = 0.75, 16


def can_be_read(*tensors: Tensor | None) -> bool:
    """Whether the numbers in these tensors can be read at no cost: on a CPU, neither traced nor transformed."""
    return all(x is None or x.device.type == "cpu" for x in tensors) and is_eager(*tensors)


def attention_by_document(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
    *,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    window: reference.Window | None,
) -> Tensor:
    """``reference.sdpa`` of each document, on tensors that :func:`can_be_read`.

    Raises:
        ValueError: for ends that decrease or leave the row.
    """
    of_q = _sizes(cu_seqlens_q, query.shape[2], "cu_seqlens_q")
    of_k = _sizes(cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k, key.shape[2], "cu_seqlens_k")
    options: dict[str, Any] = {"dropout_p": dropout_p, "is_causal": is_causal, "scale": scale, "window": window}
    if not any(q and k for q, k in zip(of_q[1:-1], of_k[1:-1], strict=True)):
        # Zeros, and gradients of zero.
        return reference.sdpa(query, key, value, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, **options)
    if of_q == of_k and query.shape[0] == 1 and window is None:
        return _in_groups(query, key, value, tuple(of_q), dropout_p, is_causal, scale)
    parts = []
    for i, (q, k, v) in enumerate(zip(query.split(of_q, 2), key.split(of_k, 2), value.split(of_k, 2), strict=True)):
        inside = 0 < i < len(of_q) - 1
        if inside and of_q[i] and of_k[i]:
            parts.append(reference.sdpa(q, k, v, query_offset=of_k[i] - of_q[i], **options))
        elif of_q[i]:
            parts.append(torch.zeros((*q.shape[:3], v.shape[3]), dtype=autocast_dtype(v), device=v.device))
    return torch.cat(parts, 2)


def _sizes(cu_seqlens: Tensor, length: int, name: str) -> list[int]:
    """Tokens before the first document, in each document, and behind the last."""
    ends = cu_seqlens.tolist()
    sizes = [b - a for a, b in itertools.pairwise([0, *ends, length])]
    if min(sizes) < 0:
        raise ValueError(f"attention: {name} must not decrease, and be between 0 and {length}, got {ends}")
    return sizes


class _Groups(NamedTuple):
    """How T tokens become batches of documents of about one length, P rows in all.

    Attributes:
        shapes: of each batch, its documents and the length of the longest.
        masks: of each batch, (n, 1, 1, L), which rows are tokens; None if all are.
        tokens: int64 (P,), the token in a row; any where there is none.
        rows: int64 (T',), the row of each token that is in a document.
        inside: which tokens these are; None if all are.
    """

    shapes: tuple[tuple[int, int], ...]
    masks: tuple[Tensor | None, ...]
    tokens: Tensor
    rows: Tensor
    inside: Tensor | None


@functools.lru_cache(maxsize=4)
def _groups(sizes: tuple[int, ...]) -> _Groups:
    """The same for every layer of a model, which is why it is kept."""
    with torch.inference_mode(False), torch.device("cpu"):
        starts = list(itertools.accumulate(sizes))
        documents = sorted(range(1, len(sizes) - 1), key=lambda i: -sizes[i])
        groups: list[list[int]] = []
        for i in documents:
            if sizes[i] == 0:
                break
            longest = sizes[groups[-1][0]] if groups else 0
            if groups and sizes[i] >= min(longest * _SHARE, longest - _TOKENS):
                groups[-1].append(i)
            else:
                groups.append([i])
        shapes, masks, tokens = [], [], []
        rows, first = torch.zeros(sum(sizes), dtype=torch.int64), 0
        inside = torch.zeros(sum(sizes), dtype=torch.bool)
        for group in groups:
            length = sizes[group[0]]
            shapes.append((len(group), length))
            of_group = torch.tensor([sizes[i] for i in group])
            real = torch.arange(length) < of_group[:, None]
            masks.append(None if sizes[group[-1]] == length else real[:, None, None, :])
            at = torch.tensor([starts[i - 1] for i in group])[:, None] + torch.arange(length)
            at = torch.where(real, at, at[:, :1])
            tokens.append(at.flatten())
            where = first + torch.arange(at.numel())[real.flatten()]
            rows[at[real]] = where
            inside[at[real]] = True
            first += at.numel()
        everywhere = bool(inside.all())
        chosen = None if everywhere else inside.nonzero()[:, 0]
        return _Groups(tuple(shapes), tuple(masks), torch.cat(tokens), rows if everywhere else rows[inside], chosen)


def _in_groups(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sizes: tuple[int, ...],
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
) -> Tensor:
    groups = _groups(sizes)
    batches = [_Spread.apply(x[0].transpose(0, 1), groups) for x in (query, key, value)]
    counts = [n * length for n, length in groups.shapes]
    outputs = []
    for (n, length), mask, *rows in zip(
        groups.shapes, groups.masks, *(x.split(counts) for x in batches), strict=True
    ):
        q, k, v = (x.unflatten(0, (n, length)).transpose(1, 2) for x in rows)
        # Behind the tokens of a document no query of it sees anything in causal order.
        out = F.scaled_dot_product_attention(
            q, k, v, None if is_causal else mask, dropout_p, is_causal, scale=scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )  # fmt: skip
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    out = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return _Gather.apply(out, groups, query.shape[2]).transpose(0, 1)[None]


class _Spread(torch.autograd.Function):
    """(P, ...) of (T, ...). Rows without a token hold another's values, and are given no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, groups: _Groups) -> Tensor:
        ctx.groups, ctx.length = groups, x.shape[0]
        return x.index_select(0, groups.tokens)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _Gather.apply(grad, ctx.groups, ctx.length), None


class _Gather(torch.autograd.Function):
    """(T, ...) of (P, ...): zeros for tokens of no document."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, groups: _Groups, length: int) -> Tensor:
        ctx.groups, ctx.rows = groups, x.shape[0]
        found = x.index_select(0, groups.rows)
        if groups.inside is None:
            return found
        return x.new_zeros((length, *x.shape[1:])).index_copy(0, groups.inside, found)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        groups = ctx.groups
        given = grad if groups.inside is None else grad.index_select(0, groups.inside)
        return given.new_zeros((ctx.rows, *given.shape[1:])).index_copy(0, groups.rows, given), None, None

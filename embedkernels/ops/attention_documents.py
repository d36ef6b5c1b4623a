"""Documents packed into one row, on a CPU: one call per document, so that no pair of two documents is computed."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from embedkernels.ops.eager import is_eager
from embedkernels.reference import attention as reference


def can_be_read(*tensors: Tensor | None) -> bool:
    """Whether the numbers in these tensors can be read at no cost: on a CPU, neither traced nor transformed."""
    return all(x is None or x.device.type == "cpu" for x in tensors) and is_eager(*tensors)


def attention_by_document(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor | None, **options: Any
) -> Tensor:
    """``reference.sdpa`` of each document, on tensors that :func:`can_be_read`.

    Raises:
        ValueError: for ends that decrease or leave the row.
    """
    of_q = _sizes(cu_seqlens_q, query.shape[2], "cu_seqlens_q")
    of_k = _sizes(cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k, key.shape[2], "cu_seqlens_k")
    if not any(q and k for q, k in zip(of_q[1:-1], of_k[1:-1], strict=True)):
        # Zeros, and gradients of zero.
        return reference.sdpa(query, key, value, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, **options)
    parts = []
    for i, (q, k, v) in enumerate(zip(query.split(of_q, 2), key.split(of_k, 2), value.split(of_k, 2), strict=True)):
        inside = 0 < i < len(of_q) - 1
        if inside and of_q[i] and of_k[i]:
            parts.append(reference.sdpa(q, k, v, query_offset=of_k[i] - of_q[i], **options))
        elif of_q[i]:
            parts.append(torch.zeros((*q.shape[:3], v.shape[3]), dtype=v.dtype))
    return torch.cat(parts, 2)


def _sizes(cu_seqlens: Tensor, length: int, name: str) -> list[int]:
    """Tokens before the first document, in each document, and behind the last."""
    ends = cu_seqlens.tolist()
    sizes = [b - a for a, b in itertools.pairwise([0, *ends, length])]
    if min(sizes) < 0:
        raise ValueError(f"attention: {name} must not decrease, and be between 0 and {length}, got {ends}")
    return sizes

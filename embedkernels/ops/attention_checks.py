"""What ``attention`` refuses, with the argument's name, what came and what was expected."""

from __future__ import annotations

import torch
from torch import Tensor

from embedkernels.ops.arguments import checked_int, checked_number

# Positions are 32-bit in the kernels.
_LARGEST_OFFSET = 1 << 30
# In float32, products of the scale with log2(e) and with dropout's 1/(1 - p) must be finite, normal numbers.
_LARGEST_SCALE = 2.0**100


def check_tensors(query: Tensor, key: Tensor, value: Tensor) -> None:
    for name, x in (("query", query), ("key", key), ("value", value)):
        if not isinstance(x, Tensor):
            raise TypeError(f"attention: {name} must be a Tensor, got {type(x).__name__}")
        if x.dim() != 4:
            raise ValueError(f"attention: {name} must be 4-D (B, H, S, D), got shape {tuple(x.shape)}")
        if not x.is_floating_point():
            raise TypeError(f"attention: {name} must be floating point, got {x.dtype}")
        if x.device != query.device:
            raise ValueError(f"attention: query is on {query.device}, {name} is on {x.device}")


def check_shapes(query: Tensor, key: Tensor, value: Tensor) -> None:
    if key.shape[0] != query.shape[0] or key.shape[3] != query.shape[3]:
        raise ValueError(
            f"attention: key must have the batch and head size of query, (B, Hkv, Sk, D) = "
            f"({query.shape[0]}, Hkv, Sk, {query.shape[3]}), got {tuple(key.shape)}"
        )
    if value.shape[:3] != key.shape[:3]:
        raise ValueError(
            f"attention: value must have the batch, heads and length of key, {tuple(key.shape[:3])}, "
            f"got shape {tuple(value.shape)}"
        )


def checked_values(dropout_p: float, scale: float | None, query_offset: int) -> tuple[float, float | None, int]:
    """The plain numbers among the arguments, as numbers."""
    dropout_p = checked_number(dropout_p, "dropout_p", "attention")
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"attention: dropout_p must be in [0, 1], got {dropout_p}")
    scale = None if scale is None else checked_number(scale, "scale", "attention")
    if scale is not None and not -_LARGEST_SCALE <= scale <= _LARGEST_SCALE:
        raise ValueError(f"attention: scale must be between -2**100 and 2**100, got {scale}")
    query_offset = checked_int(query_offset, "query_offset", "attention")
    if not -_LARGEST_OFFSET < query_offset < _LARGEST_OFFSET:
        raise ValueError(f"attention: query_offset must be between -2**30 and 2**30, got {query_offset}")
    return dropout_p, scale, query_offset


def checked_window(window: object) -> tuple[int | None, int | None] | None:
    """(left, right), numbers of keys of 0 or more, or None; None if neither side has an end."""
    if window is None:
        return None
    if not isinstance(window, tuple | list) or len(window) != 2:
        raise TypeError(f"attention: window must be (left, right), each a number of keys or None, got {window!r}")
    left, right = (None if side is None else checked_int(side, "window", "attention") for side in window)
    for side in (left, right):
        if side is not None and not 0 <= side < _LARGEST_OFFSET:
            raise ValueError(f"attention: window must be of 0 to 2**30 keys on each side, got {side}")
    return None if left is None and right is None else (left, right)


def check_heads(query: Tensor, key: Tensor, enable_gqa: bool) -> None:
    heads, heads_kv = query.shape[1], key.shape[1]
    if heads == heads_kv:
        return
    if not enable_gqa:
        raise ValueError(
            f"attention: query has {heads} heads, key and value have {heads_kv}: "
            "pass enable_gqa=True for grouped query attention"
        )
    if heads == 0 or heads_kv == 0 or heads % heads_kv != 0:
        raise ValueError(
            f"attention: the heads of query must be a positive multiple of those of key, got {heads} and {heads_kv}"
        )


def check_dtypes(query: Tensor, key: Tensor, value: Tensor) -> None:
    """One dtype for all three, once autocast has cast what it casts."""
    if query.dtype == key.dtype == value.dtype:
        return
    used = [autocast_dtype(x) for x in (query, key, value)]
    if used[0] == used[1] == used[2]:
        return
    given = f"{query.dtype}, {key.dtype} and {value.dtype}"
    if torch.is_autocast_enabled(query.device.type):
        given += f", which autocast makes {used[0]}, {used[1]} and {used[2]}"
    raise TypeError(f"attention: query, key and value must have one dtype, got {given}")


def check_masks(
    query: Tensor, key: Tensor, key_mask: Tensor | None, key_lengths: Tensor | None, key_starts: Tensor | None
) -> None:
    batch, num_keys = query.shape[0], key.shape[2]
    if key_mask is not None:
        if not isinstance(key_mask, Tensor) or key_mask.dtype != torch.bool:
            got = key_mask.dtype if isinstance(key_mask, Tensor) else type(key_mask).__name__
            raise TypeError(f"attention: key_mask must be a bool Tensor, True for keys that count; got {got}")
        if key_mask.shape not in ((batch, num_keys), (1, num_keys)):
            raise ValueError(
                f"attention: key_mask must have shape ({batch}, {num_keys}) or (1, {num_keys}), "
                f"got {tuple(key_mask.shape)}"
            )
    for name, x in (("key_lengths", key_lengths), ("key_starts", key_starts)):
        if x is None:
            continue
        if not isinstance(x, Tensor) or x.dtype not in (torch.int32, torch.int64):
            got = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"attention: {name} must be an int32 or int64 Tensor, got {got}")
        if x.shape != (batch,):
            raise ValueError(f"attention: {name} must have shape ({batch},), got {tuple(x.shape)}")
    for name, x in (("key_mask", key_mask), ("key_lengths", key_lengths), ("key_starts", key_starts)):
        if x is not None and x.device != query.device:
            raise ValueError(f"attention: query is on {query.device}, {name} is on {x.device}")


def check_documents(
    query: Tensor, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, query_offset: int
) -> None:
    if cu_seqlens_q is None:
        if cu_seqlens_k is not None:
            raise ValueError("attention: cu_seqlens_k needs cu_seqlens_q")
        return
    for name, x in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if x is None and name == "cu_seqlens_k":
            continue
        if not isinstance(x, Tensor) or x.dtype not in (torch.int32, torch.int64):
            got = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"attention: {name} must be an int32 or int64 Tensor, got {got}")
        if x.dim() != 1 or x.shape[0] == 0 or x.shape[0] != cu_seqlens_q.shape[0]:
            expected = "(N + 1,)" if name == "cu_seqlens_q" else f"{tuple(cu_seqlens_q.shape)}, as cu_seqlens_q"
            raise ValueError(f"attention: {name} must have shape {expected}, got {tuple(x.shape)}")
        if x.device != query.device:
            raise ValueError(f"attention: query is on {query.device}, {name} is on {x.device}")
    if query_offset != 0:
        raise ValueError(f"attention: query_offset must be 0 with cu_seqlens_q, got {query_offset}")


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which autocast, if it is on, runs an op on ``x``; as SDPA, it leaves float64 alone."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return x.dtype

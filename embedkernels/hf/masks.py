"""The mask function that transformers calls once per forward: a compact key mask where the kernels take one.

The kernels need no (B, 1, Sq, Sk) mask for padding, nor to know on the host whether there is any. For the mask
patterns they understand, the mask keeps its size in keys, and its shape says the rest:

- ``(B, 1, 1, Sk)``, bool: these keys, for every query. It is an ordinary mask by broadcasting.
- ``(B, Sk)``, bool: these keys, and causal with the last query on the last key.

Anything else, and everything on a device where the kernels do not run, is what transformers builds for SDPA.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, sdpa_mask

from embedkernels.hf.adapters import MODEL_TYPES
from embedkernels.ops.backend import choose


@torch.compiler.assume_constant_result
def attention_backend(device: torch.device) -> str:
    """The backend of the attention op on ``device``; a constant of the graph under torch.compile."""
    return choose("attention", device).backend


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """The mask for ``embedkernels.hf.attention``: compact, dense as for SDPA, or None if nothing is masked.

    Args:
        batch_size, q_length, kv_length, q_offset, kv_offset: sizes and first positions of queries and keys.
        mask_function: transformers' description of the pattern.
        attention_mask: bool (B, >= Sk or less), True for a token; None if there is no padding.
        **kwargs: as for ``transformers.masking_utils.sdpa_mask``.
    """
    device = torch.device(kwargs.get("device", "cpu"))
    plain = not kwargs.get("use_vmap") and kwargs.get("local_size") is None
    if plain and understood(kwargs.get("config")) and attention_backend(device) == "triton":
        made = _compact(batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask, kwargs)
        if made is not _DENSE:
            return made  # type: ignore[return-value]
    dense: Tensor | None = sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        **kwargs,
    )
    return dense


_DENSE = object()


def understood(config: Any) -> bool:
    """Whether models with this configuration hand masks on to the attention function untouched."""
    return getattr(config, "model_type", None) in MODEL_TYPES


def _compact(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor,
    kv_offset: int,
    mask_function: Callable[..., Any],
    padding: Tensor | None,
    kwargs: dict[str, Any],
) -> Tensor | object | None:
    """The compact mask, None, or ``_DENSE`` where only a dense mask says it. Never waits for the device."""
    if mask_function is causal_mask_function:
        # A static cache has its offset on the device, and more keys than queries have seen.
        aligned = not isinstance(q_offset, Tensor) and q_offset == kv_length - q_length
        if not kwargs.get("allow_is_causal_skip", True) or not aligned:
            return _DENSE
        causal = q_length > 1
    elif mask_function is bidirectional_mask_function:
        if not kwargs.get("allow_is_bidirectional_skip", False):
            return _DENSE
        causal = False
    else:
        return _DENSE
    if kv_offset != 0:
        return _DENSE
    if padding is None:
        if not causal or q_length == kv_length:
            return None
        return torch.ones(batch_size, kv_length, dtype=torch.bool, device=kwargs.get("device", "cpu"))
    if padding.dtype != torch.bool or padding.dim() != 2 or padding.shape[0] != batch_size:
        return _DENSE
    keys = padding[:, :kv_length]
    if keys.shape[1] < kv_length:
        keys = F.pad(keys, (0, kv_length - keys.shape[1]))
    return keys if causal else keys[:, None, None, :]


def of_all_keys(mask: Tensor | None, kv_length: int) -> Tensor | None:
    """``mask`` if it is of ``kv_length`` keys or one for all; None if it is of another number and masks nothing.

    transformers takes the number of keys from ``attention_mask`` and makes no mask of one that is all ones, so stock
    models run with any number of ones.

    Raises:
        ValueError: for another number of keys, some of them masked.
    """
    if mask is None or mask.shape[-1] in (1, kv_length):
        return mask
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined]
    compact = mask.dtype == torch.bool and mask.dim() == 4 and mask.shape[1:3] == (1, 1)
    if compact and not traced and bool(mask.all()):
        return None
    raise ValueError(
        f"attention_mask is of {mask.shape[-1]} keys, but there are {kv_length}: it must have one column for each "
        "token of the input, and of the cache if there is one"
    )


def causal_keys_to_dense(keys: Tensor, q_length: int) -> Tensor:
    """The (B, 1, Sq, Sk) mask that a compact causal (B, Sk) mask stands for."""
    kv_length = keys.shape[1]
    causal = torch.ones(q_length, kv_length, dtype=torch.bool, device=keys.device).tril(kv_length - q_length)
    return keys[:, None, None, :] & causal


def window_to_dense(window: int, length: int, causal: bool, device: torch.device) -> Tensor:
    """The (1, 1, S, S) mask of a window of so many keys before a query, and after it if not causal."""
    visible = torch.ones(length, length, dtype=torch.bool, device=device).triu(-window)
    return visible.tril(0 if causal else window)[None, None]


def packed_to_dense(
    mask: Tensor | None, cu_seq_lens_q: Tensor, cu_seq_lens_k: Tensor, q_length: int, kv_length: int, causal: bool
) -> Tensor:
    """The (1, 1, Sq, Sk) mask of sequences packed into one row, on top of ``mask``.

    Args:
        mask: None or a 4-D mask, bool or additive.
        cu_seq_lens_q, cu_seq_lens_k: integer (number of sequences + 1,), where each sequence starts, and the end.
        q_length, kv_length: tokens in the row.
        causal: whether a query sees only keys up to its own position (used if ``mask`` is None).
    """
    device = cu_seq_lens_q.device
    q, k = torch.arange(q_length, device=device), torch.arange(kv_length, device=device)
    q_sequence = torch.searchsorted(cu_seq_lens_q[1:].contiguous(), q, right=True)
    k_sequence = torch.searchsorted(cu_seq_lens_k[1:].contiguous(), k, right=True)
    same = q_sequence[:, None] == k_sequence[None, :]
    if mask is None:
        if causal:
            same = same & (k[None, :] <= q[:, None])
        return same[None, None]
    if mask.dtype == torch.bool:
        return mask & same
    return mask.masked_fill(~same, torch.finfo(mask.dtype).min)

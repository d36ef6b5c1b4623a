"""The mask function that transformers calls once per forward: a compact key mask where the kernels take one.

The kernels need no (B, 1, Sq, Sk) mask for padding, nor to know on the host whether there is any. For the mask
patterns they understand, the mask keeps its size in keys, and its shape says the rest:

- ``(B, 1, 1, Sk)``, bool: these keys, for every query. It is an ordinary mask by broadcasting.
- ``(B, Sk)``, bool: these keys, and causal with the last query on the last key.
- ``(B, 1, 2, Sq + Sk)``, int32: a window, or documents packed into each row (which transformers tells by the position
  ids), or both: the range of keys that every query sees, and of queries to every key, as ``attention_in_ranges``
  takes it. ``(B, 1, 3, Sq + Sk)``: the third row says which keys count. Of four dimensions, it goes through a model
  that takes it for a mask which somebody has prepared.

Anything else, and everything on a device where the kernels do not run, is what transformers builds for SDPA.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.masking_utils import (
    and_masks,
    bidirectional_mask_function,
    causal_mask_function,
    packed_sequence_mask_function,
    sdpa_mask,
    sliding_window_bidirectional_overlay,
    sliding_window_overlay,
)

from embedkernels.hf.adapters import MODEL_TYPES
from embedkernels.ops.backend import choose
from embedkernels.reference.attention import visible_in_ranges


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
    if not kwargs.get("use_vmap") and understood(kwargs.get("config")) and attention_backend(device) == "triton":
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
    pattern = pattern_of(mask_function)
    if pattern is None or (pattern.window is None and kwargs.get("local_size") is not None):
        return _DENSE
    if pattern.documents is not None or (pattern.window is not None and pattern.window < kv_length - 1):
        device = torch.device(kwargs.get("device", "cpu"))
        return _ranges(batch_size, q_length, kv_length, q_offset, kv_offset, pattern, padding, device)
    if pattern.causal:
        # A static cache has its offset on the device, and more keys than queries have seen.
        aligned = not isinstance(q_offset, Tensor) and q_offset == kv_length - q_length
        if not kwargs.get("allow_is_causal_skip", True) or not aligned:
            return _DENSE
        causal = q_length > 1
    else:
        if not kwargs.get("allow_is_bidirectional_skip", False):
            return _DENSE
        causal = False
    if kv_offset != 0:
        return _DENSE
    if padding is None:
        if not causal or q_length == kv_length:
            return None
        return torch.ones(batch_size, kv_length, dtype=torch.bool, device=kwargs.get("device", "cpu"))
    keys = _keys(padding, batch_size, kv_length)
    if keys is None:
        return _DENSE
    return keys if causal else keys[:, None, None, :]


def _keys(padding: Tensor, batch_size: int, kv_length: int) -> Tensor | None:
    """bool (B, Sk), which keys are no padding; None for a mask of another kind."""
    if padding.dtype != torch.bool or padding.dim() != 2 or padding.shape[0] != batch_size:
        return None
    keys = padding[:, :kv_length]
    return F.pad(keys, (0, kv_length - keys.shape[1])) if keys.shape[1] < kv_length else keys


class Pattern(NamedTuple):
    """What a mask function of transformers describes.

    Attributes:
        causal: a query sees no key after its own position.
        window: it sees so many keys before, and after if not causal; None for all.
        documents: int (B, S), a number of the document that a token is in, which never decreases along a row; a query
            sees its own document alone. None if there is one.
    """

    causal: bool
    window: int | None = None
    documents: Tensor | None = None


# Mask functions are closures: of one kind are those that share their code.
_AND, _BEFORE, _AROUND, _SAME = (
    made.__code__
    for made in (
        and_masks(causal_mask_function),
        sliding_window_overlay(1),
        sliding_window_bidirectional_overlay(1),
        packed_sequence_mask_function(torch.zeros((1, 1), dtype=torch.int64)),
    )
)


def pattern_of(mask_function: Callable[..., Any]) -> Pattern | None:
    """What ``mask_function`` describes; None for anything but an order, a window and documents."""
    if mask_function is causal_mask_function:
        return Pattern(True)
    if mask_function is bidirectional_mask_function:
        return Pattern(False)
    if torch.compiler.is_compiling() or getattr(mask_function, "__code__", None) is not _AND:
        return None
    pattern, around = Pattern(False), None
    for part in _captured(mask_function)["mask_functions"]:
        code = getattr(part, "__code__", None)
        if code is _BEFORE:
            # Of w keys, its own among them.
            pattern = pattern._replace(window=_captured(part)["sliding_window"] - 1)
        elif code is _AROUND:
            around = _captured(part)["sliding_window"]
        elif code is _SAME:
            pattern = pattern._replace(documents=_captured(part)["packed_sequence_mask"])
        else:
            inner = pattern_of(part)
            if inner is None or (inner.window is not None and pattern.window is not None):
                return None
            pattern = Pattern(
                pattern.causal or inner.causal,
                pattern.window if inner.window is None else inner.window,
                pattern.documents if inner.documents is None else inner.documents,
            )
    if around is not None:
        return None if pattern.causal or pattern.window is not None else pattern._replace(window=around)
    # A window before a query alone belongs to causal order.
    return None if pattern.window is not None and not pattern.causal else pattern


def _captured(function: Any) -> dict[str, Any]:
    return {
        name: cell.cell_contents
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    }


def _ranges(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor,
    kv_offset: int,
    pattern: Pattern,
    padding: Tensor | None,
    device: torch.device,
) -> Tensor | object:
    """The compact mask of a window or of documents, or ``_DENSE``."""
    documents = pattern.documents
    if isinstance(q_offset, Tensor) or kv_offset != 0:
        return _DENSE
    whole = q_offset == 0 and q_length == kv_length
    if documents is not None and not (whole and documents.shape == (batch_size, q_length)):
        return _DENSE
    keys = None if padding is None else _keys(padding, batch_size, kv_length)
    if padding is not None and keys is None:
        return _DENSE
    sides = []
    right = 0 if pattern.causal else pattern.window
    for length, other, offset, back, ahead in (
        (q_length, kv_length, q_offset, pattern.window, right),
        (kv_length, q_length, -q_offset, right, pattern.window),
    ):
        at = torch.arange(length, device=device)[None] + offset
        first = torch.zeros_like(at) if back is None else at - back
        end = torch.full_like(at, other) if ahead is None else at + ahead + 1
        if documents is not None:
            numbers = documents.contiguous()
            first = torch.maximum(first, torch.searchsorted(numbers, numbers))
            end = torch.minimum(end, torch.searchsorted(numbers, numbers, right=True))
        sides.append(torch.stack([first.clamp(0, other), end.clamp(0, other)], 1))
    ranges = torch.cat(sides, 2).int()
    if keys is None:
        return ranges[:, None]
    counts = torch.cat([torch.ones_like(keys[:, :1]).expand(-1, q_length), keys], 1)
    return torch.cat([ranges.expand(batch_size, -1, -1), counts[:, None].int()], 1)[:, None]


def is_ranges(mask: Tensor | None) -> bool:
    """Whether a mask is one of ranges."""
    return mask is not None and mask.dtype == torch.int32 and mask.dim() == 4 and mask.shape[2] in (2, 3)


def split_ranges(mask: Tensor, q_length: int) -> tuple[Tensor, Tensor | None]:
    """The ranges, and which keys count, None for all."""
    return mask[:, 0, :2].contiguous(), None if mask.shape[2] == 2 else mask[:, 0, 2, q_length:].bool()


def ranges_to_dense(mask: Tensor, q_length: int) -> Tensor:
    """The (B, 1, Sq, Sk) or (1, 1, Sq, Sk) mask that a mask of ranges stands for."""
    ranges, keys = split_ranges(mask, q_length)
    visible = visible_in_ranges(ranges, q_length)
    return visible if keys is None else visible & keys[:, None, None, :]


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

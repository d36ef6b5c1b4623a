"""The attention implementation ``"embedkernels"`` of transformers: an attention function and a mask function.

Importing this module registers both, after which ``model.set_attn_implementation("embedkernels")`` works for every
model that takes its attention from transformers' AttentionInterface. A call that the kernels take exactly (no mask or
a key mask, causal or not, a window, documents packed into one row, grouped queries, dropout) goes to
:func:`embedkernels.attention`; any other goes to transformers' own SDPA function with the mask it expects, or is
refused where that function would ignore an argument.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface

from embedkernels.hf import masks
from embedkernels.ops import attention as attention_op
from embedkernels.ops.backend import needs_stock_autograd
from embedkernels.reference.attention import visible_keys

NAME = "embedkernels"
# What a base model takes out of the keywords if it runs on a batch that came packed from a collator.
PACKED = "packed_batch"
# Within a model that runs on packed tokens: its class, and how many calls there were.
_packed_in: ContextVar[tuple[str, bool, list[None]] | None] = ContextVar("_packed_in", default=None)


@contextlib.contextmanager
def every_call_is_packed(model: str, causal: bool) -> Iterator[None]:
    """Within the block, calls must have ``cu_seq_lens_q`` and be causal or not as is said here; one there must be.

    Raises:
        RuntimeError: the model named ``model`` does not hand its keywords on to the attention function, or its layers
            are causal where its masks are not, or the other way round.
    """
    calls: list[None] = []
    token = _packed_in.set((model, causal, calls))
    try:
        yield
    finally:
        _packed_in.reset(token)
    if not calls:
        raise RuntimeError(_not_handed_on(model))


def _not_handed_on(model: str) -> str:
    return (
        f"embedkernels: {model} of transformers {transformers.__version__} did not hand cu_seq_lens_q on to its "
        "attention, so it cannot run padding-free: use patch(model) without padding_free"
    )


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention with the signature that transformers calls.

    Args:
        module: the attention module; its ``is_causal`` counts if the argument is None.
        query: (B, H, Sq, D). key, value: (B, Hkv, Sk, D), H a multiple of Hkv.
        attention_mask: None, a compact mask of ``embedkernels.hf.masks``, or a 4-D mask as for SDPA.
        dropout: probability, already 0 outside training.
        scaling: factor of the scores; None for 1/sqrt(D).
        is_causal: overrides the module's; ignored if there is a mask or only one query, as in transformers.
        **kwargs: ``position_bias``, ``cu_seq_lens_q``/``cu_seq_lens_k`` and ``sliding_window`` are honoured. A window
            of w reaches to the w - 1 keys before a query, and after it if attention is not causal. A mask contains
            it already.

    Returns:
        (B, Sq, H, D) and None for the weights: ``output_attentions`` is answered with a warning, as in SDPA.

    Raises:
        ValueError: for an argument that neither the kernels nor SDPA honour (``softcap``, ``s_aux``, or
            ``sliding_window`` without a mask that contains it for other numbers of keys than of queries); for a mask
            of more or fewer keys than there are.
    """
    if kwargs.get(PACKED):
        raise ValueError(
            f"a batch of embedkernels.hf.PackingCollator reached {type(module).__name__} of a model that does "
            "not run padding-free: embedkernels.patch(model, padding_free=True), not compiled"
        )
    _refuse(kwargs, attention_mask, query.shape[2], key.shape[2])
    if kwargs.pop("output_attentions", False):
        _warn_once(f'{NAME!r} gives no attention weights for output_attentions=True: set "eager" for them')
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    if (
        attention_mask is not None
        and attention_mask.dim() == 2
        and not masks.understood(getattr(module, "config", None))
    ):
        # Not one of ours: a mask of (Sq, Sk), which SDPA broadcasts.
        attention_mask = attention_mask[None, None]
    documents = _documents(kwargs, query)
    # A graph never runs packed, and torch 2.11 cannot trace the look.
    within = None if torch.compiler.is_compiling() else _packed_in.get()
    if within is not None:
        if documents is None:
            raise RuntimeError(_not_handed_on(within[0]))
        if within[1] != causal and query.shape[2] > 1:
            raise RuntimeError(
                f"embedkernels: is_causal of {type(module).__name__} is {causal}, that of the masks of {within[0]} "
                f"is {within[1]}, which packed sequences do without: use patch(model) without padding_free"
            )
        within[2].append(None)
    if attention_mask is not None and masks.is_ranges(attention_mask):
        reason = _why_not_kernels(query, key, value) or _why_not_op(None, query, key, kwargs)
        if reason is None and documents is None and attention_mask.shape[-1] == query.shape[2] + key.shape[2]:
            return _run_in_ranges(query, key, value, attention_mask, dropout, scaling), None
        attention_mask = masks.ranges_to_dense(attention_mask, query.shape[2])
    attention_mask = masks.of_all_keys(attention_mask, key.shape[2])
    if documents is not None and attention_mask is not None and tuple(attention_mask.shape) == (1, 1, 1, 1):
        attention_mask = None  # one element, which hides nothing: what documents are given with
    window = None if attention_mask is not None or query.shape[2] == 1 else _reach(module, kwargs, causal)
    if window is not None and window >= key.shape[2] - 1:
        window = None
    on_kernels = masks.attention_backend(query.device) == "triton"
    # SDPA takes neither documents nor windows but as a mask of all pairs: the op knows better, on a CPU too.
    if on_kernels or documents is not None or window is not None:
        reason = _why_not_op(attention_mask, query, key, kwargs)
        if on_kernels:
            reason = reason or _why_not_kernels(query, key, value)
        if reason is None:
            return _run(query, key, value, attention_mask, dropout, scaling, causal, documents, window), None
        if on_kernels:
            _warn_once(f"runs on SDPA: {reason}")
    if window is not None:
        attention_mask = visible_keys(
            query.shape[2], key.shape[2], query.device, is_causal=causal, window=(window, window)
        )
    if documents is not None:
        attention_mask = _packed(documents, query, key, attention_mask, causal)
    if attention_mask is not None and attention_mask.dim() == 2:
        attention_mask = masks.causal_keys_to_dense(attention_mask, query.shape[2])
    out: tuple[Tensor, None] = sdpa_attention_forward(
        module,
        query,
        key,
        value,
        attention_mask,
        dropout=dropout,
        scaling=scaling,
        is_causal=is_causal,
        **kwargs,
    )
    return out


def _refuse(kwargs: dict[str, Any], mask: Tensor | None, q_length: int, kv_length: int) -> None:
    """ValueError for an argument that would be ignored."""
    for name in ("softcap", "s_aux"):
        if kwargs.get(name) is not None:
            raise ValueError(
                f"attention implementation {NAME!r} does not support {name}: "
                'use model.set_attn_implementation("eager") for this model'
            )
    window = kwargs.get("sliding_window")
    packed = kwargs.get("cu_seq_lens_q") is not None or kwargs.get("cu_seq_lens_k") is not None
    if window is not None and mask is None and kv_length > window and q_length != kv_length and not packed:
        raise ValueError(
            f"attention implementation {NAME!r} got sliding_window={window} for {kv_length} keys and {q_length} "
            "queries without a mask that contains the window: pass such a mask, or use "
            'model.set_attn_implementation("eager")'
        )


def _reach(module: nn.Module, kwargs: dict[str, Any], causal: bool) -> int | None:
    """How many keys before a query, and after it if not causal, its window holds, as transformers' masks have it.

    In causal order ``sliding_window`` counts the query's own key. Around a query the masks have that of the
    configuration, which does not, and the keyword is that of some models and one more of others.
    """
    window = kwargs.get("sliding_window")
    if window is None or causal:
        return None if window is None else int(window) - 1
    return int(getattr(getattr(module, "config", None), "sliding_window", None) or window - 1)


def _documents(kwargs: dict[str, Any], query: Tensor) -> tuple[Tensor, Tensor] | None:
    """The ends of the documents packed into one row, of queries and of keys, or None."""
    of_q: Any = kwargs.get("cu_seq_lens_q")
    of_k: Any = kwargs.get("cu_seq_lens_k")
    of_q, of_k = (of_k if of_q is None else of_q), (of_q if of_k is None else of_k)
    if of_q is None:
        return None
    if query.shape[0] != 1:
        raise ValueError(
            f"attention implementation {NAME!r} takes cu_seq_lens_q/cu_seq_lens_k for sequences packed into one row, "
            f"got a batch of {query.shape[0]}: pack them into one row, or pass an attention_mask instead"
        )
    return of_q, of_k


def _packed(
    documents: tuple[Tensor, Tensor], query: Tensor, key: Tensor, mask: Tensor | None, causal: bool
) -> Tensor:
    """The dense mask for documents packed into one row, on top of ``mask``."""
    q_length, kv_length = query.shape[2], key.shape[2]
    if causal and mask is None and q_length != kv_length:
        raise ValueError(
            f"attention implementation {NAME!r} got cu_seq_lens_q for {q_length} queries and cu_seq_lens_k for "
            f"{kv_length} keys in causal attention that the kernels do not take: pass a 4-D attention_mask instead"
        )
    if mask is not None and mask.dim() == 2:
        mask = masks.causal_keys_to_dense(mask, q_length)
    return masks.packed_to_dense(mask, *documents, q_length, kv_length, causal and q_length > 1)


def why_not_heads(head_size: int, dtype: torch.dtype) -> str | None:
    """Why the kernels do not take heads of this size and dtype, or None if they do."""
    low, high = attention_op.HEAD_SIZES
    if not low <= head_size <= high:
        return f"the kernels take heads of {low} to {high}, not {head_size}"
    return why_not_dtype(dtype)


def why_not_dtype(dtype: torch.dtype) -> str | None:
    """Why the kernels do not compute in this dtype, or None if they do."""
    return None if dtype in attention_op.DTYPES else f"the kernels take float32, bfloat16 and float16, not {dtype}"


def _why_not_op(mask: Tensor | None, query: Tensor, key: Tensor, kwargs: dict[str, Any]) -> str | None:
    """Why this call is not one of ``embedkernels.attention`` without a mask of all pairs, or None if it is."""
    if kwargs.get("position_bias") is not None:
        return "the kernels take no position_bias"
    if kwargs.get("cache") is not None:
        return "the kernels take no paged cache"
    if mask is not None and mask.dim() != 2:
        batch, keys = query.shape[0], key.shape[2]
        if mask.dtype != torch.bool or mask.shape[0] not in (1, batch) or tuple(mask.shape[1:]) != (1, 1, keys):
            return "a dense mask: not only causal and padding, or a model without a row in the table"
    return None


def _why_not_kernels(query: Tensor, key: Tensor, value: Tensor) -> str | None:
    """Why this call is not one that the kernels compute exactly, or None if it is."""
    if query.shape[-1] != value.shape[-1]:
        return f"queries have heads of {query.shape[-1]}, values of {value.shape[-1]}"
    if torch.jit.is_tracing():  # type: ignore[attr-defined]
        return "torch.jit is tracing"
    if needs_stock_autograd(query, key, value):
        return "torch.func or forward-mode AD differentiates it: the kernels have a backward formula only"
    return why_not_heads(query.shape[-1], query.dtype)


_said: set[str] = set()


def _warn_once(message: str) -> None:
    if message in _said or torch.compiler.is_compiling():
        return
    _said.add(message)
    warnings.warn(f"embedkernels: attention {message}", UserWarning, stacklevel=4)


def _run(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    scaling: float | None,
    causal: bool,
    documents: tuple[Tensor, Tensor] | None = None,
    window: int | None = None,
) -> Tensor:
    q_length, kv_length = query.shape[2], key.shape[2]
    key_mask, offset = None, 0
    if mask is None:
        causal = causal and q_length > 1
        if causal and kv_length > q_length and documents is None:
            # The first forward on an empty static cache: the keys behind the queries are not written yet.
            key, value = key[:, :, :q_length], value[:, :, :q_length]
    elif mask.dim() == 2:
        key_mask, causal, offset = mask, True, kv_length - q_length
    else:
        key_mask, causal = mask[:, 0, 0, :], False
    of_q, of_k = (None, None) if documents is None else documents
    if of_q is not None:
        offset = 0  # that of each document follows from its ends
    out = attention_op.attention(
        query,
        key,
        value,
        dropout_p=dropout,
        is_causal=causal,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
        key_mask=key_mask,
        query_offset=offset,
        window=None if window is None else (window, window),
        cu_seqlens_q=of_q,
        cu_seqlens_k=of_k,
    )
    return out.transpose(1, 2).contiguous()


def _run_in_ranges(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, dropout: float, scaling: float | None
) -> Tensor:
    ranges, keys = masks.split_ranges(mask, query.shape[2])
    out = attention_op.attention_in_ranges(
        query,
        key,
        value,
        ranges,
        key_mask=keys,
        dropout_p=dropout,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out.transpose(1, 2).contiguous()


AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, masks.attention_mask)

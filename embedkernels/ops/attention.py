"""Scaled dot-product attention with padding, causal order and dropout, and no mask of Sq·Sk in memory."""

from __future__ import annotations

import contextlib
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from embedkernels.ops import ids as id_errors
from embedkernels.ops.attention_checks import (
    autocast_dtype,
    check_documents,
    check_dtypes,
    check_heads,
    check_masks,
    check_shapes,
    check_tensors,
    checked_values,
    checked_window,
)
from embedkernels.ops.attention_documents import attention_by_document, can_be_read
from embedkernels.ops.backend import Backend, Choice, check_stock_autograd, choose, needs_stock_autograd
from embedkernels.ops.eager import any_requires_grad, apply, is_eager, shown_as
from embedkernels.ops.layout import empty_in_order_of
from embedkernels.reference import attention as reference

HEAD_SIZES = (16, 128)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# The kernels' offsets inside a tile are 32-bit: rows further apart than this are copied first.
_LARGEST_ROW_STRIDE = 1 << 24
# In float32 a normal number.
_SMALLEST_SCALE = 2.0**-126


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    key_mask: Tensor | None = None,
    key_lengths: Tensor | None = None,
    key_starts: Tensor | None = None,
    query_offset: int = 0,
    window: tuple[int | None, int | None] | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    backend: Backend | None = None,
) -> Tensor:
    r"""Scaled dot-product attention; the first arguments are those of ``scaled_dot_product_attention``.

    .. math:: \text{out} = \text{dropout}(\text{softmax}(\text{scale} \cdot q k^\top)) \, v

    over the keys that a query sees. A query that sees no key gives zeros, and gets and gives zero gradients. Keys
    that are masked for a whole batch row cost nothing where they lie before the first or after the last that counts.
    The Triton backend is deterministic, forward and backward. Forward-mode derivatives and the transforms of
    ``torch.func`` run on ``scaled_dot_product_attention``.

    Args:
        query: (B, H, Sq, D); float32, bfloat16 or float16. Any strides; copied only if the last is not 1.
        key, value: (B, Hkv, Sk, D), dtype and device of ``query``.
        attn_mask: boolean or additive mask, as for ``scaled_dot_product_attention``, which then computes the call.
            It excludes the masks below, ``query_offset``, ``window`` and ``cu_seqlens_q``.
        dropout_p: probability of dropping a weight, in [0, 1]. Applied whenever it is not 0: pass 0 in evaluation.
            Kept weights are scaled by 1/(1 - p).
        is_causal: query i sees the keys up to i + ``query_offset``.
        scale: factor of the scores, at most 2**100 in magnitude; None for 1/sqrt(D).
        enable_gqa: allow Hkv < H, H a multiple of Hkv: query head h reads key head h // (H / Hkv).
        key_mask: bool (B, Sk) or (1, Sk), True for keys that count, in any pattern.
        key_lengths: int32 or int64 (B,): only the keys in [start, start + length) count.
        key_starts: int32 or int64 (B,): the start of that range; 0 if None. Without lengths it ends at Sk.
        query_offset: position of the first query among the keys, for causal order and a window; may be negative.
        window: (left, right): query i sees the keys from i + ``query_offset`` - left to i + ``query_offset`` + right,
            each side 0 or more keys or None for no end. In causal order the right side is 0. Keys outside of all
            windows of a block of queries cost nothing.
        cu_seqlens_q: int32 or int64 (N + 1,): each row of the batch holds N documents, document d the queries
            [cu_seqlens_q[d], cu_seqlens_q[d + 1]). A query sees only keys of its document; pairs of two documents
            cost nothing but for those in a block with others. The last query of a document is at its last key, as
            in FlashAttention: order and window count from there, and ``query_offset`` must be 0. Tokens of no
            document see nothing. Ends must not decrease; on a GPU nobody looks, and others give wrong numbers, but
            nothing outside of the tensors is read or written.
        cu_seqlens_k: the same for the keys; ``cu_seqlens_q`` if None.
        backend: ``"triton"``, ``"torch"`` (which is ``scaled_dot_product_attention``) or None for the best there is.

    Returns:
        (B, H, Sq, D) in the dtype of ``query``; under autocast in its dtype. From the Triton backend a view of
        (B, Sq, H, D)-contiguous memory.

    Raises:
        IndexError: not from this op, which has no ids: what an earlier op has recorded on a GPU.
        TypeError: an argument of another type, or a tensor of a dtype that it cannot have.
        ValueError: shapes, devices or values that do not fit together.
        NotImplementedError: ``backend="triton"`` with a forward-mode tangent or within a transform of ``torch.func``.
        RuntimeError: ``backend="triton"`` for a call or on a device that it cannot serve; the message says why.

    Source: Dao, "FlashAttention-2: faster attention with better parallelism and work partitioning", 2023.

    Example:
        >>> import torch, embedkernels as ek
        >>> q = k = v = torch.randn(2, 4, 10, 16)
        >>> ek.attention(q, k, v, is_causal=True, key_lengths=torch.tensor([10, 7])).shape
        torch.Size([2, 4, 10, 16])
    """
    check_tensors(query, key, value)
    dropout_p, scale, query_offset = checked_values(dropout_p, scale, query_offset)
    window = checked_window(window)
    masks = (key_mask, key_lengths, key_starts)
    id_errors.begin_without_ids(query.device)
    stock = needs_stock_autograd(query, key, value, attn_mask if isinstance(attn_mask, Tensor) else None)
    if attn_mask is not None:
        if any(mask is not None for mask in (*masks, window, cu_seqlens_q, cu_seqlens_k)) or query_offset != 0:
            raise ValueError(
                "attention: attn_mask excludes key_mask, key_lengths, key_starts, query_offset, window and "
                "cu_seqlens_q: put them into attn_mask"
            )
        if backend == "triton":
            raise RuntimeError(
                "attention: backend 'triton' does not take attn_mask: use key_mask, or backend='torch'"
            )
        choose("attention", query.device, backend)  # raises for a backend that cannot be had
        if query.shape[1] == 0:  # kills the process in torch 2.11
            raise ValueError(f"attention: query must have at least 1 head with attn_mask, got {tuple(query.shape)}")
        with _implementations(stock):
            return F.scaled_dot_product_attention(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )
    check_shapes(query, key, value)
    check_masks(query, key, *masks)
    check_documents(query, cu_seqlens_q, cu_seqlens_k, query_offset)
    check_heads(query, key, enable_gqa)
    check_dtypes(query, key, value)
    if stock:
        check_stock_autograd("attention", query.device, backend)
    if stock or attention_backend(query, key, value, backend).backend == "torch":
        documents = (cu_seqlens_q, cu_seqlens_k)
        if cu_seqlens_q is not None and masks == (None, None, None) and can_be_read(query, key, value, *documents):
            return attention_by_document(
                query, key, value, cu_seqlens_q, cu_seqlens_k, dropout_p=dropout_p, is_causal=is_causal, scale=scale,
                window=window,
            )  # fmt: skip
        with _implementations(stock):
            return reference.sdpa(
                query, key, value, dropout_p, is_causal, scale,
                key_mask=key_mask, key_lengths=key_lengths, key_starts=key_starts, query_offset=query_offset,
                window=window, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k,
            )  # fmt: skip
    ranges, lower, upper = None, None, None
    if cu_seqlens_q is not None:
        ranges = _document_ranges(cu_seqlens_q, cu_seqlens_k, query.shape[2], key.shape[2], is_causal, window)
    else:
        # An order or a window that hides nothing costs masks for nothing. A right side is an order that begins later.
        lower, upper = reference.window_offsets(query.shape[2], key.shape[2], is_causal, query_offset, window)
    offsets = (upper is not None, query_offset if upper is None else upper, lower)
    return _on_kernels(query, key, value, masks, ranges, dropout_p, scale, offsets)


def attention_in_ranges(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    ranges: Tensor,
    *,
    key_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """:func:`attention` in which every query sees a range of keys, and neither its start nor its end ever decreases.

    Args:
        query, key, value, key_mask, dropout_p, scale, enable_gqa: as for :func:`attention`.
        ranges: int32 (B, 2, Sq + Sk) or (1, 2, Sq + Sk): of each query the first key, then of each key the first
            query that sees it; and the ends of these. The kernels trust that the two sides agree.

    Returns:
        (B, H, Sq, D).
    """
    if attention_backend(query, key, value).backend == "torch" or needs_stock_autograd(query, key, value):
        visible = reference.visible_in_ranges(ranges, query.shape[2])
        visible = visible if key_mask is None else visible & key_mask[:, None, None, :]
        return reference.masked_sdpa(query, key, value, visible, dropout_p, scale, enable_gqa)
    return _on_kernels(query, key, value, (key_mask, None, None), ranges, dropout_p, scale, (False, 0, None))


def _on_kernels(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    masks: tuple[Tensor | None, Tensor | None, Tensor | None],
    ranges: Tensor | None,
    dropout_p: float,
    scale: float | None,
    offsets: tuple[bool, int, int | None],
) -> Tensor:
    """A checked call; ``offsets`` as the op has them: whether there is an order, its offset, that of a window."""
    key_mask, key_lengths, key_starts = masks
    if torch.is_autocast_enabled(query.device.type):
        query, key, value = (x.to(autocast_dtype(x)) for x in (query, key, value))
    scale = query.shape[3] ** -0.5 if scale is None else scale
    # The kernels look for the highest score before they scale it: they need a scale above 0, and a normal number.
    if -_SMALLEST_SCALE < scale < _SMALLEST_SCALE:
        query, scale = query * scale, 1.0
    elif scale < 0:
        query, scale = -query, -scale
    bounds = None
    if any(mask is not None for mask in masks):
        if key_mask is not None:
            key_mask = key_mask.expand(query.shape[0], -1)
        call = _key_bounds if is_eager(*masks) else torch.ops.embedkernels.attention_key_bounds
        bounds = call(key_mask, key_starts, key_lengths, query.shape[0], key.shape[2])
    seed = None
    if dropout_p > 0:
        seed = torch.randint(0, 2**62, (1,), device=query.device)
    is_causal, query_offset, lower = offsets
    given = (
        query, key, value, bounds, key_mask, ranges, seed, scale, is_causal, query_offset, dropout_p, lower,
    )  # fmt: skip
    if not is_eager(*given[:7]):
        out: Tensor = torch.ops.embedkernels.attention_forward(*given)[0]
    elif any_requires_grad(query, key, value):
        out = apply(Attention, *given)
    else:
        out = _forward(*given)[0]
    return out


def _document_ranges(
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
    num_queries: int,
    num_keys: int,
    is_causal: bool,
    window: tuple[int | None, int | None] | None,
) -> Tensor:
    left, right = (None, None) if window is None else window
    of_q, of_k = cu_seqlens_q, cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
    call = _ranges if is_eager(of_q, of_k) else torch.ops.embedkernels.attention_ranges
    ranges: Tensor = call(of_q, of_k, num_queries, num_keys, left, 0 if is_causal else right)
    return ranges


def _implementations(stock: bool) -> contextlib.AbstractContextManager[None]:
    """SDPA's fused implementations have no forward-mode derivative, and it chooses them all the same."""
    tangents = stock and forward_ad._current_level >= 0
    return sdpa_kernel(SDPBackend.MATH) if tangents else contextlib.nullcontext()


def attention_backend(query: Tensor, key: Tensor, value: Tensor, backend: Backend | None = None) -> Choice:
    """The backend that a call without ``attn_mask`` takes, and why.

    Raises:
        RuntimeError: ``backend="triton"`` for a call that it cannot serve.
    """
    name, reason = _chosen(query.device, backend)
    if name == "torch":
        return Choice("torch", reason)
    problem = _unsupported(query, key, value)
    if problem is None:
        return Choice("triton", reason)
    if reason == "asked for":
        raise RuntimeError(f"attention: backend 'triton' cannot run this call: {problem}")
    _warn_once(problem)
    return Choice("torch", problem)


@torch.compiler.assume_constant_result
def _chosen(device: torch.device, backend: Backend | None) -> tuple[str, str]:
    """What the device gets, and why: a constant of a compiled graph, as what is installed is."""
    choice = choose("attention", device, backend)
    return choice.backend, choice.reason


def _unsupported(query: Tensor, key: Tensor, value: Tensor) -> str | None:
    """Why the kernels do not take this call, or None."""
    low, high = HEAD_SIZES
    head_size = query.shape[3]
    if not low <= head_size <= high:
        return f"head size {head_size} is not in {low} to {high}"
    if value.shape[3] != head_size:
        return f"value has head size {value.shape[3]}, query {head_size}"
    dtype = autocast_dtype(query)
    if dtype not in DTYPES:
        return f"{dtype} is not float32, bfloat16 or float16"
    batch, heads, num_queries, _ = query.shape
    if batch * heads * (max(num_queries, key.shape[2]) // 16 + 1) >= 1 << 31:
        return f"{batch} x {heads} heads of {max(num_queries, key.shape[2])} rows are more programs than a launch has"
    return _too_old(query.device) if query.device.type == "cuda" and torch.version.hip is None else None


_problems_of_devices: dict[torch.device, str | None] = {}


@torch.compiler.assume_constant_result
def _too_old(device: torch.device) -> str | None:
    if device not in _problems_of_devices:
        problem = None
        if (device.index or 0) < torch.cuda.device_count():  # fake tensors claim devices that are not there
            major, minor = torch.cuda.get_device_capability(device)
            problem = None if major >= 8 else f"compute capability {major}.{minor} is below 8.0"
        _problems_of_devices[device] = problem
    return _problems_of_devices[device]


_warned: set[str] = set()


def _warn_once(problem: str) -> None:
    if not torch.compiler.is_compiling() and problem not in _warned:
        _warned.add(problem)
        warnings.warn(f"attention runs on scaled_dot_product_attention: {problem}", stacklevel=4)


_library = torch.library.Library("embedkernels", "FRAGMENT")
_library.define(
    "attention_key_bounds(Tensor? key_mask, Tensor? key_starts, Tensor? key_lengths, SymInt batch, SymInt num_keys) "
    "-> Tensor"
)
_library.define(
    "attention_ranges(Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt num_queries, SymInt num_keys, SymInt? left, "
    "SymInt? right) -> Tensor"
)
_library.define(
    "attention_forward(Tensor query, Tensor key, Tensor value, Tensor? bounds, Tensor? key_mask, "
    "Tensor? ranges, Tensor? seed, float scale, bool is_causal, SymInt query_offset, float dropout_p, "
    "SymInt? window_offset=None) -> (Tensor out, Tensor lse)"
)
_library.define(
    "attention_backward(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse, Tensor? bounds, "
    "Tensor? key_mask, Tensor? ranges, Tensor? seed, float scale, bool is_causal, SymInt query_offset, "
    "float dropout_p, SymInt? window_offset, bool needs_query, bool needs_key_value) "
    "-> (Tensor dq, Tensor dk, Tensor dv)"
)


def _key_bounds_impl(
    key_mask: Tensor | None, key_starts: Tensor | None, key_lengths: Tensor | None, batch: int, num_keys: int
) -> Tensor:
    from embedkernels.kernels.attention_bounds import key_bounds

    given = next(x for x in (key_mask, key_starts, key_lengths) if x is not None)
    bounds = torch.empty((batch, 3), dtype=torch.int32, device=given.device)
    key_bounds(_unit(key_mask), key_starts, key_lengths, num_keys, bounds)
    return bounds


_key_bounds = shown_as("embedkernels::attention_key_bounds")(_key_bounds_impl)


def _ranges_impl(
    cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, num_queries: int, num_keys: int, left: int | None, right: int | None
) -> Tensor:
    from embedkernels.kernels.attention_ranges import document_ranges

    ranges = _empty_ranges(cu_seqlens_q, num_queries, num_keys)
    if cu_seqlens_q.dtype != cu_seqlens_k.dtype:
        cu_seqlens_q, cu_seqlens_k = cu_seqlens_q.long(), cu_seqlens_k.long()
    document_ranges(cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous(), num_queries, left, right, ranges)
    return ranges


def _empty_ranges(cu_seqlens: Tensor, num_queries: int, num_keys: int) -> Tensor:
    return cu_seqlens.new_empty((1, 2, num_queries + num_keys), dtype=torch.int32)


_ranges = shown_as("embedkernels::attention_ranges")(_ranges_impl)


def _forward_impl(query: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    id_errors.raise_pending(query.device)
    return _launch_forward(query, *rest)


def _launch_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: Tensor | None,
    key_mask: Tensor | None,
    ranges: Tensor | None,
    seed: Tensor | None,
    scale: float,
    is_causal: bool,
    query_offset: int,
    dropout_p: float,
    window_offset: int | None = None,
) -> tuple[Tensor, Tensor]:
    from embedkernels.kernels.attention_forward import forward

    out, lse = _forward_outputs(query)
    forward(
        _near(query), _near(key), _near(value), bounds, _unit(key_mask), ranges, seed, out, lse,
        scale=scale, is_causal=is_causal, query_offset=query_offset, window_offset=window_offset, dropout_p=dropout_p,
    )  # fmt: skip
    return out, lse


_forward = shown_as("embedkernels::attention_forward")(_launch_forward)


def _backward_impl(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    bounds: Tensor | None,
    key_mask: Tensor | None,
    ranges: Tensor | None,
    seed: Tensor | None,
    scale: float,
    is_causal: bool,
    query_offset: int,
    dropout_p: float,
    window_offset: int | None,
    needs_query: bool,
    needs_key_value: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    from embedkernels.kernels.attention_backward import backward

    dq, dk, dv = _backward_outputs(query, key, value, needs_query, needs_key_value)
    backward(
        _near(grad), _near(query), _near(key), _near(value), _near(out), lse.contiguous(),
        None if bounds is None else bounds.contiguous(), _unit(key_mask), ranges, seed,
        dq if needs_query else None, dk if needs_key_value else None, dv if needs_key_value else None,
        scale=scale, is_causal=is_causal, query_offset=query_offset, window_offset=window_offset, dropout_p=dropout_p,
    )  # fmt: skip
    return dq, dk, dv


_launch_backward = shown_as("embedkernels::attention_backward")(_backward_impl)


def _forward_outputs(query: Tensor) -> tuple[Tensor, Tensor]:
    batch, heads, length, head_size = query.shape
    out = query.new_empty((batch, length, heads, head_size)).transpose(1, 2)
    return out, query.new_empty((batch, heads, length), dtype=torch.float32)


def _backward_outputs(
    query: Tensor, key: Tensor, value: Tensor, needs_query: bool, needs_key_value: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients in the order of memory of their tensors; empty where they are not needed."""
    dq = empty_in_order_of(query) if needs_query else query.new_empty(0)
    dk, dv = (empty_in_order_of(x) if needs_key_value else x.new_empty(0) for x in (key, value))
    return dq, dk, dv


def _near(x: Tensor) -> Tensor:
    """``x`` as the kernels read it: a last stride of 1, and offsets within a tile that fit 32 bits."""
    near = x.stride(3) == 1 and (x.stride(2) < _LARGEST_ROW_STRIDE or x.shape[2] == 1)
    return x if near else x.contiguous()


def _unit(x: Tensor | None) -> Tensor | None:
    return x if x is None or x.stride(-1) == 1 else x.contiguous()


_library.impl("attention_key_bounds", _key_bounds_impl, "CompositeExplicitAutograd")
_library.impl("attention_ranges", _ranges_impl, "CompositeExplicitAutograd")
_library.impl("attention_forward", _forward_impl, "CompositeExplicitAutograd")
_library.impl("attention_backward", _backward_impl, "CompositeExplicitAutograd")


@torch.library.register_fake("embedkernels::attention_key_bounds", lib=_library)
def _key_bounds_fake(
    key_mask: Tensor | None,
    key_starts: Tensor | None,
    key_lengths: Tensor | None,
    batch: int,
    num_keys: int,  # noqa: ARG001
) -> Tensor:
    given = next(x for x in (key_mask, key_starts, key_lengths) if x is not None)
    return given.new_empty((batch, 3), dtype=torch.int32)


@torch.library.register_fake("embedkernels::attention_ranges", lib=_library)
def _ranges_fake(
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,  # noqa: ARG001
    num_queries: int,
    num_keys: int,
    left: int | None,  # noqa: ARG001
    right: int | None,  # noqa: ARG001
) -> Tensor:
    return _empty_ranges(cu_seqlens_q, num_queries, num_keys)


@torch.library.register_fake("embedkernels::attention_forward", lib=_library)
def _forward_fake(query, *_):  # type: ignore[no-untyped-def]
    return _forward_outputs(query)


@torch.library.register_fake("embedkernels::attention_backward", lib=_library)
def _backward_fake(grad, query, key, value, *rest):  # type: ignore[no-untyped-def]  # noqa: ARG001
    return _backward_outputs(query, key, value, *rest[-2:])


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    query, key, value, bounds, key_mask, ranges, seed, *ctx.settings = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(query, key, value, out, lse, bounds, key_mask, ranges, seed)


def _backward(ctx, grad, *_):  # type: ignore[no-untyped-def]
    nothing = (None,) * 9
    if grad is None:
        return None, None, None, *nothing
    needs_query, needs_key, needs_value = ctx.needs_input_grad[:3]
    saved = ctx.saved_tensors
    # What is to be differentiated again is recorded as an op.
    direct = is_eager(grad, *saved) and not torch.is_grad_enabled()
    call: Any = _launch_backward if direct else torch.ops.embedkernels.attention_backward
    dq, dk, dv = call(grad, *saved, *ctx.settings, needs_query, needs_key or needs_value)
    return dq if needs_query else None, dk if needs_key else None, dv if needs_value else None, *nothing


def _second_backward(ctx, *grads):  # type: ignore[no-untyped-def]
    raise NotImplementedError(
        "attention: the Triton backend has no second derivative: pass backend='torch' where one is needed"
    )


class Attention(torch.autograd.Function):
    """The op on plain tensors, as autograd records it."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        out, lse = _forward(*inputs)
        query, key, value, bounds, key_mask, ranges, seed, *ctx.settings = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(query, key, value, out, lse, bounds, key_mask, ranges, seed)
        return out

    backward = staticmethod(_backward)


torch.library.register_autograd(
    "embedkernels::attention_forward", _backward, setup_context=_setup_context, lib=_library
)
torch.library.register_autograd("embedkernels::attention_backward", _second_backward, lib=_library)

"""Rotary position embedding of query and key in one launch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from embedkernels.ops import ids as id_errors
from embedkernels.ops.arguments import checked_int
from embedkernels.ops.backend import Backend, check_stock_autograd, choose, needs_stock_autograd
from embedkernels.ops.eager import any_requires_grad, apply, is_eager, shown_as
from embedkernels.ops.layout import empty_in_order_of
from embedkernels.reference import rope as reference

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_DTYPES = (*KERNEL_DTYPES, torch.float64)


def rope(
    query: Tensor,
    key: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    *,
    rotary_dim: int | None = None,
    interleaved: bool = False,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor | None]:
    r"""Rotary position embedding (RoPE): every pair of elements of a head turned by its token's angles.

    .. math:: (a, b) \mapsto (a \cos - b \sin,\; b \cos + a \sin)

    Differentiable in ``query`` and ``key``, any number of times. Arithmetic is in fp32 (fp64 for double) and the
    result is rounded once, whatever the dtype of the tables. Tables that need a gradient, forward-mode derivatives
    and the transforms of ``torch.func`` run on PyTorch's own ops.

    Args:
        query: (B, H, S, D), float32, bfloat16, float16 or float64. Any strides; copied only if the last is not 1.
        key: (B, Hkv, S, D), dtype and device of ``query``; None for none.
        cos, sin: (B, S, R), (1, S, R) or (S, R), as transformers' rotary modules make them, or with R/2 columns: one
            entry for both elements of a pair. Of the dtype of ``query``, or float32.
        rotary_dim: R, how many elements of a head are turned, even; the others are copied. None: the tables' width.
        interleaved: pairs are neighbours, (0, 1), (2, 3) ... (GPT-J, Cohere); otherwise element i of the first half
            goes with element i of the second (Llama, GPT-NeoX).
        backend: ``"triton"``, ``"torch"`` or None for the best there is.

    Returns:
        The turned query and key (None without one), in their dtype. Their memory is contiguous as (B, S, H, D) where
        the input's is laid out in that order, else as (B, H, S, D).

    Raises:
        IndexError: not from this op, which has no ids: what an earlier op has recorded on a GPU.
        TypeError: an argument of another type, or a tensor of a dtype that it cannot have.
        ValueError: shapes, devices or values that do not fit together.
        NotImplementedError: ``backend="triton"`` with tables that need a gradient, a forward-mode tangent or within
            a transform of ``torch.func``.

    Source: Su et al., "RoFormer: enhanced transformer with rotary position embedding", 2021.

    Example:
        >>> import torch, embedkernels as ek
        >>> query, key = torch.randn(2, 4, 10, 16), torch.randn(2, 2, 10, 16)
        >>> angles = torch.arange(10.0)[:, None] * 10000 ** (-torch.arange(0, 16, 2) / 16)
        >>> query, key = ek.rope(query, key, angles.cos(), angles.sin(), rotary_dim=16)
        >>> query.shape, key.shape
        (torch.Size([2, 4, 10, 16]), torch.Size([2, 2, 10, 16]))
    """
    _check_tensors(query, key, cos, sin)
    cos, sin = (table[None] if table.dim() == 2 else table for table in (cos, sin))
    rotary_dim = _checked_rotary_dim(rotary_dim, query, cos)
    _check_tables(query, cos, sin, rotary_dim)
    id_errors.begin_without_ids(query.device)
    in_kernels = query.dtype in KERNEL_DTYPES
    if backend == "triton" and not in_kernels:
        raise TypeError(f"rope: backend 'triton' takes float32, bfloat16 or float16, got {query.dtype}")
    stock = needs_stock_autograd(query, key, cos, sin) or (
        torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad)
    )
    if stock:
        check_stock_autograd("rope", query.device, backend)
    if stock or not in_kernels or choose("rope", query.device, backend).backend == "torch":
        turned = reference.rotate(query, cos, sin, rotary_dim, interleaved)
        return turned, None if key is None else reference.rotate(key, cos, sin, rotary_dim, interleaved)
    turned, turned_key = _turn(query, key, cos, sin, rotary_dim, bool(interleaved), False)
    return turned, None if key is None else turned_key


def _check_tensors(query: Tensor, key: Tensor | None, cos: Tensor, sin: Tensor) -> None:
    for name, x, rank in (("query", query, (4,)), ("key", key, (4,)), ("cos", cos, (2, 3)), ("sin", sin, (2, 3))):
        if x is None and name == "key":
            continue
        if not isinstance(x, Tensor):
            raise TypeError(f"rope: {name} must be a Tensor, got {type(x).__name__}")
        if x.dim() not in rank:
            expected = "4-D (B, H, S, D)" if rank == (4,) else "3-D (B, S, R) or 2-D (S, R)"
            raise ValueError(f"rope: {name} must be {expected}, got shape {tuple(x.shape)}")
        if x.device != query.device:
            raise ValueError(f"rope: query is on {query.device}, {name} is on {x.device}")
    if query.dtype not in _DTYPES:
        raise TypeError(f"rope: query must be float32, bfloat16, float16 or float64, got {query.dtype}")
    if key is not None:
        if key.dtype != query.dtype:
            raise TypeError(f"rope: key must be {query.dtype} like query, got {key.dtype}")
        batch, _, length, head_size = query.shape
        if (key.shape[0], *key.shape[2:]) != (batch, length, head_size):
            raise ValueError(
                f"rope: key must be (B, Hkv, S, D) = ({batch}, Hkv, {length}, {head_size}) like query, "
                f"got {tuple(key.shape)}"
            )


def _checked_rotary_dim(rotary_dim: int | None, query: Tensor, cos: Tensor) -> int:
    rotary_dim = cos.shape[-1] if rotary_dim is None else checked_int(rotary_dim, "rotary_dim", "rope")
    if not 2 <= rotary_dim <= query.shape[3] or rotary_dim % 2:
        raise ValueError(
            f"rope: rotary_dim must be even and between 2 and the head size {query.shape[3]}, got {rotary_dim}"
        )
    return rotary_dim


def _check_tables(query: Tensor, cos: Tensor, sin: Tensor, rotary_dim: int) -> None:
    batch, _, length, _ = query.shape
    for name, table in (("cos", cos), ("sin", sin)):
        if table.shape[0] not in (1, batch) or table.shape[1] != length or (
            table.shape[2] not in (rotary_dim, rotary_dim // 2)
        ):  # fmt: skip
            raise ValueError(
                f"rope: {name} must be ({batch} or 1, {length}, {rotary_dim} or {rotary_dim // 2}), "
                f"got {tuple(table.shape)}"
            )
        if table.dtype not in (query.dtype, torch.float32):
            raise TypeError(f"rope: {name} must be {query.dtype} like query, or float32, got {table.dtype}")
    if cos.shape != sin.shape or cos.dtype != sin.dtype:
        raise ValueError(
            f"rope: cos and sin must have one shape and dtype, got {tuple(cos.shape)} {cos.dtype} and "
            f"{tuple(sin.shape)} {sin.dtype}"
        )


_library = torch.library.Library("embedkernels", "FRAGMENT")
_library.define(
    "rope(Tensor query, Tensor? key, Tensor cos, Tensor sin, int rotary_dim, bool interleaved, bool adjoint) "
    "-> (Tensor, Tensor)"
)


def _impl(
    query: Tensor, key: Tensor | None, cos: Tensor, sin: Tensor, rotary_dim: int, interleaved: bool, adjoint: bool
) -> tuple[Tensor, Tensor]:
    # The kernel trusts these: the op can be called without ``rope``.
    _check_tensors(query, key, cos, sin)
    _checked_rotary_dim(rotary_dim, query, cos)
    _check_tables(query, cos, sin, rotary_dim)
    id_errors.raise_pending(query.device)
    choose("rope", query.device, "triton")
    return _launch(query, key, cos, sin, rotary_dim, interleaved, adjoint)


def _launch(
    query: Tensor, key: Tensor | None, cos: Tensor, sin: Tensor, rotary_dim: int, interleaved: bool, adjoint: bool
) -> tuple[Tensor, Tensor]:
    from embedkernels.kernels import rope as kernels

    query_out, key_out = _outputs(query, key)
    if 0 in query.shape and (key is None or 0 in key.shape):
        return query_out, key_out
    if query.shape[1] == 0:  # key alone
        assert key is not None
        query, key, first, second = key, None, key_out, None
    else:
        first, second = query_out, None if key is None else key_out
    kernels.rope(
        first, second, _rows(query), None if key is None else _rows(key), _rows(cos), _rows(sin),
        rotary_dim=rotary_dim, interleaved=interleaved, adjoint=adjoint,
    )  # fmt: skip
    return query_out, key_out


_launch_shown = shown_as("embedkernels::rope")(_launch)


def _turn(query: Tensor, key: Tensor | None, *settings: Any) -> tuple[Tensor, Tensor]:
    """The op, without the dispatcher in eager mode. ``settings`` are its arguments from ``cos`` on."""
    if not is_eager(query, key, *settings[:2]):
        out: tuple[Tensor, Tensor] = torch.ops.embedkernels.rope(query, key, *settings)
    elif any_requires_grad(query, key):
        out = apply(Rope, query, key, *settings)
    else:
        out = _launch_shown(query, key, *settings)
    return out


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _outputs(query: Tensor, key: Tensor | None) -> tuple[Tensor, Tensor]:
    return empty_in_order_of(query), query.new_empty(0) if key is None else empty_in_order_of(key)


_library.impl("rope", _impl, "CompositeExplicitAutograd")


@torch.library.register_fake("embedkernels::rope", lib=_library)
def _fake(query, key, *_):  # type: ignore[no-untyped-def]
    return _outputs(query, key)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]  # noqa: ARG001
    _, key, cos, sin, ctx.rotary_dim, ctx.interleaved, ctx.adjoint = inputs
    ctx.has_key = key is not None
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(cos, sin)


def _backward(ctx, grad_query, grad_key):  # type: ignore[no-untyped-def]
    """The transposed map, which is this op again."""
    cos, sin = ctx.saved_tensors
    settings = (cos, sin, ctx.rotary_dim, ctx.interleaved, not ctx.adjoint)
    if not ctx.needs_input_grad[0]:
        grad_query = None
    if not ctx.has_key or not ctx.needs_input_grad[1]:
        grad_key = None
    if grad_query is None:
        if grad_key is not None:
            grad_key = _turn(grad_key, None, *settings)[0]
    else:
        grad_query, turned_key = _turn(grad_query, grad_key, *settings)
        grad_key = None if grad_key is None else turned_key
    return grad_query, grad_key, None, None, None, None, None


class Rope(torch.autograd.Function):
    """The op on plain tensors, as autograd records it."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        output = _launch_shown(*inputs)
        _setup_context(ctx, inputs, output)
        return output

    backward = staticmethod(_backward)


torch.library.register_autograd("embedkernels::rope", _backward, setup_context=_setup_context, lib=_library)

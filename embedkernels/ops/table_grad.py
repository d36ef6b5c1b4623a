"""What becomes of a table's gradient in eager mode: a dense tensor, a sum where the gradient is kept, or rows alone.

``Lookup`` is the autograd function behind ``embedkernels.embedding`` on plain tensors. Its plan is made in the
forward.
"""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from embedkernels.ops import embedding_grad as _grad
from embedkernels.ops.backend import Backend, choose
from embedkernels.ops.eager import is_eager
from embedkernels.ops.embedding_plan import EarlyPlan, EmbeddingPlan, early_plan, make_plan
from embedkernels.reference.embedding import ACCUMULATE, PADDED_ROWS, ROWS


@dataclass(frozen=True)
class Options:
    """Of one lookup: row without a gradient (-1: none), division by frequency, kind of gradient, backend, plan."""

    padding: int
    scale_by_freq: bool
    mode: _grad.Mode
    backend: Backend | None
    plan: EmbeddingPlan | None


class Lookup(torch.autograd.Function):
    """Rows of a table, by ``forward(weight, ids, backend)``."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, ids: Tensor, options: Options, forward: Callable[..., Tensor]) -> Tensor:
        ctx.options, ctx.num_rows, ctx.plan = options, weight.shape[0], None
        out = forward(weight, ids, options.backend)
        if options.plan is not None:
            ctx.plan = EarlyPlan(options.plan)
        else:
            # Kept as it is, not as saved tensors, whose hooks would read what another stream is still writing.
            ctx.plan = early_plan(ids, ctx.num_rows, options.padding, options.backend)
        if options.mode == "accumulate":
            ctx.weight = weight
        ctx.save_for_backward(ids)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, None]:
        exclusive = _is_ours_alone(grad)
        (ids,) = ctx.saved_tensors
        options = ctx.options
        mode = options.mode
        if mode == "accumulate":
            if not ctx.weight.requires_grad:  # frozen since
                return None, None, None, None
            reason = "it is transformed or compiled" if _is_transformed(grad) else _owned(ctx.weight)
            if reason is not None:
                warn_dense(reason)
                mode = "dense"
        if mode == "rows" and (torch.is_grad_enabled() or _is_transformed(grad)):
            raise NotImplementedError("embedding: a row-sparse gradient is not differentiable again; use a dense one")
        if mode == "dense" and (torch.is_grad_enabled() or not is_eager(grad, ids)):
            given = grad, ids, ctx.num_rows, options.padding, options.backend or "auto", options.scale_by_freq
            return torch.ops.embedkernels.embedding_backward(*given), None, None, None
        plan = None if ctx.plan is None else ctx.plan.ready()
        if mode == "dense":
            return _dense(grad, ids, plan, ctx.num_rows, options), None, None, None
        if plan is None:
            chosen = choose("embedding_grad", ids.device, options.backend).backend
            plan = make_plan(ids, ctx.num_rows, options.padding, backend=chosen)
        rows = grad.reshape(ids.numel(), grad.shape[-1])
        if mode == "accumulate":
            _accumulate_later(ctx.weight, rows if exclusive else rows.clone(), plan, options)
            return None, None, None, None
        return row_gradient(rows, plan, options), None, None, None


# What the engine and this backward make of a tensor's count: in torch 2.11 the Python object counts beside the
# engine's hold, in 2.13 and later the two are one. Where it is another number, gradients are copied.
_ALONE = 2 if torch.__version__.startswith("2.11.") else 1


def _is_ours_alone(grad: Tensor) -> bool:
    """Whether nothing but this backward holds ``grad`` or its memory.

    What others hold they may write to before the pass is over: autograd hands the memory of a gradient to the leaf
    that it is the last to reach, and adds to it there. The engine holds the tensor once, and each view of its memory,
    the one made to ask for it included, counts once.
    """
    try:
        alone: bool = grad._use_count() == _ALONE  # type: ignore[attr-defined]
        return alone and torch._C._storage_Use_Count(grad.untyped_storage()._cdata) == 2
    except AttributeError:
        return False


def _dense(grad: Tensor, ids: Tensor, plan: EmbeddingPlan | None, num_rows: int, options: Options) -> Tensor:
    if plan is None:
        backend = options.backend or "auto"
        return _grad.backward(grad, ids, num_rows, options.padding, backend, options.scale_by_freq)
    rows = grad.reshape(ids.numel(), grad.shape[-1])
    return _grad.dense_grad(rows, plan, scale_by_freq=options.scale_by_freq, backend=options.backend)


def row_gradient(rows: Tensor, plan: EmbeddingPlan, options: Options) -> Tensor:
    """As a sparse tensor: coalesced on a CPU, where the number of rows is known, else padded with zeros."""
    on_cpu = rows.device.type == "cpu"
    values = rows.new_empty((plan.capacity, rows.shape[1]))
    _grad.reduce_into(
        values, rows, plan, ROWS if on_cpu else PADDED_ROWS, scale_by_freq=options.scale_by_freq,
        backend=options.backend,
    )  # fmt: skip
    found = _grad.RowGradient(plan.segment_ids[: plan.capacity], values, plan.count, plan.num_rows)
    return found.to_sparse() if on_cpu else found.to_padded_sparse()


def _is_transformed(grad: Tensor) -> bool:
    """Whether the backward runs under vmap, is compiled, or on a subclass: then there is no end to be called at."""
    compiled = sys.modules.get("torch._dynamo.compiled_autograd")
    return (
        torch.compiler.is_compiling()
        or bool(getattr(compiled, "compiled_autograd_enabled", False))
        or torch._C._are_functorch_transforms_active()
        or type(grad) is not Tensor
    )


def _owned(weight: Tensor) -> str | None:
    """Why the gradient of ``weight`` must pass through autograd, or None if nothing but ``.grad`` waits for it.

    Hooks on the node that sets ``.grad`` cannot be seen from here, but a process group says that there may be some.
    """
    if not weight.is_leaf:
        return "the table is computed from other tensors"
    if weight._backward_hooks or getattr(weight, "_post_accumulate_grad_hooks", None):
        return "the table has gradient hooks"
    if torch.is_grad_enabled():
        return "the gradient is to be differentiated again"
    # DDP and FSDP read gradients from hooks in C++, with one process as with many.
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return "torch.distributed may reduce the gradient"
    node = torch.autograd.graph.get_gradient_edge(weight).node
    try:
        collected = torch._C._will_engine_execute_node(node)
    except RuntimeError:  # torch.autograd.grad asks for the table's gradient itself
        collected = False
    return None if collected else "torch.autograd.grad asks for it"


_warned: set[str] = set()
_adding = threading.Lock()


@torch.compiler.assume_constant_result
def warn_dense(reason: str) -> None:
    """Say once per reason that gradients are dense and not added in place; also while a graph is made."""
    if reason not in _warned:
        _warned.add(reason)
        warnings.warn(
            f"embedkernels: grad_mode='accumulate' makes a dense gradient: {reason}", UserWarning, stacklevel=3
        )


def _accumulate_later(weight: Tensor, rows: Tensor, plan: EmbeddingPlan, options: Options) -> None:
    """Add to the table's gradient once autograd has put there what the table's other uses give.

    A tied head's gradient waits in the engine until the last use of the table has had its turn, which may be this
    lookup. At the end of the pass it is in ``.grad``, and this lookup's share needs no memory of its own.
    """
    stream = torch.cuda.current_stream(rows.device) if rows.device.type == "cuda" else None

    def add() -> None:
        if stream is not None:
            current = torch.cuda.current_stream(rows.device)
            if current != stream:
                current.wait_stream(stream)
                for tensor in (rows, *plan.parts):
                    tensor.record_stream(current)
        # Threads may run backward passes at the same time.
        with torch.no_grad(), _adding:
            _add(weight, rows, plan, options)

    torch.autograd.Variable._execution_engine.queue_callback(add)


def _add(weight: Tensor, rows: Tensor, plan: EmbeddingPlan, options: Options) -> None:
    main_grad = getattr(weight, "main_grad", None)
    kept_elsewhere = isinstance(main_grad, Tensor)
    if isinstance(main_grad, Tensor) and main_grad.shape != weight.shape:
        raise ValueError(
            f"embedding: main_grad must have the table's shape, {tuple(weight.shape)}, got {tuple(main_grad.shape)}"
        )
    into: Tensor | None = main_grad if kept_elsewhere else weight.grad
    how: dict[str, Any] = {"scale_by_freq": options.scale_by_freq, "backend": options.backend}
    if into is None:
        weight.grad = _grad.dense_grad(rows, plan, **how)
    elif _takes_rows(into, rows):
        _grad.reduce_into(into, rows, plan, ACCUMULATE, **how)
    else:
        total = _grad.dense_grad(rows, plan, **how) + into  # a sparse tensor can only be added to a dense one
        if kept_elsewhere:
            into.copy_(total)  # whoever made it keeps it
        else:
            weight.grad = total.to(into.dtype)
    if kept_elsewhere and hasattr(weight, "grad_added_to_main_grad"):
        weight.grad_added_to_main_grad = True


def _takes_rows(into: Tensor, rows: Tensor) -> bool:
    if (
        type(into) is not Tensor
        or into.layout != torch.strided
        or not into.is_contiguous()
        or into.device != rows.device
    ):
        return False
    return into.dtype == rows.dtype or {into.dtype, rows.dtype} in (
        {torch.float32, torch.bfloat16},
        {torch.float32, torch.float16},
    )

"""What becomes of a table's gradient in eager mode: a dense tensor, a sum where the gradient is kept, or rows alone.

``Lookup`` is the autograd function behind ``embedkernels.embedding`` on plain tensors. Its plan is made in the
forward.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from embedkernels.ops import embedding_grad as _grad
from embedkernels.ops.backend import Backend, choose
from embedkernels.ops.embedding_plan import EarlyPlan, EmbeddingPlan, early_plan
from embedkernels.reference.embedding import ACCUMULATE, PADDED_ROWS, ROWS


@dataclass(frozen=True)
class Options:
    """Of one lookup: row without a gradient (-1: none), division by frequency, kind of gradient, backend, plan."""

    padding: int
    scale_by_freq: bool
    mode: _grad.Mode
    backend: Backend | None
    plan: EmbeddingPlan | None


def plans_early(device: torch.device, backend: str | None) -> Backend | None:
    """The gradient's backend if it works from a plan; PyTorch's own CPU kernel does not."""
    chosen = choose("embedding_grad", device, backend).backend
    return None if chosen == "torch" and device.type == "cpu" else chosen


def traced_plan(ids: Tensor, num_rows: int, padding: int, backend: str) -> tuple[Tensor, ...]:
    """A plan's parts by an op, where a graph is made or an op is called by its name; none if none is needed."""
    if plans_early(ids.device, backend) is None or ids.numel() == 0:
        return ()
    made: tuple[Tensor, ...] = torch.ops.embedkernels.embedding_plan(ids, num_rows, padding, 0, None, backend)
    return made


class Lookup(torch.autograd.Function):
    """Rows of a table, by ``forward(weight, ids, backend)``."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, ids: Tensor, options: Options, forward: Callable[..., Tensor]) -> Tensor:
        ctx.options, ctx.num_rows, ctx.plan = options, weight.shape[0], None
        out = forward(weight, ids, options.backend)
        if options.plan is not None:
            ctx.plan = EarlyPlan(options.plan)
        elif ids.numel() > 0 and (chosen := plans_early(ids.device, options.backend)) is not None:
            # Kept as it is, not as saved tensors, whose hooks would read what another stream is still writing.
            ctx.plan = early_plan(ids, ctx.num_rows, options.padding, chosen)
        if options.mode == "accumulate":
            ctx.weight = weight
        ctx.save_for_backward(ids)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, None]:
        (ids,) = ctx.saved_tensors
        options = ctx.options
        mode = options.mode
        if mode == "accumulate" and (reason := _owned(ctx.weight)) is not None:
            warn_dense(reason)
            mode = "dense"
        if mode == "rows" and torch.is_grad_enabled():
            raise NotImplementedError("embedding: a row-sparse gradient is not differentiable again; use a dense one")
        plan = None if ctx.plan is None else ctx.plan.ready()
        if mode == "dense":
            return _dense(grad, ids, plan, ctx.num_rows, options), None, None, None
        if plan is None:
            plan = early_plan(ids, ctx.num_rows, options.padding, "torch").ready()
        rows = grad.reshape(ids.numel(), grad.shape[-1])
        if mode == "accumulate":
            _accumulate_later(ctx.weight, rows, plan, options)
            return None, None, None, None
        return row_gradient(rows, plan, options), None, None, None


def _dense(grad: Tensor, ids: Tensor, plan: EmbeddingPlan | None, num_rows: int, options: Options) -> Tensor:
    again = torch.is_grad_enabled()
    if plan is not None:
        rows = grad.reshape(ids.numel(), grad.shape[-1])
        return _grad.dense_grad(rows, plan, scale_by_freq=options.scale_by_freq, backend=options.backend)
    given = grad, ids, num_rows, options.padding, options.backend or "auto", options.scale_by_freq
    out: Tensor = torch.ops.embedkernels.embedding_backward(*given) if again else _grad.backward(*given)
    return out


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


def _owned(weight: Tensor) -> str | None:
    """Why the gradient of ``weight`` must pass through autograd, or None if nothing but ``.grad`` waits for it."""
    if not weight.is_leaf:
        return "the table is computed from other tensors"
    if weight._backward_hooks or getattr(weight, "_post_accumulate_grad_hooks", None):
        return "the table has gradient hooks"
    if torch.is_grad_enabled():
        return "the gradient is to be differentiated again"
    # The hooks of DDP and FSDP are in C++, where they cannot be seen.
    if (
        torch.distributed.is_available()
        and torch.distributed.is_initialized()
        and torch.distributed.get_world_size() > 1
    ):
        return "torch.distributed may reduce the gradient"
    node = torch.autograd.graph.get_gradient_edge(weight).node
    try:
        collected = torch._C._will_engine_execute_node(node)
    except RuntimeError:  # torch.autograd.grad asks for the table's gradient itself
        collected = False
    return None if collected else "torch.autograd.grad asks for it"


_warned: set[str] = set()


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
        with torch.no_grad():
            _add(weight, rows, plan, options)

    torch.autograd.Variable._execution_engine.queue_callback(add)


def _add(weight: Tensor, rows: Tensor, plan: EmbeddingPlan, options: Options) -> None:
    main_grad = getattr(weight, "main_grad", None)
    kept_elsewhere = isinstance(main_grad, Tensor)
    into: Tensor | None = main_grad if kept_elsewhere else weight.grad
    how: dict[str, Any] = {"scale_by_freq": options.scale_by_freq, "backend": options.backend}
    if into is None:
        weight.grad = _grad.dense_grad(rows, plan, **how)
    elif _takes_rows(into, rows):
        _grad.reduce_into(into, rows, plan, ACCUMULATE, **how)
    else:
        total = into + _grad.dense_grad(rows, plan, **how)
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

"""Whether a module may take its fused forward now: nothing that watches or changes the parts it bypasses is skipped.

The fused forward reads the parts' parameters and never calls the parts. Anything that relies on such a call (a hook,
a wrapper, a parametrisation, a replaced forward) or changes what the part computes sends the module to its stock
forward. The checks run at every forward and cost a few microseconds.
"""

from __future__ import annotations

import warnings
import weakref
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as _torch_module

from embedkernels.hf import state
from embedkernels.hf.adapters import Adapter, adapter_for
from embedkernels.hf.positions import position_table, rows
from embedkernels.nn.embedding import FusedEmbedding
from embedkernels.ops.backend import makes_a_program, needs_stock_autograd
from embedkernels.ops.embedding_grad import DTYPES

_HOOKS = (
    ("_forward_hooks", "a forward hook"),
    ("_forward_pre_hooks", "a forward pre-hook"),
    ("_backward_hooks", "a backward hook"),
    ("_backward_pre_hooks", "a backward pre-hook"),
)
PLAIN = (nn.Parameter, torch.Tensor)


def looks_up_plainly(part: Any) -> bool:
    """Whether a part is an nn.Embedding, ours or PyTorch's, and of no other class."""
    cls = type(part)
    return cls is nn.Embedding or cls is FusedEmbedding or cls.__dict__.get("_embedkernels_stock") is nn.Embedding


# What ``gradient_checkpointing_enable`` and ``enable_input_require_grads`` hook to the token table: a function that
# sets requires_grad on the output. The fused forward does the same (``embedkernels.hf.fused``).
_REQUIRE_GRADS = "PreTrainedModel.enable_input_require_grads.<locals>.make_inputs_require_grads"


def only_require_grads(hooks: Any) -> bool:
    """Whether hooks on a token table do no more than ask for gradients of its output."""
    return all(
        getattr(hook, "__qualname__", "") == _REQUIRE_GRADS and hook.__module__ == "transformers.modeling_utils"
        for hook in hooks.values()
    )


def _watched(part: Any, name: str) -> str | None:
    """Why calls of ``part`` may not be bypassed."""
    # Every nn.Module has these four; one expression, because it runs for every part at every forward.
    if part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks or part._forward_hooks:
        others = part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks
        if not others and only_require_grads(part._forward_hooks):
            return None
        return f"{name} has {next(what for attribute, what in _HOOKS if getattr(part, attribute))}"
    if "forward" in part.__dict__:
        return f"{name}.forward was replaced on the instance"
    return None


def _not_a(stock: type, part: Any, name: str) -> str:
    if part is None:
        return f"{name} is missing"
    cls = type(part)
    return f"{name} is a {cls.__module__}.{cls.__qualname__}, not an nn.{stock.__name__}"


def embedding_problem(part: Any, name: str, adapter: Adapter) -> str | None:
    """Why the lookup in ``part`` is not one that a fused forward does, or None if it is."""
    if not looks_up_plainly(part) and not (adapter.recipe == "inline" and _known(part, name == adapter.positions)):
        return _not_a(nn.Embedding, part, name)
    reason = _unusual(part, name) if isinstance(part, nn.Embedding) else None
    if reason is not None:
        return reason
    weight = rows(part)
    if type(weight) not in PLAIN:
        return f"{name}.weight is a {type(weight).__name__}, not a plain parameter"
    return None


def _known(part: Any, positions: bool) -> bool:
    """Whether an inline model's table is of a class whose forward has a row."""
    if positions:
        row = position_table(type(part))
        return row is not None and (row.learned or not rows(part).requires_grad)
    scaled = adapter_for(getattr(type(part), "_embedkernels_stock", type(part)))
    return scaled is not None and scaled.recipe == "scaled"


def lookup_problem(part: Any, ids: torch.Tensor | None = None) -> str | None:
    """Why a patched table must run its stock forward now, or None if it may run the fused one.

    Args:
        part: an nn.Embedding.
        ids: what is looked up; None for anything.
    """
    if part.max_norm is not None:
        return "it uses max_norm"
    if ids is not None and ids.is_nested:
        return "its ids are a nested tensor"
    return _table_problem(part)


def scaled_problem(part: Any) -> str | None:
    """The same for a table that multiplies its rows, whose op has a dense gradient alone."""
    return _unusual(part, "it") or _table_problem(part)


def _unusual(part: Any, name: str) -> str | None:
    if part.max_norm is not None or part.scale_grad_by_freq or part.sparse:
        return f"{name} uses max_norm, scale_grad_by_freq or sparse"
    return None


def _table_problem(part: Any) -> str | None:
    weight = part.weight
    # Subclasses of Tensor bring their own implementation of F.embedding, and none of our op.
    if type(weight) not in PLAIN:
        return f"its weight is a {type(weight).__name__}, not a plain parameter"
    if weight.dtype not in DTYPES:
        return f"its weight is of {weight.dtype}"
    if needs_stock_autograd(weight):
        return "torch.func or forward-mode AD differentiates it: the fused op has a backward formula only"
    if makes_a_program():
        return "torch.jit or torch.export traces: what it makes should run without embedkernels"
    return None


def unfit(module: nn.Module, adapter: Adapter) -> str | None:
    """Why a module can never be fused.

    A part is of a class of transformers' own, not of PyTorch's, or the configuration asks for what the fused forward
    does not do.
    """
    reason = _ruled_out(module, adapter)
    if reason is not None:
        return reason
    for name in (*adapter.tables, adapter.norm, adapter.dropout):
        part = None if name is None else module._modules.get(name)
        if name in adapter.tables and adapter.recipe == "inline" and _known(part, name == adapter.positions):
            continue
        if part is not None and type(part).__module__.startswith("transformers."):
            return f"{name} is a {type(part).__qualname__}, not one of PyTorch's own"
    return None


def _ruled_out(module: nn.Module, adapter: Adapter) -> str | None:
    """What the configuration asks for that the fused forward does not do, or None."""
    for setting in adapter.off:
        if getattr(module, setting, None):
            return f"{setting} is set"
    for setting in adapter.on:
        if not getattr(module, setting) and module._modules.get(str(adapter.positions)) is not None:
            return f"{setting} is not set"
    return None


def _global_hooks() -> bool:
    return bool(
        _torch_module._global_forward_hooks
        or _torch_module._global_forward_pre_hooks
        or _torch_module._global_backward_hooks
        or _torch_module._global_backward_pre_hooks
    )


def problem(module: nn.Module, adapter: Adapter) -> str | None:
    """Why ``module`` must take its stock forward now, or None if it may take the fused one.

    Args:
        module: of the adapter's stock class or of its fused subclass; recipe ``"stem"`` or ``"inline"``.
        adapter: its row of the table.
    """
    if _global_hooks():
        return "a hook on all modules is registered (torch.nn.modules.module.register_module_*_hook)"
    parts: dict[str, Any] = module._modules
    ruled_out = _ruled_out(module, adapter)
    if ruled_out is not None:
        return ruled_out
    dtype, device = None, None
    read: list[torch.Tensor] = []
    for name in adapter.tables:
        part: Any = parts.get(name)
        if part is None and name in adapter.optional:
            continue
        reason = embedding_problem(part, name, adapter) or _watched(part, name)
        if reason is not None:
            return reason
        weight = rows(part)
        read.append(weight)
        if dtype is None:
            dtype, device = weight.dtype, weight.device
        elif weight.dtype != dtype or weight.device != device:
            return f"{name} differs in dtype or device from {adapter.tokens}"
        if name == adapter.types and part.padding_idx is not None:
            return f"{name} has a padding_idx"
    norm = parts.get(str(adapter.norm))
    if adapter.norm is not None and not (norm is None and adapter.norm in adapter.optional):
        if type(norm) is not nn.LayerNorm:
            return _not_a(nn.LayerNorm, norm, adapter.norm)
        reason = _watched(norm, adapter.norm)
        if reason is not None:
            return reason
        parameters: tuple[Any, ...] = (norm.weight, norm.bias)
        for parameter in parameters:
            if parameter is None:
                continue
            if type(parameter) not in PLAIN:
                return f"{adapter.norm} has a parameter of type {type(parameter).__name__}"
            if parameter.dtype != dtype or parameter.device != device:
                return f"{adapter.norm} differs in dtype or device from {adapter.tokens}"
            read.append(parameter)
    if adapter.dropout is not None:
        dropout = parts.get(adapter.dropout)
        if dropout is None and isinstance(module.__dict__.get(adapter.dropout), int | float):
            dropout = _NUMBER
        if type(dropout) is not nn.Dropout:
            return _not_a(nn.Dropout, dropout, adapter.dropout)
        reason = _watched(dropout, adapter.dropout)
        if reason is not None:
            return reason
    if makes_a_program():
        return "torch.jit or torch.export traces: what it makes should run without embedkernels"
    if needs_stock_autograd(*read):
        return "torch.func or forward-mode AD differentiates it: the fused op has a backward formula only"
    if adapter.recipe == "stem":
        return state.ids_problem(module)
    return None


_NUMBER = nn.Dropout(0.0)  # stands for a probability, which nothing can watch
_warned: weakref.WeakKeyDictionary[nn.Module, set[str]] = weakref.WeakKeyDictionary()


def warn_once(module: nn.Module, what: str, reason: str) -> None:
    """Say once per module and reason that it takes its stock forward."""
    if torch.compiler.is_compiling():
        return
    said = _warned.setdefault(module, set())
    if reason in said:
        return
    said.add(reason)
    warnings.warn(f"embedkernels: {what} runs its stock forward: {reason}", UserWarning, stacklevel=4)

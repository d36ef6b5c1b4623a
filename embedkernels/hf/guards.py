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
from embedkernels.hf.adapters import Adapter
from embedkernels.nn.embedding import FusedEmbedding
from embedkernels.ops.backend import needs_stock_autograd

_HOOKS = (
    ("_forward_hooks", "a forward hook"),
    ("_forward_pre_hooks", "a forward pre-hook"),
    ("_backward_hooks", "a backward hook"),
    ("_backward_pre_hooks", "a backward pre-hook"),
)
_PLAIN = (nn.Parameter, torch.Tensor)


def _looks_up_plainly(cls: type) -> bool:
    return cls is nn.Embedding or cls is FusedEmbedding or cls.__dict__.get("_embedkernels_stock") is nn.Embedding


# What ``gradient_checkpointing_enable`` and ``enable_input_require_grads`` hook to the token table: a function that
# sets requires_grad on the output. The fused forward does the same (``embedkernels.hf.fused``).
_REQUIRE_GRADS = "PreTrainedModel.enable_input_require_grads.<locals>.make_inputs_require_grads"


def _only_require_grads(hooks: Any) -> bool:
    return all(
        getattr(hook, "__qualname__", "") == _REQUIRE_GRADS and hook.__module__ == "transformers.modeling_utils"
        for hook in hooks.values()
    )


def _watched(part: Any, name: str) -> str | None:
    """Why calls of ``part`` may not be bypassed."""
    # Every nn.Module has these four; one expression, because it runs for every part at every forward.
    if part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks or part._forward_hooks:
        others = part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks
        if not others and _only_require_grads(part._forward_hooks):
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


def embedding_problem(part: Any, name: str) -> str | None:
    """Why the lookup in ``part`` is not a plain one, or None if it is."""
    if not _looks_up_plainly(type(part)):
        return _not_a(nn.Embedding, part, name)
    if part.max_norm is not None or part.scale_grad_by_freq or part.sparse:
        return f"{name} uses max_norm, scale_grad_by_freq or sparse"
    if type(part.weight) not in _PLAIN:
        return f"{name}.weight is a {type(part.weight).__name__}, not a plain parameter"
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
    dtype, device = None, None
    read: list[torch.Tensor] = []
    for name in adapter.tables:
        part: Any = parts.get(name)
        reason = embedding_problem(part, name) or _watched(part, name)
        if reason is not None:
            return reason
        weight = part.weight
        read.append(weight)
        if dtype is None:
            dtype, device = weight.dtype, weight.device
        elif weight.dtype != dtype or weight.device != device:
            return f"{name} differs in dtype or device from {adapter.tokens}"
    if adapter.norm is not None:
        norm = parts.get(adapter.norm)
        if type(norm) is not nn.LayerNorm:
            return _not_a(nn.LayerNorm, norm, adapter.norm)
        reason = _watched(norm, adapter.norm)
        if reason is not None:
            return reason
        for parameter in (norm.weight, norm.bias):
            if type(parameter) not in _PLAIN:
                return f"{adapter.norm} has a parameter of type {type(parameter).__name__}"
            if parameter.dtype != dtype or parameter.device != device:
                return f"{adapter.norm} differs in dtype or device from {adapter.tokens}"
            read.append(parameter)
    if adapter.dropout is not None:
        dropout = parts.get(adapter.dropout)
        if type(dropout) is not nn.Dropout:
            return _not_a(nn.Dropout, dropout, adapter.dropout)
        reason = _watched(dropout, adapter.dropout)
        if reason is not None:
            return reason
    if torch.jit.is_tracing():  # type: ignore[attr-defined]
        return "torch.jit is tracing: the traced model should run without embedkernels"
    if needs_stock_autograd(*read):
        return "torch.func or forward-mode AD differentiates it: the fused op has a backward formula only"
    if adapter.recipe == "stem":
        return state.ids_problem(module)
    return None


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

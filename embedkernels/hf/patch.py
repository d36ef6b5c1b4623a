"""``patch(model)`` and ``unpatch(model)``: fused embeddings and attention in place, and back."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from embedkernels.hf import attention as hf_attention
from embedkernels.hf import fused, guards
from embedkernels.hf.adapters import Adapter, family_of, supported
from embedkernels.hf.report import Entry, OpChoice, PatchReport, Status
from embedkernels.nn.embedding import FusedEmbedding
from embedkernels.ops.backend import choose

# Implementations that a user gets without asking; any other was chosen by name and stays.
_REPLACED = ("sdpa", "eager")
_RECORD = "_embedkernels_attention_before"


@dataclass(frozen=True)
class _Before:
    """The attention implementation that ``patch`` replaced.

    A class of this module, so that unpickling a patched model registers the attention implementation it names.
    """

    implementation: str


@dataclass
class _Step:
    """What to do with one module: its entry in the report, whether to change it, and who shares its configuration."""

    entry: Entry
    module: nn.Module
    change: bool
    sharing: tuple[nn.Module, ...] = ()


def patch(model: nn.Module, *, embeddings: bool = True, attention: bool = True, strict: bool = False) -> PatchReport:
    """Fuse the input embeddings and the attention of a Hugging Face model, in place.

    Modules keep their parameters, buffers, names, hooks, ``state_dict`` and ``isinstance``; their ``__class__``
    becomes a subclass of the stock class. A module that something hooks, wraps or parametrises runs its stock
    forward, with one warning. Patching a patched model changes nothing and reports the present state.

    Args:
        model: a Hugging Face model, or any module that contains some.
        embeddings: fuse the input embeddings.
        attention: set the attention implementation ``"embedkernels"`` where ``"sdpa"`` or ``"eager"`` is set.
        strict: raise instead of warning if there is nothing to patch.

    Returns:
        PatchReport: what was changed, where each op runs and why, and what was left alone and why.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: with ``strict``, no part of the model is supported.

    Example:
        >>> import embedkernels as ek, transformers
        >>> config = transformers.BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
        >>> report = ek.patch(transformers.BertModel(config))
        >>> report.active
        True
    """
    steps = list(_plan(_module(model, "patch"), embeddings, attention))
    found = [step for step in steps if step.entry.status != "left alone"]
    if not found and (embeddings or attention):
        message = _unsupported(model, [step.entry for step in steps])
        if strict:
            raise ValueError(message)
        warnings.warn(f"embedkernels: {message}", UserWarning, stacklevel=2)
    for step in steps:
        if step.change:
            _apply(step)
    return PatchReport(type(model).__name__, tuple(step.entry for step in steps))


def describe(model: nn.Module) -> PatchReport:
    """The present state of a model as a report, without changing it.

    Args:
        model: any module; entries that ``patch`` would change have the status ``"left alone"``.

    Raises:
        TypeError: ``model`` is not a module.
    """
    entries = []
    for step in _plan(_module(model, "describe"), True, True):
        entry = step.entry
        if step.change:
            entry = Entry(entry.path, entry.part, entry.was, entry.was, "left alone", "not patched")
        entries.append(entry)
    return PatchReport(type(model).__name__, tuple(entries))


def unpatch(model: nn.Module) -> None:
    """Undo :func:`patch`: stock classes and the attention implementation that was set before.

    Args:
        model: the patched model, or a module that contains it. A model that is not patched stays as it is.

    Raises:
        TypeError: ``model`` is not a module.
    """
    for module in _module(model, "unpatch").modules():
        if fused.is_fused(module):
            module.__class__ = fused.stock_class(module)
        before = module.__dict__.pop(_RECORD, None)
        if before is None or not isinstance(module, PreTrainedModel):
            continue
        if module.config._attn_implementation == hf_attention.NAME:
            module.set_attn_implementation(before.implementation)


def _module(model: Any, function: str) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function}: model must be a torch.nn.Module, got {type(model).__name__}")
    return model


def _unsupported(model: nn.Module, entries: list[Entry]) -> str:
    reasons = "; ".join(f"{e.path or type(model).__name__} {e.part}: {e.reason}" for e in entries)
    return (
        f"nothing to patch in {type(model).__name__}: supported are the embeddings and the attention of {supported()}"
        + (f" ({reasons})" if reasons else "")
    )


def _apply(step: _Step) -> None:
    if step.entry.part == "embeddings":
        step.module.__class__ = fused.fused_class(fused.stock_class(step.module))
        return
    module = step.module
    assert isinstance(module, PreTrainedModel)
    before = module.config._attn_implementation
    module.set_attn_implementation(hf_attention.NAME)
    for one in step.sharing:
        one.__dict__[_RECORD] = _Before(before)


def _plan(model: nn.Module, embeddings: bool, attention: bool) -> Iterator[_Step]:
    if embeddings:
        yield from _plan_embeddings(model)
    if attention:
        yield from _plan_attention(model)


def _plan_embeddings(model: nn.Module) -> Iterator[_Step]:
    covered: set[int] = set()
    for path, module in model.named_modules():
        adapter = fused.adapter_of(module)
        if adapter is None:
            continue
        if adapter.recipe == "lookup":
            tokens = module._modules.get(adapter.tokens)
            covered.add(id(tokens))
            yield _plan_lookup(f"{path}.{adapter.tokens}".lstrip("."), module, adapter, tokens)
            continue
        covered.update(id(part) for part in module.children())
        reason = "forward was replaced on the instance" if "forward" in module.__dict__ else None
        yield _embedding_step(path, module, adapter, reason, guards.problem(module, adapter))
    for path, module in model.named_modules():
        if isinstance(module, nn.Embedding) and id(module) not in covered and not fused.is_fused(module):
            name = type(module).__name__
            yield _Step(Entry(path, "embeddings", name, name, "left alone", "no adapter looks it up"), module, False)


def _plan_lookup(path: str, parent: nn.Module, adapter: Adapter, tokens: nn.Module | None) -> _Step:
    if tokens is None:
        entry = Entry(path, "embeddings", type(parent).__name__, "-", "left alone", f"{adapter.tokens} is missing")
        return _Step(entry, parent, False)
    reason = guards.embedding_problem(tokens, adapter.tokens)
    if reason is None and "forward" in tokens.__dict__:
        reason = f"{adapter.tokens}.forward was replaced on the instance"
    return _embedding_step(path, tokens, adapter, reason, None)


def _embedding_step(path: str, module: nn.Module, adapter: Adapter, never: str | None, not_now: str | None) -> _Step:
    """A step for a module that can never be fused, that cannot at present, or that can."""
    stock = fused.stock_class(module).__name__
    already = fused.is_fused(module) or isinstance(module, FusedEmbedding)
    if never is not None and not already:
        return _Step(Entry(path, "embeddings", stock, stock, "left alone", never), module, False)
    status: Status = "already" if already else "patched"
    if not_now is not None:
        status = "falls back"
    ops = () if not_now is not None else tuple(_choice(op, module) for op in adapter.ops)
    note = "under torch.compile the stock forward runs, and Inductor fuses it" if adapter.recipe == "inline" else ""
    entry = Entry(path, "embeddings", stock, adapter.formula, status, not_now or note, ops)
    return _Step(entry, module, not already)


def _plan_attention(model: nn.Module) -> Iterator[_Step]:
    by_config: dict[int, list[tuple[str, PreTrainedModel]]] = {}
    for path, module in model.named_modules():
        if isinstance(module, PreTrainedModel):
            by_config.setdefault(id(module.config), []).append((path, module))
    for sharing in by_config.values():
        # The innermost model of a known family: a model around it may hold others with their own attention.
        path, module = next((one for one in reversed(sharing) if family_of(one[1]) is not None), sharing[0])
        yield _attention_step(path, module, tuple(one for _, one in sharing))


def _attention_step(path: str, module: PreTrainedModel, sharing: tuple[nn.Module, ...]) -> _Step:
    current = module.config._attn_implementation
    if current == hf_attention.NAME:
        before = module.__dict__.get(_RECORD)
        was = before.implementation if before is not None else current
        entry = Entry(path, "attention", was, current, "already", "", (_choice("attention", module),))
        return _Step(entry, module, False)
    reason = None
    if family_of(module) is None:
        reason = f"no adapter for {type(module).__name__}"
    elif not module._can_set_attn_implementation():
        reason = f"{type(module).__name__} does not take its attention from AttentionInterface"
    elif current not in _REPLACED:
        reason = f"{current} was chosen by name"
    elif current == "eager" and getattr(module.config, "output_attentions", False):
        reason = "config.output_attentions asks for attention weights, which only eager attention has"
    elif current == "eager" and getattr(module.config, "reorder_and_upcast_attn", False):
        reason = "config.reorder_and_upcast_attn asks for eager attention"
    if reason is not None:
        return _Step(Entry(path, "attention", str(current), str(current), "left alone", reason), module, False)
    ops = (_choice("attention", module),)
    entry = Entry(path, "attention", str(current), hf_attention.NAME, "patched", "", ops)
    return _Step(entry, module, True, sharing)


def _choice(op: str, module: nn.Module) -> OpChoice:
    """Where an op of this module runs, and why, from its device, dtype and head size."""
    parameter = next(module.parameters(), torch.empty(0))
    choice = choose(op, parameter.device)
    if choice.backend == "triton":
        reason = None
        if op == "embed":
            reason = hf_attention.why_not_dtype(parameter.dtype)
        elif op == "attention" and isinstance(module, PreTrainedModel):
            reason = hf_attention.why_not_heads(_head_size(module.config), parameter.dtype)
        if reason is not None:
            return OpChoice(op, parameter.device.type, "torch", reason)
    return OpChoice(op, parameter.device.type, choice.backend, choice.reason)


def _head_size(config: Any) -> int:
    size: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return size

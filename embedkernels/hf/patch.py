"""``patch(model)`` and ``unpatch(model)``: fused embeddings, rotary positions and attention in place, and back."""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import nn
from transformers import PreTrainedModel, __version__

from embedkernels.hf import attention as hf_attention
from embedkernels.hf import config, fused, guards, padding, rotary
from embedkernels.hf.adapters import LOOKUP, Adapter, base_of, family_of, lost, supported
from embedkernels.hf.report import Entry, OpChoice, PatchReport, Status
from embedkernels.hf.state import MARK, Mark
from embedkernels.nn.embedding import FusedEmbedding
from embedkernels.ops.backend import choose
from embedkernels.ops.embedding_grad import Mode

GradMode = Literal["dense", "accumulate"]


@dataclass
class _Step:
    """What to do with one module.

    Attributes:
        entry: its entry in the report.
        module: the module.
        change: whether to change it.
        notable: whether to warn that it is left alone, though other modules are patched.
    """

    entry: Entry
    module: nn.Module
    change: bool
    notable: bool = False


def patch(
    model: nn.Module,
    *,
    embeddings: bool = True,
    rope: bool = True,
    attention: bool = True,
    padding_free: bool = False,
    grad_mode: GradMode = "dense",
    strict: bool = False,
) -> PatchReport:
    """Fuse the input embeddings, the rotary positions and the attention of a Hugging Face model, in place.

    Modules keep their parameters, buffers, names, hooks, ``state_dict`` and ``isinstance``; their ``__class__``
    becomes a subclass of the stock class. A module that something hooks, wraps or parametrises runs its stock
    forward, with one warning, and so does a call that the fused forward does not cover. Patching a patched model
    changes nothing and reports the present state. Other models are not touched, be they of the same configuration.

    Args:
        model: a Hugging Face model, or any module that contains some. Every nn.Embedding in it becomes a fused
            lookup, whatever it is for. Unpatch before tools that know modules by their exact class, as quantisation
            does, and before torch.jit.script.
        embeddings: fuse the input embeddings.
        rope: have attention turn query and key by rotary positions in one launch, where the function that the model
            calls for it is a known one. Under torch.compile that function stays: Inductor fuses it.
        attention: set the attention implementation ``"embedkernels"`` where ``"sdpa"`` is set, which is what
            transformers takes unless it is told otherwise. Any other was chosen, and stays.
        padding_free: run base models on the real tokens of a padded batch alone, packed into one row, wherever that
            gives what stock gives: outputs have the stock shapes, with zeros for padding, and losses, gradients and
            predictions of real tokens are stock's (so labels of padding must be -100). A decoder in training makes no
            cache. Needs the attention implementation ``"embedkernels"``. Calls that would not be exact (with a cache,
            ``output_attentions``, a sequence of an encoder that begins with padding) run with padding and all, with
            one warning, and so do graphs of torch.compile, without one. A model that is padding-free stays so.
        grad_mode: what the gradients of tables that are looked up alone become, as of Llama's: ``"dense"``, or
            ``"accumulate"``: added in place to what is in ``grad`` (or ``main_grad``), after a tied head, without a
            tensor of the table's size for themselves; see :func:`embedkernels.embedding`. Tables whose rows are
            scaled or added up in the same op have dense gradients, a ``sparse`` one has rows, and one that was
            patched before keeps its mode. The report says which is which.
        strict: raise instead of warning if there is nothing to patch, not even one lookup, or, with
            ``padding_free``, no model that can run padding-free.

    Returns:
        PatchReport: what was changed, where each op runs and why, and what was left alone and why.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: an unknown grad_mode; with ``strict``, no part of the model is supported, or none padding-free.

    Example:
        >>> import embedkernels as ek, transformers
        >>> config = transformers.BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
        >>> report = ek.patch(transformers.BertModel(config))
        >>> report.active
        True
    """
    if grad_mode not in get_args(GradMode):
        raise ValueError(f"patch: grad_mode must be dense or accumulate, got {grad_mode!r}")
    steps = list(_plan(_module(model, "patch"), embeddings, rope, attention, padding_free, grad_mode))
    found = [step for step in steps if step.entry.status != "left alone"]
    without = [step.entry for step in steps if step.entry.part == "padding" and step.entry.status == "left alone"]
    if padding_free and not any(step.entry.part == "padding" for step in found):
        message = f"nothing in {type(model).__name__} can run padding-free: {padding.supported()} can" + (
            f" ({_reasons(model, without)})" if without else ""
        )
        if strict:
            raise ValueError(message)
        warnings.warn(f"embedkernels: {message}", UserWarning, stacklevel=2)
    if not found and (embeddings or rope or attention):
        message = _unsupported(model, [step.entry for step in steps])
        if strict:
            raise ValueError(message)
        warnings.warn(f"embedkernels: {message}", UserWarning, stacklevel=2)
    elif notable := [step.entry for step in steps if step.notable]:
        warnings.warn(f"embedkernels: left alone in {_reasons(model, notable)}", UserWarning, stacklevel=2)
    for step in steps:
        _apply(model, step)
    return PatchReport(type(model).__name__, tuple(step.entry for step in steps))


def describe(model: nn.Module) -> PatchReport:
    """The present state of a model as a report, without changing it.

    Args:
        model: any module; entries that ``patch`` would change have the status ``"left alone"``.

    Raises:
        TypeError: ``model`` is not a module.
    """
    entries = []
    for step in _plan(_module(model, "describe"), True, True, True, False, "dense"):
        entry = step.entry
        if step.change:
            entry = Entry(entry.path, entry.part, entry.was, entry.was, "left alone", "not patched")
        entries.append(entry)
    return PatchReport(type(model).__name__, tuple(entries))


def unpatch(model: nn.Module) -> None:
    """Undo :func:`patch`: stock classes, and the configuration itself with the attention implementation it names.

    What was set on the configuration meanwhile stays set. A class that something made from a fused one since (FSDP2,
    a parametrisation) is not taken apart: the module keeps it and runs its stock forward, and a warning says so.

    Args:
        model: the patched model, or a module that contains it. A model that is not patched stays as it is.

    Raises:
        TypeError: ``model`` is not a module.
    """
    wrapped = []
    for path, module in _module(model, "unpatch").named_modules():
        was_patched = module.__dict__.pop(MARK, None) is not None
        was_patched = module.__dict__.pop(padding.FLAG, None) is not None or was_patched
        if was_patched:
            module.__dict__.pop(fused.ACCUMULATES, None)
        if fused.STOCK in type(module).__dict__:
            module.__class__ = fused.stock_class(module)
        elif was_patched and fused.has_fused_class(module):
            wrapped.append(f"{path or type(model).__name__} ({type(module).__name__})")
    config.restore(model)
    if wrapped:
        warnings.warn(
            f"embedkernels: unpatched, but of a class that was made from the fused one since: {', '.join(wrapped)}. "
            "The stock forward runs; the class stays until what made it is undone and unpatch is called again",
            UserWarning,
            stacklevel=2,
        )


def _module(model: Any, function: str) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function}: model must be a torch.nn.Module, got {type(model).__name__}")
    return model


def _unsupported(model: nn.Module, entries: list[Entry]) -> str:
    return f"nothing to patch in {type(model).__name__}: patch covers {supported()}" + (
        f" ({_reasons(model, entries)})" if entries else ""
    )


def _reasons(model: nn.Module, entries: list[Entry]) -> str:
    return "; ".join(f"{e.path or type(model).__name__} {e.part}: {e.reason}" for e in entries)


def _apply(model: nn.Module, step: _Step) -> None:
    module = step.module
    if step.entry.part == "attention":
        # A patched one too: what is around it may not know, or it may hold a view that belongs to another model.
        if step.entry.status != "left alone" and isinstance(module, PreTrainedModel):
            config.set_attention(model, module, hf_attention.NAME)
    elif step.entry.part == "padding":
        if step.change or padding.is_padding_free(module):
            module.__dict__[padding.FLAG] = padding.around(module, model)
        if step.change and not fused.has_fused_class(module):
            module.__class__ = fused.fused_class(type(module))
    elif step.change:
        module.__dict__[MARK] = Mark()
        # A wrapper's class that was made from a fused one already has the fused forward.
        if not fused.has_fused_class(module):
            module.__class__ = fused.fused_class(type(module))
        if step.entry.grad_mode == "accumulate":
            module.__dict__[fused.ACCUMULATES] = True


def _plan(
    model: nn.Module, embeddings: bool, rope: bool, attention: bool, padding_free: bool, grad_mode: GradMode
) -> Iterator[_Step]:
    if embeddings:
        yield from _plan_embeddings(model, grad_mode)
    if rope:
        yield from _plan_rotary(model)
    steps = list(_plan_attention(model)) if attention else []
    yield from steps
    yield from _plan_padding(model, padding_free, [step.module for step in steps if step.change])


# Shorter rows are read in pieces that no kernel gains by: attention biases by distance, for a handful of heads.
_SHORTEST = 16


def _plan_embeddings(model: nn.Module, grad_mode: GradMode) -> Iterator[_Step]:
    covered: set[int] = set()
    of_tokens = _token_tables(model)
    for path, module in model.named_modules():
        if id(module) in covered:
            continue
        adapter = fused.adapter_of(module)
        if adapter is None or adapter.recipe == "scaled":
            if isinstance(module, nn.Embedding):
                yield _plan_lookup(path, module, adapter, grad_mode)
            elif (base := base_of(type(module))) is not None:
                derived = f"a subclass of {base.__name__}, which may compute something else: its tables are looked up"
                yield _left_alone(path, module, derived, notable=True)
            elif adapter is None and _adds_up(module, of_tokens):
                name = type(module).__name__
                unknown = f"{name}: its forward is not known in transformers {__version__}"
                yield _left_alone(path, module, f"{unknown}: its tables are looked up one by one", notable=True)
            continue
        never = "forward was replaced on the instance" if "forward" in module.__dict__ else None
        never = never or guards.unfit(module, adapter)
        step = _embedding_step(path, module, adapter, never, guards.problem(module, adapter), grad_mode)
        # The tables of a module that is left alone are looked up one by one.
        if step.entry.status != "left alone":
            covered.update(id(module._modules.get(table)) for table in adapter.tables)
        yield step


def _token_tables(model: nn.Module) -> set[int]:
    """The ids of the tables that the models of transformers in ``model`` call their input embeddings."""
    found = set()
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            with contextlib.suppress(NotImplementedError, AttributeError):
                found.add(id(module.get_input_embeddings()))
    return found


def _adds_up(module: nn.Module, of_tokens: set[int]) -> bool:
    """Whether a forward of transformers looks up in several tables, the tokens' among them, or had a row once."""
    if not type(module).__module__.startswith("transformers.models."):
        return False
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    names = () if code is None else code.co_names
    tables = [part for name, part in module.named_children() if isinstance(part, nn.Embedding) and name in names]
    return lost(type(module)) or (len(tables) > 1 and any(id(part) in of_tokens for part in tables))


def _left_alone(path: str, module: nn.Module, reason: str, notable: bool = False) -> _Step:
    name = type(module).__name__
    return _Step(Entry(path, "embeddings", name, name, "left alone", reason), module, False, notable)


def _plan_lookup(path: str, table: nn.Embedding, adapter: Adapter | None, grad_mode: GradMode) -> _Step:
    """A step for a table that nothing else covers."""
    by_hand = isinstance(table, FusedEmbedding) and not fused.has_fused_class(table)
    fused_already = fused.is_fused(table) or by_hand
    if adapter is None and not guards.looks_up_plainly(table) and not fused_already:
        return _left_alone(path, table, f"a {type(table).__name__}, not an nn.Embedding, and its forward has no row")
    if table.weight.dim() == 2 and table.weight.shape[1] < _SHORTEST and not fused_already:
        return _left_alone(path, table, f"rows of {table.weight.shape[1]} elements are too short to gain by it")
    not_now = guards.lookup_problem(table) if adapter is None else guards.scaled_problem(table)
    never = "forward was replaced on the instance" if "forward" in table.__dict__ else not_now
    return _embedding_step(path, table, adapter or LOOKUP, never, not_now, grad_mode)


# Calls that a patched module runs stock, by recipe.
_NOTES = {
    "lookup": "",
    "scaled": "",
    "stem": "",
    "inline": "a call with token_type_ids, inputs_embeds or ids that are not 2-D runs the stock forward, and so does "
    "torch.compile, where Inductor fuses it",
}


def _embedding_step(
    path: str, module: nn.Module, adapter: Adapter, never: str | None, not_now: str | None, asked: GradMode
) -> _Step:
    """A step for a module that can never be fused, that cannot at present, or that can."""
    stock = fused.stock_class(module).__name__
    by_hand = isinstance(module, FusedEmbedding) and not fused.has_fused_class(module)
    already = fused.is_fused(module) or by_hand
    if never is not None and not already:
        return _Step(Entry(path, "embeddings", stock, stock, "left alone", never), module, False)
    if not_now is not None:
        return _Step(Entry(path, "embeddings", stock, adapter.formula, "falls back", not_now), module, not already)
    mode, why = _gradient(module, adapter, asked, already)
    entry = Entry(
        path,
        "embeddings",
        stock,
        adapter.formula + ("" if mode == "dense" else f" (grad_mode={mode})"),
        "already" if already else "patched",
        "; ".join(filter(None, (_NOTES[adapter.recipe], why))),
        tuple(_choice(op, module) for op in adapter.ops),
        mode,
    )
    return _Step(entry, module, not already)


def _gradient(module: nn.Module, adapter: Adapter, asked: GradMode, already: bool) -> tuple[Mode, str]:
    """What the gradients of the tables in a module will be, and why they will not accumulate as was asked for."""
    if adapter.recipe != "lookup":
        return "dense", "" if asked == "dense" else "its gradients stay dense, as all of several steps in one op do"
    mode: Mode
    if already:
        mode, why = module.grad_mode, "as it was before: set grad_mode on it"  # type: ignore[assignment]
    else:
        mode, why = "rows" if module.sparse else asked, "as sparse is set"
    return mode, "" if asked in ("dense", mode) else f"its gradient stays {mode}, {why}"


def _plan_rotary(model: nn.Module) -> Iterator[_Step]:
    for path, module in model.named_modules():
        found = rotary.rotary_of(fused.stock_class(module))
        if found is None:
            continue
        never = found.why or ("forward was replaced on the instance" if "forward" in module.__dict__ else "")
        already = fused.is_fused(module)
        if never and not already:
            status: Status = "left alone"
        elif never:
            status = "falls back"
        else:
            status = "already" if already else "patched"
        now = found.name if status == "left alone" else "query and key in one op"
        ops = () if never else (_choice("rope", module),)
        yield _Step(
            Entry(path, "rotary", found.name, now, status, never, ops), module, not already and status == "patched"
        )


def _plan_attention(model: nn.Module) -> Iterator[_Step]:
    by_config: dict[int, dict[str, PreTrainedModel]] = {}
    for path, module in model.named_modules():
        if isinstance(module, PreTrainedModel):
            by_config.setdefault(id(config.stock_of(module.config)), {})[path] = module
    for models in by_config.values():
        for path in _concerned(models):
            yield _attention_step(path, models[path])


def _concerned(models: dict[str, PreTrainedModel]) -> list[str]:
    """Of models that share a configuration, those to patch or to report as left alone.

    They are the innermost of known families: a model around one may hold others with their own attention. Of models
    that are neither around one of these nor in it, they are the outermost.
    """
    known = [path for path in models if family_of(models[path]) is not None]
    chosen = [path for path in known if not any(_within(other, path) for other in known)]
    rest = [
        path for path in models if not any(path == one or _within(path, one) or _within(one, path) for one in chosen)
    ]
    outermost = [path for path in rest if not any(_within(path, other) for other in rest)]
    return [path for path in models if path in chosen or path in outermost]


def _within(path: str, outer: str) -> bool:
    """Whether the module of the first path is in that of the second, and is another."""
    return path != outer and (not outer or path.startswith(f"{outer}."))


def _attention_step(path: str, module: PreTrainedModel) -> _Step:
    others = [name for name in config.implementations(module) if name != hf_attention.NAME]
    if not others:
        was = str(config.stock_of(module.config)._attn_implementation)
        ops = (_choice("attention", module),)
        return _Step(Entry(path, "attention", was, hf_attention.NAME, "already", "", ops), module, False)
    # Should layers read another configuration than the model, the one that cannot be patched decides.
    current = next((name for name in others if name != "sdpa"), "sdpa")
    reason = None
    if family_of(module) is None:
        reason = f"no adapter for {type(module).__name__}"
    elif not module._can_set_attn_implementation():
        reason = f"{type(module).__name__} does not take its attention from AttentionInterface"
    elif current == "eager":
        reason = "eager was chosen, which alone gives attention weights and what else eager attention does"
        if module._supports_sdpa:
            reason += ': call model.set_attn_implementation("sdpa") before patch to have it fused'
    elif current != "sdpa":
        reason = f"{current} was chosen by name"
    if reason is not None:
        return _Step(Entry(path, "attention", current, current, "left alone", reason), module, False)
    ops = (_choice("attention", module),)
    return _Step(Entry(path, "attention", current, hf_attention.NAME, "patched", "", ops), module, True)


def _plan_padding(model: nn.Module, wanted: bool, to_patch: list[nn.Module]) -> Iterator[_Step]:
    """Steps for the base models that are padding-free, and, if it is wanted, for those that are not yet.

    Args:
        to_patch: models whose attention another step patches.
    """
    patched = {id(part) for outer in to_patch for part in outer.modules()}
    for path, module in model.named_modules():
        row = padding.base_model_of(fused.stock_class(module))
        already = padding.is_padding_free(module)
        if row is None or not (already or wanted) or not isinstance(module, PreTrainedModel):
            continue
        others = [name for name in config.implementations(module) if name != hf_attention.NAME]
        reason = ""
        if others and not (id(module) in patched and others == ["sdpa"]):
            reason = f"its attention implementation is {others[0]!r}, which knows nothing of packed sequences"
        elif "forward" in module.__dict__:
            reason = "forward was replaced on the instance"
        else:
            reason = padding.around(module, model).problem
        status: Status = "already" if already else "patched"
        if reason:
            status = "falls back" if already else "left alone"
        now = "as padded" if status == "left alone" else "real tokens only"
        yield _Step(Entry(path, "padding", "as padded", now, status, reason), module, status == "patched")


def _choice(op: str, module: nn.Module) -> OpChoice:
    """Where an op of this module runs, and why, from its device, dtype and head size."""
    parameter = next(module.parameters(), torch.empty(0))
    choice = choose(op, parameter.device)
    if choice.backend == "triton":
        reason = None
        if op in ("embed", "rope"):
            reason = hf_attention.why_not_dtype(parameter.dtype)
        elif op == "attention" and isinstance(module, PreTrainedModel):
            reason = hf_attention.why_not_heads(_head_size(module.config), parameter.dtype)
        if reason is not None:
            return OpChoice(op, parameter.device.type, "torch", reason)
    return OpChoice(op, parameter.device.type, choice.backend, choice.reason)


def _head_size(of: Any) -> int:
    size: int = getattr(of, "head_dim", None) or of.hidden_size // of.num_attention_heads
    return size

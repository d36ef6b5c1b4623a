"""The subclasses that patched modules become, made when they are first needed.

A fused class has the name, module and qualified name of its stock class, so that ``repr``, ``architectures`` in a
saved config, ``_no_split_modules``, FSDP wrap policies and the class names that transformers keeps registries of stay
what they were. Instances are pickled as "the fused class of this stock class", which finds its way back through
:func:`empty_instance`. A fused forward runs for instances with the mark of ``embedkernels.hf.state``: for any other,
be it new, unpatched or reached through a wrapper that outlived the patch, it is the stock forward.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from embedkernels.hf import guards, state
from embedkernels.hf.adapters import Adapter, adapter_for, supported
from embedkernels.hf.state import is_marked
from embedkernels.nn.embedding import FusedEmbedding
from embedkernels.ops.embed import embed
from embedkernels.ops.embedding import embedding

STOCK = "_embedkernels_stock"
ADAPTER = "_embedkernels_adapter"
Forward = Callable[..., Any]


def has_fused_class(module: nn.Module) -> bool:
    """Whether the class of ``module`` was made by :func:`fused_class`, or from such a class by a wrapper."""
    return hasattr(type(module), STOCK)


def is_fused(module: nn.Module) -> bool:
    """Whether ``module`` is patched: it has a fused class and the mark that lets its fused forward run."""
    return has_fused_class(module) and is_marked(module)


def stock_class(module: nn.Module) -> type[nn.Module]:
    """The class of ``module``, or the one that it had before it was patched."""
    found: type[nn.Module] = getattr(type(module), STOCK, type(module))
    return found


def adapter_of(module: nn.Module) -> Adapter | None:
    """The row of the table for a stock or fused module."""
    fused: Adapter | None = getattr(type(module), ADAPTER, None)
    return fused or adapter_for(type(module))


def empty_instance(stock: type[nn.Module]) -> nn.Module:
    """An empty instance of the fused class of ``stock``: what pickle and deepcopy fill with the module's state."""
    cls = fused_class(stock)
    return cls.__new__(cls)


_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}


def fused_class(stock: type[nn.Module]) -> type[nn.Module]:
    """The subclass of ``stock`` whose forward is fused.

    Args:
        stock: nn.Embedding or the class of a row of the table.

    Raises:
        ValueError: for another class.
    """
    if stock not in _CLASSES:
        _CLASSES.setdefault(stock, _make_class(stock))
    return _CLASSES[stock]


def _make_class(stock: type[nn.Module]) -> type[nn.Module]:
    adapter = adapter_for(stock)
    if adapter is None and stock is not nn.Embedding:
        raise ValueError(f"no adapter for {stock.__module__}.{stock.__qualname__}; supported: {supported()}")

    base: type[nn.Module] = FusedEmbedding if adapter is None else stock

    @functools.wraps(stock.__init__)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        # type(model)(config) makes a new model, which nobody has patched.
        if type(self) is fused:
            self.__class__ = stock
        stock.__init__(self, *args, **kwargs)

    def __reduce_ex__(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
        reduced: Any = base.__reduce_ex__(self, protocol)
        if type(self) is not fused:
            return tuple(reduced)
        return (empty_instance, (stock,), *reduced[2:])

    namespace: dict[str, Any] = {
        "__init__": __init__,
        "__module__": stock.__module__,
        "__qualname__": stock.__qualname__,
        "__doc__": stock.__doc__,
        "__reduce_ex__": __reduce_ex__,
        STOCK: stock,
        ADAPTER: adapter,
    }
    namespace["forward"] = _FORWARDS[adapter.recipe](adapter, stock.forward) if adapter else _lookup_forward
    fused: type[nn.Module] = type(stock.__name__, (base,), namespace)
    return fused


@functools.wraps(nn.Embedding.forward)
def _lookup_forward(self: Any, input: Tensor) -> Tensor:
    if not is_marked(self):
        return nn.Embedding.forward(self, input)
    reason = FusedEmbedding.stock_reason(self)
    if reason is not None:
        guards.warn_once(self, "nn.Embedding", reason)
        return nn.Embedding.forward(self, input)
    return embedding(input, self.weight, padding_idx=self.padding_idx)


def _bound_by_name(stock_forward: Forward) -> Callable[[tuple[Any, ...], dict[str, Any]], dict[str, Any] | None]:
    """A function from the arguments of a call to all of them by name; None for a call that stock would refuse."""
    parameters = inspect.signature(stock_forward).parameters.values()
    names = tuple(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD)[1:]

    def by_name(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any] | None:
        if not args:
            return kwargs
        if len(args) > len(names):
            return None
        call = dict(zip(names, args, strict=False))
        if any(name in call for name in kwargs):
            return None
        return {**call, **kwargs}

    return by_name


def _no_input(call: dict[str, Any]) -> bool:
    return call.get("input_ids") is None and call.get("inputs_embeds") is None


def _misfit(call: dict[str, Any]) -> str | None:
    """Why the ids of this call cannot be looked up in one op, which wants (B, S) and what broadcasts to it."""
    if call.get("inputs_embeds") is not None:
        return "inputs_embeds is given"
    input_ids = call["input_ids"]
    if input_ids.dim() != 2:
        return f"input_ids has {input_ids.dim()} dimensions, not 2"
    batch, length = input_ids.shape
    for name in ("position_ids", "token_type_ids"):
        ids = call.get(name)
        if ids is not None and not (ids.dim() == 2 and ids.shape[1] == length and ids.shape[0] in (1, batch)):
            return f"{name} is not of the shape of input_ids"
    return None


def _positions(past: Any, input_ids: Tensor) -> tuple[Tensor | None, int]:
    """Position ids for S tokens after ``past``, and a start: ids are needed only where the past is on the device."""
    if isinstance(past, Tensor):
        count = torch.arange(input_ids.shape[1], device=input_ids.device)
        return (count + past.to(input_ids.device)).unsqueeze(0), 0
    return None, past


_STEM_ARGUMENTS = frozenset(
    {"input_ids", "token_type_ids", "position_ids", "inputs_embeds", "past_key_values_length"}
)


def _stem_forward(adapter: Adapter, stock_forward: Forward) -> Forward:
    """Token + position (+ type) -> norm -> dropout in one op."""
    by_name = _bound_by_name(stock_forward)
    understood = _STEM_ARGUMENTS & inspect.signature(stock_forward).parameters.keys()

    @functools.wraps(stock_forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not is_marked(self):
            return stock_forward(self, *args, **kwargs)
        call = by_name(args, kwargs)
        if call is None or not call.keys() <= understood or _no_input(call):
            return stock_forward(self, *args, **kwargs)  # which raises
        reason = _misfit(call) or guards.problem(self, adapter) or _beyond_buffers(self, adapter, call)
        if reason is not None:
            guards.warn_once(self, f"{adapter.cls} ({adapter.model})", reason)
            return stock_forward(self, *args, **kwargs)

        input_ids, position_ids, type_ids = call["input_ids"], call.get("position_ids"), call.get("token_type_ids")
        start = 0
        past = call.get("past_key_values_length", 0)
        if position_ids is None and adapter.position_rule == "padding":
            position_ids = self.create_position_ids_from_input_ids(input_ids, self.padding_idx, past)
        elif position_ids is None:
            position_ids, start = _positions(past, input_ids)
        return _embed(self, adapter, input_ids, position_ids, start, type_ids)

    return forward


def _beyond_buffers(module: Any, adapter: Adapter, call: dict[str, Any]) -> str | None:
    """Why the buffers that stock would take ids from do not hold all that this call needs."""
    past, given = call.get("past_key_values_length", 0), call.get("position_ids") is not None
    end = None if given or isinstance(past, Tensor) else past + call["input_ids"].shape[1]
    if end is not None and adapter.position_rule == "padding":
        end += module.padding_idx + 1  # where positions start
    read = []
    if not given and adapter.position_rule == "arange":
        read.append("position_ids")
    if adapter.types is not None and call.get("token_type_ids") is None:
        read.append("token_type_ids")
    rows = module._modules[adapter.positions].weight.shape[0]
    return state.length_problem(module, read, rows, end)


def _embed(
    module: Any, adapter: Adapter, ids: Tensor, position_ids: Tensor | None, start: int, type_ids: Tensor | None
) -> Tensor:
    parts = module._modules
    tokens, positions = parts[adapter.tokens], parts[adapter.positions]
    types = parts[adapter.types] if adapter.types else None
    norm = parts[adapter.norm] if adapter.norm else None
    dropout = parts[adapter.dropout]
    output = embed(
        ids,
        tokens.weight,
        position_weight=positions.weight,
        position_ids=position_ids,
        position_start=start,
        type_weight=None if types is None else types.weight,
        type_ids=None if types is None else type_ids,
        norm=None if norm is None else "layer",
        norm_weight=None if norm is None else norm.weight,
        norm_bias=None if norm is None else norm.bias,
        norm_eps=1e-12 if norm is None else norm.eps,
        dropout_p=dropout.p if dropout.training else 0.0,
        padding_idx=tokens.padding_idx,
        position_padding_idx=positions.padding_idx,
    )
    # The one hook that the guards let pass wants this of the lookup's output, for activation checkpointing.
    if tokens._forward_hooks and torch.is_grad_enabled() and not output.requires_grad:
        output.requires_grad_(True)
    return output


def _inline_forward(adapter: Adapter, stock_forward: Forward) -> Forward:
    """Token + position -> dropout in one op at the start of a model's own forward.

    The stock forward then runs as it is on ``inputs_embeds``, seeing the model through a :class:`_ModelView` in which
    the position lookup and the dropout have already been done.
    """
    by_name = _bound_by_name(stock_forward)

    @functools.wraps(stock_forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        # Inductor fuses the lookups, the addition and the dropout into one kernel by itself.
        if not is_marked(self) or torch.compiler.is_compiling():
            return stock_forward(self, *args, **kwargs)
        call = by_name(args, kwargs)
        if call is None or _no_input(call):
            return stock_forward(self, *args, **kwargs)  # which raises
        reason = _misfit(call)
        if call.get("token_type_ids") is not None:
            reason = "token_type_ids is given: it is looked up in the token table and added after the positions"
        reason = reason or guards.problem(self, adapter)
        if reason is not None:
            guards.warn_once(self, f"{adapter.cls} ({adapter.model})", reason)
            return stock_forward(self, *args, **kwargs)

        input_ids, position_ids = call["input_ids"], call.get("position_ids")
        self.warn_if_padding_and_no_attention_mask(input_ids, call.get("attention_mask"))
        start = 0
        if position_ids is None:
            cache = call.get("past_key_values")
            position_ids, start = _positions(0 if cache is None else cache.get_seq_length(), input_ids)
        embeds = _embed(self, adapter, input_ids, position_ids, start, None)
        view = _ModelView(self, adapter)
        output = stock_forward(view, **{**call, "input_ids": None, "inputs_embeds": embeds})
        view.check()
        return output

    return forward


class _AlreadyAdded:
    """What the position lookup returns when the positions are already in the embeddings: x + this is x."""

    def to(self, *args: Any, **kwargs: Any) -> _AlreadyAdded:  # noqa: ARG002
        return self

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__name__", "") in ("add", "__add__", "__radd__") and not kwargs and len(args) == 2:
            return args[1] if isinstance(args[0], cls) else args[0]
        return NotImplemented


class _ModelView:
    """A model as its own stock forward sees it during one call: without position lookup and embedding dropout.

    Everything else is the model's, attributes set included. One view serves one call, so nothing is shared between
    threads and nothing is left behind by an exception.
    """

    def __init__(self, model: nn.Module, adapter: Adapter) -> None:
        self.__dict__.update(_model=model, _adapter=adapter, _calls=[])
        self.__dict__[str(adapter.positions)] = self._add_nothing
        self.__dict__[str(adapter.dropout)] = self._pass

    def _add_nothing(self, position_ids: Tensor) -> _AlreadyAdded:  # noqa: ARG002
        self._calls.append(self._adapter.positions)
        return _AlreadyAdded()

    def _pass(self, hidden_states: Tensor) -> Tensor:
        self._calls.append(self._adapter.dropout)
        return hidden_states

    def check(self) -> None:
        """RuntimeError unless the stock forward has called both parts once, in the expected order."""
        expected = [self._adapter.positions, self._adapter.dropout]
        if self._calls != expected:
            import transformers

            raise RuntimeError(
                f"embedkernels: {self._adapter.cls}.forward of transformers {transformers.__version__} called "
                f"{self._calls} where {expected} was expected, so its embeddings cannot be fused: use "
                "patch(model, embeddings=False)"
            )

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(self._model)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_model"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._model, name, value)


_FORWARDS: dict[str, Callable[[Adapter, Forward], Forward]] = {"stem": _stem_forward, "inline": _inline_forward}

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

from embedkernels.hf import guards, padding, positions, rotary, state
from embedkernels.hf.adapters import Adapter, adapter_for, supported
from embedkernels.hf.bodies import in_deprecations
from embedkernels.hf.calls import Forward, as_it_is_called, bound_by_name
from embedkernels.hf.extras import EXTRAS
from embedkernels.hf.state import is_marked
from embedkernels.nn.embedding import FusedEmbedding
from embedkernels.ops.embed import embed
from embedkernels.ops.embedding import embedding

STOCK = "_embedkernels_stock"
ADAPTER = "_embedkernels_adapter"
ACCUMULATES = "_accumulates"  # what FusedEmbedding.grad_mode goes by


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
    """An empty instance of the fused class of ``stock``: what pickle and deepcopy fill with the module's state.

    Of the stock class itself where a pickle comes to a transformers whose forward is another.
    """
    cls = fused_class(stock) if can_be_fused(stock) else stock
    return cls.__new__(cls)


def can_be_fused(stock: type[nn.Module]) -> bool:
    """Whether :func:`fused_class` has a subclass for a stock class."""
    if stock is nn.Embedding or adapter_for(stock) is not None:
        return True
    if padding.base_model_of(stock) is not None:
        return True
    found = rotary.rotary_of(stock)
    return found is not None and found.rotation is not None


_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}


def fused_class(stock: type[nn.Module]) -> type[nn.Module]:
    """The subclass of ``stock`` whose forward is fused.

    Args:
        stock: nn.Embedding, or a class that has a row in the table or calls a rotary function that has one, or a base
            model that can run padding-free.

    Raises:
        ValueError: for another class.
    """
    if stock not in _CLASSES:
        _CLASSES.setdefault(stock, _make_class(stock))
    return _CLASSES[stock]


def _make_class(stock: type[nn.Module]) -> type[nn.Module]:
    if not can_be_fused(stock):
        raise ValueError(f"no adapter for {stock.__module__}.{stock.__qualname__}; patch covers {supported()}")

    adapter = adapter_for(stock)
    base: type[nn.Module] = FusedEmbedding if stock is nn.Embedding else stock

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
    if adapter is not None:
        forward = _FORWARDS[adapter.recipe](adapter, stock.forward)
    elif stock is nn.Embedding:
        forward = _lookup_forward
    else:
        forward = stock.forward if rotary.rotary_of(stock) is None else _rotary_forward(stock)
    row = padding.base_model_of(stock)
    if row is not None:
        forward = padding.unpadded(row, forward, stock.forward)
    namespace["forward"] = in_deprecations(stock.forward, forward)
    fused: type[nn.Module] = type(stock.__name__, (base,), namespace)
    return fused


@functools.wraps(nn.Embedding.forward)
def _lookup_forward(self: Any, input: Tensor) -> Tensor:
    if not is_marked(self):
        return nn.Embedding.forward(self, input)
    reason = guards.lookup_problem(self, input)
    if reason is not None:
        guards.warn_once(self, "nn.Embedding", reason)
        return nn.Embedding.forward(self, input)
    return embedding(
        input,
        self.weight,
        padding_idx=self.padding_idx,
        scale_grad_by_freq=self.scale_grad_by_freq,
        grad_mode=self.grad_mode,
    )


def _scaled_forward(adapter: Adapter, stock_forward: Forward) -> Forward:
    """Rows times a number in one op."""
    attribute = str(adapter.scale)

    @functools.wraps(stock_forward)
    def forward(self: Any, input_ids: Tensor) -> Any:
        if not is_marked(self):
            return stock_forward(self, input_ids)
        scale, reason = state.scale_of(self, attribute)
        reason = guards.scaled_problem(self) or reason
        if reason is not None:
            guards.warn_once(self, stock_class(self).__name__, reason)
            return stock_forward(self, input_ids)
        return embed(input_ids, self.weight, scale=scale, padding_idx=self.padding_idx)

    return forward


def _rotary_forward(stock: type[nn.Module]) -> Forward:
    """The stock forward, whose rotary function is ``rope`` where that fits."""
    stock_forward: Any = stock.forward
    fused_forward = rotary.rebound(stock)

    @functools.wraps(stock_forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return (fused_forward if is_marked(self) else stock_forward)(self, *args, **kwargs)

    return forward


def _no_input(call: dict[str, Any]) -> bool:
    return call.get("input_ids") is None and call.get("inputs_embeds") is None


def _misfit(call: dict[str, Any], adapter: Adapter, understood: frozenset[Any]) -> str | None:
    """Why the ids of this call cannot be looked up in one op, which wants (B, S) and what broadcasts to it.

    Or, of a module of its own, why its rows, (B, S, D), cannot be taken instead.
    """
    input_ids: Any = call.get("input_ids")
    rows: Any = call.get("inputs_embeds")
    for name, given in call.items():
        if given is not None and name not in understood:
            return f"{name} is given"
    if rows is not None and (input_ids is not None or adapter.recipe != "stem"):
        return "inputs_embeds is given"
    name, tokens, wanted = ("input_ids", input_ids, 2) if rows is None else ("inputs_embeds", rows, 3)
    if tokens.dim() != wanted:
        return f"{name} has {tokens.dim()} dimensions, not {wanted}"
    batch, length = tokens.shape[:2]
    for name in ("position_ids", "token_type_ids"):
        ids = None if name in adapter.unused else call.get(name)
        if ids is not None and not (ids.dim() == 2 and ids.shape[1] == length and ids.shape[0] in (1, batch)):
            return f"{name} is not of the shape of input_ids"
    mask = None if adapter.mask is None else call.get(adapter.mask)
    if mask is not None and (mask.shape != tokens.shape[:2] or mask.is_floating_point()):
        return f"{adapter.mask} is not of the shape of input_ids, or not of integers"
    return None


def _misfit_of_rows(rows: Tensor, weight: Tensor) -> str | None:
    """Why rows that are given cannot be those of tokens: the op computes in the dtype of the tables."""
    if rows.dtype != weight.dtype or rows.device != weight.device:
        return f"inputs_embeds are of {rows.dtype} on {rows.device}, the tables of {weight.dtype} on {weight.device}"
    if rows.shape[-1] != weight.shape[1]:
        return f"inputs_embeds have {rows.shape[-1]} columns, the tables {weight.shape[1]}"
    if type(rows) not in guards.PLAIN:
        return f"inputs_embeds are a {type(rows).__name__}, not a plain tensor"
    return None


def _misfit_of_extra(rows: Tensor, tokens: Tensor, weight: Tensor) -> str | None:
    """Why rows of other tables cannot be added in one op, which keeps the dtype of the tokens' table."""
    if rows.dtype != weight.dtype:
        return f"rows of other tables are of {rows.dtype}, the tokens' of {weight.dtype}"
    fits = rows.dim() == 3 and rows.shape[2] == weight.shape[1]
    if not fits or any(n not in (1, size) for n, size in zip(rows.shape, tokens.shape[:2], strict=False)):
        return f"rows of other tables have the shape {tuple(rows.shape)}"
    return None


_STEM_ARGUMENTS = frozenset({"input_ids", "token_type_ids", "position_ids", "inputs_embeds"})


def _stem_forward(adapter: Adapter, stock_forward: Forward) -> Forward:
    """Token (+ position) (+ type) -> norm -> dropout in one op."""
    by_name = bound_by_name(stock_forward)
    parameters = inspect.signature(stock_forward).parameters
    accepted = frozenset(parameters)
    past_name = as_it_is_called("past_key_values_length", accepted)
    extra = None if adapter.extra is None else EXTRAS[adapter.extra]
    more = () if extra is None else extra.arguments
    understood = frozenset((_STEM_ARGUMENTS | {past_name, adapter.mask, *adapter.unused, *more}) & accepted)
    any_name = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    from_padding = _ids_from_padding(stock_forward)

    @functools.wraps(stock_forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not is_marked(self):
            return stock_forward(self, *args, **kwargs)
        call = by_name(args, kwargs)
        if call is None or _no_input(call) or not (any_name or call.keys() <= accepted):
            return stock_forward(self, *args, **kwargs)  # which raises
        past = 0 if past_name is None else call.get(past_name, 0)
        input_ids, given_rows = call.get("input_ids"), call.get("inputs_embeds")
        tokens: Any = input_ids if given_rows is None else given_rows  # (B, S), or (B, S, D)
        reason = _misfit(call, adapter, understood) or guards.problem(self, adapter)
        if reason is None and given_rows is not None:
            reason = _misfit_of_rows(given_rows, self._modules[adapter.tokens].weight)
        reason = reason or _beyond_buffers(self, adapter, call, tokens.shape[1], past)
        if reason is not None:
            guards.warn_once(self, stock_class(self).__name__, reason)
            return stock_forward(self, *args, **kwargs)

        position_ids, start = call.get("position_ids"), 0
        table = self._modules.get(adapter.positions)
        if table is None:
            position_ids = None
        elif adapter.bounded and tokens.shape[1] > table.weight.shape[0]:
            return stock_forward(self, *args, **kwargs)  # which raises
        elif position_ids is None and adapter.position_rule == "padding":
            position_ids = from_padding(self, tokens, past)
        elif position_ids is None:
            position_ids, start = positions.counted(past, tokens, state.first_position(self))
        mask = None if adapter.mask is None else call.get(adapter.mask)
        rows = None
        if extra is not None:
            if any(call.get(name) is None for name in extra.required):
                return stock_forward(self, *args, **kwargs)  # which raises
            rows = extra.rows(self, call, tokens)
            if rows is not None:
                weight = self._modules[adapter.tokens].weight
                if torch.promote_types(rows.dtype, weight.dtype) == weight.dtype:  # as under autocast
                    rows = rows.to(weight.dtype)
                reason = _misfit_of_extra(rows, tokens, weight)
                if reason is not None:
                    guards.warn_once(self, stock_class(self).__name__, reason)
                    return stock_forward(self, *args, **kwargs)
        output = _embed(
            self,
            adapter,
            input_ids,
            position_ids,
            start,
            call.get("token_type_ids"),
            mask,
            extra=rows,
            rows=given_rows,
        )
        return (output, position_ids) if adapter.returns_positions else output

    return forward


def _arguments(function: Any) -> tuple[str, ...]:
    """Names of the arguments of a plain function or a method, without the cost of a signature."""
    code = function.__code__
    names: tuple[str, ...] = code.co_varnames[: code.co_argcount]
    return names


def _ids_from_padding(stock_forward: Forward) -> Callable[[Any, Tensor, Any], Tensor]:
    """How the stock forward counts tokens that are not padding: with a method or with a function of its module.

    Of rows in the place of ids nobody knows which are padding: it counts them all, by another method.
    """
    names: dict[str, Any] = getattr(stock_forward, "__globals__", {})
    parameters = inspect.signature(stock_forward).parameters
    with_past = as_it_is_called("past_key_values_length", parameters) is not None

    def count(module: Any, input_ids: Tensor, past: Any) -> Tensor:
        if input_ids.is_floating_point():
            function = module.create_position_ids_from_inputs_embeds
            more = (module.padding_idx,) if "padding_idx" in _arguments(function) else ()
            return torch.as_tensor(function(input_ids, *more))
        function = getattr(module, positions.COUNT, None) or names[positions.COUNT]
        # Inductor fuses what stock does.
        if not torch.compiler.is_compiling() and positions.known_count(function, module.padding_idx, past):
            return positions.padding_counted(input_ids, module.padding_idx, past)
        arguments = (input_ids, module.padding_idx, past) if with_past else (input_ids, module.padding_idx)
        ids: Tensor = function(*arguments)
        return ids

    return count


def _beyond_buffers(module: Any, adapter: Adapter, call: dict[str, Any], length: int, past: Any) -> str | None:
    """Why the buffers that stock would take ids from do not hold all that this call needs."""
    table = module._modules.get(adapter.positions)
    if table is None:
        return None
    given = call.get("position_ids") is not None
    end = None if given or isinstance(past, Tensor) else past + length
    if end is not None and adapter.position_rule == "padding":
        end += module.padding_idx + 1  # where positions start
    read, rows = [], table.weight.shape[0]
    if not given and adapter.position_rule == "arange":
        read.append("position_ids")
    if adapter.types is not None and call.get("token_type_ids") is None:
        if adapter.types_by_place:
            reason = state.length_problem(module, ["token_type_ids"], rows, length)
            return reason or state.length_problem(module, read, rows, end)
        read.append("token_type_ids")
    return state.length_problem(module, read, rows, end)


def _embed(
    module: Any,
    adapter: Adapter,
    ids: Tensor | None,
    position_ids: Tensor | None,
    start: int,
    type_ids: Tensor | None,
    mask: Tensor | None = None,
    scale: float = 1.0,
    extra: Tensor | None = None,
    rows: Tensor | None = None,
) -> Tensor:
    parts: dict[str | None, Any] = module._modules
    tokens = parts[adapter.tokens]
    places, types, norm, dropout = (
        parts.get(name) for name in (adapter.positions, adapter.types, adapter.norm, adapter.dropout)
    )
    if dropout is not None:
        dropout_p = dropout.p if dropout.training else 0.0
    else:
        dropout_p = float(getattr(module, adapter.dropout)) if adapter.dropout and module.training else 0.0
    output = embed(
        ids,
        tokens.weight if rows is None else None,
        inputs_embeds=rows,
        scale=scale,
        position_weight=None if places is None else positions.rows(places),
        position_ids=position_ids,
        position_start=start,
        type_weight=None if types is None else types.weight,
        type_ids=None if types is None else type_ids,
        extra=extra,
        position_first=adapter.position_first,
        norm=None if norm is None else "layer",
        norm_weight=None if norm is None else norm.weight,
        norm_bias=None if norm is None else norm.bias,
        norm_eps=1e-12 if norm is None else norm.eps,
        dropout_p=dropout_p,
        dropout_first=adapter.dropout_first,
        mask=mask,
        padding_idx=tokens.padding_idx if rows is None else None,
        position_padding_idx=places.padding_idx if isinstance(places, nn.Embedding) else None,
    )
    # The one hook that the guards let pass wants this of the lookup's output, for activation checkpointing.
    if rows is None and tokens._forward_hooks and torch.is_grad_enabled() and not output.requires_grad:
        output.requires_grad_(True)
    return output


def _scale(module: Any, adapter: Adapter) -> tuple[float, str | None]:
    """The factor of the token rows of an inline model, the table's own and the model's, and why it is not known."""
    tokens = module._modules.get(adapter.tokens)
    row = adapter_for(stock_class(tokens))
    scale, reason = (1.0, None) if row is None else state.scale_of(tokens, str(row.scale))
    if adapter.scale is None or reason is not None:
        return scale, reason
    factor, reason = state.scale_of(module, adapter.scale)
    if row is not None and scale != 1.0 and factor != 1.0:
        return 1.0, "its token rows have two factors"  # two roundings
    return scale * factor, reason


def _windows(module: Any, adapter: Adapter, input_ids: Tensor) -> str | None:
    """Why stock pads this call in the middle of its embeddings, or None."""
    if not adapter.whole_windows:
        return None
    window: Any = module.config.attention_window
    size = window if isinstance(window, int) else max(window)
    return f"its sequences are padded to whole attention windows, of {size}" if input_ids.shape[1] % size else None


def _inline_forward(adapter: Adapter, stock_forward: Forward) -> Forward:
    """Token (+ position) -> norm -> dropout in one op at the start of a model's own forward.

    The stock forward then runs as it is on ``inputs_embeds``, seeing the model through a :class:`_ModelView` in which
    the position lookup, the norm and the dropout have already been done.
    """
    by_name = bound_by_name(stock_forward)
    parameters = inspect.signature(stock_forward).parameters
    takes_positions = "position_ids" in parameters
    cache_name = as_it_is_called("past_key_values", parameters)
    warns = "warn_if_padding_and_no_attention_mask" in inspect.unwrap(stock_forward).__code__.co_names

    @functools.wraps(stock_forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        # Inductor fuses the lookups, the addition and the dropout into one kernel by itself.
        if not is_marked(self) or torch.compiler.is_compiling():
            return stock_forward(self, *args, **kwargs)
        call = by_name(args, kwargs)
        if call is None or _no_input(call):
            return stock_forward(self, *args, **kwargs)  # which raises
        reason = _misfit(call, adapter, frozenset(call))
        if call.get("token_type_ids") is not None:
            reason = "token_type_ids is given: it is looked up in the token table and added after the positions"
        reason = reason or guards.problem(self, adapter) or _windows(self, adapter, call["input_ids"])
        scale, position_ids, start = 1.0, None, 0
        if reason is None:
            scale, reason = _scale(self, adapter)
        table = self._modules.get(adapter.positions)
        if reason is None and table is not None:
            cache = None if cache_name is None else call.get(cache_name)
            past = 0 if cache is None else cache.get_seq_length()
            given = call.get("position_ids") if takes_positions else None
            position_ids, start, reason = positions.places(
                table, adapter.position_rule, call["input_ids"], given, past, call.get("attention_mask")
            )
        if reason is not None:
            guards.warn_once(self, stock_class(self).__name__, reason)
            return stock_forward(self, *args, **kwargs)

        input_ids = call["input_ids"]
        if warns:
            self.warn_if_padding_and_no_attention_mask(input_ids, call.get("attention_mask"))
        embeds = _embed(self, adapter, input_ids, position_ids, start, None, scale=scale)
        view = _ModelView(self, adapter, stock_class(self).__name__)
        output = stock_forward(view, **{**call, "input_ids": None, "inputs_embeds": embeds})
        view.check()
        return output

    return forward


class _Done:
    """What a step of the embeddings gives that has been done already: x + this, and x * this, is x."""

    def to(self, *args: Any, **kwargs: Any) -> _Done:  # noqa: ARG002
        return self

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__name__", "") in _DONE and not kwargs and len(args) == 2:
            return args[1] if isinstance(args[0], cls) else args[0]
        return NotImplemented


_DONE = frozenset({"add", "__add__", "__radd__", "mul", "__mul__", "__rmul__"})


class _ModelView:
    """A model as its own stock forward sees it during one call: without what the fused op has done already.

    Everything else is the model's, attributes set included. One view serves one call, so nothing is shared between
    threads and nothing is left behind by an exception.
    """

    def __init__(self, model: nn.Module, adapter: Adapter, name: str) -> None:
        hidden = self.__dict__
        hidden.update(_model=model, _name=name, _calls=[], _number=None, _again=adapter.dropout_again)
        parts = [part for part in (adapter.norm, adapter.dropout) if getattr(model, part or "", None) is not None]
        hidden["_expected"] = [*([adapter.positions] if adapter.positions else []), *parts]
        if adapter.positions is not None:
            hidden[adapter.positions] = self._add_nothing
            hidden["_positions"] = adapter.positions
        for part in parts:
            if part in model._modules:
                hidden[str(part)] = functools.partial(self._pass, part)
            else:
                hidden["_number"] = part
        if adapter.scale is not None:
            hidden[adapter.scale] = _Done()

    def _add_nothing(self, *args: Any, **kwargs: Any) -> _Done:  # noqa: ARG002
        self._calls.append(self._positions)
        return _Done()

    def _pass(self, part: str, hidden_states: Tensor) -> Tensor:
        if self._again and part in self._calls:
            output: Tensor = self._model._modules[part](hidden_states)
            return output
        self._calls.append(part)
        return hidden_states

    def check(self) -> None:
        """RuntimeError unless the stock forward has called every part once, in the expected order."""
        if self._calls != self._expected:
            import transformers

            raise RuntimeError(
                f"embedkernels: {self._name}.forward of transformers {transformers.__version__} called "
                f"{self._calls} where {self._expected} was expected, so its embeddings cannot be fused: use "
                "patch(model, embeddings=False)"
            )

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(self._model)

    def __getattr__(self, name: str) -> Any:
        if name == self.__dict__["_number"]:  # a probability that goes to F.dropout
            self._calls.append(name)
            return 0.0
        return getattr(self.__dict__["_model"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._model, name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self._model, name)


_FORWARDS: dict[str, Callable[[Adapter, Forward], Forward]] = {
    "stem": _stem_forward,
    "inline": _inline_forward,
    "scaled": _scaled_forward,
}

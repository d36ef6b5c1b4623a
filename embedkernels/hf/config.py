"""The configuration of a patched model: the user's own, but for the attention implementation it names.

In transformers the attention implementation is an attribute of the configuration, and models may share one: setting
it for one model would change the others. A patched model therefore holds a view of its configuration. View and
configuration have one ``__dict__``, so whatever is set on either is set on both; only the attention implementation,
and sub-configurations that are views themselves, are the view's own.

A view belongs to the model that it was made for, which keeps it in ``VIEWS``, where copies of the model find theirs.
Others may hold it too: the models around that one, and any that were made from its configuration. Unpatching hands
every module in reach the configuration itself back, and empties the views that belong to a model in reach: whoever
else still holds one of these reads nothing but the configuration through it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

_ATTENTION = "_attn_implementation_internal"
VIEWS = "_embedkernels_views"


class _Own:
    """An attribute that a view may have for itself, until something else is set: that is set for all, as in stock."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, view: Any, owner: type | None = None) -> Any:
        if view is None:
            return self
        own = view._embedkernels_own.get(self.name)
        if own is None or (is_view(own) and not own._embedkernels_own):
            return getattr(stock_of(view), self.name)
        return own

    def __set__(self, view: Any, value: Any) -> None:
        own = view._embedkernels_own.get(self.name)
        # A part is kept only where it is the very same object: another of equal content may be set.
        if own is value or (isinstance(own, str) and own == value):
            return
        view._embedkernels_own.pop(self.name, None)
        view.__dict__[self.name] = value

    def __delete__(self, view: Any) -> None:
        delattr(stock_of(view), self.name)
        view._embedkernels_own.pop(self.name, None)


class _ConfigView:
    """What a view adds to the class of its configuration."""

    __slots__ = ()

    def __reduce_ex__(self: Any, protocol: Any) -> tuple[Any, ...]:
        return view_of, (stock_of(self), self._embedkernels_own)

    def __copy__(self: Any) -> Any:
        stock = stock_of(self)
        twin = object.__new__(type(stock))
        twin.__dict__.update(stock.__dict__)
        return view_of(twin, dict(self._embedkernels_own))


class _EqualToStock:
    """What the class of the views of a class adds to ``type``: transformers looks models up by ``type(config)``."""

    def __eq__(cls, other: object) -> bool:
        return _stands_for(cls) is _stands_for(other)

    def __hash__(cls) -> int:
        return type.__hash__(_stands_for(cls))


def _stands_for(cls: Any) -> Any:
    return cls.__dict__.get("_embedkernels_class", cls) if isinstance(cls, type) else cls


_CLASSES: dict[type, type] = {}


def _class_of(stock: type[PreTrainedConfig]) -> type:
    """The subclass of ``stock`` that views are of. It passes for ``stock`` and makes instances of ``stock``."""
    if stock not in _CLASSES:
        namespace: dict[str, Any] = {
            "__slots__": ("_embedkernels_own", "_embedkernels_stock"),
            "__module__": stock.__module__,
            "__qualname__": stock.__qualname__,
            "__doc__": stock.__doc__,
            "__class__": property(lambda self: stock),  # noqa: ARG005
            "__new__": lambda cls, *args, **kwargs: stock(*args, **kwargs),  # noqa: ARG005
            "_embedkernels_class": stock,
        }
        for name in (_ATTENTION, *stock.sub_configs):
            namespace[name] = _Own(name)
        metaclass: Any = type("_ViewClass", (_EqualToStock, type(stock)), {})
        _CLASSES.setdefault(stock, metaclass(stock.__name__, (_ConfigView, stock), namespace))
    return _CLASSES[stock]


def view_of(stock: PreTrainedConfig, own: dict[str, Any]) -> Any:
    """A view of ``stock`` with these attributes of its own."""
    view: Any = object.__new__(_class_of(type(stock)))
    object.__setattr__(view, "__dict__", stock.__dict__)
    object.__setattr__(view, "_embedkernels_stock", stock)
    object.__setattr__(view, "_embedkernels_own", own)
    return view


def is_view(config: Any) -> bool:
    """Whether ``config`` is the view that a patched model holds of its configuration."""
    return isinstance(config, _ConfigView)


def stock_of(config: Any) -> Any:
    """The configuration that ``config`` is a view of, or ``config`` itself."""
    return config._embedkernels_stock if is_view(config) else config


def _own(config: Any) -> dict[str, Any]:
    own: dict[str, Any] = config._embedkernels_own if is_view(config) else {}
    return own


def _is_patched(config: Any) -> bool:
    """Whether ``config`` is a view whose attention implementation is its own."""
    return _ATTENTION in _own(config)


def _held(modules: Iterable[nn.Module]) -> Iterator[tuple[dict[str, Any], str, Any]]:
    """Every attribute of these modules that is a configuration."""
    for module in modules:
        for name, value in module.__dict__.items():
            if isinstance(value, PreTrainedConfig):
                yield module.__dict__, name, value


def _walk(module: nn.Module, enter: Callable[[nn.Module], bool]) -> Iterator[nn.Module]:
    """``module`` and what is in it, without the children that ``enter`` refuses and what is in those."""
    seen, left = set(), [module]
    while left:
        module = left.pop()
        if id(module) not in seen:
            seen.add(id(module))
            yield module
            left.extend(child for child in module.children() if enter(child))


def _read_by(model: PreTrainedModel) -> list[Any]:
    """The configurations of its class that ``model`` and its layers hold, those of models in it left out."""
    cls = type(stock_of(model.config))
    layers = _walk(model, lambda module: not isinstance(module, PreTrainedModel))
    held = (config for _, _, config in _held(layers) if type(stock_of(config)) is cls)
    return [model.config, *held]


def implementations(model: PreTrainedModel) -> list[str]:
    """The attention implementations that ``model`` and its layers read, the model's own first.

    They are one, unless a configuration was replaced in some of these modules and not in others.
    """
    return list(dict.fromkeys(str(config._attn_implementation) for config in _read_by(model)))


def set_attention(root: nn.Module, model: PreTrainedModel, implementation: str) -> None:
    """Give ``model``, and in ``root`` what is around it, views with this attention implementation.

    A model around it that has its configuration gets its view. One that has that as a sub-configuration gets a view
    of its own configuration, in which the sub-configuration is still the very object that the inner model holds.
    Views that ``model`` already has stay, and so does a configuration that names this implementation itself.
    """
    views = {id(stock_of(view)): view for view in model.__dict__.get(VIEWS, ()) if _is_patched(view)}
    for config in _read_by(model):
        stock = stock_of(config)
        if id(stock) not in views and (_is_patched(config) or config._attn_implementation != implementation):
            views[id(stock)] = view_of(stock, {_ATTENTION: implementation})
    if views:
        model.__dict__[VIEWS] = tuple(views.values())
        _spread(root, model, views)


def _spread(root: nn.Module, model: PreTrainedModel, views: dict[int, Any]) -> None:
    """Give the modules of ``model`` and those around it in ``root`` these views, by id of the configuration."""
    inside = {id(module.__dict__) for module in model.modules()}

    def concerned(module: nn.Module) -> bool:
        beside = isinstance(module, PreTrainedModel) and id(module.__dict__) not in inside
        return not beside or any(part is model for part in module.modules())

    held = list(_held(_walk(root, concerned)))
    known = {id(stock_of(config)): config for _, _, config in sorted(held, key=lambda one: is_view(one[2]))}
    of_model, given = set(views), dict(views)
    pending = True
    while pending:
        pending = False
        for key, config in known.items():
            stock, now = stock_of(config), given.get(key, config)
            parts = {name: given.get(id(stock.__dict__.get(name))) for name in stock.sub_configs}
            parts = {name: view for name, view in parts.items() if view is not None}
            same = all(_own(now).get(name) is view for name, view in parts.items())
            if parts and not (same and key in given):
                # A view that has these parts already is kept, and another keeps what an earlier patch gave it.
                given[key] = now if same else view_of(stock, {**_own(now), **parts})
                pending = True
    for attributes, name, config in held:
        key = id(stock_of(config))
        # A model around this one that has its configuration may be patched through another.
        if key in given and (key not in of_model or id(attributes) in inside or not _is_patched(config)):
            attributes[name] = given[key]


def restore(root: nn.Module) -> None:
    """Undo :func:`set_attention` for every model in ``root``; without a model in ``root`` nothing changes."""
    modules = list(root.modules())
    for module in modules:
        for view in module.__dict__.pop(VIEWS, ()):
            view._embedkernels_own.clear()
    if any(isinstance(module, PreTrainedModel) for module in modules):
        for attributes, name, config in list(_held(modules)):
            attributes[name] = stock_of(config)

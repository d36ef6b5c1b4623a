"""The configuration of a patched model: the user's own, but for the attention implementation it names.

In transformers the attention implementation is an attribute of the configuration, and models may share one: setting
it for one model would change the others. A patched model therefore holds a view of its configuration. View and
configuration have one ``__dict__``, so whatever is set on either is set on both; only the attention implementation,
and sub-configurations that are views themselves, are the view's own. Unpatching hands the configuration itself back.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

_ATTENTION = "_attn_implementation_internal"


class _Own:
    """An attribute that a view may have for itself, until something else is set: that is set for all, as in stock."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, view: Any, owner: type | None = None) -> Any:
        if view is None:
            return self
        own = view._embedkernels_own.get(self.name)
        if own is None or (is_view(own) and not own._embedkernels_own):
            return view.__dict__[self.name]
        return own

    def __set__(self, view: Any, value: Any) -> None:
        if view._embedkernels_own.get(self.name) is value:
            return
        view._embedkernels_own.pop(self.name, None)
        view.__dict__[self.name] = value


class _View:
    """What a view adds to the class of its configuration."""

    __slots__ = ()

    def __reduce_ex__(self: Any, protocol: Any) -> tuple[Any, ...]:
        return rebuild, (stock_of(self), self._embedkernels_own)

    def __copy__(self: Any) -> Any:
        stock = stock_of(self)
        twin = object.__new__(type(stock))
        twin.__dict__.update(stock.__dict__)
        return rebuild(twin, dict(self._embedkernels_own))


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
        }
        for name in (_ATTENTION, *stock.sub_configs):
            namespace[name] = _Own(name)
        _CLASSES.setdefault(stock, type(stock.__name__, (_View, stock), namespace))
    return _CLASSES[stock]


def rebuild(stock: PreTrainedConfig, own: dict[str, Any]) -> Any:
    """A view of ``stock`` with these attributes of its own."""
    view: Any = object.__new__(_class_of(type(stock)))
    object.__setattr__(view, "__dict__", stock.__dict__)
    object.__setattr__(view, "_embedkernels_stock", stock)
    object.__setattr__(view, "_embedkernels_own", own)
    return view


def is_view(config: Any) -> bool:
    """Whether ``config`` is the view that a patched model holds of its configuration."""
    return isinstance(config, _View)


def stock_of(config: Any) -> Any:
    """The configuration that ``config`` is a view of, or ``config`` itself."""
    return config._embedkernels_stock if is_view(config) else config


def is_patched(config: Any) -> bool:
    """Whether ``config`` is a view whose attention implementation is its own."""
    return is_view(config) and _ATTENTION in config._embedkernels_own


def _held(modules: Iterable[nn.Module]) -> Iterator[tuple[dict[str, Any], str, Any]]:
    """Every attribute of these modules that is a configuration."""
    for module in modules:
        for name, value in module.__dict__.items():
            if isinstance(value, PreTrainedConfig):
                yield module.__dict__, name, value


def set_attention(root: nn.Module, stock: PreTrainedConfig, implementation: str) -> None:
    """Give all modules in ``root`` that hold ``stock`` a view of it with this attention implementation.

    A configuration in ``root`` that has ``stock`` as a sub-configuration gets a view too, in which the
    sub-configuration is still the very object that the inner model holds.
    """
    new = {id(stock): rebuild(stock, {_ATTENTION: implementation})}
    held = list(_held(root.modules()))
    pending = True
    while pending:
        pending = False
        for _, _, config in held:
            outer = stock_of(config)
            for name in outer.sub_configs:
                inner = new.get(id(outer.__dict__.get(name)))
                if inner is None:
                    continue
                if id(outer) not in new:
                    # What an earlier patch gave the outer model stays.
                    new[id(outer)] = rebuild(outer, dict(config._embedkernels_own) if is_view(config) else {})
                if new[id(outer)]._embedkernels_own.get(name) is not inner:
                    new[id(outer)]._embedkernels_own[name] = inner
                    pending = True
    for attributes, name, config in held:
        of = stock_of(config)
        # A model that was patched before has its own view.
        if id(of) in new and not (of is stock and is_patched(config)):
            attributes[name] = new[id(of)]


def share(wrapper: nn.Module, view: Any) -> None:
    """Give ``wrapper``, around a model that holds ``view``, the view as well."""
    for attributes, name, config in list(_held([wrapper])):
        if stock_of(config) is stock_of(view):
            attributes[name] = view


def restore(root: nn.Module) -> None:
    """Undo :func:`set_attention` for every model in ``root``.

    A module outside ``root`` that still holds one of the views reads nothing but the configuration through it.
    """
    for module in root.modules():
        if isinstance(module, PreTrainedModel) and is_view(module.config):
            module.config._embedkernels_own.clear()
    for attributes, name, config in list(_held(root.modules())):
        if is_view(config) and not config._embedkernels_own:
            attributes[name] = stock_of(config)

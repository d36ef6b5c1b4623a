"""Arguments of a call by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

from embedkernels.hf.bodies import RENAMED

Forward = Callable[..., Any]


def bound_by_name(stock_forward: Forward) -> Callable[[tuple[Any, ...], dict[str, Any]], dict[str, Any] | None]:
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


def as_it_is_called(name: str, parameters: Iterable[str]) -> str | None:
    """The name that an argument has in this release, by the one before transformers 5.24; None if there is none."""
    names = [name, *(new for new, old in RENAMED.items() if old == name)]
    return next((one for one in names if one in parameters), None)

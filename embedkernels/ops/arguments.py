"""Arguments that are plain numbers: a TypeError that names the op and the argument where they are none."""

from __future__ import annotations

import operator

import torch


def checked_int(value: object, name: str, op: str) -> int:
    """``value`` if it counts as an int, also a symbolic one."""
    if isinstance(value, (int, torch.SymInt)):
        return value  # type: ignore[return-value]
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{op}: {name} must be an int, got {type(value).__name__}") from None


def checked_number(value: object, name: str, op: str) -> float:
    """``value`` if it counts as a float, also a symbolic one. Text does not, nor do tensors.

    A tensor may need a gradient, which it would not get, or wait for its device.
    """
    if isinstance(value, (float, torch.SymInt, torch.SymFloat)):
        return value  # type: ignore[return-value]
    if isinstance(value, (str, bytes, bytearray, torch.Tensor)):
        raise TypeError(f"{op}: {name} must be a number, got {type(value).__name__}")
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise TypeError(f"{op}: {name} must be a number, got {type(value).__name__}") from None

"""What ``patch`` leaves on a module: a mark that lets its fused forward run, and what is known of its id buffers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

MARK = "_embedkernels_patched"


class Mark:
    """In ``module.__dict__`` of every patched module, and of no other.

    The class alone does not say that a module is patched: it stays where something has wrapped it since (FSDP2 and
    parametrisations make a subclass of it), and so may a bound forward.
    """

    def __init__(self) -> None:
        # By name: the buffer that was looked at, its version then, and the id that it counts from.
        self.ids: dict[str, tuple[Tensor, int | None, int]] = {}
        # The same for the number that rows are multiplied by, which was read for one dtype.
        self.scale: tuple[Tensor, int | None, torch.dtype, float] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        # Copies have buffers of their own, which must be looked at again.
        return Mark, ()


def is_marked(module: nn.Module) -> bool:
    """Whether ``patch`` has changed this module and ``unpatch`` has not changed it back."""
    return MARK in module.__dict__


def _buffer(module: nn.Module, name: str) -> Any:
    buffer = module._buffers.get(name)
    return module.__dict__.get(name) if buffer is None else buffer


def ids_problem(module: nn.Module) -> str | None:
    """Why the ids that stock takes from buffers are not those of the fused forward, or None if they are.

    Stock modules read position ids and token type ids that a call does not give from buffers; the fused forward
    counts positions from :func:`first_position` on and takes type 0. The buffers are compared with that once, and
    again after they were replaced or written to, which their version counters tell without waiting for the device.
    What bypasses these is not seen: a write through ``.data`` (replace the buffer instead), and any change behind a
    graph of torch.compile, which keeps what it saw when it was traced.

    Args:
        module: with or without buffers ``position_ids`` and ``token_type_ids``.
    """
    for name in ("position_ids", "token_type_ids"):
        buffer = _buffer(module, name)
        first = 0 if buffer is None else _first(module, name, buffer)
        if first is None:
            return f"the buffer {name} cannot be read while a CUDA graph is captured: call the module once before"
        if first == _OTHER:
            return f"the buffer {name} was changed: it does not hold the ids that the class starts with"
    return None


def first_position(module: nn.Module) -> int:
    """The position of the first token, as the buffer has it: 0, but 2 in YOSO. For a module without a problem."""
    buffer = _buffer(module, "position_ids")
    return 0 if buffer is None else _first(module, "position_ids", buffer) or 0


def length_problem(module: nn.Module, read: Iterable[str], rows: int, end: int | None) -> str | None:
    """Why a call cannot take its ids from the buffers, which may be shorter than the position table, or None.

    Args:
        module: with or without these buffers.
        read: names of the buffers that hold the ids which the call does not give.
        rows: rows of the position table.
        end: one more than the last position of the call; None if only the device knows it.
    """
    for name in read:
        buffer = _buffer(module, name)
        if buffer is None or buffer.shape[-1] >= rows:  # beyond that the lookup fails, whatever the buffer holds
            continue
        if end is None or end > buffer.shape[-1]:
            wanted = "those at its positions" if end is None else str(end)
            return f"the buffer {name} holds {buffer.shape[-1]} ids, the call reads {wanted}"
    return None


_OTHER = -1


def _first(module: nn.Module, name: str, buffer: Tensor) -> int | None:
    """The id that the buffer counts from; ``_OTHER`` for other ids; None if that cannot be told now."""
    if torch.compiler.is_compiling():
        return _read_first(name, buffer)
    mark = module.__dict__.get(MARK)
    seen = None if mark is None else mark.ids.get(name)
    version = None if buffer.is_inference() else buffer._version
    if seen is not None and seen[0] is buffer and seen[1] == version:
        return int(seen[2])
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        return None
    first = _read_first(name, buffer)
    # The replicas of nn.DataParallel share the mark, run in threads and have buffers of their own.
    if mark is not None and not module.__dict__.get("_is_replica", False):
        mark.ids[name] = (buffer, version, first)
    return first


@torch.compiler.assume_constant_result
def _read_first(name: str, buffer: Tensor) -> int:
    # Tensors without values (meta, fake) stand for the ones they were made from.
    if type(buffer) is not Tensor or buffer.is_meta:
        return 0
    if buffer.dim() != 2 or buffer.shape[0] != 1:
        return _OTHER
    if name == "token_type_ids":
        return _OTHER if bool(buffer.any()) else 0
    first, length = int(buffer[0, 0]) if buffer.numel() else 0, buffer.shape[1]
    counted = torch.arange(first, first + length, device=buffer.device, dtype=buffer.dtype)
    return first if first >= 0 and torch.equal(buffer[0], counted) else _OTHER


def scale_of(module: nn.Module, name: str) -> tuple[float, str | None]:
    """The number that a scaled table multiplies its rows by, as stock has it, and why it cannot be told now.

    A plain number is as it is. A tensor is rounded to the weight's dtype first, read from the device once, and again
    after it was replaced or written to, but for writes through ``.data``, which leave no trace.

    Args:
        module: with a ``weight``.
        name: its attribute, a number or a buffer of one element.
    """
    scale = _buffer(module, name)
    if isinstance(scale, int | float):
        return float(scale), None
    if type(scale) is not Tensor or scale.numel() != 1 or scale.requires_grad:
        return 1.0, f"{name} is neither a number nor a buffer of one element"
    weight: Any = module.weight
    if torch.compiler.is_compiling():
        return _read_scale(scale, weight.dtype), None
    mark = module.__dict__.get(MARK)
    version = None if scale.is_inference() else scale._version
    seen = None if mark is None else mark.scale
    if seen is not None and seen[0] is scale and seen[1:3] == (version, weight.dtype):
        return float(seen[3]), None
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        return 1.0, f"{name} cannot be read while a CUDA graph is captured: call the module once before"
    value = _read_scale(scale, weight.dtype)
    if mark is not None and not module.__dict__.get("_is_replica", False):
        mark.scale = (scale, version, weight.dtype, value)
    return value, None


@torch.compiler.assume_constant_result
def _read_scale(scale: Tensor, dtype: torch.dtype) -> float:
    # Tensors without values (meta, fake) stand for ones whose value nobody needs.
    if type(scale) is not Tensor or scale.is_meta:
        return 1.0
    return float(scale.to(dtype))

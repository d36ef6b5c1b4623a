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
        # By name: the buffer that was looked at, its version then, and whether it held the default ids.
        self.ids: dict[str, tuple[Tensor, int | None, bool]] = {}

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
    counts positions and takes type 0. The buffers are compared with that once, and again after they were replaced or
    written to, which their version counters tell without waiting for the device. What bypasses these is not seen: a
    write through ``.data`` (replace the buffer instead), and any change behind a graph of torch.compile, which keeps
    what it saw when it was traced.

    Args:
        module: with or without buffers ``position_ids`` and ``token_type_ids``.
    """
    for name in ("position_ids", "token_type_ids"):
        buffer = _buffer(module, name)
        default = buffer is None or _is_default(module, name, buffer)
        if default is None:
            return f"the buffer {name} cannot be read while a CUDA graph is captured: call the module once before"
        if not default:
            return f"the buffer {name} was changed: it does not hold the ids that the class starts with"
    return None


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


def _is_default(module: nn.Module, name: str, buffer: Tensor) -> bool | None:
    """Whether the buffer holds the default ids; None if that cannot be told now."""
    if torch.compiler.is_compiling():
        return _holds_default(name, buffer)
    mark = module.__dict__.get(MARK)
    seen = None if mark is None else mark.ids.get(name)
    version = None if buffer.is_inference() else buffer._version
    if seen is not None and seen[0] is buffer and seen[1] == version:
        return bool(seen[2])
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        return None
    default = _holds_default(name, buffer)
    # The replicas of nn.DataParallel share the mark, run in threads and have buffers of their own.
    if mark is not None and not module.__dict__.get("_is_replica", False):
        mark.ids[name] = (buffer, version, default)
    return default


@torch.compiler.assume_constant_result
def _holds_default(name: str, buffer: Tensor) -> bool:
    # Tensors without values (meta, fake) stand for the ones they were made from.
    if type(buffer) is not Tensor or buffer.is_meta:
        return True
    if buffer.dim() != 2 or buffer.shape[0] != 1:
        return False
    if name == "token_type_ids":
        return not bool(buffer.any())
    return torch.equal(buffer, torch.arange(buffer.shape[1], device=buffer.device, dtype=buffer.dtype).unsqueeze(0))

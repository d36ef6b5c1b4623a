"""What ``patch`` leaves on a module: a mark that lets its fused forward run, and what is known of its id buffers."""

from __future__ import annotations

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


def ids_problem(module: nn.Module, positions: int) -> str | None:
    """Why the ids that stock takes from buffers are not those of the fused forward, or None if they are.

    Stock modules read position ids and token type ids that a call does not give from buffers; the fused forward
    counts positions and takes type 0. The buffers are compared with that once, and again after they were replaced or
    written to, which is seen without waiting for the device. A graph of torch.compile keeps what it saw when it was
    traced.

    Args:
        module: with or without buffers ``position_ids`` and ``token_type_ids``.
        positions: rows of its position table.
    """
    for name in ("position_ids", "token_type_ids"):
        buffer = module._buffers.get(name)
        if buffer is None:
            buffer = module.__dict__.get(name)
        if buffer is not None and not (buffer.shape[-1] >= positions and _is_default(module, name, buffer)):
            return f"the buffer {name} was changed: it does not hold the ids that the class starts with"
    return None


def _is_default(module: nn.Module, name: str, buffer: Tensor) -> bool:
    if torch.compiler.is_compiling():
        return _holds_default(name, buffer)
    mark = module.__dict__.get(MARK)
    seen = None if mark is None else mark.ids.get(name)
    version = None if buffer.is_inference() else buffer._version
    if seen is not None and seen[0] is buffer and seen[1] == version:
        return bool(seen[2])
    default = _holds_default(name, buffer)
    if mark is not None:
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

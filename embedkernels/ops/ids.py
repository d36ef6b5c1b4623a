"""Ids out of range: an IndexError that names the op, the table, the id and its position, on every device.

On a CPU the ids are checked before the lookup. On a GPU a check on the host would need a sync, so the kernel that
meets a bad id never touches the table with it (the row counts as zeros) and leaves a record in pinned host memory;
the next call of any op, or :func:`check_errors`, raises it. ``EMBEDKERNELS_CHECK_IDS=1`` raises at once.

The record outlives every call and graph that writes to it, so it must not come from memory that a CUDA graph owns.
The public ops make it before they run, :func:`begin`, which under torch.compile means while tracing. What captures a
graph without that, the raw op as the first call of a process, is refused with the remedy.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

# What a record's fields mean; the order is part of the kernels' interface (``embedkernels.kernels.ids``).
TABLES = ("token", "position", "token type", "packed")
OPS = ("embed", "embedding")
RECORD_FIELDS = 6  # set, table, id, position, rows in the table, op


@dataclass
class ErrorState:
    """What a device's kernels write when they meet an id out of range.

    Attributes:
        flag: int32 (1,), on the device: 0 until a kernel has claimed the record.
        record: int64 (6,), pinned host memory for a GPU: set, table, id, position, number of rows, op.
    """

    flag: Tensor
    record: Tensor

    def __post_init__(self) -> None:
        # The host's memory itself: no tensor op, no mode, no sync.
        self._set = ctypes.c_int64.from_address(self.record.data_ptr())

    @property
    def pending(self) -> bool:
        """Whether there is something to raise."""
        return self._set.value != 0


_states: dict[torch.device, ErrorState] = {}
_lock = threading.Lock()


@contextlib.contextmanager
def plain_tensors() -> Iterator[None]:
    """Ops inside make and change ordinary tensors, whatever mode the caller is in.

    A state made in inference mode could not be reset outside of it, and a tracer would make a fake one.
    """
    with torch.inference_mode(False), _disable_current_modes():
        yield


def capturing(device: torch.device) -> bool:
    """Whether the current stream of ``device`` is being captured in a CUDA graph."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def error_state(device: torch.device) -> ErrorState:
    """The record that kernels on ``device`` write to.

    Raises:
        RuntimeError: the first call on ``device`` is being captured in a CUDA graph.
    """
    state = _states.get(device)
    if state is not None:
        return state
    if capturing(device):
        raise RuntimeError(
            f"embedkernels: the first call on {device} is being captured in a CUDA graph, but it has to set up the "
            "record of ids out of range, which must not belong to a graph: run the op once before the capture"
        )
    with _lock, plain_tensors():
        if device not in _states:
            _states[device] = ErrorState(
                torch.zeros(1, dtype=torch.int32, device=device),
                torch.zeros(RECORD_FIELDS, dtype=torch.int64, device="cpu", pin_memory=device.type == "cuda"),
            )
            _settle(device)
        return _states[device]


def _settle(device: torch.device) -> None:
    """Wait until the flag has its value: kernels on other streams than the one that wrote it will read it."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


@torch.compiler.assume_constant_result
def _prepare(device: torch.device) -> None:
    if device not in _states and is_there(device):
        error_state(device)


def is_there(device: torch.device) -> bool:
    """Whether there is such a GPU: fake tensors claim devices that are not there."""
    return (device.index or 0) < torch.cuda.device_count()


def begin(device: torch.device) -> None:
    """Called by every public op that looks ids up: :func:`begin_without_ids`, and on a GPU have the record ready."""
    if device.type == "cuda":
        _prepare(device)
    begin_without_ids(device)


def begin_without_ids(device: torch.device) -> None:
    """Called by every public op: raise what is pending. A compiled graph raises in the ops that it calls."""
    if not torch.compiler.is_compiling():
        raise_pending(device)


def message(table: str, value: int, position: int, rows: int, op: str) -> str:
    """The text of the IndexError."""
    return (
        f"{op}: {table} id {value} at position {position} (of the flattened ids) is out of range "
        f"for a table of {rows} rows: valid ids are 0 to {rows - 1}"
    )


def check_ids(ids: Tensor, rows: int, table: str, op: str) -> None:
    """Raise IndexError if any of ``ids`` is outside [0, rows). Reads the ids: on a GPU a sync.

    Ids that have no values to read (meta and fake tensors, subclasses, what a CUDA graph captures) are not checked,
    nor does a graph of torch.compile wait for them.

    Args:
        ids: integer tensor of any shape.
        rows: number of rows in the table.
        table: ``"token"``, ``"position"`` or ``"token type"``, for the message.
        op: the op's name, for the message.
    """
    if torch.compiler.is_compiling():
        return
    while torch._C._functorch.is_functorch_wrapped_tensor(ids):
        ids = torch._C._functorch.get_unwrapped(ids)
    if ids.numel() == 0 or not _has_values(ids):
        return
    with _disable_current_modes():  # a tracer must not see that the ids are read
        low, high = torch.aminmax(ids)
        if int(low) >= 0 and int(high) < rows:
            return
        flat = ids.reshape(-1)
        position = int(((flat < 0) | (flat >= rows)).int().argmax())
        raise IndexError(message(table, int(flat[position]), position, rows, op))


def _has_values(ids: Tensor) -> bool:
    return (
        type(ids) in (Tensor, torch.nn.Parameter, torch.nn.Buffer) and not ids.is_meta and not capturing(ids.device)
    )


def raise_pending(device: torch.device) -> None:
    """Raise what a kernel on ``device`` has recorded so far. No sync unless there is something to raise.

    While a CUDA graph is captured nothing can be waited for: the record stays for the next call.
    """
    state = _states.get(device)
    if state is None or not state.pending or capturing(device):
        return
    with _lock, plain_tensors():
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found, table, value, position, rows, op = state.record.tolist()
        state.record.zero_()
        state.flag.zero_()
        _settle(device)
    if found:  # else another thread has raised it
        raise IndexError(message(TABLES[table], value, position, rows, OPS[op]))


def check_errors(device: torch.device | str | None = None) -> None:
    """Wait for the device and raise an IndexError if a kernel has met an id out of range since the last check.

    Args:
        device: one device; None checks every device that has run an op.

    Raises:
        IndexError: naming the op, the table, the first recorded id, its position and the table's size.
    """
    devices = list(_states) if device is None else [torch.empty(0, device=device).device]
    for one in devices:
        if one.type == "cuda":
            torch.cuda.synchronize(one)
        raise_pending(one)


def after_launch(device: torch.device) -> None:
    """Called after every launch that looks ids up: with ``EMBEDKERNELS_CHECK_IDS=1``, wait and raise at once.

    Not while a CUDA graph is captured, which runs nothing that could be waited for.
    """
    if os.environ.get("EMBEDKERNELS_CHECK_IDS", "0") == "1" and not capturing(device):
        check_errors(device)

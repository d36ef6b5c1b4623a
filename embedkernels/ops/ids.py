"""Ids out of range: an IndexError that names the table, the id and its position, on every device.

On a CPU the ids are checked before the lookup. On a GPU a check on the host would need a sync, so the kernel that
meets a bad id never touches the table with it (the row counts as zeros) and leaves a record in pinned host memory;
the next call of any op, or :func:`check_errors`, raises it. ``EMBEDKERNELS_CHECK_IDS=1`` raises at once.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from torch import Tensor

# What a record's first field means; the order is part of the kernels' interface.
TABLES = ("token", "position", "token type")
RECORD_FIELDS = 5  # set, table, id, position, rows in the table


@dataclass
class ErrorState:
    """What a device's kernels write when they meet an id out of range.

    Attributes:
        flag: int32 (1,), on the device: 0 until a kernel has claimed the record.
        record: int64 (5,), pinned host memory for a GPU: set, table, id, position, number of rows.
    """

    flag: Tensor
    record: Tensor


_states: dict[torch.device, ErrorState] = {}


def error_state(device: torch.device) -> ErrorState:
    """The record that kernels on ``device`` write to."""
    state = _states.get(device)
    if state is None:
        pinned = device.type == "cuda"
        state = ErrorState(
            torch.zeros(1, dtype=torch.int32, device=device),
            torch.zeros(RECORD_FIELDS, dtype=torch.int64, pin_memory=pinned),
        )
        _states[device] = state
    return state


def message(table: str, value: int, position: int, rows: int, op: str = "embed") -> str:
    """The text of the IndexError."""
    return (
        f"{op}: {table} id {value} at position {position} (of the flattened ids) is out of range "
        f"for a table of {rows} rows: valid ids are 0 to {rows - 1}"
    )


def check_ids(ids: Tensor, rows: int, table: str, op: str = "embed") -> None:
    """Raise IndexError if any of ``ids`` is outside [0, rows). Reads the ids: for CPU tensors.

    Args:
        ids: integer tensor of any shape.
        rows: number of rows in the table.
        table: ``"token"``, ``"position"`` or ``"token type"``, for the message.
        op: the op's name, for the message.
    """
    if ids.numel() == 0:
        return
    low, high = torch.aminmax(ids)
    if int(low) >= 0 and int(high) < rows:
        return
    flat = ids.reshape(-1)
    position = int(((flat < 0) | (flat >= rows)).int().argmax())
    raise IndexError(message(table, int(flat[position]), position, rows, op))


def raise_pending(device: torch.device) -> None:
    """Raise what a kernel on ``device`` has recorded so far. No sync unless there is something to raise."""
    state = _states.get(device)
    if state is None or int(state.record[0]) == 0:
        return
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    _, table, value, position, rows = state.record.tolist()
    state.record.zero_()
    state.flag.zero_()
    raise IndexError(message(TABLES[table], value, position, rows))


def check_errors(device: torch.device | str | None = None) -> None:
    """Wait for the device and raise an IndexError if a kernel has met an id out of range since the last check.

    Args:
        device: one device; None checks every device that has run an op.

    Raises:
        IndexError: naming the table, the first recorded id, its position and the table's size.
    """
    devices = list(_states) if device is None else [torch.empty(0, device=device).device]
    for one in devices:
        if one.type == "cuda":
            torch.cuda.synchronize(one)
        raise_pending(one)


def after_launch(device: torch.device) -> None:
    """Called after every launch that looks ids up: with ``EMBEDKERNELS_CHECK_IDS=1``, wait and raise at once."""
    if os.environ.get("EMBEDKERNELS_CHECK_IDS", "0") == "1":
        check_errors(device)

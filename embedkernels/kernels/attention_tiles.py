"""Tile sizes of the attention kernels: one table, no tuning at run time.

Each entry was chosen by compiling candidates for the family's target with Triton 3.6 and taking a large one that did
not spill and fits shared memory. None was chosen by timing, and none has run on a GPU. Tests compile every tile, in
variants of ``attention_specs.listed``; a sweep (``python -m bench.resources --variants all``) compiles all 1536, and
``bench/results/compiled/attention.json`` is what the last one found: no spills. fp32 has small tiles because its
products run without the matrix unit: tf32 would not keep the contract.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tile:
    """Queries and keys of one tile, warps of a program, stages of its pipeline.

    ``max_registers``, if given, is ptxas's limit (maxnreg). 255 is all there are; but without it ptxas stopped at 128
    registers in some variants and spilled 8 to 32 bytes, and with it it took up to 212 in these and spilled none.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None

    def options(self) -> dict[str, int]:
        """What a launch passes to Triton beside the block sizes."""
        limit = {} if self.max_registers is None else {"maxnreg": self.max_registers}
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, **limit}


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

# By family, bytes of an element and width of the tile: forward, dk and dv, dq.
_TABLE = {
    ("sm_80", 2, 16): Tiles(Tile(128, 64, 8, 3), Tile(64, 128, 8, 2), Tile(128, 64, 8, 3)),
    ("sm_80", 2, 32): Tiles(Tile(128, 64, 8, 3, 255), Tile(64, 128, 8, 2), Tile(128, 64, 8, 3, 255)),
    ("sm_80", 2, 64): Tiles(Tile(128, 64, 8, 3), Tile(32, 128, 8, 2), Tile(128, 32, 8, 2)),
    ("sm_80", 2, 128): Tiles(Tile(128, 32, 8, 2), Tile(16, 128, 8, 1), Tile(64, 64, 8, 1)),
    ("sm_80", 4, 16): Tiles(Tile(64, 64, 4, 2, 255), Tile(32, 64, 4, 2, 255), Tile(32, 32, 4, 2, 255)),
    ("sm_80", 4, 32): Tiles(Tile(64, 64, 8, 2, 255), Tile(32, 64, 8, 2, 255), Tile(64, 32, 8, 2, 255)),
    ("sm_80", 4, 64): Tiles(Tile(64, 32, 8, 2, 255), Tile(32, 32, 8, 2, 255), Tile(64, 32, 8, 2, 255)),
    ("sm_80", 4, 128): Tiles(Tile(32, 16, 8, 2, 255), Tile(16, 32, 8, 1, 255), Tile(32, 16, 8, 2, 255)),
    ("sm_90", 2, 16): Tiles(Tile(128, 64, 8, 3), Tile(64, 128, 8, 2), Tile(128, 64, 8, 3)),
    ("sm_90", 2, 32): Tiles(Tile(128, 64, 8, 3), Tile(64, 128, 8, 2), Tile(128, 64, 8, 3)),
    ("sm_90", 2, 64): Tiles(Tile(128, 128, 8, 2), Tile(64, 128, 8, 2), Tile(128, 64, 8, 2)),
    ("sm_90", 2, 128): Tiles(Tile(128, 64, 8, 2), Tile(32, 128, 8, 2), Tile(128, 64, 8, 2)),
    ("sm_90", 4, 16): Tiles(Tile(64, 64, 4, 2, 255), Tile(32, 32, 4, 2, 255), Tile(64, 32, 4, 2, 255)),
    ("sm_90", 4, 32): Tiles(Tile(64, 64, 8, 2, 255), Tile(32, 64, 8, 2, 255), Tile(64, 32, 8, 2, 255)),
    ("sm_90", 4, 64): Tiles(Tile(64, 32, 8, 2, 255), Tile(32, 32, 8, 2, 255), Tile(64, 32, 8, 2, 255)),
    ("sm_90", 4, 128): Tiles(Tile(32, 16, 8, 1, 255), Tile(16, 32, 8, 1, 255), Tile(16, 32, 4, 1, 255)),
    ("sm_100", 2, 16): Tiles(Tile(128, 64, 8, 3), Tile(64, 64, 4, 2), Tile(128, 64, 8, 3)),
    ("sm_100", 2, 32): Tiles(Tile(128, 64, 8, 3), Tile(64, 128, 8, 1), Tile(128, 64, 8, 3)),
    ("sm_100", 2, 64): Tiles(Tile(128, 64, 8, 3), Tile(64, 64, 8, 2, 255), Tile(128, 64, 8, 2)),
    ("sm_100", 2, 128): Tiles(Tile(128, 64, 8, 2), Tile(64, 64, 8, 2), Tile(128, 64, 8, 2, 255)),
    # Fewer than 64 rows a product: from there on Triton 3.6 rounds to tf32, whatever precision it is asked for.
    ("sm_100", 4, 16): Tiles(Tile(32, 64, 4, 2, 255), Tile(32, 32, 4, 2, 255), Tile(32, 32, 4, 2, 255)),
    ("sm_100", 4, 32): Tiles(Tile(32, 64, 8, 2, 255), Tile(32, 32, 8, 2, 255), Tile(32, 64, 8, 2, 255)),
    ("sm_100", 4, 64): Tiles(Tile(32, 32, 8, 2, 255), Tile(32, 32, 8, 2, 255), Tile(32, 32, 8, 2, 255)),
    ("sm_100", 4, 128): Tiles(Tile(32, 16, 8, 2, 255), Tile(16, 16, 4, 1, 255), Tile(32, 16, 8, 2, 255)),
    ("gfx942", 2, 16): Tiles(Tile(128, 64, 8, 3), Tile(64, 64, 4, 2), Tile(128, 64, 8, 3)),
    ("gfx942", 2, 32): Tiles(Tile(128, 64, 8, 3), Tile(64, 64, 4, 2), Tile(128, 64, 8, 3)),
    ("gfx942", 2, 64): Tiles(Tile(128, 64, 8, 3), Tile(64, 64, 4, 1), Tile(64, 64, 4, 2)),
    ("gfx942", 2, 128): Tiles(Tile(128, 32, 8, 2), Tile(32, 64, 4, 1), Tile(64, 32, 4, 2)),
    ("gfx942", 4, 16): Tiles(Tile(64, 64, 4, 2), Tile(32, 64, 4, 2), Tile(64, 32, 4, 2)),
    ("gfx942", 4, 32): Tiles(Tile(64, 64, 8, 2), Tile(32, 32, 4, 2), Tile(64, 32, 8, 2)),
    ("gfx942", 4, 64): Tiles(Tile(64, 32, 8, 2), Tile(32, 32, 4, 2), Tile(64, 32, 8, 2)),
    ("gfx942", 4, 128): Tiles(Tile(32, 32, 4, 2), Tile(16, 32, 8, 1), Tile(32, 16, 8, 2)),
}
# Where dropout's bits are what the registers run out of, larger tiles without it.
_WITHOUT_DROPOUT = {
    ("sm_80", 2, 128): Tiles(Tile(128, 32, 8, 2), Tile(64, 64, 8, 2), Tile(64, 64, 8, 1)),
    ("sm_100", 2, 128): Tiles(Tile(128, 64, 8, 2), Tile(64, 128, 8, 1), Tile(128, 64, 8, 2, 255)),
}

# By bytes of an element, for head sizes that are no multiple of 16: Triton does not know their rows to be aligned and
# loads single elements, whose addresses take up the registers.
_UNALIGNED = {
    2: Tiles(Tile(32, 32, 8, 1, 255), Tile(32, 32, 8, 1, 255), Tile(16, 16, 8, 1, 255)),
    4: Tiles(Tile(16, 16, 4, 1, 255), Tile(16, 16, 4, 1, 255), Tile(16, 16, 16, 1, 128)),
}
_UNALIGNED_ON_AMD = {
    2: Tiles(Tile(32, 32, 4, 1), Tile(32, 32, 4, 1), Tile(32, 32, 4, 1)),
    4: Tiles(Tile(32, 32, 4, 1), Tile(16, 32, 4, 1), Tile(32, 16, 4, 1)),
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
    if query.shape[3] % 16:
        return unaligned_tiles(family(query.device), query.element_size())
    entry = family(query.device), query.element_size(), block_d(query.shape[3])
    return _TABLE[entry] if dropout else _WITHOUT_DROPOUT.get(entry, _TABLE[entry])


def unaligned_tiles(name: str, element_size: int) -> Tiles:
    """The tiles of a family for head sizes that are no multiple of 16."""
    return (_UNALIGNED_ON_AMD if name == "gfx942" else _UNALIGNED)[element_size]


def shipped_tiles() -> Iterator[tuple[str, tuple[str, ...], int, bool, Tiles]]:
    """Every entry once: family, the dtypes it serves, the width of its tiles, whether dropout may be on, tiles."""
    for dropout, table in ((True, _TABLE), (False, _WITHOUT_DROPOUT)):
        for (name, element_size, width), tiles in table.items():
            yield name, ("fp32",) if element_size == 4 else ("bf16", "fp16"), width, dropout, tiles


@contextlib.contextmanager
def use_tiles(tiles: Tiles | None) -> Iterator[None]:
    """Within the block, every launch takes ``tiles``, or the table's if None: for tests and measurements.

    Block sizes are powers of two from 16 to 128.
    """
    global _forced
    before, _forced = _forced, tiles
    try:
        yield
    finally:
        _forced = before

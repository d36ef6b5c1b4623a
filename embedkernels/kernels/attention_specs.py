"""Which variants of the attention kernels are compiled as proof, and how each is specialised at launch.

A variant is one combination of what a launch fixes at compile time. :func:`listed` has each tile with every feature
on, lighter variants that once spilled registers, and some shapes that Triton specialises on its own; :func:`every`
combines the features for a sweep of most of an hour, whose results ``attention_tiles`` names.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from embedkernels.kernels.attention_tiles import TARGETS, Tiles, shipped_tiles, unaligned_tiles
from embedkernels.kernels.specs import CompileSpec

_POINTERS = {
    "lse_ptr": "*fp32", "rows_ptr": "*fp32", "bounds_ptr": "*i32", "mask_ptr": "*u8",
    "ranges_ptr": "*i32", "seed_ptr": "*i64",
}  # fmt: skip
_FLOATS = ("scale_log2", "dropout_p", "keep_scale", "dk_scale", "dv_scale", "dq_scale")


# Head sizes that do not fill their tile; and those that are no multiple of 16, which have tiles of their own.
REDUCED = {("bf16", 64): 48, ("bf16", 128): 96, ("fp32", 128): 96}
# Every feature and a window; and, with ranges in place of causal order, packed documents.
WINDOWED = frozenset({("bf16", 64), ("bf16", 128), ("fp32", 64), ("fp32", 128)})
UNALIGNED = {32: 24, 64: 40, 128: 72}
# Without dropout, causal order, bounds and mask, and with one query head per key head, unless said otherwise.
_PLAIN = {"causal": False, "bounds": False, "mask": False, "group": 1}
_PADDED = {**_PLAIN, "bounds": True, "mask": True}
_CAUSAL = {**_PLAIN, "causal": True}
_DROPOUT = {"dropout": True}
# By family, kernel, dtype and width. On sm_90, at the most common head size, those that models launch; elsewhere
# those that took the most registers, or spilled with a tile that was too large.
LIGHTER: dict[tuple[str, str, str, int], list[dict[str, Any]]] = {
    **{
        ("sm_90", which, "bf16", 64): [
            _PLAIN, _CAUSAL, _PADDED, {**_PADDED, **_DROPOUT}, {**_PADDED, "single": True},
            {**_CAUSAL, "bounds": True},
            # dk and dv are summed over a group; the other kernels only divide a head's number by it.
            *([{**_CAUSAL, "group": 3}] if which == "dkdv" else []),
        ]
        for which in ("forward", "dkdv", "dq")
    },
    ("sm_80", "forward", "bf16", 32): [_PADDED],
    ("sm_80", "forward", "fp32", 128): [_PLAIN, _PADDED],
    ("sm_80", "dkdv", "fp32", 64): [_PADDED],
    ("sm_80", "dkdv", "fp32", 128): [_CAUSAL, {**_PLAIN, **_DROPOUT, "group": 3}],
    ("sm_80", "dq", "bf16", 32): [{**_PLAIN, **_DROPOUT}],
    ("sm_80", "dq", "bf16", 64): [_PADDED, {**_PLAIN, **_DROPOUT}, {**_CAUSAL, **_DROPOUT}],
    ("sm_80", "dq", "fp32", 128): [_PADDED],
    ("sm_100", "forward", "bf16", 128): [_PLAIN],
    ("sm_100", "dkdv", "bf16", 64): [{**_CAUSAL, "group": 3}, {**_PLAIN, **_DROPOUT}],
    ("sm_100", "dkdv", "fp32", 16): [{"group": 1}],
    ("sm_100", "dkdv", "fp32", 64): [{"group": 3}],
    ("sm_100", "dkdv", "fp32", 128): [_CAUSAL, {**_CAUSAL, **_DROPOUT}],
    ("sm_100", "dq", "bf16", 128): [_PLAIN],
    ("sm_100", "dq", "fp32", 128): [_PADDED],
}  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """What a launch of an attention kernel fixes at compile time, beside its tile.

    ``single``: one head and one key, where Triton takes the numbers that are 1 for constants.
    """

    family: str
    dtype: str
    width: int
    head_size: int
    dropout: bool
    causal: bool = True
    bounds: bool = True
    mask: bool = True
    group: int = 3
    single: bool = False
    window: bool = False
    ranges: bool = False

    @property
    def label(self) -> str:
        """``"sm_90,d64,causal,dropout,bf16"``; every feature on but for dropout, a window and ranges
        goes without saying."""
        words = [self.family, f"d{self.head_size}"]
        if not (self.causal and self.bounds and self.mask):
            known = {"causal": self.causal, "bounds": self.bounds and not self.mask, "mask": self.mask}
            words.append("+".join(name for name, on in known.items() if on) or "plain")
        words += [f"group {self.group}"] if self.group != 3 else []
        words += ["single"] if self.single else []
        words += ["window"] if self.window else []
        words += ["ranges"] if self.ranges else []
        words += ["dropout"] if self.dropout else []
        return ",".join([*words, self.dtype])


def spec(kernel: Any, which: str, variant: Variant, tiles: Tiles) -> CompileSpec:
    """The compilation of a variant of ``kernel``, which is launched with the tile ``which`` of ``tiles``."""
    tile = getattr(tiles, which)
    constexprs = {
        "GROUP": variant.group, "D": variant.head_size, "BLOCK_D": variant.width,
        "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "CAUSAL": variant.causal, "WINDOW": variant.window,
        "RANGES": variant.ranges, "HAS_BOUNDS": variant.bounds, "HAS_MASK": variant.mask, "DROPOUT": variant.dropout,
    }  # fmt: skip
    if variant.single:
        constexprs |= {name: 1 for name in ("H", "H_kv", "mask_stride_b") if name in kernel.arg_names}
    signature = {
        name: _POINTERS.get(name, "*" + variant.dtype)
        if name.endswith("_ptr")
        else ("fp32" if name in _FLOATS else "i32")
        for name in kernel.arg_names
        if name not in constexprs
    }
    # A row of head_size elements need not be a multiple of 16 of them.
    aligned = {n for n in signature if n.endswith("_ptr") or ("_stride_" in n and variant.head_size % 16 == 0)}
    return CompileSpec(
        f"{kernel.__name__}[{variant.label}]", kernel, signature, constexprs, tile.num_warps, tile.num_stages,
        frozenset(aligned - {"mask_stride_b", "ranges_stride_b"}), TARGETS[variant.family], tile.max_registers,
    )  # fmt: skip


def _heaviest() -> Iterator[tuple[Variant, Tiles]]:
    for family, dtypes, width, dropout, tiles in shipped_tiles():
        for dtype in dtypes:
            yield Variant(family, dtype, width, width, dropout), tiles


def _unaligned(variant: Variant) -> Tiles:
    return unaligned_tiles(variant.family, 4 if variant.dtype == "fp32" else 2)


def every(kernel: Any, which: str) -> list[CompileSpec]:
    """The features combined, bounds and mask together, at every width and at two sizes of unaligned rows.

    Not compiled, but taken to be like what is: fp16 (bf16), other groups (three heads), other head sizes of a width
    (the full one, or 40 and 72), one head or one key.
    """
    specs = []
    table = {(v.family, v.dtype, v.width, v.dropout): tiles for v, tiles in _heaviest() if v.dtype != "fp16"}
    for family, dtype, width, _ in [key for key in table if key[3]]:
        for dropout in (False, True):
            tiles = table.get((family, dtype, width, dropout), table[family, dtype, width, True])
            # dk and dv are summed over a group; the other kernels only divide a head's number by it.
            groups = (1, 3) if which == "dkdv" else (1,)
            for causal, padded, group in itertools.product((False, True), (False, True), groups):
                variant = Variant(family, dtype, width, width, dropout, causal, padded, padded, group)
                specs.append(spec(kernel, which, variant, tiles))
                if width >= 64:
                    variant = replace(variant, head_size=UNALIGNED[width])
                    specs.append(spec(kernel, which, variant, _unaligned(variant)))
    return specs


def listed(kernel: Any, which: str) -> list[CompileSpec]:
    """Each tile with every feature on, and what is lighter or odd but has its own reasons to be compiled."""
    found: dict[str, CompileSpec] = {}

    def add(variant: Variant, tiles: Tiles) -> None:
        made = spec(kernel, which, variant, tiles)
        found[made.name] = made

    tiles_of: dict[tuple[str, str, int, bool], Tiles] = {}
    for variant, tiles in _heaviest():
        tiles_of[variant.family, variant.dtype, variant.width, variant.dropout] = tiles
        with_dropout = tiles_of[variant.family, variant.dtype, variant.width, True]
        if variant.dropout or getattr(tiles, which) != getattr(with_dropout, which):
            add(variant, tiles)
        if (variant.dtype, variant.width) in WINDOWED and variant.dropout:
            add(replace(variant, window=True), tiles)
            add(replace(variant, causal=False, ranges=True), tiles)
        if (variant.dtype, variant.width) in REDUCED and variant.dropout:
            add(replace(variant, head_size=REDUCED[variant.dtype, variant.width]), tiles)
        if variant.dtype != "fp16" and variant.width in UNALIGNED and variant.dropout:
            reduced = replace(variant, head_size=UNALIGNED[variant.width])
            add(reduced, _unaligned(reduced))
    for key, variants in LIGHTER.items():
        family, name, dtype, width = key
        for change in variants if name == which else ():
            variant = replace(Variant(family, dtype, width, width, False), **change)
            tiles = tiles_of.get((family, dtype, width, variant.dropout)) or tiles_of[family, dtype, width, True]
            add(variant, tiles)
    return list(found.values())

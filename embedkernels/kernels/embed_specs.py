"""Configurations of the kernels of ``embed`` that are compiled without being run."""

from __future__ import annotations

import itertools
from typing import Any

from embedkernels.kernels.embed import (
    REDUCE_COLUMNS,
    REDUCE_ROWS,
    embed_bwd_kernel,
    embed_bwd_reduce_kernel,
    embed_fwd_kernel,
    embed_projection_kernel,
    embed_stats_kernel,
    tile,
)
from embedkernels.kernels.specs import CompileSpec

_POINTERS = {
    "mean_ptr": "fp32", "rstd_ptr": "fp32", "partial_ptr": "fp32", "projection_ptr": "fp32", "ids_ptr": "i64",
    "position_ids_ptr": "i64", "type_ids_ptr": "i64", "seed_ptr": "i64", "flag_ptr": "i32", "record_ptr": "i64",
    "mask_ptr": "u8", "packed_ptr": "i64",
}  # fmt: skip
_FLOATS = ("eps", "p", "scale", "factor", "row_scale")
# What BERT does; constexprs that are not here are on.
_HEAVIEST = {"SINUSOIDS": 0, "PACKED": False, "GIVEN": False, "SCALE": False, "EXTRA": False, "NORM": 1, "DROPOUT": 1,
             "MASK": False}  # fmt: skip
# Under autocast tables are bf16 and the norm fp32, as are the output and its gradient.
_AUTOCAST = dict.fromkeys(("out_ptr", "grad_ptr", "norm_weight_ptr", "norm_bias_ptr"), "fp32")
_INT32 = dict.fromkeys(("ids_ptr", "position_ids_ptr", "type_ids_ptr"), "i32")
_CONSTANTS = {"position_weight_ptr": "fp32"}
_LIGHT = {"SCALE": True, "MASK": True}
_EVERYTHING = {**_LIGHT, "EXTRA": True, "DROPOUT": 2}
_GIVEN = {**_EVERYTHING, "GIVEN": True, "NORM": 2, "BIAS": False}
_NO_NORM = {"NORM": 0, "WEIGHT": False, "BIAS": False, "NEED_NORM": False}
# What models launch, and the most that can be asked for together: pointers, POSITION, TYPE, other constexprs.
_VARIANTS: dict[str, tuple[dict[str, str], int, int, dict[str, Any]]] = {
    "": ({}, 2, 2, {}),
    "bert,": ({}, 1, 1, {}),
    "autocast,": (_AUTOCAST, 1, 2, {}),
    "int32,": (_INT32, 2, 2, {}),
    "gpt2,": ({}, 1, 0, _NO_NORM),
    "marian,": (_CONSTANTS, 1, 0, {**_NO_NORM, "SINUSOIDS": 1, "SCALE": True}),
    "scaled and masked,": ({}, 2, 2, _LIGHT),
    "everything,": ({}, 2, 2, _EVERYTHING),
    "packed,": ({}, 1, 2, {"PACKED": True}),
    "rows given,": ({}, 1, 1, _GIVEN),
    "sinusoids,": (_CONSTANTS, 1, 0, {"SINUSOIDS": 1, "SCALE": True}),
    "rounded sinusoids,": (_CONSTANTS, 2, 0, {"SINUSOIDS": 2, "SCALE": True}),
}
# Of rows wider than a tile.
_WIDE_VARIANTS = {
    "everything,": ({"mask_ptr": "fp32"}, 2, 2, _EVERYTHING),
    "rows given,": ({}, 1, 1, {**_GIVEN, "PACKED": True, "MASK": False}),
    "rounded sinusoids,": _VARIANTS["rounded sinusoids,"],
}
_WIDTHS = (64, 384, 768, 1024)
_WIDE_WIDTHS = (2048, 4096, 8192, 16384)


def compile_specs() -> list[CompileSpec]:
    """Every tile with all tables, ids from memory, norm and dropout; in bf16 every variant at three widths."""
    specs = [
        spec
        for dtype, width in itertools.product(("bf16", "fp32"), (*_WIDTHS, *_WIDE_WIDTHS))
        for spec in _specs(dtype, width, "", _VARIANTS[""])
    ]
    for label, variant in _VARIANTS.items():
        if label:
            specs += [*_specs("bf16", _WIDTHS[0], label, variant), *_specs("bf16", _WIDTHS[-1], label, variant)]
    for label, variant in _WIDE_VARIANTS.items():
        specs += _specs("bf16", _WIDE_WIDTHS[-1], label, variant)
    for dtype, itemsize in (("bf16", 2), ("fp32", 4)):
        t = tile(4096, itemsize, False, False)
        specs.append(
            _spec(embed_fwd_kernel, dtype, t.num_warps, "tokens,", {}, {
                "D": 4096, "BLOCK_N": t.block_n, "BLOCK_D": t.block_d, "WIDE": True, "POSITION": 0, "TYPE": 0,
                "NORM": 0, "DROPOUT": 0,
            })
        )  # fmt: skip
        sums = {"D": 768, "BLOCK_P": REDUCE_ROWS, "BLOCK_D": REDUCE_COLUMNS}
        specs.append(_spec(embed_bwd_reduce_kernel, dtype, 4, "", {}, sums))
    return specs


def every_variant() -> list[CompileSpec]:
    """All variants of rows that fit a tile with room to spare, in both dtypes."""
    return [
        spec
        for dtype, width, (label, variant) in itertools.product(("bf16", "fp32"), _WIDTHS, _VARIANTS.items())
        for spec in _specs(dtype, width, label, variant)
    ]


def _specs(dtype: str, width: int, label: str, variant: Any) -> list[CompileSpec]:
    """The forward and the backward kernel, and of rows wider than a tile those before them."""
    pointers, position, kind, flags = variant
    specs = []
    for backward in (False, True):
        t = tile(
            width, 2 if dtype == "bf16" else 4, flags.get("NORM", 1) != 0, backward,
            any(flags.get(name) for name in ("SINUSOIDS", "PACKED", "EXTRA")) or flags.get("DROPOUT") == 2,
            "SINUSOIDS" in flags,
        )  # fmt: skip
        constexprs = {
            "D": width, "BLOCK_N": t.block_n, "BLOCK_D": t.block_d, "POSITION": position, "TYPE": kind,
            "WIDE": t.chunks > 1, **flags,
        }  # fmt: skip
        kernels = [embed_bwd_kernel if backward else embed_fwd_kernel]
        if t.chunks > 1 and constexprs.get("NORM") != 0:
            kernels.append(embed_projection_kernel if backward else embed_stats_kernel)
        specs += [_spec(kernel, dtype, t.num_warps, label, pointers, constexprs) for kernel in kernels]
    return specs


def _spec(
    kernel: Any, dtype: str, num_warps: int, label: str, pointers: dict[str, str], constexprs: dict[str, Any]
) -> CompileSpec:
    types = {**_POINTERS, **pointers}
    chosen = [parameter.name for parameter in kernel.params if parameter.is_constexpr]
    signature = {}
    for name in kernel.arg_names:
        if name.endswith("_ptr"):
            signature[name] = "*" + types.get(name, dtype)
        elif name not in chosen:
            signature[name] = "fp32" if name in _FLOATS else "i32"
    flags = {name: {**_HEAVIEST, **constexprs}.get(name, True) for name in chosen}
    return CompileSpec(
        f"{kernel.__name__}[d{flags['D']},{label}{dtype}]", kernel, signature, flags, num_warps, 1,
        frozenset(name for name in signature if name.endswith("_ptr")),
    )  # fmt: skip

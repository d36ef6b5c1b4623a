"""Which variants of the embedding gradient's kernels are compiled as proof."""

from __future__ import annotations

from embedkernels.kernels import embedding_grad as kernels
from embedkernels.kernels.embedding import column_block
from embedkernels.kernels.specs import CompileSpec

_TYPES = {
    "owner_ptr": "*i32", "order_ptr": "*i32", "segment_ids_ptr": "*i32", "segment_offsets_ptr": "*i32",
    "count_ptr": "*i32", "sources_ptr": "*i32", "seed_ptr": "*i64",
}  # fmt: skip
_MODES = {
    "dense": kernels.DENSE, "accumulate": kernels.ACCUMULATE, "rows": kernels.ROWS, "padded rows": kernels.PADDED_ROWS
}  # fmt: skip
# Row sizes that give every column block, and rows of every alignment; one that is aligned and one that is not.
_WIDTHS = (16, 33, 64, 384, 768, 1000, 2560, 4096)
_TWO_WIDTHS = (33, 768)
_EVERYTHING = ("sources", "weights", "scaled")
# Mode, dtype of the gradient rows and of ``out``, and what else is asked for.
_VARIANTS: tuple[tuple[str, str, str, tuple[str, ...]], ...] = (
    ("accumulate", "bf16", "bf16", ()),
    ("accumulate", "bf16", "fp32", ()),
    ("accumulate", "bf16", "bf16", ("stochastic",)),
    ("accumulate", "bf16", "bf16", (*_EVERYTHING, "stochastic")),
    ("accumulate", "fp32", "bf16", (*_EVERYTHING, "stochastic")),
    ("accumulate", "fp32", "fp32", _EVERYTHING),
    ("accumulate", "fp64", "fp64", _EVERYTHING),
    ("dense", "bf16", "bf16", _EVERYTHING),
    ("rows", "bf16", "bf16", ()),
    ("padded rows", "bf16", "bf16", ()),
    ("padded rows", "bf16", "fp32", ("sources", "weights")),
)
_OPTIONAL = {"sources_ptr": "sources", "weights_ptr": "weights", "seed_ptr": "stochastic"}


def _spec(
    which: str, width: int, mode: str, dtype: str, out: str, features: tuple[str, ...], contiguous: bool = True
) -> CompileSpec:
    kernel = getattr(kernels, f"embedding_grad_{which}_kernel")
    wide = "fp64" if dtype == "fp64" else "fp32"
    types = {"out_ptr": out, "grad_ptr": dtype, "carry_ptr": wide, "weights_ptr": wide}
    constexprs = {"D": width, "MODE": _MODES[mode].value, "SCALE": "scaled" in features}
    if which == "tile":
        block_d = column_block(width)
        num_warps = kernels.tile_warps(block_d)
        constexprs |= {"BLOCK_D": block_d, "CONTIGUOUS": contiguous, "GROUP": kernels.group_rows(_MODES[mode])}
        constexprs["ZERO_ROWS"] = kernels.ZERO_ROWS
    else:
        num_warps = kernels.CARRY_WARPS
        constexprs |= {"BLOCK_D": kernels.CARRY_COLUMNS, "CARRY_ROWS": kernels.CARRY_ROWS}
    signature = {}
    for parameter in kernel.params:
        name = parameter.name
        if name in _OPTIONAL and _OPTIONAL[name] not in features:
            constexprs[name] = None
        elif not parameter.is_constexpr:
            signature[name] = _TYPES.get(name, f"*{types[name]}" if name in types else "i32")
    divisible = {name for name in signature if name.endswith("_ptr")} | (set() if contiguous else {"grad_stride_n"})
    dtypes = dtype if out == dtype else f"{dtype} to {out}"
    label = ",".join((f"d{width}", dtypes, mode, *features, *([] if contiguous else ["strided"])))
    name = f"{kernel.__name__}[{label}]"
    return CompileSpec(name, kernel, signature, constexprs, num_warps, 1, frozenset(divisible))


def compile_specs() -> list[CompileSpec]:
    """The variants, and the plain dense gradient of every row size, contiguous and strided.

    Carries know nothing of sources and weights, and take most where rows are not aligned.
    """
    specs = []
    for mode, dtype, out, features in _VARIANTS:
        specs += [_spec("tile", width, mode, dtype, out, features) for width in _TWO_WIDTHS]
        of_carries = tuple(feature for feature in features if feature in ("scaled", "stochastic"))
        specs.append(_spec("carry", _TWO_WIDTHS[0], mode, dtype, out, of_carries))
    for dtype in ("bf16", "fp32", "fp64"):
        for width in _WIDTHS:
            specs.append(_spec("tile", width, "dense", dtype, dtype, ()))
            specs.append(_spec("tile", width, "dense", dtype, dtype, (), contiguous=False))
            specs.append(_spec("carry", width, "dense", dtype, dtype, ()))
    return specs

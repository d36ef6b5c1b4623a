"""Lookup of rows: out[n] = weight[ids[n]], for any row size, with ids checked where they are used.

Grid (N / BLOCK_N, D / BLOCK_D): a program copies BLOCK_N rows, BLOCK_D columns of each. Bytes (e = element size): at
most N·D·e read, N·D·e written, N·8 of ids; rows met again come from the caches. An id out of range is never used as
an address: its row is written as zeros and reported.

Addresses are 64-bit. D and the weight's row stride are compile-time constants, so that the compiler knows whether
rows start at multiples of 16 bytes.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from embedkernels.kernels.ids import report_bad_id
from embedkernels.kernels.specs import CompileSpec

# A tile is four 16-byte pieces for each thread; where rows are not aligned to 16 bytes, eight single elements.
_WARPS = 4
_TILE_BYTES = 4 * 16 * 32 * _WARPS
_TILE_ELEMENTS = 8 * 32 * _WARPS
_WIDEST = 1024


@triton.jit(do_not_specialize=["n", "num_rows", "table", "op"])
def embedding_fwd_kernel(
    out_ptr, ids_ptr, weight_ptr, flag_ptr, record_ptr, n, num_rows, table, op,
    D: tl.constexpr, WEIGHT_STRIDE_V: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One tile of rows. ``table`` and ``op``: what a record names."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    live = rows < n
    inside = (columns < D)[None, :]
    ids = tl.load(ids_ptr + rows, mask=live, other=0).to(tl.int64)
    known = live & (ids >= 0) & (ids < num_rows)
    # Every column block of a row meets the same ids: the first one reports.
    bad = live & (known == 0) & (tl.program_id(1) == 0)
    report_bad_id(bad, ids, rows, num_rows, table, op, flag_ptr, record_ptr)
    at = weight_ptr + ids[:, None] * WEIGHT_STRIDE_V + columns[None, :]
    tile = tl.load(at, mask=known[:, None] & inside, other=0.0)
    tl.store(out_ptr + rows[:, None] * D + columns[None, :], tile, mask=live[:, None] & inside)


def column_block(width: int) -> int:
    """Columns that one program takes: a power of two that divides ``width`` if a large one does, else one above."""
    divisor = width & -width
    if divisor >= 128:
        return min(divisor, _WIDEST)
    return min(max(triton.next_power_of_2(width), 16), _WIDEST)


def row_block(width: int, itemsize: int) -> int:
    """Rows that one program takes."""
    aligned = width * itemsize % 16 == 0
    return max(1, (_TILE_BYTES // itemsize if aligned else _TILE_ELEMENTS) // column_block(width))


def embedding_forward(
    out: Tensor, ids: Tensor, weight: Tensor, errors: tuple[Tensor, Tensor], table: int, op: int
) -> None:
    """Fill ``out``.

    Args:
        out: (N, D), contiguous, N and D positive.
        ids: int32 or int64, N elements, contiguous.
        weight: (V, D), rows contiguous.
        errors: flag and record of the device.
        table, op: places in ``embedkernels.ops.ids.TABLES`` and ``OPS``, for the record.
    """
    n, width = out.shape
    block_d = column_block(width)
    block_n = row_block(width, weight.itemsize)
    grid = (triton.cdiv(n, block_n), triton.cdiv(width, block_d))
    embedding_fwd_kernel[grid](
        out, ids, weight, *errors, n, weight.shape[0], table, op,
        D=width, WEIGHT_STRIDE_V=weight.stride(0), BLOCK_N=block_n, BLOCK_D=block_d, num_warps=_WARPS,
    )  # fmt: skip


def compile_specs() -> list[CompileSpec]:
    """Row sizes that give every column block, in every element size, and rows that are not aligned."""
    pointers = {"ids_ptr": "*i64", "flag_ptr": "*i32", "record_ptr": "*i64"}
    specs = []
    for dtype, itemsize in (("bf16", 2), ("fp32", 4), ("fp64", 8)):
        for width in (16, 33, 64, 384, 768, 1000, 2560, 4096):
            block_d = column_block(width)
            scalars = dict.fromkeys(("n", "num_rows", "table", "op"), "i32")
            signature = {"out_ptr": f"*{dtype}", "weight_ptr": f"*{dtype}", **pointers, **scalars}
            block_n = row_block(width, itemsize)
            specs.append(
                CompileSpec(
                    f"embedding_fwd_kernel[d{width},{dtype}]",
                    embedding_fwd_kernel,
                    signature,
                    {"D": width, "WEIGHT_STRIDE_V": width, "BLOCK_N": block_n, "BLOCK_D": block_d},
                    num_warps=_WARPS,
                    divisible_by_16=frozenset(name for name in signature if name.endswith("_ptr")),
                )
            )
    return specs

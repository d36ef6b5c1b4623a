"""Dense gradient of an embedding table: out[r] = Σ grad[order[i]] over the positions i of row r's segment.

A plan (``embedkernels.reference.embedding``) lists the positions sorted by row: segment s is order[offsets[s]:
offsets[s + 1]] and belongs to row segment_ids[s]. The sorted positions are cut into tiles of the same size whatever
the ids, so that one hot row keeps as many programs busy as many cold ones. No atomics, no wait for the device.

``embedding_grad_tile_kernel``, grid (tiles + V / ZERO_ROWS, D / BLOCK_D).
    The first programs walk one tile each, adding rows in fp32. A segment that begins and ends in the tile goes
    straight to ``out``. At most two segments of a tile are cut by its edges. The sum of one that began in an earlier
    tile is left in carry[tile, 0]; the sum of one that begins here and goes on is left in carry[tile, 1], and
    owner[tile] says which segment that is (-1: none).
    The other programs write zeros to the rows that have no segment.
``embedding_grad_carry_kernel``, grid (tiles, D / CARRY_COLUMNS).
    The tile that owns a cut segment adds carry[tile, 1] and carry[later tiles, 0] up to the segment's end.

So every row of ``out`` is written exactly once: by the tile that holds its segment, by the owner of its cut segment,
or as zeros. What is added to what follows from the plan and the tile size, which follows from N: the same bits in
every run.

Bytes (e = element size, K kept positions): K·D·e + V·D·e, and 4·K + 8·U of plan. The workspace has at most MAX_TILES
tiles of 2·D sums; only cut segments use it. Each tile finds its first segment by bisection of the offsets.

N < 2**31; addresses are 64-bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from embedkernels.kernels.embedding import column_block
from embedkernels.kernels.specs import CompileSpec

# Rows per tile: at least MIN_ROWS; above that as few as leave MAX_TILES tiles, which bounds the workspace and the
# carries of one segment (they are added by one program).
MIN_ROWS = 32
MAX_TILES = 1024
# Rows in flight: loaded before the first of them is added.
GROUP = 8
ZERO_ROWS = 64
# Carries of one segment that are added at a time, and the columns of a program: narrow, since a hot segment's carries
# are added by one row of programs.
CARRY_ROWS = 64
CARRY_COLUMNS = 64
_CARRY_WARPS = 4


@triton.jit
def _below(values_ptr, length, bound):
    """How many of ``length`` ascending values are less than ``bound``."""
    low = length * 0
    high = length
    while low < high:
        middle = low + (high - low) // 2
        less = tl.load(values_ptr + middle) < bound
        low = tl.where(less, middle + 1, low)
        high = tl.where(less, high, middle)
    return low


@triton.jit
def _write_zeros(
    out_ptr, segment_ids_ptr, count, first, num_rows, columns, inside, D: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """Zeros to the rows first .. first + ROWS that have no segment."""
    # Segments are distinct rows in ascending order: at most ``first`` of them lie below ``first``.
    segment = _below(segment_ids_ptr, tl.minimum(count, first), first)
    used = tl.load(segment_ids_ptr + segment, mask=segment < count, other=-1)
    zeros = tl.zeros(columns.shape, dtype=out_ptr.dtype.element_ty)
    here = out_ptr + first.to(tl.int64) * D + columns
    for row in range(first, first + tl.minimum(ROWS, num_rows - first)):
        if row == used:
            segment += 1
            used = tl.load(segment_ids_ptr + segment, mask=segment < count, other=-1)
        else:
            tl.store(here, zeros, mask=inside)
        here += D


@triton.jit
def _walk_tile(
    out_ptr, carry_ptr, grad_ptr, order_ptr, segment_ids_ptr, segment_offsets_ptr, count, tile, begin, end,
    columns, inside, stride, D: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Add the rows begin .. end of the sorted order; returns the segment that goes on beyond ``end``, or -1."""
    # The last segment that begins at or before ``begin``; none is empty, so there are at most begin + 1 of them.
    segment = _below(segment_offsets_ptr, tl.minimum(count, begin + 1), begin + 1) - 1
    start = tl.load(segment_offsets_ptr + segment)
    stop = tl.load(segment_offsets_ptr + segment + 1)
    row = tl.load(segment_ids_ptr + segment)
    carry_at = carry_ptr + tile.to(tl.int64) * (2 * D) + columns
    total = tl.zeros(columns.shape, dtype=carry_ptr.dtype.element_ty)
    for at in range(begin, end, GROUP):
        positions = ()
        for i in tl.static_range(GROUP):
            positions = positions + (tl.load(order_ptr + at + i, mask=at + i < end, other=0),)
        group = ()
        for i in tl.static_range(GROUP):
            here = grad_ptr + positions[i].to(tl.int64) * stride + columns
            # The bound is widened to the columns before the two meet: Triton 3.9 interprets no scalar as a mask.
            live = inside & (tl.full(columns.shape, at + i, tl.int32) < end)
            group = group + (tl.load(here, mask=live, other=0.0),)
        for i in tl.static_range(GROUP):
            total += group[i].to(total.dtype)
            # A tile is a whole number of groups unless it ends with the last segment, after which ``stop`` is -1:
            # nothing stops beyond ``end``.
            if at + i + 1 == stop:
                if start >= begin:
                    here = out_ptr + row.to(tl.int64) * D + columns
                    tl.store(here, total.to(out_ptr.dtype.element_ty), mask=inside)
                else:
                    tl.store(carry_at, total, mask=inside)
                total = tl.zeros(columns.shape, dtype=carry_ptr.dtype.element_ty)
                start = stop
                segment += 1
                stop = tl.load(segment_offsets_ptr + segment + 1, mask=segment < count, other=-1)
                row = tl.load(segment_ids_ptr + segment, mask=segment < count, other=0)
    owned = -1
    if (start < end) & (stop > end):
        if start >= begin:
            tl.store(carry_at + D, total, mask=inside)
            owned = segment
        else:
            tl.store(carry_at, total, mask=inside)
    return owned


@triton.jit(do_not_specialize=["tiles", "tile_rows", "num_rows"])
def embedding_grad_tile_kernel(
    out_ptr, carry_ptr, owner_ptr, grad_ptr, order_ptr, segment_ids_ptr, segment_offsets_ptr, count_ptr,
    tiles, tile_rows, num_rows, grad_stride_n,
    D: tl.constexpr, BLOCK_D: tl.constexpr, CONTIGUOUS: tl.constexpr, GROUP: tl.constexpr, ZERO_ROWS: tl.constexpr,
):  # fmt: skip
    """One tile of the sorted positions, or ZERO_ROWS rows of the table."""
    tile = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = columns < D
    count = tl.load(count_ptr)
    if tile < tiles:
        kept = tl.load(segment_offsets_ptr + count)
        begin = tile * tile_rows
        owned = -1
        if begin < kept:
            stride = D if CONTIGUOUS else grad_stride_n
            end = begin + tl.minimum(tile_rows, kept - begin)
            owned = _walk_tile(
                out_ptr, carry_ptr, grad_ptr, order_ptr, segment_ids_ptr, segment_offsets_ptr, count, tile, begin,
                end, columns, inside, stride, D, GROUP,
            )  # fmt: skip
        tl.store(owner_ptr + tile, owned, mask=tl.program_id(1) == 0)
    else:
        first = (tile - tiles) * ZERO_ROWS
        _write_zeros(out_ptr, segment_ids_ptr, count, first, num_rows, columns, inside, D, ZERO_ROWS)


@triton.jit(do_not_specialize=["tile_rows"])
def embedding_grad_carry_kernel(
    out_ptr, carry_ptr, owner_ptr, segment_ids_ptr, segment_offsets_ptr, tile_rows,
    D: tl.constexpr, BLOCK_D: tl.constexpr, CARRY_ROWS: tl.constexpr,
):  # fmt: skip
    """The cut segment that begins in a tile, if there is one."""
    tile = tl.program_id(0)
    segment = tl.load(owner_ptr + tile)
    if segment >= 0:
        columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        inside = columns < D
        last = (tl.load(segment_offsets_ptr + segment + 1) - 1) // tile_rows
        total = tl.zeros((CARRY_ROWS, BLOCK_D), dtype=carry_ptr.dtype.element_ty)
        for at in range(tile + 1, last + 1, CARRY_ROWS):
            rows = at + tl.arange(0, CARRY_ROWS)
            here = carry_ptr + rows[:, None].to(tl.int64) * (2 * D) + columns[None, :]
            total += tl.load(here, mask=(rows <= last)[:, None] & inside[None, :], other=0.0)
        head = tl.load(carry_ptr + tile.to(tl.int64) * (2 * D) + D + columns, mask=inside, other=0.0)
        row = tl.load(segment_ids_ptr + segment).to(tl.int64)
        total = head + tl.sum(total, axis=0)
        tl.store(out_ptr + row * D + columns, total.to(out_ptr.dtype.element_ty), mask=inside)


def tile_rows(n: int) -> int:
    """Sorted positions per tile."""
    return max(MIN_ROWS, triton.next_power_of_2(triton.cdiv(n, MAX_TILES)))


def _warps(block_d: int) -> int:
    """Eight columns per thread: 16 bytes of a 16-bit dtype."""
    return max(1, block_d // 256)


def embedding_grad_dense(
    grad_rows: Tensor, order: Tensor, segment_ids: Tensor, segment_offsets: Tensor, count: Tensor, num_rows: int
) -> Tensor:
    """The gradient (num_rows, D) in the dtype of ``grad_rows`` (N, D), added in fp32 (fp64 for double).

    N, D and num_rows are positive; ``order`` and so on are a plan's. Rows of ``grad_rows`` may lie at any stride, but
    are copied if their elements do.
    """
    n, width = grad_rows.shape
    if width > 1 and grad_rows.stride(1) != 1:
        grad_rows = grad_rows.contiguous()
    device = grad_rows.device
    rows = tile_rows(n)
    tiles = triton.cdiv(n, rows)
    block_d = column_block(width)
    column_blocks = triton.cdiv(width, block_d)
    wide = torch.float64 if grad_rows.dtype == torch.float64 else torch.float32
    out = grad_rows.new_empty((num_rows, width))
    carry = torch.empty((tiles, 2, width), dtype=wide, device=device)
    owner = torch.empty(tiles, dtype=torch.int32, device=device)
    embedding_grad_tile_kernel[(tiles + triton.cdiv(num_rows, ZERO_ROWS), column_blocks)](
        out, carry, owner, grad_rows, order, segment_ids, segment_offsets, count, tiles, rows, num_rows,
        grad_rows.stride(0), CONTIGUOUS=grad_rows.stride(0) == width, GROUP=GROUP, ZERO_ROWS=ZERO_ROWS,
        D=width, BLOCK_D=block_d, num_warps=_warps(block_d), num_stages=1,
    )  # fmt: skip
    if tiles > 1:
        embedding_grad_carry_kernel[(tiles, triton.cdiv(width, CARRY_COLUMNS))](
            out, carry, owner, segment_ids, segment_offsets, rows,
            D=width, BLOCK_D=CARRY_COLUMNS, CARRY_ROWS=CARRY_ROWS, num_warps=_CARRY_WARPS, num_stages=1,
        )  # fmt: skip
    return out


def compile_specs() -> list[CompileSpec]:
    """Row sizes that give every column block, contiguous and strided gradient rows."""
    types = {
        "carry_ptr": "*fp32", "owner_ptr": "*i32", "order_ptr": "*i32", "segment_ids_ptr": "*i32",
        "segment_offsets_ptr": "*i32", "count_ptr": "*i32",
    }  # fmt: skip
    specs = []

    def add(kernel, name, dtype, num_warps, aligned, **constexprs):
        signature = {}
        for parameter in kernel.params:
            if not parameter.is_constexpr:
                other = f"*{dtype}" if parameter.name.endswith("_ptr") else "i32"
                signature[parameter.name] = types.get(parameter.name, other)
        if dtype == "fp64":
            signature["carry_ptr"] = "*fp64"
        divisible = frozenset(key for key in signature if key.endswith("_ptr")) | aligned
        specs.append(CompileSpec(name, kernel, signature, constexprs, num_warps, 1, divisible))

    for dtype in ("bf16", "fp32", "fp64"):
        for width in (16, 33, 64, 384, 768, 1000, 2560, 4096):
            block_d = column_block(width)
            common = {"D": width, "BLOCK_D": block_d}
            for contiguous in (True, False):
                label = f"d{width},{dtype}" + ("" if contiguous else ",strided")
                aligned = frozenset() if contiguous else frozenset(["grad_stride_n"])
                add(
                    embedding_grad_tile_kernel, f"embedding_grad_tile_kernel[{label}]", dtype, _warps(block_d),
                    aligned, **common, CONTIGUOUS=contiguous, GROUP=GROUP, ZERO_ROWS=ZERO_ROWS,
                )  # fmt: skip
            add(
                embedding_grad_carry_kernel, f"embedding_grad_carry_kernel[d{width},{dtype}]", dtype, _CARRY_WARPS,
                frozenset(), D=width, BLOCK_D=CARRY_COLUMNS, CARRY_ROWS=CARRY_ROWS,
            )  # fmt: skip
    return specs

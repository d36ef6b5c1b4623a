"""Positions counted over real tokens: one pass over the ids or the mask, a program per sequence.

Bytes: every token read once, every position written once. The count runs along the sequence in blocks.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from embedkernels.kernels.launch import Launcher
from embedkernels.kernels.specs import CompileSpec

_WARPS = 4
_LARGEST_BLOCK = 2048


@triton.jit(do_not_specialize=["S", "skip", "padding_idx", "start", "padding_position"])
def count_positions_kernel(
    out_ptr, tokens_ptr, S, stride_b, stride_s, skip, padding_idx, start, padding_position, BLOCK: tl.constexpr,
):  # fmt: skip
    """Positions of one sequence from place ``skip`` on."""
    row = tl.program_id(0).to(tl.int64)
    before = start
    for first in range(0, S, BLOCK):
        places = first + tl.arange(0, BLOCK)
        inside = places < S
        tokens = tl.load(tokens_ptr + row * stride_b + places.to(tl.int64) * stride_s, mask=inside, other=0)
        real = (inside & (tokens != padding_idx)).to(tl.int32)
        positions = tl.where(real != 0, before + tl.cumsum(real, axis=0), padding_position)
        written = inside & (places >= skip)
        tl.store(out_ptr + row * (S - skip) + (places - skip), positions.to(tl.int64), mask=written)
        before += tl.sum(real, axis=0)


_launch = Launcher(count_positions_kernel)


def count_positions(
    out: Tensor, tokens: Tensor, padding_idx: int, start: int, padding_position: int, skip: int
) -> None:
    """Fill ``out``.

    Args:
        out: int64, B·(S - skip) elements, contiguous.
        tokens: integers (B, S), any strides, B and S positive.
        padding_idx: the value of what is not counted.
        start, padding_position: within int32.
        skip: places at the front that are counted, but not written.
    """
    batch, length = tokens.shape
    block = min(_LARGEST_BLOCK, max(128, 1 << (length - 1).bit_length()))
    _launch(
        (batch,), (out, tokens, length, *tokens.stride(), skip, padding_idx, start, padding_position),
        {"BLOCK": block}, num_warps=_WARPS,
    )  # fmt: skip


def compile_specs() -> list[CompileSpec]:
    """The smallest and the largest block, over ids and over a mask of bytes."""
    specs = []
    for dtype in ("i64", "i32", "u8"):
        for block in (128, _LARGEST_BLOCK):
            scalars = ("S", "stride_b", "stride_s", "skip", "padding_idx", "start", "padding_position")
            signature = {"out_ptr": "*i64", "tokens_ptr": f"*{dtype}", **dict.fromkeys(scalars, "i32")}
            specs.append(
                CompileSpec(
                    f"count_positions_kernel[{block},{dtype}]", count_positions_kernel, signature, {"BLOCK": block},
                    num_warps=_WARPS, divisible_by_16=frozenset(("out_ptr", "tokens_ptr")),
                )
            )  # fmt: skip
    return specs

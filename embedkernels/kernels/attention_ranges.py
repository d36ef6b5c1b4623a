"""From the ends of documents packed into one row to the range of keys that each query sees, and of queries to a key.

One program per 256 tokens finds each token's document by bisection: 8 bytes written per token, and the ends read from
the cache. Nothing waits for the host, and no range leaves the tensors, whatever the ends say.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from embedkernels.kernels.launch import Launcher, blocks
from embedkernels.kernels.specs import CompileSpec

BLOCK = 256


@triton.jit
def _seen(own_ptr, other_ptr, firsts_ptr, ends_ptr, block, length, other_length, documents, steps, back, ahead,
          BLOCK: tl.constexpr, HAS_BACK: tl.constexpr, HAS_AHEAD: tl.constexpr):  # fmt: skip
    """First and end of what the tokens of a block see of the other side, whose documents end with theirs."""
    i = block * BLOCK + tl.arange(0, BLOCK)
    # How many documents end at or before the token; the last one's if all do.
    document = tl.zeros([BLOCK], dtype=tl.int32)
    beyond = document + documents
    for _ in range(steps):
        middle = (document + beyond) // 2
        open = document < beyond
        ended = open & (tl.load(own_ptr + 1 + middle, mask=open, other=0) <= i)
        beyond = tl.where(open & ~ended, middle, beyond)
        document = tl.where(ended, middle + 1, document)
    document = tl.minimum(document, documents - 1)
    start = tl.load(own_ptr + document).to(tl.int64)
    end = tl.load(own_ptr + document + 1).to(tl.int64)
    other_start = tl.load(other_ptr + document).to(tl.int64)
    other_end = tl.load(other_ptr + document + 1).to(tl.int64)
    aligned = i + other_end - end
    other_start = tl.minimum(tl.maximum(other_start, 0), other_length)
    other_end = tl.minimum(tl.maximum(other_end, other_start), other_length)
    first = other_start
    last = other_end
    if HAS_BACK:
        first = tl.minimum(tl.maximum(aligned - back, other_start), other_end)
    if HAS_AHEAD:
        last = tl.minimum(tl.maximum(aligned + ahead + 1, other_start), other_end)
    # Tokens of no document see nothing, but where they would: no first and no end may be less than the one before.
    first = tl.where(i < start, other_start, tl.where(i >= end, other_end, first))
    last = tl.where(i < start, other_start, tl.where(i >= end, other_end, last))
    tl.store(firsts_ptr + i, first.to(tl.int32), mask=i < length)
    tl.store(ends_ptr + i, last.to(tl.int32), mask=i < length)


@triton.jit(do_not_specialize=["Sq", "Sk", "documents", "steps", "left", "right"])
def attention_ranges_kernel(
    cu_q_ptr, cu_k_ptr, ranges_ptr, Sq, Sk, documents, steps, left, right,
    BLOCK: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
):  # fmt: skip
    """ranges[0]: of each of Sq queries the first key, then of each of Sk keys the first query; ranges[1]: the ends.

    The last query of a document is at its last key, and a query sees ``left`` keys before and ``right`` after.
    """
    program = tl.program_id(0)
    of_queries = tl.cdiv(Sq, BLOCK)
    ends_ptr = ranges_ptr + Sq + Sk
    if program < of_queries:
        _seen(cu_q_ptr, cu_k_ptr, ranges_ptr, ends_ptr, program, Sq, Sk, documents, steps, left, right,
              BLOCK, HAS_LEFT, HAS_RIGHT)  # fmt: skip
    else:
        _seen(cu_k_ptr, cu_q_ptr, ranges_ptr + Sq, ends_ptr + Sq, program - of_queries, Sk, Sq, documents, steps,
              right, left, BLOCK, HAS_RIGHT, HAS_LEFT)  # fmt: skip


_launch = Launcher(attention_ranges_kernel)


def document_ranges(
    cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, num_queries: int, left: int | None, right: int | None, ranges: Tensor
) -> None:
    """Launch: fills ``ranges``, int32 (1, 2, Sq + Sk). The first two are contiguous, (N + 1,), of one dtype."""
    documents = cu_seqlens_q.shape[0] - 1
    num_keys = ranges.shape[2] - num_queries
    if documents < 1:
        ranges.zero_()
    if documents < 1 or ranges.numel() == 0:
        return
    grid = (blocks(num_queries, BLOCK) + blocks(num_keys, BLOCK),)
    arguments = (
        cu_seqlens_q, cu_seqlens_k, ranges, num_queries, num_keys, documents, documents.bit_length(),
        0 if left is None else left, 0 if right is None else right,
    )  # fmt: skip
    constexprs = {"BLOCK": BLOCK, "HAS_LEFT": left is not None, "HAS_RIGHT": right is not None}
    _launch(grid, arguments, constexprs, num_warps=4)


def ranges_stride(ranges: Tensor | None) -> int:
    """Elements between the ranges of two batch rows, which may share theirs."""
    return 0 if ranges is None or ranges.shape[0] == 1 else ranges.stride(0)


def compile_specs() -> list[CompileSpec]:
    """With a window on both sides, and 64-bit ends."""
    signature = {
        "cu_q_ptr": "*i64", "cu_k_ptr": "*i64", "ranges_ptr": "*i32", "Sq": "i32", "Sk": "i32", "documents": "i32",
        "steps": "i32", "left": "i32", "right": "i32",
    }  # fmt: skip
    flags = {"BLOCK": BLOCK, "HAS_LEFT": True, "HAS_RIGHT": True}
    pointers = frozenset(name for name in signature if name.endswith("_ptr"))
    return [CompileSpec("attention_ranges_kernel", attention_ranges_kernel, signature, flags, 4, 1, pointers)]

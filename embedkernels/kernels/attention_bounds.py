"""From a key mask, or starts and lengths, to the range of keys that any query of a batch row can see.

One program per batch row reads its mask once: B·Sk bytes, and 12·B written. Nothing waits for the host.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from embedkernels.kernels.launch import Launcher
from embedkernels.kernels.specs import CompileSpec

BLOCK_N = 1024


@triton.jit(do_not_specialize=["Sk"])
def attention_bounds_kernel(
    mask_ptr, starts_ptr, lengths_ptr, bounds_ptr, mask_stride_b, Sk,
    BLOCK_N: tl.constexpr, HAS_MASK: tl.constexpr, HAS_STARTS: tl.constexpr, HAS_LENGTHS: tl.constexpr,
):  # fmt: skip
    """bounds[b] = (start, end, holes): the keys that count lie in [start, end); holes = 1 if some there do not."""
    b = tl.program_id(0)
    wanted = tl.zeros([], dtype=tl.int64)
    if HAS_STARTS:
        wanted = tl.load(starts_ptr + b).to(tl.int64)
    end = wanted * 0 + Sk
    if HAS_LENGTHS:
        end = tl.minimum(end, wanted + tl.load(lengths_ptr + b).to(tl.int64))
    start = tl.maximum(wanted, 0)
    # An empty range is [0, 0), where no block begins.
    empty = end <= start
    end = tl.where(empty, 0, end).to(tl.int32)
    start = tl.where(empty, 0, start).to(tl.int32)
    holes = 0
    if HAS_MASK:
        row = mask_ptr + b.to(tl.int64) * mask_stride_b
        first = tl.zeros([BLOCK_N], dtype=tl.int32) + Sk
        last = tl.zeros([BLOCK_N], dtype=tl.int32)
        count = tl.zeros([BLOCK_N], dtype=tl.int32)
        for n0 in range(0, Sk, BLOCK_N):
            n = n0 + tl.arange(0, BLOCK_N)
            counts = tl.load(row + n, mask=(n >= start) & (n < end), other=0) != 0
            first = tl.minimum(first, tl.where(counts, n, Sk))
            last = tl.maximum(last, tl.where(counts, n + 1, 0))
            count += counts.to(tl.int32)
        end = tl.max(last, 0)
        start = tl.minimum(tl.min(first, 0), end)
        holes = (tl.sum(count, 0) != end - start).to(tl.int32)
    tl.store(bounds_ptr + b * 3, start)
    tl.store(bounds_ptr + b * 3 + 1, end)
    tl.store(bounds_ptr + b * 3 + 2, holes)


_launch = Launcher(attention_bounds_kernel)


def key_bounds(
    key_mask: Tensor | None, key_starts: Tensor | None, key_lengths: Tensor | None, num_keys: int, bounds: Tensor
) -> None:
    """Launch: fills ``bounds``, int32 (B, 3). At least one of the three first tensors is given."""
    if bounds.numel() == 0:
        return
    arguments = (
        # Pointers that a variant does not use still need a value.
        bounds if key_mask is None else key_mask.view(torch.uint8),
        bounds if key_starts is None else key_starts.contiguous(),
        bounds if key_lengths is None else key_lengths.contiguous(),
        bounds, 0 if key_mask is None else key_mask.stride(0), num_keys,
    )  # fmt: skip
    constexprs = {
        "BLOCK_N": BLOCK_N, "HAS_MASK": key_mask is not None, "HAS_STARTS": key_starts is not None,
        "HAS_LENGTHS": key_lengths is not None,
    }  # fmt: skip
    _launch((bounds.shape[0],), arguments, constexprs, num_warps=4)


def compile_specs() -> list[CompileSpec]:
    """A mask, starts and lengths together."""
    signature = {
        "mask_ptr": "*u8", "starts_ptr": "*i64", "lengths_ptr": "*i64", "bounds_ptr": "*i32",
        "mask_stride_b": "i32", "Sk": "i32",
    }  # fmt: skip
    flags = {"BLOCK_N": BLOCK_N, "HAS_MASK": True, "HAS_STARTS": True, "HAS_LENGTHS": True}
    pointers = frozenset(name for name in signature if name.endswith("_ptr"))
    return [CompileSpec("attention_bounds_kernel", attention_bounds_kernel, signature, flags, 4, 1, pointers)]

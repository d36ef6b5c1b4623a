"""A kernel that turns float32 into bfloat16 by a cast, and by a store alone."""

import triton
import triton.language as tl


@triton.jit
def cast_kernel(x_ptr, cast_ptr, stored_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(x_ptr + i)
    tl.store(cast_ptr + i, x.to(tl.bfloat16))
    tl.store(stored_ptr + i, x)

"""A kernel with the pattern that the attention kernels avoid, to show that the check for it can fail."""

import triton
import triton.language as tl

from embedkernels.kernels.specs import CompileSpec


@triton.jit
def transposed_product_kernel(x_ptr, y_ptr):
    i = tl.arange(0, 128)[:, None] * 128 + tl.arange(0, 128)[None, :]
    x = tl.load(x_ptr + i)
    product = tl.dot(x, x).to(tl.bfloat16)
    tl.store(y_ptr + i, tl.dot(tl.trans(product), x))


def compile_specs() -> list[CompileSpec]:
    signature = {"x_ptr": "*bf16", "y_ptr": "*fp32"}
    return [CompileSpec("transposed_product", transposed_product_kernel, signature, {}, 8, 1, frozenset(signature))]

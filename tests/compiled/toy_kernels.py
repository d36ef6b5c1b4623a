"""Kernels with known defects, to prove that the measurement sees them."""

import os

import triton
import triton.language as tl

from embedkernels.kernels.specs import CompileSpec


@triton.jit
def scale_kernel(x_ptr, y_ptr, factor_ptr, bias, stride, COLUMNS: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * stride + tl.arange(0, COLUMNS)
    x = tl.load(x_ptr + offsets).to(tl.float32)
    y = tl.exp(x * tl.load(factor_ptr) + bias)
    tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty))


@triton.jit
def spilling_kernel(x_ptr, y_ptr, z_ptr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    rows, columns, inner = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    x = tl.load(x_ptr + rows[:, None] * K + inner[None, :])
    y = tl.load(y_ptr + inner[:, None] * N + columns[None, :])
    z = tl.dot(x, y)
    tl.store(z_ptr + rows[:, None] * N + columns[None, :], z)


@triton.jit
def broken_kernel(x_ptr, BLOCK_N: tl.constexpr):
    tl.store(x_ptr + tl.arange(0, BLOCK_N), no_such_name)  # noqa: F821


class _Crash:
    """Stands for a compiler that takes its process along."""

    __name__ = "crashing_kernel"

    @property
    def arg_names(self) -> list[str]:
        os._exit(3)


SCALE = {"x_ptr": "*bf16", "y_ptr": "*bf16", "factor_ptr": "*fp32", "bias": "fp32", "stride": "i32"}
ALIGNED = frozenset({"x_ptr", "y_ptr", "stride"})
SPILL = {"x_ptr": "*bf16", "y_ptr": "*bf16", "z_ptr": "*fp32"}
TF32 = {"x_ptr": "*fp32", "y_ptr": "*fp32", "z_ptr": "*fp32"}


def compile_specs() -> list[CompileSpec]:
    return [
        CompileSpec("scale[aligned]", scale_kernel, SCALE, {"COLUMNS": 1024}, 4, 3, ALIGNED),
        CompileSpec("scale[unaligned]", scale_kernel, SCALE, {"COLUMNS": 1024}, 4, 3),
        CompileSpec("spilling", spilling_kernel, SPILL, {"M": 256, "N": 256, "K": 64}, 4, 3),
        CompileSpec("tf32", spilling_kernel, TF32, {"M": 16, "N": 16, "K": 16}, 4, 3),
        CompileSpec("broken", broken_kernel, {"x_ptr": "*fp32"}, {"BLOCK_N": 64}),
        CompileSpec("incomplete", scale_kernel, {"x_ptr": "*bf16"}, {"COLUMNS": 64}),
        CompileSpec("crashing", _Crash(), {}, {}),
    ]

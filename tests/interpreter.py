"""Triton's interpreter rounds as a GPU does, so that tests that compare errors do not judge the interpreter.

- Left alone it truncates float32 to bfloat16: twice the error, and always towards zero, which adds up in long sums
  and where terms cancel. GPUs round to the nearest, ties to even (PTX ISA, ``cvt.rn.bf16.f32``).
- Its ``tl.dot`` is NumPy's, whose order of additions depends on the processor and on how a tile lies in memory. On
  some processors q·kᵀ of the forward and k·qᵀ of the backward then differ in their last bits, which a large scale
  makes large. On a GPU both are the same: an fp32 product is a chain of fused multiply-adds in the order of the
  columns. (The kernels hand the interpreter 16-bit operands in fp32, too.)
"""

from __future__ import annotations

from typing import Any

import numpy as np


def nearest_bfloat16_bits(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The bits of float32 numbers rounded to bfloat16, as uint16; a NaN stays one."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    quiet = (bits >> np.uint32(16)) | np.uint32(0x0040)
    return np.where(np.isnan(bits.view(np.float32)), quiet, rounded).astype(np.uint16).reshape(np.shape(x))


def dot(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any], acc: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """acc (..., M, N) + a (..., M, K) · b (..., K, N) in float32: a chain of fused multiply-adds in the order of K.

    A float64 holds the product of two float32 exactly.
    """
    a64, b64 = a.astype(np.float64), b.astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        for k in range(a.shape[-1]):
            acc = (acc + a64[..., :, k : k + 1] * b64[..., k : k + 1, :]).astype(np.float32)
    return acc


def round_as_a_gpu_does() -> None:
    """Make the interpreter of this process do so; a second call changes nothing."""
    import triton.language as tl
    from triton.runtime import interpreter

    stock = interpreter._convert_float
    if getattr(stock, "rounds_to_nearest", False):
        return
    stock_dot = interpreter.InterpreterBuilder.create_dot

    def create_dot(builder: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
        if {a.data.dtype, b.data.dtype, d.data.dtype} != {np.dtype(np.float32)}:
            return stock_dot(builder, a, b, d, input_precision, max_num_imprecise_acc)
        return interpreter.TensorHandle(dot(a.data, b.data, d.data), d.dtype.scalar)

    interpreter.InterpreterBuilder.create_dot = create_dot

    def convert(value: Any, source: Any, target: Any, rounding_mode: Any) -> Any:
        nearest = rounding_mode in (None, interpreter._ir.ROUNDING_MODE.RTNE)
        if source == tl.float32 and target == tl.bfloat16 and nearest:
            return nearest_bfloat16_bits(value)
        return stock(value, source, target, rounding_mode)

    convert.rounds_to_nearest = True  # type: ignore[attr-defined]
    interpreter._convert_float = convert

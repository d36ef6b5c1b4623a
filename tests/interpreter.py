"""Triton's interpreter rounds to bfloat16 as a GPU does.

Left alone it truncates float32 to bfloat16: twice the error, and always towards zero, which adds up in long sums and
where terms cancel. GPUs round to the nearest, ties to even (PTX ISA, ``cvt.rn.bf16.f32``), so tests that compare
errors would be judging the interpreter.
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


def round_to_nearest() -> None:
    """Make the interpreter of this process do so; a second call changes nothing."""
    import triton.language as tl
    from triton.runtime import interpreter

    stock = interpreter._convert_float
    if getattr(stock, "rounds_to_nearest", False):
        return

    def convert(value: Any, source: Any, target: Any, rounding_mode: Any) -> Any:
        nearest = rounding_mode in (None, interpreter._ir.ROUNDING_MODE.RTNE)
        if source == tl.float32 and target == tl.bfloat16 and nearest:
            return nearest_bfloat16_bits(value)
        return stock(value, source, target, rounding_mode)

    convert.rounds_to_nearest = True  # type: ignore[attr-defined]
    interpreter._convert_float = convert

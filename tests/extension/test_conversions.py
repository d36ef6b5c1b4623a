"""The host's conversions of 16-bit types, which stand in for the device's under the shim."""

import ctypes

import pytest
import torch

from tests.extension import shim


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_conversions_equal_pytorch(dtype):
    """Every half and bfloat16 value, the points between neighbours, and values outside the range."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).float()
    finite = every[every.isfinite()]
    between = (finite.sort().values[:-1].double() + finite.sort().values[1:].double()) / 2
    above = torch.nextafter(between.float(), torch.tensor(float("inf")))
    values = torch.cat((every, between.float(), above, torch.tensor([1e38, -1e38, 1e-45, -1e-45, 65519.0, 65520.0])))
    bits = torch.empty(len(values), dtype=torch.int16)
    widened = torch.empty(len(values))
    shim.library().shim_convert(
        *(shim.DTYPES[dtype], ctypes.c_void_p(values.data_ptr()), ctypes.c_int64(len(values))),
        *(ctypes.c_void_p(bits.data_ptr()), ctypes.c_void_p(widened.data_ptr())),
    )
    expected = values.to(dtype)
    number = ~values.isnan()
    assert torch.equal(bits[number], expected.view(torch.int16)[number])
    assert torch.equal(widened[number], expected.float()[number])
    assert widened[~number].isnan().all()

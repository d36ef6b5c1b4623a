"""The plan's CUDA kernels, their bodies executed on the CPU under the shim, against the definition."""

import ctypes

import pytest
import torch

from tests.extension import shim
from tests.extension.cases import DISTRIBUTIONS, PADDING, check_plan, make_ids

ORDERS = {"forward": shim.FORWARD, "reverse": shim.REVERSE, "shuffled": shim.SHUFFLED}


# 255..257: around a block of threads; 1025: two blocks look for segments; 3000: blocks with rests.
@pytest.mark.parametrize("n", [0, 1, 31, 255, 256, 257, 1025, 3000])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_plan(distribution, n):
    dtype = torch.int32 if n % 2 else torch.int64
    ids = make_ids(distribution, n, 40, seed=n, dtype=dtype)
    made, _ = shim.plan(ids, 40, PADDING, order=shim.SHUFFLED, at_start=n % 3 == 0, seed=n)
    check_plan(made, ids, 40, PADDING)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("rows", [1, 2, 255, 256, 30522, 2**31 - 1])
def test_plan_whatever_the_table(rows, order):
    ids = make_ids("uniform", 2000, rows)
    ids[::7] = rows - 1
    made, bits = shim.plan(ids, rows, order=ORDERS[order])
    check_plan(made, ids, rows)
    # Rows 0 to V - 1 and one key for dropped ids: no pass over bits that cannot differ.
    assert bits == max(1, rows.bit_length())


def test_plan_of_a_shard():
    ids = make_ids("uniform", 1500, 1000)
    made, _ = shim.plan(ids, 250, padding_idx=300, vocab_start=250)
    check_plan(made, ids, 250, 300, 250)


@pytest.mark.parametrize("extreme", [-(2**63), -1, 2**31, 2**32 + 3, 2**63 - 1])
def test_plan_drops_ids_beyond_32_bits(extreme):
    ids = torch.tensor([3, extreme, 5, extreme, 3])
    made, _ = shim.plan(ids, 10)
    check_plan(made, ids, 10)
    assert made[0][:3].tolist() == [0, 4, 2]


def test_plan_of_a_table_without_rows():
    ids = torch.arange(300)
    made, _ = shim.plan(ids, 0)
    check_plan(made, ids, 0)


def test_many_blocks_look_for_segments():
    """Above 1M ids a block takes more than one round; the counts of all blocks before it are added."""
    ids = make_ids("zipf", 1_050_000, 5000)
    made, _ = shim.plan(ids, 5000)
    check_plan(made, ids, 5000)


@pytest.mark.parametrize("rows", [0, 1, 2, 255, 256, 65535, 65536, 128256, 2**31 - 1])
def test_sorted_bits(rows):
    bits = shim.library().shim_key_bits(ctypes.c_int64(rows))
    assert 2**bits > rows
    assert bits == 1 or 2 ** (bits - 1) <= rows


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

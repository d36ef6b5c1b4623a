"""The CUDA kernels' bodies, executed on the CPU under the shim, against the definition."""

import ctypes
import re

import pytest
import torch

from tests.contract import assert_within_contract
from tests.extension import shim
from tests.extension.cases import DISTRIBUTIONS, PADDING, check_plan, grad_pytorch, grad_reference, make_ids

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


def check_grad(ids, rows, width, dtype, vectors, padding=PADDING, order=shim.SHUFFLED, at_start=False):
    grad_rows = torch.randn(ids.numel(), width).to(dtype)
    made, _ = shim.plan(ids, rows, padding)
    out = shim.grad(grad_rows, made, rows, vectors=vectors, order=order, at_start=at_start)
    expected = grad_reference(grad_rows, ids, rows, padding)
    assert_within_contract(out, grad_pytorch(grad_rows, ids, rows, padding), expected, "embedding_grad_dense")
    untouched = torch.ones(rows, dtype=torch.bool)
    untouched[made[1][: int(made[3])].long()] = False
    assert torch.equal(out[untouched], torch.zeros_like(out[untouched]))
    return out


@pytest.mark.parametrize("n", [0, 1, 15, 16, 17, 300])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_grad(distribution, n):
    ids = make_ids(distribution, n, 37, seed=n)
    check_grad(ids, 37, 8, torch.float32, vectors=True, at_start=n % 2 == 0)
    check_grad(ids, 37, 7, torch.bfloat16, vectors=False, at_start=n % 2 == 1)


@pytest.mark.parametrize("dtype", shim.DTYPES)
@pytest.mark.parametrize("vectors", [True, False])
# 1: one lane; 768: several groups of lanes; 1032: chunks along D, the last lanes idle; 2056: more chunks than one.
@pytest.mark.parametrize("width", [1, 3, 8, 40, 768, 1032, 2056])
def test_grad_of_every_width(width, vectors, dtype):
    if vectors and width % (16 // dtype.itemsize):
        width = width // 8 * 8 + 8
    ids = make_ids("zipf", 150, 50, seed=width)
    check_grad(ids, 50, width, dtype, vectors)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("distribution", ["hot", "equal", "zipf"])
def test_long_segments(distribution, order):
    """One id over hundreds of tiles: partial sums are shared by the warps of a block."""
    ids = make_ids(distribution, 6000, 100)
    check_grad(ids, 100, 8, torch.bfloat16, vectors=True, order=ORDERS[order])


@pytest.mark.parametrize(("n", "tile"), [(8192, 16), (8193, 32), (65537, 64), (1_048_577, 128)])
def test_every_length_of_tile(n, tile):
    shape = (ctypes.c_int64 * 8)()
    shim.library().shim_shape(*(ctypes.c_int64(value) for value in (n, 64, 4)), 4, 4, 4, shape)
    assert shape[1] == tile
    check_grad(make_ids("hot", n, 64, seed=n), 64, 4, torch.float32, vectors=True)


@pytest.mark.parametrize("rows", [1, 255, 256, 257, 5000])
def test_tables_of_every_size(rows):
    check_grad(make_ids("uniform", 90, rows), rows, 8, torch.float16, vectors=True, padding=-1)


def test_the_order_of_threads_and_blocks_does_not_change_a_bit():
    ids = make_ids("zipf", 2500, 60)
    outs = [check_grad_bits(ids, order, seed) for order in ORDERS.values() for seed in (1, 2)]
    assert all(torch.equal(out, outs[0]) for out in outs)


def check_grad_bits(ids, order, seed):
    grad_rows = torch.randn(ids.numel(), 16, generator=torch.Generator().manual_seed(5))
    made, _ = shim.plan(ids, 60)
    return shim.grad(grad_rows, made, 60, vectors=True, order=order, seed=seed)


def test_vectors_and_single_elements_give_the_same_bits():
    ids = make_ids("hot", 3000, 50)
    grad_rows = torch.randn(3000, 24).bfloat16()
    made, _ = shim.plan(ids, 50)
    one, other = (shim.grad(grad_rows, made, 50, vectors=vectors) for vectors in (True, False))
    assert torch.equal(one, other)


@pytest.mark.parametrize("vectors", [True, False])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("distribution", ["uniform", "hot", "equal"])
def test_a_plan_of_a_larger_table_writes_nothing_out_of_bounds(distribution, order, vectors):
    """The host cannot look at a plan without waiting for it. Segments within a tile and across tiles; the shim's
    memory ends where the table ends."""
    ids = make_ids(distribution, 400, 37)
    grad_rows = torch.randn(400, 8)
    made, _ = shim.plan(ids, 37)
    out = shim.grad(grad_rows, made, 5, vectors=vectors, order=ORDERS[order])
    torch.testing.assert_close(out.double(), grad_reference(grad_rows, ids, 5), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("at_start", [True, False])
@pytest.mark.parametrize(("segment", "row"), [(0, -1), (0, -(2**31)), (2, 3), (2, 2**31 - 1)])
def test_a_row_that_no_table_has_is_left_out(segment, row, at_start):
    """The first and the last segment cross tiles."""
    ids = torch.tensor([0] * 40 + [1] * 2 + [2] * 40)
    order, segment_ids, offsets, count = shim.plan(ids, 3)[0]
    grad_rows = torch.randn(82, 8)
    expected = grad_reference(grad_rows, ids, 3)
    expected[segment] = 0
    segment_ids[segment] = row
    out = shim.grad(grad_rows, (order, segment_ids, offsets, count), 3, vectors=True, at_start=at_start)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("part", "position", "value"), [(1, 1, -1), (1, 0, 2), (2, 1, -5), (2, 2, 1), (2, 1, 70)])
def test_a_plan_out_of_order_writes_nothing_out_of_bounds(part, position, value):
    ids = torch.tensor([0] * 40 + [1] * 2 + [2] * 40)
    made = shim.plan(ids, 3)[0]
    made[part][position] = value
    try:
        shim.grad(torch.randn(82, 8), made, 3, vectors=True)
    except AssertionError as error:  # the gradient is lost, memory is not
        if not re.match(r"element \d+ is (never written|written twice)", str(error)):
            raise


def test_beyond_two_to_the_31_elements():
    """Row 2**21 of 1024 columns starts 2**31 elements in, in the table and in the gradient."""
    ends = (ctypes.c_float * 3)()
    sizes = (2**21 + 5, 300, 2**21 + 13, 1024)  # the last block of the table has five rows to clear
    message = shim.library().shim_far(*(ctypes.c_int64(size) for size in sizes), ends)
    assert message is None, message
    assert list(ends) == [299.0, 1.0, 0.0]


@pytest.mark.parametrize("rows", [0, 1, 2, 255, 256, 65535, 65536, 128256, 2**31 - 1])
def test_sorted_bits(rows):
    bits = shim.library().shim_key_bits(ctypes.c_int64(rows))
    assert 2**bits > rows
    assert bits == 1 or 2 ** (bits - 1) <= rows


@pytest.mark.parametrize("n", [1, 8192, 65536, 131072, 1 << 20, 2**31 - 1])
@pytest.mark.parametrize("width", [1, 64, 100, 768, 4096, 100_000])
@pytest.mark.parametrize(("size", "vector", "partial"), [(2, 8, 4), (2, 1, 1), (4, 4, 4), (8, 2, 2)])
def test_launches_stay_within_limits(n, width, size, vector, partial):
    width = -(-width // vector) * vector
    rows = min(2**31 - 1, 2**37 // (width * size))
    shape = (ctypes.c_int64 * 8)()
    shim.library().shim_shape(*(ctypes.c_int64(value) for value in (n, rows, width)), size, vector, partial, shape)
    tiles, tile, reduce_blocks, zero_blocks, finish_blocks, lanes, groups, zero_rows = shape
    assert tiles * tile >= n > (tiles - 1) * tile
    assert lanes * groups <= 256
    assert groups * tile <= 2048
    assert groups <= 128
    assert zero_blocks * zero_rows >= rows
    assert 1 <= zero_rows <= 256
    if n * width * size <= 2**37:  # what fits into any GPU
        assert reduce_blocks + zero_blocks < 2**31
        assert finish_blocks < 2**31
    # Partial sums, two rows a tile, in fp32: at most N * D / 8 bytes from 64k ids on.
    if size < 8 and n > 65536:
        assert 2 * tiles * width * 4 <= (n + tile) * width / 8


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

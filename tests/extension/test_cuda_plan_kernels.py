"""The plan's CUDA kernels, their bodies executed on the CPU under the shim, against the definition."""

import ctypes

import pytest
import torch

from tests.extension import shim
from tests.extension.cases import DISTRIBUTIONS, PADDING, check_plan, kept, make_ids

ORDERS = {"forward": shim.FORWARD, "reverse": shim.REVERSE, "shuffled": shim.SHUFFLED}
SMALL = 5120  # ids that one block sorts: five for each of 1024 threads


def checked(ids, rows, padding=-1, start=0, **options):
    made, how = shim.plan(ids, rows, padding, start, **options)
    check_plan(made, ids, rows, padding, start)
    return how


# Around a warp, a block of 256 and of 1024, two ids a thread, and the last plan of one launch.
@pytest.mark.parametrize(
    "n", [0, 1, 31, 33, 255, 256, 257, 1023, 1024, 1025, 3000, SMALL - 1, SMALL, SMALL + 1, 7000]
)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_plan(distribution, n):
    dtype = torch.int32 if n % 2 else torch.int64
    ids = make_ids(distribution, n, 40, seed=n, dtype=dtype)
    checked(ids, 40, PADDING, order=shim.SHUFFLED, at_start=n % 3 == 0, seed=n)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("rows", [1, 2, 3, 255, 256, 257, 30522, 65536, 65537, 128256, 2**24 + 1, 2**31 - 1])
def test_plan_whatever_the_table(rows, order):
    """One pass of one launch to four; keys packed with their positions and beside them."""
    for n in (2000, SMALL + 300):
        ids = make_ids("uniform", n, rows, seed=n)
        ids[::7] = rows - 1
        checked(ids, rows, order=ORDERS[order])


@pytest.mark.parametrize("rows", [0, 1, 1000, 2**19 - 1, 2**19, 2**31 - 1])
@pytest.mark.parametrize("n", [1, SMALL, SMALL + 1, 8192, 8193])
def test_the_sort_is_by_the_bits_in_use_alone(n, rows):
    """CUB makes a pass for every 8 bits it is given: rows 0 to V - 1 and one key for dropped ids, no more."""
    ids = make_ids("out_of_range", n, rows) if rows else torch.arange(n)
    how = checked(ids, rows)
    if n <= SMALL:
        assert how == (0, 0, 1)
        return
    row_bits, position_bits = max(1, rows.bit_length()), (n - 1).bit_length()
    packed = row_bits + position_bits <= 32
    assert how.bits == row_bits
    assert how.first_bit == (position_bits if packed else 0)
    assert how.launches == 3  # keys, counts, segments


def test_packed_keys_reach_to_32_bits():
    """One row more needs another bit, and the positions then travel beside the keys."""
    n = 2**13
    for rows, packed in ((2**19 - 1, True), (2**19, False)):
        ids = make_ids("uniform", n, rows)
        ids[-1] = rows - 1
        ids[-2] = -1  # the dropped id's key is the largest of all
        assert (checked(ids, rows).first_bit > 0) == packed


@pytest.mark.parametrize("n", [700, SMALL, SMALL + 900])
def test_ignored_positions_are_dropped(n):
    ids = make_ids("zipf", n, 300)
    for ignored in (torch.rand(n) < 0.3, torch.ones(n, dtype=torch.bool), torch.zeros(n, dtype=torch.bool)):
        made, _ = shim.plan(ids, 300, 5, ignored=ignored, at_start=True)
        check_plan(made, ids.masked_fill(ignored, -1), 300, 5)


@pytest.mark.parametrize("n", [1500, SMALL + 500])
def test_plan_of_a_shard(n):
    checked(make_ids("uniform", n, 1000), 250, 300, 250)


@pytest.mark.parametrize("extreme", [-(2**63), -1, 2**31, 2**32 + 3, 2**63 - 1])
@pytest.mark.parametrize("n", [5, SMALL + 5])
def test_plan_drops_ids_beyond_32_bits(extreme, n):
    ids = torch.full((n,), extreme)
    ids[[0, 2, 4]] = torch.tensor([3, 5, 3])
    made, _ = shim.plan(ids, 10)
    check_plan(made, ids, 10)
    assert made[0][:3].tolist() == [0, 4, 2]


@pytest.mark.parametrize("order", ORDERS)
def test_the_order_of_threads_changes_nothing(order):
    ids = make_ids("zipf", 4000, 30522)
    expected, _ = shim.plan(ids, 30522)
    count, size = int(expected[3]), int(kept(ids, 30522).sum())
    made, _ = shim.plan(ids, 30522, order=ORDERS[order], seed=7)
    for one, other, used in zip(made, expected, (size, count, count + 1, 1), strict=True):
        assert torch.equal(one[:used], other[:used])


def test_many_blocks_look_for_segments():
    """Above 1M ids a block takes more than one round; the counts of all blocks before it are added."""
    checked(make_ids("zipf", 1_050_000, 5000), 5000)


@pytest.mark.parametrize("rows", [0, 1, 2, 255, 256, 65535, 65536, 128256, 2**31 - 1])
def test_sorted_bits(rows):
    bits = shim.library().shim_key_bits(ctypes.c_int64(rows))
    assert 2**bits > rows
    assert bits == 1 or 2 ** (bits - 1) <= rows


@pytest.mark.parametrize(
    ("rows", "passes", "bits"),
    [
        *((0, 1, 1), (1, 1, 1), (2, 1, 1), (256, 1, 8), (257, 2, 5), (30522, 2, 8), (65536, 2, 8), (65537, 3, 6)),
        *((128256, 3, 6), (262144, 3, 6), (2**24, 3, 8), (2**24 + 1, 4, 7), (2**31 - 1, 4, 8)),
    ],
)
def test_a_small_plan_makes_as_few_passes_as_its_rows_need(rows, passes, bits):
    found = (ctypes.c_int * 2)()
    shim.library().shim_small_passes(ctypes.c_int64(rows), found)
    assert tuple(found) == (passes, bits)

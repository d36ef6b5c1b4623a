"""The library's CPU ops: plan and dense gradient, whatever the number of threads."""

import contextlib

import pytest
import torch

from embedkernels.ops.extension import extension_status
from tests.contract import assert_within_contract
from tests.extension.cases import DISTRIBUTIONS, PADDING, check_plan, grad_pytorch, grad_reference, make_ids

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


@pytest.fixture(autouse=True)
def _loaded():
    status = extension_status()
    if not status.loaded:
        pytest.skip(status.reason)


@contextlib.contextmanager
def threads(number):
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def make_plan(ids, rows, padding=-1, start=0):
    return torch.ops.embedkernels_ext.embedding_plan(ids, rows, padding, start)


def dense(grad_rows, made, rows):
    return torch.ops.embedkernels_ext.embedding_grad_dense(grad_rows, *made, rows)


# 40 rows: one pass of the radix sort; 5000: two; 2**31 - 1: three. 150,000 ids are worth several threads.
SIZES = [(0, 40), (1, 40), (500, 40), (3000, 5000), (150_000, 5000), (700, 2**31 - 1)]


@pytest.mark.parametrize(("n", "rows"), SIZES)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_plan(distribution, n, rows):
    for number, dtype in ((1, torch.int64), (3, torch.int32)):
        ids = make_ids(distribution, n, min(rows, 2**28), dtype=dtype)
        with threads(number):
            check_plan(make_plan(ids, rows, PADDING), ids, rows, PADDING)


def test_plan_of_any_shape_and_shard():
    ids = make_ids("uniform", 24_000, 900).reshape(8, 30, 100)
    check_plan(make_plan(ids, 300, 450, 300), ids, 300, 450, 300)


@pytest.mark.parametrize("extreme", [-(2**63), -1, 2**31, 2**32 + 3, 2**63 - 1])
def test_plan_drops_ids_beyond_32_bits(extreme):
    ids = torch.tensor([3, extreme, 5, extreme, 3])
    check_plan(make_plan(ids, 10), ids, 10)


@pytest.mark.parametrize("rows", [0, 1])
def test_plan_of_tiny_tables(rows):
    ids = torch.arange(-3, 20)
    check_plan(make_plan(ids, rows), ids, rows)


@pytest.mark.parametrize("dtype", DTYPES)
# 511..1025: segments of one, two and three blocks of 512 when all ids are equal.
@pytest.mark.parametrize("n", [1, 2, 5, 6, 511, 512, 513, 1025, 6000])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_grad(distribution, n, dtype):
    width = 7 if n % 2 else 24
    ids = make_ids(distribution, n, 90, seed=n)
    grad_rows = torch.randn(n, width).to(dtype)
    out = dense(grad_rows, make_plan(ids, 90, PADDING), 90)
    expected = grad_reference(grad_rows, ids, 90, PADDING)
    assert_within_contract(out, grad_pytorch(grad_rows, ids, 90, PADDING), expected, "embedding_grad_dense")
    touched = torch.zeros(90, dtype=torch.bool)
    touched[expected.abs().sum(1).nonzero()] = True
    assert torch.equal(out[~touched], torch.zeros_like(out[~touched]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("distribution", ["zipf", "hot", "two_rows", "out_of_range"])
def test_the_number_of_threads_does_not_change_a_bit(distribution, dtype):
    ids = make_ids(distribution, 20_000, 2000)
    grad_rows = torch.randn(20_000, 48).to(dtype)
    outs = []
    for number in (1, 2, 3, 3):
        with threads(number):
            outs.append(dense(grad_rows, make_plan(ids, 2000), 2000))
    assert all(torch.equal(out, outs[0]) for out in outs)


def test_every_row_is_written():
    """The output's memory held NaN before: what the allocator hands out again must be overwritten."""
    ids = make_ids("zipf", 300, 4000)
    grad_rows = torch.randn(300, 16)
    made = make_plan(ids, 4000)
    for _ in range(5):
        torch.full((4000, 16), float("nan"))  # freed at once
        assert torch.isfinite(dense(grad_rows, made, 4000)).all()


def test_large_output_is_written_whole():
    """From 8 MiB on the memory is asked for in huge pages."""
    ids = make_ids("uniform", 1000, 50_000)
    grad_rows = torch.randn(1000, 48)
    out = dense(grad_rows, make_plan(ids, 50_000), 50_000)
    assert_within_contract(
        out, grad_pytorch(grad_rows, ids, 50_000), grad_reference(grad_rows, ids, 50_000), "embedding_grad_dense"
    )


@pytest.mark.parametrize(("n", "rows", "width"), [(0, 5, 4), (3, 0, 4), (3, 5, 0)])
def test_empty(n, rows, width):
    ids = torch.zeros(n, dtype=torch.int64)
    out = dense(torch.randn(n, width), make_plan(ids, rows), rows)
    assert torch.equal(out, torch.zeros(rows, width))


def test_infinities_and_nan_stay_in_their_row():
    grad_rows = torch.ones(4, 3)
    grad_rows[1, 0], grad_rows[2, 1] = float("inf"), float("nan")
    out = dense(grad_rows, make_plan(torch.tensor([0, 2, 2, 4]), 5), 5)
    assert out[2, 0] == float("inf")
    assert out[2, 1].isnan()
    assert torch.equal(out[[0, 1, 3, 4]], torch.tensor([[1.0] * 3, [0.0] * 3, [0.0] * 3, [1.0] * 3]))


def test_opcheck():
    # The plan's elements past count are unspecified: ids without a hole leave none.
    torch.library.opcheck(torch.ops.embedkernels_ext.embedding_plan.default, (torch.arange(30).flip(0), 30, -1, 0))
    made = make_plan(torch.arange(30), 30)
    torch.library.opcheck(torch.ops.embedkernels_ext.embedding_grad_dense.default, (torch.randn(30, 4), *made, 30))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ids": torch.zeros(3)}, "ids must be int32 or int64"),
        ({"ids": torch.zeros(6, dtype=torch.int64)[::2]}, "ids must be contiguous"),
        ({"num_rows": -1}, "num_rows must be 0 to 2147483647, got -1"),
        ({"num_rows": 2**31}, "num_rows must be 0 to 2147483647, got 2147483648"),
        ({"padding_idx": -2}, "padding_idx must be an id, or -1 for none, got -2"),
        ({"vocab_start": -1}, "vocab_start must be 0 to .*, got -1"),
    ],
)
def test_plan_names_a_bad_argument(arguments, message):
    good = {"ids": torch.zeros(3, dtype=torch.int64), "num_rows": 4, "padding_idx": -1, "vocab_start": 0}
    with pytest.raises(RuntimeError, match=f"^embedding_plan: {message}"):
        torch.ops.embedkernels_ext.embedding_plan(**good | arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"grad_rows": torch.zeros(3)}, r"grad_rows must have shape \(N, D\), got \(3,\)"),
        (
            {"grad_rows": torch.zeros(3, 2, dtype=torch.int32)},
            "grad_rows must be float32, float64, float16 or bfloat16",
        ),
        ({"grad_rows": torch.zeros(2, 3).t()}, "grad_rows must be contiguous"),
        ({"order": torch.zeros(4, dtype=torch.int32)}, r"order must have shape \(3,\), got \(4,\)"),
        ({"segment_ids": torch.zeros(3)}, "segment_ids must be int32"),
        (
            {"segment_offsets": torch.zeros(3, dtype=torch.int32)},
            r"segment_offsets must have shape \(4,\), got \(3,\)",
        ),
        ({"num_rows": -3}, "num_rows must be 0 to 2147483647, got -3"),
        # A plan is data from outside: it must not make the op read or write out of bounds.
        ({"count": torch.tensor([4], dtype=torch.int32)}, "count must be 0 to 3, got 4"),
        ({"order": torch.tensor([0, 1, 3], dtype=torch.int32)}, "order must hold positions below 3, got 3"),
        ({"order": torch.tensor([0, -1, 2], dtype=torch.int32)}, "order must hold positions below 3, got -1"),
        (
            {"segment_ids": torch.tensor([1, 4, 0], dtype=torch.int32)},
            "segment_ids must ascend .*, got 4 at position 1",
        ),
        (
            {"segment_ids": torch.tensor([2, 2, 0], dtype=torch.int32)},
            "segment_ids must ascend .*, got 2 at position 1",
        ),
        ({"segment_offsets": torch.tensor([0, 2, 9, 0], dtype=torch.int32)}, "segment_offsets must ascend .*, got 9"),
        # The difference of two int32 does not fit one: it must not wrap to a length.
        (
            {"segment_offsets": torch.tensor([0, 1, -(2**31), 0], dtype=torch.int32)},
            "segment_offsets must ascend .*, got -2147483648",
        ),
        ({"segment_offsets": torch.tensor([1, 2, 3, 0], dtype=torch.int32)}, "segment_offsets must start with 0"),
    ],
)
def test_grad_names_a_bad_argument(arguments, message):
    made = make_plan(torch.tensor([1, 2, 2]), 4)
    good = dict(zip(("order", "segment_ids", "segment_offsets", "count"), made, strict=True))
    good |= {"grad_rows": torch.ones(3, 2), "num_rows": 4}
    with pytest.raises(RuntimeError, match=f"^embedding_grad_dense: {message}"):
        torch.ops.embedkernels_ext.embedding_grad_dense(**good | arguments)

"""The gradient's CUDA kernels, their bodies executed on the CPU under the shim, against the definition."""

import ctypes
import itertools
import re

import numpy as np
import pytest
import torch

from embedkernels.reference.embedding import ACCUMULATE, DENSE, PADDED_ROWS, ROWS
from embedkernels.reference.random import round_stochastic
from tests.contract import assert_within_contract, poisoned
from tests.extension import shim
from tests.extension.cases import DISTRIBUTIONS, PADDING, grad_pytorch, grad_reference, kept, make_ids
from tests.extension.grad_cases import MODES, PAIRS, assert_expected, expected_grad

ORDERS = {"forward": shim.FORWARD, "reverse": shim.REVERSE, "shuffled": shim.SHUFFLED}
TILE, STRIP = 16, 128  # up to 16384 ids
CPU = torch.device("cpu")


def make_out(rows, width, dtype, mode):
    """Memory as the modes find it: values to add to, or garbage."""
    if mode == ACCUMULATE:
        return torch.randn(rows, width).to(dtype)
    return poisoned(rows, width, dtype=dtype, device=CPU)


def check_grad(
    ids, rows, width, rows_dtype, out_dtype, mode, *, grad_rows=None, out_rows=None, plan_rows=None, **options
):
    """Run the kernels and check every element, and which of them were read and written."""
    given = {name: options.get(name) for name in ("sources", "weights")}
    scale = options.get("scale_by_freq", False)
    if grad_rows is None:
        grad_rows = torch.randn(ids.numel(), width).to(rows_dtype)
    made, _ = shim.plan(ids, plan_rows or rows, PADDING)
    out = make_out(out_rows or rows, width, out_dtype, mode)
    ran = shim.grad(grad_rows, made, out, mode, **options)
    expected = expected_grad(out, grad_rows, made, mode, **given, scale_by_freq=scale)
    assert_expected(ran.out, expected)
    touched = expected.touched[:, None].expand_as(out)
    everything = mode in (DENSE, PADDED_ROWS)
    assert torch.equal(ran.writes.bool(), torch.ones_like(touched) if everything else touched)
    assert torch.equal(ran.reads.bool(), touched if mode == ACCUMULATE else torch.zeros_like(touched))
    return ran


# Around a tile, a strip, and the 1024 positions of a block.
@pytest.mark.parametrize("n", [0, 1, 15, 16, 17, 128, 129, 1025, 2100])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_grad(distribution, mode, n):
    ids = make_ids(distribution, n, 37, seed=n)
    order = shim.SHUFFLED
    ran = check_grad(
        ids, 37, 8, torch.float32, torch.float32, MODES[mode], order=order, at_start=n % 2 == 0, schedule_seed=n
    )
    assert ran.vectors
    ran = check_grad(ids, 37, 7, torch.bfloat16, torch.bfloat16, MODES[mode], order=order, at_start=n % 2 == 1)
    assert not ran.vectors


@pytest.mark.parametrize("vectors", [True, False])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("rows_dtype", "out_dtype"), PAIRS)
def test_every_pair_of_dtypes(rows_dtype, out_dtype, mode, vectors):
    """With sources (bags: several positions share a row), weights and scales, alone and together."""
    wide = torch.float64 if rows_dtype == torch.float64 else torch.float32
    ids = make_ids("zipf", 400, 60)
    sources = torch.randint(0, 150, (400,), dtype=torch.int32)
    weights = torch.randn(400, dtype=wide)
    for scale, given, weighted in itertools.product((False, True), repeat=3):
        ran = check_grad(
            ids, 60, 16, rows_dtype, out_dtype, MODES[mode], vectors=vectors, order=shim.SHUFFLED,
            sources=sources if given else None, weights=weights if weighted else None, scale_by_freq=scale,
        )  # fmt: skip
        assert ran.vectors == vectors


@pytest.mark.parametrize("rows_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 4, 7, 16, 40, 264])
@pytest.mark.parametrize("distribution", ["uniform", "hot", "distinct"])
def test_stochastic_rounding_has_the_bits_of_the_reference(distribution, width, rows_dtype):
    """Rounded from the sum that goes to a float32 output, in vectors and one element at a time."""
    n, rows = 2500, 300
    ids = make_ids(distribution, n, rows)
    made, _ = shim.plan(ids, rows)
    grad_rows = torch.randn(n, width).to(rows_dtype)
    old = torch.randn(rows, width).bfloat16()
    old[3, 0], old[5, 0] = float("inf"), float("nan")
    seed = torch.tensor([-0x123456789ABCDEF])
    weights = torch.rand(n)
    exact = shim.grad(grad_rows, made, old.float(), ACCUMULATE, weights=weights, scale_by_freq=True)
    rounded = round_stochastic(exact.out, torch.arange(rows), seed)
    touched = exact.writes[:, 0].bool()
    for vectors in (True, False):
        ran = shim.grad(
            grad_rows, made, old, ACCUMULATE, weights=weights, scale_by_freq=True, seed=seed, vectors=vectors
        )
        assert ran.vectors == (vectors and width % 8 == 0)
        assert torch.equal(ran.writes, exact.writes)
        number = ~rounded.isnan() & touched[:, None]
        assert torch.equal(ran.out[number], rounded[number])
        assert torch.equal(ran.out.isnan(), old.isnan())
        assert torch.equal(ran.out[~touched].nan_to_num(), old[~touched].nan_to_num())
    nearest = exact.out.bfloat16()
    changed = (rounded != nearest) & touched[:, None]
    assert changed.sum() > touched.sum() * width // 8  # a quarter, on average


# 1: one lane; 24: 3 or 6 vectors; 96: lanes that fit no warp; 768: whole warps; 1032: chunks, the last lanes idle.
@pytest.mark.parametrize("width", [1, 3, 8, 24, 40, 96, 768, 1032, 2056])
@pytest.mark.parametrize("vectors", [True, False])
@pytest.mark.parametrize("dtype", shim.DTYPES)
def test_every_width(dtype, vectors, width):
    ids = make_ids("zipf", 150, 50, seed=width)
    for mode in (DENSE, ACCUMULATE):
        check_grad(ids, 50, width, dtype, dtype, mode, vectors=vectors)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("distribution", ["hot", "equal", "zipf"])
def test_long_segments(distribution, mode, order):
    """One id over more strips than one group adds: the groups of a block share them."""
    ids = make_ids(distribution, 80 * STRIP + 5, 100)
    check_grad(ids, 100, 8, torch.bfloat16, torch.bfloat16, MODES[mode], order=ORDERS[order], scale_by_freq=True)


@pytest.mark.parametrize("strips", [1, 2, 31, 32, 33, 34])
@pytest.mark.parametrize("before", [0, 1, STRIP - 1])
def test_segments_of_every_number_of_strips(strips, before):
    """Around the 32 partial sums that a group adds alone, starting with a strip and within one."""
    ids = torch.cat((torch.zeros(before), torch.full((strips * STRIP,), 5), torch.full((40,), 6))).long()
    for mode in (DENSE, ACCUMULATE):
        check_grad(ids, 8, 4, torch.float32, torch.float32, mode, order=shim.SHUFFLED)


@pytest.mark.parametrize(("n", "tile"), [(16384, 16), (16385, 32), (70_000, 32)])
def test_every_length_of_tile(n, tile):
    assert shape_of(n, 64, 4, 4, (4, 4, 4))["tile"] == tile
    check_grad(make_ids("hot", n, 64, seed=n), 64, 4, torch.float32, torch.float32, DENSE)


@pytest.mark.parametrize("rows", [1, 255, 256, 257, 5000])
@pytest.mark.parametrize("mode", MODES)
def test_outputs_of_every_size(mode, rows):
    """In the modes of rows also fewer than there are segments."""
    check_grad(make_ids("uniform", 900, 300), 300, 8, torch.float16, torch.float16, MODES[mode], out_rows=rows)


def test_the_order_of_threads_and_blocks_does_not_change_a_bit():
    ids = make_ids("zipf", 2500, 60)
    grad_rows, old = torch.randn(2500, 16), torch.randn(60, 16)
    made, _ = shim.plan(ids, 60)
    for mode in (DENSE, ACCUMULATE):
        outs = [
            shim.grad(grad_rows, made, old, mode, order=order, schedule_seed=seed).out
            for order in ORDERS.values()
            for seed in (1, 2)
        ]
        assert all(torch.equal(out, outs[0]) for out in outs)


# Several strips share a block, or none does, depending on the width and the size of a vector.
@pytest.mark.parametrize("width", [8, 24, 384])
@pytest.mark.parametrize(("rows_dtype", "out_dtype"), PAIRS)
def test_vectors_and_single_elements_give_the_same_bits(rows_dtype, out_dtype, width):
    n, rows = 3000, 50
    made, _ = shim.plan(make_ids("hot", n, rows), rows)
    grad_rows, old = torch.randn(n, width).to(rows_dtype), torch.randn(rows, width).to(out_dtype)
    options = {"weights": torch.rand(n, dtype=torch.promote_types(rows_dtype, torch.float32)), "scale_by_freq": True}
    one, other = (shim.grad(grad_rows, made, old, ACCUMULATE, vectors=on, **options) for on in (True, False))
    assert (one.vectors, other.vectors) == (True, False)
    assert torch.equal(one.out, other.out)


def test_the_width_does_not_change_a_bit():
    """The order of additions follows from the ids alone: a column has the same sum in a table of any width."""
    n, rows = 3000, 50
    made, _ = shim.plan(make_ids("hot", n, rows), rows)
    grad_rows, out = torch.randn(n, 384), poisoned(rows, 384, dtype=torch.float32, device=CPU)
    whole = shim.grad(grad_rows, made, out).out
    for width in (1, 8, 40, 256):
        part = shim.grad(grad_rows[:, :width].contiguous(), made, out[:, :width].contiguous()).out
        assert torch.equal(part, whole[:, :width])


def test_weights_of_one_change_no_bit():
    made, _ = shim.plan(make_ids("zipf", 500, 50), 50)
    grad_rows, out = torch.randn(500, 8), torch.empty(50, 8)
    with_weights = shim.grad(grad_rows, made, out, weights=torch.ones(500))
    assert torch.equal(with_weights.out, shim.grad(grad_rows, made, out).out)


@pytest.mark.parametrize("vectors", [True, False])
@pytest.mark.parametrize("distribution", ["uniform", "equal"])
def test_sources_that_do_not_exist_add_nothing(distribution, vectors):
    """The shim's memory ends where the rows end."""
    ids = make_ids(distribution, 500, 20)
    sources = torch.randint(0, 40, (500,), dtype=torch.int32)
    sources[::3] = torch.tensor([-1, 40, -(2**31), 2**31 - 1], dtype=torch.int32).repeat(42)[:167]
    grad_rows = torch.randn(40, 8)
    weights = torch.full((500,), float("inf"))  # times a row that was not read
    weights[sources.long().clamp(0, 39) == sources] = 0.5
    for at_start in (True, False):
        check_grad(
            ids, 20, 8, torch.float32, torch.float32, DENSE, grad_rows=grad_rows, sources=sources, weights=weights,
            vectors=vectors, at_start=at_start,
        )  # fmt: skip


def test_no_rows_at_all():
    ids = make_ids("uniform", 300, 20)
    sources = torch.zeros(300, dtype=torch.int32)
    ran = check_grad(ids, 20, 8, torch.float32, torch.float32, DENSE, grad_rows=torch.empty(0, 8), sources=sources)
    assert (ran.out == 0).all()


@pytest.mark.parametrize("position", [-1, 400, -(2**31), 2**31 - 1])
def test_positions_that_do_not_exist_add_nothing(position):
    ids = make_ids("hot", 400, 37)
    made, _ = shim.plan(ids, 37)
    grad_rows = torch.randn(400, 8)
    dropped = made[0][100:130].long()
    made[0][100:130] = position
    rest = grad_rows.clone()
    rest[dropped] = 0
    for sources in (None, torch.arange(400, dtype=torch.int32)):
        out = shim.grad(grad_rows, made, torch.empty(37, 8), sources=sources, weights=torch.ones(400)).out
        torch.testing.assert_close(out.double(), grad_reference(rest, ids, 37), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("stride", "vectors"), [(0, True), (16, True), (24, True), (17, False), (18, False)])
def test_rows_of_every_stride(stride, vectors, dtype):
    """0: an expanded gradient. Strides that would misalign a vector are walked one element at a time."""
    ids = make_ids("zipf", 300, 37)
    storage = torch.randn(299 * stride + 16).to(dtype)
    grad_rows = storage.as_strided((300, 16), (stride, 1))
    assert check_grad(ids, 37, 16, dtype, dtype, DENSE, grad_rows=grad_rows).vectors == vectors


@pytest.mark.parametrize("vectors", [True, False])
@pytest.mark.parametrize("mode", ["dense", "accumulate"])
@pytest.mark.parametrize("distribution", ["uniform", "hot", "equal"])
def test_a_plan_of_a_larger_table_writes_nothing_out_of_bounds(distribution, mode, vectors):
    """The host cannot look at a plan without waiting for it. Segments within a tile, across tiles and across strips;
    the shim's memory ends where the table ends."""
    for order in ORDERS.values():
        check_grad(
            make_ids(distribution, 1400, 37), 5, 8, torch.float32, torch.float32, MODES[mode], plan_rows=37,
            vectors=vectors, order=order,
        )  # fmt: skip


@pytest.mark.parametrize("at_start", [True, False])
@pytest.mark.parametrize("mode", ["dense", "accumulate"])
@pytest.mark.parametrize(("segment", "row"), [(0, -1), (0, -(2**31)), (2, 3), (2, 2**31 - 1)])
def test_a_row_that_no_table_has_is_left_out(segment, row, mode, at_start):
    """The first and the last segment cross strips."""
    ids = torch.tensor([0] * 140 + [1] * 2 + [2] * 140)
    made, _ = shim.plan(ids, 3)
    made[1][segment] = row
    grad_rows, out = torch.randn(282, 8), torch.randn(3, 8)
    expected = expected_grad(out, grad_rows, made, MODES[mode])
    assert not expected.touched[segment]
    assert_expected(shim.grad(grad_rows, made, out, MODES[mode], at_start=at_start).out, expected)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("part", "position", "value"),
    [
        *((1, 1, -1), (1, 0, 2)),
        *((2, 0, 50), (2, 0, -5), (2, 1, -5), (2, 2, 1), (2, 1, 200), (2, 1, 2**31 - 1), (2, 2, -(2**31))),
        *((2, 3, 2**31 - 1), (2, 3, -1), (3, 0, -1), (3, 0, 2**31 - 1), (3, 0, 282)),
    ],
)
def test_a_plan_that_makes_no_sense_writes_nothing_out_of_bounds(part, position, value, mode):
    ids = torch.tensor([0] * 140 + [1] * 2 + [2] * 140)
    made = shim.plan(ids, 3)[0]
    made[1][3:] = made[2][4:] = 10**9  # what a plan holds behind its last segment means nothing
    made[part][position] = value
    try:
        shim.grad(torch.randn(282, 8), made, torch.randn(3, 8), MODES[mode], scale_by_freq=True)
    except AssertionError as error:  # the gradient is lost, memory is not
        if not re.match(r"element \d+ is (read|written) twice", str(error)):
            raise


@pytest.mark.parametrize(
    ("mode", "ends"), [("dense", [299.0, 1.0, 0.0]), ("accumulate", [306.0, 8.0, 7.0]), ("rows", [7.0, 7.0, 7.0])]
)
@pytest.mark.parametrize("stride", [1024, 1028])
def test_beyond_two_to_the_31_elements(stride, mode, ends):
    """Row 2**21 of 1024 columns starts 2**31 elements in, in the table and in the gradient."""
    found = (ctypes.c_float * 3)()
    sizes = (2**21 + 5, 300, 2**21 + 13, 1024, stride)  # the last block of the table has five rows to clear
    message = shim.library().shim_far(*(ctypes.c_int64(size) for size in sizes), MODES[mode], found)
    assert message is None, message
    assert list(found) == ends


# Bytes of an element; elements of a vector of rows, of a cleared row, of partial sums. 16 bits in vectors and one by
# one, float32, float64, float32 rows for a 16-bit output.
VECTORS = [(2, 8, 8, 4), (2, 1, 1, 1), (4, 4, 4, 4), (8, 2, 2, 2), (2, 4, 8, 4)]


def shape_of(n, rows, width, size, vectors):
    values = (ctypes.c_int64 * 8)()
    shim.library().shim_shape(*(ctypes.c_int64(value) for value in (n, rows, width)), size, *vectors, values)
    names = ("strips", "tile", "reduce_blocks", "zero_blocks", "finish_blocks", "lanes", "block_strips", "zero_rows")
    return dict(zip(names, values, strict=True))


@pytest.mark.parametrize("n", [1, 128, 129, 3000, 16384, 16385, 65536, 131072, 1 << 20, 2**31 - 1])
@pytest.mark.parametrize("width", [1, 5, 64, 100, 384, 768, 4096, 100_000])
def test_launches_and_workspace_stay_within_limits(n, width):
    for size, *vectors in VECTORS:
        check_launches(n, width, size, vectors)


def check_launches(n, width, size, vectors):
    width = -(-width // max(vectors)) * max(vectors)
    rows = min(2**31 - 1, 2**37 // (width * size))
    shape = shape_of(n, rows, width, size, vectors)
    strip = 8 * shape["tile"]
    assert shape["strips"] * strip >= n > (shape["strips"] - 1) * strip
    assert shape["lanes"] in (1, 2, 4, 8, 16, 32)
    assert 8 * shape["block_strips"] * shape["lanes"] <= 256
    assert 1 <= shape["block_strips"] <= 1024 // strip
    assert shape["zero_blocks"] * shape["zero_rows"] >= rows
    assert 1 <= shape["zero_rows"] <= 256
    if n * width * size <= 2**37:  # what fits into any GPU
        assert shape["reduce_blocks"] + shape["zero_blocks"] < 2**31
        assert shape["finish_blocks"] < 2**31
    # Partial sums, two rows a strip, in fp32; one strip more where N does not fill it.
    accumulator = 8 if size == 8 else 4
    assert 2 * shape["strips"] * width * accumulator <= (n + strip) * width * accumulator / 64


@pytest.mark.parametrize("vectors", [1, 2, 3, 5, 8, 12, 16, 24, 33, 40, 48, 64, 96, 97, 128, 192, 512])
def test_few_threads_are_idle(vectors):
    """At most an eighth of them, unless lanes would no longer cover a line of 128 bytes."""
    shape = shape_of(5000, 1, 8 * vectors, 2, (8, 8, 4))
    chunks = -(-vectors // shape["lanes"])
    assert chunks * shape["lanes"] <= max(vectors * 9 / 8, -(-vectors // 8) * 8)


@pytest.mark.parametrize(("rows_dtype", "out_dtype"), PAIRS)
@pytest.mark.parametrize("distribution", ["uniform", "equal", "out_of_range"])
def test_no_byte_moves_that_need_not(distribution, rows_dtype, out_dtype):
    """The gradient's rows are read once, the output's written once, and partial sums come on top."""
    n, rows, width = 1500, 1000, 48
    ids = make_ids(distribution, n, rows)
    made, _ = shim.plan(ids, rows)
    grad_rows = torch.randn(n, width).to(rows_dtype)
    gradient = int(kept(ids, rows).sum()) * width * rows_dtype.itemsize
    used = int(made[3]) * width * out_dtype.itemsize
    strips = -(-n // STRIP)
    partials = 2 * (2 * strips * width * (8 if rows_dtype == torch.float64 else 4))
    table = rows * width * out_dtype.itemsize
    for mode, output in ((DENSE, table), (ACCUMULATE, 2 * used), (ROWS, used), (PADDED_ROWS, table)):
        for vectors in (True, False):
            ran = shim.grad(grad_rows, made, make_out(rows, width, out_dtype, mode), mode, vectors=vectors)
            assert gradient + output <= ran.bytes <= gradient + output + partials


def exact_grad(grad_rows, ids, rows, padding):
    """In numpy's widest type: float64 is judged too."""
    keep = kept(ids, rows, padding)
    out = np.zeros((rows, grad_rows.shape[1]), dtype=np.longdouble)
    np.add.at(out, ids[keep].numpy(), grad_rows[keep].double().numpy().astype(np.longdouble))
    return out


@pytest.mark.parametrize("dtype", shim.DTYPES)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_errors_are_not_above_pytorchs(distribution, dtype):
    """Pooled over a case; strictly below in bfloat16, where PyTorch rounds between additions."""
    if dtype == torch.float64 and np.finfo(np.longdouble).eps == np.finfo(np.float64).eps:
        pytest.skip("numpy has nothing wider than float64 here")
    ours = theirs = 0.0
    repeats = False
    for n, rows in ((300, 37), (1500, 300), (3072, 20)):
        ids = make_ids(distribution, n, rows, seed=n)
        grad_rows = torch.randn(n, 16).to(dtype)
        made, _ = shim.plan(ids, rows, PADDING)
        out = shim.grad(grad_rows, made, poisoned(rows, 16, dtype=dtype, device=CPU)).out
        pytorch = grad_pytorch(grad_rows, ids, rows, PADDING)
        exact = exact_grad(grad_rows, ids, rows, PADDING)
        assert_within_contract(out, pytorch, torch.from_numpy(exact.astype(np.float64)), f"embedding_grad N={n}")
        ours += float(((out.double().numpy() - exact) ** 2).sum())
        theirs += float(((pytorch.double().numpy() - exact) ** 2).sum())
        repeats |= int(kept(ids, rows, PADDING).sum()) > int(made[3])
    assert ours <= theirs
    if dtype == torch.bfloat16 and repeats:
        assert ours < theirs

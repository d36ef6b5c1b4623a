"""The library's CPU ops: plan and gradient in every mode, whatever the number of threads."""

import contextlib

import pytest
import torch

from embedkernels.ops.extension import extension_status
from tests.contract import assert_within_contract, poisoned
from tests.extension.cases import (
    DISTRIBUTIONS,
    PADDING,
    check_plan,
    grad_pytorch,
    grad_reference,
    make_ids,
    round_stochastically,
    rounding_bits,
    sum_reference,
)

F32, F64, F16, BF16 = torch.float32, torch.float64, torch.float16, torch.bfloat16
DENSE, ACCUMULATE, ROWS, PADDED_ROWS = range(4)  # csrc/grad_mode.h
MODES = {"dense": DENSE, "accumulate": ACCUMULATE, "rows": ROWS, "padded_rows": PADDED_ROWS}
# Of the gradient rows and of the output: every pair there is.
PAIRS = {
    "f32": (F32, F32),
    "f64": (F64, F64),
    "f16": (F16, F16),
    "bf16": (BF16, BF16),
    "f16_to_f32": (F16, F32),
    "bf16_to_f32": (BF16, F32),
    "f32_to_f16": (F32, F16),
    "f32_to_bf16": (F32, BF16),
}
every_mode = pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
every_pair = pytest.mark.parametrize(("dtype", "out_dtype"), PAIRS.values(), ids=PAIRS)


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


def make_plan(ids, rows, padding=-1, start=0, ignored=None):
    return torch.ops.embedkernels_ext.embedding_plan(ids, rows, padding, start, ignored)


def grad(out, grad_rows, made, mode, sources=None, weights=None, scale_by_freq=False, seed=None):
    """Runs the op on ``out`` and hands it back."""
    torch.ops.embedkernels_ext.embedding_grad(out, grad_rows, *made, mode, sources, weights, scale_by_freq, seed)
    return out


def dense(grad_rows, made, rows, dtype=None, **options):
    out = poisoned(rows, grad_rows.shape[1], dtype=dtype or grad_rows.dtype, device="cpu")
    return grad(out, grad_rows, made, DENSE, **options)


def wide_of(dtype):
    return F64 if dtype == F64 else F32


def make_rows(n, width, dtype, seed=0):
    """Normal values. Doubles get few bits, so that sums of them are exact in any order."""
    values = torch.randn(n, width, generator=torch.Generator().manual_seed(seed))
    return (values.bfloat16() if dtype == F64 else values).to(dtype)


def check_grad(grad_rows, ids, rows, mode, out_dtype, padding=PADDING, seed=0, **options):
    """Fail unless the sums are within the contract and all else is as the mode says.

    The yardstick adds in fp32 (fp64 for double) and rounds once, as the op has to.
    """
    width = grad_rows.shape[1]
    made = make_plan(ids, rows, padding)
    count = int(made[3])
    touched = made[1][:count].long()
    what = f"{mode=} {out_dtype=} {options.keys()}"
    expected = sum_reference(grad_rows, ids, rows, padding, **options)[touched]
    theirs = sum_reference(grad_rows, ids, rows, padding, **options, dtype=wide_of(grad_rows.dtype))[touched]
    if mode == ACCUMULATE:
        before = torch.randn(count, width, generator=torch.Generator().manual_seed(seed)).to(out_dtype)
        out = poisoned(rows, width, dtype=out_dtype, device="cpu").index_copy_(0, touched, before)
        expected, theirs = expected + before, theirs + before.to(theirs.dtype)
    else:
        out = poisoned(rows if mode == DENSE else count + 3, width, dtype=out_dtype, device="cpu")
    grad(out, grad_rows, made, mode, **options)
    at = torch.arange(count) if mode in (ROWS, PADDED_ROWS) else touched
    assert_within_contract(out[at], theirs.to(out_dtype), expected, what)
    rest = torch.ones(len(out), dtype=torch.bool).index_fill_(0, at, False)
    if mode in (DENSE, PADDED_ROWS):
        assert torch.equal(out[rest], torch.zeros_like(out[rest])), what
    else:
        assert out[rest].isnan().all(), what
    return out


# 40 rows: one pass of the radix sort; 5000: two; 2**31 - 1: three. 150,000 ids are worth several threads.
SIZES = [(0, 40), (1, 40), (500, 40), (3000, 5000), (150_000, 5000), (700, 2**31 - 1)]


@pytest.mark.parametrize(("n", "rows"), SIZES)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_plan(distribution, n, rows):
    for number, dtype in ((1, torch.int64), (3, torch.int32)):
        ids = make_ids(distribution, n, min(rows, 2**28), dtype=dtype)
        with threads(number):
            check_plan(make_plan(ids, rows, PADDING), ids, rows, PADDING)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("n", [1, 500, 150_000])
def test_plan_drops_ignored_positions(n, share):
    for number, dtype in ((1, torch.int64), (3, torch.int32)):
        ids = make_ids("out_of_range", n, 5000, dtype=dtype)
        ignored = torch.rand(n, generator=torch.Generator().manual_seed(n)) < share
        with threads(number):
            check_plan(make_plan(ids, 5000, PADDING, 0, ignored), ids, 5000, PADDING, 0, ignored)


def test_plan_takes_a_mask_of_bytes():
    """A bool tensor that is a view of bytes may hold more than 0 and 1; all but 0 are true."""
    ids = torch.arange(6)
    bytes_ = torch.tensor([0, 1, 2, 128, 255, 0], dtype=torch.uint8)
    check_plan(make_plan(ids, 6, ignored=bytes_.view(torch.bool)), ids, 6, ignored=bytes_ != 0)


def test_plan_of_any_shape_and_shard():
    ids = make_ids("uniform", 24_000, 900).reshape(8, 30, 100)
    ignored = (ids % 7 == 0).contiguous()
    check_plan(make_plan(ids, 300, 450, 300), ids, 300, 450, 300)
    check_plan(make_plan(ids, 300, 450, 300, ignored), ids, 300, 450, 300, ignored)


@pytest.mark.parametrize("extreme", [-(2**63), -1, 2**31, 2**32 + 3, 2**63 - 1])
def test_plan_drops_ids_beyond_32_bits(extreme):
    ids = torch.tensor([3, extreme, 5, extreme, 3])
    check_plan(make_plan(ids, 10), ids, 10)


@pytest.mark.parametrize("rows", [0, 1])
def test_plan_of_tiny_tables(rows):
    ids = torch.arange(-3, 20)
    check_plan(make_plan(ids, rows), ids, rows)


@every_mode
@every_pair
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_grad(distribution, dtype, out_dtype, mode):
    # Segments below, at and above the four rows that are added together, and a block of 512.
    for n in (1, 2, 5, 6, 513, 1500):
        width = 7 if n % 2 else 24
        check_grad(make_rows(n, width, dtype, n), make_ids(distribution, n, 90, seed=n), 90, mode, out_dtype)


@every_mode
@every_pair
@pytest.mark.parametrize("distribution", ["zipf", "hot", "out_of_range"])
def test_grad_with_sources_weights_and_frequency(distribution, dtype, out_dtype, mode):
    n, rows, width = 1500, 90, 20
    random = torch.Generator().manual_seed(3)
    ids = make_ids(distribution, n, rows)
    kept = (ids >= 0) & (ids < rows) & (ids != PADDING)
    # What belongs to a dropped position is not looked at.
    sources = torch.randint(0, 37, (n,), generator=random, dtype=torch.int32).masked_fill(~kept, -9)
    weights = make_rows(n, 1, wide_of(dtype), 1).reshape(n).masked_fill(~kept, float("nan"))
    own_rows, shared_rows = make_rows(n, width, dtype), make_rows(37, width, dtype)
    check_grad(shared_rows, ids, rows, mode, out_dtype, sources=sources)
    check_grad(own_rows, ids, rows, mode, out_dtype, weights=weights)
    check_grad(own_rows, ids, rows, mode, out_dtype, scale_by_freq=True)
    check_grad(shared_rows, ids, rows, mode, out_dtype, sources=sources, weights=weights, scale_by_freq=True)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("n", [1, 2, 511, 512, 513, 1024, 1025, 1600])
def test_rows_are_added_in_order_within_blocks_of_512(n, weighted):
    grad_rows = torch.randn(n, 8)
    weights = torch.randn(n) if weighted else None
    values = grad_rows * weights[:, None] if weighted else grad_rows
    total = None
    for block in values.split(512):
        block_sum = block[0]
        for row in block[1:]:
            block_sum = block_sum + row
        total = block_sum if total is None else total + block_sum
    out = dense(grad_rows, make_plan(torch.full((n,), 2), 3), 3, weights=weights)
    assert torch.equal(out, torch.stack((torch.zeros(8), torch.zeros(8), total)))


@every_mode
@pytest.mark.parametrize(("dtype", "out_dtype"), [PAIRS["f32"], PAIRS["bf16"], PAIRS["f32_to_bf16"]])
@pytest.mark.parametrize("distribution", ["zipf", "hot", "two_rows", "out_of_range"])
def test_the_number_of_threads_does_not_change_a_bit(distribution, dtype, out_dtype, mode):
    n, rows, width = 20_000, 2000, 48
    ids = make_ids(distribution, n, rows)
    grad_rows, weights = torch.randn(n, width).to(dtype), torch.rand(n)
    sources = torch.randperm(n).to(torch.int32)
    before = torch.randn(rows, width).to(out_dtype)
    seed = torch.tensor([11]) if mode == ACCUMULATE and out_dtype == BF16 else None
    outs = []
    for number in (1, 2, 3, 3):
        with threads(number):
            made = make_plan(ids, rows)
            outs.append(grad(before.clone(), grad_rows, made, mode, seed=seed))
            outs.append(grad(before.clone(), grad_rows, made, mode, sources, weights, True, seed))
    assert all(torch.equal(out, outs[0]) for out in outs[::2])
    assert all(torch.equal(out, outs[1]) for out in outs[1::2])


@every_mode
def test_rows_of_any_stride(mode):
    """Columns cut from wider rows, every second row, and the expanded gradient of a sum."""
    ids = make_ids("zipf", 700, 60)
    made = make_plan(ids, 60)
    base = torch.randn(1400, 30)
    before = torch.randn(60, 20)
    for given in (base[:700, 3:23], base[::2, 10:], base[:1, :20].expand(700, 20)):
        assert torch.equal(
            grad(before.clone(), given, made, mode), grad(before.clone(), given.contiguous(), made, mode)
        )
    column = base[::2, 4:5]
    before = torch.randn(60, 1)
    assert torch.equal(
        grad(before.clone(), column, made, mode), grad(before.clone(), column.contiguous(), made, mode)
    )


def test_rows_that_the_output_has_no_room_for_are_dropped():
    ids = make_ids("uniform", 400, 90)
    grad_rows = torch.randn(400, 12)
    made = make_plan(ids, 90)
    whole = grad(poisoned(90, 12, dtype=F32, device="cpu"), grad_rows, made, ROWS)
    for mode in (ROWS, PADDED_ROWS):
        # Guards around the output would show a write past it.
        guarded = poisoned(25, 12, dtype=F32, device="cpu")
        grad(guarded[10:15], grad_rows, made, mode)
        assert torch.equal(guarded[10:15], whole[:5])
        assert guarded[:10].isnan().all()
        assert guarded[15:].isnan().all()


def test_accumulate_rounds_once():
    """Half a unit in the last place of 1, twice: each alone would be rounded away."""
    out = torch.ones(3, 4, dtype=BF16)
    grad(out, torch.full((2, 4), 2.0**-8, dtype=BF16), make_plan(torch.tensor([1, 1]), 3), ACCUMULATE)
    assert torch.equal(out, torch.tensor([1, 1 + 2.0**-7, 1], dtype=BF16)[:, None].expand(3, 4))


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("width", [1, 24, 511, 1030])  # random bits are drawn for 8 columns, 512 at a time
def test_stochastic_rounding_takes_the_bits_of_philox(width, dtype):
    n, rows, seed = 300, 40, -(2**62) - 12345
    ids = make_ids("hot", n, rows)
    made = make_plan(ids, rows)
    touched = made[1][: int(made[3])].long()
    grad_rows = torch.randn(n, width).to(dtype)
    weights = torch.rand(n)
    before = torch.randn(rows, width).to(BF16)
    before[touched[0], 0] = float("inf")
    before[touched[1], 0] = float("nan")
    before[touched[2], 0] = torch.finfo(BF16).max
    sums = grad(torch.empty(len(touched), width), grad_rows, made, ROWS, weights=weights)
    expected = before.clone()
    expected[touched] = round_stochastically(before[touched].float() + sums, rounding_bits(seed, touched, width))
    out = grad(before, grad_rows, made, ACCUMULATE, weights=weights, seed=torch.tensor([seed]))
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(out.nan_to_num(0.0, 9.0), expected.nan_to_num(0.0, 9.0))


def test_the_mean_of_stochastic_rounding_is_the_sum():
    share, rows, width = 0.3, 400, 100
    out = torch.ones(rows, width, dtype=BF16)
    grad_rows = torch.full((rows, width), share * 2.0**-7)
    grad(out, grad_rows, make_plan(torch.arange(rows), rows), ACCUMULATE, seed=torch.tensor([7]))
    rounded_up = (out.double() - 1) * 2**7
    assert set(rounded_up.unique().tolist()) == {0.0, 1.0}
    deviation = (share * (1 - share) / out.numel()) ** 0.5
    assert abs(float(rounded_up.mean()) - share) < 4 * deviation
    # Rows and columns are independent of one another.
    assert float(rounded_up.mean(1).std()) < 1.2 * (share * (1 - share) / width) ** 0.5
    assert float(rounded_up.mean(0).std()) < 1.3 * (share * (1 - share) / rows) ** 0.5


def test_the_seed_alone_decides_how_stochastic_rounding_falls():
    grad_rows, made = torch.randn(50, 16), make_plan(torch.arange(50), 50)

    def rounded(seed):
        return grad(torch.ones(50, 16, dtype=BF16), grad_rows, made, ACCUMULATE, seed=torch.tensor([seed]))

    assert torch.equal(rounded(5), rounded(5))
    assert not torch.equal(rounded(5), rounded(6))
    assert not torch.equal(rounded(5), rounded(5 + 2**32))


def test_dense_agrees_with_pytorch():
    ids = make_ids("zipf", 2000, 300)
    grad_rows = torch.randn(2000, 16)
    theirs = grad_pytorch(grad_rows, ids, 300, PADDING)
    expected = grad_reference(grad_rows, ids, 300, PADDING)
    assert_within_contract(dense(grad_rows, make_plan(ids, 300, PADDING), 300), theirs, expected, "embedding_grad")


@pytest.mark.parametrize("number", [1, 3])
def test_fresh_memory_is_written_whole_and_no_further(number):
    """From 8 MiB on, memory that was never written is fetched ahead of the writes, 256 KiB at a time."""
    rows, width, guard = 50_000, 197, 5
    ids = make_ids("uniform", 1000, rows)
    grad_rows = torch.randn(1000, width)
    memory = torch.empty(rows * width + 2 * guard)
    memory[:guard] = memory[-guard:] = 3
    with threads(number):
        out = grad(memory[guard:-guard].view(rows, width), grad_rows, make_plan(ids, rows), DENSE)
    assert torch.equal(out, sum_reference(grad_rows, ids, rows, dtype=F64).float())
    assert torch.equal(memory[:guard], torch.full((guard,), 3.0))
    assert torch.equal(memory[-guard:], torch.full((guard,), 3.0))


def test_offsets_beyond_32_bits():
    """Tables and gradients of 2^31 elements, of which only the pages in use exist."""
    width = 1024
    rows = 2**21 + 3
    try:
        table, grad_rows = (torch.empty(rows, width, dtype=BF16) for _ in range(2))
    except RuntimeError as error:
        pytest.skip(f"no address space for two tensors of 4 GiB: {error}")
    ids = torch.tensor([rows - 1, 0, rows - 1])
    sources = torch.tensor([rows - 2, rows - 1, rows - 1], dtype=torch.int32)
    table[[0, -2, -1]] = 1
    grad_rows[-2], grad_rows[-1] = 2, 3
    grad(table, grad_rows, make_plan(ids, rows), ACCUMULATE, sources)
    assert torch.equal(table[[0, -2, -1], 5], torch.tensor([4, 1, 6], dtype=BF16))


@every_mode
@pytest.mark.parametrize(("n", "rows", "width"), [(0, 5, 4), (3, 0, 4), (3, 5, 0), (0, 0, 0)])
def test_empty(n, rows, width, mode):
    out = torch.ones(rows, width)
    grad(out, torch.randn(n, width), make_plan(torch.full((n,), 9), rows), mode)
    assert torch.equal(out, torch.zeros(rows, width) if mode in (DENSE, PADDED_ROWS) else torch.ones(rows, width))


def test_infinities_and_nan_stay_in_their_row():
    grad_rows = torch.ones(4, 3)
    grad_rows[1, 0], grad_rows[2, 1] = float("inf"), float("nan")
    out = dense(grad_rows, make_plan(torch.tensor([0, 2, 2, 4]), 5), 5)
    assert out[2, 0] == float("inf")
    assert out[2, 1].isnan()
    assert torch.equal(out[[0, 1, 3, 4]], torch.tensor([[1.0] * 3, [0.0] * 3, [0.0] * 3, [1.0] * 3]))


def test_opcheck():
    # The plan's elements past count are unspecified: ids without a hole leave none.
    ids = torch.arange(30).flip(0)
    ops = torch.ops.embedkernels_ext
    torch.library.opcheck(ops.embedding_plan.default, (ids, 30, -1, 0, None))
    made = make_plan(ids, 30)
    sources, weights = torch.arange(30, dtype=torch.int32), torch.rand(30)
    # Not test_aot_dispatch: torch's functionalisation of mutating ops trips over an argument called mode.
    utils = ("test_schema", "test_autograd_registration", "test_faketensor")
    for arguments in (
        (torch.ones(30, 4), torch.randn(30, 4), *made, DENSE, None, None, False, None),
        (torch.ones(30, 4, dtype=BF16), torch.randn(30, 4), *made, ACCUMULATE, sources, weights, True, ids[:1]),
    ):
        torch.library.opcheck(ops.embedding_grad.default, arguments, test_utils=utils)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ids": torch.zeros(3)}, "ids must be int32 or int64"),
        ({"ids": torch.zeros(6, dtype=torch.int64)[::2]}, "ids must be contiguous"),
        ({"num_rows": -1}, "num_rows must be 0 to 2147483647, got -1"),
        ({"num_rows": 2**31}, "num_rows must be 0 to 2147483647, got 2147483648"),
        ({"padding_idx": -2}, "padding_idx must be an id, or -1 for none, got -2"),
        ({"vocab_start": -1}, "vocab_start must be 0 to .*, got -1"),
        ({"ignored": torch.zeros(3)}, "ignored must be bool"),
        ({"ignored": torch.zeros(4, dtype=torch.bool)}, r"ignored must be contiguous .* 3 ids, got \(4,\)"),
        ({"ignored": torch.zeros(6, dtype=torch.bool)[::2]}, "ignored must be contiguous"),
    ],
)
def test_plan_names_a_bad_argument(arguments, message):
    good = {
        "ids": torch.zeros(3, dtype=torch.int64),
        "num_rows": 4,
        "padding_idx": -1,
        "vocab_start": 0,
        "ignored": None,
    }
    with pytest.raises(RuntimeError, match=f"^embedding_plan: {message}"):
        torch.ops.embedkernels_ext.embedding_plan(**good | arguments)


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"grad_rows": torch.zeros(3)}, r"grad_rows must have shape \(R, D\), got \(3,\)"),
        ({"grad_rows": torch.zeros(3, 2).int()}, "grad_rows must be float32, float64, float16 or bfloat16"),
        ({"grad_rows": torch.zeros(2, 3).t()}, "the elements of a row must be neighbours"),
        ({"grad_rows": torch.zeros(4, 2)}, r"grad_rows must have one row for each of the 3 ids, got shape \(4, 2\)"),
        ({"out": torch.zeros(4, 3)}, r"out must have rows of 2 elements, got shape \(4, 3\)"),
        ({"out": torch.zeros(4, 4)[:, :2]}, "out must be contiguous"),
        ({"out": torch.zeros(4, 2, dtype=F64)}, "out must be of grad_rows' dtype, or one of them float32"),
        ({"mode": 4}, "mode must be 0 to 3, got 4"),
        ({"order": torch.zeros(3)}, "order must be int32"),
        ({"segment_ids": int32(1, 2)}, r"segment_ids must have shape \(3,\), got \(2,\)"),
        ({"segment_offsets": int32(0, 1, 3)}, r"segment_offsets must have shape \(4,\), got \(3,\)"),
        ({"sources": torch.zeros(3, dtype=torch.int64)}, "sources must be int32"),
        ({"sources": int32(0, 1)}, r"sources must have shape \(3,\), got \(2,\)"),
        ({"weights": torch.ones(3, dtype=F64)}, "weights must be float32"),
        ({"weights": torch.ones(2)}, r"weights must have shape \(3,\), got \(2,\)"),
        ({"seed": torch.tensor([1])}, "stochastic rounding is for sums that are added to bfloat16"),
        ({"seed": int32(1), "mode": ACCUMULATE, "out": torch.zeros(4, 2, dtype=BF16)}, "seed must be int64"),
    ],
)
def test_grad_names_a_bad_argument(arguments, message):
    with pytest.raises(RuntimeError, match=f"^embedding_grad: {message}"):
        torch.ops.embedkernels_ext.embedding_grad(**good_arguments() | arguments)


def good_arguments():
    made = make_plan(torch.tensor([1, 2, 2]), 4)
    return dict(zip(("order", "segment_ids", "segment_offsets", "count"), made, strict=True)) | {
        "out": torch.zeros(4, 2),
        "grad_rows": torch.ones(3, 2),
        "mode": DENSE,
        "sources": None,
        "weights": None,
        "scale_by_freq": False,
        "seed": None,
    }


@every_mode
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"count": int32(4)}, "count must be 0 to 3, got 4"),
        ({"count": int32(-1)}, "count must be 0 to 3, got -1"),
        ({"order": int32(0, 1, 3)}, "order must hold positions below 3, got 3 at position 2"),
        ({"order": int32(0, -1, 2)}, "order must hold positions below 3, got -1 at position 1"),
        ({"segment_offsets": int32(0, 2, 9, 0)}, "segment_offsets must ascend to at most 3, got 9 at position 2"),
        ({"segment_offsets": int32(0, 2, 2, 0)}, "segment_offsets must ascend to at most 3, got 2 at position 2"),
        # The difference of two int32 does not fit one: it must not wrap to a length.
        ({"segment_offsets": int32(0, 1, -(2**31), 0)}, "segment_offsets must ascend to at most 3, got -2147483648"),
        ({"segment_offsets": int32(1, 2, 3, 0)}, "segment_offsets must start with 0"),
        ({"sources": int32(0, 3, 0)}, "sources must be rows of grad_rows, 0 to 2, got 3 at position 1"),
        ({"sources": int32(0, 0, -1)}, "sources must be rows of grad_rows, 0 to 2, got -1 at position 2"),
        (
            {"sources": int32(0, 0, 0), "grad_rows": torch.ones(0, 2)},
            "sources must be rows of grad_rows, 0 to -1, got 0 at position 0",
        ),
    ],
)
def test_a_plan_that_leads_out_of_bounds_is_refused(arguments, message, mode):
    """It is data from outside: nothing is read or written where it should not be, and nothing is written at all."""
    given = good_arguments() | arguments | {"mode": mode}
    with pytest.raises(RuntimeError, match=f"^embedding_grad: {message}"):
        torch.ops.embedkernels_ext.embedding_grad(**given)
    assert torch.equal(given["out"], torch.zeros(4, 2))


@pytest.mark.parametrize("mode", [DENSE, ACCUMULATE])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"segment_ids": int32(1, 4, 0)}, "0 to 3, got 4 at position 1"),
        ({"segment_ids": int32(-1, 2, 0)}, "0 to 3, got -1 at position 0"),
        ({"segment_ids": int32(2, 2, 0)}, "0 to 3, got 2 at position 1"),
        ({"segment_ids": int32(2, 1, 0)}, "0 to 3, got 1 at position 1"),
        ({"out": torch.zeros(2, 2)}, "0 to 1, got 2 at position 1"),  # the plan of a larger table
    ],
)
def test_a_plan_of_another_table_is_refused(arguments, message, mode):
    given = good_arguments() | arguments | {"mode": mode}
    with pytest.raises(RuntimeError, match=f"^embedding_grad: segment_ids must ascend within out's rows, {message}"):
        torch.ops.embedkernels_ext.embedding_grad(**given)
    assert torch.equal(given["out"], torch.zeros_like(given["out"]))

"""The library's CUDA ops on a GPU: the cases of the shim, larger, and what only a device can show."""

import pytest
import torch

from embedkernels.ops.extension import device_problem, extension_status
from embedkernels.reference.embedding import ACCUMULATE, DENSE
from embedkernels.reference.random import round_stochastic
from tests.contract import assert_within_contract, poisoned
from tests.extension.cases import DISTRIBUTIONS, PADDING, check_plan, grad_pytorch, grad_reference, make_ids
from tests.extension.grad_cases import MODES, PAIRS, assert_expected, expected_grad

pytestmark = pytest.mark.gpu
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


@pytest.fixture(autouse=True)
def _loaded():
    status = extension_status()
    assert status.cuda, status.reason
    assert device_problem(torch.cuda.current_device()) is None


def make_plan(ids, rows, padding=-1, start=0):
    return torch.ops.embedkernels_ext.embedding_plan(ids, rows, padding, start, None)


def grad(out, grad_rows, made, mode, sources=None, weights=None, scale_by_freq=False, seed=None):
    torch.ops.embedkernels_ext.embedding_grad(out, grad_rows, *made, mode, sources, weights, scale_by_freq, seed)
    return out


def dense(grad_rows, made, rows):
    out = poisoned(rows, grad_rows.shape[1], dtype=grad_rows.dtype, device=grad_rows.device)
    return grad(out, grad_rows, made, DENSE)


def make_out(rows, width, dtype, mode, device):
    """Memory as the modes find it: values to add to, or garbage."""
    if mode == ACCUMULATE:
        return torch.randn(rows, width, device=device).to(dtype)
    return poisoned(rows, width, dtype=dtype, device=device)


# Sizes on both sides of CUB's single-tile sort, and of one tile of segments.
SIZES = [0, 1, 257, 4000, 9000, 70_000, 300_000]


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_plan(distribution, n, device):
    for rows in (40, 30522, 250_002):
        dtype = torch.int32 if n % 2 else torch.int64
        ids = make_ids(distribution, n, rows, dtype=dtype).to(device)
        check_plan(make_plan(ids, rows, PADDING), ids, rows, PADDING)


def test_plan_of_the_largest_table_and_a_shard(device):
    ids = make_ids("uniform", 20_000, 2**31 - 1).to(device)
    check_plan(make_plan(ids, 2**31 - 1), ids, 2**31 - 1)
    ids = make_ids("uniform", 20_000, 1000).to(device)
    check_plan(make_plan(ids, 250, 300, 250), ids, 250, 300, 250)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 7, 384, 1032])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_grad(distribution, width, dtype, device):
    for n, rows in ((300, 37), (4000, 30522), (20_000, 5000)):
        ids = make_ids(distribution, n, rows).to(device)
        grad_rows = torch.randn(n, width, device=device).to(dtype)
        out = dense(grad_rows, make_plan(ids, rows, PADDING), rows)
        expected = grad_reference(grad_rows, ids, rows, PADDING)
        theirs = grad_pytorch(grad_rows, ids, rows, PADDING)
        assert_within_contract(out, theirs, expected, f"embedding_grad N={n}")


@pytest.mark.parametrize("distribution", ["hot", "equal", "zipf"])
def test_grad_of_many_ids(distribution, device):
    n, rows, width = 131_072, 128_256, 256
    ids = make_ids(distribution, n, rows).to(device)
    grad_rows = torch.randn(n, width, device=device).bfloat16()
    out = dense(grad_rows, make_plan(ids, rows), rows)
    expected = grad_reference(grad_rows, ids, rows)
    assert_within_contract(out, grad_pytorch(grad_rows, ids, rows), expected, "embedding_grad")


# 100: short tiles, one strip; 20_000: long tiles.
@pytest.mark.parametrize("n", [0, 100, 5000, 20_000])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("rows_dtype", "out_dtype"), PAIRS)
def test_every_mode_and_pair_of_dtypes(rows_dtype, out_dtype, mode, n, device):
    """With sources (bags), weights and scales, in vectors and one element at a time."""
    rows = 3000
    wide = torch.promote_types(rows_dtype, torch.float32)
    for width, distribution in ((96, "zipf"), (33, "hot")):
        ids = make_ids(distribution, n, rows).to(device)
        made = make_plan(ids, rows, PADDING)
        grad_rows = torch.randn(n // 3 + 1, width, device=device).to(rows_dtype)
        sources = torch.randint(-1, len(grad_rows) + 1, (n,), dtype=torch.int32, device=device)
        weights = torch.randn(n, dtype=wide, device=device)
        out = make_out(rows, width, out_dtype, MODES[mode], device)
        expected = expected_grad(out, grad_rows, made, MODES[mode], sources, weights, scale_by_freq=True)
        assert_expected(grad(out, grad_rows, made, MODES[mode], sources, weights, True), expected, f"{mode} N={n}")


@pytest.mark.parametrize("mode", ["rows", "padded_rows"])
@pytest.mark.parametrize("capacity", [1, 700, 4000])
def test_rows_of_every_capacity(capacity, mode, device):
    ids = make_ids("uniform", 4000, 2000).to(device)
    made = make_plan(ids, 2000)
    grad_rows = torch.randn(4000, 64, device=device)
    out = make_out(capacity, 64, torch.float32, MODES[mode], device)
    expected = expected_grad(out, grad_rows, made, MODES[mode])
    assert_expected(grad(out, grad_rows, made, MODES[mode]), expected)


@pytest.mark.parametrize("rows_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [7, 100, 768])
@pytest.mark.parametrize("distribution", ["hot", "distinct"])
def test_stochastic_rounding_has_the_bits_of_the_reference(distribution, width, rows_dtype, device):
    n, rows = 6000, 8000
    made = make_plan(make_ids(distribution, n, rows).to(device), rows)
    grad_rows = torch.randn(n, width, device=device).to(rows_dtype)
    old = torch.randn(rows, width, device=device).bfloat16()
    seed = torch.tensor([0x123456789ABCDEF], device=device)
    exact = grad(old.float(), grad_rows, made, ACCUMULATE)
    touched = torch.zeros(rows, dtype=torch.bool, device=device)
    touched[made[1][: int(made[3])].long()] = True
    rounded = round_stochastic(exact, torch.arange(rows, device=device), seed)
    out = grad(old.clone(), grad_rows, made, ACCUMULATE, seed=seed)
    assert torch.equal(out, torch.where(touched[:, None], rounded, old))


@pytest.mark.parametrize("stride", [0, 64, 72, 65])
def test_rows_of_every_stride(stride, device):
    """0: an expanded gradient; 65: single elements, or loads of 16 bytes would fault."""
    n, rows = 3000, 400
    made = make_plan(make_ids("zipf", n, rows).to(device), rows)
    grad_rows = torch.randn((n - 1) * stride + 64, device=device).bfloat16().as_strided((n, 64), (stride, 1))
    out = make_out(rows, 64, torch.bfloat16, DENSE, device)
    expected = expected_grad(out, grad_rows, made, DENSE)
    assert_expected(grad(out, grad_rows, made, DENSE), expected)


@pytest.mark.parametrize(("n", "width"), [(3000, 768), (16_384, 768), (131_072, 256)])
def test_workspace(n, width, device):
    """At most a sixteenth of four bytes for each element of the gradient, and one strip."""
    made = make_plan(make_ids("zipf", n, 5000).to(device), 5000)
    grad_rows = torch.randn(n, width, device=device).bfloat16()
    out = torch.zeros(5000, width, device=device)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    grad(out, grad_rows, made, ACCUMULATE)
    used = torch.cuda.max_memory_allocated() - before
    assert 0 < used <= (n + 256) * width / 16 + 12 * (n / 128 + 1) + 1024  # the allocator rounds up to 512 bytes


def test_rows_that_are_not_aligned(device):
    """A view that starts one element in: 16-byte loads would fault."""
    ids = make_ids("zipf", 500, 60).to(device)
    grad_rows = torch.randn(500 * 16 + 1, device=device)[1:].reshape(500, 16)
    out = dense(grad_rows, make_plan(ids, 60), 60)
    torch.testing.assert_close(out.double(), grad_reference(grad_rows, ids, 60), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_twenty_runs_give_the_same_bits(mode, device):
    ids = make_ids("zipf", 60_000, 30_522).to(device)
    grad_rows = torch.randn(60_000, 96, device=device).bfloat16()
    old = torch.randn(30_522, 96, device=device).bfloat16()
    first = grad(old.clone(), grad_rows, make_plan(ids, 30_522), MODES[mode])
    for _ in range(20):
        assert torch.equal(grad(old.clone(), grad_rows, make_plan(ids, 30_522), MODES[mode]), first)


@pytest.mark.parametrize("mode", MODES)
def test_graph_replay_with_changed_ids(mode, device):
    """Nothing in a captured launch depends on the ids: the same graph serves other ids, padding only included."""
    n, rows, width = 9000, 3000, 64
    ids = make_ids("zipf", n, rows).to(device)
    grad_rows = torch.randn(n, width, device=device).bfloat16()
    seed = torch.zeros(1, dtype=torch.int64, device=device) if MODES[mode] == ACCUMULATE else None
    out = torch.zeros(rows, width, device=device, dtype=torch.bfloat16)

    def run(out):
        return grad(out, grad_rows, make_plan(ids, rows, PADDING), MODES[mode], scale_by_freq=True, seed=seed)

    run(out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(out)
    for number, distribution in enumerate(DISTRIBUTIONS):
        ids.copy_(make_ids(distribution, n, rows, seed=number))
        grad_rows.normal_()
        if seed is not None:
            seed.fill_(number)
        expected = run(out.clone())
        graph.replay()
        assert torch.equal(out, expected), distribution


def test_no_synchronisation(device):
    """The calls return while the GPU is still busy with what was queued before them.

    ``torch.cuda.set_sync_debug_mode`` would not do: it sees the waits of PyTorch's own code alone.
    """
    ids = make_ids("uniform", 5000, 1000).to(device)
    grad_rows = torch.randn(5000, 64, device=device)
    dense(grad_rows, make_plan(ids, 1000), 1000)  # now nothing is loaded or allocated for the first time
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000_000)  # about a second
    queued = torch.cuda.Event()
    queued.record()
    out = dense(grad_rows, make_plan(ids, 1000), 1000)
    returned_early = not queued.query()
    torch.cuda.synchronize()
    assert returned_early
    assert torch.equal(out, dense(grad_rows, make_plan(ids, 1000), 1000))


def test_rows_that_the_table_does_not_have_are_left_out(device):
    """A plan that was made for a larger table; that nothing is written behind this one, the shim shows."""
    ids = make_ids("hot", 4000, 37).to(device)
    grad_rows = torch.randn(4000, 64, device=device)
    out = dense(grad_rows, make_plan(ids, 37), 5)
    torch.testing.assert_close(out.double(), grad_reference(grad_rows, ids, 5), rtol=1e-4, atol=1e-4)


def test_current_stream(device):
    """The ops run where PyTorch's current stream is: behind the work queued there."""
    stream = torch.cuda.Stream(device)
    ids = make_ids("uniform", 50_000, 1000).to(device)
    grad_rows = torch.zeros(50_000, 256, device=device)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        grad_rows.fill_(1.0)
        out = dense(grad_rows, make_plan(ids, 1000), 1000)
    stream.synchronize()
    assert torch.equal(out[:, 0].cpu(), torch.bincount(ids.cpu(), minlength=1000).float())


@pytest.mark.slow
def test_tables_beyond_two_to_the_31_elements(device):
    rows, width = 2**21 + 1000, 1040
    if torch.cuda.mem_get_info(device)[0] < 3 * rows * width * 2:
        pytest.skip("not enough memory on this GPU")
    ids = torch.tensor([rows - 1, 0, rows - 1, rows // 2], device=device)
    out = dense(torch.ones(4, width, device=device, dtype=torch.bfloat16), make_plan(ids, rows), rows)
    assert torch.equal(out[:, 5].nonzero().reshape(-1), torch.tensor([0, rows // 2, rows - 1], device=device))
    assert torch.equal(out[rows - 1], torch.full((width,), 2.0, device=device, dtype=torch.bfloat16))


@pytest.mark.slow
def test_gradients_beyond_two_to_the_31_elements(device):
    n, width = 2**21 + 1000, 1040
    if torch.cuda.mem_get_info(device)[0] < 3 * n * width * 2:
        pytest.skip("not enough memory on this GPU")
    grad_rows = torch.zeros(n, width, device=device, dtype=torch.bfloat16)
    grad_rows[-1] = 3
    ids = torch.zeros(n, dtype=torch.int64, device=device)
    ids[-1] = 1
    out = dense(grad_rows, make_plan(ids, 2), 2)
    assert torch.equal(out[1], grad_rows[-1])
    assert torch.equal(out[0], torch.zeros_like(out[0]))


def test_bad_arguments(device):
    ids = torch.zeros(3, dtype=torch.int64, device=device)
    made = make_plan(ids, 4)
    with pytest.raises(RuntimeError, match="embedding_grad: order must be on the device of grad_rows"):
        dense(torch.zeros(3, 2, device=device), (made[0].cpu(), *made[1:]), 4)
    with pytest.raises(RuntimeError, match="embedding_grad: out must be on the device of grad_rows"):
        grad(torch.zeros(4, 2), torch.zeros(3, 2, device=device), made, DENSE)
    with pytest.raises(RuntimeError, match="embedding_plan: num_rows must be 0 to 2147483647, got -1"):
        make_plan(ids, -1)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_tensors_device_counts_not_the_current_one():
    ids = make_ids("uniform", 500, 50).to("cuda:1")
    with torch.cuda.device(0):
        made = make_plan(ids, 50)
        out = dense(torch.ones(500, 8, device="cuda:1"), made, 50)
    assert out.device.index == 1
    assert torch.equal(out[:, 0].cpu(), torch.bincount(ids.cpu(), minlength=50).float())

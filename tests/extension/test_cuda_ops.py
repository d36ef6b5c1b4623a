"""The library's CUDA ops on a GPU: the cases of the shim, larger, and what only a device can show."""

import pytest
import torch

from embedkernels.ops.extension import device_problem, extension_status
from tests.contract import assert_within_contract
from tests.extension.cases import DISTRIBUTIONS, PADDING, check_plan, grad_pytorch, grad_reference, make_ids

pytestmark = pytest.mark.gpu
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


@pytest.fixture(autouse=True)
def _loaded():
    status = extension_status()
    assert status.cuda, status.reason
    assert device_problem(torch.cuda.current_device()) is None


def make_plan(ids, rows, padding=-1, start=0):
    return torch.ops.embedkernels_ext.embedding_plan(ids, rows, padding, start)


def dense(grad_rows, made, rows):
    return torch.ops.embedkernels_ext.embedding_grad_dense(grad_rows, *made, rows)


# Sizes on both sides of CUB's single-tile sort, of one tile of segments, and of every length of tile of the sum.
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
        torch.full((rows, width), float("nan"), dtype=dtype, device=device)  # poisons what the allocator hands out
        out = dense(grad_rows, make_plan(ids, rows, PADDING), rows)
        expected = grad_reference(grad_rows, ids, rows, PADDING)
        theirs = grad_pytorch(grad_rows, ids, rows, PADDING)
        assert_within_contract(out, theirs, expected, f"embedding_grad_dense N={n}")


@pytest.mark.parametrize("distribution", ["hot", "equal", "zipf"])
def test_grad_of_many_ids(distribution, device):
    n, rows, width = 131_072, 128_256, 256
    ids = make_ids(distribution, n, rows).to(device)
    grad_rows = torch.randn(n, width, device=device).bfloat16()
    out = dense(grad_rows, make_plan(ids, rows), rows)
    expected = grad_reference(grad_rows, ids, rows)
    assert_within_contract(out, grad_pytorch(grad_rows, ids, rows), expected, "embedding_grad_dense")


def test_rows_that_are_not_aligned(device):
    """A view that starts one element in: 16-byte loads would fault."""
    ids = make_ids("zipf", 500, 60).to(device)
    grad_rows = torch.randn(500 * 16 + 1, device=device)[1:].reshape(500, 16)
    out = dense(grad_rows, make_plan(ids, 60), 60)
    torch.testing.assert_close(out.double(), grad_reference(grad_rows, ids, 60), rtol=1e-5, atol=1e-5)


def test_twenty_runs_give_the_same_bits(device):
    ids = make_ids("zipf", 60_000, 30_522).to(device)
    grad_rows = torch.randn(60_000, 96, device=device).bfloat16()
    first = dense(grad_rows, make_plan(ids, 30_522), 30_522)
    for _ in range(20):
        assert torch.equal(dense(grad_rows, make_plan(ids, 30_522), 30_522), first)


def test_graph_replay_with_changed_ids(device):
    """Nothing in a captured launch depends on the ids: the same graph serves other ids, padding only included."""
    n, rows, width = 9000, 3000, 64
    ids = make_ids("zipf", n, rows).to(device)
    grad_rows = torch.randn(n, width, device=device)
    dense(grad_rows, make_plan(ids, rows, PADDING), rows)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = dense(grad_rows, make_plan(ids, rows, PADDING), rows)
    for seed, distribution in enumerate(DISTRIBUTIONS):
        ids.copy_(make_ids(distribution, n, rows, seed=seed))
        grad_rows.normal_()
        graph.replay()
        expected = dense(grad_rows, make_plan(ids, rows, PADDING), rows)
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
    with pytest.raises(RuntimeError, match="embedding_grad_dense: order must be on the device of grad_rows"):
        dense(torch.zeros(3, 2, device=device), (made[0].cpu(), *made[1:]), 4)
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

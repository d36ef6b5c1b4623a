"""What a lookup's gradient becomes: a dense tensor, rows added to what is there, or rows alone."""

from __future__ import annotations

import threading
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import embedkernels as ek
from embedkernels.ops import table_grad

ROWS, WIDTH = 50, 6


@pytest.fixture(autouse=True)
def _warn_again() -> None:
    table_grad._warned.clear()


def table(grad_mode: Any, device: torch.device, **options: Any) -> ek.FusedEmbedding:
    torch.manual_seed(5)
    return ek.FusedEmbedding(ROWS, WIDTH, device=device, grad_mode=grad_mode, **options)


def some_ids(device: torch.device, *shape: int) -> Tensor:
    return torch.randint(0, ROWS, shape or (3, 8), generator=torch.Generator().manual_seed(2)).to(device)


def train(module: nn.Module, ids: Tensor, seed: int = 0) -> None:
    out = module(ids)
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(seed)).to(out))


@pytest.mark.parametrize("options", [{}, {"padding_idx": 3}, {"scale_grad_by_freq": True}])
@pytest.mark.parametrize("grad_mode", ["dense", "accumulate", "rows"])
def test_every_mode_has_the_gradient_of_the_stock_module(
    grad_mode: str, options: dict[str, Any], device: torch.device
) -> None:
    """Over two steps whose gradients add up, and a third after they were set to None."""
    ours, stock = table(grad_mode, device, **options), table("dense", device, **options)
    stock.__class__ = nn.Embedding
    for step in range(3):
        if step == 2:
            ours.zero_grad()
            stock.zero_grad()
        ids = some_ids(device, 4, 5 + step)
        train(ours, ids, step)
        train(stock, ids, step)
        assert ours.weight.grad is not None
        assert ours.weight.grad.is_sparse == (grad_mode == "rows")
        torch.testing.assert_close(ours.weight.grad.to_dense(), stock.weight.grad)


class NewTensors(TorchDispatchMode):
    """Counts the tensors of the table's shape that ops within the block make, views of their arguments aside."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **kwargs or {})
        given = {x.untyped_storage().data_ptr() for x in args if isinstance(x, Tensor) and not x.is_sparse}
        for made in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(made, Tensor) and sorted(made.shape) == sorted((ROWS, WIDTH)):
                self.tables += made.untyped_storage().data_ptr() not in given
        return out


@pytest.mark.parametrize("grad_mode", ["dense", "accumulate"])
def test_a_tied_head_shares_its_gradient(grad_mode: str, device: torch.device) -> None:
    """The lookup's share is added to the head's dense gradient, without a second tensor of that size."""
    module, head = table(grad_mode, device), nn.Linear(WIDTH, ROWS, bias=False, device=device)
    head.weight = module.weight
    ids = some_ids(device, 7)
    loss = head(module(ids)).square().sum()
    loss.backward()
    ours = module.weight.grad
    stock, twin = nn.Embedding(ROWS, WIDTH, device=device), nn.Linear(WIDTH, ROWS, bias=False, device=device)
    stock.weight = twin.weight = nn.Parameter(module.weight.detach().clone())
    twin(stock(ids)).square().sum().backward()
    torch.testing.assert_close(ours, stock.weight.grad)
    module.weight.grad = None
    loss = head(module(ids)).square().sum()
    with NewTensors() as made:
        loss.backward()
    # One is the head's. A dense share makes another, and autograd may make the sum of both.
    assert made.tables in ((1,) if grad_mode == "accumulate" else (2, 3))


def test_accumulate_makes_no_tensor_of_the_tables_size(device: torch.device) -> None:
    module = table("accumulate", device)
    module.weight.grad = torch.zeros_like(module.weight)
    buffer = module.weight.grad
    out = module(some_ids(device, 5))
    upstream = torch.randn_like(out)
    with NewTensors() as made:
        out.backward(upstream)
    assert made.tables == 0
    assert module.weight.grad is buffer
    assert bool(buffer.any())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_main_grad_takes_what_there_is(dtype: torch.dtype, device: torch.device) -> None:
    """An fp32 buffer beside a bfloat16 table, as Megatron keeps it."""
    module = table("accumulate", device, dtype=dtype)
    weight: Any = module.weight
    weight.main_grad = torch.ones(ROWS, WIDTH, device=device)
    weight.grad_added_to_main_grad = False
    ids = some_ids(device, 9)
    upstream = torch.randn(9, WIDTH, device=device).to(dtype)
    module(ids).backward(upstream)
    assert weight.grad is None
    assert weight.grad_added_to_main_grad
    expected = torch.ones(ROWS, WIDTH, device=device).index_add_(0, ids, upstream.float())
    torch.testing.assert_close(weight.main_grad, expected)


def test_gradients_that_autograd_asks_for_are_returned(device: torch.device) -> None:
    """torch.autograd.grad gets the table's gradient and leaves .grad alone."""
    module = table("accumulate", device)
    ids = some_ids(device)
    with pytest.warns(UserWarning, match=r"dense gradient: torch\.autograd\.grad asks for it"):
        (grad,) = torch.autograd.grad(module(ids).sum(), module.weight)
    counts = torch.bincount(ids.reshape(-1), minlength=ROWS).to(grad)
    torch.testing.assert_close(grad, counts[:, None].expand(ROWS, WIDTH))
    assert module.weight.grad is None


def test_a_hook_owns_the_gradient(device: torch.device) -> None:
    module = table("accumulate", device)
    seen: list[Tensor] = []
    module.weight.register_hook(seen.append)
    with pytest.warns(UserWarning, match="dense gradient: the table has gradient hooks"):
        train(module, some_ids(device))
    assert len(seen) == 1
    assert torch.equal(seen[0], module.weight.grad)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(module, some_ids(device))  # said once


def test_an_optimizer_in_the_backward_owns_the_gradient(device: torch.device) -> None:
    module = table("accumulate", device)
    steps: list[bool] = []
    module.weight.register_post_accumulate_grad_hook(lambda weight: steps.append(weight.grad is not None))
    with pytest.warns(UserWarning, match="dense gradient: the table has gradient hooks"):
        train(module, some_ids(device))
    assert steps == [True]


def test_a_process_group_owns_the_gradient(device: torch.device, tmp_path: Path) -> None:
    """Also one of a single process: DistributedDataParallel reads .grad in a hook that cannot be seen from Python."""
    module, stock = table("accumulate", device), table("dense", device)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        wrapped = torch.nn.parallel.DistributedDataParallel(module)
        with pytest.warns(UserWarning, match=r"dense gradient: torch\.distributed may reduce the gradient"):
            train(wrapped, some_ids(device))
    finally:
        torch.distributed.destroy_process_group()
    train(stock, some_ids(device))
    torch.testing.assert_close(module.weight.grad, stock.weight.grad)


@pytest.mark.parametrize("what", ["its own table", "another leaf", "twice"])
def test_a_gradient_that_others_hold_is_copied(what: str, device: torch.device) -> None:
    """Autograd may hand its memory to a leaf and add to it there, before the lookup's rows are added."""
    grads = []
    for mode in ("accumulate", "dense"):
        module, other = table(mode, device), table(mode, device)
        ids = torch.arange(ROWS, device=device).flip(0)
        if what == "its own table":
            out = module(ids) + module.weight.view(ROWS, WIDTH)
        elif what == "another leaf":
            out = module(ids) + other.weight.view(ROWS, WIDTH)
            out = out + other(ids) * 2
        else:
            out = module(ids) + module(ids.flip(0)) + other(ids)
        out.backward(torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(1)).to(device))
        grads.append((module.weight.grad, other.weight.grad))
    for one, two in zip(*grads, strict=True):
        torch.testing.assert_close(one, two)


def test_a_gradient_of_its_own_is_not_copied(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    judge = table_grad._is_ours_alone
    monkeypatch.setattr(table_grad, "_is_ours_alone", lambda grad: seen.append(judge(grad)) or seen[-1])
    module = table("accumulate", device)
    (module(some_ids(device)) * 2).square().sum().backward()
    assert seen == [True]
    out = module(some_ids(device))
    (out + out.sigmoid()).square().sum().backward()
    assert seen == [True, True]


@pytest.mark.parametrize("grad_mode", ["dense", "accumulate"])
def test_batched_gradients(grad_mode: str, device: torch.device) -> None:
    ids, batch = some_ids(device, 5), torch.randn(3, 5, WIDTH, device=device)
    grads = []
    for module in (table(grad_mode, device), nn.Embedding(ROWS, WIDTH, device=device)):
        grads.append(torch.autograd.grad(module(ids), module.weight, batch, is_grads_batched=True)[0])
    torch.testing.assert_close(grads[0], grads[1])


def test_threads_lose_no_addition(device: torch.device) -> None:
    module = table("accumulate", device)
    ids = torch.zeros(64, dtype=torch.int64, device=device)

    def work() -> None:
        for _ in range(25):
            module(ids).sum().backward()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert module.weight.grad is not None
    assert module.weight.grad[0].tolist() == [4 * 25 * 64.0] * WIDTH


@pytest.mark.parametrize("grad_mode", ["dense", "accumulate", "rows"])
def test_a_table_frozen_between_forward_and_backward_gets_none(grad_mode: str, device: torch.device) -> None:
    module = table(grad_mode, device)
    other = torch.ones(1, device=device, requires_grad=True)
    out = (module(some_ids(device)) * other).sum()
    module.weight.requires_grad_(False)
    out.backward()
    assert module.weight.grad is None
    assert other.grad is not None


def test_accumulate_after_rows(device: torch.device) -> None:
    """A sparse gradient that is there becomes dense, as stock makes it."""
    module, stock = table("rows", device), nn.Embedding(ROWS, WIDTH, device=device)
    train(module, some_ids(device))
    module.grad_mode = "accumulate"
    train(module, some_ids(device))
    train(stock, some_ids(device))
    train(stock, some_ids(device))
    torch.testing.assert_close(module.weight.grad, stock.weight.grad)


def test_a_main_grad_of_another_shape_is_refused(device: torch.device) -> None:
    module = table("accumulate", device)
    module.weight.main_grad = torch.zeros(5, WIDTH, device=device)  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"main_grad must have the table's shape, \(50, 6\), got \(5, 6\)"):
        train(module, some_ids(device))


def test_compiled_autograd_gets_a_dense_gradient(device: torch.device) -> None:
    torch.compiler.reset()
    module, stock = table("accumulate", device), nn.Embedding(ROWS, WIDTH, device=device)
    out = module(some_ids(device)).sum()
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):  # type: ignore[attr-defined]
        out.backward()
    stock(some_ids(device)).sum().backward()
    torch.testing.assert_close(module.weight.grad, stock.weight.grad)


def test_a_gradient_of_the_gradient_is_dense(device: torch.device) -> None:
    module = table("accumulate", device, dtype=torch.float64)
    ids = some_ids(device)
    with pytest.warns(UserWarning, match="dense gradient: the gradient is to be differentiated again"):
        (grad,) = torch.autograd.grad(module(ids).pow(3).sum(), module.weight, create_graph=True)
    again = torch.autograd.grad(grad.sum(), module.weight)[0]
    stock = nn.Embedding(ROWS, WIDTH, _weight=module.weight.detach().clone())
    (stock_grad,) = torch.autograd.grad(stock(ids).pow(3).sum(), stock.weight, create_graph=True)
    torch.testing.assert_close(again, torch.autograd.grad(stock_grad.sum(), stock.weight)[0])


def test_a_row_sparse_gradient_is_not_differentiable_again(device: torch.device) -> None:
    module = table("rows", device)
    with pytest.raises(NotImplementedError, match="not differentiable again; use a dense one"):
        torch.autograd.grad(module(some_ids(device)).pow(2).sum(), module.weight, create_graph=True)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("grad_mode", ["dense", "accumulate", "rows"])
def test_activation_checkpointing(grad_mode: str, reentrant: bool, device: torch.device) -> None:
    module, head = table(grad_mode, device), nn.Linear(WIDTH, ROWS, bias=False, device=device)
    if grad_mode != "rows":
        head.weight = module.weight
    ids = some_ids(device, 7)
    nudge = torch.zeros(
        1, device=device, requires_grad=True
    )  # reentrant checkpointing wants an input with a gradient

    def run(ids: Tensor, nudge: Tensor) -> Tensor:
        return module(ids) + nudge

    head(checkpoint(run, ids, nudge, use_reentrant=reentrant)).square().sum().backward()
    ours = module.weight.grad
    module.weight.grad = None
    module.grad_mode = "dense"
    head(module(ids)).square().sum().backward()
    assert ours is not None
    torch.testing.assert_close(ours.to_dense(), module.weight.grad)


@pytest.mark.parametrize("optimizer", [torch.optim.SparseAdam, torch.optim.SGD, torch.optim.Adagrad])
def test_rows_train_with_the_optimizers_that_take_them(optimizer: Any, device: torch.device) -> None:
    ours, stock = table("rows", device, padding_idx=0), table("rows", device, padding_idx=0)
    stock.__class__ = nn.Embedding
    assert stock.sparse
    trained = []
    for module in (ours, stock):
        step = optimizer(module.parameters(), lr=0.1)
        for seed in range(4):
            step.zero_grad()
            train(module, some_ids(device, 30), seed)
            step.step()
        trained.append(module.weight)
    torch.testing.assert_close(trained[0], trained[1])


def test_a_padded_gradient_names_rows_in_use_alone(device: torch.device) -> None:
    """What fills it up are zeros at a row that has a gradient: an optimizer touches no other."""
    ids, grad_rows = torch.tensor([9, 4, 9, 9, 4], device=device), torch.randn(5, 3, device=device)
    for kept, used in ((ids, {4, 9}), (torch.full_like(ids, 99), {0})):
        plan = ek.embedding_plan(kept, 20)
        found = ek.embedding_grad(grad_rows, plan, mode="rows")
        assert isinstance(found, ek.RowGradient)
        found.values[int(found.count) :] = 0
        padded = found.to_padded_sparse()
        assert set(padded._indices()[0].tolist()) == used
        torch.testing.assert_close(padded.to_dense(), found.to_sparse().to_dense())


def test_a_plan_is_used_again(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = some_ids(device)
    plan = ek.embedding_plan(ids, ROWS, padding_idx=1)
    for made in ("early_plan", "make_plan"):
        monkeypatch.setattr(table_grad, made, None)
    monkeypatch.setattr("embedkernels.ops.embedding_grad.make_plan", None)
    weight = torch.randn(ROWS, WIDTH, device=device, requires_grad=True)
    ek.embedding(ids, weight, padding_idx=1, plan=plan).sum().backward()
    expected = torch.bincount(ids.reshape(-1), minlength=ROWS).to(weight)
    expected[1] = 0
    torch.testing.assert_close(weight.grad, expected[:, None].expand(ROWS, WIDTH))


@pytest.mark.parametrize(
    ("plan_of", "text"),
    [
        ((5, ROWS), "plan is of 5 ids and 50 rows, ids has 24 elements and weight 50 rows"),
        ((24, ROWS - 1), "plan is of 24 ids and 49 rows"),
    ],
)
def test_a_plan_of_something_else_is_refused(plan_of: tuple[int, int], text: str, device: torch.device) -> None:
    plan = ek.embedding_plan(torch.zeros(plan_of[0], dtype=torch.int64, device=device), plan_of[1])
    with pytest.raises(ValueError, match=text):
        ek.embedding(some_ids(device), torch.randn(ROWS, WIDTH, device=device), plan=plan)


@pytest.mark.parametrize("grad_mode", ["dense", "accumulate"])
def test_compiled_the_gradient_is_dense(grad_mode: str, device: torch.device) -> None:
    torch.compiler.reset()
    module = table(grad_mode, device)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    ids = some_ids(device)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        train(compiled, ids)
    assert any("torch.compile" in str(warning.message) for warning in said) == (grad_mode == "accumulate")
    ours = module.weight.grad
    module.weight.grad, module.grad_mode = None, "dense"
    train(module, ids)
    torch.testing.assert_close(ours, module.weight.grad)


def test_grad_mode_and_sparse_are_one_thing() -> None:
    assert ek.FusedEmbedding(4, 2, sparse=True).grad_mode == "rows"
    module = ek.FusedEmbedding(4, 2, grad_mode="rows")
    assert module.sparse
    module.grad_mode = "accumulate"
    assert not module.sparse
    assert repr(module) == "FusedEmbedding(4, 2, grad_mode=accumulate)"
    with pytest.raises(ValueError, match="sparse=True has gradients of rows, got grad_mode 'dense'"):
        ek.FusedEmbedding(4, 2, sparse=True, grad_mode="dense")
    with pytest.raises(ValueError, match="grad_mode must be dense, accumulate or rows, got 'sum'"):
        ek.FusedEmbedding(4, 2, grad_mode="sum")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="grad_mode must be dense, accumulate or rows, got 'sum'"):
        ek.embedding(torch.tensor([0]), torch.zeros(1, 1), grad_mode="sum")  # type: ignore[arg-type]


@pytest.mark.gpu
def test_a_plan_made_beside_the_forward_is_waited_for() -> None:
    """A backward at once, and graphs that are dropped without one, whose ids are written over."""
    weight = torch.randn(30_000, 64, device="cuda", requires_grad=True)
    for dropped in [True, False] * 10:
        ids = torch.randint(0, 30_000, (65_536,), device="cuda")
        expected = torch.bincount(ids, minlength=30_000).float()
        out = ek.embedding(ids, weight)
        if dropped:
            del ids, out  # the second stream may still read them
            torch.full((65_536,), 2**40, device="cuda")  # takes their memory, if it can be had
            continue
        weight.grad = None
        out.backward(torch.ones_like(out))
        assert weight.grad is not None
        torch.testing.assert_close(weight.grad[:, 0], expected)
    torch.cuda.synchronize()


@pytest.mark.gpu
@pytest.mark.parametrize("grad_mode", ["dense", "accumulate", "rows"])
def test_large_lookups_wait_for_nothing_and_can_be_captured(grad_mode: Any) -> None:
    """Beyond one launch of the plan: forward and backward together, and a backward whose forward was not captured."""
    ids = torch.randint(0, 5000, (20_000,), device="cuda")
    weight = torch.randn(5000, 64, device="cuda", requires_grad=True)
    upstream = torch.randn(20_000, 64, device="cuda")

    def step() -> None:
        ek.embedding(ids, weight, grad_mode=grad_mode).backward(upstream)

    weight.grad = None if grad_mode == "rows" else torch.zeros_like(weight)
    step()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode(before)
    if grad_mode == "rows":
        return
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    assert weight.grad is not None
    weight.grad.zero_()
    ids.random_(0, 5000)
    graph.replay()
    expected = torch.zeros(5000, 64, device="cuda").index_add_(0, ids, upstream)
    torch.testing.assert_close(weight.grad, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
def test_streams_do_not_change_a_bit() -> None:
    ids, weight = torch.randint(0, 900, (20_000,), device="cuda"), torch.randn(900, 64, device="cuda")
    upstream = torch.randn(20_000, 64, device="cuda").bfloat16()
    grads = []
    for stream in (torch.cuda.current_stream(), torch.cuda.Stream(), torch.cuda.Stream()):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            leaf = weight.bfloat16().requires_grad_()
            ek.embedding(ids, leaf).backward(upstream)
            grads.append(leaf.grad)
        torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(grads[0], grads[1])
    assert torch.equal(grads[0], grads[2])

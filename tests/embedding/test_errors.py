"""The record of a bad id: it outlives modes and threads, names its op, and every op raises it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

import embedkernels as ek
from embedkernels.ops import ids as id_errors
from embedkernels.ops.embedding_grad import EmbeddingPlan

pytest.importorskip("triton")


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process that has not run an op yet."""
    monkeypatch.setattr(id_errors, "_states", {})


def lookup(value: int, device: torch.device) -> torch.Tensor:
    weight = torch.zeros(10, 4, device=device)
    return ek.embedding(torch.tensor([value], device=device), weight, backend="triton")


@pytest.mark.parametrize("op", ["embedding", "embed"])
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_a_first_call_in_inference_mode_breaks_nothing(mode: Any, op: str, device: torch.device) -> None:
    weight = torch.zeros(10, 4, device=device)
    with mode():
        if op == "embedding":
            lookup(1, device)
        else:
            ek.embed(torch.tensor([1], device=device), weight, backend="triton")
    for value in (44, 45):  # raised, and then reset
        lookup(value, device)
        with pytest.raises(IndexError, match=f"token id {value} at position 0"):
            ek.check_errors()
    ek.check_errors()


def test_an_error_raised_in_inference_mode_is_reset_for_all(device: torch.device) -> None:
    lookup(44, device)
    with torch.inference_mode(), pytest.raises(IndexError, match="token id 44"):
        ek.check_errors()
    ek.check_errors()
    with torch.inference_mode():
        lookup(45, device)
    with pytest.raises(IndexError, match="token id 45"):
        ek.check_errors()


def test_first_calls_of_many_threads_share_one_record(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a kernel could write to a record that no one reads any more."""
    start, made, got = threading.Barrier(8), [], []
    stock = torch.zeros

    def slow(*args: Any, **kwargs: Any) -> torch.Tensor:
        made.append(args)
        threading.Event().wait(0.01)
        return stock(*args, **kwargs)

    def first_call() -> None:
        start.wait()
        got.append(id_errors.error_state(device))

    monkeypatch.setattr(torch, "zeros", slow)
    threads = [threading.Thread(target=first_call) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 8
    assert len({id(state) for state in got}) == 1
    assert len(made) == 2


def test_an_error_is_raised_by_one_of_several_threads(device: torch.device) -> None:
    lookup(44, device)
    raised = []
    start = threading.Barrier(4)

    def check() -> None:
        start.wait()
        try:
            ek.check_errors()
        except IndexError as error:
            raised.append(str(error))

    threads = [threading.Thread(target=check) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(raised) == 1


def test_the_record_is_real_where_tensors_are_fake(device: torch.device) -> None:
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    with FakeTensorMode():
        state = id_errors.error_state(device)
    assert not isinstance(state.flag, FakeTensor)
    lookup(44, device)
    with FakeTensorMode(), pytest.raises(IndexError, match="token id 44"):
        id_errors.raise_pending(device)


@pytest.mark.parametrize("default", ["meta", "cpu"])
def test_the_record_is_host_memory_whatever_the_default_device(default: str, device: torch.device) -> None:
    with torch.device(default):
        state = id_errors.error_state(device)
    assert state.record.device.type == "cpu"
    assert not state.pending
    lookup(44, device)
    with pytest.raises(IndexError, match="token id 44"):
        ek.check_errors()


def test_a_fake_device_that_is_not_there_gets_no_record(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    made: list[torch.device] = []
    monkeypatch.setattr(id_errors, "error_state", made.append)
    for index in (0, 1):
        id_errors.begin(torch.device("cuda", index))
    assert made == [torch.device("cuda", 0)]


def test_ops_without_ids_need_no_record(monkeypatch: pytest.MonkeyPatch) -> None:
    """They may be the first call of a process, inside the capture of a CUDA graph."""
    monkeypatch.setattr(id_errors, "_prepare", lambda device: pytest.fail(f"made a record on {device}"))
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), torch.device("cuda"):
        x = torch.empty(1, 1, 2, 16)
        assert ek.attention(x, x, x).device.type == "cuda"
        ids = torch.empty(3, dtype=torch.int32)
        assert ek.embedding_plan(ids, 5, backend="torch").order.device.type == "cuda"
        plan = EmbeddingPlan(ids, ids, torch.empty(4, dtype=torch.int32), torch.empty(1, dtype=torch.int32), 5)
        assert ek.embedding_grad(torch.empty(3, 2), plan).shape == (5, 2)


def test_a_first_call_inside_a_capture_is_refused_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(id_errors, "capturing", lambda _: True)
    with pytest.raises(RuntimeError, match="run the op once before the capture"):
        id_errors.error_state(torch.device("cpu"))


def test_during_a_capture_an_error_is_kept(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    lookup(44, device)
    if device.type == "cuda":
        torch.cuda.synchronize()
    with monkeypatch.context() as patched:
        patched.setattr(id_errors, "capturing", lambda _: True)
        id_errors.raise_pending(device)
    with pytest.raises(IndexError, match="token id 44"):
        ek.check_errors()


NAMED: dict[str, Callable[[torch.Tensor, torch.device], Any]] = {
    "embedding": lambda ids, device: ek.embedding(ids, torch.zeros(10, 4, device=device)),
    "FusedEmbedding": lambda ids, device: ek.FusedEmbedding(10, 4, device=device)(ids),
    "embed": lambda ids, device: ek.embed(ids, torch.zeros(10, 4, device=device)),
    "FusedInputEmbeddings": lambda ids, device: ek.FusedInputEmbeddings(10, 4, device=device)(ids),
}


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("name", NAMED)
def test_the_op_that_met_the_id_is_named(name: str, backend: Any, device: torch.device) -> None:
    prefix = "embed: " if name in ("embed", "FusedInputEmbeddings") else "embedding: "
    with ek.use_backend(backend), pytest.raises(IndexError, match=f"^{prefix}token id 10 at position 1"):  # noqa: PT012
        NAMED[name](torch.tensor([3, 10], device=device), device)
        ek.check_errors()


def plan(device: torch.device) -> EmbeddingPlan:
    return ek.embedding_plan(torch.zeros(2, dtype=torch.int64, device=device), 3)


def qkv(device: torch.device) -> tuple[torch.Tensor, ...]:
    return tuple(torch.zeros(1, 1, 4, 16, device=device) for _ in range(3))


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("op", ["embedding", "embed", "embedding_plan", "embedding_grad", "attention", "with mask"])
def test_the_next_call_of_any_op_raises(op: str, backend: Any, device: torch.device) -> None:
    """Whatever backend it takes."""
    made = plan(device)
    call: dict[str, Callable[[], Any]] = {
        "embedding": lambda: ek.embedding(torch.tensor([1], device=device), torch.zeros(10, 4, device=device)),
        "embed": lambda: ek.embed(torch.tensor([1], device=device), torch.zeros(10, 4, device=device)),
        "embedding_plan": lambda: plan(device),
        "embedding_grad": lambda: ek.embedding_grad(torch.zeros(2, 4, device=device), made),
        "attention": lambda: ek.attention(*qkv(device)),
        "with mask": lambda: ek.attention(*qkv(device), torch.ones(4, 4, dtype=torch.bool, device=device)),
    }
    lookup(44, device)
    if device.type == "cuda":
        torch.cuda.synchronize()
    with ek.use_backend(backend):
        with pytest.raises(IndexError, match=r"^embedding: token id 44"):
            call[op]()
        call[op]()


@pytest.mark.parametrize("op", ["embedding", "embed", "embedding_grad", "attention"])
def test_the_next_call_raises_when_compiled(op: str, device: torch.device) -> None:
    made = plan(device)
    ids, weight = torch.tensor([1], device=device), torch.zeros(10, 4, device=device)
    rows = torch.zeros(2, 4, device=device)
    call: dict[str, Callable[[], Any]] = {
        "embedding": lambda: ek.embedding(ids, weight, backend="triton") + 1,
        "embed": lambda: ek.embed(ids, weight, backend="triton") + 1,
        "embedding_grad": lambda: ek.embedding_grad(rows, made) + 1,
        "attention": lambda: ek.attention(*leaves, backend="triton") + 1,
    }
    leaves = qkv(device)
    torch.compiler.reset()
    compiled = torch.compile(call[op], fullgraph=True, backend="aot_eager")
    compiled()
    lookup(44, device)
    if device.type == "cuda":
        torch.cuda.synchronize()
    with pytest.raises(IndexError, match="token id 44"):
        compiled()
    compiled()

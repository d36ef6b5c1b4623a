"""What something has wrapped since it was patched is described as it is, and computes as stock after unpatch."""

import copy
import socket
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import embedkernels as ek
from embedkernels.hf import describe, fused
from tests.hf.models import build, ids, padded, pair


class Halved(nn.Module):
    def forward(self, weight):
        return weight / 2


@pytest.fixture
def fused_calls(monkeypatch):
    """The ops that fused forwards called."""
    calls = []

    def spy(owner, name):
        stock = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, **kwargs: (calls.append(name), stock(*args, **kwargs))[1])

    spy(fused, "embed")
    spy(fused, "embedding")
    return calls


@pytest.fixture
def mesh():
    """One process that calls itself a group, as FSDP2 wants."""
    from torch.distributed.device_mesh import init_device_mesh

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def test_a_class_that_fsdp2_swapped_is_described_and_unpatched(mesh, fused_calls):
    from torch.distributed.fsdp import fully_shard

    stock, patched = pair("bert")
    before = type(patched.embeddings)
    fully_shard(patched.embeddings, mesh=mesh)
    assert type(patched.embeddings) is not before
    inputs = padded()
    assert torch.equal(patched(**inputs).last_hidden_state, stock(**inputs).last_hidden_state)
    assert fused_calls == ["embed"]
    entry = describe(patched).entries[0]
    assert (entry.path, entry.was) == ("embeddings", "BertEmbeddings")
    assert entry.status in ("already", "falls back")
    with pytest.warns(UserWarning, match=r"embeddings \(FSDPBertEmbeddings\).* stock forward runs"):
        ek.unpatch(patched)
    assert not describe(patched).active
    fused_calls.clear()
    assert torch.equal(patched(**inputs).last_hidden_state, stock(**inputs).last_hidden_state)
    assert fused_calls == []
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        ek.unpatch(patched)


@pytest.mark.parametrize(("name", "path"), [("llama", "embed_tokens"), ("bert", "embeddings.word_embeddings")])
def test_a_parametrised_table_is_described_and_unpatched(name, path, fused_calls):
    stock, patched = pair(name)
    for model in (stock, patched):
        parametrize.register_parametrization(model.get_submodule(path), "weight", Halved())
    inputs = padded()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert torch.equal(patched(**inputs).last_hidden_state, stock(**inputs).last_hidden_state)
    assert bool(fused_calls) == (name == "llama")
    entry = describe(patched).entries[0]
    assert entry.status == ("already" if name == "llama" else "falls back")
    if name == "llama":
        with pytest.warns(UserWarning, match=r"embed_tokens \(ParametrizedEmbedding\)"):
            ek.unpatch(patched)
    else:
        ek.unpatch(patched)
    assert not describe(patched).active
    fused_calls.clear()
    assert torch.equal(patched(**inputs).last_hidden_state, stock(**inputs).last_hidden_state)
    assert fused_calls == []
    assert ek.patch(patched).entries[0].status == ("left alone" if name == "llama" else "falls back")
    ek.unpatch(patched)
    for model in (stock, patched):
        parametrize.remove_parametrizations(model.get_submodule(path), "weight")
    ek.unpatch(patched)
    assert [type(m) for m in patched.modules()] == [type(m) for m in stock.modules()]


def test_a_copy_of_a_parametrised_table_is_patched_like_it(fused_calls):
    _, patched = pair("llama")
    parametrize.register_parametrization(patched.embed_tokens, "weight", Halved())
    made = copy.deepcopy(patched)
    assert type(made.embed_tokens).__name__ == "ParametrizedEmbedding"
    made(ids())
    assert fused_calls == ["embedding"]


@pytest.fixture
def accelerate_state():
    """Accelerate sets its precision once in a process; a Trainer in another test may have done so."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("accelerate_state")
def test_a_forward_that_accelerate_wrapped_is_stock_after_unpatch(fused_calls):
    """Accelerate keeps the forward it found, the fused one, in the instance."""
    from accelerate import Accelerator

    stock, patched = pair("gpt2")
    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    stock, patched = accelerator.prepare(stock), accelerator.prepare(patched)
    assert "forward" in patched.__dict__
    inputs = padded()
    assert torch.equal(patched(**inputs).last_hidden_state, stock(**inputs).last_hidden_state)
    assert fused_calls == ["embed"]
    assert describe(patched).entries[0].status == "already"
    ek.unpatch(patched)
    fused_calls.clear()
    assert torch.equal(patched(**inputs).last_hidden_state, stock(**inputs).last_hidden_state)
    assert fused_calls == []
    assert type(patched) is type(stock)
    assert not describe(patched).active


def test_a_class_derived_from_a_fused_one_is_not_fused_by_itself(fused_calls):
    model = build("bert")
    ek.patch(model)

    class Own(type(model.embeddings)):
        pass

    own = Own(model.config)
    own(ids())
    assert fused_calls == []
    assert type(own) is Own
    assert not describe(own).active


def test_data_parallel_replicas_run_fused(fused_calls):
    _, patched = pair("bert")
    replica = patched.embeddings._replicate_for_data_parallel()
    replica(ids())
    assert fused_calls == ["embed"]

"""Stock modules take the ids that a call leaves out from buffers, which a user can change."""

import copy
import pickle

import pytest
import torch

import embedkernels as ek
from embedkernels.hf import state
from tests.hf.models import MODELS, POSITIONS, TYPED, build, ids, pair

STEMS = [name for name in MODELS if name not in ("gpt2", "llama")]


def types_of_one(embeddings):
    embeddings.token_type_ids.fill_(1)


def another_types_buffer(embeddings):
    embeddings.token_type_ids = torch.arange(POSITIONS).remainder(2)[None]


def types_that_are_no_buffer(embeddings):
    del embeddings.token_type_ids
    embeddings.token_type_ids = torch.ones(1, POSITIONS, dtype=torch.long)


def positions_backwards(embeddings):
    embeddings.position_ids.copy_(torch.arange(POSITIONS).flip(0)[None])


def another_positions_buffer(embeddings):
    embeddings.position_ids = torch.arange(POSITIONS).flip(0)[None].contiguous()


CHANGES = [
    types_of_one,
    another_types_buffer,
    types_that_are_no_buffer,
    positions_backwards,
    another_positions_buffer,
]


def same(stock, patched):
    inputs = ids(2, 6)
    return torch.equal(patched(inputs).last_hidden_state, stock(inputs).last_hidden_state)


def _applies(name, change):
    return name in TYPED or change in (positions_backwards, another_positions_buffer)


CASES = [(name, change) for name in STEMS for change in CHANGES if _applies(name, change)]


@pytest.mark.parametrize(("name", "change"), CASES)
def test_a_buffer_changed_after_patching_is_used(name, change):
    stock, patched = pair(name)
    assert same(stock, patched)
    for model in (stock, patched):
        change(model.embeddings)
    with pytest.warns(UserWarning, match=r"stock forward: the buffer (token_type|position)_ids was changed"):
        assert same(stock, patched)
    assert same(stock, patched)
    assert ek.patch(patched).entries[0].status == "falls back"


@pytest.mark.parametrize(("name", "change"), CASES)
@pytest.mark.parametrize("how", ["patch", "deepcopy", "pickle"])
def test_a_buffer_changed_before_is_used(name, change, how):
    stock = build(name)
    change(stock.embeddings)
    patched = copy.deepcopy(stock)
    ek.patch(patched)
    patched = {"patch": lambda x: x, "deepcopy": copy.deepcopy, "pickle": lambda x: pickle.loads(pickle.dumps(x))}[
        how
    ](patched)
    with pytest.warns(UserWarning, match="was changed"):
        assert same(stock, patched)


def test_a_buffer_changed_back_lets_the_module_run_fused_again():
    stock, patched = pair("bert")
    patched.embeddings.token_type_ids.fill_(1)
    assert ek.patch(patched).entries[0].status == "falls back"
    patched.embeddings.token_type_ids.zero_()
    assert ek.patch(patched).entries[0].status == "already"
    assert same(stock, patched)


@pytest.mark.filterwarnings("ignore:embedkernels:UserWarning")
def test_a_position_buffer_shorter_than_the_table_fails_as_in_stock():
    stock, patched = pair("bert")
    for model in (stock, patched):
        model.embeddings.position_ids = model.embeddings.position_ids[:, :4]
    messages = []
    for model in (stock, patched):
        with pytest.raises(RuntimeError) as raised:
            model(ids(2, 6))
        messages.append(str(raised.value))
    assert messages[0] == messages[1]


def test_buffers_are_read_once_and_when_they_changed(monkeypatch):
    """Reading one waits for a GPU."""
    looked, stock_check = [], state._holds_default

    def holds_default(name, buffer):
        looked.append(name)
        return stock_check(name, buffer)

    monkeypatch.setattr(state, "_holds_default", holds_default)
    _, patched = pair("bert")
    patched(ids())
    looked.clear()
    for _ in range(3):
        patched(ids())
    patched.train().eval()
    patched.load_state_dict(patched.state_dict())
    patched.half().float()
    patched(ids())
    assert looked == []
    patched.embeddings.token_type_ids.zero_()
    patched(ids())
    patched(ids())
    assert looked == ["token_type_ids"]


@pytest.mark.parametrize("change", [types_of_one, positions_backwards])
def test_a_compiled_model_uses_the_buffers_it_was_traced_with(change):
    stock, patched = pair("bert")
    for model in (stock, patched):
        change(model.embeddings)
    inputs = ids(2, 6)
    compiled = torch.compile(patched, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(inputs).last_hidden_state, stock(inputs).last_hidden_state)
    torch.compiler.reset()


def test_models_made_under_inference_mode_run():
    """Their buffers have no version."""
    with torch.inference_mode():
        stock, patched = pair("bert")
        assert same(stock, patched)
        for model in (stock, patched):
            model.embeddings.token_type_ids = torch.ones(1, POSITIONS, dtype=torch.long)
        with pytest.warns(UserWarning, match="was changed"):
            assert same(stock, patched)


def test_a_model_on_the_meta_device_is_patched():
    with torch.device("meta"):
        model = build("bert")
    assert {entry.status for entry in ek.patch(model).entries} == {"patched"}
    assert model(torch.zeros(2, 4, dtype=torch.long, device="meta")).last_hidden_state.shape == (2, 4, 32)

"""Stock modules take the ids that a call leaves out from buffers, which a user can change."""

import copy
import pickle
import warnings

import pytest
import torch

import embedkernels as ek
from embedkernels.hf import fused, state
from tests.hf.models import DECODERS, MODELS, POSITIONS, TYPED, build, ids, named_here, pair

STEMS = [name for name in MODELS if name not in (*DECODERS, "modernbert")]


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
    looked, stock_read = [], state._read_first

    def read_first(name, buffer):
        looked.append(name)
        return stock_read(name, buffer)

    monkeypatch.setattr(state, "_read_first", read_first)
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


def shorten(model, length, names=("position_ids", "token_type_ids")):
    for name in names:
        if hasattr(model.embeddings, name):
            setattr(model.embeddings, name, getattr(model.embeddings, name)[:, :length].clone())


def outcome(call):
    """The output of a call, or its error."""
    try:
        return call().last_hidden_state
    except (RuntimeError, IndexError) as error:
        return f"{type(error).__name__}: {error}"


def same_outcome(left, right):
    return torch.equal(left, right) if isinstance(left, torch.Tensor) else left == right


@pytest.fixture
def fused_calls(monkeypatch):
    """How many fused forwards ran."""
    calls = []
    stock = fused.embed
    monkeypatch.setattr(fused, "embed", lambda *args, **kwargs: (calls.append(1), stock(*args, **kwargs))[1])
    return calls


@pytest.mark.parametrize("name", STEMS)
def test_calls_within_a_shortened_buffer_run_fused(name, fused_calls):
    """A user may cut the buffers to the length that he trains with."""
    stock, patched = pair(name)
    for model in (stock, patched):
        shorten(model, 20)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for length in (1, 18):  # RoBERTa's positions start at two
            inputs = ids(2, length)
            assert torch.equal(patched(inputs).last_hidden_state, stock(inputs).last_hidden_state)
    assert len(fused_calls) == 2
    assert ek.patch(patched).entries[0].status == "already"


@pytest.mark.filterwarnings("ignore:embedkernels:UserWarning")
@pytest.mark.parametrize("name", STEMS)
@pytest.mark.parametrize("short", ["position_ids", "token_type_ids"])
@pytest.mark.parametrize("length", [1, 8])
@pytest.mark.parametrize("given", ["nothing", "position_ids", "token_type_ids", "both"])
def test_calls_beyond_a_shortened_buffer_do_what_stock_does(name, short, length, given):
    stock, patched = pair(name)
    for model in (stock, patched):
        shorten(model, length, [short])
    inputs = {"input_ids": ids(2, 9)}
    if given in ("position_ids", "both"):
        inputs["position_ids"] = torch.arange(9)[None] + 5
    if given in ("token_type_ids", "both") and name in TYPED:
        inputs["token_type_ids"] = torch.ones(2, 9, dtype=torch.long)
    assert same_outcome(outcome(lambda: patched(**inputs)), outcome(lambda: stock(**inputs)))


def test_a_call_beyond_a_shortened_buffer_says_so():
    _, patched = pair("bert")
    shorten(patched, 4)
    with pytest.warns(UserWarning, match="the buffer position_ids holds 4 ids, the call reads 6"):
        outcome(lambda: patched(ids(2, 6)))
    _, patched = pair("bert")
    shorten(patched, 4)
    with pytest.warns(UserWarning, match="buffer token_type_ids holds 4 ids, the call reads those at its positions"):
        patched(ids(2, 3), position_ids=torch.arange(3)[None])


@pytest.mark.filterwarnings("ignore:embedkernels:UserWarning")
@pytest.mark.parametrize("past", [3, 4, torch.tensor(3), torch.tensor(4)], ids=str)
def test_a_past_beyond_a_shortened_buffer_does_what_stock_does(past):
    stock, patched = (model.embeddings for model in pair("bert"))
    for part in (stock, patched):
        part.position_ids = part.position_ids[:, :8]
    results = []
    for part in (stock, patched):
        try:
            length = {named_here("past_key_values_length", part.forward): past}
            results.append(part(ids(2, 5).fill_(7), **length).tolist())
        except RuntimeError as error:
            results.append(str(error))
    assert results[0] == results[1]


def test_a_buffer_that_cannot_be_read_during_a_capture_is_not_trusted(monkeypatch, fused_calls):
    stock, patched = pair("bert")
    inputs = ids()
    patched(inputs)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    fused_calls.clear()
    patched(inputs)
    assert len(fused_calls) == 1
    monkeypatch.setattr(state, "_read_first", None)
    patched.embeddings.token_type_ids = patched.embeddings.token_type_ids.clone()
    with pytest.warns(UserWarning, match="token_type_ids cannot be read while a CUDA graph is captured"):
        assert torch.equal(patched(inputs).last_hidden_state, stock(inputs).last_hidden_state)
    assert len(fused_calls) == 1


def test_what_replicas_see_is_not_noted_for_the_module():
    """nn.DataParallel runs them in threads, each with buffers of its own, on the state of one module."""
    _, patched = pair("bert")
    patched(ids())
    noted = patched.embeddings.__dict__[state.MARK].ids
    before = dict(noted)
    replica = patched.embeddings._replicate_for_data_parallel()
    replica._buffers["token_type_ids"] = torch.ones_like(replica.token_type_ids)
    with pytest.warns(UserWarning, match="was changed"):
        replica(ids())
    assert noted.keys() == before.keys()
    assert all(noted[name] is before[name] for name in before)


def test_an_argument_that_stock_does_not_take_is_refused_as_in_stock():
    stock, patched = (model.embeddings for model in pair("distilbert"))
    messages = []
    for part in (stock, patched):
        with pytest.raises(TypeError) as raised:
            part(ids(), token_type_ids=torch.zeros_like(ids()))
        messages.append(str(raised.value))
    assert messages[0] == messages[1]

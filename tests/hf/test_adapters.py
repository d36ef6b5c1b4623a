"""A patched model computes what the stock model computes, outputs and gradients, for every family."""

import copy
import threading
import warnings

import pytest
import torch
import transformers
from torch import nn

import embedkernels as ek
from embedkernels.hf import fused, state
from embedkernels.hf.adapters import ADAPTERS, MODEL_TYPES
from tests.contract import assert_within_contract
from tests.hf.models import (
    ALL,
    DECODERS,
    FUSED,
    MODELS,
    POSITIONS,
    ROTARY,
    TURNED,
    TYPED,
    VOCAB,
    build,
    ids,
    named_here,
    on,
    padded,
    pair,
)

BY_NAME = pytest.mark.parametrize("name", MODELS)


def run(model, seed=1, **inputs):
    """The last hidden state, and the gradient of every parameter for a random upstream gradient."""
    torch.manual_seed(seed)
    output = model(**inputs).last_hidden_state
    torch.manual_seed(2)
    model.zero_grad()
    output.backward(torch.randn(output.shape, dtype=torch.float32).to(output))
    return output.detach(), {k: p.grad for k, p in model.named_parameters() if p.grad is not None}


def test_every_family_has_a_model_here():
    assert set(ALL) == MODEL_TYPES


@BY_NAME
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_is_bit_equal_on_the_cpu_and_gradients_keep_the_contract(name, dtype):
    stock, patched = pair(name, dtype=dtype, layers=2)
    inputs = padded()
    # Ids that occur often: their gradient rows are long sums.
    inputs["input_ids"][:, :2] = 5
    expected_output, theirs = run(stock, **inputs)
    output, ours = run(patched, **inputs)
    assert torch.equal(output, expected_output)
    _, exact = run(copy.deepcopy(stock).double(), **inputs)
    assert ours.keys() == theirs.keys() == exact.keys()
    for key in ours:
        assert_within_contract(ours[key], theirs[key], exact[key], key)


@BY_NAME
def test_dropout_draws_the_same_numbers_on_the_cpu(name):
    stock, patched = pair(name, dropout=0.3)
    inputs = padded()
    expected_output, theirs = run(stock, **inputs)
    output, ours = run(patched, **inputs)
    assert torch.equal(output, expected_output)
    for key in theirs:
        torch.testing.assert_close(ours[key], theirs[key])
    if name not in ROTARY:  # attention dropout alone does not change every row
        assert not torch.equal(run(patched, seed=3, **inputs)[0], output)
    assert torch.equal(run(patched.eval(), **inputs)[0], run(stock.eval(), **inputs)[0])


@BY_NAME
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_eval_without_gradients_is_bit_equal(name, dtype):
    stock, patched = pair(name, dropout=0.5, dtype=dtype)
    inputs = padded(side="left")
    with torch.no_grad():
        expected = stock.eval()(**inputs).last_hidden_state
        assert torch.equal(patched.eval()(**inputs).last_hidden_state, expected)


def _calls(name):
    """Inputs beyond ids and mask, by what they exercise."""
    input_ids = ids()
    batch, length = input_ids.shape
    positions = torch.randint(2, POSITIONS, (batch, length))
    calls = {
        "ids alone": {"input_ids": input_ids},
        "int32 ids": {"input_ids": input_ids.int()},
        "padding on the left": padded(side="left"),
        "padding on the right": padded(side="right"),
        "only padding": {"input_ids": torch.full((2, 5), 1), "attention_mask": torch.zeros(2, 5, dtype=torch.long)},
        "one token": {"input_ids": ids(2, 1)},
        "positions of every row": {"input_ids": input_ids, "position_ids": positions},
        "positions of one row": {"input_ids": input_ids, "position_ids": positions[:1]},
        "embeddings": {"inputs_embeds": torch.randn(batch, length, 32)},
        "4-D mask": {
            "input_ids": input_ids,
            "attention_mask": torch.rand(batch, 1, length, length).gt(0.4) | torch.eye(length, dtype=torch.bool),
        },
    }
    if name in (*TYPED, "gpt2"):
        types = torch.randint(0, 2, (batch, length))
        calls["types"] = {"input_ids": input_ids, "token_type_ids": types}
        calls["types and positions"] = {"input_ids": input_ids, "token_type_ids": types, "position_ids": positions}
        calls["types and embeddings"] = {"inputs_embeds": torch.randn(batch, length, 32), "token_type_ids": types}
    return calls


@BY_NAME
def test_every_kind_of_call_equals_stock(name):
    stock, patched = pair(name)
    for what, inputs in _calls(name).items():
        expected, theirs = run(stock, **inputs)
        output, ours = run(patched, **inputs)
        assert torch.equal(output, expected), what
        assert ours.keys() == theirs.keys(), what
        for key in theirs:
            torch.testing.assert_close(ours[key], theirs[key], msg=lambda text, w=what, k=key: f"{w}, {k}: {text}")


@BY_NAME
def test_an_empty_batch_is_embedded_and_then_fails_as_in_stock(name):
    """transformers reshapes with -1, which no model survives on an empty batch; its embeddings do."""
    stock, patched = pair(name)
    empty = torch.zeros(0, 4, dtype=torch.long)
    if FUSED[name]:
        assert patched.get_submodule(FUSED[name])(empty).shape == (0, 4, 32)
    messages = []
    for model in (stock, patched):
        with pytest.raises(RuntimeError) as raised:
            model(empty)
        messages.append(str(raised.value))
    assert messages[0] == messages[1]


@BY_NAME
def test_arguments_by_position_equal_stock(name):
    stock, patched = pair(name)
    if name == "distilbert":
        args = (ids(), None)
    else:
        args = (ids(), None if name in DECODERS else torch.ones(3, 7, dtype=torch.long))
    assert torch.equal(patched(*args).last_hidden_state, stock(*args).last_hidden_state)


@pytest.mark.parametrize("name", TYPED)
def test_embeddings_alone_with_a_past_and_by_position(name):
    stock, patched = pair(name)
    input_ids, types = padded()["input_ids"], torch.randint(0, 2, (3, 7))
    past = named_here("past_key_values_length", stock.embeddings.forward)
    for args, kwargs in (
        ((input_ids,), {past: 5}),
        ((input_ids, types), {}),
        ((input_ids, types[:1]), {}),
        ((input_ids, types, None, None, 4), {}),
        ((), {"input_ids": input_ids, past: torch.tensor(3)}),
    ):
        assert torch.equal(patched.embeddings(*args, **kwargs), stock.embeddings(*args, **kwargs))


@BY_NAME
def test_kernels_are_close_in_fp32(name, device):
    stock, patched = pair(name, device)
    for side in ("left", "right"):
        inputs = on(device, padded(2, 6, side))
        expected, theirs = run(stock, **inputs)
        with ek.use_backend("triton"):
            output, ours = run(patched, **inputs)
        # What stands at padding is nobody's business, but no NaN may come of it.
        kept = inputs["attention_mask"].bool()
        torch.testing.assert_close(output[kept], expected[kept], rtol=1e-5, atol=1e-5)
        assert torch.isfinite(output).all()
        if side == "right" and name in DECODERS:
            for key in theirs:
                torch.testing.assert_close(ours[key], theirs[key], rtol=1e-4, atol=1e-5)
        assert all(torch.isfinite(gradient).all() for gradient in ours.values())


@BY_NAME
def test_gradients_of_the_kernels_are_close_in_fp32(name, device):
    stock, patched = pair(name, device)
    inputs = on(device, {"input_ids": ids(2, 5)})
    inputs["input_ids"][:, :2] = 5
    _, theirs = run(stock, **inputs)
    with ek.use_backend("triton"):
        _, ours = run(patched, **inputs)
    assert ours.keys() == theirs.keys()
    for key in theirs:
        torch.testing.assert_close(ours[key], theirs[key], rtol=1e-4, atol=1e-5, msg=lambda t, k=key: f"{k}: {t}")


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_kernels_repeat_their_dropout_with_the_seed(name, device):
    _, patched = pair(name, device, dropout=0.4)
    inputs = on(device, {"input_ids": ids(2, 4)})
    with ek.use_backend("triton"), torch.no_grad():
        torch.manual_seed(1)
        first = patched(**inputs).last_hidden_state
        second = patched(**inputs).last_hidden_state
        torch.manual_seed(1)
        assert torch.equal(patched(**inputs).last_hidden_state, first)
    assert not torch.equal(first, second)


@BY_NAME
def test_an_id_out_of_range_is_an_index_error_that_names_it(name):
    _, patched = pair(name)
    input_ids = ids()
    input_ids[1, 2] = VOCAB + 5
    with pytest.raises(IndexError, match=rf"token id {VOCAB + 5} at position 9 .* {VOCAB} rows"):
        patched(input_ids)
    input_ids[1, 2] = -1
    with pytest.raises(IndexError, match=rf"token id -1 at position 9 .* {VOCAB} rows"):
        patched(input_ids)


@pytest.mark.parametrize("name", [name for name in MODELS if name not in TURNED])
def test_a_sequence_longer_than_the_position_table_names_both_lengths(name):
    _, patched = pair(name)
    with pytest.raises((IndexError, ValueError)) as raised:
        patched(ids(2, POSITIONS + 3))
    assert str(POSITIONS) in str(raised.value)
    if name in ("bert", "electra", "albert", "distilbert", "gpt2"):
        assert str(POSITIONS + 3) in str(raised.value)
    else:  # positions are counted from the ids: the first one past the table is named
        assert f"position id {POSITIONS} " in str(raised.value)


def test_frozen_tables_get_no_gradient_and_the_rest_does():
    stock, patched = pair("bert")
    for model in (stock, patched):
        model.embeddings.position_embeddings.weight.requires_grad_(False)
        model.embeddings.LayerNorm.requires_grad_(False)
    _, theirs = run(stock, input_ids=ids())
    _, ours = run(patched, input_ids=ids())
    assert ours.keys() == theirs.keys()
    assert "embeddings.position_embeddings.weight" not in ours


def test_sinusoidal_positions_of_distilbert_stay_frozen():
    config = transformers.DistilBertConfig(dim=32, n_heads=2, n_layers=1, hidden_dim=48, sinusoidal_pos_embds=True)
    stock = transformers.DistilBertModel(config).eval()
    patched = copy.deepcopy(stock)
    ek.patch(patched)
    torch.manual_seed(0)
    input_ids = ids()
    assert torch.equal(patched(input_ids).last_hidden_state, stock(input_ids).last_hidden_state)


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "gpt2", "llama"])
def test_torch_compile_takes_the_whole_graph(name):
    stock, patched = pair(name)
    inputs = padded()
    compiled = torch.compile(patched, fullgraph=True, backend="aot_eager")
    output = compiled(**inputs).last_hidden_state
    torch.testing.assert_close(output, stock(**inputs).last_hidden_state)
    torch.compiler.reset()


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
def test_gradient_checkpointing_equals_stock(name, reentrant, frozen):
    stock, patched = pair(name, dropout=0.2, layers=2)
    for model in (stock, patched):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        if frozen:  # as under LoRA: the blocks' inputs need gradients although no table does
            (model.embeddings if name == "bert" else model.get_input_embeddings()).requires_grad_(False)
            if name == "gpt2":
                model.wpe.requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        patched(input_ids=ids())  # fused: no warning
    inputs = padded()
    expected, theirs = run(stock, **inputs)
    output, ours = run(patched, **inputs)
    assert torch.equal(output, expected)
    assert ours.keys() == theirs.keys() != set()
    for key in theirs:
        torch.testing.assert_close(ours[key], theirs[key])


def test_gpt2_reports_hidden_states_and_continues_from_a_cache():
    stock, patched = pair("gpt2", layers=2)
    first, second = ids(2, 5), ids(2, 3)
    for model in (stock, patched):
        model.eval()
    a, b = stock(first, use_cache=True), patched(first, use_cache=True)
    a = stock(second, past_key_values=a.past_key_values, output_hidden_states=True)
    b = patched(second, past_key_values=b.past_key_values, output_hidden_states=True)
    assert torch.equal(b.last_hidden_state, a.last_hidden_state)
    assert len(b.hidden_states) == 3
    assert all(torch.equal(x, y) for x, y in zip(b.hidden_states, a.hidden_states, strict=True))
    assert b.past_key_values.get_seq_length() == 8


def test_gpt2_installs_its_capturing_hooks_once():
    _, patched = pair("gpt2", layers=1)
    for _ in range(3):
        patched(ids(), output_hidden_states=True)
    assert len(patched.h[0]._forward_hooks) == 1


def test_gpt2_with_cross_attention_equals_stock(device):
    config = transformers.GPT2Config(
        n_embd=32, n_head=2, n_layer=1, n_positions=40, vocab_size=VOCAB, add_cross_attention=True
    )
    stock = transformers.GPT2Model(config).eval()
    patched = copy.deepcopy(stock)
    ek.patch(patched)
    inputs = {**padded(), "encoder_hidden_states": torch.randn(3, 4, 32), "encoder_attention_mask": torch.ones(3, 4)}
    inputs["encoder_attention_mask"][0, 2:] = 0
    assert torch.equal(patched(**inputs).last_hidden_state, stock(**inputs).last_hidden_state)
    stock, patched, inputs = stock.to(device), patched.to(device), on(device, inputs)
    expected = stock(**inputs).last_hidden_state
    kept = inputs["attention_mask"].bool()
    with ek.use_backend("triton"):
        output = patched(**inputs).last_hidden_state
    torch.testing.assert_close(output[kept], expected[kept], rtol=1e-5, atol=1e-5)


def test_gpt2_with_ids_of_three_dimensions_equals_stock():
    config = transformers.GPT2Config(n_embd=32, n_head=2, n_layer=1, n_positions=40, vocab_size=VOCAB)
    stock = transformers.GPT2DoubleHeadsModel(config).eval()
    patched = copy.deepcopy(stock)
    ek.patch(patched)
    input_ids = torch.randint(0, VOCAB, (2, 3, 5))
    assert torch.equal(patched(input_ids).mc_logits, stock(input_ids).mc_logits)


def test_gpt2_leaves_nothing_behind_after_an_exception():
    stock, patched = pair("gpt2")

    def fail(*args):
        raise ArithmeticError("stop")

    handle = patched.h[0].register_forward_pre_hook(fail)
    with pytest.raises(ArithmeticError, match="stop"):
        patched(ids())
    handle.remove()
    embeds = torch.randn(2, 4, 32)
    assert torch.equal(patched(inputs_embeds=embeds).last_hidden_state, stock(inputs_embeds=embeds).last_hidden_state)
    assert patched.wpe(torch.tensor([1])).shape == (1, 32)


def test_gpt2_serves_threads_with_and_without_fusion_at_once():
    _, patched = pair("gpt2")
    patched.eval()
    batches = [{"input_ids": ids()} if i % 2 else {"inputs_embeds": torch.randn(2, 4, 32)} for i in range(8)]
    with torch.no_grad():
        expected = [patched(**batch).last_hidden_state for batch in batches]
    wrong = []

    def work(i):
        with torch.no_grad():
            for _ in range(5):
                if not torch.equal(patched(**batches[i]).last_hidden_state, expected[i]):
                    wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(batches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_gpt2_refuses_a_stock_forward_that_it_does_not_know(monkeypatch):
    """Were the positions added elsewhere in another version, they would be added twice without a word."""

    class Other(transformers.GPT2Model):
        def forward(self, input_ids=None, inputs_embeds=None, **_):
            embeds = self.wte(input_ids) if inputs_embeds is None else inputs_embeds
            return embeds + self.wte.weight[: embeds.shape[1]]

    adapter = next(one for one in ADAPTERS if one.example == "gpt2.GPT2Model")
    monkeypatch.setattr(Other, "forward", fused._inline_forward(adapter, Other.forward))
    other = Other(build("gpt2").config)
    other.__dict__[state.MARK] = state.Mark()
    with pytest.raises(RuntimeError, match=r"transformers .* embeddings=False"):
        other(ids())


def test_generation_equals_stock():
    for cls, name in ((transformers.GPT2LMHeadModel, "gpt2"), (transformers.LlamaForCausalLM, "llama")):
        torch.manual_seed(0)
        stock = cls(build(name, layers=2).config).eval()
        patched = copy.deepcopy(stock)
        ek.patch(patched, strict=True)
        inputs = padded(3, 5, "left")
        for options in (
            {"do_sample": False},
            {"do_sample": True, "top_k": 5},
            {"num_beams": 2},
            {"do_sample": False, "cache_implementation": "static", "disable_compile": True},
            {"do_sample": False, "use_cache": False},
        ):
            produced = []
            for model in (stock, patched):
                torch.manual_seed(5)
                produced.append(model.generate(**inputs, max_new_tokens=6, min_new_tokens=6, **options))
            assert torch.equal(produced[0], produced[1]), (name, options)


def test_generation_with_the_kernels_equals_stock(device):
    for cls, name in ((transformers.GPT2LMHeadModel, "gpt2"), (transformers.LlamaForCausalLM, "llama")):
        torch.manual_seed(0)
        stock = cls(build(name).config).eval().to(device)
        patched = copy.deepcopy(stock)
        ek.patch(patched, strict=True)
        for inputs in (on(device, padded(2, 4, "left")), on(device, {"input_ids": ids(2, 4)})):
            options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
            expected = stock.generate(**inputs, **options)
            with ek.use_backend("triton"):
                assert torch.equal(patched.generate(**inputs, **options), expected), name
                static = {"cache_implementation": "static", "disable_compile": True}
                assert torch.equal(patched.generate(**inputs, **options, **static), expected), name


def test_a_head_around_the_model_is_left_as_it_is():
    config = build("bert").config
    model = transformers.BertForSequenceClassification(config)
    wrapped = nn.Sequential(nn.Identity(), model)
    report = ek.patch(wrapped, strict=True)
    assert [entry.path for entry in report.entries] == ["1.bert.embeddings", "1.bert"]
    assert type(model) is transformers.BertForSequenceClassification

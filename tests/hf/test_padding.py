"""Padding-free models: what stock gives for real tokens, zeros for padding, and only real tokens computed."""

from __future__ import annotations

import copy
import io
import warnings
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import embedkernels as ek
from embedkernels.hf import attention as hf_attention
from embedkernels.hf import describe, padding
from tests.hf.models import DECODERS, MODELS, POSITIONS, VOCAB, build, ids, padded

BY_NAME = pytest.mark.parametrize("name", MODELS)
ENCODERS = [name for name in MODELS if name not in DECODERS]
SIDES = [(name, side) for name in MODELS for side in ("right", "left") if side == "right" or name in DECODERS]


def pair(name: str, **options: Any) -> tuple[Any, Any]:
    stock = build(name, **options)
    free = copy.deepcopy(stock)
    ek.patch(free, padding_free=True, strict=True)
    assert sum(padding.is_padding_free(module) for module in free.modules()) == 1
    return stock, free


def run(model: Any, **inputs: Any) -> tuple[Any, dict[str, Tensor]]:
    """The output, and the gradient of every parameter for one of the real tokens of every output alone."""
    model.zero_grad()
    output = model(**inputs)
    kept = inputs["attention_mask"].bool()
    upstream = torch.randn(output.last_hidden_state.shape, generator=torch.Generator().manual_seed(3))
    loss = (output.last_hidden_state * upstream)[kept].sum()
    for hidden in output.get("hidden_states") or ():
        loss = loss + hidden[kept].square().sum()
    if output.get("pooler_output") is not None:
        loss = loss + output.pooler_output.sum()
    loss.backward()
    return output, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(stock: Any, free: Any, **inputs: Any) -> None:
    output, ours = run(free, **inputs)
    expected, theirs = run(stock, **inputs)
    kept = inputs["attention_mask"].bool()
    assert type(output) is type(expected)
    states = zip(
        (output.last_hidden_state, *(output.get("hidden_states") or ())),
        (expected.last_hidden_state, *(expected.get("hidden_states") or ())),
        strict=True,
    )
    for mine, stocks in states:
        assert mine.shape == stocks.shape
        torch.testing.assert_close(mine[kept], stocks[kept], rtol=1e-5, atol=1e-5)
        assert mine[~kept].count_nonzero() == 0
    if expected.get("pooler_output") is not None:
        torch.testing.assert_close(output.pooler_output, expected.pooler_output, rtol=1e-5, atol=1e-5)
    # The keys' bias moves no probability: what stock has of its gradient is rounding.
    assert ours.keys() == theirs.keys()
    for key, gradient in theirs.items():
        torch.testing.assert_close(ours[key], gradient, rtol=1e-4, atol=2e-5, msg=lambda t, k=key: f"{k}: {t}")


@pytest.fixture
def tokens(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many queries each call of the attention function had, batch and all."""
    seen: list[int] = []
    stock = hf_attention.attention_forward

    def counted(module: nn.Module, query: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(query.shape[0] * query.shape[2])
        return stock(module, query, *args, **kwargs)

    monkeypatch.setitem(transformers.AttentionInterface._global_mapping, hf_attention.NAME, counted)
    return seen


@pytest.mark.parametrize(("name", "side"), SIDES)
def test_equal_to_stock_on_real_tokens(name: str, side: str, tokens: list[int]) -> None:
    stock, free = pair(name, layers=2)
    inputs = padded(4, 9, side)
    assert_same(stock, free, **inputs, output_hidden_states=True)
    assert tokens == [int(inputs["attention_mask"].sum())] * 2


@pytest.mark.usefixtures("tokens")
@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "gpt2", "llama", "mistral"])
def test_kernels_are_equal_to_stock_on_real_tokens(name: str, device: torch.device) -> None:
    """Attention by the kernels, with documents in place of masks."""
    stock, free = (model.to(device) for model in pair(name))
    inputs = {key: x.to(device) for key, x in padded(3, 7).items()}
    with ek.use_backend("triton"):
        output = free(**inputs).last_hidden_state
    kept = inputs["attention_mask"].bool()
    torch.testing.assert_close(output[kept], stock(**inputs).last_hidden_state[kept], rtol=1e-5, atol=1e-5)


@BY_NAME
def test_other_inputs(name: str) -> None:
    """Embeddings in place of ids, positions, token types, a boolean mask."""
    stock, free = pair(name)
    inputs = padded(3, 8)
    mask = inputs["attention_mask"]
    assert_same(stock, free, inputs_embeds=torch.randn(3, 8, 32), attention_mask=mask)
    assert_same(stock, free, input_ids=inputs["input_ids"], attention_mask=mask.bool())
    positions = torch.randint(2, POSITIONS - 1, (3, 8))
    assert_same(stock, free, **inputs, position_ids=positions)
    assert_same(stock, free, **inputs, position_ids=positions[:1])
    if name in ("bert", "electra", "albert"):
        assert_same(stock, free, **inputs, token_type_ids=torch.randint(0, 2, (3, 8)))


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_padding_in_the_middle(name: str) -> None:
    stock, free = pair(name)
    mask = torch.tensor([[1, 0, 1, 1, 0, 1], [1, 1, 1, 1, 1, 0]])
    assert_same(stock, free, input_ids=ids(2, 6), attention_mask=mask)


@pytest.mark.parametrize("name", [name for name in MODELS if name != "albert"])  # which stock refuses
def test_gradient_checkpointing(name: str) -> None:
    stock, free = pair(name, layers=2)
    for reentrant in (False, True):
        free.gradient_checkpointing_enable({"use_reentrant": reentrant})
        free.enable_input_require_grads()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # decoders say that they make no cache
            assert_same(stock, free, **padded())


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_autocast(name: str, tokens: list[int]) -> None:
    stock, free = pair(name)
    inputs = padded()
    kept = inputs["attention_mask"].bool()
    with torch.autocast("cpu", torch.bfloat16):
        expected, output = stock(**inputs).last_hidden_state, free(**inputs).last_hidden_state
    assert output.dtype == expected.dtype
    torch.testing.assert_close(output[kept], expected[kept], rtol=0.03, atol=0.03)
    assert tokens == [int(kept.sum())]


HEADS = [
    ("bert", "BertForSequenceClassification"),
    ("bert", "BertForTokenClassification"),
    ("bert", "BertForMaskedLM"),
    ("roberta", "RobertaForSequenceClassification"),
    ("roberta", "RobertaForMaskedLM"),
    ("distilbert", "DistilBertForSequenceClassification"),
    ("albert", "AlbertForSequenceClassification"),
    ("electra", "ElectraForTokenClassification"),
    ("gpt2", "GPT2LMHeadModel"),
    ("gpt2", "GPT2ForSequenceClassification"),
    ("llama", "LlamaForCausalLM"),
    ("qwen3", "Qwen3ForSequenceClassification"),
    ("mistral", "MistralForCausalLM"),
]


@pytest.mark.parametrize(("name", "head"), HEADS)
def test_heads_have_the_loss_and_the_gradients_of_stock(name: str, head: str, tokens: list[int]) -> None:
    config = build(name, layers=2).config
    stock = getattr(transformers, head)(config)
    for module in stock.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    free = copy.deepcopy(stock)
    ek.patch(free, padding_free=True, strict=True)
    inputs = padded(3, 9)
    kept = inputs["attention_mask"].bool()
    more: dict[str, Any]
    if "Sequence" in head:
        more = {"labels": torch.tensor([0, 1, 1])}
    else:
        count = stock.config.num_labels if "Token" in head else VOCAB
        more = {"labels": torch.randint(0, count, (3, 9)).masked_fill(~kept, -100)}
    outputs = []
    for model in (stock, free):
        output = model(**inputs, **more)
        output.loss.backward()
        outputs.append(output)
    assert tokens == [int(kept.sum())] * 2
    torch.testing.assert_close(outputs[1].loss, outputs[0].loss, rtol=1e-5, atol=1e-6)
    if "Sequence" in head:
        torch.testing.assert_close(outputs[1].logits, outputs[0].logits, rtol=1e-5, atol=1e-5)
    for (key, theirs), ours in zip(stock.named_parameters(), free.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5, msg=lambda t, k=key: f"{k}: {t}")


@pytest.mark.parametrize("name", ["bert", "albert", "roberta", "gpt2"])
def test_outputs_stand_in_the_order_of_stock(name: str) -> None:
    """What heads take from places of a tuple."""
    stock, free = pair(name, layers=2)
    inputs = padded(3, 7)
    options = {"output_hidden_states": True} | ({"use_cache": False} if name in DECODERS else {})
    for as_dict in (True, False):
        theirs, ours = (model(**inputs, **options, return_dict=as_dict) for model in (stock, free))
        if as_dict:
            assert list(ours) == list(theirs)
            theirs, ours = theirs.to_tuple(), ours.to_tuple()
        assert [type(x) for x in ours] == [type(x) for x in theirs]
        assert [x.shape for x in ours if isinstance(x, Tensor)] == [x.shape for x in theirs if isinstance(x, Tensor)]


def test_heads_with_hidden_states() -> None:
    model = transformers.BertForSequenceClassification(build("bert", layers=2).config)
    ek.patch(model, padding_free=True)
    assert len(model(**padded(3, 7), output_hidden_states=True).hidden_states) == 3


def test_a_padding_id_among_the_tokens_of_roberta() -> None:
    stock, free = pair("roberta")
    inputs = padded(3, 7)
    inputs["input_ids"][0, 3] = 1
    assert_same(stock, free, **inputs)


def test_windows_of_a_bidirectional_decoder() -> None:
    """Their masks count the window without the query's own key."""
    stock = build("mistral", layers=2)
    stock.config.is_causal = False
    for layer in stock.layers:
        layer.self_attn.is_causal = False
    free = copy.deepcopy(stock)
    ek.patch(free, padding_free=True)
    assert_same(stock, free, **padded(3, 12))


def test_layers_of_another_order_than_the_masks_are_an_error() -> None:
    """Stock is causal with padding, where its mask decides, and not without: nobody knows what is wanted."""
    _, free = pair("llama")
    for layer in free.layers:
        layer.self_attn.is_causal = False
    with pytest.raises(RuntimeError, match="is_causal of LlamaAttention is False, that of the masks of LlamaModel"):
        free(**padded(3, 7))


def test_rotary_positions_by_the_length_of_the_batch() -> None:
    config = copy.deepcopy(build("llama").config)
    config.max_position_embeddings = 4
    config.rope_parameters = {**config.rope_parameters, "rope_type": "dynamic", "factor": 2.0}
    stock = transformers.LlamaModel(config).train()
    free = copy.deepcopy(stock)
    ek.patch(free, padding_free=True)
    mask = torch.zeros(2, 12, dtype=torch.long)
    mask[0, :4], mask[1, :3] = 1, 1
    with pytest.warns(UserWarning, match="rotary positions depend on the length of the batch"):
        assert_loose(stock, free, input_ids=ids(2, 12), attention_mask=mask)


def assert_loose(stock: Any, free: Any, **inputs: Any) -> None:
    kept = inputs["attention_mask"].bool()
    torch.testing.assert_close(
        free(**inputs).last_hidden_state[kept], stock(**inputs).last_hidden_state[kept], rtol=1e-5, atol=1e-5
    )


def classifier(name: str = "Llama", **changes: Any) -> tuple[Any, Any]:
    config = copy.deepcopy(build(name.lower()).config)
    for key, value in changes.items():
        setattr(config, key, value)
    stock = getattr(transformers, f"{name}ForSequenceClassification")(config).train()
    free = copy.deepcopy(stock)
    ek.patch(free, padding_free=True)
    return stock, free


@pytest.mark.parametrize("kind", ["embeddings", "another padding id", "no padding id"])
def test_a_last_token_that_is_found_by_its_id(kind: str) -> None:
    """Where ids do not tell what the mask does, stock takes a padded place, which must be computed."""
    stock, free = classifier(
        **{"another padding id": {"pad_token_id": 2}, "no padding id": {"pad_token_id": None}}.get(kind, {})
    )
    inputs = padded(1 if kind == "no padding id" else 3, 7)
    inputs["attention_mask"][0, -2:] = 0
    if kind == "embeddings":
        inputs = {"inputs_embeds": torch.randn(3, 7, 32), "attention_mask": inputs["attention_mask"]}
    with pytest.warns(UserWarning, match="LlamaForSequenceClassification finds the last token by its id"):
        logits = free(**inputs).logits
    torch.testing.assert_close(logits, stock(**inputs).logits, rtol=1e-5, atol=1e-5)


def test_dropout_is_drawn_for_real_tokens_only() -> None:
    _, free = pair("bert", dropout=0.3)
    inputs = padded(3, 9)
    torch.manual_seed(0)
    first = free(**inputs).last_hidden_state
    second = free(**inputs).last_hidden_state
    kept = inputs["attention_mask"].bool()
    assert not torch.equal(first, second)
    assert torch.isfinite(first).all()
    assert first[~kept].count_nonzero() == 0
    torch.manual_seed(0)
    assert torch.equal(free(**inputs).last_hidden_state, first)


@pytest.mark.parametrize("value", [0, 1])
def test_without_padding_or_without_tokens_stock_runs(value: int, tokens: list[int]) -> None:
    stock, free = pair("bert")
    inputs = {"input_ids": ids(), "attention_mask": torch.full((3, 7), value)}
    assert torch.equal(free(**inputs).last_hidden_state, stock(**inputs).last_hidden_state)
    free(input_ids=ids())
    assert tokens == [21, 21]


LEFT = padded(3, 7, "left")
FALLBACKS: list[tuple[str, dict[str, Any], str]] = [
    ("bert", LEFT, "the first token of a sequence is padding"),
    ("bert", {**padded(), "output_attentions": True}, "output_attentions is asked for"),
    (
        "bert",
        {**padded(), "attention_mask": torch.ones(3, 1, 7, 7)},
        "attention_mask is not of the shape of input_ids",
    ),
    ("llama", {**padded(), "use_cache": True}, "a cache is asked for"),
    ("mistral", {"input_ids": ids(1, 7), "attention_mask": torch.tensor([[1, 1, 0, 1, 1, 1, 1]])}, "padding inside"),
]


@pytest.mark.parametrize(("name", "inputs", "reason"), FALLBACKS, ids=[reason for _, _, reason in FALLBACKS])
def test_what_would_not_be_exact_runs_with_padding_and_says_so(
    name: str, inputs: dict[str, Any], reason: str, tokens: list[int]
) -> None:
    stock, free = pair(name)
    with pytest.warns(UserWarning, match=reason):
        output = free(**inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*gives no attention weights")
        free(**inputs)  # once
    assert tokens == [inputs["input_ids"].numel()] * 2
    kept = inputs["attention_mask"].bool()
    expected = stock(**inputs).last_hidden_state
    if kept.dim() == 2:
        torch.testing.assert_close(output.last_hidden_state[kept], expected[kept], rtol=1e-5, atol=1e-5)


def test_feed_forward_in_chunks_runs_with_padding() -> None:
    stock, free = pair("bert")
    for model in (stock, free):
        for module in model.modules():
            if hasattr(module, "chunk_size_feed_forward"):
                module.chunk_size_feed_forward = 7
        model.config.chunk_size_feed_forward = 7
    with pytest.warns(UserWarning, match="chunk_size_feed_forward is set"):
        free(**padded())


def test_without_layers_stock_runs() -> None:
    stock, free = pair("bert", layers=0)
    with pytest.warns(UserWarning, match="it has no layers"):
        assert_loose(stock, free, **padded())


def test_a_tuple_of_a_decoder_has_its_cache() -> None:
    stock, free = pair("llama")
    with pytest.warns(UserWarning, match="would lack the cache that stock makes"):
        assert len(free(**padded(), return_dict=False)) == len(stock(**padded(), return_dict=False))


def test_a_decoder_in_evaluation_makes_its_cache() -> None:
    """As stock does unless it is told not to; then it is padding-free."""
    _, free = pair("llama")
    free.eval()
    with pytest.warns(UserWarning, match="a cache is asked for: pass use_cache=False"):
        assert free(**padded()).past_key_values is not None
    assert free(**padded(), use_cache=False).past_key_values is None


def test_generation_is_stocks() -> None:
    stock = transformers.LlamaForCausalLM(build("llama", layers=2).config).eval()
    free = copy.deepcopy(stock)
    ek.patch(free, padding_free=True)
    inputs = padded(3, 7, "left")
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 1}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert torch.equal(free.generate(**inputs, **options), stock.generate(**inputs, **options))


def test_torch_compile_runs_with_padding() -> None:
    torch.compiler.reset()
    stock, free = pair("bert")
    inputs = padded()
    compiled = torch.compile(free, backend="eager", fullgraph=True)
    kept = inputs["attention_mask"].bool()
    torch.testing.assert_close(compiled(**inputs).last_hidden_state[kept], stock(**inputs).last_hidden_state[kept])


def test_errors_of_stock_stay() -> None:
    stock, free = pair("bert")
    for inputs in (
        {"attention_mask": torch.ones(3, 7)},
        {"input_ids": ids(), "inputs_embeds": torch.randn(3, 7, 32), "attention_mask": torch.ones(3, 7)},
    ):
        messages = []
        for model in (stock, free):
            with pytest.raises((ValueError, RuntimeError)) as raised:
                model(**inputs)
            messages.append(str(raised.value)[:40])
        assert messages[0] == messages[1]


def test_a_model_whose_keywords_get_lost_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody would see that its tokens look at those of other sequences."""
    _, free = pair("bert")
    layer = type(free.encoder.layer[0])
    stock_forward = layer.forward

    def lossy(self: Any, hidden_states: Tensor, attention_mask: Any = None, *args: Any, **kwargs: Any) -> Any:
        return stock_forward(self, hidden_states, attention_mask)

    monkeypatch.setattr(layer, "forward", lossy)
    with pytest.raises(RuntimeError, match=r"BertModel of transformers .* did not hand cu_seq_lens_q on"):
        free(**padded())
    monkeypatch.setattr(layer, "forward", lambda self, hidden_states, *args, **kwargs: hidden_states)  # noqa: ARG005
    with pytest.raises(RuntimeError, match="did not hand cu_seq_lens_q on"):
        free(**padded())


@BY_NAME
def test_copies_and_pickles_stay_padding_free_and_unpatch_ends_it(name: str, tokens: list[int]) -> None:
    stock, free = pair(name)
    inputs = padded()
    real = int(inputs["attention_mask"].sum())
    buffer = io.BytesIO()
    torch.save(free, buffer)
    buffer.seek(0)
    for model in (copy.deepcopy(free), torch.load(buffer, weights_only=False)):
        model(**inputs)
    assert tokens == [real, real]
    assert ek.patch(free).entries[-1].part == "padding"  # as it was
    assert (describe(free).entries[-1].part, describe(free).entries[-1].status) == ("padding", "already")
    assert free.state_dict().keys() == stock.state_dict().keys()
    ek.unpatch(free)
    assert [type(module) for module in free.modules()] == [type(module) for module in stock.modules()]
    free(**inputs)
    assert tokens == [real, real]
    assert not any(padding.is_padding_free(module) for module in free.modules())


def test_the_embeddings_can_stay_stock(tokens: list[int]) -> None:
    for name in ("bert", "gpt2"):
        stock = build(name)
        free = copy.deepcopy(stock)
        report = ek.patch(free, embeddings=False, rope=False, padding_free=True)
        assert [entry.part for entry in report.entries] == ["attention", "padding"]
        assert_same(stock, free, **padded())
    assert tokens == [18, 18]


def test_what_cannot_run_padding_free_is_named() -> None:
    model = transformers.MPNetModel(
        transformers.MPNetConfig(
            vocab_size=VOCAB, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48
        )
    )
    with pytest.warns(UserWarning, match="nothing in MPNetModel can run padding-free: BertModel, ElectraModel"):
        report = ek.patch(copy.deepcopy(model), padding_free=True)
    assert report.active
    with pytest.raises(ValueError, match="nothing in MPNetModel can run padding-free"):
        ek.patch(model, padding_free=True, strict=True)
    assert not ek.hf.describe(model).active  # nothing was changed

    answering = transformers.BertForQuestionAnswering(build("bert").config)
    with pytest.warns(UserWarning, match="the loss of BertForQuestionAnswering sets the score of each token against"):
        ek.patch(answering, padding_free=True)
    assert not any(padding.is_padding_free(module) for module in answering.modules())

    class Reader(transformers.BertForQuestionAnswering):
        pass

    for model in (Reader(build("bert").config), transformers.BertForQuestionAnswering(build("bert").config)):
        ek.patch(model.bert, padding_free=True)  # which does not know what is around it
        assert quietly_patched(model).entries[-1].status == "falls back"
        with pytest.warns(UserWarning, match="sets the score of each token against those of padding"):
            model(**padded(3, 7))

    eager = build("bert")
    eager.set_attn_implementation("eager")
    with pytest.warns(UserWarning, match="its attention implementation is 'eager', which knows nothing of packed"):
        report = ek.patch(eager, padding_free=True)
    assert [e.status for e in report.entries if e.part == "padding"] == ["left alone"]
    with pytest.raises(ValueError, match="padding-free"):
        ek.patch(build("bert"), attention=False, padding_free=True, strict=True)


def quietly_patched(model: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ek.patch(model, padding_free=True)


def test_another_attention_set_later_runs_with_padding() -> None:
    stock, free = pair("bert")
    free.set_attn_implementation("eager")
    assert describe(free).entries[-1].status == "falls back"
    with pytest.warns(UserWarning, match="its attention implementation is 'eager'"):
        output = free(**padded())
    assert torch.isfinite(output.last_hidden_state).all()
    assert stock.config._attn_implementation == "sdpa"

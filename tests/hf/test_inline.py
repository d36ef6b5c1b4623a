"""Models that embed at the start of their own forward compute as stock, on what one op gives."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import transformers
from torch import nn

import embedkernels as ek
from embedkernels.hf import fused
from embedkernels.hf.adapters import ADAPTERS
from tests.contract import assert_within_contract

VOCAB, POSITIONS = 60, 40
_IDS = {
    "vocab_size": VOCAB,
    "pad_token_id": 1,
    "bos_token_id": 3,
    "eos_token_id": 2,
    "decoder_start_token_id": 3,
    "forced_eos_token_id": None,
}
_SEQ2SEQ = _IDS | {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": POSITIONS,
    "scale_embedding": True,
    "attention_type": "original_full",
}
_GPT_NEO = {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "attention_types": [[["global"], 1]]}
_BIG_CODE = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": POSITIONS, "attn_pdrop": 0.0}
_GPT2 = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": POSITIONS, "attn_pdrop": 0.0}

# By the example of the row: class of the model, and settings but for the dropout of the embeddings.
MODELS = {
    "gpt2.GPT2Model": ("GPT2", _IDS | _GPT2, "embd_pdrop"),
    "gpt_neo.GPTNeoModel": ("GPTNeo", _IDS | _GPT_NEO | {"max_position_embeddings": POSITIONS}, "embed_dropout"),
    "gpt_bigcode.GPTBigCodeModel": ("GPTBigCode", _IDS | _BIG_CODE, "embd_pdrop"),
    "bloom.BloomModel": ("Bloom", _IDS | {"hidden_size": 32, "n_layer": 1, "n_head": 2}, "hidden_dropout"),
    **{
        f"{row.example}": (
            row.example.split(".")[1].removesuffix("Encoder").removesuffix("Decoder"),
            _SEQ2SEQ,
            "dropout",
        )
        for row in ADAPTERS
        if row.recipe == "inline" and row.example.endswith("coder")
    },
}
BY_NAME = pytest.mark.parametrize("name", MODELS)
DECODER_ONLY = [name for name in MODELS if not name.endswith("coder")]
SEQ2SEQ = sorted({name for name in MODELS if name.endswith("Encoder")})
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def _build(name: str, dropout: float, dtype: torch.dtype) -> nn.Module:
    model, settings, of_dropout = MODELS[name]
    config = getattr(transformers, f"{model}Config")(**settings, **{of_dropout: dropout})
    torch.manual_seed(0)
    built = getattr(transformers, f"{model}Model")(config)
    with torch.no_grad():
        for parameter in built.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    if name.endswith("coder"):
        built = getattr(built, name[-7:].lower())
    return built.to(dtype).train()


def _pair(name: str, dropout: float = 0.0, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module]:
    stock = _build(name, dropout, dtype)
    patched = copy.deepcopy(stock)
    entry = ek.patch(patched, strict=True).entries[0]
    assert (entry.path, entry.status) == ("", "patched"), entry
    assert fused.is_fused(patched)
    return stock, patched


def _ids() -> torch.Tensor:
    ids = torch.randint(4, VOCAB, (3, 7))
    ids[:, :2] = 5
    return ids


def _run(model, **call):
    torch.manual_seed(1)
    output = model(**call).last_hidden_state
    model.zero_grad()
    torch.manual_seed(2)
    output.backward(torch.randn(output.shape).to(output))
    return output.detach(), {key: p.grad for key, p in model.named_parameters() if p.grad is not None}


def _fused(model, **call):
    """Run without a warning, which a call that runs stock would give."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="embedkernels")
        return _run(model, **call)


def test_every_row_has_a_model_here():
    assert MODELS.keys() == {row.example for row in ADAPTERS if row.recipe == "inline"}


@BY_NAME
def test_the_row_says_whether_tokens_are_scaled(name):
    patched = _pair(name)[1]
    row = next(one for one in ADAPTERS if one.example == name)
    assert row.scaled_table == (type(patched._modules[row.tokens]) is not nn.Embedding)
    scale, reason = fused._scale(patched, row)
    assert reason is None
    assert ("scale * token" in row.formula) == (scale != 1.0)


@BY_NAME
@DTYPES
def test_outputs_are_bit_equal_and_gradients_keep_the_contract(name, dtype):
    stock, patched = _pair(name, dtype=dtype)
    ids = _ids()
    expected, theirs = _run(stock, input_ids=ids)
    output, ours = _fused(patched, input_ids=ids)
    assert torch.equal(output, expected)
    _, exact = _run(copy.deepcopy(stock).double(), input_ids=ids)
    assert ours.keys() == theirs.keys() == exact.keys()
    for key in ours:
        assert_within_contract(ours[key], theirs[key], exact[key], key)


@BY_NAME
def test_dropout_draws_the_same_numbers(name):
    stock, patched = _pair(name, dropout=0.3)
    ids = _ids()
    expected, theirs = _run(stock, input_ids=ids)
    output, ours = _fused(patched, input_ids=ids)
    assert torch.equal(output, expected)
    for key in theirs:
        torch.testing.assert_close(ours[key], theirs[key])
    assert not torch.equal(_run(patched.eval(), input_ids=ids)[0], output)
    assert torch.equal(_run(patched, input_ids=ids)[0], _run(stock.eval(), input_ids=ids)[0])


@BY_NAME
def test_the_table_has_no_gradient_at_padding(name):
    _, patched = _pair(name)
    ids = _ids()
    ids[:, -1] = 1
    _, gradients = _run(patched, input_ids=ids)
    row = next(one for one in ADAPTERS if one.example == name)
    table, gradient = patched._modules[row.tokens], gradients[f"{row.tokens}.weight"]
    assert torch.count_nonzero(gradient[5])
    assert bool(torch.count_nonzero(gradient[1])) == (table.padding_idx is None)


@BY_NAME
def test_embeddings_given_run_stock(name):
    stock, patched = (model.eval() for model in _pair(name))
    embeds = torch.randn(3, 7, 32)
    with pytest.warns(UserWarning, match="inputs_embeds is given"):
        output = patched(inputs_embeds=embeds).last_hidden_state
    assert torch.equal(output, stock(inputs_embeds=embeds).last_hidden_state)


@BY_NAME
def test_the_kernels_are_close(name, device):
    stock, patched = (model.to(device) for model in _pair(name))
    ids = _ids().to(device)
    expected, theirs = _run(stock, input_ids=ids)
    with ek.use_backend("triton"):
        output, ours = _fused(patched, input_ids=ids)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    assert ours.keys() == theirs.keys()
    for key in theirs:
        torch.testing.assert_close(ours[key], theirs[key], rtol=1e-4, atol=1e-4, msg=lambda t, k=key: f"{k}: {t}")


@pytest.mark.parametrize("name", [name for name in MODELS if not name.endswith("Encoder")])
def test_a_cache_is_continued_at_its_position(name):
    stock, patched = _pair(name)
    first, second = _ids()[:, :5], _ids()[:, :3]
    outputs = []
    for model in (stock.eval(), patched.eval()):
        before = model(first, use_cache=True)
        outputs.append(model(second, past_key_values=before.past_key_values, use_cache=True).last_hidden_state)
    assert torch.equal(*outputs)


@pytest.mark.parametrize("name", ["gpt_neo.GPTNeoModel", "gpt_bigcode.GPTBigCodeModel"])
def test_positions_given_are_used_and_types_run_stock(name):
    stock, patched = (model.eval() for model in _pair(name))
    ids = _ids()
    positions = torch.randint(0, POSITIONS, ids.shape)
    expected, _ = _run(stock, input_ids=ids, position_ids=positions)
    assert torch.equal(_fused(patched, input_ids=ids, position_ids=positions)[0], expected)
    with pytest.warns(UserWarning, match="token_type_ids is given"):
        output = patched(ids, token_type_ids=ids).last_hidden_state
    assert torch.equal(output, stock(ids, token_type_ids=ids).last_hidden_state)


@pytest.mark.parametrize("name", SEQ2SEQ)
def test_generation_equals_stock(name):
    model, settings, _ = MODELS[name]
    heads = [f"{model}ForConditionalGeneration", f"{model}MTModel"]
    cls = next(getattr(transformers, head) for head in heads if hasattr(transformers, head))
    torch.manual_seed(0)
    stock = cls(getattr(transformers, f"{model}Config")(**settings)).eval()
    patched = copy.deepcopy(stock)
    report = ek.patch(patched, strict=True)
    assert sum(entry.status == "patched" for entry in report.entries) >= 2
    ids = _ids()
    ids[1, -2:] = 1
    call = {"input_ids": ids, "attention_mask": (ids != 1).long(), "max_new_tokens": 5, "min_new_tokens": 5}
    for options in ({"do_sample": False, "num_beams": 1}, {"num_beams": 2}):
        assert torch.equal(patched.generate(**call, **options), stock.generate(**call, **options))


def test_a_table_of_sinusoids_that_was_unfrozen_gets_the_gradient_that_stock_gives():
    """None before transformers 5.24, whose forward runs under no_grad: the fused one would give one."""
    stock = _build("marian.MarianEncoder", 0.0, torch.float32)
    stock.embed_positions.weight.requires_grad_(True)
    patched = copy.deepcopy(stock)
    ids = _ids()
    expected, theirs = _run(stock, input_ids=ids)
    learned = "embed_positions.weight" in theirs
    entries = ek.patch(patched).entries
    assert (entries[0].path, entries[0].status) == ("", "patched" if learned else "left alone")
    if not learned:
        assert (entries[1].path, entries[1].status) == ("embed_tokens", "patched")
    output, ours = _run(patched, input_ids=ids)
    assert torch.equal(output, expected)
    assert ours.keys() == theirs.keys()
    for key in theirs:
        torch.testing.assert_close(ours[key], theirs[key])


def test_everything_is_as_it_was_after_unpatch():
    stock, patched = _pair("bart.BartEncoder")
    ek.unpatch(patched)
    assert [type(m) for m in patched.modules()] == [type(m) for m in stock.modules()]
    assert [m.__dict__.keys() for m in patched.modules()] == [m.__dict__.keys() for m in stock.modules()]

"""Models that embed at the start of their own forward compute as stock, on what one op gives."""

from __future__ import annotations

import copy
import importlib
import warnings

import pytest
import torch
import transformers
from torch import nn

import embedkernels as ek
from embedkernels.hf import fused
from embedkernels.hf.adapters import ADAPTERS, Adapter, adapter_for
from embedkernels.hf.coverage import front_ends, models_folder
from tests.contract import assert_within_contract

VOCAB, WIDTH, POSITIONS, WINDOW = 60, 32, 40, 4
_IDS = {
    "vocab_size": VOCAB,
    "pad_token_id": 1,
    "bos_token_id": 3,
    "eos_token_id": 2,
    "decoder_start_token_id": 3,
    "forced_eos_token_id": None,
}
_SEQ2SEQ = _IDS | {
    "d_model": WIDTH,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": POSITIONS,
    "scale_embedding": True,
    "attention_dropout": 0.0,
}
_T5 = _IDS | {"d_model": WIDTH, "d_kv": 16, "d_ff": 48, "num_layers": 1, "num_heads": 2, "use_cache": False}
_GPT2 = _IDS | {"n_embd": WIDTH, "n_layer": 1, "n_head": 2, "n_positions": POSITIONS, "attn_pdrop": 0.0}
_SEAMLESS = _SEQ2SEQ | {"hidden_size": WIDTH, "activation_dropout": 0.0}
_DECODER = _IDS | {
    "hidden_size": WIDTH,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": POSITIONS,
}

# By folder: settings, and what they call the dropout of the embeddings.
SETTINGS: dict[str, tuple[dict[str, object], str]] = {
    "bigbird_pegasus": (_SEQ2SEQ | {"attention_type": "original_full"}, "dropout"),
    "biogpt": (_DECODER | {"scale_embedding": True, "attention_probs_dropout_prob": 0.0}, "hidden_dropout_prob"),
    "bloom": (_IDS | {"hidden_size": WIDTH, "n_layer": 1, "n_head": 2}, "hidden_dropout"),
    "gpt2": (_GPT2, "embd_pdrop"),
    "gpt_bigcode": (_GPT2, "embd_pdrop"),
    "gpt_neo": (
        _DECODER | {"num_layers": 1, "num_heads": 2, "attention_types": [[["global"], 1]]},
        "embed_dropout",
    ),
    "imagegpt": (_GPT2, "embd_pdrop"),
    "led": (
        _SEQ2SEQ
        | {
            "attention_window": [WINDOW],
            "max_encoder_position_embeddings": POSITIONS,
            "max_decoder_position_embeddings": POSITIONS,
        },
        "dropout",
    ),
    "longt5": (_T5 | {"local_radius": 3}, "dropout_rate"),
    "mt5": (_T5, "dropout_rate"),
    "nllb_moe": (_SEQ2SEQ | {"num_experts": 2, "encoder_sparse_step": 0, "decoder_sparse_step": 0}, "dropout"),
    "opt": (
        _DECODER | {"ffn_dim": 48, "word_embed_proj_dim": WIDTH, "attention_dropout": 0.0},
        "dropout",  # of its layers alone
    ),
    "pix2struct": (_T5 | {"hidden_size": WIDTH, "initializer_range": 0.02}, "dropout_rate"),
    "pop2piano": (_T5, "dropout_rate"),
    "seamless_m4t": (_SEAMLESS, "dropout"),
    "seamless_m4t_v2": (_SEAMLESS, "dropout"),
    "switch_transformers": (_T5 | {"num_experts": 2, "num_sparse_encoder_layers": 0}, "dropout_rate"),
    "t5": (_T5, "dropout_rate"),
    "trocr": (_SEQ2SEQ | {"hidden_size": WIDTH, "activation_function": "gelu"}, "dropout"),
    "umt5": (_T5, "dropout_rate"),
    "whisper": (_SEQ2SEQ | {"max_target_positions": POSITIONS}, "dropout"),
    "xglm": (_SEQ2SEQ | {"ffn_dim": 48, "num_layers": 1, "attention_heads": 2}, "dropout"),
}
FOUND = sorted(
    f"{one.model}.{one.cls}"
    for one in front_ends(models_folder())
    if one.adapter is not None and one.adapter.recipe == "inline"
)
BY_NAME = pytest.mark.parametrize("name", FOUND)
ENCODERS = ("Encoder", "Stack")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def _class(name: str) -> type[nn.Module]:
    model, cls = name.split(".")
    found: type[nn.Module] = vars(importlib.import_module(f"transformers.models.{model}.modeling_{model}"))[cls]
    return found


def _row(name: str) -> Adapter:
    row = adapter_for(_class(name))
    assert row is not None
    return row


def _build(name: str, dropout: float, dtype: torch.dtype, **settings: object) -> nn.Module:
    cls = _class(name)
    of_text = name == "pp_formulanet.PPFormulaNetTextModel"
    config = transformers.PPFormulaNetTextConfig if of_text else cls.config_class
    given, of_dropout = SETTINGS.get(name.split(".")[0], (_SEQ2SEQ, "dropout"))
    torch.manual_seed(0)
    built = cls(config(**{**given, of_dropout: dropout, **settings}))
    with torch.no_grad():
        for parameter in built.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return built.to(dtype).train()


def _pair(
    name: str, dropout: float = 0.0, dtype: torch.dtype = torch.float32, **settings: object
) -> tuple[nn.Module, nn.Module]:
    stock = _build(name, dropout, dtype, **settings)
    patched = copy.deepcopy(stock)
    entry = ek.patch(patched, strict=True).entries[0]
    assert (entry.path, entry.status) == ("", "patched"), entry
    assert fused.is_fused(patched)
    return stock, patched


def _ids() -> torch.Tensor:
    ids = torch.randint(4, VOCAB, (3, 2 * WINDOW))
    ids[:, :2] = 5
    return ids


def _first(output):
    """The last hidden state, or what a model with a head of its own gives."""
    return output.last_hidden_state if "last_hidden_state" in output else output.logits


def _run(model, **call):
    torch.manual_seed(1)
    output = _first(model(**call))
    model.zero_grad()
    torch.manual_seed(2)
    output.backward(torch.randn(output.shape).to(output))
    return output.detach(), {key: p.grad for key, p in model.named_parameters() if p.grad is not None}


def _exact(model, **call):
    """Run a copy in float64. XGLM makes a tensor of the default dtype that has to hold float64's least number."""
    torch.set_default_dtype(torch.float64)
    try:
        output, gradients = _run(copy.deepcopy(model).double(), **call)
        return output, {key: gradient.double() for key, gradient in gradients.items()}  # a router's is float32
    finally:
        torch.set_default_dtype(torch.float32)


def _fused(model, **call):
    """Run without a warning, which a call that runs stock would give."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="embedkernels")
        return _run(model, **call)


def test_every_row_has_a_class_here():
    assert {_row(name).example for name in FOUND} == {row.example for row in ADAPTERS if row.recipe == "inline"}


@BY_NAME
def test_the_row_says_whether_tokens_are_scaled(name):
    patched, row = _pair(name)[1], _row(name)
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
    _, exact = _exact(stock, input_ids=ids)
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
    row = _row(name)
    table, gradient = patched._modules[row.tokens], gradients[f"{row.tokens}.weight"]
    assert torch.count_nonzero(gradient[5])
    assert bool(torch.count_nonzero(gradient[1])) == (table.padding_idx is None)


@BY_NAME
def test_embeddings_given_run_stock(name):
    stock, patched = (model.eval() for model in _pair(name))
    embeds = torch.randn(3, 2 * WINDOW, WIDTH)
    with pytest.warns(UserWarning, match="inputs_embeds is given"):
        output = _first(patched(inputs_embeds=embeds))
    assert torch.equal(output, _first(stock(inputs_embeds=embeds)))


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


@pytest.mark.parametrize("name", [name for name in FOUND if not name.endswith(ENCODERS)])
def test_a_cache_is_continued_at_its_position(name):
    stock, patched = _pair(name)
    first, second = _ids()[:, :5], _ids()[:, :3]
    outputs = []
    for model in (stock.eval(), patched.eval()):
        before = model(first, use_cache=True)
        outputs.append(_first(model(second, past_key_values=before.past_key_values, use_cache=True)))
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


@pytest.mark.parametrize(
    "name",
    [
        "BartForConditionalGeneration",
        "BigBirdPegasusForConditionalGeneration",
        "BioGptForCausalLM",
        "BlenderbotForConditionalGeneration",
        "BlenderbotSmallForConditionalGeneration",
        "LEDForConditionalGeneration",
        "M2M100ForConditionalGeneration",
        "MBartForConditionalGeneration",
        "MT5ForConditionalGeneration",
        "MarianMTModel",
        "MvpForConditionalGeneration",
        "OPTForCausalLM",
        "PLBartForConditionalGeneration",
        "PegasusForConditionalGeneration",
        "T5ForConditionalGeneration",
        "XGLMForCausalLM",
    ],
)
def test_generation_equals_stock(name):
    cls = getattr(transformers, name)
    settings, _ = SETTINGS.get(cls.__module__.split(".")[2], (_SEQ2SEQ, ""))
    torch.manual_seed(0)
    stock = cls(cls.config_class(**settings)).eval()
    patched = copy.deepcopy(stock)
    report = ek.patch(patched, strict=True)
    assert any(e.status == "patched" and ("->" in e.now or "+" in e.now) for e in report.entries)
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

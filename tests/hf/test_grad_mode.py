"""What the gradients of a patched model's tables are: by the options of a table, and by patch's grad_mode."""

from __future__ import annotations

import copy
import json
import pickle
import warnings
from collections.abc import Iterator

import pytest
import torch
import transformers
from torch import Tensor, nn

import embedkernels as ek
from embedkernels.hf import describe, fused
from tests.contract import assert_within_contract
from tests.hf.models import VOCAB, build, padded, pair

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
MODES = pytest.mark.parametrize("grad_mode", ["dense", "accumulate"])


def _llama(dtype: torch.dtype = torch.float32) -> nn.Module:
    config = build("llama").config
    config.tie_word_embeddings = True
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).to(dtype)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    return model


def _t5(dtype: torch.dtype = torch.float32) -> nn.Module:
    """One table for the encoder, the decoder and the head."""
    config = transformers.T5Config(
        vocab_size=VOCAB, d_model=32, d_kv=16, d_ff=48, num_layers=1, num_heads=2, dropout_rate=0.0,
        decoder_start_token_id=0, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.T5ForConditionalGeneration(config).to(dtype)
    assert model.lm_head.weight is model.encoder.embed_tokens.weight is model.decoder.embed_tokens.weight
    return model


def _gemma() -> nn.Module:
    config = transformers.GemmaConfig(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=32, head_dim=16,
    )  # fmt: skip
    return transformers.GemmaModel(config)


def _batches(count: int) -> Iterator[dict[str, Tensor]]:
    for seed in range(count):
        torch.manual_seed(seed)
        batch = padded()
        batch["input_ids"][:, :2] = 5  # met often: its gradient is a long sum
        yield {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}


def _gradients(model: nn.Module, batches: int = 2) -> dict[str, Tensor]:
    """Of several backward passes, as with gradient accumulation."""
    for batch in _batches(batches):
        model(**batch).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("make", [_llama, _t5])
@MODES
@DTYPES
def test_a_table_that_is_tied_to_its_head_has_the_gradient_of_stock(make, grad_mode, dtype):
    stock = make(dtype)
    patched = copy.deepcopy(stock)
    report = ek.patch(patched, grad_mode=grad_mode)
    assert {e.grad_mode for e in report.entries if e.ops and e.part == "embeddings"} == {grad_mode}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="embedkernels")
        ours = _gradients(patched)
    theirs, exact = _gradients(stock), _gradients(copy.deepcopy(stock).double())
    exact = {key: grad.double() for key, grad in exact.items()}
    assert ours.keys() == theirs.keys()
    for key in ours:
        assert_within_contract(ours[key], theirs[key], exact[key], key)


def test_the_gradient_is_added_to_the_tensor_that_is_there():
    model = _llama()
    ek.patch(model, grad_mode="accumulate")
    weight = model.lm_head.weight
    weight.grad = torch.zeros_like(weight)
    kept = weight.grad
    _gradients(model, 1)
    assert weight.grad is kept
    assert torch.count_nonzero(kept[5])


@pytest.mark.parametrize(
    ("make", "dense"),
    [(lambda: build("llama"), []), (lambda: build("bert"), ["embeddings"]), (_gemma, ["embed_tokens"])],
    ids=["lookup", "several steps", "scaled"],
)
def test_the_report_names_the_mode_and_what_keeps_dense_gradients(make, dense):
    model = make()
    report = ek.patch(model, grad_mode="accumulate")
    entries = [entry for entry in report.entries if entry.part == "embeddings"]
    modes = {"dense"} if dense else {"accumulate"}
    assert {entry.grad_mode for entry in entries} == modes
    assert [entry.path for entry in entries if entry.grad_mode == "dense"] == dense
    assert ("its gradients stay dense" in str(report)) == bool(dense)
    assert ("token (grad_mode=accumulate)" in str(report)) == (not dense)
    assert any(fused.ACCUMULATES in module.__dict__ for module in model.modules()) == (not dense)
    assert {entry.grad_mode for entry in describe(model).entries if entry.part == "embeddings"} == modes
    said = json.loads(json.dumps(report.to_dict()))["entries"]
    assert [entry["grad_mode"] for entry in said] == [entry.grad_mode for entry in report.entries]


def test_the_mode_belongs_to_the_patch():
    """Copies have it, unpatch takes it away, and a table that was patched before keeps what it had."""
    model = build("llama")
    table, names = model.embed_tokens, set(model.embed_tokens.__dict__)
    ek.patch(model, grad_mode="accumulate")
    assert table.grad_mode == "accumulate"
    assert copy.deepcopy(model).embed_tokens.grad_mode == "accumulate"
    assert pickle.loads(pickle.dumps(model)).embed_tokens.grad_mode == "accumulate"
    ek.patch(model, grad_mode="dense")
    assert table.grad_mode == "accumulate"
    ek.unpatch(model)
    assert set(table.__dict__) == names
    ek.patch(model)
    assert table.grad_mode == "dense"
    entry = ek.patch(model, grad_mode="accumulate").entries[0]
    assert table.grad_mode == entry.grad_mode == "dense"
    assert entry.reason == "its gradient stays dense, as it was before: set grad_mode on it"
    table.grad_mode = "accumulate"
    entry = ek.patch(model, grad_mode="accumulate").entries[0]
    assert (entry.grad_mode, entry.reason) == ("accumulate", "")
    ek.unpatch(model)
    assert set(table.__dict__) == names


def test_a_table_that_was_fused_by_hand_keeps_its_mode():
    model = build("llama")
    model.set_input_embeddings(ek.FusedEmbedding(VOCAB, 32, grad_mode="accumulate"))
    assert ek.patch(model).entries[0].now == "token (grad_mode=accumulate)"
    ek.unpatch(model)
    assert model.embed_tokens.grad_mode == "accumulate"


@pytest.mark.parametrize("wrong", ["rows", "sum", None])
def test_a_mode_that_patch_does_not_set_is_a_value_error(wrong):
    model = build("llama")
    with pytest.raises(ValueError, match="patch: grad_mode must be dense or accumulate, got"):
        ek.patch(model, grad_mode=wrong)
    assert not fused.is_fused(model.embed_tokens)


@pytest.mark.parametrize("option", ["scale_grad_by_freq", "sparse"])
@pytest.mark.parametrize("before", [True, False])
@DTYPES
def test_options_of_a_table_that_is_looked_up_are_fused(option, before, dtype):
    """Set before patch or after it."""
    stock = build("llama", dtype=dtype)
    if before:
        setattr(stock.embed_tokens, option, True)
    patched = copy.deepcopy(stock)
    ek.patch(patched)
    for model in (stock, patched):
        setattr(model.embed_tokens, option, True)
    entry = ek.patch(patched, grad_mode="accumulate").entries[0]
    assert entry.grad_mode == ("rows" if option == "sparse" else "dense")
    exactly = copy.deepcopy(stock).double()
    tables = []
    for model in (stock, patched, exactly):
        torch.manual_seed(3)
        batch = padded()
        batch["input_ids"][:, :2] = 5
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="embedkernels")
            output = model(**batch).last_hidden_state
        output.backward(torch.randn(output.shape).to(output))
        tables.append(model.embed_tokens.weight.grad)
    assert all(table.is_sparse == (option == "sparse") for table in tables)
    theirs, ours, exact = (table.to_dense() for table in tables)
    assert_within_contract(ours, theirs, exact, option)


def test_a_sparse_table_has_gradients_of_rows_whatever_patch_was_asked_for():
    model = build("llama")
    model.embed_tokens.sparse = True
    entry = ek.patch(model, grad_mode="accumulate").entries[0]
    assert (entry.grad_mode, entry.now) == ("rows", "token (grad_mode=rows)")
    assert entry.reason == "its gradient stays rows, as sparse is set"
    ek.unpatch(model)
    assert model.embed_tokens.sparse


def test_max_norm_runs_the_stock_lookup():
    stock, patched = pair("llama")
    for model in (stock, patched):
        model.embed_tokens.max_norm = 0.5
    inputs = padded()
    with pytest.warns(UserWarning, match=r"nn.Embedding runs its stock forward: it uses max_norm$"):
        output = patched(**inputs).last_hidden_state
    assert torch.equal(output, stock(**inputs).last_hidden_state)
    assert torch.equal(patched.embed_tokens.weight, stock.embed_tokens.weight)  # changed in place
    entry = ek.patch(patched, grad_mode="accumulate").entries[0]
    assert (entry.status, entry.grad_mode) == ("falls back", None)


@pytest.mark.parametrize("option", ["scale_grad_by_freq", "sparse"])
def test_a_scaled_table_with_such_options_runs_stock(option):
    model = _gemma()
    ek.patch(model)
    setattr(model.embed_tokens, option, True)
    with pytest.warns(UserWarning, match="max_norm, scale_grad_by_freq or sparse"):
        model.embed_tokens(torch.tensor([[5, 6]])).sum().backward()
    assert model.embed_tokens.weight.grad.is_sparse == (option == "sparse")


def test_nested_ids_run_the_stock_lookup():
    stock, patched = pair("llama")
    ids = torch.nested.nested_tensor([torch.tensor([5, 6]), torch.tensor([7])], layout=torch.jagged)
    with pytest.warns(UserWarning, match="its ids are a nested tensor"):
        output = patched.embed_tokens(ids)
    assert torch.equal(output.values(), stock.embed_tokens(ids).values())

"""Tables that multiply their rows: the factor is stock's, rounded as stock rounds it, and read once."""

from __future__ import annotations

import copy
import importlib
import pickle
import warnings

import pytest
import torch
import transformers
from torch import nn

import embedkernels as ek
from embedkernels.hf import fused, state
from embedkernels.hf.adapters import adapter_for
from embedkernels.hf.coverage import models_folder
from tests.contract import assert_within_contract


def _classes() -> dict[str, type[nn.Module]]:
    """Every class of the installed transformers that multiplies its rows and has a row."""
    found = {}
    for file in sorted(models_folder().glob("*/modeling_*.py")):
        if "ScaledWordEmbedding(nn.Embedding)" not in file.read_text(encoding="utf-8"):
            continue
        module = importlib.import_module(f"transformers.models.{file.parent.name}.{file.stem}")
        for name, cls in vars(module).items():
            row = adapter_for(cls) if name.endswith("ScaledWordEmbedding") else None
            if row is not None and row.recipe == "scaled":
                found[f"{file.parent.name}.{name}"] = cls
    return found


CLASSES = _classes()
NUMBERED = "bart.BartScaledWordEmbedding"
BUFFERED = "gemma3.Gemma3TextScaledWordEmbedding"
# Rounded to bfloat16 it is another number.
SCALE = 2560**0.5


def _pair(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    stock = CLASSES[name](60, 32, 1, embed_scale=SCALE).to(dtype)
    patched = copy.deepcopy(stock)
    assert ek.patch(patched, strict=True).entries[0].now == "scale * token"
    return stock, patched


def _run(table: nn.Module, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    table.zero_grad()
    output = table(ids)
    torch.manual_seed(2)
    output.backward(torch.randn(output.shape).to(output))
    return output.detach(), table.weight.grad


def _ids() -> torch.Tensor:
    ids = torch.randint(2, 60, (3, 9))
    ids[:, :3], ids[1, 5] = 5, 1
    return ids


def test_the_classes_are_those_of_both_kinds():
    assert {NUMBERED, BUFFERED} <= CLASSES.keys()
    assert len(CLASSES) >= 23


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_are_bit_equal_and_gradients_keep_the_contract(name, dtype):
    stock, patched = _pair(name, dtype)
    ids = _ids()
    expected, theirs = _run(stock, ids)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        output, ours = _run(patched, ids)
    assert torch.equal(output, expected)
    _, exact = _run(copy.deepcopy(stock).double(), ids)
    assert_within_contract(ours, theirs, exact, "weight")
    assert torch.count_nonzero(ours[1]) == 0


@pytest.mark.parametrize("name", [NUMBERED, BUFFERED])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernels_round_the_factor_as_stock_does(name, dtype, device):
    stock, patched = (table.to(device) for table in _pair(name, dtype))
    ids = _ids().to(device)
    expected, theirs = _run(stock, ids)
    with ek.use_backend("triton"):
        output, ours = _run(patched, ids)
    assert torch.equal(output, expected)
    _, exact = _run(copy.deepcopy(stock).double(), ids)
    assert_within_contract(ours, theirs, exact, "weight")


def test_the_buffer_is_read_once_and_again_after_a_change(monkeypatch):
    reads = []
    read = state._read_scale
    monkeypatch.setattr(state, "_read_scale", lambda *args: (reads.append(1), read(*args))[1])
    stock, patched = _pair(BUFFERED)
    ids = _ids()
    for _ in range(3):
        assert torch.equal(patched(ids), stock(ids))
    assert len(reads) == 1
    for table in (stock, patched):
        table.embed_scale.mul_(3)
    assert torch.equal(patched(ids), stock(ids))
    for table in (stock, patched):
        table.embed_scale = torch.tensor(2.5)
    assert torch.equal(patched(ids), stock(ids))
    for table in (stock, patched):
        table.bfloat16()
    assert torch.equal(patched(ids), stock(ids))
    assert len(reads) == 4
    for _ in range(2):
        assert torch.equal(patched(ids), stock(ids))
    assert len(reads) == 4


def test_a_number_that_is_changed_is_used():
    stock, patched = _pair(NUMBERED)
    ids = _ids()
    for table in (stock, patched):
        table.embed_scale = 3
    assert torch.equal(patched(ids), stock(ids))


@pytest.mark.parametrize("scale", [nn.Parameter(torch.tensor(2.0)), torch.full((32,), 2.0)])
def test_a_factor_that_is_not_one_number_runs_stock(scale):
    stock, patched = _pair(BUFFERED)
    ids = _ids()
    for table in (stock, patched):
        del table.embed_scale
        table.embed_scale = scale
    with pytest.warns(UserWarning, match="embed_scale is neither a number nor a buffer of one element"):
        assert torch.equal(patched(ids), stock(ids))


@pytest.mark.parametrize("name", [NUMBERED, BUFFERED])
def test_hooks_on_the_table_see_its_output(name):
    stock, patched = _pair(name)
    seen = []

    def see(module, args, output):
        seen.append(output)

    patched.register_forward_hook(see)
    output = patched(ids := _ids())
    assert seen[0] is output
    assert torch.equal(output, stock(ids))


@pytest.mark.parametrize("name", [NUMBERED, BUFFERED])
def test_copies_stay_patched_and_can_be_unpatched(name):
    stock, patched = _pair(name)
    ids = _ids()
    patched(ids)
    for made in (copy.deepcopy(patched), pickle.loads(pickle.dumps(patched))):
        assert fused.is_fused(made)
        assert torch.equal(made(ids), stock(ids))
        ek.unpatch(made)
        assert type(made) is type(stock)
        assert torch.equal(made(ids), stock(ids))


@pytest.mark.parametrize("name", [NUMBERED, BUFFERED])
def test_torch_compile_takes_the_whole_graph(name):
    stock, patched = _pair(name)
    compiled = torch.compile(patched, fullgraph=True, backend="aot_eager")
    ids = _ids()
    assert torch.equal(compiled(ids), stock(ids))
    torch.compiler.reset()


def test_options_of_the_table_that_no_kernel_has_run_stock():
    stock, patched = _pair(BUFFERED)
    stock.max_norm = patched.max_norm = 0.5
    ids = _ids()
    with pytest.warns(UserWarning, match=r"Gemma3TextScaledWordEmbedding runs its stock forward: it uses max_norm"):
        assert torch.equal(patched(ids), stock(ids))


def test_gemma_trains_as_stock():
    config = transformers.GemmaConfig(
        vocab_size=60,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        intermediate_size=32,
    )
    torch.manual_seed(0)
    stock = transformers.GemmaForCausalLM(config).bfloat16()
    patched = copy.deepcopy(stock)
    entry = ek.patch(patched, strict=True).entries[0]
    assert (entry.path, entry.was, entry.now) == (
        "model.embed_tokens",
        "GemmaTextScaledWordEmbedding",
        "scale * token",
    )
    ids = _ids()
    results = [model(ids, labels=ids) for model in (stock, patched)]
    assert torch.equal(results[0].logits, results[1].logits)
    for result in results:
        result.loss.backward()
    for (key, theirs), ours in zip(stock.named_parameters(), patched.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=2e-2, atol=1e-3, msg=lambda t, k=key: f"{k}: {t}")

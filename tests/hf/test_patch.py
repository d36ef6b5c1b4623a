"""Patching changes classes and an attention name, and nothing that a user, a checkpoint or a library can see."""

import copy
import io
import json
import os
import pickle
import subprocess
import sys

import pytest
import torch
import transformers
from torch import nn

import embedkernels as ek
from embedkernels.hf import describe, fused
from embedkernels.hf.adapters import ADAPTERS
from embedkernels.hf.report import PatchReport
from tests.hf.models import FUSED, MODELS, ROTARY, TURNED, VOCAB, build, ids, padded, pair

BY_NAME = pytest.mark.parametrize("name", MODELS)


def _facts(model):
    """What must not change: names, order and identity of parameters and buffers, hooks, repr, classes by name."""
    return {
        "parameters": [(name, id(p)) for name, p in model.named_parameters()],
        "buffers": [(name, id(b)) for name, b in model.named_buffers()],
        "state": list(model.state_dict()),
        "modules": [(name, type(m).__name__, type(m).__module__) for name, m in model.named_modules()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        "repr": repr(model),
    }


@BY_NAME
def test_nothing_visible_changes_and_unpatch_restores_everything(name):
    model = build(name)
    before, classes = _facts(model), [type(m) for m in model.modules()]
    attributes = [dict(m.__dict__) for m in model.modules()]
    config = model.config.to_json_string()
    report = ek.patch(model, strict=True)
    assert _facts(model) == before
    assert model.config.to_json_string() == config
    assert model.config._attn_implementation == "embedkernels"
    changed = [n for n, m in model.named_modules() if fused.is_fused(m)]
    assert changed == [FUSED[name], *([TURNED[name]] if name in TURNED else [])]
    assert all(isinstance(m, cls) for m, cls in zip(model.modules(), classes, strict=True))
    assert report.active
    ek.unpatch(model)
    assert [type(m) for m in model.modules()] == classes
    assert [m.__dict__.keys() for m in model.modules()] == [a.keys() for a in attributes]
    assert model.config._attn_implementation == "sdpa"
    assert _facts(model) == before


@BY_NAME
def test_an_unpatched_model_computes_what_stock_computes(name):
    stock, patched = pair(name, dropout=0.1)
    ek.unpatch(patched)
    outputs = []
    for model in (stock, patched):
        torch.manual_seed(3)
        outputs.append(model(**padded_once()).last_hidden_state)
    assert torch.equal(*outputs)


def padded_once():
    torch.manual_seed(9)
    inputs = padded()
    torch.manual_seed(3)
    return inputs


@BY_NAME
def test_patching_twice_changes_nothing_and_says_so(name):
    model = build(name)
    first = ek.patch(model)
    classes = [type(m) for m in model.modules()]
    second = ek.patch(model, strict=True)
    assert {entry.status for entry in first.entries} == {"patched"}
    assert {entry.status for entry in second.entries} == {"already"}
    assert [(e.path, e.part, e.was, e.now) for e in first.entries] == [
        (e.path, e.part, e.was, e.now) for e in second.entries
    ]
    assert [type(m) for m in model.modules()] == classes
    ek.unpatch(model)
    assert model.config._attn_implementation == "sdpa"


def test_unpatching_what_is_not_patched_is_nothing():
    model = build("bert")
    model.set_attn_implementation("eager")
    before = _facts(model)
    ek.unpatch(model)
    ek.unpatch(nn.Linear(2, 2))
    assert _facts(model) == before
    assert model.config._attn_implementation == "eager"


def test_an_attention_set_by_hand_is_not_undone():
    model = build("bert")
    model.set_attn_implementation("embedkernels")
    assert ek.patch(model).entries[1].status == "already"
    ek.unpatch(model)
    assert model.config._attn_implementation == "embedkernels"


def test_an_embedding_fused_by_hand_is_not_undone():
    model = build("llama")
    table = ek.FusedEmbedding(VOCAB, 32, padding_idx=1)
    model.set_input_embeddings(table)
    assert ek.patch(model).entries[0].status == "already"
    ek.unpatch(model)
    assert type(model.embed_tokens) is ek.FusedEmbedding


@pytest.mark.parametrize(("embeddings", "attention"), [(True, False), (False, True), (False, False)])
def test_the_parts_can_be_patched_alone(embeddings, attention):
    model = build("bert")
    report = ek.patch(model, embeddings=embeddings, attention=attention)
    assert fused.is_fused(model.embeddings) == embeddings
    assert (model.config._attn_implementation == "embedkernels") == attention
    assert [e.part for e in report.entries] == ["embeddings"] * embeddings + ["attention"] * attention


@pytest.mark.parametrize("part", ["bert", "embeddings"])
def test_part_of_a_patched_model_can_be_unpatched(part):
    model = transformers.BertForSequenceClassification(build("bert").config)
    ek.patch(model)
    ek.unpatch(model.bert if part == "bert" else model.bert.embeddings)
    assert not fused.is_fused(model.bert.embeddings)
    assert model.config._attn_implementation == ("sdpa" if part == "bert" else "embedkernels")
    ek.unpatch(model)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "distilbert"])
def test_eager_attention_was_chosen_and_stays(name):
    """transformers sets eager only where it is told to; it alone gives attention weights."""
    model = build(name)
    model.set_attn_implementation("eager")
    stock = copy.deepcopy(model)
    (entry,) = (entry for entry in ek.patch(model).entries if entry.part == "attention")
    assert entry.status == "left alone"
    assert "eager was chosen" in entry.reason
    assert 'model.set_attn_implementation("sdpa") before patch' in entry.reason
    inputs = padded()
    ours, theirs = (one(**inputs, output_attentions=True).attentions for one in (model, stock))
    assert len(theirs) == 1
    assert torch.equal(ours[0], theirs[0])
    model.config.output_attentions = True
    assert model(**inputs).attentions[0] is not None
    ek.unpatch(model)
    assert model.config._attn_implementation == "eager"


def test_the_remedy_for_eager_attention_is_one():
    model = build("bert")
    model.set_attn_implementation("eager")
    ek.patch(model)
    model.set_attn_implementation("sdpa")
    assert ek.patch(model).entries[1].status == "patched"


def test_a_class_without_sdpa_is_given_no_remedy(monkeypatch):
    model = build("bert")
    model.set_attn_implementation("eager")
    monkeypatch.setattr(type(model), "_supports_sdpa", False)
    assert "set_attn_implementation" not in ek.patch(model).entries[1].reason


def test_attention_chosen_by_name_stays():
    model = build("bert")
    model.set_attn_implementation("flex_attention")
    entry = ek.patch(model).entries[1]
    assert (entry.status, entry.reason) == ("left alone", "flex_attention was chosen by name")


def test_an_unsupported_model_warns_or_raises_and_is_not_changed():
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=8, patch_size=4
    )
    for model in (transformers.ViTModel(config), nn.Sequential(nn.Linear(4, 4))):
        before = _facts(model)
        with pytest.warns(UserWarning, match=rf"nothing to patch in {type(model).__name__}"):
            report = ek.patch(model)
        assert not report.active
        assert {entry.status for entry in report.entries} <= {"left alone"}
        assert all(entry.reason for entry in report.entries)
        with pytest.raises(ValueError, match=rf"{type(model).__name__}.*every nn.Embedding.* BERT, .*GPT-2, Llama"):
            ek.patch(model, strict=True)
        assert _facts(model) == before


@pytest.mark.parametrize("function", [ek.patch, ek.unpatch, describe])
@pytest.mark.parametrize("wrong", ["bert-base-uncased", None, transformers.BertModel])
def test_what_is_no_module_is_a_type_error(function, wrong):
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got (str|NoneType|type)"):
        function(wrong)


def test_the_report_says_what_runs_where_and_why(device):
    model = transformers.BertForSequenceClassification(build("bert").config)
    report = ek.patch(model)
    assert isinstance(report, PatchReport)
    text = str(report)
    for words in (
        "BertForSequenceClassification",
        "bert.embeddings",
        "BertEmbeddings",
        "sdpa",
        "embedkernels",
        "patched",
    ):
        assert words in text
    assert "token + type + position -> norm -> dropout" in text
    assert "embed on cpu runs on torch: no Triton on cpu" in text
    assert "attention on cpu runs on torch" in text
    assert all(len(line) < 200 for line in text.splitlines())
    data = json.loads(json.dumps(report.to_dict()))
    assert data["model"] == "BertForSequenceClassification"
    assert data["active"] is True
    embeddings, attention = data["entries"]
    assert [op["op"] for op in embeddings["ops"]] == ["embed", "embedding_grad"]
    assert attention["was"] == "sdpa"
    assert attention["ops"][0]["backend"] == "torch"
    model.to(device)
    with ek.use_backend("triton"):
        entries = ek.patch(model).entries
        assert [entry.ops[0].backend for entry in entries] == ["triton", "triton"]
        model.double()
        entries = ek.patch(model).entries
        assert [entry.ops[0].backend for entry in entries] == ["torch", "torch"]
        assert all("float64" in entry.ops[0].reason for entry in entries)
        wide = transformers.BertConfig(hidden_size=144, num_attention_heads=1, num_hidden_layers=1)
        assert (
            ek.patch(transformers.BertModel(wide).to(device))
            .entries[1]
            .ops[0]
            .reason.endswith("heads of 16 to 128, not 144")
        )


def test_describe_changes_nothing():
    model = build("bert")
    before, classes = _facts(model), [type(m) for m in model.modules()]
    report = describe(model)
    assert not report.active
    assert [entry.reason for entry in report.entries] == ["not patched", "not patched"]
    assert _facts(model) == before
    assert [type(m) for m in model.modules()] == classes
    ek.patch(model)
    assert describe(model) == ek.patch(model)


def test_tables_that_no_row_covers_are_looked_up_or_listed():
    class Own(nn.Embedding):
        def forward(self, input):
            return super().forward(input) + 1

    model = build("llama")
    model.extra, model.bias, model.own = nn.Embedding(3, 16), nn.Embedding(3, 4), Own(3, 16)
    entries = {entry.path: entry for entry in ek.patch(model).entries if entry.part == "embeddings"}
    assert {path: entry.status for path, entry in entries.items()} == {
        "embed_tokens": "patched",
        "extra": "patched",
        "bias": "left alone",
        "own": "left alone",
    }
    assert entries["bias"].reason == "rows of 4 elements are too short to gain by it"
    assert entries["own"].reason == "a Own, not an nn.Embedding, and its forward has no row"


def test_a_model_of_no_family_is_patched_in_its_tables_and_keeps_its_attention():
    config = transformers.OlmoConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=32,
    )
    stock = transformers.OlmoModel(config)
    patched = copy.deepcopy(stock)
    entries = ek.patch(patched, strict=True).entries
    assert [(e.path, e.part, e.status) for e in entries] == [
        ("embed_tokens", "embeddings", "patched"),
        ("layers.0.self_attn", "rotary", "patched"),
        ("", "attention", "left alone"),
    ]
    assert isinstance(patched.embed_tokens, ek.FusedEmbedding)
    input_ids = ids()
    assert torch.equal(patched(input_ids).last_hidden_state, stock(input_ids).last_hidden_state)
    ek.unpatch(patched)
    assert type(patched.embed_tokens) is nn.Embedding


def test_t5_is_patched_where_it_looks_tokens_up_but_not_in_its_attention_biases():
    config = transformers.T5Config(vocab_size=VOCAB, d_model=32, d_kv=16, d_ff=48, num_layers=1, num_heads=2)
    torch.manual_seed(0)
    stock = transformers.T5ForConditionalGeneration(config).eval()
    patched = copy.deepcopy(stock)
    report = ek.patch(patched, strict=True)
    statuses = {entry.path: entry.status for entry in report.entries if entry.part == "embeddings"}
    assert {path for path, status in statuses.items() if status == "patched"} == {
        "shared",
        "encoder",
        "decoder",
    }
    assert {path.split(".")[-1] for path, status in statuses.items() if status == "left alone"} == {
        "relative_attention_bias"
    }
    inputs = padded()
    results = [model(**inputs, decoder_input_ids=inputs["input_ids"]).logits for model in (stock, patched)]
    assert torch.equal(*results)
    upstream = torch.randn(results[0].shape)
    for result in results:
        result.backward(upstream)
    for (key, theirs), ours in zip(stock.named_parameters(), patched.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, msg=lambda text, k=key: f"{k}: {text}")


@BY_NAME
@pytest.mark.parametrize("how", ["pickle", "deepcopy", "torch.save", "pickle protocol 2"])
def test_copies_stay_patched_and_can_be_unpatched(name, how):
    stock, patched = pair(name)
    if how == "deepcopy":
        made = copy.deepcopy(patched)
    elif how == "torch.save":
        buffer = io.BytesIO()
        torch.save(patched, buffer)
        made = torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
    else:
        made = pickle.loads(pickle.dumps(patched, protocol=2 if how.endswith("2") else None))
    assert [type(m) for m in made.modules()] == [type(m) for m in patched.modules()]
    inputs = padded()
    assert torch.equal(made(**inputs).last_hidden_state, patched(**inputs).last_hidden_state)
    ek.unpatch(made)
    assert [type(m) for m in made.modules()] == [type(m) for m in stock.modules()]
    assert made.config._attn_implementation == "sdpa"
    assert patched.config._attn_implementation == "embedkernels"


def _python(code, argument):
    """Run code in a fresh process with the modules of this one importable and as many threads.

    How a sum is split between threads decides its last bits.
    """
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(torch.get_num_threads()))
    environment = os.environ | threads | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code, str(argument)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_a_pickle_is_loaded_by_a_process_that_has_imported_nothing(tmp_path):
    """Each kind of patch brings along what it needs: the first pickle loaded must not help the second."""
    inputs = {"input_ids": ids()}
    for embeddings in (True, False):
        model = build("gpt2")
        ek.patch(model, embeddings=embeddings, attention=not embeddings)
        saved = (model, inputs, model(**inputs).last_hidden_state.detach(), torch.get_num_threads())
        torch.save(saved, tmp_path / f"{embeddings}.pt")
    code = (
        "import os, sys, torch\n"
        "path = sys.argv[1] + ('/False.pt' if os.fork() else '/True.pt')\n"
        "model, inputs, expected, threads = torch.load(path, weights_only=False)\n"
        "assert torch.get_num_threads() == threads\n"
        "assert torch.equal(model(**inputs).last_hidden_state, expected)\n"
        "if path.endswith('/False.pt'): assert os.wait()[1] == 0, 'the other process failed'"
    )
    _python(code, tmp_path)


@BY_NAME
def test_a_saved_folder_is_the_one_that_stock_saves(name, tmp_path):
    stock, patched = pair(name)
    stock.save_pretrained(tmp_path / "stock")
    patched.save_pretrained(tmp_path / "patched")
    files = sorted(path.name for path in (tmp_path / "stock").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "patched").iterdir())
    for file in files:
        assert (tmp_path / "stock" / file).read_bytes() == (tmp_path / "patched" / file).read_bytes(), file
    loaded = type(stock).from_pretrained(tmp_path / "patched")
    assert loaded.config._attn_implementation == "sdpa"
    assert not any(fused.is_fused(m) for m in loaded.modules())
    ek.patch(loaded.train())
    inputs = padded()
    assert torch.equal(loaded(**inputs).last_hidden_state, stock(**inputs).last_hidden_state)


def test_a_saved_folder_is_loaded_without_embedkernels(tmp_path):
    model = transformers.GPT2LMHeadModel(build("gpt2").config)
    ek.patch(model)
    model.save_pretrained(tmp_path)
    code = (
        "import sys; sys.modules['embedkernels'] = None; import torch, transformers; "
        "model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1]); "
        "model.generate(torch.tensor([[5, 6]]), max_new_tokens=2)"
    )
    _python(code, tmp_path)


def test_without_transformers_the_package_works_and_patch_says_what_is_missing():
    code = (
        "import sys; sys.modules['transformers'] = None; import embedkernels as ek\n"
        "try: ek.patch\n"
        "except ImportError as error: assert 'transformers >= 5.17' in str(error), error\n"
        "else: raise AssertionError"
    )
    _python(code, "")


def test_a_state_dict_goes_both_ways():
    stock, patched = build("bert"), build("bert")
    ek.patch(patched)
    patched.load_state_dict(stock.state_dict())
    inputs = padded()
    assert torch.equal(patched(**inputs).last_hidden_state, stock(**inputs).last_hidden_state)
    build("bert").load_state_dict(patched.state_dict())


@pytest.mark.parametrize(
    ("cls", "name"),
    [
        (transformers.BertForMaskedLM, "bert"),
        (transformers.GPT2LMHeadModel, "gpt2"),
        (transformers.LlamaForCausalLM, "llama"),
    ],
)
def test_resized_and_tied_tables(cls, name):
    config = build(name).config
    config.tie_word_embeddings = True
    torch.manual_seed(0)
    stock = cls(config).eval()
    patched = copy.deepcopy(stock)
    ek.patch(patched, strict=True)
    for size in (VOCAB + 5, VOCAB - 3):
        for model in (stock, patched):
            torch.manual_seed(1)
            model.resize_token_embeddings(size)
            model.tie_weights()
        assert patched.get_input_embeddings().weight.shape[0] == size
        assert patched.get_output_embeddings().weight is patched.get_input_embeddings().weight
        assert {entry.status for entry in ek.patch(patched).entries} == {"already"}
        input_ids = torch.randint(4, size, (2, 5))
        input_ids[0, 0] = size - 1
        outputs = []
        for model in (stock, patched):
            model.zero_grad()
            output = model(input_ids, labels=input_ids)
            output.loss.backward()
            outputs.append(output)
        assert torch.equal(outputs[0].logits, outputs[1].logits)
        for (key, p), q in zip(stock.named_parameters(), patched.parameters(), strict=True):
            torch.testing.assert_close(q.grad, p.grad, msg=lambda text, k=key: f"{k}: {text}")
        with pytest.raises(IndexError, match=rf"token id {size} .*{size} rows"):
            patched(torch.tensor([[size]]))


def test_a_new_input_table_set_by_the_user_is_used():
    stock, patched = pair("bert")
    table = nn.Embedding(VOCAB + 10, 32)
    for model in (stock, patched):
        model.set_input_embeddings(copy.deepcopy(table))
    input_ids = torch.tensor([[VOCAB + 9, 5]])
    assert torch.equal(patched(input_ids).last_hidden_state, stock(input_ids).last_hidden_state)


def test_the_trainer_still_sees_the_arguments_of_forward():
    import inspect

    for name in MODELS:
        stock, patched = pair(name)
        assert inspect.signature(patched.forward) == inspect.signature(stock.forward)
        if name not in ROTARY:
            signatures = [inspect.signature(m.get_submodule(FUSED[name]).forward) for m in (stock, patched)]
            assert signatures[0] == signatures[1]


def test_a_model_of_two_models_is_patched_in_both():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = build("bert"), build("gpt2")

    model = Two()
    report = ek.patch(model, strict=True)
    assert [e.path for e in report.entries] == ["first.embeddings", "second", "first", "second"]
    assert model.first.config._attn_implementation == model.second.config._attn_implementation == "embedkernels"
    ek.unpatch(model)
    assert model.first.config._attn_implementation == model.second.config._attn_implementation == "sdpa"


def test_a_model_that_a_user_built_around_a_supported_one():
    class Own(transformers.PreTrainedModel):
        config_class = transformers.BertConfig
        _supports_sdpa = True

        def __init__(self, config):
            super().__init__(config)
            self.encoder = transformers.BertModel(config)
            self.post_init()

        def forward(self, **inputs):
            return self.encoder(**inputs)

    own = Own(build("bert").config)
    report = ek.patch(own, strict=True)
    assert [(e.path, e.status) for e in report.entries] == [("encoder.embeddings", "patched"), ("encoder", "patched")]
    assert torch.isfinite(own(input_ids=ids()).last_hidden_state).all()
    ek.unpatch(own)
    assert own.config._attn_implementation == "sdpa"


def test_data_parallel_replicas_are_of_the_fused_class():
    _, patched = pair("bert")
    assert type(patched.embeddings._replicate_for_data_parallel()) is type(patched.embeddings)


def test_there_is_one_fused_class_per_stock_class():
    first, second = build("roberta"), build("roberta")
    ek.patch(first)
    ek.patch(second)
    assert type(first.embeddings) is type(second.embeddings)
    with pytest.raises(ValueError, match="no adapter for"):
        fused.fused_class(nn.Linear)
    assert len({body for adapter in ADAPTERS for body in adapter.bodies}) == sum(
        len(adapter.bodies) for adapter in ADAPTERS
    )

"""Rotary functions of transformers: replaced by ``rope`` in patched modules alone, only where that is the same."""

from __future__ import annotations

import copy
import importlib
import io
import pickle
import warnings
from types import FunctionType, SimpleNamespace

import pytest
import torch
import transformers
from torch import nn

import embedkernels as ek
from embedkernels.hf import rotary
from embedkernels.hf.rotary import ROTATIONS, rotary_of
from embedkernels.ops import rope as rope_op
from tests.hf.models import build, ids, padded, pair

EVERY = pytest.mark.parametrize("row", ROTATIONS, ids=lambda row: row.example)
B, S, H, HKV, D, R = 2, 5, 3, 1, 16, 8


def _class(example: str) -> type[nn.Module]:
    model, name = example.split(".")
    return getattr(importlib.import_module(f"transformers.models.{model}.modeling_{model}"), name)


@pytest.fixture
def launches(monkeypatch):
    """How often ``rope`` has run."""
    counted = []

    def count(*args, **kwargs):
        counted.append(kwargs)
        return rope_op.rope(*args, **kwargs)

    monkeypatch.setattr(rotary, "rope", count)
    return counted


@pytest.fixture
def replacement():
    """The function that takes the place of a row's, made for this test."""

    def make(row):
        cls = _class(row.example)
        found = rotary_of(cls)
        module = importlib.import_module(cls.__module__)
        return getattr(module, found.name), rotary._replacement(found.name, module, found.rotation)

    return make


def _call(row, dtype, device, tables=None, order=1, width=None):
    """Arguments as the row's function takes them: q, k (or x), cos, sin."""
    width = width or (R if row.partial else D)
    columns = width // 2 if row.tables == "half" else width
    shape = (B, H, S, D) if order == 1 else (B, S, H, D)
    q = torch.randn(shape, device=device, dtype=dtype).requires_grad_()
    k = torch.randn((B, HKV, S, D) if order == 1 else (B, S, HKV, D), device=device, dtype=dtype).requires_grad_()
    angles = torch.randn(B, S, columns, device=device)
    if row.tables == "all":  # both elements of a pair have one angle
        half = angles[..., : columns // 2]
        angles = half.repeat_interleave(2, -1) if row.interleaved else torch.cat((half, half), -1)
    cos, sin = angles.cos().to(tables or dtype), angles.sin().to(tables or dtype)
    return q, k, cos, sin


def _run(row, function, q, k, cos, sin, order=1):
    """Outputs and gradients, in a list."""
    q, k = (x.detach().clone().requires_grad_() for x in (q, k))
    if row.takes == "gptj":
        outputs = [function(x, sin, cos) for x in (q, k)]
    elif row.takes == "one":
        outputs = [function(x, cos, sin, unsqueeze_dim=order) for x in (q, k)]
    else:
        outputs = list(function(q, k, cos, sin, unsqueeze_dim=order))
    generator = torch.Generator().manual_seed(3)
    upstream = [torch.randn(x.shape, generator=generator).to(x) for x in outputs]
    torch.autograd.backward(outputs, upstream)
    return [*(x.detach() for x in outputs), q.grad, k.grad]


def _order(row, order):
    return 2 if row.takes == "gptj" else order


@EVERY
@pytest.mark.parametrize("order", [1, 2])
def test_every_row_computes_what_its_function_does(row, order, replacement, launches, device):
    stock, fused = replacement(row)
    order = _order(row, order)
    call = _call(row, torch.float32, device, order=order)
    expected = _run(row, stock, *call, order)
    with ek.use_backend("triton"):
        got = _run(row, fused, *call, order)
    assert launches
    for theirs, ours in zip(expected, got, strict=True):
        assert ours.shape == theirs.shape
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


@EVERY
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_row_meets_the_contract_in_half_precision(row, dtype, replacement, launches, device):
    stock, fused = replacement(row)
    order = _order(row, 1)
    call = _call(row, dtype, device, order=order)
    truth = _run(row, stock, *(x.detach().double() for x in call), order)
    # Functions that compute in fp32 whatever they are given.
    if truth[0].dtype != torch.float64 or row.back:
        truth = _run(row, stock, *(x.detach().float() for x in call), order)
    theirs = _run(row, stock, *call, order)
    with ek.use_backend("triton"):
        ours = _run(row, fused, *call, order)
    assert launches
    for exact, stock_result, result in zip(truth, theirs, ours, strict=True):
        assert result.dtype == dtype
        error, allowed = ((x.double() - exact.double()).abs().max() for x in (result, stock_result))
        assert error <= 2 * allowed + 1e-6


@EVERY
def test_the_example_calls_the_function_of_the_row(row):
    found = rotary_of(_class(row.example))
    assert found is not None
    assert found.rotation == row


@pytest.mark.parametrize(
    ("example", "why"),
    [
        ("nanochat.NanoChatAttention", "no row"),  # Llama's function, around a rotate_half of other signs
        ("deepseek_v2.DeepseekV2Attention", "no row"),
        ("deepseek_v3.DeepseekV3Attention", "it calls"),
        ("deepseek_v32.DeepseekV32Indexer", "decorated"),
    ],
)
def test_other_functions_stay(example, why):
    found = rotary_of(_class(example))
    assert found.rotation is None
    assert why in found.why


@pytest.mark.parametrize("cls", [nn.Linear, transformers.BertModel, transformers.LlamaModel])
def test_a_class_without_rotary_positions_has_none(cls):
    assert rotary_of(cls) is None


def test_a_subclass_is_not_known():
    class Own(_class("llama.LlamaAttention")):
        pass

    assert rotary_of(Own) is None


SMALL = {
    "vocab_size": 60,
    "hidden_size": 32,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "intermediate_size": 48,
    "pad_token_id": 1,
    "bos_token_id": 3,
    "eos_token_id": 2,
}
FAMILIES = {
    "llama": lambda: transformers.LlamaModel(transformers.LlamaConfig(**SMALL, num_key_value_heads=1)),
    "modernbert": lambda: transformers.ModernBertModel(
        transformers.ModernBertConfig(**SMALL, cls_token_id=3, sep_token_id=2)
    ),
    "gpt_neox": lambda: transformers.GPTNeoXModel(transformers.GPTNeoXConfig(**SMALL)),
    "gptj": lambda: transformers.GPTJModel(
        transformers.GPTJConfig(vocab_size=60, n_embd=32, n_layer=2, n_head=2, rotary_dim=8, bos_token_id=3)
    ),
    "cohere": lambda: transformers.CohereModel(transformers.CohereConfig(**SMALL)),
    "glm": lambda: transformers.GlmModel(transformers.GlmConfig(**SMALL, head_dim=16, num_key_value_heads=1)),
    "olmo": lambda: transformers.OlmoModel(transformers.OlmoConfig(**SMALL)),
    "esm": lambda: transformers.EsmModel(transformers.EsmConfig(**SMALL, position_embedding_type="rotary")),
    "gpt_oss": lambda: transformers.GptOssModel(
        transformers.GptOssConfig(
            **SMALL, head_dim=16, num_key_value_heads=1, num_local_experts=2, num_experts_per_tok=2
        )
    ),
}


def _results(model, inputs, device):
    model.zero_grad()
    output = model(**{key: value.to(device) for key, value in inputs.items()})[0]
    torch.manual_seed(5)
    output.backward(torch.randn(output.shape).to(output))
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return output.detach(), gradients


@pytest.mark.parametrize("name", FAMILIES)
def test_models_compute_what_they_did(name, launches, device):
    torch.manual_seed(0)
    stock = FAMILIES[name]().eval().to(device)
    patched = copy.deepcopy(stock)
    report = ek.patch(patched, embeddings=False, attention=False)
    assert {(entry.part, entry.status) for entry in report.entries} == {("rotary", "patched")}
    assert len(report.entries) == 2
    inputs = padded()
    expected, theirs = _results(stock, inputs, device)
    if device.type == "cpu":
        output, ours = _results(patched, inputs, device)
        assert not launches
        assert torch.equal(output, expected)
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    with ek.use_backend("triton"):
        output, ours = _results(patched, inputs, device)
    assert launches
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(output.cpu()[real], expected.cpu()[real], rtol=1e-4, atol=1e-5)
    assert ours.keys() == theirs.keys()
    for key in theirs:
        torch.testing.assert_close(
            ours[key], theirs[key], rtol=1e-3, atol=1e-4, msg=lambda text, k=key: f"{k}: {text}"
        )


def test_other_models_and_the_module_are_not_touched(launches):
    stock, patched = pair("llama")
    module = importlib.import_module("transformers.models.llama.modeling_llama")
    before = module.apply_rotary_pos_emb
    with ek.use_backend("triton"):
        stock(ids())
        assert not launches
        patched(ids())
        assert len(launches) == 1
        ek.unpatch(patched)
        patched(ids())
    assert len(launches) == 1
    assert module.apply_rotary_pos_emb is before
    assert type(patched.layers[0].self_attn) is module.LlamaAttention


def test_it_can_be_left_out(launches):
    model = build("llama")
    report = ek.patch(model, rope=False)
    assert not [entry for entry in report.entries if entry.part == "rotary"]
    with ek.use_backend("triton"):
        model(ids())
    assert not launches


def test_copies_pickles_and_new_modules(launches):
    _, patched = pair("llama")
    module = patched.layers[0].self_attn
    new = type(module)(patched.config, 0)
    assert new.__class__ is _class("llama.LlamaAttention")
    file = io.BytesIO()
    torch.save(patched, file)
    file.seek(0)
    copies = [copy.deepcopy(patched), pickle.loads(pickle.dumps(patched)), torch.load(file, weights_only=False)]
    with ek.use_backend("triton"):
        for number, one in enumerate(copies, 1):
            one(ids())
            assert len(launches) == number
    assert isinstance(module, _class("llama.LlamaAttention"))
    assert ek.patch(patched).entries[1].status == "already"


def test_what_replaces_the_function_later_counts(monkeypatch, launches):
    """As Liger does, for all models of the process."""
    _, patched = pair("llama")
    module = importlib.import_module("transformers.models.llama.modeling_llama")
    before, calls = module.apply_rotary_pos_emb, []

    def other(q, k, cos, sin, unsqueeze_dim=1):
        calls.append(1)
        return before(q, k, cos, sin, unsqueeze_dim)

    monkeypatch.setattr(module, "apply_rotary_pos_emb", other)
    with ek.use_backend("triton"):
        patched(ids())
        assert (len(calls), len(launches)) == (1, 0)
        assert rotary_of(module.LlamaAttention).rotation is None
        report = ek.patch(build("llama"))
        entry = next(entry for entry in report.entries if entry.part == "rotary")
        assert (entry.status, "replaced" in entry.reason) == ("left alone", True)
        monkeypatch.undo()
        monkeypatch.setattr(rotary, "rope", lambda *a, **k: (launches.append(k), rope_op.rope(*a, **k))[1])
        patched(ids())
    assert (len(calls), len(launches)) == (1, 1)


def _as_kernels_makes_it(function):
    """A rotary function as the package ``kernels`` leaves it where it is installed."""

    class Func(nn.Module):
        kernel_layer_name = "rotary_pos_emb"

        def forward(self, *args, **kwargs):
            return function(*args, **kwargs)

    return Func()


def test_with_the_kernels_package_the_function_is_known_until_it_is_exchanged(monkeypatch, launches):
    module = importlib.import_module("transformers.models.llama.modeling_llama")
    wrapped = _as_kernels_makes_it(module.apply_rotary_pos_emb)
    monkeypatch.setattr(module, "apply_rotary_pos_emb", wrapped)
    found = rotary_of(module.LlamaAttention)
    assert found.rotation is not None
    function = rotary._replacement(found.name, module, found.rotation)
    call = _call(found.rotation, torch.float32, "cpu")
    with ek.use_backend("triton"):
        function(*call)
        assert len(launches) == 1
        wrapped.forward = lambda *_, **__: "exchanged"  # what kernelize does
        assert function(*call, 1) == "exchanged"
    assert len(launches) == 1


def test_a_forward_replaced_on_the_instance_is_left_alone():
    model = build("llama")
    module = model.layers[0].self_attn
    module.forward = module.forward
    entry = next(entry for entry in ek.patch(model).entries if entry.part == "rotary")
    assert (entry.status, entry.reason) == ("left alone", "forward was replaced on the instance")
    assert type(module) is _class("llama.LlamaAttention")


def test_hooks_run(launches):
    _, patched = pair("llama")
    seen = []
    patched.layers[0].self_attn.register_forward_hook(lambda *_: seen.append(1))
    with ek.use_backend("triton"):
        patched(ids())
    assert (len(seen), len(launches)) == (1, 1)


LLAMA = ROTATIONS[0]
NEOX = next(row for row in ROTATIONS if row.partial)
OLMO = next(row for row in ROTATIONS if row.back)


@pytest.mark.parametrize(
    ("row", "change"),
    [
        (LLAMA, lambda q, k, cos, sin: (q, k, cos[0], sin[0], 0)),
        (LLAMA, lambda q, k, cos, sin: (q, k[:, :, :1], cos[:, :1], sin[:, :1])),
        (LLAMA, lambda q, k, cos, sin: (q, k, cos.requires_grad_(), sin)),
        (LLAMA, lambda q, k, cos, sin: (q.detach().double(), k.detach().double(), cos.double(), sin.double())),
        (LLAMA, lambda q, k, cos, sin: (q.detach().bfloat16(), k.detach().bfloat16(), cos, sin)),
        (LLAMA, lambda q, k, cos, sin: (q.detach().bfloat16(), k, cos, sin)),
        (LLAMA, lambda q, k, cos, sin: (q.detach().as_subclass(nn.Parameter), k, cos, sin)),
        (NEOX, lambda q, k, cos, sin: (q, k, cos[:1].repeat(1, 1, 1), sin[:, :1].repeat(1, S, 1)[:1])),
    ],
    ids=["2-D tables", "one token", "gradient of a table", "double", "wide tables", "mixed", "subclass", "fits"],
)
def test_calls_that_do_not_fit_run_the_function_of_the_module(row, change, replacement, launches):
    stock, fused = replacement(row)
    call = change(*_call(row, torch.float32, "cpu"))
    with ek.use_backend("triton"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        got, expected = fused(*call), stock(*call)
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.dtype == theirs.dtype
        if launches:
            torch.testing.assert_close(ours, theirs)
        else:
            assert torch.equal(ours, theirs)
    assert bool(launches) == (row is NEOX)


def test_what_does_not_fit_warns_once(replacement, monkeypatch):
    monkeypatch.setattr(rotary, "_warned", set())
    _, fused = replacement(LLAMA)
    q, k, cos, sin = _call(LLAMA, torch.float32, "cpu")
    with ek.use_backend("triton"):
        with pytest.warns(UserWarning, match=r"modeling_llama\.apply_rotary_pos_emb runs as it is: .* a gradient"):
            fused(q, k, cos.requires_grad_(), sin)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            fused(q, k, cos, sin)


def test_errors_are_those_of_the_stock_function(replacement):
    stock, fused = replacement(LLAMA)
    q, k, cos, sin = _call(LLAMA, torch.float32, "cpu", width=R)
    messages = []
    for function in (stock, fused):
        with ek.use_backend("triton"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pytest.raises(RuntimeError) as error:
                function(q, k, cos, sin)
            messages.append(str(error.value))
    assert messages[0] == messages[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tables_in_fp32_under_autocast(dtype, replacement, launches):
    """The hidden states that tables follow are fp32 there; attention then rounds to the dtype of autocast."""
    stock, fused = replacement(LLAMA)
    q, k, cos, sin = _call(LLAMA, dtype, "cpu", tables=torch.float32)
    with torch.autocast("cpu", dtype), ek.use_backend("triton"):
        got, expected = fused(q, k, cos, sin), stock(q, k, cos, sin)
    assert launches
    for ours, theirs in zip(got, expected, strict=True):
        assert (ours.dtype, theirs.dtype) == (dtype, torch.float32)
        assert (
            torch.equal(ours, theirs.to(dtype)) or (ours.float() - theirs).abs().max() <= 2**-8 * theirs.abs().max()
        )


def test_tables_in_fp32_where_the_result_goes_back(replacement, launches):
    stock, fused = replacement(OLMO)
    call = _call(OLMO, torch.bfloat16, "cpu", tables=torch.float32)
    with ek.use_backend("triton"):
        got, expected = fused(*call), stock(*call)
    assert launches
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=2**-8, atol=1e-6)


def test_torch_compile_takes_the_whole_graph_and_the_function_of_the_module(launches):
    torch.compiler.reset()
    stock, patched = pair("llama")
    stock.eval(), patched.eval()
    compiled = torch.compile(patched.layers[0].self_attn, fullgraph=True, backend="aot_eager")
    states = torch.randn(2, 5, 32)
    tables = stock.rotary_emb(states, torch.arange(5)[None])
    with ek.use_backend("triton"):
        output = compiled(states, tables, None)[0]
    assert not launches
    torch.testing.assert_close(output, stock.layers[0].self_attn(states, tables, None)[0])


def test_checkpointing_recomputes_it(launches):
    stock, patched = pair("llama")
    tokens = ids()
    expected, theirs = _results(stock, {"input_ids": tokens}, "cpu")
    patched.gradient_checkpointing_enable()
    with ek.use_backend("triton"):
        output, ours = _results(patched.train(), {"input_ids": tokens, "use_cache": torch.tensor(False)}, "cpu")
    assert len(launches) == 2
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    for key in theirs:
        torch.testing.assert_close(ours[key], theirs[key], rtol=1e-3, atol=1e-4)


def test_generation_with_a_cache():
    torch.manual_seed(1)
    stock = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, num_key_value_heads=1)).eval()
    patched = copy.deepcopy(stock)
    ek.patch(patched)
    tokens = padded(side="left")
    settings = {"max_new_tokens": 5, "do_sample": False}
    expected = stock.generate(**tokens, **settings)
    with ek.use_backend("triton"):
        assert torch.equal(patched.generate(**tokens, **settings), expected)


def test_a_name_that_is_an_attribute_too_is_not_exchanged():
    """The code's names serve globals and attributes alike."""
    source = (
        "def apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=1): return q, k\n"
        "class A(Module):\n    def forward(self, q): return self.apply_rotary_pos_emb(q)\n"
    )
    module = SimpleNamespace(Module=nn.Module)
    names = {"Module": nn.Module, "__name__": "transformers.models.own.modeling_own"}
    exec(source, names)
    vars(module).update(names)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(__import__("sys").modules, names["__name__"], module)
        found = rotary_of(names["A"])
    assert found.rotation is None
    assert "attribute" in found.why
    assert isinstance(names["apply_rotary_pos_emb"], FunctionType)


def test_the_report_has_one_line_for_the_layers():
    model = transformers.LlamaModel(transformers.LlamaConfig(**SMALL | {"num_hidden_layers": 3}))
    report = ek.patch(model)
    assert [entry.path for entry in report.entries if entry.part == "rotary"] == [
        f"layers.{i}.self_attn" for i in range(3)
    ]
    lines = [line for line in str(report).splitlines() if "rotary" in line]
    assert len(lines) == 1
    assert "layers.*.self_attn (3)" in lines[0]

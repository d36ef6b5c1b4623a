"""Whatever watches, wraps or changes the parts sends a module to its stock forward, which then is stock's result."""

import copy
import time
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import embedkernels as ek
from embedkernels.hf import adapters, fused, guards
from tests.hf.models import FUSED, build, ids, padded, pair

PARTS = {
    "bert": ("embeddings", {"tokens": "word_embeddings", "positions": "position_embeddings", "dropout": "dropout"}),
    "gpt2": ("", {"tokens": "wte", "positions": "wpe", "dropout": "drop"}),
}
TYPES_AND_NORM = ("token_type_embeddings", "LayerNorm")


class Scaled(nn.Module):
    """A wrapper around a module, as adapters and quantisers put one."""

    def __init__(self, inner):
        super().__init__()
        self.base_layer = inner

    def forward(self, x):
        return 2 * self.base_layer(x)


class Halved(nn.Module):
    def forward(self, weight):
        return weight / 2


def nothing(*args, **kwargs):
    """A hook that only watches."""


def amplify(module, args, output):
    return output * 1.5


def _forward_hook(parent, name):
    getattr(parent, name).register_forward_hook(amplify)


def _forward_pre_hook(parent, name):
    getattr(parent, name).register_forward_pre_hook(nothing)


def _backward_hook(parent, name):
    getattr(parent, name).register_full_backward_hook(nothing)


def _backward_pre_hook(parent, name):
    getattr(parent, name).register_full_backward_pre_hook(nothing)


def _wrapper(parent, name):
    setattr(parent, name, Scaled(getattr(parent, name)))


def _instance_forward(parent, name):
    module = getattr(parent, name)
    stock = module.forward
    module.forward = lambda x: stock(x) * 1.5


def _accelerate_hook(parent, name):
    from accelerate.hooks import ModelHook, add_hook_to_module

    class Shift(ModelHook):
        def post_forward(self, _module, output):
            return output + 0.5

    add_hook_to_module(getattr(parent, name), Shift())


CHANGES = [
    _forward_hook,
    _forward_pre_hook,
    _backward_hook,
    _backward_pre_hook,
    _wrapper,
    _instance_forward,
    _accelerate_hook,
]


def _both(name, change, dropout=0.0):
    """A stock and a patched model with the same change made to both after patching."""
    stock, patched = pair(name, dropout=dropout)
    path, _ = PARTS[name]
    for model in (stock, patched):
        change(model.get_submodule(path))
    return stock, patched, patched.get_submodule(path)


def _same_with_one_warning(stock, patched, match, inputs=None):
    inputs = padded() if inputs is None else inputs
    torch.manual_seed(1)
    expected = stock(**inputs).last_hidden_state
    torch.manual_seed(1)
    with pytest.warns(UserWarning, match=match):
        output = patched(**inputs).last_hidden_state
    assert torch.equal(output, expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.manual_seed(1)
        assert torch.equal(patched(**inputs).last_hidden_state, expected)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", PARTS)
def test_a_part_that_is_hooked_or_wrapped_is_called(name, change):
    parts = [*PARTS[name][1].values(), *(TYPES_AND_NORM if name == "bert" else ())]
    for part in parts:
        stock, patched, module = _both(name, lambda parent, p=part: change(parent, p), dropout=0.2)
        _same_with_one_warning(stock, patched, rf"stock forward: {part}")
        report = ek.patch(patched)
        assert report.entries[0].status == "falls back"
        assert part in report.entries[0].reason
        assert fused.is_fused(module)


@pytest.mark.parametrize("name", PARTS)
def test_a_removed_hook_lets_the_module_run_fused_again(name):
    _, patched, module = _both(name, nothing)
    handle = getattr(module, PARTS[name][1]["tokens"]).register_forward_hook(nothing)
    with pytest.warns(UserWarning, match="forward hook"):
        patched(ids())
    handle.remove()
    assert guards.problem(module, fused.adapter_of(module)) is None
    assert ek.patch(patched).entries[0].status == "already"


def test_a_hook_on_every_module_sees_every_module():
    _, patched, _ = _both("bert", nothing)
    seen = []

    def see(module, args, output):
        seen.append(module)

    handle = torch.nn.modules.module.register_module_forward_hook(see)
    try:
        with pytest.warns(UserWarning, match="hook on all modules"):
            patched(ids())
    finally:
        handle.remove()
    assert patched.embeddings.word_embeddings in seen
    assert patched.embeddings.LayerNorm in seen


def test_hooks_on_the_fused_module_itself_run():
    _, patched, module = _both("bert", nothing)
    calls = []

    def before(module, args, kwargs):
        calls.append("before")

    def after(module, args, output):
        calls.append("after")

    module.register_forward_pre_hook(before, with_kwargs=True)
    module.register_forward_hook(after)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        patched(ids())
    assert calls == ["before", "after"]


@pytest.mark.parametrize("part", ["word_embeddings", "position_embeddings", "token_type_embeddings", "LayerNorm"])
def test_a_parametrised_weight_is_computed(part):
    def change(parent):
        parametrize.register_parametrization(getattr(parent, part), "weight", Halved())

    stock, patched, _ = _both("bert", change)
    _same_with_one_warning(stock, patched, part)


@pytest.mark.parametrize("option", [{"max_norm": 0.5}, {"scale_grad_by_freq": True}, {"sparse": True}])
def test_options_of_the_lookup_are_honoured(option):
    def change(parent):
        for key, value in option.items():
            setattr(parent.word_embeddings, key, value)

    stock, patched, _ = _both("bert", change)
    _same_with_one_warning(stock, patched, "max_norm, scale_grad_by_freq or sparse")


def test_mixed_dtypes_run_stock():
    """Stock promotes them; whether it can is its own business."""
    stock, patched, _ = _both("gpt2", lambda parent: parent.wpe.double())
    expected = torch.nn.functional.dropout(stock.wte(ids()) + stock.wpe.weight[:7], 0.0)
    assert expected.dtype == torch.float64
    for model in (stock, patched):
        model.h = nn.ModuleList()
        model.ln_f.double()
    _same_with_one_warning(stock, patched, "wpe differs in dtype or device from wte")


def test_a_norm_of_another_kind_runs_stock():
    def change(parent):
        parent.LayerNorm = nn.RMSNorm(32)

    stock, patched, _ = _both("bert", change)
    _same_with_one_warning(stock, patched, "LayerNorm is a torch.nn.modules.normalization.RMSNorm")


@pytest.mark.parametrize("options", [{"bias": False}, {"elementwise_affine": False}])
def test_a_norm_without_bias_or_weight_is_fused(options):
    def change(parent):
        parent.LayerNorm = nn.LayerNorm(32, **options)

    stock, patched, module = _both("bert", change)
    assert guards.problem(module, fused.adapter_of(module)) is None
    inputs = padded()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(patched(**inputs).last_hidden_state, stock(**inputs).last_hidden_state)


def test_a_tensor_subclass_as_weight_runs_stock():
    class Quantised(torch.Tensor):
        pass

    def change(parent):
        weight = parent.word_embeddings.weight.detach().as_subclass(Quantised)
        del parent.word_embeddings.weight
        parent.word_embeddings.weight = weight

    _, patched, _ = _both("bert", change)
    with pytest.warns(UserWarning, match=r"word_embeddings.weight is a Quantised"):
        patched(ids())


def test_neftune_noise_reaches_the_tokens():
    from transformers.integrations.neftune import neftune_post_forward_hook

    for name in ("bert", "gpt2", "llama"):
        stock, patched = pair(name)
        for model in (stock, patched):
            table = model.get_input_embeddings()
            table.neftune_noise_alpha = 5.0
            table.register_forward_hook(neftune_post_forward_hook)
        inputs = padded()
        torch.manual_seed(1)
        expected = stock(**inputs).last_hidden_state
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(1)
            output = patched(**inputs).last_hidden_state
            torch.manual_seed(2)
            other = patched(**inputs).last_hidden_state
        assert torch.equal(output, expected)
        assert not torch.equal(output, other)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_changes_made_before_patching_are_kept(name):
    for change in CHANGES:
        stock = build(name)
        path, parts = PARTS.get(name, ("", {"tokens": "embed_tokens"}))
        change(stock.get_submodule(path), parts["tokens"])
        patched = copy.deepcopy(stock)
        report = ek.patch(patched)
        inputs = {"input_ids": ids()}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert torch.equal(patched(**inputs).last_hidden_state, stock(**inputs).last_hidden_state)
        if name != "llama":
            assert report.entries[0].status == "falls back"


def test_a_replaced_forward_of_the_whole_module_is_left_alone():
    model = build("bert")
    model.embeddings.forward = nothing
    report = ek.patch(model)
    entry = report.entries[0]
    assert (entry.status, entry.reason) == ("left alone", "forward was replaced on the instance")
    assert not fused.is_fused(model.embeddings)


def test_a_subclass_of_the_stock_class_is_left_alone():
    model = build("bert")

    class Own(type(model.embeddings)):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs) * 3

    model.embeddings.__class__ = Own
    stock = copy.deepcopy(model)
    with pytest.warns(UserWarning, match="embeddings: a subclass of BertEmbeddings"):
        report = ek.patch(model)
    entry = next(entry for entry in report.entries if entry.part == "embeddings")
    assert (entry.path, entry.was, entry.status) == ("embeddings", "Own", "left alone")
    assert entry.reason.startswith("a subclass of BertEmbeddings")
    assert "no adapter looks it up" not in str(report)
    assert type(model.embeddings) is Own
    assert torch.equal(model(ids := torch.tensor([[5, 6]])).last_hidden_state, stock(ids).last_hidden_state)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_tracing_with_torch_jit_records_stock_ops(name):
    _, patched = pair(name)
    patched.config.return_dict = patched.config.use_cache = False
    module = patched.get_submodule(FUSED[name]).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(module, (ids(),))
    assert "embedkernels" not in str(traced.inlined_graph)


def test_a_fused_embedding_is_traced_as_a_stock_one():
    table = ek.FusedEmbedding(6, 4)
    traced = torch.jit.trace(table, (torch.tensor([1, 2]),))
    assert "embedkernels::" not in str(traced.inlined_graph)
    assert torch.equal(traced(torch.tensor([5])), table.weight[5:])


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("make", [lambda: ek.FusedEmbedding(6, 4), lambda: _both("bert", nothing)[2].eval()])
def test_exports_record_stock_ops_and_compilation_the_fused_one(make, strict):
    """Dynamo of torch 2.11 takes ``torch.compiler.is_exporting()`` for true in every ``torch.compile``."""
    torch.compiler.reset()
    module = make()
    example = torch.tensor([[1, 2, 5]])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(module, (example,), strict=strict)
    assert "embedkernels" not in str(program.graph)
    graphs = []

    def record(graph, inputs):
        graphs.append(str(graph.graph))
        return graph.forward

    compiled = torch.compile(module, backend=record, fullgraph=True)
    assert torch.equal(compiled(example), program.module()(example))
    assert "embedkernels" in "".join(graphs)


def test_the_checks_are_cheap():
    """Microseconds: far below what the calls of the bypassed modules cost."""
    _, _, module = _both("bert", nothing)
    adapter = fused.adapter_of(module)
    times = []
    for _ in range(200):
        begin = time.perf_counter()
        guards.problem(module, adapter)
        times.append(time.perf_counter() - begin)
    assert sorted(times)[len(times) // 2] < 100e-6


def test_adapters_do_not_import_transformers():
    source = Path(adapters.__file__).read_text()
    assert "import transformers" not in source
    assert "from transformers" not in source


CALLS = {
    "gpt2 with types": ("gpt2", {"input_ids": ids(), "token_type_ids": ids()}, "token_type_ids is given"),
    "gpt2 with embeddings": ("gpt2", {"inputs_embeds": torch.randn(2, 4, 32)}, "inputs_embeds is given"),
    "gpt2 with ids of three dimensions": (
        "gpt2",
        {"input_ids": ids(4, 3).view(2, 2, 3)},
        "input_ids has 3 dimensions",
    ),
    "bert with positions of one dimension": (
        "bert",
        {
            "input_ids": ids(2, 4),
            "token_type_ids": torch.zeros(2, 4, dtype=torch.long),
            "position_ids": torch.arange(4),
        },
        "position_ids is not of the shape of input_ids",
    ),
}


@pytest.mark.parametrize("call", CALLS)
def test_a_call_that_cannot_be_fused_runs_stock_with_one_warning(call):
    name, inputs, reason = CALLS[call]
    stock, patched = pair(name, dropout=0.2)
    _same_with_one_warning(stock, patched, f"stock forward: {reason}", inputs)
    note = ek.patch(patched).entries[0].reason
    assert ("inputs_embeds" in note) == ("token_type_ids" in note) == (name == "gpt2")


@pytest.mark.parametrize("name", PARTS)
def test_a_call_that_stock_refuses_is_refused_without_a_warning(name):
    _, patched = pair(name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises((ValueError, TypeError)):
            patched()
        with pytest.raises(TypeError):
            patched.get_submodule(PARTS[name][0])(ids(), nonsense=1, input_ids=ids())

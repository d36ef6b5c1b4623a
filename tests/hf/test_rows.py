"""Every module of the installed transformers that has a row computes as stock: its own forward against the fused one.

The modules are built from a configuration that has every attribute their constructors read.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import warnings
from types import SimpleNamespace

import pytest
import torch
import transformers
from torch import Tensor, nn

import embedkernels as ek
from embedkernels.hf import fused
from embedkernels.hf.adapters import ADAPTERS, adapter_for
from embedkernels.hf.bodies import fingerprint_of
from embedkernels.hf.coverage import front_ends, models_folder
from embedkernels.hf.positions import POSITION_TABLES, position_table
from tests.contract import assert_within_contract
from tests.hf.models import build, named_here

VOCAB, WIDTH, POSITIONS, TYPES, PADDING = 60, 32, 40, 3, 1
CONFIG = {
    "vocab_size": VOCAB,
    "pad_token_id": PADDING,
    "max_position_embeddings": POSITIONS,
    "max_2d_position_embeddings": POSITIONS,
    "type_vocab_size": TYPES,
    "task_type_vocab_size": TYPES,
    "layer_norm_eps": 1e-5,
    "norm_eps": 1e-5,
    "norm_bias": False,
    "use_task_id": False,
    "rescale_embeddings": False,
    "sinusoidal_pos_embds": False,
    "position_biased_input": True,
    "special_visual_initialize": False,
    "position_embedding_type": "absolute",
    "visual_embedding_dim": WIDTH,
    "coordinate_size": 5,
    "shape_size": 6,
    "max_depth": 4,
    "max_xpath_tag_unit_embeddings": 20,
    "max_xpath_subs_unit_embeddings": 21,
    "tag_pad_id": 16,
    "subs_pad_id": 17,
    "xpath_unit_hidden_size": 8,
    "max_position_embeddings_2d": POSITIONS,
} | dict.fromkeys(
    ("hidden_size", "embedding_size", "input_embedding_size", "dim", "d_model", "text_hidden_size"), WIDTH
)
DROPOUTS = ("hidden_dropout_prob", "hidden_dropout", "dropout", "embedding_dropout", "embedding_dropout_prob")

FOUND = front_ends(models_folder())
STEM_ROWS = sorted(
    {(one.model, one.cls, one.adapter) for one in FOUND if one.adapter is not None and one.adapter.recipe == "stem"},
    key=lambda row: row[:2],
)
STEMS = list(dict.fromkeys(row[:2] for row in STEM_ROWS))
EVERY = pytest.mark.parametrize("name", [f"{model}.{cls}" for model, cls in STEMS])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def _classes(name: str) -> list[type[nn.Module]]:
    """The class of that name, in every file of the model that has one with a row."""
    model, cls = name.split(".")
    package = f"transformers.models.{model}"
    files = sorted((models_folder() / model).glob("modeling_*.py"))
    modules = [importlib.import_module(f"{package}.{file.stem}") for file in files]
    found = [vars(module)[cls] for module in modules if cls in vars(module)]
    stems = [one for one in dict.fromkeys(found) if (row := adapter_for(one)) is not None and row.recipe == "stem"]
    assert stems, f"{name} is a stem in its source, but has no row"
    return stems


def _pair(
    cls: type[nn.Module], dropout: float = 0.0, dtype: torch.dtype = torch.float32, **config: object
) -> tuple[nn.Module, nn.Module]:
    stock = cls(SimpleNamespace(**(CONFIG | dict.fromkeys(DROPOUTS, dropout) | config)))
    with torch.no_grad():
        for parameter in stock.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    stock = stock.to(dtype).train()
    patched = copy.deepcopy(stock)
    entry = ek.patch(patched, strict=True).entries[0]
    assert (entry.status, entry.path) == ("patched", ""), entry
    return stock, patched


def _ids(batch: int = 3, length: int = 7) -> Tensor:
    ids = torch.randint(4, VOCAB, (batch, length))
    ids[:, :2] = 5  # met often: its gradient is a long sum
    ids[batch // 2, -2:] = PADDING
    return ids


def _run(module: nn.Module, **call: object) -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(1)
    # Some forwards add to the embeddings that they are given, in place.
    output = module(**{key: given.clone() if isinstance(given, Tensor) else given for key, given in call.items()})
    output = output[0] if isinstance(output, tuple) else output
    module.zero_grad()
    torch.manual_seed(2)
    output.backward(torch.randn(output.shape).to(output))
    return output.detach(), {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def _calls(module: nn.Module) -> dict[str, dict[str, object]]:
    """Calls of every kind that the forward takes."""
    takes = inspect.signature(type(module).forward).parameters
    ids = _ids()
    types, positions = torch.randint(0, TYPES, ids.shape), torch.randint(2, POSITIONS, ids.shape)
    calls: dict[str, dict[str, object]] = {"ids": {"input_ids": ids}, "int32 ids": {"input_ids": ids.int()}}
    if "token_type_ids" in takes:
        calls["types"] = {"input_ids": ids, "token_type_ids": types}
    if "position_ids" in takes:
        calls["positions"] = {"input_ids": ids, "position_ids": positions}
        calls["positions of one row"] = {"input_ids": ids, "position_ids": positions[:1]}
    if {"token_type_ids", "position_ids"} <= takes.keys():
        calls["both"] = {"input_ids": ids, "token_type_ids": types, "position_ids": positions}
    past = named_here("past_key_values_length", type(module).forward)
    if past in takes:
        calls["past"] = {"input_ids": ids, past: 4}
    if "mask" in takes:
        calls["mask"] = {"input_ids": ids, "mask": (ids != PADDING).long()}
        calls["mask of bools"] = {"input_ids": ids, "mask": ids != PADDING}
        calls["4-D mask"] = {"input_ids": ids, "mask": (ids != PADDING)[:, None, None]}
    if "inputs_embeds" in takes:
        calls["embeddings"] = {"input_ids": None, "inputs_embeds": torch.randn(*ids.shape, WIDTH)}
    if "task_type_ids" in takes:
        calls["tasks"] = {"input_ids": ids, "task_type_ids": types.flip(0)}
    if "xpath_tags_seq" in takes:
        tags, subs = (torch.randint(0, 20, (*ids.shape, 4)) for _ in range(2))
        calls["xpath"] = {"input_ids": ids, "xpath_tags_seq": tags, "xpath_subs_seq": subs}
        calls["tags of one row"] = {"input_ids": ids, "xpath_tags_seq": tags[:1], "xpath_subs_seq": subs[:1]}
    if "bbox" in takes:  # (x, y) of the upper left corner, and of the lower right
        corners = torch.randint(0, POSITIONS, (*ids.shape, 2, 2)).sort(2).values.flatten(2)
        calls = {what: {**call, "bbox": corners} for what, call in calls.items()}
    if type(module).__name__ == "LukeEmbeddings":  # looks for a buffer that it has not if types are not given
        calls = {what: call for what, call in calls.items() if "token_type_ids" in call}
    return calls


def test_every_row_has_a_class_here_or_in_another_release():
    there = {adapter_for(cls) for name in (f"{m}.{c}" for m, c in STEMS) for cls in _classes(name)}
    missing = {row.example for row in ADAPTERS if row.recipe == "stem"} - {row.example for row in there if row}
    assert missing <= {"gte.GteEmbeddings"}


@EVERY
@DTYPES
def test_every_kind_of_call_equals_stock(name, dtype):
    for cls in _classes(name):
        stock, patched = _pair(cls, dtype=dtype)
        for what, call in _calls(stock).items():
            if call.get("inputs_embeds") is not None:
                call["inputs_embeds"] = call["inputs_embeds"].to(dtype)
            expected, theirs = _run(stock, **call)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore" if what == "4-D mask" else "error")
                output, ours = _run(patched, **call)
            assert torch.equal(output, expected), what
            exact_call = {k: v.double() if k == "inputs_embeds" and v is not None else v for k, v in call.items()}
            _, exact = _run(copy.deepcopy(stock).double(), **exact_call)
            assert ours.keys() == theirs.keys() == exact.keys()
            for key in ours:
                assert_within_contract(ours[key], theirs[key], exact[key], f"{what}, {key}")


@DTYPES
def test_ernie_s_tasks(dtype):
    stock, patched = _pair(_one("ernie.ErnieEmbeddings"), dtype=dtype, use_task_id=True)
    for call in _calls(stock).values():
        if "inputs_embeds" in call:
            call["inputs_embeds"] = call["inputs_embeds"].to(dtype)
        expected, theirs = _run(stock, **call)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            output, ours = _run(patched, **call)
        assert torch.equal(output, expected)
        exact_call = {k: v.double() if k == "inputs_embeds" and v is not None else v for k, v in call.items()}
        _, exact = _run(copy.deepcopy(stock).double(), **exact_call)
        assert ours.keys() == theirs.keys() == exact.keys()
        assert "task_type_embeddings.weight" in ours
        for key in ours:
            assert_within_contract(ours[key], theirs[key], exact[key], key)


def test_boxes_that_are_missing_or_out_of_range_are_refused_by_layoutlmv3():
    stock, patched = _pair(_one("layoutlmv3.LayoutLMv3TextEmbeddings"))
    for module in (stock, patched):
        with pytest.raises(TypeError):
            module(_ids())
        with pytest.raises(IndexError, match="coordinate values should be within 0-1000 range"):
            module(_ids(), bbox=torch.full((3, 7, 4), POSITIONS))


def test_rows_of_other_tables_that_do_not_fit_run_stock():
    """Under autocast a linear layer's output is promoted; of boxes for another batch stock makes what it can."""
    stock, patched = _pair(_one("markuplm.MarkupLMEmbeddings"))
    call = _calls(stock)["xpath"]
    with torch.autocast("cpu", torch.bfloat16), warnings.catch_warnings():
        warnings.simplefilter("error")
        expected, output = _run(stock, **call)[0], _run(patched, **call)[0]
    assert output.dtype == expected.dtype == torch.float32
    assert torch.equal(output, expected)
    stock, patched = _pair(_one("layoutlmv3.LayoutLMv3TextEmbeddings"))
    call = {"input_ids": _ids(1), "bbox": torch.zeros(3, 7, 4, dtype=torch.long)}
    with pytest.warns(UserWarning, match=r"rows of other tables have the shape \(3, 7, 32\)"):
        output = patched(**call)
    assert torch.equal(output, stock(**call))


@EVERY
def test_dropout_draws_the_same_numbers(name):
    for cls in _classes(name):
        stock, patched = _pair(cls, dropout=0.4)
        call = _calls(stock).get("both") or next(iter(_calls(stock).values()))
        expected, theirs = _run(stock, **call)
        output, ours = _run(patched, **call)
        assert torch.equal(output, expected)
        for key in theirs:
            torch.testing.assert_close(ours[key], theirs[key])
        assert torch.equal(_run(patched.eval(), **call)[0], _run(stock.eval(), **call)[0])
        if any(isinstance(part, nn.Dropout) for part in stock.modules()):
            assert not torch.equal(_run(patched, **call)[0], output)


@EVERY
def test_padding_rows_get_gradients_of_zero(name):
    for cls in _classes(name):
        _, patched = _pair(cls)
        call = _calls(patched).get("types") or next(iter(_calls(patched).values()))
        _, gradients = _run(patched, **call)
        tables = [(path, part) for path, part in patched.named_modules() if isinstance(part, nn.Embedding)]
        for path, table in tables:
            if table.padding_idx is not None:
                assert torch.count_nonzero(gradients[f"{path}.weight"][table.padding_idx]) == 0, path
        assert any(torch.count_nonzero(gradient) for gradient in gradients.values())


@EVERY
def test_the_kernels_are_close(name, device):
    for cls in _classes(name):
        stock, patched = (module.to(device) for module in _pair(cls))
        call = _calls(stock).get("mask") or _calls(stock).get("types") or next(iter(_calls(stock).values()))
        call = {key: value.to(device) for key, value in call.items()}
        expected, theirs = _run(stock, **call)
        with ek.use_backend("triton"):
            output, ours = _run(patched, **call)
        torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
        assert ours.keys() == theirs.keys()
        for key in theirs:
            torch.testing.assert_close(ours[key], theirs[key], rtol=1e-4, atol=1e-4, msg=lambda t, k=key: f"{k}: {t}")


ROWS = {adapter.example: f"{model}.{cls}" for model, cls, adapter in STEM_ROWS}


@pytest.mark.parametrize("name", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_rows_in_the_place_of_ids_get_their_gradient(name, backend, device):
    """Of a view of more, as the tokens after a prompt are. Rows of another dtype than the tables' run stock."""
    stock, patched = (module.to(device) for module in _pair(_one(name)))
    call = _calls(stock).get("embeddings")
    if call is None:
        pytest.skip("its forward takes ids alone")
    for dtype in (torch.float32, torch.bfloat16):
        outcomes = []
        for module in (stock, patched):
            leaf = torch.randn(3, 9, WIDTH, generator=torch.Generator().manual_seed(3)).to(device, dtype)
            leaf.requires_grad_()
            rows = (leaf * 1)[:, 2:]  # some add to the rows themselves
            with ek.use_backend(backend), warnings.catch_warnings():
                warnings.simplefilter("error" if dtype == torch.float32 else "ignore", UserWarning)
                output = module(**{**call, "inputs_embeds": rows})
            output = output[0] if isinstance(output, tuple) else output
            upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(4)).to(output)
            outcomes.append((output, *torch.autograd.grad(output, leaf, upstream)))
        for theirs, ours in zip(*outcomes, strict=True):
            torch.testing.assert_close(ours, theirs)
            assert (backend == "triton" and dtype == torch.float32) or torch.equal(ours, theirs)


@pytest.mark.parametrize("name", ROWS.values(), ids=ROWS)
@DTYPES
def test_the_kernels_take_every_kind_of_call(name, dtype, device):
    """Of a class of every row. Errors of all calls are judged together: among few elements they are chance."""
    stock, patched = (module.to(device) for module in _pair(_one(name), dtype=dtype))
    exact_module = copy.deepcopy(stock).double()
    triples: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {}
    for call in _calls(stock).values():
        call = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in call.items()}
        rows = call.get("inputs_embeds")
        exact_call = call if rows is None else {**call, "inputs_embeds": rows.to(dtype).double()}
        call = call if rows is None else {**call, "inputs_embeds": rows.to(dtype)}
        theirs, exact = _run(stock, **call), _run(exact_module, **exact_call)
        with ek.use_backend("triton"), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "embedkernels: .* runs its stock forward: mask is not", UserWarning)
            ours = _run(patched, **call)
        assert ours[1].keys() == theirs[1].keys() == exact[1].keys()
        for key in ("output", *ours[1]):
            triples.setdefault(key, []).append(
                tuple(result[0] if key == "output" else result[1][key] for result in (ours, theirs, exact))
            )
    for key, several in triples.items():
        assert_within_contract(*(torch.cat([x.flatten() for x in each]) for each in zip(*several, strict=True)), key)


@pytest.mark.parametrize(
    "name",
    [
        "clip.CLIPTextEmbeddings",
        "deberta_v2.DebertaV2Embeddings",
        "longformer.LongformerEmbeddings",
        "modernbert.ModernBertEmbeddings",
        "roformer.RoFormerEmbeddings",
        "yoso.YosoEmbeddings",
    ],
)
def test_torch_compile_takes_the_whole_graph(name):
    stock, patched = _pair(_one(name))
    call = _calls(stock).get("mask") or _calls(stock)["ids"]
    expected, _ = _run(stock, **call)
    compiled = torch.compile(patched, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**call), expected)
    if (given := _calls(stock).get("embeddings")) is not None:
        torch.testing.assert_close(compiled(**given), _run(stock, **given)[0])
    torch.compiler.reset()


def _one(name: str) -> type[nn.Module]:
    return _classes(name)[0]


@pytest.mark.parametrize(
    ("name", "config", "reason"),
    [
        ("big_bird.BigBirdEmbeddings", {"rescale_embeddings": True}, "rescale_embeddings is set"),
        ("deberta_v2.DebertaV2Embeddings", {"embedding_size": 16}, "embed_proj is set"),
    ],
)
def test_what_a_row_does_not_compute_runs_stock(name, config, reason):
    stock = _one(name)(SimpleNamespace(**(CONFIG | dict.fromkeys(DROPOUTS, 0.0) | config)))
    patched = copy.deepcopy(stock)
    entry = ek.patch(patched).entries[0]
    assert (entry.status, entry.reason) == ("left alone", reason)
    tables = ek.patch(patched).entries[1:]
    assert tables
    assert all(one.status == "already" for one in tables)
    ids = _ids()
    assert torch.equal(patched(ids), stock(ids))


@pytest.mark.parametrize("config", [{"type_vocab_size": 0}, {"position_biased_input": False}])
def test_deberta_without_types_or_positions(config):
    stock, patched = _pair(_one("deberta_v2.DebertaV2Embeddings"), **config)
    ids = _ids()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        expected, theirs = _run(stock, input_ids=ids, mask=ids != PADDING)
        output, ours = _run(patched, input_ids=ids, mask=ids != PADDING)
    assert torch.equal(output, expected)
    assert ours.keys() == theirs.keys()


def test_deberta_that_was_told_to_leave_positions_out_runs_stock():
    stock, patched = _pair(_one("deberta_v2.DebertaV2Embeddings"))
    stock.position_biased_input = patched.position_biased_input = False
    with pytest.warns(UserWarning, match="position_biased_input is not set"):
        assert torch.equal(patched(ids := _ids()), stock(ids))


def test_a_norm_of_transformers_own_leaves_the_module_and_fuses_its_lookups():
    cls = importlib.import_module("transformers.models.deberta.modeling_deberta").DebertaEmbeddings
    stock = cls(SimpleNamespace(**(CONFIG | dict.fromkeys(DROPOUTS, 0.0))))
    patched = copy.deepcopy(stock)
    entries = ek.patch(patched).entries
    assert entries[0].reason == "LayerNorm is a DebertaLayerNorm, not one of PyTorch's own"
    assert [(e.path, e.status) for e in entries] == [
        ("", "left alone"),
        ("word_embeddings", "patched"),
        ("position_embeddings", "patched"),
        ("token_type_embeddings", "patched"),
    ]
    assert torch.equal(patched(ids := _ids()), stock(ids))


def test_positions_that_lilt_returns_are_those_of_stock():
    stock, patched = _pair(_one("lilt.LiltTextEmbeddings"))
    ids = _ids()
    assert torch.equal(patched(ids)[1], stock(ids)[1])


def test_a_sequence_that_clip_refuses_is_refused_by_clip():
    _, patched = _pair(_one("clip.CLIPTextEmbeddings"))
    with pytest.raises(ValueError, match=f"got `sequence length`: {POSITIONS + 1}"):
        patched(torch.zeros(1, POSITIONS + 1, dtype=torch.long))


def test_visual_embeddings_of_visual_bert_run_stock():
    stock, patched = _pair(_one("visual_bert.VisualBertEmbeddings"))
    ids, pictures = _ids(), torch.randn(3, 2, WIDTH)
    with pytest.warns(UserWarning, match="visual_embeds is given"):
        output = patched(ids, visual_embeds=pictures)
    assert torch.equal(output, stock(ids, visual_embeds=pictures))


def test_an_unknown_argument_is_refused_by_stock_even_if_it_is_none():
    _, patched = _pair(_one("bert.BertEmbeddings"))
    with pytest.raises(TypeError, match="nothing_known"):
        patched(_ids(), nothing_known=None)


@pytest.mark.parametrize("row", POSITION_TABLES, ids=lambda row: row.example)
def test_position_tables_have_the_body_that_their_row_names(row):
    model, name = row.example.split(".")
    cls = vars(importlib.import_module(f"transformers.models.{model}.modeling_{model}"))[name]
    found = position_table(cls)
    assert found is not None
    # Since transformers 5.24 Marian's forward is that of a learned table: it lets gradients through.
    assert found is row or (model, found.example.split(".")[0]) == ("marian", "blenderbot")


class Changed(nn.Module):
    """BERT's parts, and another forward of the same name."""

    def __init__(self, config: object) -> None:
        super().__init__()
        bert = _one("bert.BertEmbeddings")(config)
        self.word_embeddings, self.LayerNorm = bert.word_embeddings, bert.LayerNorm

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.LayerNorm(self.word_embeddings(input_ids) * 2)


def test_a_forward_that_a_release_changes_is_not_fused(monkeypatch):
    """Its class is left as it is, and its tables are looked up one by one."""
    module = importlib.import_module("transformers.models.bert.modeling_bert")
    monkeypatch.setattr(Changed, "__module__", module.__name__)
    monkeypatch.setattr(module, "Changed", Changed, raising=False)
    changed = Changed(SimpleNamespace(**(CONFIG | dict.fromkeys(DROPOUTS, 0.0))))
    assert adapter_for(Changed) is None
    entries = ek.patch(changed).entries
    assert [(e.path, e.status) for e in entries] == [("word_embeddings", "patched")]
    # The body alone decides: with BERT's forward it has BERT's row.
    monkeypatch.setattr(Changed, "forward", _one("bert.BertEmbeddings").forward)
    assert adapter_for(Changed) is adapter_for(_one("bert.BertEmbeddings"))


@pytest.mark.parametrize("alone", [True, False])
def test_the_report_says_that_a_forward_is_not_known(alone, monkeypatch):
    """In a model, and for a class that is a row's example wherever it is."""
    name = "bert.BertEmbeddings" if alone else "electra.ElectraEmbeddings"
    known, cls = _one(name), name.split(".")[1]
    model = known(SimpleNamespace(**(CONFIG | dict.fromkeys(DROPOUTS, 0.0)))) if alone else build("electra")
    forward = lambda self, ids, types: self.word_embeddings(ids) - self.token_type_embeddings(types)
    monkeypatch.setattr(known, "forward", forward)
    with pytest.warns(UserWarning, match=f"{cls}: its forward is not known") as caught:
        report = ek.patch(model, attention=False)
    assert len(caught) == 1
    path = "" if alone else "embeddings"
    entry = next(entry for entry in report.entries if entry.path == path)
    assert (entry.was, entry.now, entry.status) == (cls, cls, "left alone")
    assert f"{cls}: its forward is not known in transformers {transformers.__version__}" in str(report)
    others = [entry for entry in report.entries if entry.path != path]
    assert len(others) == 3
    assert all(entry.status == "patched" for entry in others)


def test_a_model_with_one_table_and_no_row_is_nothing_to_note():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = ek.patch(build("llama"))
    assert all(entry.status == "patched" for entry in report.entries)


def test_a_forward_around_another_is_not_taken_for_it(monkeypatch):
    """As a patch of someone else leaves it: what it says it wraps is not what it does."""
    import functools

    cls = _one("bert.BertEmbeddings")
    known = cls.forward

    @functools.wraps(known)
    def doubled(self, *args, **kwargs):
        return 2 * known(self, *args, **kwargs)

    assert adapter_for(cls) is not None
    monkeypatch.setattr(cls, "forward", doubled)
    assert fingerprint_of(doubled) != fingerprint_of(known)
    assert adapter_for(cls) is None


def test_a_pickle_of_a_forward_that_is_not_known_here_is_a_stock_module(monkeypatch):
    import pickle

    _, patched = _pair(_one("electra.ElectraEmbeddings"))
    saved = pickle.dumps(patched)
    monkeypatch.setattr(fused, "adapter_for", lambda _: None)
    made = pickle.loads(saved)
    assert type(made) is _one("electra.ElectraEmbeddings")
    assert not fused.is_fused(made)
    assert torch.equal(made(ids := _ids()), patched(ids))

"""The configuration of a patched model: shared with whom it was shared, but for the attention implementation."""

import copy
import pickle

import pytest
import torch
import transformers
from torch import nn

import embedkernels as ek
from embedkernels.hf import config as hf_config
from embedkernels.hf import describe, fused
from tests.hf.models import MODELS, VOCAB, build, ids, padded

BY_NAME = pytest.mark.parametrize("name", MODELS)


def twins(name="bert"):
    """Two models of one configuration object."""
    first = build(name)
    return first, type(first)(first.config)


@BY_NAME
def test_a_model_of_the_same_configuration_is_not_touched(name):
    first, second = twins(name)
    shared = first.config
    ek.patch(second)
    assert first.config is shared
    assert (shared._attn_implementation, second.config._attn_implementation) == ("sdpa", "embedkernels")
    assert not describe(first).active
    assert {entry.status for entry in ek.patch(first).entries} == {"patched"}
    ek.unpatch(second)
    assert second.config is shared
    assert describe(first).active
    assert first.config._attn_implementation == "embedkernels"
    ek.unpatch(first)
    assert first.config is shared
    assert all(c is shared for model in (first, second) for _, _, c in hf_config._held(model.modules()))
    assert shared._attn_implementation == "sdpa"


@BY_NAME
def test_every_module_of_a_patched_model_holds_the_view(name):
    model = build(name)
    holders = list(hf_config._held(model.modules()))
    ek.patch(model)
    assert len(holders) > 1
    assert all(attributes[key] is model.config for attributes, key, _ in holders)


@pytest.mark.parametrize("name", ["gpt2", "bert", "llama"])
def test_a_model_made_by_the_class_of_a_patched_one_is_stock(name):
    model = build(name)
    stock = type(model)
    ek.patch(model)
    made = type(model)(build(name).config)
    assert type(made) is stock
    assert not describe(made).active


def test_a_part_made_by_the_class_of_a_patched_one_is_stock():
    part = build("bert").embeddings
    stock = type(part)
    ek.patch(part)
    assert type(part) is not stock
    assert type(type(part)(build("bert").config)) is stock


def test_a_model_made_of_the_configuration_of_a_patched_one_says_so_and_can_be_unpatched():
    model = build("bert")
    ek.patch(model)
    made = type(model)(copy.deepcopy(model.config))
    assert [(e.part, e.status) for e in describe(made).entries if e.part == "attention"] == [("attention", "already")]
    ek.unpatch(made)
    assert (made.config._attn_implementation, model.config._attn_implementation) == ("sdpa", "embedkernels")
    assert not hf_config.is_view(made.config)


def test_what_is_set_on_the_configuration_is_set_for_all_and_stays():
    first, second = twins()
    ek.patch(second)
    second.config.use_cache = False
    first.config.output_hidden_states = True
    second.config.num_labels = 7
    second.config.anything = [1]
    assert second(ids()).hidden_states is not None
    assert (first.config.use_cache, first.config.num_labels, first.config.anything) == (False, 7, [1])
    ek.unpatch(second)
    assert (second.config.use_cache, second.config.num_labels, second.config.output_hidden_states) == (False, 7, True)


def test_an_attention_implementation_set_on_a_patched_model_is_set_as_in_stock_and_stays():
    first, second = twins()
    ek.patch(second)
    second.set_attn_implementation("eager")
    assert first.config._attn_implementation == second.config._attn_implementation == "eager"
    assert second(ids(), output_attentions=True).attentions[0] is not None
    ek.unpatch(second)
    assert second.config is first.config
    assert second.config._attn_implementation == "eager"
    first, second = twins()
    ek.patch(second)
    second.set_attn_implementation("sdpa")
    assert ek.patch(second).entries[1].status == "patched"
    assert (first.config._attn_implementation, second.config._attn_implementation) == ("sdpa", "embedkernels")


@BY_NAME
def test_a_view_passes_for_its_configuration(name, tmp_path):
    model = build(name)
    stock = model.config
    text, plain, difference = stock.to_json_string(), stock.to_dict(), stock.to_diff_dict()
    ek.patch(model)
    view = model.config
    assert isinstance(view, type(stock))
    assert view.__class__ is type(stock)
    assert view == stock
    assert stock == view
    assert repr(view) == repr(stock)
    assert (view.to_json_string(), view.to_dict(), view.to_diff_dict()) == (text, plain, difference)
    view.save_pretrained(tmp_path)
    assert type(stock).from_pretrained(tmp_path)._attn_implementation is None
    assert type(type(view)()) is type(stock)
    made = transformers.AutoModel.from_config(view)
    assert type(made).__name__ == type(model).__name__


@pytest.mark.parametrize("how", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_have_one_configuration_of_their_own(how):
    model = transformers.BertForSequenceClassification(build("bert").config)
    stock = model.config
    ek.patch(model)
    made = how(model)
    assert made.config is made.bert.config
    assert hf_config.stock_of(made.config) is not stock
    made.config.anything = "of the copy"
    assert not hasattr(stock, "anything")
    ek.unpatch(made)
    assert type(made.config) is type(stock)
    assert all(c is made.config for _, _, c in hf_config._held(made.modules()))
    assert model.config._attn_implementation == "embedkernels"


def test_a_shallow_copy_of_a_view_is_independent():
    model = build("bert")
    ek.patch(model)
    twin = copy.copy(model.config)
    twin.anything = "of the copy"
    twin._attn_implementation = "eager"
    assert not hasattr(model.config, "anything")
    assert model.config._attn_implementation == "embedkernels"


def test_a_model_around_a_patched_one_joins_it():
    model = transformers.BertForSequenceClassification(build("bert").config)
    ek.patch(model.bert)
    assert (model.config._attn_implementation, model.bert.config._attn_implementation) == ("sdpa", "embedkernels")
    model.config.output_hidden_states = True
    assert model(ids()).hidden_states is not None
    assert [(e.path, e.status) for e in describe(model).entries] == [
        ("bert.embeddings", "already"),
        ("bert", "already"),
    ]
    ek.patch(model)
    assert model.config is model.bert.config
    ek.unpatch(model)
    assert model.config is model.bert.config
    assert type(model.config) is type(hf_config.stock_of(model.config))
    assert not describe(model).active


def test_two_models_of_one_configuration_in_one_module():
    both = nn.ModuleList(twins())
    shared = both[0].config
    ek.patch(both[0])
    statuses = [(e.path, e.status) for e in ek.patch(both).entries if e.part == "attention"]
    assert statuses == [("0", "already"), ("1", "patched")]
    assert both[1].config._attn_implementation == "embedkernels"
    ek.unpatch(both[0])
    assert (both[0].config._attn_implementation, both[1].config._attn_implementation) == ("sdpa", "embedkernels")
    ek.unpatch(both)
    assert both[0].config is both[1].config is shared


def llava():
    """A model of two models, whose configurations are parts of its own."""
    text = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=48,
        pad_token_id=1,
    )
    vision = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=2)
    return transformers.LlavaForConditionalGeneration(config).eval()


def test_parts_of_a_configuration_stay_the_objects_that_the_inner_models_hold():
    model = llava()
    outer, inner = model.config, model.config.text_config
    stock = copy.deepcopy(model)
    ek.patch(model, strict=True)
    language = model.model.language_model
    for one in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert one.config.text_config is one.model.language_model.config
        assert one.config.text_config._attn_implementation == "embedkernels"
        assert one.config.vision_config._attn_implementation == "sdpa"
    assert (outer.text_config, inner._attn_implementation) == (inner, "sdpa")
    inputs = padded()
    assert torch.equal(model(**inputs).logits, stock(**inputs).logits)
    assert model.config.to_json_string() == stock.config.to_json_string()
    model.set_attn_implementation({"text_config": "eager", "vision_config": "sdpa"})
    stock.set_attn_implementation({"text_config": "eager", "vision_config": "sdpa"})
    assert torch.equal(model(**inputs).logits, stock(**inputs).logits)
    ek.patch(model)
    model.set_attn_implementation("sdpa")
    ek.patch(model)
    assert model.config.text_config is language.config
    assert language.config._attn_implementation == "embedkernels"
    ek.unpatch(language)
    assert model.config.text_config is language.config is inner
    ek.unpatch(model)
    assert model.config is outer


def test_an_encoder_and_a_decoder_in_one_model():
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(
        build("bert").config, build("gpt2").config
    )
    config.decoder.add_cross_attention = True
    torch.manual_seed(0)
    model = transformers.EncoderDecoderModel(config).eval()
    stock = copy.deepcopy(model)
    ek.patch(model, strict=True)
    assert model.config.encoder is model.encoder.config
    assert model.config.decoder is model.decoder.config
    inputs = padded() | {"decoder_input_ids": ids()}
    assert torch.equal(model(**inputs).logits, stock(**inputs).logits)
    ek.unpatch(model)
    assert not hf_config.is_view(model.config)
    assert model.config.encoder is model.encoder.config
    assert not any(fused.is_fused(module) for module in model.modules())


def implementations(model):
    """Every attention implementation that a module of the model reads."""
    return {config._attn_implementation for _, _, config in hf_config._held(model.modules())}


def test_unpatching_a_model_that_was_given_the_view_leaves_the_patched_one_patched():
    model = build("bert")
    ek.patch(model)
    made = type(model)(model.config)
    ek.unpatch(made)
    assert implementations(made) == {"sdpa"}
    assert implementations(model) == {"embedkernels"}
    ek.unpatch(model)
    assert made.config is model.config


def test_a_patched_model_that_was_given_a_view_keeps_its_own():
    model = build("bert")
    ek.patch(model)
    made = type(model)(model.config)
    ek.patch(made)
    ek.unpatch(model)
    assert (implementations(model), implementations(made)) == ({"sdpa"}, {"embedkernels"})


@pytest.mark.parametrize("how", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_knows_which_model_its_views_are_of(how):
    model = transformers.BertForSequenceClassification(build("bert").config)
    ek.patch(model)
    made = how(model)
    other = type(model)(made.config)
    ek.unpatch(other)
    assert implementations(made) == {"embedkernels"}
    ek.unpatch(made.bert)
    assert made.config._attn_implementation == "sdpa"
    assert implementations(model) == {"embedkernels"}


@pytest.mark.parametrize("index", [0, 1])
def test_models_of_one_configuration_that_were_patched_at_once_are_unpatched_alone(index):
    both = nn.ModuleList(twins())
    statuses = [(e.path, e.status) for e in ek.patch(both).entries if e.part == "attention"]
    assert statuses == [("0", "patched"), ("1", "patched")]
    ek.unpatch(both[index])
    assert implementations(both[index]) == {"sdpa"}
    assert implementations(both[1 - index]) == {"embedkernels"}
    ek.unpatch(both)
    assert both[0].config is both[1].config


def test_a_model_without_a_row_beside_a_patched_one_is_left_alone():
    class Own(transformers.PreTrainedModel):
        config_class = transformers.BertConfig
        _supports_sdpa = True

    model = build("bert")
    both = nn.ModuleList([model, Own(model.config)])
    entries = {e.path: e.status for e in ek.patch(both).entries if e.part == "attention"}
    assert entries == {"0": "patched", "1": "left alone"}
    assert (both[0].config._attn_implementation, both[1].config._attn_implementation) == ("embedkernels", "sdpa")


@pytest.mark.parametrize("again", [False, True])
def test_a_configuration_set_after_patching_is_kept_and_no_view_stays(again):
    model = build("bert")
    stock, other = model.config, copy.deepcopy(model.config)
    ek.patch(model)
    model.config = other
    if again:
        assert [e.status for e in ek.patch(model).entries] == ["already", "patched"]
        assert implementations(model) == {"embedkernels"}
    ek.unpatch(model)
    assert model.config is other
    assert all(c is stock for m, _, c in hf_config._held(model.modules()) if m is not model.__dict__)


def test_a_model_that_was_given_the_view_of_another_is_not_called_patched_until_its_layers_are():
    model, patched = build("bert"), build("bert")
    ek.patch(patched)
    stock, mine = copy.deepcopy(model), model.config
    model.config = patched.config
    assert describe(model).entries[1].status == "left alone"
    assert ek.patch(model).entries[1].status == "patched"
    assert implementations(model) == {"embedkernels"}
    inputs = padded(3, 3)
    assert torch.equal(model(**inputs).last_hidden_state, stock(**inputs).last_hidden_state)
    ek.unpatch(patched)
    assert implementations(model) == {"embedkernels"}
    ek.unpatch(model)
    assert implementations(model) == {"sdpa"}
    assert model.config is patched.config
    assert model.encoder.layer[0].attention.self.config is mine


def test_layers_with_an_attention_of_their_own_are_not_fused():
    model = build("bert")
    eager = copy.deepcopy(model.config)
    eager._attn_implementation = "eager"
    model.encoder.layer[0].attention.self.config = eager
    entry = ek.patch(model).entries[1]
    assert (entry.status, entry.now) == ("left alone", "eager")
    assert implementations(model) == {"sdpa", "eager"}


@pytest.mark.parametrize("times", [1, 2])
def test_parts_of_a_configuration_stay_those_objects_when_the_inner_model_is_patched_first(times):
    model = llava()
    outer, inner = model.config, model.config.text_config
    language = model.model.language_model
    for _ in range(times):
        ek.unpatch(language)
        ek.patch(language)
        ek.patch(model)
        assert model.config.text_config is language.config
        assert model.config.text_config._attn_implementation == "embedkernels"
        assert model.config.vision_config._attn_implementation == "sdpa"
    ek.unpatch(language)
    assert model.config.text_config is language.config is inner
    ek.unpatch(model)
    assert model.config is outer


def test_a_configuration_class_that_a_user_registered_is_found(monkeypatch):
    class OwnConfig(transformers.BertConfig):
        model_type = "own-bert"

    class OwnModel(transformers.BertModel):
        config_class = OwnConfig

    mapping = transformers.AutoModel._model_mapping
    monkeypatch.setattr(mapping, "_extra_content", dict(mapping._extra_content))
    transformers.AutoModel.register(OwnConfig, OwnModel)
    model = OwnModel(OwnConfig(**build("bert").config.to_diff_dict()))
    ek.patch(model)
    assert type(transformers.AutoModel.from_config(model.config)) is OwnModel


def test_the_class_of_a_view_is_equal_to_that_of_its_configuration_only():
    model, other = build("bert"), build("roberta")
    stock = type(model.config)
    ek.patch(model)
    ek.patch(other)
    view, of_other = type(model.config), type(other.config)
    assert view is not stock
    assert view in [stock]
    assert stock in [view]
    assert {stock: 1}[view] == {view: 1}[stock] == 1
    assert not any(view in [it] for it in (of_other, transformers.RobertaConfig, "BertConfig", None))


def test_a_missing_part_of_a_configuration_is_an_attribute_error():
    model = llava()
    ek.patch(model)
    view, stock = model.config, hf_config.stock_of(model.config)
    assert view.vision_config is stock.vision_config
    del view.vision_config
    assert "vision_config" not in stock.__dict__
    assert getattr(view, "vision_config", "default") == getattr(stock, "vision_config", "default")
    del view.text_config
    assert "text_config" not in stock.__dict__
    for config in (stock, view):
        with pytest.raises(AttributeError, match="text_config"):
            del config.text_config
    copy.copy(view)


def test_an_attribute_that_neither_has_is_missing_in_a_view(monkeypatch):
    monkeypatch.setitem(transformers.BertConfig.sub_configs, "part", transformers.BertConfig)
    monkeypatch.setattr(hf_config, "_CLASSES", {})
    view = hf_config.view_of(build("bert").config, {})
    assert not hasattr(view, "part")
    assert getattr(view, "part", 3) == 3
    assert not hasattr(copy.copy(view), "part")


def test_setting_the_implementation_that_is_set_changes_nothing():
    model = build("bert")
    ek.patch(model)
    model.config._attn_implementation = "".join(["embed", "kernels"])  # another object
    assert hf_config.stock_of(model.config)._attn_implementation == "sdpa"
    assert model.config._attn_implementation == "embedkernels"


def test_patching_a_patched_model_of_models_keeps_its_configuration():
    model = llava()
    ek.patch(model.model)
    ek.patch(model)
    holders = [(attributes, name, config) for attributes, name, config in hf_config._held(model.modules())]
    ek.patch(model)
    assert all(attributes[name] is config for attributes, name, config in holders)
    assert model.config is model.model.config


def test_two_models_of_models_of_one_configuration():
    first = llava()
    both = nn.ModuleList([first, type(first)(first.config)])
    stock = first.config
    ek.patch(both)
    for model in both:
        assert model.config is model.model.config
        assert model.config.text_config is model.model.language_model.config
        assert model.config.text_config._attn_implementation == "embedkernels"
    ek.unpatch(both[0])
    assert both[0].config is stock
    assert both[1].config.text_config._attn_implementation == "embedkernels"
    ek.unpatch(both)
    assert both[1].config is stock

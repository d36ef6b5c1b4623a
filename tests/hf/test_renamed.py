"""Arguments that transformers 5.24 renamed: one forward under both names, and the old keyword works as in stock."""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import warnings

import pytest
import torch
from transformers.utils.deprecation import deprecate_kwarg

import embedkernels as ek
from embedkernels.hf import fused, rotary
from embedkernels.hf.adapters import adapter_for
from embedkernels.hf.bodies import fingerprint, fingerprint_of, in_deprecations, undeprecated
from embedkernels.hf.rotary import rotary_of
from embedkernels.ops import rope as rope_op
from tests.hf.models import ids, named_here, pair

BEFORE = "def forward(self, x, past_key_values=None):\n    return self.layer(x, past_key_values=past_key_values)"
RENAMING = '@deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")\n'


def _of(source: str) -> str:
    return fingerprint(ast.parse(source).body[0])


def test_a_forward_with_renamed_arguments_is_the_same():
    after = BEFORE.replace("past_key_values", "cache")
    assert _of(after) == _of(BEFORE)
    assert _of(RENAMING + after) == _of(BEFORE)
    assert _of(BEFORE.replace("past_key_values", "past_key_values_length")) == _of(
        BEFORE.replace("past_key_values", "cache_length")
    )


@pytest.mark.parametrize(
    "other",
    [
        "def forward(self, x, cache=None):\n    return self.layer(x, past_key_values=cache)",
        "def forward(self, x, stash=None):\n    return self.layer(x, stash=stash)",
        "def forward(self, x, cache=None):\n    return self.layer(x, cache=x)",
        '@other("past_key_values")\n' + BEFORE,
        "@deprecate_kwarg\n" + BEFORE,
    ],
    ids=["both names", "another name", "another use", "another decorator", "no call"],
)
def test_another_forward_is_another(other):
    assert _of(other) != _of(BEFORE)


def plain(self, new=None):
    return self, new


def test_the_decorator_is_looked_through_and_made_again():
    decorated = deprecate_kwarg("old", "99.0.0", new_name="new")(plain)
    twice = deprecate_kwarg("older", "99.0.0", new_name="new")(decorated)
    assert undeprecated(decorated) is plain
    assert undeprecated(twice) is plain
    assert fingerprint_of(twice) == fingerprint_of(plain)

    def other(self, new=None):
        return "other", self, new

    for stock in (twice, functools.wraps(twice)(lambda *args, **kwargs: twice(*args, **kwargs))):
        made = in_deprecations(stock, other)
        assert made(1, 2) == ("other", 1, 2)
        assert undeprecated(made) is other
        for old in ("old", "older"):
            with pytest.warns(FutureWarning, match=f"`{old}` is deprecated"):
                assert made(1, **{old: 3}) == ("other", 1, 3)
            with pytest.warns(FutureWarning, match=f"`{old}` is deprecated"):
                assert stock(1, **{old: 3}) == (1, 3)
    assert in_deprecations(plain, other) is other


def test_what_only_says_that_it_wraps_is_not_looked_through():
    other = functools.wraps(plain)(lambda *_: 0)
    assert undeprecated(other) is other
    decorated = deprecate_kwarg("old", "99.0.0", new_name="new")(plain)
    decorated.__wrapped__ = other  # its closure calls ``plain``
    assert undeprecated(decorated) is decorated


@pytest.fixture
def with_old_keyword(monkeypatch):
    """Gives a class of transformers a forward that takes a keyword by an old name as well."""
    monkeypatch.setattr(fused, "_CLASSES", {})

    def decorate(cls, new):
        decorated = deprecate_kwarg("formerly", "99.0.0", new_name=new)(cls.forward)
        monkeypatch.setattr(cls, "forward", decorated)

    return decorate


def _module(name):
    return importlib.import_module(f"transformers.models.{name}.modeling_{name}")


@pytest.mark.parametrize(("name", "cls"), [("bert", "BertEmbeddings"), ("gpt2", "GPT2Model")])
def test_embeddings_take_the_old_keyword_and_stay_fused(name, cls, with_old_keyword, monkeypatch):
    calls = []
    monkeypatch.setattr(fused, "embed", lambda *a, **k: (calls.append(1), ek.embed(*a, **k))[1])
    with_old_keyword(getattr(_module(name), cls), "input_ids")
    part = "embeddings" if name == "bert" else ""
    stock, patched = (model.eval().get_submodule(part) for model in pair(name))
    assert adapter_for(fused.stock_class(patched)) is not None
    given = ids()
    outputs = []
    for module in (stock, patched):
        with pytest.warns(FutureWarning, match="`formerly` is deprecated") as caught:
            output = module(formerly=given)
        assert len([one for one in caught if one.category is FutureWarning]) == 1
        outputs.append(output if name == "bert" else output.last_hidden_state)
    assert torch.equal(*outputs)
    assert len(calls) == 1


def test_rotary_attention_takes_the_old_keyword_and_stays_fused(with_old_keyword, monkeypatch):
    cls = _module("llama").LlamaAttention
    with_old_keyword(cls, "attention_mask")
    assert rotary_of(cls).rotation is not None
    launches = []
    monkeypatch.setattr(rotary, "rope", lambda *a, **k: (launches.append(1), rope_op.rope(*a, **k))[1])
    stock, patched = pair("llama")
    hidden = torch.randn(2, 5, 32)
    tables = stock.rotary_emb(hidden, torch.arange(5)[None])
    outputs = []
    for model in (stock, patched):
        said = "`formerly` is deprecated .* `LlamaAttention.forward`"
        with ek.use_backend("triton"), pytest.warns(FutureWarning, match=said):
            outputs.append(model.layers[0].self_attn(hidden, position_embeddings=tables, formerly=None)[0])
    torch.testing.assert_close(*outputs)
    assert launches == [1]


def test_a_cache_goes_by_both_names(monkeypatch):
    """The old one with the warning of stock where it was renamed, and at the position where the cache ends."""
    stock, patched = (model.eval() for model in pair("gpt2"))
    calls = []
    monkeypatch.setattr(fused, "embed", lambda *a, **k: (calls.append(k["position_start"]), ek.embed(*a, **k))[1])
    names = dict.fromkeys(("past_key_values", named_here("past_key_values", type(stock).forward)))
    for name in names:
        outputs = []
        for model in (stock, patched):
            before = model(ids(2, 5).fill_(7), use_cache=True)
            kept = before[named_here("past_key_values", type(stock).forward)]
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                outputs.append(model(ids(2, 3).fill_(9), **{name: kept}).last_hidden_state)
            renamed = name not in inspect.signature(type(stock).forward).parameters
            assert len([one for one in caught if one.category is FutureWarning]) == renamed
        assert torch.equal(*outputs)
        assert calls[-2:] == [0, 5]

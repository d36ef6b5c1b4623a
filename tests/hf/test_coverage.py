"""docs/coverage.md is what the installed transformers gives; the fingerprint of a forward is its meaning alone."""

from __future__ import annotations

import ast
import functools
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
import transformers

import embedkernels as ek
from embedkernels.hf import coverage
from embedkernels.hf.adapters import ADAPTERS, adapter_for
from embedkernels.hf.bodies import fingerprint, fingerprint_of
from embedkernels.hf.rotary import ROTATIONS

FILE = Path(__file__).parents[2] / "docs" / "coverage.md"


def _of(source: str) -> str:
    return fingerprint(ast.parse(source).body[0])


PLAIN = "def forward(self, a, b=None):\n    return self.norm(a + 1)"


@pytest.mark.parametrize(
    "same",
    [
        'def other(self, a: int, b: "T" = None):\n    """Words."""\n    # More.\n\n    return self.norm((a + 1))',
        "def forward(\n    self,\n    a,\n    b = None\n):\n    return self.norm(\n        a + 1,\n    )",
    ],
)
def test_what_changes_nothing_does_not_change_the_fingerprint(same):
    assert _of(same) == _of(PLAIN)


@pytest.mark.parametrize(
    "other",
    [
        "def forward(self, a, b=None):\n    return self.norm(a + 2)",
        "def forward(self, a, b=None):\n    return self.norm(a - 1)",
        "def forward(self, a, b=0):\n    return self.norm(a + 1)",
        "def forward(self, b, a=None):\n    return self.norm(a + 1)",
        "def forward(self, a, b=None):\n    return self.drop(a + 1)",
        "def forward(self, a, b=None):\n    a += 1\n    return self.norm(a + 1)",
        "@twice\ndef forward(self, a, b=None):\n    return self.norm(a + 1)",
        "def forward(self, a, *, b=None):\n    return self.norm(a + 1)",
    ],
)
def test_what_changes_something_changes_the_fingerprint(other):
    assert _of(other) != _of(PLAIN)


def test_a_variable_with_an_annotation_is_a_variable():
    assert _of("def f(x):\n    y: int = x\n    return y") == _of("def f(x):\n    y = x\n    return y")


def test_the_fingerprint_of_a_class_is_that_of_its_source():
    cls = transformers.models.bert.modeling_bert.BertEmbeddings
    tree = ast.parse(Path(transformers.models.bert.modeling_bert.__file__).read_text(encoding="utf-8"))
    node = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "BertEmbeddings")
    assert fingerprint_of(cls.forward) == coverage._body(node)


def test_a_decorator_of_torchs_is_looked_through_and_counts():
    @torch.no_grad()
    def frozen(x):
        return x + 1

    @torch.enable_grad()
    def other(x):
        return x + 1

    def plain(x):
        return x + 1

    assert fingerprint_of(frozen) == _of("@torch.no_grad()\ndef forward(x):\n    return x + 1")
    assert len({fingerprint_of(one) for one in (frozen, other, plain)}) == 3


def test_what_has_no_source_has_no_fingerprint():
    assert fingerprint_of(len) is None
    names: dict[str, object] = {}
    exec("def forward(self, a): return a", names)
    assert fingerprint_of(names["forward"]) is None


def _doubled(self, input_ids=None, inputs_embeds=None, position_ids=None, **_):
    """GPT-2's beginning with a factor that the row knows nothing of."""
    embeds = self.wte(input_ids) if inputs_embeds is None else inputs_embeds
    return self.drop(2.0 * embeds + self.wpe(position_ids))


def test_a_model_whose_forward_changed_has_no_row(monkeypatch):
    """Its tables are looked up: what it does between the lookups and the dropout is not known."""
    cls = transformers.GPT2Model
    stock = cls.forward
    assert adapter_for(cls).recipe == "inline"
    for other in (_doubled, functools.wraps(stock)(lambda self, *args, **kwargs: stock(self, *args, **kwargs))):
        monkeypatch.setattr(cls, "forward", other)
        assert adapter_for(cls) is None
        model = cls(transformers.GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=20))
        with pytest.warns(UserWarning, match="GPT2Model: its forward is not known") as caught:
            entries = {entry.path: entry for entry in ek.patch(model, attention=False).entries}
        assert len(caught) == 1
        assert {path: entry.status for path, entry in entries.items()} == {
            "": "left alone",
            "wte": "patched",
            "wpe": "patched",
        }


def test_a_frozen_lookup_is_told_by_its_own_decorator():
    def forward(self, ids):
        return ids

    @torch.no_grad()
    def frozen(self, ids):
        return ids

    assert fingerprint_of(forward) is not None
    assert fingerprint_of(frozen) not in (None, fingerprint_of(forward))
    assert fingerprint_of(torch.no_grad()(forward)) is None


def test_the_file_is_what_the_installed_transformers_gives():
    found = coverage.front_ends(coverage.models_folder())
    users = coverage.rotary_users(coverage.models_folder())
    text = coverage.render(found, users, transformers.__version__)
    there = FILE.read_text(encoding="utf-8")
    if f"from transformers {transformers.__version__} " in there:
        assert there == text
        text = there
    total, covered = map(int, re.findall(r"\*\*(\d+) classes look tokens up: `patch` covers (\d+)", text)[0])
    assert (total, covered) == (len(found), sum(one.adapter is not None for one in found))
    assert total > 300
    assert covered > 0.95 * total
    total, replaced = map(int, re.findall(r"\*\*(\d+) classes turn query .* in (\d+)\.", text)[0])
    assert (total, replaced) == (len(users), sum(one.rotation is not None for one in users))
    assert total > 200
    assert replaced > 0.7 * total
    assert {one.rotation for one in users} == {*ROTATIONS, None}
    assert all(bool(one.why) == (one.rotation is None) for one in users)
    recipes = Counter(one.adapter.recipe for one in found if one.adapter is not None)
    assert recipes["stem"] >= 55
    assert recipes["scaled"] >= 23
    assert recipes["inline"] == sum(row.recipe == "inline" for row in ADAPTERS)
    assert all(one.why for one in found if one.adapter is None)
    for cls in (
        "bert.BertEmbeddings",
        "llama.LlamaModel",
        "bart.BartEncoder",
        "gemma3.Gemma3TextModel",
        "t5.T5Stack",
    ):
        assert cls in text


def test_the_command_writes_checks_and_names_a_body(tmp_path, capsys):
    file = tmp_path / "coverage.md"
    assert coverage.main(["--write", str(file)]) == 0
    assert coverage.main(["--check", str(file)]) == 0
    file.write_text(file.read_text(encoding="utf-8").replace("bert.BertEmbeddings", ""), encoding="utf-8")
    assert coverage.main(["--check", str(file)]) == 1
    assert "run --write" in capsys.readouterr().out
    other = file.read_text(encoding="utf-8").replace(f"transformers {transformers.__version__} ", "transformers 1.0 ")
    file.write_text(other, encoding="utf-8")
    assert coverage.main(["--check", str(file)]) == 0
    assert "not compared" in capsys.readouterr().out
    assert coverage.main(["--body", "bert.BertEmbeddings"]) == 0
    assert "ce63879430a6 modeling_bert.py" in capsys.readouterr().out
    assert coverage.main(["--body", "bert.Nothing"]) == 1

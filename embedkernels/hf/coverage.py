"""Which classes of the installed transformers look tokens up, which of them ``patch`` fuses, and how.

    python -m embedkernels.hf.coverage                           print the table
    python -m embedkernels.hf.coverage --write docs/coverage.md  write it
    python -m embedkernels.hf.coverage --check docs/coverage.md  fail if the file says something else
    python -m embedkernels.hf.coverage --body bert.BertEmbeddings  fingerprint of a forward, for a new row

A class counts if it is defined in a ``modeling_*.py`` of transformers.models, makes a table whose number of rows is a
vocabulary's (``vocab_size``, but not ``type_vocab_size``) and calls that table in one of its methods. A table that a
class makes for others, as T5's ``shared``, counts where it is called. A class turns query and key by rotary positions
if its forward calls a function whose name says so. Sources are read, no model is imported.
"""

from __future__ import annotations

import argparse
import ast
import functools
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from embedkernels.hf.adapters import ADAPTERS, LOOKUP, Adapter
from embedkernels.hf.bodies import decorators, fingerprint
from embedkernels.hf.rotary import BY_BODIES, Rotation, called_like_one

_BY_BODY: dict[str | None, Adapter] = {adapter.body: adapter for adapter in ADAPTERS if adapter.body is not None}
_INLINE = {adapter.example: adapter for adapter in ADAPTERS if adapter.recipe == "inline"}
_PLAIN = "nn.Embedding"
_OF_TORCH = {"nn.Embedding", "nn.LayerNorm", "LayerNorm", "nn.Dropout"}


@dataclass(frozen=True)
class FrontEnd:
    """A class that looks tokens up.

    Attributes:
        model: the folder of transformers.models.
        cls: the class.
        adapter: how it, or the table in it, is fused; None if it stays stock.
        why: why it stays stock, or why only its table is fused.
    """

    model: str
    cls: str
    adapter: Adapter | None
    why: str = ""


@dataclass(frozen=True)
class RotaryUser:
    """A class that turns query and key by rotary positions.

    Attributes:
        model: the folder of transformers.models.
        cls: the class.
        rotation: what replaces the function that it calls; None if nothing does.
        why: why it stays stock.
    """

    model: str
    cls: str
    rotation: Rotation | None
    why: str = ""


def models_folder() -> Path:
    """The folder of the installed transformers.models."""
    spec = importlib.util.find_spec("transformers")
    assert spec is not None
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]) / "models"


@functools.lru_cache(maxsize=1)
def front_ends(folder: Path) -> tuple[FrontEnd, ...]:
    """Every class that looks tokens up, in the order of models and classes."""
    found = []
    for file in sorted(folder.glob("*/modeling_*.py")):
        source = file.read_text(encoding="utf-8")
        if not _may_count(source):
            continue
        lines = source.splitlines()
        classes = {node.name: node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)}
        for cls in classes.values():
            if _may_count("\n".join(lines[cls.lineno - 1 : cls.end_lineno])):
                found.append(_front_end(file.parent.name, cls, classes))
    return tuple(sorted((one for one in found if one is not None), key=lambda one: (one.model, one.cls)))


@functools.lru_cache(maxsize=1)
def rotary_users(folder: Path) -> tuple[RotaryUser, ...]:
    """Every class whose forward calls a rotary function, in the order of models and classes."""
    found = []
    for file in sorted(folder.glob("*/modeling_*.py")):
        source = file.read_text(encoding="utf-8")
        if "rotary" not in source and "rope" not in source:
            continue
        body = ast.parse(source).body
        functions = {node.name: node for node in body if isinstance(node, ast.FunctionDef)}
        if not any(map(called_like_one, functions)):
            continue
        for cls in body:
            if isinstance(cls, ast.ClassDef) and (user := _rotary_user(file.parent.name, cls, functions)) is not None:
                found.append(user)
    return tuple(sorted(found, key=lambda one: (one.model, one.cls)))


def _rotary_user(model: str, cls: ast.ClassDef, functions: dict[str, ast.FunctionDef]) -> RotaryUser | None:
    forward = _forward(cls)
    called = dict.fromkeys(name for name in _names(forward) if name in functions and called_like_one(name))
    if forward is None or not called:
        return None
    name = next(iter(called))
    why = f"its function is `{name}`, which has no row"
    if len(called) > 1:
        return RotaryUser(model, cls.name, None, f"it calls {' and '.join(f'`{one}`' for one in called)}")
    helpers = [one for one in _names(functions[name]) if one in functions]
    bodies = (fingerprint(functions[name]), fingerprint(functions[helpers[0]]) if len(set(helpers)) == 1 else "")
    rotation = BY_BODIES.get(bodies)
    if rotation is not None and decorators(forward):
        rotation, why = None, "its forward is decorated"
    return RotaryUser(model, cls.name, rotation, "" if rotation else why)


def _names(node: ast.AST | None) -> list[str]:
    return [] if node is None else [one.id for one in ast.walk(node) if isinstance(one, ast.Name)]


def _may_count(source: str) -> bool:
    """Whether there can be a table over a vocabulary: parsing is slow."""
    return "vocab_size" in source and ("Embedding(" in source or "EmbeddingTable(" in source)


def _front_end(model: str, cls: ast.ClassDef, classes: dict[str, ast.ClassDef]) -> FrontEnd | None:
    made = dict(_made(cls))
    called = set(_called(cls))
    tables = {name: call for name, call in made.items() if name in called and _over_vocabulary(call)}
    if not tables:
        return None
    inline = _INLINE.get(f"{model}.{cls.name}")
    if inline is not None and _body(cls) in inline.bodies:
        return FrontEnd(model, cls.name, inline)
    adapter, why = _BY_BODY.get(_body(cls)), ""
    if adapter is not None:
        parts = (adapter.norm, adapter.dropout, *adapter.tables)
        foreign = [
            f"`{_class(made[part])}`" for part in parts if part in made and _class(made[part]) not in _OF_TORCH
        ]
        if not foreign:
            return FrontEnd(model, cls.name, adapter)
        why = f"its norm is a {foreign[0]}"
    kinds = dict.fromkeys(_class(call) for call in tables.values())
    if set(kinds) == {_PLAIN}:
        return FrontEnd(model, cls.name, LOOKUP, why)
    scaled = [_BY_BODY.get(_body(classes[kind])) if kind in classes else None for kind in kinds if kind != _PLAIN]
    if scaled and all(one is not None and one.recipe == "scaled" for one in scaled):
        return FrontEnd(model, cls.name, scaled[0])
    own = ", ".join(f"`{kind}`" for kind in kinds if kind != _PLAIN)
    return FrontEnd(model, cls.name, None, f"its table is a {own}, whose forward is in no row")


def _made(cls: ast.ClassDef) -> Iterator[tuple[str, ast.Call]]:
    """Attributes that ``__init__`` sets to what a call makes."""
    for method in cls.body:
        if isinstance(method, ast.FunctionDef) and method.name == "__init__":
            for node in ast.walk(method):
                if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Attribute):
                    for call in ast.walk(node.value):
                        if isinstance(call, ast.Call):
                            yield node.targets[0].attr, call
                            break


def _called(cls: ast.ClassDef) -> Iterator[str]:
    """Attributes of self that some method calls."""
    for node in ast.walk(cls):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner = node.func.value
            if isinstance(owner, ast.Name) and owner.id == "self":
                yield node.func.attr


def _over_vocabulary(call: ast.Call) -> bool:
    if not _class(call).endswith(("Embedding", "EmbeddingTable")):
        return False
    rows = [*call.args[:1], *(keyword.value for keyword in call.keywords if keyword.arg == "num_embeddings")]
    said = " ".join(map(ast.unparse, rows))
    return "vocab_size" in said and "type_vocab" not in said


def _class(call: ast.Call) -> str:
    return ast.unparse(call.func)


def _body(cls: ast.ClassDef) -> str | None:
    forward = _forward(cls)
    return None if forward is None else fingerprint(forward)


def _forward(cls: ast.ClassDef) -> ast.FunctionDef | None:
    forwards = [node for node in cls.body if isinstance(node, ast.FunctionDef) and node.name == "forward"]
    return forwards[-1] if forwards else None


def render(found: Sequence[FrontEnd], users: Sequence[RotaryUser], version: str) -> str:
    """The tables in Markdown."""
    of = {recipe: [one for one in found if one.adapter and one.adapter.recipe == recipe] for recipe in _TITLES}
    stock = [one for one in found if one.adapter is None]
    fused = len(of["stem"]) + len(of["inline"])
    lines = [
        "# Coverage",
        "",
        f"Generated from transformers {version} by `python -m embedkernels.hf.coverage --write docs/coverage.md`.",
        "Its docstring says which classes count.",
        "",
        f"**{len(found)} classes look tokens up: `patch` covers {len(found) - len(stock)}.** In {fused} the lookup "
        f"and what follows it are one op, in {len(of['scaled'])} the lookup and its factor, in {len(of['lookup'])} "
        f"the lookup alone; {len(stock)} stay stock.",
    ]
    for recipe, title in _TITLES.items():
        lines += ["", f"## {title}", "", "| one op | classes |", "|---|---|"]
        groups: dict[str, list[str]] = {}
        for one in of[recipe]:
            assert one.adapter is not None
            note = f" ({one.why})" if one.why else ""
            groups.setdefault(one.adapter.formula, []).append(f"{one.model}.{one.cls}{note}")
        lines += [f"| {formula} | {len(names)}: {', '.join(names)} |" for formula, names in groups.items()]
    lines += ["", "## Stock", "", "| class | why |", "|---|---|"]
    lines += [f"| {one.model}.{one.cls} | {one.why} |" for one in stock]
    known = [one for one in users if one.rotation is not None]
    lines += [
        "",
        "## Rotary positions",
        "",
        f"**{len(users)} classes turn query and key by a function of their module: `patch` replaces it in "
        f"{len(known)}.**",
        "",
        "| one op | classes |",
        "|---|---|",
    ]
    turned: dict[str, list[str]] = {}
    for user in known:
        assert user.rotation is not None
        turned.setdefault(user.rotation.formula, []).append(f"{user.model}.{user.cls}")
    lines += [f"| {formula} | {len(names)}: {', '.join(names)} |" for formula, names in turned.items()]
    lines += ["", "| stock | why |", "|---|---|"]
    lines += [f"| {one.model}.{one.cls} | {one.why} |" for one in users if one.rotation is None]
    return "\n".join(lines) + "\n"


_TITLES = {
    "stem": "Modules of their own",
    "inline": "At the start of a model's forward",
    "scaled": "Scaled lookups",
    "lookup": "Lookups",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m embedkernels.hf.coverage", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--write", type=Path, metavar="FILE")
    what.add_argument("--check", type=Path, metavar="FILE")
    what.add_argument("--body", metavar="MODEL.CLASS")
    given = parser.parse_args(arguments)
    if given.body:
        return _print_bodies(*given.body.split(".", 1))
    import transformers

    folder = models_folder()
    text = render(front_ends(folder), rotary_users(folder), transformers.__version__)
    if given.write:
        given.write.write_text(text, encoding="utf-8")
    elif given.check:
        there = given.check.read_text(encoding="utf-8")
        if f"from transformers {transformers.__version__} " not in there:
            print(f"{given.check} is of another transformers than {transformers.__version__}: not compared")
        elif there != text:
            print(
                f"{given.check} is not what transformers {transformers.__version__} gives: run --write {given.check}"
            )
            return 1
    else:
        print(text, end="")
    return 0


def _print_bodies(model: str, name: str) -> int:
    status = 1
    for file in sorted((models_folder() / model).glob("modeling_*.py")):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and node.name == name:
                print(_body(node), file.name)
                status = 0
    return status


if __name__ == "__main__":
    sys.exit(main())

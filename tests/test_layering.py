"""Floors: each folder of the package imports only what stands below it, and heavy imports wait until needed."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

FLOORS = {
    "reference": 1,
    "kernels": 2,
    "ops": 3,
    "nn": 4,
    "optim": 4,
    "distributed": 4,
    "hf": 5,
    "cli": 6,
}
# Who may import these while being imported itself; everyone may inside a function.
EAGER = {"triton": {"kernels"}, "transformers": {"hf", "cli"}, "accelerate": {"hf", "cli"}, "datasets": {"cli"}}


def package_root() -> Path:
    spec = importlib.util.find_spec("embedkernels")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def imported(node: ast.AST, package: tuple[str, ...]) -> list[str]:
    """Full names of the modules that ``node`` imports; ``package`` is where its file lives."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            base = ".".join((*package[: len(package) - node.level + 1], *([base] if base else [])))
        # ``from embedkernels import ops`` names a floor by the alias.
        return [f"{base}.{alias.name}" for alias in node.names] if base == "embedkernels" else [base]
    if isinstance(node, ast.Call):
        called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if called in ("import_module", "__import__") and node.args and isinstance(node.args[0], ast.Constant):
            return [str(node.args[0].value)]
    return []


def run_at_import(tree: ast.AST) -> Iterator[ast.AST]:
    """The nodes that are executed when the module is imported."""
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from run_at_import(child)


def upward_imports(source: str, floor: str) -> list[str]:
    """Imports of a higher floor, or of one that is not in the table, by a file that lives on ``floor``."""
    found = []
    for node in ast.walk(ast.parse(source)):
        for name in imported(node, ("embedkernels", floor)):
            parts = name.split(".")
            if parts[0] == "embedkernels" and len(parts) > 1 and parts[1] != "__version__":
                target = parts[1]
                if FLOORS.get(target, 99) > FLOORS[floor]:
                    found.append(f"line {node.lineno}: {floor} imports {name}")  # type: ignore[attr-defined]
    return found


def eager_imports(source: str, floor: str) -> list[str]:
    """Imports at import time of what only other floors may import then."""
    return [
        f"line {node.lineno}: imports {name} at import time"  # type: ignore[attr-defined]
        for node in run_at_import(ast.parse(source))
        for name in imported(node, ("embedkernels", floor))
        if floor not in EAGER.get(name.split(".")[0], {floor})
    ]


def modules() -> list[Path]:
    return sorted(package_root().rglob("*.py"))


def floor_of(path: Path) -> str:
    name = path.relative_to(package_root()).parts[0]
    return "cli" if name == "__main__.py" else name  # ``python -m embedkernels`` is the command line


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(package_root())))
def test_imports_go_down(path: Path) -> None:
    source, floor = path.read_text(), floor_of(path)
    if floor.endswith(".py"):  # the package itself: it may name every floor, but load none
        assert [
            n for node in run_at_import(ast.parse(source)) for n in imported(node, ()) if "embedkernels" in n
        ] == []
        assert eager_imports(source, "top") == []
        return
    assert floor in FLOORS, f"{floor} is not in the table of floors"
    assert upward_imports(source, floor) == []
    assert eager_imports(source, floor) == []


@pytest.mark.parametrize(
    ("source", "floor"),
    [
        ("from embedkernels.nn.embedding import FusedEmbedding", "ops"),
        ("from embedkernels import hf", "nn"),
        ("import embedkernels.cli.main", "hf"),
        ("def f():\n    from embedkernels.ops import embed", "kernels"),
        ("import importlib\nimportlib.import_module('embedkernels.kernels.embed')", "reference"),
        ("from ..nn import embedding", "ops"),
        ("from embedkernels.unheard_of import x", "cli"),
    ],
)
def test_an_upward_import_is_found(source: str, floor: str) -> None:
    assert len(upward_imports(source, floor)) == 1


@pytest.mark.parametrize(
    ("source", "floor", "count"),
    [
        ("import triton", "ops", 1),
        ("try:\n    import transformers\nexcept ImportError:\n    pass", "nn", 1),
        ("class A:\n    from transformers import x", "ops", 1),
        ("def f():\n    import triton", "ops", 0),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import transformers", "ops", 0),
        ("import triton.language as tl", "kernels", 0),
    ],
)
def test_an_eager_import_is_found(source: str, floor: str, count: int) -> None:
    assert len(eager_imports(source, floor)) == count


BLOCK = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Block())
"""


def python(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_importing_the_package_loads_nothing_heavy() -> None:
    python(
        "import sys, embedkernels\n"
        "heavy = {'torch', 'triton', 'transformers', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "inside = [name for name in sys.modules if name.startswith('embedkernels.')]\n"
        "assert not inside, inside"
    )


def test_every_public_name_resolves_without_triton() -> None:
    python(
        BLOCK.format(blocked={"triton"})
        + "import embedkernels as ek\nfor name in ek.__all__:\n    assert getattr(ek, name) is not None, name\n"
        "assert set(ek.__all__) <= set(dir(ek))"
    )


def test_only_the_hugging_face_floor_needs_transformers() -> None:
    python(
        BLOCK.format(blocked={"triton", "transformers", "accelerate", "datasets"}) + "import embedkernels as ek\n"
        "for name in ek.__all__:\n"
        "    if not ek._HOME.get(name, '').startswith('embedkernels.hf.'):\n"
        "        assert getattr(ek, name) is not None, name"
    )


def test_an_unknown_name_is_an_attribute_error() -> None:
    import embedkernels

    with pytest.raises(AttributeError, match="no attribute 'fused_everything'"):
        embedkernels.fused_everything  # noqa: B018

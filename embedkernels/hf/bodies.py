"""Whether a forward is one that is known: the fingerprint of its source, without what changes nothing.

Two forwards have one fingerprint if their parameters, defaults, decorators and statements are the same: docstrings,
annotations, comments and layout do not count. It is the same in every Python from 3.10 on. A release of transformers
that changes a forward changes its fingerprint, and then nothing is fused that was written for the old one.

transformers 5.24 renamed the arguments that hold a cache and its length, and decorated forwards so that the old names
still work. Both names are one here, and that decorator does not count.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import os
import textwrap
from collections.abc import Callable
from types import CellType, FunctionType
from typing import Any

from torch.utils import _contextlib

# What a node may say besides what it does.
_SILENT = frozenset({"annotation", "returns", "type_comment", "type_params", "kind", "ctx"})
# Names as they were before transformers 5.24, by those since.
RENAMED = {"cache": "past_key_values", "cache_length": "past_key_values_length"}
# The fields of a node that name a variable or an argument.
_NAMING = {ast.Name: "id", ast.arg: "arg", ast.keyword: "arg"}


def fingerprint(function: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    """Twelve hexadecimal digits for what a function does, whatever it is called."""
    body = function.body
    if (
        isinstance(body[0], ast.Expr)
        and isinstance(body[0].value, ast.Constant)
        and isinstance(body[0].value.value, str)
    ):
        body = body[1:]
    counting = (function.args, *decorators(function), *body)
    used = {getattr(node, _NAMING[type(node)]) for one in counting for node in ast.walk(one) if type(node) in _NAMING}
    # A function that uses both names means two things by them.
    renamed = {new: old for new, old in RENAMED.items() if old not in used}
    said = "\n".join(_said(node, renamed) for node in counting)
    return hashlib.sha256(said.encode()).hexdigest()[:12]


def decorators(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[ast.expr]:
    """The decorators that count: not the one that gives a renamed keyword its new name, with a warning."""
    return [
        one
        for one in function.decorator_list
        if not (isinstance(one, ast.Call) and isinstance(one.func, ast.Name) and one.func.id == "deprecate_kwarg")
    ]


def _said(node: Any, renamed: dict[str, str]) -> str:
    # Not ast.dump, whose text differs between versions of Python.
    if isinstance(node, ast.AnnAssign) and node.value is not None:
        node = ast.Assign(targets=[node.target], value=node.value)
    if isinstance(node, ast.AST):
        naming = _NAMING.get(type(node))
        fields = (
            (name, renamed.get(value, value) if name == naming else value)
            for name, value in ast.iter_fields(node)
            if name not in _SILENT
        )
        return f"{type(node).__name__}({','.join(f'{name}={_said(value, renamed)}' for name, value in fields)})"
    if isinstance(node, list):
        return f"[{','.join(_said(one, renamed) for one in node)}]"
    return repr(node)


def fingerprint_of(function: Callable[..., Any]) -> str | None:
    """The fingerprint of what a function runs, or None if its source cannot be read.

    A function around another (a decorator's, a patch's) is taken as it is: what it claims to wrap does not count. But
    ``torch.no_grad`` and its like, which the source of what they wrap names as decorators, are looked through, and so
    is the decorator for renamed keywords.
    """
    function = undeprecated(function)
    code = getattr(function, "__code__", None)
    if code is not None and code.co_filename == _contextlib.__file__:
        wrapped = getattr(getattr(function, "__wrapped__", None), "__code__", None)
        return None if wrapped is None else _of_code(wrapped, decorated=True)
    return None if code is None else _of_code(code)


def unwrapped_fingerprint(function: Callable[..., Any] | None) -> str | None:
    """The fingerprint of a model's forward within the decorators of transformers, or None for any other wrapper's.

    Which decorators there are is part of the fingerprint, as its source names them.
    """
    while function is not None and hasattr(function, "__wrapped__"):
        code = getattr(function, "__code__", None)
        if code is None or f"{os.sep}transformers{os.sep}utils{os.sep}" not in code.co_filename:
            return None
        function = function.__wrapped__
    code = getattr(function, "__code__", None)
    return None if code is None else _of_code(code)


def undeprecated(function: Any) -> Any:
    """The function within transformers' decorators for renamed keywords."""
    while _deprecates(function):
        function = function.__wrapped__
    return function


def in_deprecations(stock: Callable[..., Any], function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` in the decorators for renamed keywords that are around ``stock`` or within it."""
    found: list[Any] = []
    inner: Any = stock
    while inner is not None:
        if _deprecates(inner):
            found.append(inner)
        inner = getattr(inner, "__wrapped__", None)
    for decorator in reversed(found):
        function = _around(function, decorator)
    return function


def _deprecates(function: Any) -> bool:
    """Whether a function is what transformers' decorator for a renamed keyword makes of another."""
    code, within = getattr(function, "__code__", None), getattr(function, "__wrapped__", None)
    name = os.path.join("transformers", "utils", "deprecation.py")
    if within is None or code is None or not code.co_filename.endswith(os.sep + name):
        return False
    return sum(cell.cell_contents is within for cell in function.__closure__ or ()) == 1


def _around(function: Callable[..., Any], decorator: Any) -> Callable[..., Any]:
    """A copy of a decorator's function that calls ``function`` instead of the one that was decorated."""
    within = decorator.__wrapped__
    cells = tuple(CellType(function) if cell.cell_contents is within else cell for cell in decorator.__closure__)
    code, names = decorator.__code__, decorator.__globals__
    made = FunctionType(code, names, decorator.__name__, decorator.__defaults__, cells)
    made.__kwdefaults__ = decorator.__kwdefaults__
    return functools.wraps(function)(made)


@functools.cache
def _of_code(code: Any, decorated: bool = False) -> str | None:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(code)))
    except (OSError, TypeError, SyntaxError):
        return None
    first = tree.body[0] if tree.body else None
    if not isinstance(first, ast.FunctionDef) or (decorated and not first.decorator_list):
        return None
    return fingerprint(first)

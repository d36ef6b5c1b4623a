"""Whether a forward is one that is known: the fingerprint of its source, without what changes nothing.

Two forwards have one fingerprint if their parameters, defaults, decorators and statements are the same: docstrings,
annotations, comments and layout do not count. It is the same in every Python from 3.10 on. A release of transformers
that changes a forward changes its fingerprint, and then nothing is fused that was written for the old one.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import os
import textwrap
from collections.abc import Callable
from typing import Any

from torch.utils import _contextlib

# What a node may say besides what it does.
_SILENT = frozenset({"annotation", "returns", "type_comment", "type_params", "kind", "ctx"})


def fingerprint(function: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    """Twelve hexadecimal digits for what a function does, whatever it is called."""
    body = function.body
    if (
        isinstance(body[0], ast.Expr)
        and isinstance(body[0].value, ast.Constant)
        and isinstance(body[0].value.value, str)
    ):
        body = body[1:]
    said = "\n".join(map(_said, (function.args, *function.decorator_list, *body)))
    return hashlib.sha256(said.encode()).hexdigest()[:12]


def _said(node: Any) -> str:
    # Not ast.dump, whose text differs between versions of Python.
    if isinstance(node, ast.AnnAssign) and node.value is not None:
        node = ast.Assign(targets=[node.target], value=node.value)
    if isinstance(node, ast.AST):
        fields = ((name, value) for name, value in ast.iter_fields(node) if name not in _SILENT)
        return f"{type(node).__name__}({','.join(f'{name}={_said(value)}' for name, value in fields)})"
    if isinstance(node, list):
        return f"[{','.join(map(_said, node))}]"
    return repr(node)


def fingerprint_of(function: Callable[..., Any]) -> str | None:
    """The fingerprint of what a function runs, or None if its source cannot be read.

    A function around another (a decorator's, a patch's) is taken as it is: what it claims to wrap does not count. But
    ``torch.no_grad`` and its like, which the source of what they wrap names as decorators, are looked through.
    """
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

"""Writing results that a reader never meets half finished."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any


def strict(value: Any) -> Any:
    """``value`` with null in place of infinities and NaN, which JSON has not.

    In a dict the entry ``"name_text"`` beside such a ``"name"`` says which of them it was.
    """
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        texts = {f"{k}_text": str(v) for k, v in value.items() if isinstance(v, float) and not math.isfinite(v)}
        return {**{k: strict(v) for k, v in value.items()}, **texts}
    if isinstance(value, (list, tuple)):
        return [strict(v) for v in value]
    return value


def write_json(path: Path, value: Any) -> None:
    """Replace ``path`` in one step: a reader, or a kill, never meets half a file. See :func:`strict`."""
    partial = path.with_suffix(path.suffix + ".partial")
    partial.write_text(json.dumps(strict(value), indent=1, allow_nan=False))
    os.replace(partial, path)


def read_json(path: Path) -> Any:
    """The content of ``path``, or None if it was never written."""
    return json.loads(path.read_text()) if path.exists() else None

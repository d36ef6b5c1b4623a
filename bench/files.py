"""Writing results that a reader never meets half finished."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def write_json(path: Path, value: Any) -> None:
    """Replace ``path`` in one step: a reader, or a kill, never meets half a file."""
    partial = path.with_suffix(path.suffix + ".partial")
    partial.write_text(json.dumps(value, indent=1))
    os.replace(partial, path)


def read_json(path: Path) -> Any:
    """The content of ``path``, or None if it was never written."""
    return json.loads(path.read_text()) if path.exists() else None

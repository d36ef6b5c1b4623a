"""Prints a constraints file that leaves the torch that is installed in its place.

    python requirements/constraints.py requirements/default.txt > constraints.txt

A build of torch with CUDA requires one version of Triton. Another one, pinned for builds that bring none, would make
pip look for another torch: the file's line on Triton then goes, as does a line on torch.
"""

from __future__ import annotations

import re
import sys
from importlib import metadata
from pathlib import Path


def name_of(requirement: str) -> str:
    match = re.match(r"\s*([\w.-]+)", requirement)
    return match[1].lower() if match else ""


def constraints(text: str) -> list[str]:
    """The lines of a constraints file, as far as they fit the torch that this Python has."""
    fixed = {"torch"}
    if "triton" in map(name_of, metadata.requires("torch") or ()):
        fixed.add("triton")
    lines = [line for line in text.splitlines() if name_of(line) not in fixed]
    return [*lines, f"torch=={metadata.version('torch')}"]


if __name__ == "__main__":
    print("\n".join(constraints(Path(sys.argv[1]).read_text())))

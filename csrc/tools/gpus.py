"""This machine's NVIDIA GPUs, asked of nvidia-smi: ``python csrc/tools/gpus.py`` prints ``80,90``, or nothing.

An nvidia-smi without a driver, or without a device, says so on its standard output: only what is a number counts.
"""

from __future__ import annotations

import re
import subprocess


def capabilities() -> tuple[str, ...]:
    """The distinct compute capabilities, ascending, as nvcc spells them; empty where there is no usable GPU."""
    command = ("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader")
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return ()
    lines = (re.fullmatch(r"(\d+)\.(\d+)", line.strip()) for line in done.stdout.splitlines())
    return tuple(sorted({line[1] + line[2] for line in lines if line}, key=int))


if __name__ == "__main__":
    print(",".join(capabilities()))

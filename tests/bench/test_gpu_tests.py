"""The record of a test run tells what passed, what failed and what was running when it was stopped."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bench import gpu_tests
from bench.environment import ROOT

MARK = "mark." + "gpu"  # in two pieces, for this file is left out itself
TESTS = """
import pytest, time
def test_good(): pass
def test_bad(): assert 1 == 2, "not today"
@pytest.mark.skip(reason="no")
def test_skipped(): pass
@pytest.fixture
def broken(): raise RuntimeError("no fixture")
def test_error(broken): pass
def test_endless(): time.sleep({seconds})
"""


def start(tmp_path: Path, seconds: float, processes: int) -> tuple[subprocess.Popen[bytes], Path]:
    file, out = tmp_path / "test_some.py", tmp_path / "tests.json"
    file.write_text(TESTS.format(seconds=seconds))
    command = [sys.executable, "-m", "bench.gpu_tests", "--out", str(out), "--processes", str(processes)]
    command += ["--", str(file), f"--rootdir={tmp_path}"]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL), out


def check(result: dict[str, Any]) -> None:
    assert result["selected"] == 5
    assert result["counts"]["failed"] == 2
    assert result["counts"]["skipped"] == 1
    failures = {name.rpartition("::")[2]: text for name, text in result["failures"].items()}
    assert set(failures) == {"test_bad", "test_error"}
    assert "not today" in failures["test_bad"]
    assert failures["test_error"].startswith("setup:")
    assert "no fixture" in failures["test_error"]


@pytest.mark.parametrize("processes", [1, 2])
def test_a_finished_run(tmp_path: Path, processes: int) -> None:
    process, out = start(tmp_path, 0, processes)
    assert process.wait(60) == 1
    result = json.loads(out.read_text())
    check(result)
    assert result["finished"]
    assert result["counts"]["passed"] == 2
    assert result["running"] == []
    assert result["processes"] == processes
    assert len(result["slowest"]) == 5


def test_a_run_that_was_stopped(tmp_path: Path) -> None:
    process, out = start(tmp_path, 600, 1)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if out.exists() and "test_endless" in str(json.loads(out.read_text())["running"]):
            break
        time.sleep(0.1)
    process.kill()
    process.wait()
    result = json.loads(out.read_text())
    check(result)
    assert not result["finished"]
    assert not result["may_be_stopped"], "two had failed"
    assert result["counts"]["passed"] == 1
    assert [name.rpartition("::")[2] for name in result["running"]] == ["test_endless"]


def test_tests_that_need_a_gpu_come_first() -> None:
    def item(name: str, *keywords: str) -> Any:
        return SimpleNamespace(nodeid=name, keywords=keywords)

    items = [
        item("tests/test_other.py::a"),
        item("tests/hf/test_a.py::a"),
        item("tests/embed/test_a.py::a"),
        item("tests/hf/test_a.py::b", "gpu"),
        item("tests/embed/test_a.py::b", "gpu"),
    ]
    gpu_tests.pytest_collection_modifyitems(items)
    assert [one.nodeid for one in items] == [
        "tests/embed/test_a.py::b",
        "tests/hf/test_a.py::b",
        "tests/embed/test_a.py::a",
        "tests/hf/test_a.py::a",
        "tests/test_other.py::a",
    ]


def test_what_is_left_out_exists() -> None:
    assert [place for place in gpu_tests.LEFT_OUT if not (ROOT / place).exists()] == []
    assert [place for place in gpu_tests.FIRST if not (ROOT / place).is_dir()] == []


def test_nothing_that_needs_a_gpu_is_left_out() -> None:
    """What is left out never runs on a GPU: a test that needs one would never run at all."""
    paths = [ROOT / place for place in gpu_tests.LEFT_OUT]
    files = [file for path in paths for file in ([path] if path.is_file() else path.rglob("*.py"))]
    assert [str(file.relative_to(ROOT)) for file in files if MARK in file.read_text()] == []
    assert MARK in (ROOT / "tests/bench/test_timing.py").read_text(), "the mark is not written like this any more"


def test_a_run_without_failures_may_be_stopped(tmp_path: Path) -> None:
    recorder = gpu_tests.Recorder(tmp_path / "tests.json", 1)
    assert not recorder.result()["may_be_stopped"], "nothing has passed yet"
    recorder.counts["passed"] = 1
    assert recorder.result()["may_be_stopped"]
    recorder.counts["failed"] = 1
    assert not recorder.result()["may_be_stopped"]

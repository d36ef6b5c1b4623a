"""The sanitizer's launches compute the right thing, and its findings are counted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench import sanitize

MEMCHECK = """========= COMPUTE-SANITIZER
========= Invalid __global__ read of size 4 bytes
=========     at embed_fwd_kernel+0x1a0
========= ERROR SUMMARY: {} errors
"""
NAME = "embed 100 fp32"
RACECHECK = """========= COMPUTE-SANITIZER
========= RACECHECK SUMMARY: {} hazards displayed ({} errors, {} warnings)
"""


@pytest.mark.parametrize(
    ("output", "count"),
    [
        (MEMCHECK.format(0), 0),
        (MEMCHECK.format(3), 3),
        ("========= ERROR SUMMARY: 1 error\n", 1),
        (RACECHECK.format(0, 0, 0), 0),
        (RACECHECK.format(2, 0, 2), 2),
        ("========= Error: Target application terminated before first instrumented API call\n", None),
        ("", None),
    ],
)
def test_findings_are_counted(output: str, count: int | None) -> None:
    assert sanitize.findings(output) == count


@pytest.mark.parametrize("name", sorted(sanitize.launches()))
def test_every_launch_is_right_on_the_plain_path(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With plain PyTorch, what a launch expects is what it gets: on a GPU a failure is the kernel's."""
    import embedkernels as ek

    monkeypatch.setenv("TRITON_INTERPRET", "0")  # these sizes are a GPU's: the interpreter would take minutes
    with ek.use_backend("torch"):
        assert sanitize.launch("cpu", name) == 0
    assert capsys.readouterr().out.startswith((f"ok: {name}", f"absent: {name}"))


def test_a_wrong_kernel_fails_its_launch(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import embedkernels as ek

    right = ek.embedding_grad
    monkeypatch.setattr(ek, "embedding_grad", lambda *args, **kw: right(*args, **{**kw, "backend": "torch"}) * 1.1)
    monkeypatch.setattr(ek, "embedding_plan", _torch_plan(ek.embedding_plan))
    assert sanitize.launch("cpu", "embedding_grad extension hot row") == 1
    assert "FAILED: embedding_grad extension hot row: AssertionError: embedding_grad bf16: off by" in (
        capsys.readouterr().out
    )


def _torch_plan(plan):  # type: ignore[no-untyped-def]
    return lambda *args, **kw: plan(*args, **{**kw, "backend": "torch"})


def test_the_command_reports_its_launches(tmp_path: Path) -> None:
    """As a GPU session runs it, on the CPU: processes, result file, no tools."""
    out = tmp_path / "sanitizer.json"
    command = [sys.executable, "-m", "bench.sanitize", "--device", "cpu", "--out", str(out), "--only", NAME]
    env = {**os.environ, "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=sanitize.processes.ROOT, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(out.read_text())
    assert list(result["launches"]) == [NAME]
    assert result["launches"][NAME]["output"] == f"ok: {NAME}\n"
    assert result["tools"] == {"memcheck": {"not_run": "no GPU"}, "racecheck": {"not_run": "no GPU"}}

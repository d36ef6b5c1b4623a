"""The build part says what came out of the build, and fails where a GPU machine ends up without GPU code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench import build

SETUP = """
import os, sys
assert sys.argv[1:] == ["build_ext", "--inplace"]
print("architectures", os.environ.get("EMBEDKERNELS_CUDA_ARCHS"))
sys.exit({code})
"""
STATUS = {"loaded": True, "cuda": False, "path": None, "reason": "no nvcc", "architectures": []}


def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: int, *args: str, **status: Any) -> tuple[int, Any]:
    (tmp_path / "setup.py").write_text(SETUP.format(code=code))
    monkeypatch.setattr(build, "ROOT", tmp_path)
    monkeypatch.setattr(build, "STATUS", f"print({json.dumps({**STATUS, **status})!r})")
    monkeypatch.delenv("EMBEDKERNELS_CUDA_ARCHS", raising=False)
    out = tmp_path / "build.json"
    return build.main(["--out", str(out), *args]), json.loads(out.read_text())


def test_a_build_without_a_gpu_builds_everything(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    code, result = run(monkeypatch, tmp_path, 0)
    assert code == 0
    assert result["problems"] == []
    assert result["architectures"] is None
    assert result["status"] == STATUS
    assert "architectures None" in result["output"]


def test_a_build_for_a_gpu_builds_that_gpu_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    code, result = run(monkeypatch, tmp_path, 0, "--capability", "90", cuda=True)
    assert (code, result["problems"]) == (0, [])
    assert "architectures 90" in result["output"]


def test_a_gpu_without_gpu_code_is_a_failure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    code, result = run(monkeypatch, tmp_path, 0, "--capability", "90")
    assert code == 1
    assert result["problems"] == ["no CUDA code on a machine with a GPU: no nvcc"]


def test_a_failed_build_is_a_failure(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, result = run(monkeypatch, tmp_path, 3)
    assert code == 1
    assert result["problems"] == ["the build ended with exit code 3"]
    assert "architectures None" in capsys.readouterr().out


def test_the_real_status_can_be_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Against the package as it is: the command that asks for the status must keep up with it."""
    status = build.STATUS
    run(monkeypatch, tmp_path, 0)
    monkeypatch.setattr(build, "STATUS", status)
    monkeypatch.setenv("PYTHONPATH", str(Path(build.__file__).parents[1]))
    assert build.main(["--out", str(tmp_path / "real.json")]) == 0
    assert set(json.loads((tmp_path / "real.json").read_text())["status"]) == set(STATUS)

"""Wheels and source distributions: what they hold, and that they work."""

import os
import shutil
import subprocess
import sys
import zipfile

import pytest

from tests.extension.fakes import ROOT


def environment(**variables):
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("EMBEDKERNELS_", "TRITON_")) and k != "CXX"}
    return {**clean, **variables}


@pytest.fixture
def source(tmp_path):
    """A copy of what a wheel is built from."""
    if not (ROOT / "embedkernels").is_dir():
        pytest.skip("the package's source is not here")
    target = tmp_path / "source"
    ignored = shutil.ignore_patterns("_extension.*", "__pycache__")
    for name in ("embedkernels", "csrc"):
        shutil.copytree(ROOT / name, target / name, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        if (ROOT / name).is_file():
            shutil.copy(ROOT / name, target)
    return target


def build_wheel(source, target, **variables):
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "-q",
            "--no-deps",
            "--no-build-isolation",
            "-w",
            str(target),
            str(source),
        ],
        env=environment(**variables),
        check=True,
    )
    (wheel,) = target.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(target / "installed")
    return wheel.name, target / "installed"


def status_in(installed):
    code = (
        "import torch\n"
        "from embedkernels.ops.extension import extension_status\n"
        "s = extension_status(); print(s.loaded, s.cuda, s.reason, sep='|')\n"
        "if s.loaded: torch.ops.embedkernels_ext.embedding_plan(torch.arange(4), 4, -1, 0)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        env=environment(PYTHONPATH=str(installed)),
        cwd=installed,
        check=True,
    )
    return done.stdout.strip()


def test_pure_python_wheel(source, tmp_path):
    name, installed = build_wheel(source, tmp_path / "wheel", EMBEDKERNELS_BUILD_EXTENSION="0")
    assert name.endswith("-py3-none-any.whl")
    assert not list(installed.rglob("*.so"))
    expected = "the C++ library was not built: EMBEDKERNELS_BUILD_EXTENSION was 0 when it was installed"
    assert status_in(installed) == f"False|False|{expected}"


@pytest.mark.slow
def test_cpu_wheel_serves_every_python(tools, source, tmp_path):
    name, installed = build_wheel(
        source, tmp_path / "wheel", EMBEDKERNELS_CUDA="0", EMBEDKERNELS_REQUIRE_EXTENSION="1"
    )
    assert "-py3-none-" in name
    assert not name.endswith("-any.whl")
    assert [path.name for path in installed.rglob("*.so")] == ["_extension.so"]
    assert status_in(installed) == "True|False|CPU only: EMBEDKERNELS_CUDA was 0 when it was built"

    # Nothing in it knows a Python, or where it was compiled.
    library = (installed / "embedkernels/_extension.so").read_bytes()
    assert str(source).encode() not in library
    assert b"libpython" not in library
    assert b"PyObject" not in library

    # Built again after one file has changed: only that file is compiled.
    (source / "csrc/cpu/plan.cpp").touch()
    _, toolchain = tools
    done = subprocess.run(
        [toolchain.find_ninja(), "-n", "-C", str(source / "build/extension")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "cpu/plan.cpp" in done.stdout
    assert "[2/2] link _extension.so" in done.stdout

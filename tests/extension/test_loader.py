"""The library is refused with a reason, never with a crash, whatever lies in its place."""

import ctypes
import hashlib
import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import embedkernels
from embedkernels.ops import extension

PACKAGE = Path(embedkernels.__file__).parent


@pytest.fixture(autouse=True)
def _enabled(monkeypatch):
    monkeypatch.delenv("EMBEDKERNELS_DISABLE_EXTENSION", raising=False)


def load_quietly(package):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return extension.load(package)


def test_a_missing_library_is_no_surprise(tmp_path):
    assert load_quietly(tmp_path) == extension.ExtensionStatus(
        False, False, None, "the C++ library was not built", ()
    )


def test_the_build_says_why_there_is_none(tmp_path):
    (tmp_path / "_extension.json").write_text(json.dumps({"built": False, "reason": "no C++ compiler was found"}))
    assert load_quietly(tmp_path).reason == "the C++ library was not built: no C++ compiler was found"


def test_a_library_that_went_missing_after_the_build(tmp_path):
    """The reason of a build that made a library is no reason for there being none."""
    (tmp_path / "_extension.json").write_text(json.dumps({"built": True, "reason": "C++ and CUDA 13.0"}))
    with pytest.warns(
        RuntimeWarning, match=r"runs without its C\+\+ library: the C\+\+ library was built, but"
    ) as caught:
        reason = extension.load(tmp_path).reason
    assert len(caught) == 1
    assert reason.startswith("the C++ library was built, but _extension.so is gone: rebuild it with")


@pytest.mark.parametrize("record", ["", "{", "[]", "{}", "null"])
def test_a_damaged_record_is_as_good_as_none(tmp_path, record):
    (tmp_path / "_extension.json").write_text(record)
    assert load_quietly(tmp_path).reason == "the C++ library was not built"


def test_refused_by_the_environment(tmp_path, monkeypatch):
    (tmp_path / "_extension.so").write_bytes(b"never read")
    monkeypatch.setenv("EMBEDKERNELS_DISABLE_EXTENSION", "1")
    status = load_quietly(tmp_path)
    assert not status.loaded
    assert status.path == str(tmp_path / "_extension.so")
    assert status.reason == "EMBEDKERNELS_DISABLE_EXTENSION=1 is set"


def write_record(library):
    """As the build does."""
    digest = hashlib.sha256(library.read_bytes()).hexdigest()
    library.with_suffix(".json").write_text(json.dumps({"built": True, "reason": "C++", "sha256": digest}))


@pytest.mark.parametrize("content", [b"", b"not a library", b"\x7fELF" + b"\0" * 200])
def test_a_corrupt_library_warns_and_says_why(tmp_path, content):
    path = tmp_path / "_extension.so"
    path.write_bytes(content)
    write_record(path)
    with pytest.raises(OSError) as refused:
        ctypes.CDLL(str(path))
    with pytest.warns(
        RuntimeWarning, match=r"runs without its C\+\+ library: _extension.so cannot be loaded"
    ) as caught:
        status = extension.load(tmp_path)
    assert len(caught) == 1
    assert (status.loaded, status.cuda, status.path, status.architectures) == (False, False, str(path), ())
    assert f"({refused.value}): rebuild it with" in status.reason  # the system loader's own words


def test_a_library_cut_short_never_reaches_the_system_loader(tmp_path):
    """It has a valid header, and the loader would touch pages behind the end of the file."""
    if not (PACKAGE / "_extension.so").is_file():
        pytest.skip(extension.extension_status().reason)
    whole = (PACKAGE / "_extension.so").read_bytes()
    (tmp_path / "_extension.so").write_bytes(whole[: len(whole) // 2])
    shutil.copy(PACKAGE / "_extension.json", tmp_path)
    with pytest.warns(RuntimeWarning, match="the file is damaged"):
        assert not extension.load(tmp_path).loaded


@pytest.mark.parametrize("record", [None, "{}", "{", '{"sha256": ""}'])
def test_a_library_without_its_record_never_reaches_the_system_loader(tmp_path, record):
    """Nothing says that it is whole."""
    if not (PACKAGE / "_extension.so").is_file():
        pytest.skip(extension.extension_status().reason)
    (tmp_path / "_extension.so").write_bytes((PACKAGE / "_extension.so").read_bytes()[:100_000])
    if record is not None:
        (tmp_path / "_extension.json").write_text(record)
    with pytest.warns(RuntimeWarning, match=r"record of its checksum, _extension\.json, is missing or damaged"):
        assert not extension.load(tmp_path).loaded


def compile_c(code, target):
    compiler = shutil.which("gcc") or shutil.which("cc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("no C compiler")
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-x", "c", "-", "-o", str(target)], input=code, text=True, check=True
    )


def test_another_library_in_its_place(tmp_path):
    compile_c("int something_else(void) { return 1; }", tmp_path / "_extension.so")
    write_record(tmp_path / "_extension.so")
    with pytest.warns(RuntimeWarning, match="embedkernels_architectures"):
        assert not extension.load(tmp_path).loaded


def test_a_library_of_another_version(tmp_path):
    code = (
        'int embedkernels_interface(void) { return 99; }\nconst char* embedkernels_architectures(void) { return ""; }'
    )
    compile_c(code, tmp_path / "_extension.so")
    write_record(tmp_path / "_extension.so")
    with pytest.warns(RuntimeWarning, match=r"another version of embedkernels \(interface 99, not 2\)"):
        assert not extension.load(tmp_path).loaded


def run_python(code, package_parent, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=package_parent,  # the first place that a python -c looks for modules
        env={**os.environ, "PYTHONPATH": str(package_parent), **environment},
        check=True,
    )


def test_everything_works_beside_a_corrupt_library(tmp_path):
    """The whole package with a broken library: the op runs, on another backend, and one warning is shown."""
    shutil.copytree(PACKAGE, tmp_path / "embedkernels", ignore=shutil.ignore_patterns("_extension.*", "__pycache__"))
    (tmp_path / "embedkernels" / "_extension.so").write_bytes(b"broken")
    code = """
import torch
from embedkernels.ops.backend import choose
from embedkernels import embedding_grad, embedding_plan
ids = torch.tensor([1, 1, 0])
for _ in range(2):
    out = embedding_grad(torch.ones(3, 2), embedding_plan(ids, 3))
assert out.tolist() == [[1, 1], [2, 2], [0, 0]], out
print(choose("embedding_grad", ids.device))
"""
    done = run_python(code, tmp_path, TRITON_INTERPRET="0")
    assert "backend='torch'" in done.stdout
    assert "_extension.so cannot be loaded" in done.stdout
    assert done.stderr.count("RuntimeWarning") == 1


def test_the_installed_library():
    """Loaded where it was built: what it says agrees with what the build wrote down."""
    record = PACKAGE / "_extension.json"
    if not record.is_file() or not json.loads(record.read_text())["built"]:
        pytest.skip(extension.extension_status().reason)
    code = (
        "import torch\n"
        "from embedkernels.ops.extension import device_problem, extension_status\n"
        "s = extension_status()\n"
        "assert s.loaded, s\n"
        # Also without a GPU: a CUDA build of PyTorch must resolve the symbol that a CPU build lacks.
        "assert s.cuda == (torch.version.cuda is not None and bool(s.architectures)), s\n"
        "assert s.cuda or device_problem(0) == s.reason\n"
        "print(','.join(s.architectures))"
    )
    lines = run_python(code, PACKAGE.parent).stdout.splitlines()
    assert lines[0] == ",".join(json.loads(record.read_text())["architectures"])


def status_of(architectures):
    return extension.ExtensionStatus(True, True, "x", "built", architectures)


@pytest.mark.parametrize(
    ("capability", "architectures", "runs"),
    [
        ((9, 0), ("sm_90", "compute_90"), True),
        ((8, 7), ("sm_80", "sm_86", "compute_86"), True),  # same generation, newer minor version
        ((8, 0), ("sm_86", "compute_86"), False),
        ((7, 5), ("sm_80", "compute_120"), False),
        ((12, 1), ("sm_80", "sm_120", "compute_120"), True),
        ((13, 0), ("sm_80", "compute_120"), True),  # PTX is compiled by the driver
        ((10, 0), ("sm_90", "compute_120"), False),
    ],
)
def test_which_gpus_the_code_runs_on(monkeypatch, capability, architectures, runs):
    monkeypatch.setattr(extension, "extension_status", lambda: status_of(architectures))
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda index: capability)  # noqa: ARG005
    problem = extension.device_problem.__wrapped__(0)
    assert (problem is None) == runs
    if not runs:
        assert (
            f"no code for sm_{capability[0]}{capability[1]} (it was built for {', '.join(architectures)})" in problem
        )

"""The build: what it finds, what it falls back to, and what it writes down."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ROOT / "csrc" / "tools"


@pytest.fixture
def tools(monkeypatch):
    """The build's modules, imported afresh and away from this process's environment variables."""
    for name in (
        "CUDA_HOME",
        "CUDA_PATH",
        "CXX",
        "MAX_JOBS",
        *(n for n in os.environ if n.startswith("EMBEDKERNELS_")),
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.syspath_prepend(str(TOOLS))
    for name in ("toolchain", "builder"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import builder
    import toolchain

    yield builder, toolchain
    for name in ("toolchain", "builder"):
        sys.modules.pop(name, None)


def script(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


NVCC = """
case "$*" in
  *--version*) echo "Cuda compilation tools, release {version}, V{version}.0" ;;
  *--list-gpu-arch*) printf 'compute_80\\ncompute_90\\ncompute_120\\n' ;;
  *--dryrun*) echo '#$ TOP={top}' >&2 ;;
esac
"""


@pytest.fixture
def cuda_home(tmp_path):
    """A toolkit that answers like nvcc."""
    home = tmp_path / "cuda"
    for folder in ("bin", "lib64", "include/cub"):
        (home / folder).mkdir(parents=True)
    (home / "lib64/libcudart_static.a").touch()
    (home / "include/cub/cub.cuh").touch()
    script(home / "bin/nvcc", NVCC.format(version="13.0", top=home))
    return home


def test_no_nvcc(tools, monkeypatch, tmp_path):
    _, toolchain = tools
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(toolchain.Missing, match=r"CPU only: nvcc was not found .*CUDA_HOME not set, not on PATH"):
        toolchain.find_cuda()


def test_cuda_refused(tools, monkeypatch):
    _, toolchain = tools
    monkeypatch.setenv("EMBEDKERNELS_CUDA", "0")
    with pytest.raises(toolchain.Missing, match="EMBEDKERNELS_CUDA was 0"):
        toolchain.find_cuda()


def test_cuda_home_without_nvcc(tools, monkeypatch, tmp_path):
    _, toolchain = tools
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(toolchain.Missing, match=f"CUDA_HOME was {tmp_path} .*no bin/nvcc"):
        toolchain.find_cuda()


def test_nvcc_too_old_or_broken_or_incomplete(tools, monkeypatch, cuda_home):
    _, toolchain = tools
    monkeypatch.setenv("CUDA_HOME", str(cuda_home))
    script(cuda_home / "bin/nvcc", NVCC.format(version="11.8", top=cuda_home))
    with pytest.raises(toolchain.Missing, match=r"nvcc 11.8 is older than 12.0"):
        toolchain.find_cuda()
    script(cuda_home / "bin/nvcc", "exit 3")
    with pytest.raises(toolchain.Missing, match="nvcc --version failed"):
        toolchain.find_cuda()
    script(cuda_home / "bin/nvcc", NVCC.format(version="13.0", top=cuda_home))
    (cuda_home / "include/cub/cub.cuh").unlink()
    with pytest.raises(toolchain.Missing, match="CUB was not found"):
        toolchain.find_cuda()
    (cuda_home / "lib64/libcudart_static.a").unlink()
    with pytest.raises(toolchain.Missing, match=r"libcudart_static.a was not found"):
        toolchain.find_cuda()


def test_architectures(tools, monkeypatch, cuda_home):
    _, toolchain = tools
    monkeypatch.setenv("CUDA_HOME", str(cuda_home))
    # Of those that are shipped, the ones that this nvcc knows; PTX of the newest.
    assert toolchain.find_cuda().targets == ["sm_80", "sm_90", "sm_120", "compute_120"]
    monkeypatch.setenv("EMBEDKERNELS_CUDA_ARCHS", "9.0, 80")
    assert toolchain.find_cuda().targets == ["sm_80", "sm_90", "compute_90"]
    monkeypatch.setenv("EMBEDKERNELS_CUDA_ARCHS", "61")
    with pytest.raises(ValueError, match=r"EMBEDKERNELS_CUDA_ARCHS: .* has no compute_61; it knows 80, 90, 120"):
        toolchain.find_cuda()


def test_nvcc_behind_a_script_on_the_path(tools, monkeypatch, cuda_home, tmp_path):
    """The toolkit is where nvcc says it is, not where the name was found."""
    _, toolchain = tools
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    script(elsewhere / "nvcc", f'exec "{cuda_home}/bin/nvcc" "$@"')
    monkeypatch.setenv("PATH", f"{elsewhere}:/usr/bin:/bin")
    assert toolchain.find_cuda().root == cuda_home


def fake_torch(root, version, headers=True):
    root.mkdir(parents=True)
    (root / "__init__.py").touch()
    (root / "version.py").write_text(f"__version__ = '{version}'\n")
    if headers:
        (root / "include/torch/csrc/stable").mkdir(parents=True)
        (root / "include/torch/csrc/stable/library.h").touch()
    return root


def hide_torch(monkeypatch, toolchain, *site_packages):
    monkeypatch.setattr(toolchain.importlib.util, "find_spec", lambda name: None)  # noqa: ARG005
    monkeypatch.setattr(toolchain.sysconfig, "get_path", lambda name: str(site_packages[0]))  # noqa: ARG005
    monkeypatch.delenv("VIRTUAL_ENV", raising=False)


def test_torch_is_found_from_an_isolated_environment(tools, monkeypatch, tmp_path):
    """pip's build environment cannot import torch, but its Python knows where it is installed."""
    _, toolchain = tools
    root = fake_torch(tmp_path / "site/torch", "2.11.0+cu130")
    hide_torch(monkeypatch, toolchain, tmp_path / "site")
    assert toolchain.find_torch() == toolchain.Torch(root, "2.11.0+cu130")


def test_torch_is_found_in_the_active_virtual_environment(tools, monkeypatch, tmp_path):
    """``python -m build`` makes an environment of its own."""
    _, toolchain = tools
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    root = fake_torch(tmp_path / "venv/lib" / version / "site-packages/torch", "2.13.0")
    hide_torch(monkeypatch, toolchain, tmp_path / "nothing")
    monkeypatch.setenv("VIRTUAL_ENV", str(tmp_path / "venv"))
    assert toolchain.find_torch().root == root


def test_torch_missing_or_too_old(tools, monkeypatch, tmp_path):
    _, toolchain = tools
    hide_torch(monkeypatch, toolchain, tmp_path)
    with pytest.raises(toolchain.Missing, match=r"no PyTorch headers \(2.11 or newer\)"):
        toolchain.find_torch()
    fake_torch(tmp_path / "torch", "2.10.1")
    with pytest.raises(toolchain.Missing, match=r"PyTorch 2.10.1 was found .* older than 2.11"):
        toolchain.find_torch()


def test_the_backend_asks_for_torch_only_where_there_is_none(tools, monkeypatch, tmp_path):
    pytest.importorskip("setuptools")
    import importlib

    _, toolchain = tools
    monkeypatch.delitem(sys.modules, "backend", raising=False)
    backend = importlib.import_module("backend")
    assert backend._torch_requirement() == []
    hide_torch(monkeypatch, toolchain, tmp_path)
    assert backend._torch_requirement() == [backend.TORCH]
    with monkeypatch.context() as refused:
        refused.setenv("EMBEDKERNELS_BUILD_EXTENSION", "0")
        assert backend._torch_requirement() == []
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert backend._torch_requirement() == []
    sys.modules.pop("backend")


def read_record(package):
    return json.loads((package / "_extension.json").read_text())


@pytest.mark.parametrize("variable", ["EMBEDKERNELS_BUILD_EXTENSION", "CXX"])
def test_a_build_that_cannot_be_leaves_a_reason_and_no_old_library(tools, monkeypatch, tmp_path, capfd, variable):
    builder, _ = tools
    package = tmp_path / "package"
    package.mkdir()
    (package / "_extension.so").write_bytes(b"from an earlier build")
    monkeypatch.setenv(variable, "0" if variable.startswith("EMBED") else "no-such-compiler")
    builder.build(tmp_path / "build", package)
    assert not (package / "_extension.so").exists()
    record = read_record(package)
    assert record["built"] is False
    assert ("no-such-compiler on PATH" if variable == "CXX" else "EMBEDKERNELS_BUILD_EXTENSION was 0") in record[
        "reason"
    ]
    assert f"WITHOUT its C++ library: {record['reason']}" in capfd.readouterr().err


def test_a_compiler_that_fails(tools, monkeypatch, tmp_path, capfd):
    builder, toolchain = tools
    monkeypatch.setenv("EMBEDKERNELS_CUDA", "0")
    monkeypatch.setenv("CXX", script(tmp_path / "broken", "echo 'x.cpp:3: error: my message' >&2; exit 1"))
    record = builder.build(tmp_path / "build", tmp_path / "package")
    assert not record.built
    assert read_record(tmp_path / "package")["reason"] == "it did not compile: x.cpp:3: error: my message"
    printed = capfd.readouterr()
    assert "my message" in printed.out
    assert "WITHOUT its C++ library" in printed.err
    monkeypatch.setenv("EMBEDKERNELS_REQUIRE_EXTENSION", "1")
    with pytest.raises(toolchain.Missing, match="it did not compile"):
        builder.build(tmp_path / "build", tmp_path / "package")


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

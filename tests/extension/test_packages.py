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


FOLDERS = ("embedkernels", "csrc", "tests", "bench", "examples", "docs", "requirements", ".ci")
FILES = (
    *("setup.py", "pyproject.toml", "MANIFEST.in", "Makefile", "demo.mk", "gpu.mk", ".pre-commit-config.yaml"),
    *("README.md", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md"),
)
# What must not get out of a checkout.
LITTER = (
    *("embedkernels/__pycache__/old.cpython-310.pyc", "tests/hf/__pycache__/old.cpython-310.pyc"),
    *("embedkernels/_extension.so", "embedkernels/_extension.json", "tests/.hypothesis/examples/1"),
    *("csrc/cpu/plan.o", "csrc/cpu/plan.o.d", "runs/demo/metrics.json"),
)


@pytest.fixture
def checkout(tmp_path):
    """A copy of what git tracks, with what work leaves in it."""
    if not all((ROOT / name).exists() for name in (*FOLDERS, *FILES)):
        pytest.skip("the project's source is not here")
    target = tmp_path / "checkout"
    for name in FOLDERS:
        shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("_extension.*", "__pycache__"))
    for name in FILES:
        shutil.copy(ROOT / name, target)
    for name in LITTER:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_text("litter")
    return target


def python(*arguments, cwd=None, **variables):
    subprocess.run([sys.executable, *map(str, arguments)], env=environment(**variables), check=True, cwd=cwd)


def build_sdist(checkout, target):
    python("-m", "build", "--sdist", "--no-isolation", "-o", target, checkout)
    (archive,) = target.glob("*.tar.gz")
    shutil.unpack_archive(archive, target)
    (folder,) = (path for path in target.iterdir() if path.is_dir())
    return folder


def build_wheel(source, target, **variables):
    python("-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", target, source, **variables)
    (wheel,) = target.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(target / "installed")
    return wheel.name, target / "installed"


def status_in(installed):
    code = (
        "import torch\n"
        "from embedkernels.ops.extension import extension_status\n"
        "s = extension_status(); print(s.loaded, s.cuda, s.reason, sep='|')\n"
        "if s.loaded: torch.ops.embedkernels_ext.embedding_plan(torch.arange(4), 4, -1, 0, None)"
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


def files_in(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_the_source_distribution_is_the_checkout(checkout, tmp_path):
    tracked = files_in(checkout) - set(LITTER)
    made = files_in(build_sdist(checkout, tmp_path / "sdist"))
    ours = {name for name in made if name not in ("PKG-INFO", "setup.cfg") and ".egg-info/" not in name}
    assert ours == tracked


def test_pure_python_wheel(checkout, tmp_path):
    (checkout / "embedkernels/gone.py").touch()
    python("setup.py", "-q", "build", cwd=checkout, EMBEDKERNELS_BUILD_EXTENSION="0")
    (checkout / "embedkernels/gone.py").unlink()
    name, installed = build_wheel(checkout, tmp_path / "wheel", EMBEDKERNELS_BUILD_EXTENSION="0")
    assert name.endswith("-py3-none-any.whl")
    assert not list(installed.rglob("*.so"))
    assert {path.name.split("-")[0] for path in installed.iterdir()} == {"embedkernels"}
    assert (next(checkout.glob("build/lib*/embedkernels")) / "__init__.py").is_file()
    package = {name for name in files_in(checkout) - set(LITTER) if name.startswith("embedkernels/")}
    # Nothing of the earlier build, of which a module was deleted since.
    in_wheel = {name for name in files_in(installed) if name.startswith("embedkernels/")}
    assert in_wheel == package | {"embedkernels/_extension.json"}
    expected = "the C++ library was not built: EMBEDKERNELS_BUILD_EXTENSION was 0 when it was installed"
    assert status_in(installed) == f"False|False|{expected}"


@pytest.mark.parametrize("build_lib", [".", "..", "embedkernels/hf", "link"])
def test_a_build_never_removes_the_source(checkout, tmp_path, build_lib):
    """It starts from an empty folder, but not where that would be the package itself, or hold it or lie in it."""
    home = checkout.rename(tmp_path / "embedkernels")  # so that ".." names the checkout
    (home / "link").symlink_to(".")
    (home / "embedkernels/hf/embedkernels").mkdir()
    (home / "embedkernels/hf/embedkernels/mine.txt").touch()
    before = files_in(home)
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", build_lib]
    done = subprocess.run(command, cwd=home, env=environment(), capture_output=True, text=True)
    assert done.returncode == 1
    assert f"--build-lib must be outside of the package's source, got '{build_lib}'" in done.stderr
    assert before - files_in(home) == set()


@pytest.mark.slow
def test_cpu_wheel_serves_every_python(tools, checkout, tmp_path):
    source = build_sdist(checkout, tmp_path / "sdist")
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

"""What the Makefile decides before it installs anything: shown by ``make -n``, on machines of every kind."""

import os
import re
import shutil
import subprocess
import sys

import pytest

from tests.extension.fakes import ROOT, script

MAKEFILES = ("Makefile", "demo.mk", "gpu.mk")
# Read by make, or handed down by the make that runs these tests.
VARIABLES = (
    "MAKEFLAGS",
    "MFLAGS",
    "MAKELEVEL",
    "PYTHON",
    "VENV",
    "TORCH_SPEC",
    "CONSTRAINTS",
    "GPUS",
    "OUT",
    "PARTS",
)


@pytest.fixture(autouse=True)
def _make():
    if shutil.which("make") is None or not all((ROOT / name).is_file() for name in MAKEFILES):
        pytest.skip("no make, or no Makefile")


def make(*arguments, path="", cwd=ROOT, check=True, python=sys.executable):
    variables = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    variables["PATH"] = f"{path}:{variables['PATH']}"
    return subprocess.run(
        ["make", "-B", *arguments, f"PYTHON={python}"],
        cwd=cwd,
        env=variables,
        capture_output=True,
        text=True,
        check=check,
    )


DEAD_DRIVER = (
    'NVIDIA-SMI has failed because it couldn\'t reach the NVIDIA driver. Make sure that the "latest" NVIDIA driver'
    " is installed (and running)."
)


@pytest.mark.parametrize("shown", ["", "No devices were found", DEAD_DRIVER, "[N/A]", "9.0; echo oh"])
@pytest.mark.parametrize("target", ["test", "demo"])
def test_an_nvidia_smi_without_a_gpu(tmp_path, shown, target):
    script(tmp_path / "nvidia-smi", f"cat <<'END'\n{shown}\nEND\nexit 9")
    commands = make("-n", target, path=tmp_path).stdout
    assert '"torch==2.13.0"' in commands
    assert 'check_torch.py ""' in commands
    assert target == "test" or "EMBEDKERNELS_CUDA=0 " in commands
    assert "oh" not in commands.split()
    assert "NVIDIA" not in commands
    parsed = subprocess.run(["bash", "-n"], input=commands, capture_output=True, text=True)
    assert (parsed.returncode, parsed.stderr) == (0, "")


@pytest.mark.parametrize("target", ["test", "demo"])
def test_a_machine_with_gpus(tmp_path, target):
    script(tmp_path / "nvidia-smi", "echo 9.0; echo 8.0; echo 9.0")
    commands = make("-n", target, path=tmp_path).stdout
    assert '"torch>=2.11"' in commands
    assert 'check_torch.py "80,90"' in commands
    assert target == "test" or "EMBEDKERNELS_CUDA=1 EMBEDKERNELS_CUDA_ARCHS=native" in commands
    # Told to leave them alone, or which torch to take.
    assert '"torch==2.13.0"' in make("-n", target, "GPUS=", path=tmp_path).stdout
    named = make("-n", target, "TORCH_SPEC=torch==2.12.0+cpu", path=tmp_path).stdout
    assert '"torch==2.12.0+cpu"' in named
    assert 'check_torch.py ""' in named


def test_the_demo_is_installed_again_when_its_sources_change():
    database = make("-n", "-p", "demo").stdout
    (rule,) = (line for line in database.splitlines() if line.startswith(".demo-venv/.demo-installed:"))
    sources = set(rule.split())
    for folder, pattern in (("csrc", "*.*"), ("embedkernels", "*.py")):
        for path in (ROOT / folder).rglob(pattern):
            if path.is_file() and "__pycache__" not in path.parts:
                assert str(path.relative_to(ROOT)) in sources
    assert sources >= {"setup.py", "pyproject.toml", "MANIFEST.in"}
    assert not [name for name in sources if "__pycache__" in name or "_extension" in name]


def test_the_gpu_report_runs_where_torch_is(tmp_path):
    here = make("-n", "gpu-report", "OUT=x")
    assert here.stdout.splitlines() == [
        f'PYTHONPATH="{ROOT}" {sys.executable} -m bench.gpu_report --out "x" --parts ""'
    ]
    bare = script(tmp_path / "python", f'exec {sys.executable} -S "$@"')
    commands = make("-n", "gpu-report", python=bare).stdout
    assert ".venv/bin/python -m pip install" in commands
    assert commands.splitlines()[-1].startswith(f'PYTHONPATH="{ROOT}" .venv/bin/python -m bench.gpu_report')
    refused = make("-n", "gpu-report", "VENV=", python=bare, check=False)
    assert refused.returncode != 0
    assert refused.stdout == ""
    assert f"{bare} has no torch" in refused.stderr
    assert len(refused.stderr.splitlines()) == 1


def test_clean_lets_the_next_target_build_again(tmp_path):
    for name in MAKEFILES:
        shutil.copy(ROOT / name, tmp_path)
    gone = ["embedkernels/_extension.so", "embedkernels/_extension.json", "build/x", ".venv/.installed"]
    kept = [".venv/bin/python", "embedkernels/__init__.py", ".demo-venv/.packages"]
    for name in (*gone, *kept, ".demo-venv/.demo-installed"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    make("clean", cwd=tmp_path)
    assert not [name for name in (*gone, ".demo-venv/.demo-installed") if (tmp_path / name).exists()]
    assert all((tmp_path / name).is_file() for name in kept)


@pytest.fixture
def site(tmp_path):
    """Installs a torch that says what it was built for, and nothing else; returns a Python that has it."""

    def install(version, cuda, *requires):
        package, info = tmp_path / "torch", tmp_path / f"torch-{version}.dist-info"
        package.mkdir()
        info.mkdir()
        (package / "__init__.py").touch()
        (package / "version.py").write_text(f"__version__ = {version!r}\ncuda = {cuda!r}\n")
        lines = ["Metadata-Version: 2.1", "Name: torch", f"Version: {version}"]
        (info / "METADATA").write_text("\n".join([*lines, *(f"Requires-Dist: {name}" for name in requires)]) + "\n")

        def run(*arguments):
            return subprocess.run(
                [sys.executable, "-S", *map(str, arguments)],
                env={"PYTHONPATH": str(tmp_path)},
                capture_output=True,
                text=True,
            )

        return run

    return install


def constraints_of(run, tmp_path):
    pins = tmp_path / "pins.txt"
    pins.write_text("# Why.\ntriton==3.6.0\nTorch==2.0\ntransformers==5.17.0\nnumpy<2.4\n")
    return [line for line in run(ROOT / "requirements/constraints.py", pins).stdout.splitlines() if line[0] != "#"]


def test_constraints_keep_the_torch_that_is_installed(site, tmp_path):
    """With the Triton that it requires; another one would make pip replace torch."""
    run = site("2.15.0+cu130", "13.0", 'triton~=3.9.0; platform_system == "Linux"', "numpy")
    assert constraints_of(run, tmp_path) == ["transformers==5.17.0", "numpy<2.4", "torch==2.15.0+cu130"]


def test_constraints_name_a_triton_where_torch_brings_none(site, tmp_path):
    expected = ["triton==3.6.0", "transformers==5.17.0", "numpy<2.4", "torch==2.13.0+cpu"]
    assert constraints_of(site("2.13.0+cpu", None, "numpy"), tmp_path) == expected


def test_a_torch_without_cuda_beside_a_gpu_is_an_error(site):
    run = site("2.13.0+cpu", None)
    assert run(ROOT / "requirements/check_torch.py", "").returncode == 0
    refused = run(ROOT / "requirements/check_torch.py", "90")
    assert refused.returncode == 1
    assert "has a GPU (compute capability 90), but pip installed torch 2.13.0+cpu" in refused.stderr


def test_a_torch_with_cuda_serves_a_gpu(site):
    assert site("2.15.0", "13.0")(ROOT / "requirements/check_torch.py", "90").returncode == 0


def find_python(version, home, path):
    """``.ci/run``'s choice of an interpreter, with nothing else on the machine."""
    if not (ROOT / ".ci/run").is_file():
        pytest.skip("no .ci/run")
    (function,) = re.findall(r"^find_python\(\).*?^}", (ROOT / ".ci/run").read_text(), re.MULTILINE | re.DOTALL)
    environment = {"HOME": str(home), "PATH": str(path)}
    command = [shutil.which("bash"), "-euo", "pipefail", "-c", f"{function}\nfind_python {version}"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True)


def test_a_job_on_another_python_says_so(tmp_path):
    """Its name promises a version."""
    path = tmp_path / "bin"
    path.mkdir()
    for name in ("python3", "python3.77"):
        script(path / name, f'[ "$1" = --version ] && echo "Python 3.77.1" || exec {sys.executable} "$@"')
    own = "{}.{}".format(*sys.version_info)
    done = find_python("3.78", tmp_path, path)
    assert done.stdout == "python3\n"
    assert done.stderr == "there is no Python 3.78 here: Python 3.77.1 stands in for it\n"
    script(path / f"python{own}", f'exec {sys.executable} "$@"')
    done = find_python(own, tmp_path, path)
    assert (done.stdout, done.stderr) == (f"python{own}\n", "")

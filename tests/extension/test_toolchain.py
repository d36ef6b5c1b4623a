"""What a build finds, and what it says when it does not."""

import sys

import pytest

from tests.extension.fakes import fake_torch, nvcc, script


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
    nvcc(cuda_home, "11.8")
    with pytest.raises(toolchain.Missing, match=r"nvcc 11.8 is older than 12.0"):
        toolchain.find_cuda()
    script(cuda_home / "bin/nvcc", "exit 3")
    with pytest.raises(toolchain.Missing, match="nvcc --version failed"):
        toolchain.find_cuda()
    nvcc(cuda_home)
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
    monkeypatch.setenv("EMBEDKERNELS_CUDA_ARCHS", "9.0, 80, 90,")
    assert toolchain.find_cuda().targets == ["sm_80", "sm_90", "compute_90"]
    monkeypatch.setenv("EMBEDKERNELS_CUDA_ARCHS", " ")
    assert toolchain.find_cuda().targets[0] == "sm_80", "nothing asked for"
    monkeypatch.setenv("EMBEDKERNELS_CUDA_ARCHS", "61")
    with pytest.raises(ValueError, match=r"EMBEDKERNELS_CUDA_ARCHS: .* has no compute_61; it knows 80, 90, 120"):
        toolchain.find_cuda()


@pytest.mark.parametrize("asked", [",", " ; ", "8,x", "80+PTX", "90a", "native,90", "-80", ".", "\u00b2"])
def test_architectures_that_are_none(tools, monkeypatch, cuda_home, asked):
    _, toolchain = tools
    monkeypatch.setenv("CUDA_HOME", str(cuda_home))
    monkeypatch.setenv("EMBEDKERNELS_CUDA_ARCHS", asked)
    with pytest.raises(ValueError) as raised:
        toolchain.find_cuda()
    expected = 'EMBEDKERNELS_CUDA_ARCHS must be "native" or compute capabilities like "80,90" or "8.0 9.0"'
    assert str(raised.value).startswith(f"{expected}, got {asked!r}")


def test_an_nvcc_that_knows_nothing_that_is_shipped(tools, monkeypatch, cuda_home):
    _, toolchain = tools
    monkeypatch.setenv("CUDA_HOME", str(cuda_home))
    nvcc(cuda_home, architectures=("75",))
    with pytest.raises(toolchain.Missing, match=r"CPU only: .*nvcc knows none of 80, 86, 89, 90, 100, 120"):
        toolchain.find_cuda()


def fake_nvidia_smi(monkeypatch, folder, text, status=0):
    folder.mkdir(exist_ok=True)
    script(folder / "nvidia-smi", f"printf '{text}'; exit {status}")
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


@pytest.mark.parametrize(
    ("shown", "targets"),
    [
        ("9.0\\n9.0\\n", ["sm_90", "compute_90"]),
        ("12.0\\n8.0\\n", ["sm_80", "sm_120", "compute_120"]),
        ("13.0\\n", ["sm_120", "compute_120"]),  # newer than the toolkit: the driver compiles the newest PTX
        ("8.6\\n", ["sm_80", "compute_80"]),
        ("7.0\\n9.0\\n", ["sm_90", "compute_90"]),  # too old for the toolkit beside one that is not
    ],
)
def test_native_architectures_are_those_that_run_here(tools, monkeypatch, cuda_home, tmp_path, shown, targets):
    _, toolchain = tools
    monkeypatch.setenv("CUDA_HOME", str(cuda_home))
    monkeypatch.setenv("EMBEDKERNELS_CUDA_ARCHS", "native")
    fake_nvidia_smi(monkeypatch, tmp_path / "smi", shown)
    assert toolchain.find_cuda().targets == targets


@pytest.mark.parametrize(
    ("shown", "status", "reason"),
    [
        ("7.0\\n", 0, r"this machine's GPU \(70\) is too old for .*nvcc: it knows 80, 90, 120"),
        ("NVIDIA-SMI has failed because it couldn't reach the NVIDIA driver", 9, "nvidia-smi showed no GPU"),
        ("No devices were found\\n", 0, "nvidia-smi showed no GPU"),
        ("[N/A]\\n", 0, "nvidia-smi showed no GPU"),
    ],
)
def test_native_without_a_gpu_that_can_be_used(tools, monkeypatch, cuda_home, tmp_path, shown, status, reason):
    """What is found by itself leaves the CUDA code out; only what somebody typed is an error."""
    _, toolchain = tools
    monkeypatch.setenv("CUDA_HOME", str(cuda_home))
    monkeypatch.setenv("EMBEDKERNELS_CUDA_ARCHS", "native")
    fake_nvidia_smi(monkeypatch, tmp_path / "smi", shown.replace("'", ""), status)
    with pytest.raises(toolchain.Missing, match=f"CPU only: .*{reason}"):
        toolchain.find_cuda()


def test_nvcc_behind_a_script_on_the_path(tools, monkeypatch, cuda_home, tmp_path):
    """The toolkit is where nvcc says it is, not where the name was found."""
    _, toolchain = tools
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    script(elsewhere / "nvcc", f'exec "{cuda_home}/bin/nvcc" "$@"')
    monkeypatch.setenv("PATH", f"{elsewhere}:/usr/bin:/bin")
    assert toolchain.find_cuda().root == cuda_home


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

"""The build's own modules, and toolkits to build with that are none."""

import os
import sys

import pytest

from tests.extension.fakes import TOOLS, nvcc


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
    for name in ("toolchain", "builder", "gpus"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import builder
    import toolchain

    yield builder, toolchain
    for name in ("toolchain", "builder", "gpus"):
        sys.modules.pop(name, None)


@pytest.fixture
def cuda_home(tmp_path):
    """A toolkit that answers like nvcc."""
    home = tmp_path / "cuda"
    for folder in ("bin", "lib64", "include/cub"):
        (home / folder).mkdir(parents=True)
    (home / "lib64/libcudart_static.a").touch()
    (home / "include/cub/cub.cuh").touch()
    nvcc(home)
    return home

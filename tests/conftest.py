"""Without a GPU, Triton kernels run in its interpreter: this must be said before Triton is imported."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import contextlib
import importlib

import pytest

from tests.interpreter import round_as_a_gpu_does

# Tests that name ops of torch.ops may be the first of their process.
for name in ("attention", "embed", "embedding", "positions", "rope"):
    importlib.import_module(f"embedkernels.ops.{name}")


def pytest_configure(config: pytest.Config) -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        with contextlib.suppress(ImportError):  # no Triton, nothing to interpret
            round_as_a_gpu_does()
    if os.environ.get("PYTEST_XDIST_WORKER"):
        torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture
def device() -> torch.device:
    """The GPU where there is one, else the CPU (kernels interpreted)."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)

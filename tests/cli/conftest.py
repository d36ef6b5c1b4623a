from __future__ import annotations

from pathlib import Path

import pytest
import torch

from embedkernels.cli import launch
from tests.cli import support


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return support.save_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return support.save_gpt2(tmp_path_factory.mktemp("gpt2"))


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs take place in the test's process, which is faster and can be looked into."""
    monkeypatch.setattr(launch, "run", support.run_here)

"""Tests of the kernels run where the kernels run."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def on_device(device: torch.device) -> Iterator[torch.device]:
    """Tensors and models are made on the GPU where there is one, else on the CPU (kernels interpreted)."""
    torch.set_default_device(device)
    yield device
    torch.set_default_device(None)

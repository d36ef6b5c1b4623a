from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from embedkernels.ops.ids import check_errors


@pytest.fixture(autouse=True)
def _no_error_is_left_over() -> Iterator[None]:
    """A bad id that one test forgot to collect would fail the next."""
    yield
    check_errors()


@pytest.fixture
def threads() -> Iterator[None]:
    """Puts the number of threads back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)

"""Ids as they occur and as they hurt, and the backends that can run here."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from embedkernels.ops.backend import triton_problem
from embedkernels.ops.extension import extension_status

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def gradient_backends() -> list[str]:
    """Backends of the gradient on the device that the tests use."""
    status = extension_status()
    extension = status.cuda if torch.cuda.is_available() else status.loaded
    return ["torch", *(["triton"] if triton_problem() is None else []), *(["extension"] if extension else [])]


GRADIENT_BACKENDS = gradient_backends()
LOOKUP_BACKENDS = [backend for backend in GRADIENT_BACKENDS if backend != "extension"]


def fits(backend: str, device: torch.device, n: int, interpreted: int = 150) -> int:
    """``n``, or ``interpreted`` where Triton's interpreter must walk the rows one by one."""
    return min(n, interpreted) if backend == "triton" and device.type == "cpu" else n


def uniform(n: int, rows: int) -> Tensor:
    return torch.randint(0, rows, (n,))


def zipf(n: int, rows: int) -> Tensor:
    """Rank r with a probability proportional to 1 / r: words of a text."""
    return torch.multinomial(1.0 / torch.arange(1, rows + 1, dtype=torch.float64), max(n, 1), replacement=True)[:n]


def hot(n: int, rows: int) -> Tensor:
    """One id holds half of the positions."""
    ids = uniform(n, rows)
    ids[torch.rand(n) < 0.5] = rows // 2
    return ids


def equal(n: int, rows: int) -> Tensor:
    return torch.full((n,), rows - 1)


def distinct(n: int, rows: int) -> Tensor:
    """As far as there are rows."""
    return torch.cat([torch.randperm(rows) for _ in range(n // rows + 1)])[:n]


def padding(n: int, rows: int) -> Tensor:
    return torch.zeros(n, dtype=torch.int64)


def ascending(n: int, rows: int) -> Tensor:
    return uniform(n, rows).sort().values


def descending(n: int, rows: int) -> Tensor:
    return uniform(n, rows).sort(descending=True).values


DISTRIBUTIONS: dict[str, Callable[[int, int], Tensor]] = {
    function.__name__: function for function in (uniform, zipf, hot, equal, distinct, padding, ascending, descending)
}


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Within the block every ``torch.empty``, also the extension's, holds NaN or the largest integer."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])

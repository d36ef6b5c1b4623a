"""Which implementation an op runs on, and why.

Every op has up to three backends: ``"extension"`` (the C++/CUDA library), ``"triton"`` and ``"torch"`` (plain
PyTorch). The choice depends on the device and on what is installed; it is made in one place so that ``doctor`` and
the patch report say exactly what a call will do.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.autograd import forward_ad

Backend = Literal["extension", "triton", "torch"]
BACKENDS: tuple[Backend, ...] = ("extension", "triton", "torch")

# In order of preference, by op.
SUPPORTED: dict[str, tuple[Backend, ...]] = {
    "embed": ("triton", "torch"),
    "embedding": ("triton", "torch"),
    "embedding_grad": ("extension", "triton", "torch"),
    "attention": ("triton", "torch"),
    "rope": ("triton", "torch"),
    "count_positions": ("triton", "torch"),
}


@dataclass(frozen=True)
class Choice:
    """The backend of an op on a device, and the reason in a sentence."""

    backend: Backend
    reason: str


# What nearly every call on a GPU gets.
_TRITON_ON_CUDA = Choice("triton", "the best for cuda")

_forced: Backend | None = None


def interpreting() -> bool:
    """True where Triton kernels run in its interpreter (``TRITON_INTERPRET=1`` when Triton was imported)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


# Remembered in a plain global: torch.compile traces this file, and neither functools.cache nor importlib's finders
# can be traced by every version of it.
_triton: tuple[str | None] | None = None


def triton_problem() -> str | None:
    """Why Triton cannot be used here, or None if it can."""
    global _triton
    if _triton is None:
        _triton = (_look_for_triton(),)
    return _triton[0]


def _look_for_triton() -> str | None:
    try:
        import triton
    except Exception as error:  # a broken installation must not take the plain path down with it
        if isinstance(error, ModuleNotFoundError) and error.name == "triton":
            return "triton is not installed"
        return f"triton does not import ({type(error).__name__}: {error})"
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version < (3, 6):
        return f"triton {triton.__version__} is older than 3.6"
    return None


def _problem(backend: Backend, device: torch.device) -> str | None:
    """Why ``backend`` cannot run on ``device``, or None if it can."""
    if backend == "torch":
        return None
    if backend == "triton":
        problem = triton_problem()
        if problem is None and device.type != "cuda" and not interpreting():
            problem = f"triton does not compile for {device.type}"
        return problem
    from embedkernels.ops.extension import device_problem, extension_status

    status = extension_status()
    if not status.loaded:
        return status.reason
    if device.type == "cpu":
        return None
    if device.type == "cuda" and status.cuda:
        return device_problem(torch.cuda.current_device() if device.index is None else device.index)
    return f"the extension has no {device.type} code: {status.reason}"


def choose(op: str, device: torch.device, requested: str | None = None) -> Choice:
    """The backend that ``op`` takes on ``device``.

    Args:
        op: a key of ``SUPPORTED``.
        device: where the inputs live.
        requested: a backend's name, which then must be usable; None or ``"auto"`` takes the best there is.

    Raises:
        ValueError: unknown backend, or one that this op does not have.
        RuntimeError: the requested backend cannot run here; the message says why.
    """
    supported = SUPPORTED[op]
    if requested in (None, "auto"):
        requested = _forced if _forced in supported else None
    if requested is not None:
        if requested not in supported:
            raise ValueError(f"{op}: backend must be one of {', '.join(supported)} or auto, got {requested!r}")
        backend: Backend = requested
        problem = _problem(backend, device)
        if problem is not None:
            raise RuntimeError(f"{op}: backend {backend!r} cannot run on {device}: {problem}")
        return Choice(backend, "asked for")
    if device.type == "cuda" and supported[0] == "triton" and triton_problem() is None:
        return _TRITON_ON_CUDA
    reasons = []
    for backend in supported:
        # On a CPU, Triton only has its interpreter, which is for tests: never a default.
        if backend == "triton" and device.type != "cuda":
            reasons.append(f"no Triton on {device.type}")
            continue
        problem = _problem(backend, device)
        if problem is None:
            return Choice(backend, "; ".join(reasons) or f"the best for {device.type}")
        reasons.append(problem)
    raise AssertionError("the torch backend runs everywhere")


def needs_stock_autograd(*tensors: Tensor | None) -> bool:
    """Whether a call on ``tensors`` must be made of PyTorch's own ops for its derivatives to be right.

    The ops of this package have a reverse-mode formula and nothing else. True where a transform of ``torch.func``
    (``grad``, ``vmap``, ``jvp`` ...) is active, or where one of the tensors carries a forward-mode tangent, which
    would be lost without a word. None is skipped. While torch.compile traces, tangents cannot be seen: then every
    call within ``forward_ad.dual_level`` counts.
    """
    if torch._C._are_functorch_transforms_active():
        return True
    if forward_ad._current_level < 0:
        return False
    if torch.compiler.is_compiling():
        return True
    return any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in tensors)


def makes_a_program() -> bool:
    """Whether ``torch.jit.trace`` or ``torch.export`` records: what they make should run without this package.

    ``torch.compiler.is_exporting()`` read from its flag, for Dynamo of torch 2.11 takes it for true in every
    ``torch.compile``.
    """
    return torch.jit.is_tracing() or torch.compiler._is_exporting_flag  # type: ignore[attr-defined]


def check_stock_autograd(op: str, device: torch.device, requested: str | None) -> None:
    """NotImplementedError if a backend was asked for that has no such derivatives (see :func:`needs_stock_autograd`).

    Where none was asked for, the call is made of PyTorch's own ops.
    """
    choice = choose(op, device, requested)
    if choice.backend != "torch" and choice.reason == "asked for":
        raise NotImplementedError(
            f"{op}: backend {choice.backend!r} has no forward-mode derivative and takes no transform of torch.func; "
            "pass backend='torch'"
        )


@contextlib.contextmanager
def use_backend(backend: Backend) -> Iterator[None]:
    """Within the block, every op that has ``backend`` runs on it; ops that lack it choose as usual.

    Args:
        backend: ``"extension"``, ``"triton"`` or ``"torch"``.

    Raises:
        ValueError: for another name.

    Example:
        >>> import embedkernels as ek
        >>> with ek.use_backend("torch"):
        ...     pass
    """
    global _forced
    if backend not in BACKENDS:
        raise ValueError(f"use_backend: backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    before, _forced = _forced, backend
    try:
        yield
    finally:
        _forced = before

"""Whether a call runs at once, on plain tensors, with nothing that watches or transforms it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad
from torch.nn.parameter import Buffer, Parameter
from torch.overrides import _get_current_function_mode_stack
from torch.profiler import record_function
from torch.utils._device import DeviceContext

_PLAIN = frozenset((Tensor, Parameter, Buffer))
_Function = TypeVar("_Function", bound=Callable[..., object])

# Sets of dispatch keys, as numbers, that memory of a CPU or a GPU without any wrapping has.
_plain_keys: set[int] = set()


def is_eager(*tensors: Tensor | None) -> bool:
    """True where an op may call its implementation without the dispatcher, which takes longer than small kernels.

    False while torch.compile, torch.export, ``make_fx`` or ``torch.jit.trace`` traces, within transforms of
    ``torch.func`` and levels of forward-mode AD, under modes that want to see every op or function, for subclasses of
    Tensor (DTensor, fake tensors), and for tensors whose memory does not hold their values as they are (sparse
    layouts, views that are negated when they are read).
    """
    if _watched():
        return False
    keys = torch._C._dispatch_keys
    for x in tensors:
        if x is None:
            continue
        if type(x) not in _PLAIN or (keys(x).raw_repr() not in _plain_keys and not _has_plain_keys(x)):
            return False
    return True


def signature(*tensors: Tensor | None) -> tuple[Any, ...] | None:
    """Shapes, dtypes and devices of contiguous tensors in eager mode; None if they are not, or the mode is not."""
    if _watched():
        return None
    keys = torch._C._dispatch_keys
    found: list[Any] = []
    for x in tensors:
        if x is None:
            found.append(None)
            continue
        if type(x) not in _PLAIN or (keys(x).raw_repr() not in _plain_keys and not _has_plain_keys(x)):
            return None
        if not x.is_contiguous():
            return None
        found += (x.shape, x.dtype, x.get_device())
    return tuple(found)


def _watched() -> bool:
    """Whether something traces, transforms or looks at what is called."""
    # First what torch.compile takes for a constant: it cannot trace the others.
    if torch.compiler.is_compiling():
        return True
    if torch._C._len_torch_dispatch_stack() or (torch._C._len_torch_function_stack() and not _only_devices()):
        return True
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return True
    return torch._C._get_tracing_state() is not None


def _only_devices() -> bool:
    """Whether all function modes are those of ``torch.set_default_device``, which look at nothing else."""
    return all(isinstance(mode, DeviceContext) for mode in _get_current_function_mode_stack())


def _has_plain_keys(x: Tensor) -> bool:
    """Whether ``x`` is dispatched as a new tensor on its device would be, made in inference mode or outside of it."""
    if x.device.type not in ("cpu", "cuda"):
        return False
    for inference in (False, True):
        with torch.inference_mode(inference):
            _plain_keys.add(torch._C._dispatch_keys(torch.empty(0, device=x.device)).raw_repr())
    return torch._C._dispatch_keys(x).raw_repr() in _plain_keys


def any_requires_grad(*tensors: Tensor | None) -> bool:
    """Whether a call on ``tensors`` has to be recorded for a backward pass."""
    if torch.is_grad_enabled():
        for x in tensors:
            if x is not None and x.requires_grad:
                return True
    return False


def apply(function: type[Function], *arguments: Any) -> Any:
    """``function.apply`` without its care for the transforms of ``torch.func``, which eager mode excludes."""
    return super(Function, function).apply(*arguments)  # type: ignore[misc]


def shown_as(name: str) -> Callable[[_Function], _Function]:
    """A function that a profiler shows by ``name``, as the dispatcher would have it show the op."""

    def decorate(function: _Function) -> _Function:
        @functools.wraps(function)
        def call(*args, **kwargs):  # type: ignore[no-untyped-def]
            if not torch._C._autograd._profiler_enabled():
                return function(*args, **kwargs)
            with record_function(name):
                return function(*args, **kwargs)

        return call  # type: ignore[return-value]

    return decorate

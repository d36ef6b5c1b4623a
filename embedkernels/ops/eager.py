"""Whether a call runs at once, on plain tensors, with nothing that watches or transforms it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.parameter import Buffer, Parameter

_PLAIN = (Tensor, Parameter, Buffer)


def is_eager(*tensors: Tensor | None) -> bool:
    """True where an op may call its implementation without the dispatcher, which takes longer than small kernels.

    False while torch.compile, torch.export or ``make_fx`` traces, within transforms of ``torch.func``, under modes
    that want to see every op, and for subclasses of Tensor (DTensor, fake tensors).
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    if torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack():
        return False
    return all(x is None or type(x) in _PLAIN for x in tensors)

"""Launching a kernel that has been launched before, without asking Triton again which compilation it is.

``kernel[grid](...)`` looks at every argument to find the compiled kernel that fits: some 20 us for the thirty
arguments of ``embed``, as long as PyTorch takes for three small ops. A :class:`Launcher` remembers what was found, by
everything that Triton specialises on, and hands the arguments to the compiled kernel.
"""

from __future__ import annotations

from collections.abc import Mapping
from operator import attrgetter, itemgetter
from typing import Any

import torch
import triton
from torch import Tensor

# Sizes that vary make entries.
_MOST_ENTRIES = 4096
_INT32 = range(-(2**31), 2**31)
_dtype_of = attrgetter("dtype")


class Launcher:
    """Launches ``kernel``, a ``@triton.jit`` function whose constexprs stand behind its other arguments.

    Arguments whose names end in ``_ptr`` are pointers, the others numbers. Triton's settings for debugging are those
    of the first launch of each kind.
    """

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self._compiled: dict[tuple[Any, ...], Any] = {}
        self._jitted = isinstance(kernel, triton.JITFunction)  # else it is interpreted
        if not self._jitted:
            return
        plain = [p for p in kernel.params if not p.is_constexpr]
        if [p.num for p in plain] != list(range(len(plain))):
            raise ValueError(f"{kernel.__name__}: constexprs must stand behind all other arguments")
        numbers = [p for p in plain if not p.name.endswith("_ptr")]
        self._pointers = _elements([p.num for p in plain if p.name.endswith("_ptr")])
        self._numbers = _elements([p.num for p in numbers])
        # Compiled for where they are 1 or multiples of 16: their values belong to the key.
        self._specialized = _elements([p.num for p in numbers if not p.do_not_specialize])

    def __call__(
        self, grid: tuple[int, ...], arguments: tuple[Any, ...], constexprs: Mapping[str, Any], **options: Any
    ) -> None:
        """Launch on the device of the first pointer.

        Args:
            grid: programs, along one to three axes.
            arguments: tensors and numbers in the kernel's order, all but the constexprs.
            constexprs: by name; those that the kernel lacks are left out.
            options: num_warps, num_stages and the like.
        """
        constants = tuple([constexprs[name] for name in self.kernel.arg_names[len(arguments) :]])
        if not self._jitted:
            self.kernel[grid](*arguments, *constants, **options)
            return
        pointers = self._pointers(arguments)
        device = pointers[0].get_device()
        if device >= 0 and device != torch.cuda.current_device():
            with torch.cuda.device(device):
                self(grid, arguments, constexprs, **options)
            return
        addresses = 0
        for address in map(Tensor.data_ptr, pointers):
            addresses |= address
        numbers = self._numbers(arguments)
        # Addresses that are no multiples of 16 and integers of 64 bits are Triton's business.
        if addresses & 15 or not _fit(numbers) or self.kernel.pre_run_hooks:
            self.kernel[grid](*arguments, *constants, **options)
            return
        key = (
            device, constants, *map(_dtype_of, pointers), *map(type, numbers), self._specialized(arguments),
            *options.items(),
        )  # fmt: skip
        compiled = self._compiled.get(key)
        if compiled is not None:
            compiled[(*grid, 1, 1)[:3]](*arguments, *constants)
            return
        if len(self._compiled) >= _MOST_ENTRIES:
            self._compiled.clear()
        self._compiled[key] = self.kernel[grid](*arguments, *constants, **options)


def blocks(size: int, block: int) -> int:
    """How many blocks hold ``size`` elements. Beside ``triton.cdiv``, which takes some 5 us, it costs nothing."""
    return -(-size // block)


def _elements(places: list[int]) -> Any:
    """What takes the elements at ``places`` out of a tuple, as a tuple."""
    if len(places) > 1:
        return itemgetter(*places)
    return lambda arguments: tuple(arguments[place] for place in places)


def _fit(numbers: tuple[float, ...]) -> bool:
    """Whether all integers among them are 32-bit ones."""
    if not numbers or (max(numbers) < _INT32.stop and min(numbers) >= _INT32.start):
        return True
    return all(number in _INT32 for number in numbers if isinstance(number, int))

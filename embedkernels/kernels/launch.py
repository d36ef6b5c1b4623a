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


class Launch:
    """Launches of one compilation of a kernel: arguments differ in their values, not in what Triton specialises on.

    That is, beside constexprs and options: every pointer's dtype, the device, and the numbers that are specialised.
    """

    def __init__(self, launcher: Launcher, constants: tuple[Any, ...], options: dict[str, Any]) -> None:
        self._kernel, self._pointers = launcher.kernel, launcher.pointers
        self._constants, self._options = constants, options
        self._compiled: Any = None

    def __call__(self, grid: tuple[int, ...], arguments: tuple[Any, ...]) -> None:
        """Launch on the device of the first pointer.

        Args:
            grid: programs, along one to three axes.
            arguments: tensors and numbers in the kernel's order, all but the constexprs.
        """
        if self._pointers is not None:
            pointers = self._pointers(arguments)
            device = pointers[0].get_device()
            if device >= 0 and device != torch.cuda.current_device():
                with torch.cuda.device(device):
                    self(grid, arguments)
                return
            addresses = 0
            for address in map(Tensor.data_ptr, pointers):
                addresses |= address
            # Others than multiples of 16 have compilations of their own, which Triton finds.
            if addresses & 15 == 0 and not self._kernel.pre_run_hooks:
                if self._compiled is None:
                    self._compiled = self._kernel[grid](*arguments, *self._constants, **self._options)
                else:
                    self._compiled[(*grid, 1, 1)[:3]](*arguments, *self._constants)
                return
        self._kernel[grid](*arguments, *self._constants, **self._options)


class Launcher:
    """Launches ``kernel``, a ``@triton.jit`` function whose constexprs stand behind its other arguments.

    Arguments whose names end in ``_ptr`` are pointers, the others numbers. Triton's settings for debugging are those
    of the first launch of each kind.
    """

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.pointers: Any = None  # of the arguments; None where kernels are interpreted
        self._launches: dict[tuple[Any, ...], Launch] = {}
        if not isinstance(kernel, triton.JITFunction):
            return
        plain = [p for p in kernel.params if not p.is_constexpr]
        if [p.num for p in plain] != list(range(len(plain))):
            raise ValueError(f"{kernel.__name__}: constexprs must stand behind all other arguments")
        numbers = [p for p in plain if not p.name.endswith("_ptr")]
        self.pointers = _elements([p.num for p in plain if p.name.endswith("_ptr")])
        self._numbers = _elements([p.num for p in numbers])
        # Integers are compiled for where they are 1 or multiples of 16: their values belong to the key.
        self._specialized = _elements([p.num for p in numbers if not p.do_not_specialize])

    def __call__(
        self, grid: tuple[int, ...], arguments: tuple[Any, ...], constexprs: Mapping[str, Any], **options: Any
    ) -> None:
        """Launch, see :class:`Launch`; ``constexprs`` and ``options`` as for :meth:`find`."""
        self.find(arguments, constexprs, **options)(grid, arguments)

    def find(self, arguments: tuple[Any, ...], constexprs: Mapping[str, Any], **options: Any) -> Launch:
        """The launch for such arguments.

        Args:
            arguments: tensors and numbers in the kernel's order, all but the constexprs.
            constexprs: by name; those that the kernel lacks are left out.
            options: num_warps, num_stages and the like.
        """
        constants = tuple([constexprs[name] for name in self.kernel.arg_names[len(arguments) :]])
        if self.pointers is None:
            return Launch(self, constants, options)
        pointers, numbers = self.pointers(arguments), self._numbers(arguments)
        specialized = [None if type(x) is float else x for x in self._specialized(arguments)]
        key = (
            pointers[0].get_device(), constants, *map(_dtype_of, pointers), *map(type, numbers), *specialized,
            _wide(numbers), *options.items(),
        )  # fmt: skip
        launch = self._launches.get(key)
        if launch is None:
            if len(self._launches) >= _MOST_ENTRIES:
                self._launches.clear()
            launch = self._launches[key] = Launch(self, constants, options)
        return launch


def blocks(size: int, block: int) -> int:
    """How many blocks hold ``size`` elements. Beside ``triton.cdiv``, which takes some 5 us, it costs nothing."""
    return -(-size // block)


def _elements(places: list[int]) -> Any:
    """What takes the elements at ``places`` out of a tuple, as a tuple."""
    if len(places) > 1:
        return itemgetter(*places)
    return lambda arguments: tuple(arguments[place] for place in places)


def _wide(numbers: tuple[float, ...]) -> tuple[int, ...]:
    """The places of the integers that do not fit into 32 bits: they are passed in 64."""
    if not numbers or (max(numbers) < _INT32.stop and min(numbers) >= _INT32.start):
        return ()
    return tuple(place for place, x in enumerate(numbers) if isinstance(x, int) and x not in _INT32)

"""What kernels load and store, counted in Triton's interpreter by launch and tensor."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="counted in the interpreter, which a GPU replaces")


@dataclass
class Launch:
    """One launch of a kernel.

    Attributes:
        kernel: name of the kernel.
        tensors: first and last byte of each tensor by the name of its argument, without ``_ptr``. An argument that
            the call lacks is given a tensor that it has: of several names for one the last in STANDING_IN stays.
        accesses: addresses of elements and their size, by ``"load"`` or ``"store"`` and the tensor's name.
    """

    kernel: str
    tensors: dict[str, tuple[int, int]]
    accesses: dict[tuple[str, str], list[tuple[Any, int]]] = field(default_factory=dict)

    def note(self, kind: str, pointers: Any, mask: Any) -> None:
        addresses = pointers.data[np.broadcast_to(mask.data, pointers.data.shape).astype(bool)]
        if addresses.size:
            first, last = int(addresses.min()), int(addresses.max())
            names = [name for name, (begin, end) in self.tensors.items() if begin <= first and last <= end]
            assert len(names) == 1, f"{self.kernel}: a {kind} of {first:#x} to {last:#x} is in {names or 'no tensor'}"
            width = pointers.get_element_ty().primitive_bitwidth // 8
            self.accesses.setdefault((kind, names[0]), []).append((addresses, width))


STANDING_IN = ("weight", "mean", "query", "query_out")


def _extents(arguments: dict[str, Any]) -> dict[str, tuple[int, int]]:
    found: dict[tuple[int, int], str] = {}
    for name, tensor in arguments.items():
        if isinstance(tensor, torch.Tensor) and tensor.numel():
            last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
            extent = tensor.data_ptr(), tensor.data_ptr() + last * tensor.itemsize
            name = name.removesuffix("_ptr")
            if extent not in found or name in STANDING_IN:
                found[extent] = name
    return {name: extent for extent, name in found.items()}


@dataclass
class Traffic:
    """Of all launches since the recording began."""

    launches: list[Launch] = field(default_factory=list)

    def _sum(self, count: Any) -> dict[str, int]:
        found: dict[str, int] = {}
        for launch in self.launches:
            for (kind, name), accesses in launch.accesses.items():
                key = f"{kind} {name}"
                width = accesses[0][1]
                found[key] = found.get(key, 0) + width * count(np.concatenate([a.ravel() for a, _ in accesses]))
        return found

    def moved(self) -> dict[str, int]:
        """Bytes that a launch touches, each counted once, summed over the launches: what memory must move."""
        return self._sum(lambda addresses: np.unique(addresses).size)

    def issued(self) -> dict[str, int]:
        """Bytes of all loads and stores, those that caches serve again included."""
        return self._sum(lambda addresses: addresses.size)


@contextmanager
def recorded() -> Iterator[Traffic]:
    """Records every launch within."""
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

    traffic = Traffic()
    stock = GridExecutor.__call__, InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    launch, load, store = stock

    def launching(self: Any, *args: Any, **kwargs: Any) -> Any:
        arguments = {**dict(zip(self.arg_names, args, strict=False)), **kwargs}
        traffic.launches.append(Launch(self.fn.__name__, _extents(arguments)))
        return launch(self, *args, **kwargs)

    def loading(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        traffic.launches[-1].note("load", pointers, mask)
        return load(self, pointers, mask, *rest)

    def storing(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        traffic.launches[-1].note("store", pointers, mask)
        return store(self, pointers, value, mask, *rest)

    names = "__call__", "create_masked_load", "create_masked_store"
    owners = GridExecutor, InterpreterBuilder, InterpreterBuilder
    for owner, name, mine in zip(owners, names, (launching, loading, storing), strict=True):
        setattr(owner, name, mine)
    try:
        yield traffic
    finally:
        for owner, name, method in zip(owners, names, stock, strict=True):
            setattr(owner, name, method)

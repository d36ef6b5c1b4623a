"""A launch that resembles an earlier one goes past Triton's search; what Triton would tell apart is told apart."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")

from embedkernels.kernels import launch  # noqa: E402
from embedkernels.kernels.launch import Launcher, blocks  # noqa: E402


class Kernel:
    """Stands for a ``@triton.jit`` function (x_ptr, y_ptr, n, stride, factor, BLOCK); n is not specialised."""

    __name__ = "kernel"

    def __init__(self, names: tuple[str, ...] = ("x_ptr", "y_ptr", "n", "stride", "factor", "BLOCK")) -> None:
        self.arg_names = list(names)
        self.params = [
            SimpleNamespace(name=name, num=number, is_constexpr=name.isupper(), do_not_specialize=name == "n")
            for number, name in enumerate(names)
        ]
        self.pre_run_hooks: list[Any] = []
        self.searches: list[tuple[Any, ...]] = []
        self.launches: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def search(*arguments: Any, **options: Any) -> Any:
            self.searches.append((grid, arguments, options))
            return self

        def run(*arguments: Any) -> None:
            self.launches.append((grid, arguments))

        return lambda *arguments, **options: search(*arguments, **options) if options else run(*arguments)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    monkeypatch.setattr(launch.triton, "JITFunction", Kernel)
    return Kernel()


X, Y = torch.zeros(64), torch.zeros(64)


def call(launcher: Launcher, grid: tuple[int, ...] = (3,), **changes: Any) -> None:
    given = {"x": X, "y": Y, "n": 5, "stride": 8, "factor": 0.5, "BLOCK": 16, "num_warps": 4, **changes}
    x, y, n, stride, factor, block, warps = given.values()
    launcher(grid, (x, y, n, stride, factor), {"BLOCK": block, "UNUSED": 1}, num_warps=warps)


def test_a_second_launch_hands_the_same_arguments_to_the_compiled_kernel(kernel: Kernel) -> None:
    launcher = Launcher(kernel)
    call(launcher)
    call(launcher, grid=(7, 2), x=Y, n=6, factor=0.25)
    assert len(kernel.searches) == len(kernel.launches) == 1
    grid, (x, y, n, stride, factor, block) = kernel.launches[0]
    assert grid == (7, 2, 1)
    assert x is Y
    assert y is Y
    assert (n, stride, factor, block) == (6, 8, 0.25, 16)


CHANGES: dict[str, dict[str, Any]] = {
    "dtype of x": {"x": X.double()}, "dtype of y": {"y": Y.half()}, "multiple of 16": {"stride": 16},
    "one": {"stride": 1}, "64 bits": {"n": 2**31}, "64 bits, negative": {"n": -(2**31) - 1},
    "an integer": {"factor": 1}, "constexpr": {"BLOCK": 32}, "warps": {"num_warps": 8},
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_triton_compiles_for_makes_another_kernel(change: dict[str, Any], kernel: Kernel) -> None:
    launcher = Launcher(kernel)
    call(launcher)
    call(launcher, **change)
    assert len(kernel.searches) == 2
    assert not kernel.launches
    call(launcher, **change)
    call(launcher)
    assert len(kernel.searches) == len(kernel.launches) == 2


def test_addresses_that_are_not_aligned_are_left_to_triton(kernel: Kernel) -> None:
    launcher = Launcher(kernel)
    for _ in range(2):
        call(launcher, x=X[1:])
    call(launcher)
    call(launcher, y=Y[1:])
    assert len(kernel.searches) == 4
    assert not kernel.launches
    call(launcher)
    assert len(kernel.launches) == 1


def test_hooks_of_a_kernel_see_every_launch(kernel: Kernel) -> None:
    launcher = Launcher(kernel)
    call(launcher)
    kernel.pre_run_hooks.append(print)
    call(launcher)
    assert len(kernel.searches) == 2


def test_sizes_that_vary_do_not_fill_the_memory(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_MOST_ENTRIES", 3)
    launcher = Launcher(kernel)
    for stride in range(10):
        call(launcher, stride=stride)
        assert len(launcher._launches) <= 3


def test_constexprs_in_front_of_other_arguments_are_refused(kernel: Kernel) -> None:
    with pytest.raises(ValueError, match="constexprs must stand behind"):
        Launcher(Kernel(("x_ptr", "BLOCK", "n")))


def test_blocks() -> None:
    assert [blocks(size, 4) for size in (0, 1, 4, 5, 8)] == [0, 1, 1, 2, 2]


WITH_TRITON = """
import torch
from bench.host_time import NoDevice
from triton.runtime import driver
from embedkernels.kernels.launch import Launcher
from embedkernels.kernels.positions import count_positions_kernel as kernel

launched = []

class Driver(NoDevice):
    def launcher_cls(self, *_):
        return lambda *arguments: launched.append(arguments)

driver.set_active(Driver())
searches = []
run = kernel.run
kernel.run = lambda *args, **kwargs: searches.append(args) or run(*args, **kwargs)
tokens, out = torch.zeros(2, 8, dtype=torch.int64), torch.zeros(2, 8, dtype=torch.int64)
launcher = Launcher(kernel)
for _ in range(3):
    launcher((2,), (out, tokens, 8, 8, 1, 0, 1, 1, 0), {"BLOCK": 128}, num_warps=4)
assert len(searches) == 1, searches
assert len(launched) == 3 and len(set(map(len, launched))) == 1, launched
first, second, third = launched
for other in (second, third):
    # What belongs to the launch hooks is made anew every time.
    assert all(type(a) is type(b) for a, b in zip(first, other)), (first, other)
    assert first[:6] == other[:6], (first, other)
    assert all(a is b or a == b for a, b in zip(first[-10:], other[-10:])), (first, other)
    assert first[-10] is out and first[-9] is tokens and first[-1] == 128, first
assert first[:3] == (2, 1, 1), first
"""


def test_triton_itself_gets_the_same_launch_either_way(tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", WITH_TRITON], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]

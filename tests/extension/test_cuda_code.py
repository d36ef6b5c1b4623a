"""What nvcc made of the kernels: registers, spills, width of the loads, architectures. Needs no GPU."""

import functools
import re
import subprocess
import sys
from pathlib import Path

import pytest

from embedkernels.ops.extension import extension_status
from tests.extension.fakes import TOOLS

SHIPPED = ("80", "86", "89", "90", "100", "120")


@pytest.fixture(scope="module")
def status():
    status = extension_status()
    if not status.loaded or not status.architectures:
        pytest.skip(f"there is no CUDA code to look at: {status.reason}")
    return status


@functools.cache
def cuobjdump(*arguments):
    """From Triton's wheel, which brings it and the disassembler along."""
    triton = pytest.importorskip("triton")
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    done = subprocess.run(
        [str(tools / "cuobjdump"), *arguments, extension_status().path],
        capture_output=True,
        text=True,
        env={"PATH": str(tools)},
        check=True,
    )
    return done.stdout


def resources():
    """(architecture, kernel, REG, STACK, SHARED, LOCAL) of every kernel of ours."""
    found = []
    architecture = ""
    lines = iter(cuobjdump("--dump-resource-usage").splitlines())
    for line in lines:
        if match := re.search(r"arch = (sm_\d+)", line):
            architecture = match[1]
        if match := re.search(r"Function (\S*embedkernels\S*):", line):
            numbers = dict(re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", next(lines)))
            found.append(
                (architecture, match[1], *(int(numbers[key]) for key in ("REG", "STACK", "SHARED", "LOCAL")))
            )
    return found


def test_every_kernel_is_there_for_every_architecture(status):
    built = [target for target in status.architectures if target.startswith("sm_")]
    kernels = {architecture: set() for architecture in built}
    for architecture, kernel, *_ in resources():
        kernels[architecture].add(kernel)
    # plan: keys for two dtypes of ids, count, segments. grad: reduce and finish, four dtypes, vectors and elements.
    assert {architecture: len(names) for architecture, names in kernels.items()} == dict.fromkeys(built, 4 + 16)


def test_ptx_for_gpus_to_come(status):
    newest = status.architectures[-1].removeprefix("compute_")
    assert re.search(rf"sm_{newest}\.ptx", cuobjdump("--list-ptx"))


def test_nothing_spills_and_registers_are_bounded(status):
    for architecture, kernel, registers, stack, shared, local in resources():
        where = f"{kernel} on {architecture}"
        assert (stack, local) == (0, 0), f"{where}: {stack} bytes of stack, {local} of local memory"
        # Three blocks of 256 threads fit on an SM of 64k registers.
        assert registers <= (80 if "grad_" in kernel else 40), f"{where}: {registers} registers"
        assert shared <= 20 << 10, f"{where}: {shared} bytes of shared memory"


def test_gradient_rows_are_loaded_16_bytes_at_a_time(status):
    architecture = next(target for target in status.architectures if target.startswith("sm_"))
    loads = {}
    kernel = ""
    for line in cuobjdump("-sass", "-arch", architecture).splitlines():
        if match := re.search(r"Function : (\S+)", line):
            kernel = match[1]
        elif match := re.search(r"\b(LDG\S*)", line):
            loads.setdefault(kernel, []).append(match[1])
    reduce = {name: found for name, found in loads.items() if "grad_reduce_kernel" in name}
    assert len(reduce) == 8
    for name, found in reduce.items():
        vectors = re.search(r"grad_reduce_kernelI\w+Li(\d)E", name)[1] != "1"
        # Eight rows in flight per thread.
        assert sum(load.startswith("LDG") and load.endswith(".128") for load in found) == (8 if vectors else 0), name


def test_the_cuda_symbol_is_looked_for_where_it_is(status):
    """libtorch.so leads to libtorch_cuda.so where there is one; libtorch_cpu.so alone would leave the symbol open."""
    if sys.platform != "linux":
        pytest.skip("ELF only")
    assert b"\0libtorch.so\0" in Path(status.path).read_bytes()


def test_the_architectures_that_are_shipped(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOLS))
    import toolchain

    assert toolchain.ARCHITECTURES == SHIPPED

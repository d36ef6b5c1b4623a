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


# In one launch and keys, for two dtypes of ids; count, segments.
PLAN_KERNELS = 2 * 2 + 2
# In vectors and one element at a time: ten pairs of dtypes are reduced, five outputs finished.
GRAD_KERNELS = 2 * 10 + 2 * 5


def test_every_kernel_is_there_for_every_architecture(status):
    built = [target for target in status.architectures if target.startswith("sm_")]
    kernels = {architecture: set() for architecture in built}
    for architecture, kernel, *_ in resources():
        kernels[architecture].add(kernel)
    found = {architecture: len(names) for architecture, names in kernels.items()}
    assert found == dict.fromkeys(built, PLAN_KERNELS + GRAD_KERNELS)


def test_ptx_for_gpus_to_come(status):
    newest = status.architectures[-1].removeprefix("compute_")
    assert re.search(rf"sm_{newest}\.ptx", cuobjdump("--list-ptx"))


def test_nothing_spills_and_registers_are_bounded(status):
    for architecture, kernel, registers, stack, shared, local in resources():
        where = f"{kernel} on {architecture}"
        assert (stack, local) == (0, 0), f"{where}: {stack} bytes of stack, {local} of local memory"
        if "plan_small" in kernel:  # one block of 1024 threads is all that runs
            assert registers <= 64, f"{where}: {registers} registers"
            assert shared <= 48 << 10, f"{where}: {shared} bytes of shared memory"
            continue
        # Three blocks of 256 threads fit on an SM of 64k registers.
        assert registers <= (80 if "grad_" in kernel else 40), f"{where}: {registers} registers"
        # And into the 100 KiB of shared memory that the smallest of them have.
        assert shared <= 32 << 10, f"{where}: {shared} bytes of shared memory"


@functools.cache
def instructions(architecture):
    """{kernel: mnemonics} of the gradient's kernels, in order."""
    found = {}
    kernel = ""
    for line in cuobjdump("-sass", "-arch", architecture).splitlines():
        if match := re.search(r"Function : (\S+)", line):
            kernel = match[1]
        elif match := re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+ )?([A-Z]\S*)", line):
            found.setdefault(kernel, []).append(match[1])
    return {kernel: names for kernel, names in found.items() if "grad_" in kernel}


def first_architecture(status):
    return next(target for target in status.architectures if target.startswith("sm_"))


def element_size(mangled):
    return {"f": 4, "d": 8}.get(mangled, 2)


def test_gradient_rows_move_16_bytes_at_a_time(status):
    """Of the two dtypes the wider one; the plain walk has eight rows in flight per thread, the accumulating one four
    with the rows they are added to."""
    kernels = {
        name: names for name, names in instructions(first_architecture(status)).items() if "grad_reduce" in name
    }
    assert len(kernels) == 20
    for name, names in kernels.items():
        rows, out, vector = re.search(r"grad_reduce_kernelI(NS_\w+?E|f|d)(S\d?_|NS\w+?E|f|d)Li(\d)E", name).groups()
        row_size = element_size(rows)
        out_size = row_size if out.startswith("S") else element_size(out)
        if vector == "1":
            assert not any(name.endswith(".128") for name in names if name.startswith(("LDG", "STG"))), name
            continue
        assert int(vector) == 16 // max(row_size, out_size)
        loads = {row_size * int(vector): 4 if "Stochastic" in out else 8 + 4}
        old = out_size * int(vector)
        loads[old] = loads.get(old, 0) + 4 + 1  # in the walk, and at the end of a segment that crosses tiles
        for size, count in loads.items():
            wide = sum(load.startswith("LDG") and load.endswith(f".{8 * size}") for load in names)
            # Weights in double and seeds are 8 bytes as well.
            assert wide == count if size == 16 else wide >= count, f"{name}: {wide} loads of {size} bytes"
        # The three words of a strip's tail are all that is stored word by word.
        narrow = [store for store in names if store.startswith("STG") and not store.endswith((".64", ".128"))]
        assert len(narrow) <= 3, f"{name}: {narrow}"
        assert any(store.startswith("STG") and store.endswith(".128") for store in names), name


def test_the_gradient_has_no_atomics(status):
    """They would add in another order in every run."""
    for name, names in instructions(first_architecture(status)).items():
        assert not [found for found in names if found.startswith(("ATOM", "RED"))], name


def test_the_cuda_symbol_is_looked_for_where_it_is(status):
    """libtorch.so leads to libtorch_cuda.so where there is one; libtorch_cpu.so alone would leave the symbol open."""
    if sys.platform != "linux":
        pytest.skip("ELF only")
    assert b"\0libtorch.so\0" in Path(status.path).read_bytes()


def test_the_architectures_that_are_shipped(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOLS))
    import toolchain

    assert toolchain.ARCHITECTURES == SHIPPED

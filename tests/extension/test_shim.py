"""The shim must notice faults, or a green run of the kernels under it would mean nothing."""

import ctypes

import pytest
import torch

from tests.extension import shim

KERNELS = (
    *("with_barrier", "missing_barrier", "read_past_the_end", "read_before_the_start", "divergent_barrier"),
    *("barrier_and_ballot", "uninitialised_shared", "shared_out_of_range", "misaligned", "written_twice"),
    "never_written",
)
VALUES = torch.arange(256, dtype=torch.float32)


def run(kernel: str, order: int = shim.FORWARD, at_start: bool = False, counted: bool = False) -> torch.Tensor:
    out = torch.empty(256)
    message = shim.library().shim_fault(
        *(KERNELS.index(kernel), order, int(at_start), int(counted)),
        *(ctypes.c_void_p(VALUES.data_ptr()), ctypes.c_void_p(out.data_ptr())),
    )
    if message is not None:
        raise AssertionError(message.decode())
    return out


@pytest.mark.parametrize("order", [shim.FORWARD, shim.REVERSE, shim.SHUFFLED])
def test_a_correct_kernel_is_right_in_every_order(order):
    assert torch.equal(run("with_barrier", order), VALUES.flip(0))


@pytest.mark.parametrize("order", [shim.FORWARD, shim.REVERSE, shim.SHUFFLED])
def test_a_missing_barrier_reads_nan(order):
    assert run("missing_barrier", order).isnan().any()


def test_shared_memory_starts_as_nan():
    assert run("uninitialised_shared").isnan().all()


@pytest.mark.parametrize(
    ("kernel", "message", "arguments"),
    [
        ("read_past_the_end", "outside every buffer .* in thread 255 of block 0", {}),
        ("read_before_the_start", "outside every buffer .* in thread 0 of block 0", {"at_start": True}),
        ("divergent_barrier", "different barriers", {}),
        ("barrier_and_ballot", "a barrier .* that not all threads reach", {}),
        ("shared_out_of_range", "outside every buffer .* in thread 255", {}),
        ("misaligned", "misaligned load of 16 bytes", {}),
        ("written_twice", "element 0 is written twice", {"counted": True}),
        ("never_written", "element 5 is never written", {"counted": True}),
    ],
)
def test_faults_are_reported(kernel, message, arguments):
    with pytest.raises(AssertionError, match=message):
        run(kernel, **arguments)
    # The shim is fit for use after a fault.
    assert torch.equal(run("with_barrier"), VALUES.flip(0))

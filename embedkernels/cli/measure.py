"""What is measured during training: times and losses of the steps, and the peak memory.

Nothing here waits for the device during training: on a GPU a step's end is an event in the stream, and losses stay
there until the end.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Showing the loss of a running step waits for it, so it is not done more often than this.
SECONDS_BETWEEN_REPORTS = 0.25


class StepMeter:
    """Times, sample counts and losses of optimizer steps.

    Args:
        device: where training runs.
        on_step: called now and then with the number of steps done and the last loss.
    """

    def __init__(self, device: torch.device, on_step: Callable[[int, float], None]) -> None:
        self.device = device
        self.on_step = on_step
        self.samples: list[int] = []
        self._losses: list[Tensor] = []
        self._marks: list[Any] = []
        self._pending: list[tuple[Tensor, int]] = []
        self._reported = 0.0

    def start(self) -> None:
        """Training begins."""
        self._marks.append(self._mark())

    def micro_batch(self, loss: Tensor, samples: int) -> None:
        """A forward and backward is done; ``loss`` is its part of the step's."""
        self._pending.append((loss.detach(), samples))

    def end_step(self, *, last: bool) -> None:
        """The optimizer has stepped."""
        losses, samples = zip(*self._pending, strict=True)
        self._pending.clear()
        self._losses.append(torch.stack([loss.float() for loss in losses]).sum())
        self.samples.append(sum(samples))
        self._marks.append(self._mark())
        now = time.perf_counter()
        if last or now - self._reported >= SECONDS_BETWEEN_REPORTS:
            self.on_step(len(self.samples), float(self._losses[-1]))
            self._reported = now

    def losses(self) -> list[float]:
        """The loss of every step."""
        return torch.stack(self._losses).tolist() if self._losses else []

    def seconds(self) -> list[float]:
        """How long every step took, from the end of the one before: data, forward, backward, optimizer."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            return [a.elapsed_time(b) / 1000 for a, b in zip(self._marks, self._marks[1:], strict=False)]
        return [b - a for a, b in zip(self._marks, self._marks[1:], strict=False)]

    def _mark(self) -> Any:
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            return event
        if self.device.type == "mps":
            torch.mps.synchronize()
        return time.perf_counter()


class PeakMemory:
    """The most memory that training held: of the GPU, or resident on the host.

    Args:
        device: where training runs.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._since_start = False

    def start(self) -> None:
        """Forget what was held before."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return
        try:
            # Linux: makes the peak resident size what is resident now.
            Path("/proc/self/clear_refs").write_text("5")
            self._since_start = True
        except OSError:
            self._since_start = False

    def read(self) -> tuple[int, str]:
        """Bytes, and what they are."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device), "GPU memory allocated by tensors during training"
        if self.device.type == "mps":
            return torch.mps.driver_allocated_memory(), "GPU memory allocated at the end of training"
        since = "during training" if self._since_start else "since the process started"
        return _peak_resident(), f"resident memory of the process {since}"


def _peak_resident() -> int:
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    except (OSError, IndexError, ValueError):
        pass
    if sys.platform == "win32":
        import psutil

        peak: int = psutil.Process().memory_info().peak_wset
        return peak
    import resource

    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return usage if sys.platform == "darwin" else usage * 1024

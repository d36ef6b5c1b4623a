"""Times of calls: interleaved between rivals, with cold caches, medians with their spread.

Three clocks, because they answer different questions:

* ``call_us``: from the device's arrival at the call to its end, between CUDA events. The caches are flushed before,
  which also gives the host a head start of a launch or two; whatever launch gaps remain are in the figure.
* ``host_us``: how long the host is busy with one call, without waiting for the device.
* ``graph_us``: the device's time when the call is replayed from a CUDA graph: no launch gaps at all.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

Call = Callable[[], Any]

# Written before every timed call, several times any L2 cache.
FLUSH_BYTES = 256 << 20
HOST_CALLS = 15


def summary(samples: list[float]) -> dict[str, Any]:
    """Median, tenth and ninetieth percentile of times in µs, with the samples themselves."""
    ordered = sorted(samples)
    last = len(ordered) - 1
    return {
        "median_us": statistics.median(ordered),
        "p10_us": ordered[round(0.1 * last)],
        "p90_us": ordered[round(0.9 * last)],
        "samples_us": [round(sample, 3) for sample in samples],
    }


class CaptureLeak(RuntimeError):
    """A capture failed and PyTorch could not be brought back: nothing that this process measures is to be trusted."""


class Stopwatch:
    """Times calls on one device.

    Args:
        device: where the calls run; on a CPU the wall clock is read.
        flush: False where a call's own traffic empties the caches, as a training step's does.
    """

    def __init__(self, device: torch.device, flush: bool = True) -> None:
        self.device = device
        self.cuda = device.type == "cuda"
        self.buffer = torch.empty(FLUSH_BYTES if flush else 0, dtype=torch.int8, device=device) if self.cuda else None

    def synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def once(self, call: Call) -> float:
        """µs of one call by the wall clock, waiting for the device."""
        self.synchronize()
        started = time.perf_counter()
        call()
        self.synchronize()
        return (time.perf_counter() - started) * 1e6

    def _sample(self, call: Call) -> Callable[[], float]:
        """Enqueue one timed call; the returned function reads its µs after a sync."""
        if not self.cuda:
            microseconds = self.once(call)
            return lambda: microseconds
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        assert self.buffer is not None
        self.buffer.zero_()
        start.record()
        call()
        end.record()
        return lambda: start.elapsed_time(end) * 1e3

    def interleaved(
        self, calls: dict[str, Call], seconds: float, fewest: int = 10, most: int = 100
    ) -> dict[str, list[float]]:
        """µs of every call by name, one sample of each per round, so that clock drift meets all of them alike.

        Args:
            seconds: after which no further round starts, once there are ``fewest``.
        """
        samples: dict[str, list[float]] = {name: [] for name in calls}
        for call in calls.values():
            call()
        deadline = time.perf_counter() + seconds
        for done in range(most):
            if done >= fewest and time.perf_counter() > deadline:
                break
            for name, call in calls.items():
                read = self._sample(call)
                self.synchronize()
                samples[name].append(read())
        return samples

    def host(self, call: Call) -> float:
        """Median µs that the host spends in one call while the device works behind it."""
        times = []
        self.synchronize()
        for _ in range(HOST_CALLS):
            started = time.perf_counter()
            call()
            times.append((time.perf_counter() - started) * 1e6)
        self.synchronize()
        return statistics.median(times)

    def captured(self, call: Call) -> Call:
        """A call that replays a CUDA graph of ``call``.

        Raises:
            CaptureLeak: the capture failed and left PyTorch unusable.
            Exception: whatever else kept it from being captured.
        """
        current = torch.cuda.current_stream(self.device)
        side = torch.cuda.Stream(self.device)
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(3):
                call()
        current.wait_stream(side)
        self._refuse_waiting(call)
        pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=pool):
                kept = call()
        except BaseException as error:
            self._leave_capture(current, graph, pool, error)
            raise

        def replay() -> Any:
            graph.replay()
            return kept  # the graph's outputs must outlive its replays

        return replay

    def _refuse_waiting(self, call: Call) -> None:
        """Raise if ``call`` makes the host wait for the device: known beforehand, that costs no failed capture."""
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode(before)

    def _leave_capture(self, current: Any, graph: Any, pool: Any, error: BaseException) -> None:
        """Undo what a failed capture leaves behind.

        ``torch.cuda.graph`` ends the capture first, which raises if the capture is invalid, and then neither restores
        the stream, nor takes the allocator off the graph's pool (it then refuses to empty its cache), nor tells the
        random generator that the capture is over (it then refuses to draw).
        """
        torch.cuda.set_stream(current)
        try:
            graph.reset()
            for undo in (torch._C._cuda_endAllocateToPool, torch._C._cuda_releasePool):
                with contextlib.suppress(RuntimeError):  # nothing to undo where the capture ended or never began
                    undo(current.device_index, pool)
            # A capture that ends well takes the generator out of the one that did not.
            scratch = torch.zeros(1, device=self.device)
            with torch.cuda.graph(torch.cuda.CUDAGraph()):
                scratch.add_(1)
            torch.rand(1, device=self.device)
            torch.cuda.empty_cache()
            self.synchronize()
        except Exception as left:
            torch.cuda.set_stream(current)
            raise CaptureLeak(f"a failed capture ({error}) could not be undone: {left}") from error

    def peak_bytes(self, call: Call) -> int | None:
        """Most memory allocated during a call, beyond what was there before; None on a CPU."""
        if not self.cuda:
            return None
        self.synchronize()
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        call()
        self.synchronize()
        return torch.cuda.max_memory_allocated(self.device) - before


def ceilings(device: torch.device, tiny: bool = False) -> dict[str, float]:
    """What this device reaches here and now: bytes per second of a copy, bf16 FLOPs per second of a product.

    Random data: products of zeros draw less power and run faster than any real one.
    """
    watch = Stopwatch(device, flush=False)
    count, size = (1 << 16, 64) if tiny or device.type == "cpu" else (1 << 30, 8192)
    source = torch.randint(-128, 127, (count,), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    samples = watch.interleaved({"copy": lambda: target.copy_(source), "product": lambda: a @ b}, 1.0, 10, 30)
    return {
        "copy_bytes_per_s": 2 * count / statistics.median(samples["copy"]) * 1e6,
        "bf16_flops_per_s": 2 * size**3 / statistics.median(samples["product"]) * 1e6,
    }

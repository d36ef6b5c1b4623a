"""The stopwatch: interleaved samples, honest medians, limits that are kept."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench import timing
from bench.timing import CaptureLeak, Stopwatch, ceilings, summary


def test_the_summary_keeps_the_samples_and_their_spread() -> None:
    found = summary([float(n) for n in [5, 1, 2, 3, 4, 10, 9, 8, 7, 6, 11]])
    assert found["median_us"] == 6
    assert found["p10_us"] == 2
    assert found["p90_us"] == 10
    assert found["samples_us"][0] == 5


def test_calls_are_interleaved() -> None:
    order: list[str] = []
    watch = Stopwatch(torch.device("cpu"))
    samples = watch.interleaved({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 0.0, fewest=3)
    assert order == ["a", "b"] + ["a", "b"] * 3, "one warm-up of each, then rounds"
    assert [len(times) for times in samples.values()] == [3, 3]


def test_sampling_stops_when_its_time_is_up() -> None:
    watch = Stopwatch(torch.device("cpu"))
    started = time.perf_counter()
    samples = watch.interleaved({"nap": lambda: time.sleep(0.01)}, 0.1, fewest=2, most=10_000)
    assert time.perf_counter() - started < 5
    assert 2 <= len(samples["nap"]) <= 12


def test_a_call_is_timed_in_microseconds() -> None:
    watch = Stopwatch(torch.device("cpu"))
    assert 10_000 <= watch.once(lambda: time.sleep(0.01)) < 1_000_000
    assert 10_000 <= watch.host(lambda: time.sleep(0.01)) < 1_000_000
    assert watch.peak_bytes(lambda: None) is None


def test_ceilings_are_positive() -> None:
    found = ceilings(torch.device("cpu"), tiny=True)
    assert found["copy_bytes_per_s"] > 0
    assert found["bf16_flops_per_s"] > 0


@pytest.mark.gpu
def test_a_captured_call_computes_the_same(device: torch.device) -> None:
    watch = Stopwatch(device)
    x, y = torch.randn(1024, device=device), torch.full((1024,), float("nan"), device=device)
    replay = watch.captured(lambda: torch.mul(x, 2, out=y))
    y.fill_(float("nan"))
    replay()
    assert torch.equal(y, 2 * x)
    assert watch.peak_bytes(lambda: torch.empty(1 << 20, device=device)) >= 4 << 20  # type: ignore[operator]


@pytest.mark.gpu
def test_a_call_that_waits_for_the_device_is_refused_before_it_is_captured(device: torch.device) -> None:
    watch = Stopwatch(device)
    x = torch.ones(4, device=device)
    with pytest.raises(RuntimeError, match="synchroniz"):
        watch.captured(lambda: float(x.sum()))
    assert torch.cuda.get_sync_debug_mode() == 0
    assert usable(watch, x)


@pytest.mark.gpu
def test_a_failed_capture_leaves_the_device_usable(device: torch.device) -> None:
    watch = Stopwatch(device)
    x, stream = torch.ones(4, device=device), torch.cuda.current_stream(device)
    calls = []

    def fails_when_captured() -> torch.Tensor:
        calls.append(1)
        if torch.cuda.is_current_stream_capturing():
            torch.cuda.current_stream(device).synchronize()  # invalidates the capture
        return torch.nn.functional.dropout(x)

    with pytest.raises(RuntimeError):
        watch.captured(fails_when_captured)
    assert len(calls) == 5, "three to warm up, one to look for waits, one captured"
    assert torch.cuda.current_stream(device) == stream
    assert usable(watch, x)


def usable(watch: Stopwatch, x: torch.Tensor) -> bool:
    """Random numbers, the allocator and captures work."""
    torch.nn.functional.dropout(x)
    torch.cuda.empty_cache()
    y = torch.empty_like(x)
    watch.captured(lambda: torch.mul(torch.nn.functional.dropout(x, 0.0), 2, out=y))()
    return torch.equal(y, 2 * x)


class FakeTorch:
    """What PyTorch's Python layer and allocator do around a capture, as far as a failed one goes wrong."""

    def __init__(self, curable: bool = True) -> None:
        self.stream, self.capturing, self.pools, self.curable = "main", False, [], curable
        self.cuda = SimpleNamespace(
            current_stream=lambda _: SimpleNamespace(name=self.stream, device_index=0, wait_stream=lambda _: None),
            set_stream=lambda stream: setattr(self, "stream", stream.name),
            Stream=lambda _: SimpleNamespace(name="side", wait_stream=lambda _: None),
            stream=self.enter,
            graph_pool_handle=lambda: "pool",
            CUDAGraph=lambda: SimpleNamespace(reset=lambda: None),
            graph=self.graph,
            get_sync_debug_mode=lambda: 0,
            set_sync_debug_mode=lambda _: None,
            empty_cache=lambda: self.need(not self.pools, "captures_underway"),
            synchronize=lambda _: None,
        )
        self._C = SimpleNamespace(_cuda_endAllocateToPool=self.end, _cuda_releasePool=lambda *_: None)

    @staticmethod
    def need(good: bool, why: str) -> None:
        if not good:
            raise RuntimeError(why)

    @contextlib.contextmanager
    def enter(self, stream: Any) -> Iterator[None]:
        before, self.stream = self.stream, stream.name
        yield
        self.stream = before

    @contextlib.contextmanager
    def graph(self, _: Any, pool: str = "own") -> Iterator[None]:
        self.cuda.empty_cache()
        before, self.stream, self.capturing = self.stream, "capture", True
        self.pools.append(pool)
        try:
            yield
        except RuntimeError as error:
            raise RuntimeError("capture invalidated") from error  # capture_end raises; nothing is put back
        self.stream, self.capturing = before, not self.curable
        self.pools.remove(pool)

    def end(self, index: int, pool: str) -> None:
        assert index == 0
        self.pools.remove(pool)

    def zeros(self, *_: Any, **__: Any) -> torch.Tensor:
        self.need(self.stream == "main", "allocated on a dead stream")
        return torch.zeros(1)

    def rand(self, *_: Any, **__: Any) -> None:
        self.need(not self.capturing, "Offset increment outside graph capture")


def failing(fake: FakeTorch) -> Any:
    return lambda: fake.need(not fake.capturing, "operation not permitted when stream is capturing")


def watch_with(monkeypatch: pytest.MonkeyPatch, fake: FakeTorch) -> Stopwatch:
    watch = Stopwatch(torch.device("cpu"))
    monkeypatch.setattr(timing, "torch", fake)
    return watch


def test_what_a_failed_capture_leaves_behind_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeTorch()
    with pytest.raises(RuntimeError, match="capture invalidated"):
        watch_with(monkeypatch, fake).captured(failing(fake))
    assert (fake.stream, fake.capturing, fake.pools) == ("main", False, [])


def test_a_failed_capture_that_cannot_be_undone_is_told_from_others(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeTorch(curable=False)
    with pytest.raises(CaptureLeak, match="could not be undone: Offset increment outside graph capture"):
        watch_with(monkeypatch, fake).captured(failing(fake))
    assert fake.stream == "main"

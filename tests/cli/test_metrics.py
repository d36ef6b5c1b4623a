"""Figures of an evaluation, against values counted by hand or computed by other means."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from embedkernels.cli import metrics
from embedkernels.cli.encoding import IGNORED

SPANS = {
    "IOB2": ("B-A I-A O B-B B-B", [("A", 0, 2), ("B", 3, 4), ("B", 4, 5)]),
    "IOB1": ("I-A I-A I-B O I-A", [("A", 0, 2), ("B", 2, 3), ("A", 4, 5)]),
    "IOB1, neighbours": ("I-A B-A I-A", [("A", 0, 1), ("A", 1, 3)]),
    "IOBES": ("B-A I-A E-A S-A S-A", [("A", 0, 3), ("A", 3, 4), ("A", 4, 5)]),
    "BILOU": ("B-A L-A U-B O", [("A", 0, 2), ("B", 2, 3)]),
    "inside after end": ("B-A E-A I-A", [("A", 0, 2), ("A", 2, 3)]),
    "plain": ("noun noun verb O", [("noun", 0, 1), ("noun", 1, 2), ("verb", 2, 3)]),
    "nothing": ("O O", []),
}


@pytest.mark.parametrize(("tags", "expected"), SPANS.values(), ids=SPANS)
def test_spans(tags: str, expected: list[tuple[str, int, int]]) -> None:
    assert list(metrics.spans(tags.split())) == expected


def test_span_scores_count_exact_spans_over_all_rows() -> None:
    true = [["B-A", "I-A", "O", "B-B"], ["B-A", "O"]]
    found = [["B-A", "O", "O", "B-B"], ["O", "B-A"]]  # one of three right, three said
    assert metrics.span_scores(found, true) == pytest.approx((1 / 3, 1 / 3, 1 / 3))
    assert metrics.span_scores([["O", "B-A"]], [["B-A", "B-A"]]) == pytest.approx((1.0, 0.5, 2 / 3))
    assert metrics.span_scores([["O"]], [["O"]]) == (0.0, 0.0, 0.0)


def test_token_metrics_leave_out_what_has_no_label() -> None:
    labels = ("B-A", "O")
    truth = np.array([[IGNORED, 0, IGNORED, 1], [0, 1, 1, IGNORED]])
    found = np.array([[0, 0, 0, 1], [1, 1, 0, 0]])
    figures = metrics.compute("token-classification", labels)(SimpleNamespace(predictions=found, label_ids=truth))
    assert figures["accuracy"] == pytest.approx(3 / 5)
    assert (figures["precision"], figures["recall"], figures["f1"]) == pytest.approx((0.5, 0.5, 0.5))


def test_classification_accuracy() -> None:
    logits = torch.tensor([[0.0, 1.0], [2.0, 1.0], [0.0, 3.0]])
    truth = torch.tensor([1, 1, 1])
    best = metrics.reduce_logits("classification")((logits, None), truth)
    prediction = SimpleNamespace(predictions=best.numpy(), label_ids=truth.numpy())
    assert metrics.compute("classification", ("a", "b"))(prediction) == {"accuracy": pytest.approx(2 / 3)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_perplexity_weighs_every_token_alike_whatever_the_batches(dtype: torch.dtype) -> None:
    logits = torch.randn(5, 7, 11).to(dtype)
    labels = torch.randint(0, 11, (5, 7))
    for row, length in enumerate((7, 2, 5, 3, 6)):
        labels[row, length:] = IGNORED
    reduce = metrics.reduce_logits("causal-lm")
    batches = torch.cat([reduce(logits[:2], labels[:2]), reduce(logits[2:], labels[2:])])
    figures = metrics.compute("causal-lm", ())(SimpleNamespace(predictions=batches.numpy(), label_ids=labels.numpy()))
    shifted, targets = logits[:, :-1].reshape(-1, 11).float(), labels[:, 1:].reshape(-1)
    kept = targets != IGNORED
    assert figures["tokens"] == kept.sum() == 18
    assert figures["perplexity"] == pytest.approx(math.exp(F.cross_entropy(shifted, targets).item()), rel=1e-5)
    assert figures["accuracy"] == pytest.approx((shifted.argmax(-1) == targets)[kept].float().mean().item())


def test_perplexity_may_overflow() -> None:
    assert metrics.perplexity(1e6) == math.inf

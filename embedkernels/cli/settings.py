"""What a fine-tuning run is asked to do, in one value that travels to the run's own process as JSON."""

from __future__ import annotations

from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any

from embedkernels.cli.errors import UsageError

TASKS = ("classification", "token-classification", "causal-lm")
PRECISIONS = ("fp32", "bf16", "fp16")
DEVICES = ("auto", "cpu", "cuda", "mps")
TEXT_COLUMN = {"classification": "text", "token-classification": "tokens", "causal-lm": "text"}
LABEL_COLUMN = {"classification": "label", "token-classification": "tags"}
# What the counters and the fp32 numbers behind the arguments hold.
MOST = 2**31 - 1
MOST_RATE = 1e38
# Arguments that are not spelled as their field.
_ARGUMENTS = {"evaluation": "--eval"}


@dataclass(frozen=True)
class Settings:
    """One field per argument of ``embedkernels finetune``.

    Attributes:
        model: directory or hub id. tokenizer: the same; None takes the model's.
        train, evaluation: a file, a directory or a name of the ``datasets`` package; evaluation None holds back
            ``eval_fraction`` of the training rows.
        task: one of ``TASKS``.
        text, label: column names; None takes the task's usual ones.
        epochs: passes over the training rows, unless ``max_steps`` is set.
        batch_size: examples per forward; ``accumulate`` of them make a step.
        warmup: steps of linear warm-up, or below 1 their share of all steps.
        max_length: tokens per example; None for as many as the model takes, at most 512.
        precision: fp32, or autocast to bf16 or fp16 with weights in fp32.
        device: auto, cpu, cuda or mps.
        dropout: probability that replaces every dropout in the model's config; None leaves them.
        padding_free: the patched model computes on the real tokens of a batch alone, where that is exact.
    """

    model: str
    train: str
    evaluation: str | None = None
    eval_fraction: float = 0.1
    tokenizer: str | None = None
    task: str = "classification"
    text: str | None = None
    label: str | None = None
    epochs: float = 3.0
    max_steps: int | None = None
    batch_size: int = 16
    eval_batch_size: int = 64
    accumulate: int = 1
    lr: float = 5e-5
    weight_decay: float = 0.01
    warmup: float = 0.06
    max_length: int | None = None
    precision: str = "fp32"
    device: str = "auto"
    seed: int = 0
    dropout: float | None = None
    gradient_checkpointing: bool = False
    torch_compile: bool = False
    padding_free: bool = True

    def __post_init__(self) -> None:
        for argument, value, known in (
            ("--task", self.task, TASKS),
            ("--precision", self.precision, PRECISIONS),
            ("--device", self.device, DEVICES),
        ):
            if value not in known:
                raise UsageError(f"{argument}: {value!r} is not known", f"Use one of {', '.join(known)}.")
        for argument, text in (
            ("--model", self.model),
            ("--train", self.train),
            ("--eval", self.evaluation),
            ("--tokenizer", self.tokenizer),
            ("--text", self.text),
            ("--label", self.label),
        ):
            if text is not None and not text.strip():
                raise UsageError(f"{argument}: is empty")
        for argument, number in (
            ("--batch-size", self.batch_size),
            ("--eval-batch-size", self.eval_batch_size),
            ("--accumulate", self.accumulate),
            ("--max-steps", self.max_steps),
            ("--max-length", self.max_length),
        ):
            if number is not None and number < 1:
                raise UsageError(f"{argument}: must be at least 1, got {number}")
            if number is not None and number > MOST:
                raise UsageError(f"{argument}: must be at most {MOST}, got {number}")
        for argument, real, most in (("--lr", self.lr, MOST_RATE), ("--epochs", self.epochs, MOST)):
            if not 0 < real <= most:
                raise UsageError(f"{argument}: must be a number above 0 and at most {most:g}, got {real}")
        for argument, real, most in (
            ("--weight-decay", self.weight_decay, MOST_RATE),
            ("--warmup", self.warmup, MOST),
        ):
            if not 0 <= real <= most:
                raise UsageError(f"{argument}: must not be negative and at most {most:g}, got {real}")
        if self.warmup >= 1 and self.warmup != int(self.warmup):
            raise UsageError(
                f"--warmup: {self.warmup} is neither a whole number of steps nor a share of them",
                "Use 100 for 100 steps, or 0.1 for the first tenth of the steps.",
            )
        if not 0 < self.eval_fraction < 1:
            raise UsageError(f"--eval-fraction: must lie between 0 and 1, got {self.eval_fraction}")
        if self.dropout is not None and not 0 <= self.dropout < 1:
            raise UsageError(f"--dropout: must be at least 0 and below 1, got {self.dropout}")
        if not 0 <= self.seed < 2**32:
            raise UsageError(f"--seed: must lie between 0 and 2**32 - 1, got {self.seed}")
        if self.precision == "fp16" and self.device == "cpu":
            raise UsageError("--precision: fp16 needs a GPU", "Use bf16 or fp32.")
        if self.task == "causal-lm" and self.label is not None:
            raise UsageError("--label: --task causal-lm learns from the text alone", "Leave --label out.")

    @property
    def columns(self) -> dict[str, str]:
        """The column that each argument names, by argument."""
        columns = {"--text": self.text or TEXT_COLUMN[self.task]}
        if self.task in LABEL_COLUMN:
            columns["--label"] = self.label or LABEL_COLUMN[self.task]
        if len(set(columns.values())) < len(columns):
            raise UsageError(f"--label: is the same column as --text, {columns['--text']!r}")
        return columns

    def arguments(self) -> list[str]:
        """The arguments of ``embedkernels finetune`` that give these settings; defaults are left out."""
        words: list[str] = []
        for field in fields(self):
            value = getattr(self, field.name)
            if field.default is MISSING or value != field.default:
                name = field.name.replace("_", "-")
                argument = _ARGUMENTS.get(field.name, f"--no-{name}" if value is False else f"--{name}")
                words += [argument] if isinstance(value, bool) else [argument, str(value)]
        return words

    def to_dict(self) -> dict[str, Any]:
        """For JSON; ``Settings(**dict)`` reads it back."""
        return asdict(self)

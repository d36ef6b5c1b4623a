"""From tables to examples: what a task needs of each row, checked, and the rows held back for evaluation."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from embedkernels.cli import sources
from embedkernels.cli.errors import UsageError, listed
from embedkernels.cli.settings import Settings
from embedkernels.cli.tables import Table

# The share of rows with a label of their own from which on the label column is probably another.
_SUSPICIOUS_SHARE = 0.5


@dataclass(frozen=True)
class Example:
    """One row.

    Attributes:
        text: the text, or its words (token classification).
        label: the label's name, one name per word (token classification), or None (causal-lm).
    """

    text: str | list[str]
    label: str | list[str] | None


@dataclass(frozen=True)
class Data:
    """Examples to train on and to evaluate on.

    Attributes:
        train, evaluation: the examples.
        labels: names of all labels, in the order of their ids for a new head; empty for causal-lm.
        notices: what a person should know about how the rows were taken.
        origin: where the rows came from and how many there are.
    """

    train: list[Example]
    evaluation: list[Example]
    labels: tuple[str, ...]
    notices: list[str] = field(default_factory=list)
    origin: dict[str, Any] = field(default_factory=dict)


def load(settings: Settings) -> Data:
    """Read, check and split the data of a run.

    Raises:
        UsageError: files, columns or rows that the task cannot use; the message names the argument and the row.
        CliError: a package that a file's format needs is missing.
    """
    notices: list[str] = []
    wanted = settings.columns
    table = sources.load(settings.train, "--train", wanted)
    train = _examples(table, settings, notices)
    evaluation_source = settings.evaluation or sources.evaluation_split(settings.train)
    if evaluation_source is None:
        train, evaluation = _hold_back(train, settings)
        evaluation_name = f"{len(evaluation)} rows held back from {table.name}"
        notices.append(
            f"no --eval: {len(evaluation)} of {len(train) + len(evaluation)} rows are held back for evaluation "
            f"(--eval-fraction {settings.eval_fraction:g})"
        )
    else:
        eval_table = sources.load(evaluation_source, "--eval", wanted)
        evaluation = _examples(eval_table, settings, notices)
        evaluation_name = eval_table.name
        if settings.evaluation is not None and sources.same(table, eval_table):
            notices.append("--eval is the same as --train: its figures say nothing of texts not seen in training")
        if settings.evaluation is None:
            notices.append(f"no --eval: evaluating on {eval_table.name}")
    labels = () if settings.task == "causal-lm" else _labels(train, evaluation, table, evaluation_name, notices)
    origin = {
        "train": table.name,
        "evaluation": evaluation_name,
        "train_examples": len(train),
        "evaluation_examples": len(evaluation),
    }
    return Data(train, evaluation, labels, notices, origin)


def _examples(table: Table, settings: Settings, notices: list[str]) -> list[Example]:
    """The rows of a table as examples; rows without a text or label are dropped, with a notice."""
    columns = settings.columns
    texts = table.columns[columns["--text"]]
    labels: Sequence[Any] = table.columns[columns["--label"]] if "--label" in columns else [None] * len(texts)
    parse = _PARSERS[settings.task]
    examples, dropped = [], []
    kinds: dict[str, int] = {}
    for row, (text, label) in enumerate(zip(texts, labels, strict=True)):
        if _absent(text) or ("--label" in columns and _absent(label)):
            dropped.append(row)
        else:
            examples.append(parse(text, label, table, row))
            for one in label if isinstance(label, list) else [label]:
                kinds.setdefault(_kind(one), row)
    what = " or ".join(f"a value in {column!r}" for column in columns.values())
    if not examples:
        raise UsageError(f"{table.argument}: no row of {table.name} has {what}")
    if dropped:
        notices.append(f"{len(dropped)} rows without {what} left out (first: {table.where(dropped[0])})")
    if len(kinds) > 1:
        places = listed(f"{kind} ({table.where(row)})" for kind, row in kinds.items())
        notices.append(
            f"--label: labels of several kinds: {places}; 1 and '1' are one class, true is the class 'True'"
        )
    return examples


def _kind(label: Any) -> str:
    if isinstance(label, bool):
        return "true or false"
    return "numbers" if isinstance(label, (int, float)) else "texts"


def _absent(value: Any) -> bool:
    if isinstance(value, float):
        return value != value
    return value is None or value == [] or (isinstance(value, (str, bytes)) and not value.strip())


def _decoded(value: Any, option: str, table: Table, row: int) -> Any:
    """The text of bytes, as Parquet files have them that were written without saying that they are texts."""
    if not isinstance(value, bytes):
        return value
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{option}: {table.where(row)}: bytes that are not UTF-8 (0x{value[error.start]:02x})",
            "Name a column of texts.",
        ) from error


def _text_of(value: Any, table: Table, row: int) -> str:
    value = _decoded(value, "--text", table, row)
    if isinstance(value, bool) or not isinstance(value, (str, int, float, Decimal)):
        raise UsageError(
            f"--text: {table.where(row)}: expected a text, got {_named(value)}",
            "Lists of words belong to --task token-classification." if isinstance(value, list) else "",
        )
    return str(value)


def _named(value: Any) -> str:
    name = type(value).__name__
    return "nothing" if value is None else f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def _label_of(value: Any, table: Table, row: int) -> str:
    value = _decoded(value, "--label", table, row)
    if isinstance(value, float):
        # Neither are the infinities.
        if not value.is_integer():
            raise UsageError(
                f"--label: {table.where(row)}: {value} is a number, not a class",
                "Classes are texts or whole numbers; name another column or round the values.",
            )
        value = int(value)
    if not isinstance(value, (str, int)):
        raise UsageError(
            f"--label: {table.where(row)}: expected a text or a whole number, got {_named(value)}",
            "One tag per word belongs to --task token-classification." if isinstance(value, list) else "",
        )
    return str(value).strip()


def _words_of(value: Any, option: str, table: Table, row: int) -> list[Any]:
    """A list as it is, from JSON in a text (as in a CSV cell), or from words separated by blanks."""
    value = _decoded(value, option, table, row)
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            # A first word such as "[1]" is no JSON list.
            value = value.split()
    elif isinstance(value, str):
        value = value.split()
    if not isinstance(value, list):
        raise UsageError(
            f"{option}: {table.where(row)}: expected a list of words, got {_named(value)}",
            'Write ["New", "York"] or New York.',
        )
    return value


def _classified(text: Any, label: Any, table: Table, row: int) -> Example:
    return Example(_text_of(text, table, row), _label_of(label, table, row))


def _tagged(text: Any, label: Any, table: Table, row: int) -> Example:
    words = [_text_of(word, table, row) for word in _words_of(text, "--text", table, row)]
    tags = [_label_of(tag, table, row) for tag in _words_of(label, "--label", table, row)]
    if len(words) != len(tags):
        raise UsageError(
            f"--label: {table.where(row)}: {len(tags)} tags for {len(words)} words", "Each word needs one tag."
        )
    return Example(words, tags)


def _plain(text: Any, label: Any, table: Table, row: int) -> Example:  # noqa: ARG001
    return Example(_text_of(text, table, row), None)


_PARSERS: dict[str, Callable[[Any, Any, Table, int], Example]] = {
    "classification": _classified,
    "token-classification": _tagged,
    "causal-lm": _plain,
}


def _hold_back(examples: list[Example], settings: Settings) -> tuple[list[Example], list[Example]]:
    """Split off the evaluation rows, with every class in its share; the same seed holds back the same rows."""
    groups: dict[Any, list[int]] = {}
    for index, example in enumerate(examples):
        groups.setdefault(example.label if isinstance(example.label, str) else None, []).append(index)
    shuffled = random.Random(settings.seed)
    held: set[int] = set()
    for group in groups.values():
        # A class with one row stays in training.
        count = min(round(settings.eval_fraction * len(group)), len(group) - 1)
        held.update(shuffled.sample(group, count))
    if not held:
        raise UsageError(
            f"--eval-fraction: {settings.eval_fraction:g} of {len(examples)} rows holds none back for evaluation",
            "Raise it, or name evaluation data with --eval.",
        )
    train = [example for index, example in enumerate(examples) if index not in held]
    return train, [examples[index] for index in sorted(held)]


def _names(example: Example) -> list[str]:
    if isinstance(example.label, str):
        return [example.label]
    return example.label or []


def _labels(
    train: list[Example], evaluation: list[Example], table: Table, evaluation_name: str, notices: list[str]
) -> tuple[str, ...]:
    counts = Counter(name for example in train for name in _names(example))
    strange = Counter(name for example in evaluation for name in _names(example) if name not in counts)
    if strange:
        raise UsageError(
            f"--label: {evaluation_name} has labels that --train lacks: "
            + listed(f"{name!r} ({count}x)" for name, count in strange.most_common()),
            f"--train has: {listed(repr(name) for name in sorted(counts))}.",
        )
    if len(counts) < 2:
        raise UsageError(
            f"--label: every row of {table.name} has the label {next(iter(counts))!r}",
            "There must be at least two classes to tell apart.",
        )
    if len(counts) > _SUSPICIOUS_SHARE * counts.total() and counts.total() >= 20:
        notices.append(f"{len(counts)} different labels in {len(train)} rows: is --label the right column?")
    unseen = set(counts) - {name for example in evaluation for name in _names(example)}
    if unseen:
        notices.append(f"labels that the evaluation never meets: {listed(sorted(unseen))}")
    if all(re.fullmatch(r"-?[0-9]+", name) for name in counts):
        return tuple(sorted(counts, key=int))
    return tuple(sorted(counts))

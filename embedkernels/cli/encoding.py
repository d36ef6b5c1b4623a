"""From examples to what the model sees: token ids, labels aligned with them, and padded batches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from embedkernels.cli.errors import UsageError
from embedkernels.cli.examples import Example

# Positions with this label count neither in the loss nor in the metrics (torch's cross entropy).
IGNORED = -100
DEFAULT_LENGTH = 512
_CHUNK = 1000

Encoded = dict[str, Any]


class Encoder:
    """Turns examples into token ids.

    Args:
        tokenizer: a transformers tokenizer.
        task: one of ``settings.TASKS``.
        label_ids: id of each label; empty for causal-lm.
        max_length: longest sequence; longer ones are cut (causal-lm: continued in another sequence).
    """

    def __init__(self, tokenizer: Any, task: str, label_ids: dict[str, int], max_length: int) -> None:
        self.tokenizer = tokenizer
        self.task = task
        self.label_ids = label_ids
        self.max_length = max_length

    def __call__(self, examples: Sequence[Example]) -> tuple[list[Encoded], int]:
        """The encoded examples, and how many of the texts were longer than ``max_length``."""
        encode = {
            "classification": self._classified,
            "token-classification": self._tagged,
            "causal-lm": self._continued,
        }[self.task]
        encoded: list[Encoded] = []
        longer = 0
        for start in range(0, len(examples), _CHUNK):
            some, count = encode(examples[start : start + _CHUNK])
            encoded += some
            longer += count
        return encoded, longer

    def _tokens(self, texts: list[Any], *, words: bool) -> tuple[Any, int]:
        """Every text cut to ``max_length``, and how many were longer."""
        whole = self.tokenizer(texts, is_split_into_words=words, verbose=False)
        longer = sum(len(ids) > self.max_length for ids in whole["input_ids"])
        if longer:
            whole = self.tokenizer(texts, is_split_into_words=words, truncation=True, max_length=self.max_length)
        return whole, longer

    def _classified(self, examples: Sequence[Example]) -> tuple[list[Encoded], int]:
        batch, longer = self._tokens([example.text for example in examples], words=False)
        labels = [self.label_ids[str(example.label)] for example in examples]
        return [{**row, "labels": label} for row, label in zip(_rows(batch), labels, strict=True)], longer

    def _tagged(self, examples: Sequence[Example]) -> tuple[list[Encoded], int]:
        """A word's tag goes to its first token; its other tokens and the special tokens have none.

        A text whose words give no token, as blanks do, has nothing to learn: in a batch of its own its loss would be
        the mean of nothing. It is left out.
        """
        batch, longer = self._tokens([example.text for example in examples], words=True)
        encoded = []
        for index, (row, example) in enumerate(zip(_rows(batch), examples, strict=True)):
            labels, before = [], None
            for word in batch.word_ids(index):
                first = word is not None and word != before
                labels.append(self.label_ids[(example.label or [])[word]] if first else IGNORED)
                before = word
            if any(label != IGNORED for label in labels):
                encoded.append({**row, "labels": labels})
        return encoded, longer

    def _continued(self, examples: Sequence[Example]) -> tuple[list[Encoded], int]:
        """Texts end with the end-of-text token; a long one is continued in sequences of its own.

        The first token is predicted from nothing. A model never scores it, but transformers counts it among the
        tokens that it divides a loss by, unless its label says otherwise.
        """
        end = self.tokenizer.eos_token_id
        texts = self.tokenizer([example.text for example in examples], verbose=False)["input_ids"]
        encoded, longer = [], 0
        for ids in texts:
            if end is not None and ids[-1:] != [end]:
                ids = [*ids, end]
            longer += len(ids) > self.max_length
            for start in range(0, len(ids), self.max_length):
                part = ids[start : start + self.max_length]
                if len(part) > 1:  # a single token predicts nothing
                    labels = [IGNORED, *part[1:]]
                    encoded.append({"input_ids": part, "attention_mask": [1] * len(part), "labels": labels})
        return encoded, longer


def _rows(batch: Any) -> list[Encoded]:
    names = [name for name in ("input_ids", "attention_mask", "token_type_ids") if name in batch]
    return [dict(zip(names, values, strict=True)) for values in zip(*(batch[name] for name in names), strict=True)]


def check_length(length: int, tokenizer: Any, task: str) -> None:
    """UsageError if ``length`` leaves no room for text: the tokenizer would not cut at all."""
    own = tokenizer.num_special_tokens_to_add()
    # A language model predicts a token from another.
    least = max(own + 1, 2) if task == "causal-lm" else own + 1
    if length < least:
        raise UsageError(
            f"--max-length: {length} leaves no room for text (the tokenizer adds {own} tokens of its own)",
            f"Use at least {least}.",
        )


def check_not_empty(encoded: Sequence[Encoded], argument: str, task: str) -> None:
    """UsageError if no text is long enough to learn from."""
    if not encoded:
        lacking = (
            "has a word that gives a token, after the cut to --max-length"
            if task == "token-classification"
            else "has the two tokens that it takes to predict one"
        )
        raise UsageError(f"{argument}: no text {lacking}", "Is --text the right column?")


def unknown_share(encoded: Sequence[Encoded], tokenizer: Any) -> float:
    """The share of the texts' tokens that the tokenizer does not know; 0 if it has no token for that alone."""
    unknown = tokenizer.unk_token_id
    special = {one for one in tokenizer.all_special_ids if one != unknown}
    roles = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]
    if unknown is None or unknown in roles:
        return 0.0
    counts = Counter(token for row in encoded for token in row["input_ids"])
    words = sum(count for token, count in counts.items() if token not in special)
    return counts[unknown] / words if words else 0.0


class Collator:
    """Pads encoded examples to the longest of a batch.

    Args:
        tokenizer: gives the padding token and the side to pad.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.fill = {
            "input_ids": tokenizer.pad_token_id,
            "attention_mask": 0,
            "token_type_ids": tokenizer.pad_token_type_id,
            "labels": IGNORED,
        }
        self.left = tokenizer.padding_side == "left"

    def __call__(self, examples: Sequence[Encoded]) -> dict[str, Tensor]:
        """Tensors (B, S), and labels (B,) or (B, S)."""
        return {name: self._padded(name, [example[name] for example in examples]) for name in examples[0]}

    def _padded(self, name: str, values: list[Any]) -> Tensor:
        if not isinstance(values[0], list):
            return torch.tensor(values)
        longest = max(len(value) for value in values)
        padded = torch.full((len(values), longest), self.fill[name], dtype=torch.int64)
        for row, value in zip(padded, values, strict=True):
            place = slice(longest - len(value), None) if self.left else slice(len(value))
            row[place] = torch.tensor(value)
        return padded

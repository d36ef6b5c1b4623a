"""A batch without padding: the tokens of all examples in one row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from embedkernels.hf.padding import FLAG, PACKED, is_padding_free

IGNORED = -100
_UNDERSTOOD = {
    *("input_ids", "attention_mask", "token_type_ids", "position_ids", "label", "labels"),
    # Of tokenizers, for collators that mask: nothing for a model.
    "special_tokens_mask",
}


class PackingCollator:
    """Packs tokenised examples into one row, for a model that was patched with ``padding_free=True``.

    A drop-in for ``DataCollatorWithPadding`` and ``DataCollatorForTokenClassification``: the model's outputs and its
    loss are those of the padded batch, but no padding is ever made, and the host waits for nothing. Labels of tokens
    are padded, as logits are.

    Args:
        model: the patched model; that it runs padding-free is checked for every batch. None checks nothing here.

    Example:
        >>> import transformers, embedkernels as ek
        >>> config = transformers.BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
        >>> model = transformers.BertForSequenceClassification(config)
        >>> _ = ek.patch(model, padding_free=True)
        >>> texts = [{"input_ids": [5, 6, 7], "label": 1}, {"input_ids": [8], "label": 0}]
        >>> batch = ek.hf.PackingCollator(model)(texts)
        >>> batch["input_ids"].tolist(), batch["cu_seq_lens_q"].tolist()
        ([[5, 6, 7, 8]], [0, 3, 4])
        >>> model(**batch).logits.shape
        torch.Size([2, 2])
    """

    def __init__(self, model: nn.Module | None = None) -> None:
        self.model = model

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """One batch.

        Args:
            examples: each with ``input_ids`` (n,), a list, array or tensor; maybe ``attention_mask``, whose zeros
                leave tokens out; maybe ``token_type_ids`` (n,) and ``position_ids`` (n,); maybe ``label`` or
                ``labels``: one number, a vector of numbers that are no integers, or an integer for each token.

        Returns:
            ``input_ids`` (1, T), and ``token_type_ids`` and ``position_ids`` if given, all int64; ``cu_seq_lens_q``
            and ``cu_seq_lens_k`` int32 (B + 1,), where examples start, and the end; ``max_length_q`` and
            ``max_length_k``, the longest example; ``labels`` (B,), or (B, S) with -100 behind the tokens.

        Raises:
            ValueError: no examples, examples of different keys, one without a token, a model that pads, or one with a
                head that needs ids or mask of a padded batch, as that of decoders for sequence classification.
        """
        if not examples:
            raise ValueError("PackingCollator: no examples")
        if self.model is not None:
            _check_model(self.model)
        names = set(examples[0])
        if any(set(example) != names for example in examples):
            raise ValueError(f"PackingCollator: examples of different keys, the first has {sorted(names)}")
        if unknown := names - _UNDERSTOOD:
            raise ValueError(f"PackingCollator: examples have {sorted(unknown)}, which nobody would hand on")
        kept = [_kept(example) for example in examples]
        lengths = [int(mask.sum()) for mask in kept]
        if 0 in lengths:
            raise ValueError(f"PackingCollator: example {lengths.index(0)} has no token")
        batch: dict[str, Any] = {
            name: torch.cat([_row(x[name])[mask] for x, mask in zip(examples, kept, strict=True)])[None]
            for name in ("input_ids", "token_type_ids", "position_ids")
            if name in names
        }
        ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
        longest = max(lengths)
        batch |= {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}
        for name in ("label", "labels"):
            if name in names:
                batch["labels"] = _labels([example[name] for example in examples], kept, longest)
        return {**batch, PACKED: True}


def _check_model(model: nn.Module) -> None:
    found = [module.__dict__[FLAG] for module in model.modules() if is_padding_free(module)]
    if not found:
        raise ValueError(
            "PackingCollator: the model does not run padding-free: embedkernels.patch(model, padding_free=True)"
        )
    heads = [around.padded_only for around in found if around.padded_only]
    if heads:
        raise ValueError(
            f"PackingCollator: {heads[0]} looks at ids or mask of a padded batch: use a collator that pads, which "
            "costs a padding-free model next to nothing"
        )


def _row(values: Any) -> Tensor:
    return torch.as_tensor(values, dtype=torch.int64)


def _kept(example: Mapping[str, Any]) -> Tensor:
    """Which tokens of an example are real."""
    if example.get("attention_mask") is not None:
        return torch.as_tensor(example["attention_mask"]).bool()
    return torch.ones(len(example["input_ids"]), dtype=torch.bool)


def _labels(labels: list[Any], kept: list[Tensor], longest: int) -> Tensor:
    given = [torch.as_tensor(label) for label in labels]
    if given[0].dim() == 0 or given[0].is_floating_point():
        return torch.stack(given)
    for i, (label, mask) in enumerate(zip(given, kept, strict=True)):
        if label.shape != mask.shape:
            raise ValueError(
                f"PackingCollator: example {i} has {mask.shape[0]} tokens, labels of shape {tuple(label.shape)}"
            )
    padded = torch.full((len(given), longest), IGNORED, dtype=torch.int64)
    for row, label, mask in zip(padded, given, kept, strict=True):
        real = label[mask]
        row[: real.shape[0]] = real
    return padded

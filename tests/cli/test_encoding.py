"""What the model sees: labels aligned with tokens, long texts, padding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from embedkernels.cli import models
from embedkernels.cli.encoding import IGNORED, Collator, Encoder, check_length, check_not_empty, unknown_share
from embedkernels.cli.errors import UsageError
from embedkernels.cli.examples import Example
from tests.cli import support


def test_a_words_tag_goes_to_its_first_token() -> None:
    encode = Encoder(support.tokenizer(special=True), "token-classification", {"O": 0, "B-X": 1, "B-PER": 2}, 16)
    rows, longer = encode([Example(["xaxb", "was", "ada"], ["B-X", "O", "B-PER"])])
    assert rows[0]["labels"] == [IGNORED, 1, IGNORED, 0, 2, IGNORED]
    assert len(rows[0]["input_ids"]) == 6
    assert longer == 0


def test_long_texts_are_cut_with_their_special_tokens() -> None:
    words = support.tokenizer(special=True)
    encode = Encoder(words, "classification", {"a": 0, "b": 1}, 5)
    rows, longer = encode([Example("the film was good but so so", "b"), Example("the film was", "a")])
    assert longer == 1
    assert words.convert_ids_to_tokens(rows[0]["input_ids"]) == ["[CLS]", "the", "film", "was", "[SEP]"]
    assert [row["labels"] for row in rows] == [1, 0]


def test_tags_of_words_that_are_cut_are_cut() -> None:
    encode = Encoder(support.tokenizer(special=True), "token-classification", {"O": 0, "B-X": 1}, 4)
    rows, longer = encode([Example(["was", "xaxb", "was"], ["O", "B-X", "O"])])
    assert rows[0]["labels"] == [IGNORED, 0, 1, IGNORED]
    assert longer == 1


def test_a_language_model_loses_no_token_of_a_long_text() -> None:
    words = support.tokenizer(special=False)
    encode = Encoder(words, "causal-lm", {}, 3)
    rows, longer = encode([Example("the film was good", None), Example("good", None), Example("the film was", None)])
    texts = [words.convert_ids_to_tokens(row["input_ids"]) for row in rows]
    # The last text's end would be alone in a sequence of its own, where it predicts nothing.
    assert texts == [["the", "film", "was"], ["good", "<end>"], ["good", "<end>"], ["the", "film", "was"]]
    assert longer == 2
    # Nothing comes before a sequence's first token to predict it from.
    assert all(row["labels"] == [IGNORED, *row["input_ids"][1:]] for row in rows)


def test_nothing_to_predict_is_an_error() -> None:
    with pytest.raises(UsageError, match="--train: no text has the two tokens"):
        check_not_empty([], "--train", "causal-lm")
    with pytest.raises(UsageError, match="--eval: no text has a word that gives a token"):
        check_not_empty([], "--eval", "token-classification")


def test_a_text_whose_words_give_no_token_is_left_out() -> None:
    encode = Encoder(support.tokenizer(special=True), "token-classification", {"O": 0}, 16)
    rows, _ = encode([Example([" ", "\u2003"], ["O", "O"]), Example([" ", "film"], ["O", "O"])])
    assert [row["labels"] for row in rows] == [[IGNORED, 0, IGNORED]]


@pytest.mark.parametrize(
    ("special", "task", "least"),
    [(True, "classification", 3), (False, "classification", 1), (True, "causal-lm", 3), (False, "causal-lm", 2)],
)
def test_a_length_without_room_for_text_is_refused(special: bool, task: str, least: int) -> None:
    words = support.tokenizer(special=special)
    check_length(least, words, task)
    for length in range(1, least):
        with pytest.raises(UsageError, match=f"--max-length: {length} leaves no room") as caught:
            check_length(length, words, task)
        assert caught.value.remedy == f"Use at least {least}."


@pytest.mark.parametrize(
    ("special", "text", "share"),
    [(True, "the film", 0.0), (True, "der Film was gut", 0.75), (False, "der film", 0.5)],
)
def test_the_share_of_unknown_tokens(special: bool, text: str, share: float) -> None:
    words = support.tokenizer(special=special)
    assert unknown_share([{"input_ids": words(text)["input_ids"]}], words) == share


def test_an_end_of_text_that_also_stands_for_the_unknown_is_not_counted() -> None:
    words: Any = support.tokenizer(special=False)
    words.unk_token = words.eos_token
    assert unknown_share([{"input_ids": [words.eos_token_id] * 4}], words) == 0.0


@pytest.mark.parametrize("side", ["right", "left"])
def test_batches_are_padded_to_their_longest(side: str) -> None:
    words = support.tokenizer(special=True)
    words.padding_side = side
    rows = [
        {"input_ids": [5, 6, 7], "attention_mask": [1, 1, 1], "labels": [1, IGNORED, 0]},
        {"input_ids": [8], "attention_mask": [1], "labels": [1]},
    ]
    batch = Collator(words)(rows)
    expected = {"input_ids": [8, 0, 0], "attention_mask": [1, 0, 0], "labels": [1, IGNORED, IGNORED]}
    for name, row in expected.items():
        assert batch[name].dtype == torch.int64
        padding = row[1:]
        assert batch[name].tolist() == [rows[0][name], row if side == "right" else [*padding, row[0]]]


def test_a_class_is_one_number_a_row() -> None:
    batch = Collator(support.tokenizer(special=True))([{"input_ids": [1], "attention_mask": [1], "labels": 2}] * 3)
    assert batch["labels"].tolist() == [2, 2, 2]


@pytest.mark.parametrize(
    ("model", "limit"),
    [
        (lambda: transformers.BertModel(transformers.BertConfig(**SMALL)), 40),
        # Positions start behind the padding id, 1.
        (lambda: transformers.RobertaModel(transformers.RobertaConfig(**SMALL, pad_token_id=1)), 38),
        (lambda: transformers.GPT2Model(transformers.GPT2Config(n_positions=24, n_embd=8, n_layer=1, n_head=1)), 24),
        (
            lambda: transformers.T5EncoderModel(transformers.T5Config(d_model=8, d_ff=8, num_layers=1, num_heads=1)),
            None,
        ),
    ],
    ids=["bert", "roberta", "gpt2", "t5"],
)
def test_how_many_positions_a_model_has(model: object, limit: int | None) -> None:
    assert models.position_limit(model()) == limit  # type: ignore[operator]


SMALL = {
    "vocab_size": 20,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "intermediate_size": 8,
    "max_position_embeddings": 40,
}


@pytest.mark.parametrize(
    ("known", "expected"),
    [
        ({"pos": 0, "neg": 1}, ("pos", "neg")),
        ({"pos": 0, "neg": 1, "neutral": 2}, ("pos", "neg", "neutral")),
        ({"LABEL_0": 0, "LABEL_1": 1}, ("neg", "pos")),
        (None, ("neg", "pos")),
    ],
    ids=str,
)
def test_a_head_that_knows_the_labels_keeps_their_order(known: dict[str, int] | None, expected: tuple) -> None:
    config = transformers.BertConfig()
    if known is not None:
        config.id2label = {index: name for name, index in known.items()}
        config.label2id = known
    assert models.label_order(("neg", "pos"), config) == expected

"""The Trainer with batches that a collator has packed, and with patching as a callback."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import DataCollatorWithPadding, Trainer, TrainerCallback, TrainingArguments

import embedkernels as ek
from embedkernels.hf import EmbedKernelsCallback, PackingCollator, padding
from tests.hf.models import DECODERS, MODELS, VOCAB, build, ids

pytest.importorskip("accelerate")


def examples(count: int = 6, seed: int = 0) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 9, (count,), generator=generator).tolist()
    return [
        {"input_ids": torch.randint(4, VOCAB, (n,), generator=generator).tolist(), "label": i % 2}
        for i, n in enumerate(lengths)
    ]


def padded(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    longest = max(len(row["input_ids"]) for row in rows)
    batch = {"input_ids": torch.ones(len(rows), longest, dtype=torch.int64)}
    batch["attention_mask"] = torch.zeros_like(batch["input_ids"])
    for i, row in enumerate(rows):
        batch["input_ids"][i, : len(row["input_ids"])] = torch.tensor(row["input_ids"])
        batch["attention_mask"][i, : len(row["input_ids"])] = 1
    return batch


@pytest.mark.parametrize("name", MODELS)
def test_a_packed_batch_is_the_padded_one(name: str) -> None:
    """Outputs, pooled ones too, hidden states and gradients."""
    model = build(name, layers=2)
    ek.patch(model, padding_free=True, strict=True)
    rows = [{"input_ids": row["input_ids"]} for row in examples()]
    if name in ("bert", "electra", "albert"):
        rows = [{**row, "token_type_ids": [i % 2 for i in range(len(row["input_ids"]))]} for row in rows]
    packed = PackingCollator(model)(rows)
    batch = padded(rows)
    if "token_type_ids" in rows[0]:
        longest = batch["input_ids"].shape[1]
        batch["token_type_ids"] = (torch.arange(longest) % 2).expand(len(rows), longest)
    results = []
    for inputs in (batch, packed):
        model.zero_grad()
        output = model(**inputs, output_hidden_states=True)
        loss = output.last_hidden_state.square().sum()
        if output.get("pooler_output") is not None:
            loss = loss + output.pooler_output.sum()
        loss.backward()
        states = [output.last_hidden_state, *output.hidden_states]
        results.append([*states, *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    assert len(results[0]) == len(results[1])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=2e-5)


def test_positions_of_roberta_skip_padding_ids_among_the_tokens() -> None:
    model = build("roberta")
    ek.patch(model, padding_free=True)
    rows = [{"input_ids": [0, 1, 9, 2]}, {"input_ids": [5, 6]}]
    batch = padded(rows)
    outputs = [model(**inputs).last_hidden_state for inputs in (batch, PackingCollator()(rows))]
    torch.testing.assert_close(*outputs)


def test_what_a_batch_holds() -> None:
    rows = [
        {
            "input_ids": np.array([5, 6, 1]),
            "attention_mask": [1, 1, 0],
            "labels": [7, -100, 3],
            "position_ids": [4, 5, 6],
        },
        {"input_ids": torch.tensor([8]), "attention_mask": [1], "labels": [2], "position_ids": [9]},
    ]
    batch = PackingCollator()(rows)
    assert batch["input_ids"].tolist() == [[5, 6, 8]]
    assert batch["position_ids"].tolist() == [[4, 5, 9]]
    assert batch["labels"].tolist() == [[7, -100], [2, -100]]
    assert batch["cu_seq_lens_q"].tolist() == [0, 2, 3]
    assert batch["cu_seq_lens_q"].dtype == torch.int32
    assert (batch["max_length_q"], batch["max_length_k"]) == (2, 2)
    scores = PackingCollator()([{"input_ids": [5], "label": 0.5}, {"input_ids": [6, 7], "label": 1.0}])
    assert scores["labels"].dtype == torch.float32
    several = PackingCollator()(
        [{"input_ids": [5, 6, 7], "labels": [1.0, 0.0, 1.0]}, {"input_ids": [6], "labels": [0.0, 0.0, 1.0]}]
    )
    assert several["labels"].tolist() == [[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no examples"),
        ([{"input_ids": [5]}, {"input_ids": [5], "label": 1}], "examples of different keys"),
        ([{"input_ids": [5]}, {"input_ids": []}], "example 1 has no token"),
        ([{"input_ids": [5], "attention_mask": [0]}], "example 0 has no token"),
        ([{"input_ids": [5], "next_sentence_label": 1}], "examples have .'next_sentence_label'., which nobody would"),
        ([{"input_ids": [5, 6], "labels": [1, 2, 3]}], "example 0 has 2 tokens, labels of shape .3,."),
    ],
)
def test_what_cannot_be_packed(rows: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PackingCollator()(rows)


def test_a_model_that_pads_refuses_a_packed_batch() -> None:
    """Its pooler would take the first token of all."""
    model = build("bert")
    rows = examples()
    with pytest.raises(ValueError, match="the model does not run padding-free"):
        PackingCollator(model)(rows)
    batch = PackingCollator()([{"input_ids": row["input_ids"]} for row in rows])
    ek.patch(model)
    with pytest.raises(ValueError, match="reached BertSelfAttention of a model that does not run padding-free"):
        model(**batch)
    ek.patch(model, padding_free=True)
    model(**batch)
    with pytest.raises(ValueError, match="cannot run on a packed batch: output_attentions is asked for"):
        model(**batch, output_attentions=True)
    with pytest.raises(ValueError, match="cannot run on a packed batch: it takes one row"):
        model(**{**batch, "input_ids": ids(2, 5)})


def test_a_decoder_takes_a_packed_batch_in_evaluation_too() -> None:
    model = build("llama")
    ek.patch(model, padding_free=True)
    batch = PackingCollator(model)([{"input_ids": row["input_ids"]} for row in examples()])
    assert model.eval()(**batch).past_key_values is None
    with pytest.raises(ValueError, match="a cache is asked for"):
        model(**batch, use_cache=True)


def test_a_head_that_looks_at_ids_or_mask_refuses_a_packed_batch() -> None:
    """It would take the last token of all texts for that of each."""
    model = transformers.LlamaForSequenceClassification(build("llama").config)
    ek.patch(model, padding_free=True)
    rows = examples()
    with pytest.raises(ValueError, match="LlamaForSequenceClassification looks at ids or mask of a padded batch"):
        PackingCollator(model)(rows)
    with pytest.raises(ValueError, match="LlamaModel cannot run on a packed batch: LlamaForSequenceClassification"):
        model(**PackingCollator()(rows))
    for pooling in ("cls", "mean"):
        config = copy.deepcopy(build("modernbert").config)
        config.classifier_pooling = pooling
        model = transformers.ModernBertForSequenceClassification(config)
        ek.patch(model, padding_free=True)
        if pooling == "cls":
            assert model(**PackingCollator(model)(rows)).logits.shape == (6, 2)
        else:
            with pytest.raises(ValueError, match="ModernBertForSequenceClassification looks at ids or mask"):
                PackingCollator(model)(rows)


def test_heads_of_others_are_not_known() -> None:
    """This one averages by the mask, of which there is none in a batch that comes packed."""

    class MeanForSequenceClassification(transformers.BertPreTrainedModel):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.bert = transformers.BertModel(config)

        def forward(self, attention_mask: Any = None, **kwargs: Any) -> Tensor:
            return self.bert(attention_mask=attention_mask, **kwargs).last_hidden_state.mean(1)

    model = MeanForSequenceClassification(build("bert").config)
    ek.patch(model, padding_free=True)
    with pytest.raises(ValueError, match="MeanForSequenceClassification looks at ids or mask"):
        PackingCollator(model)(examples())


def test_a_head_is_seen_when_the_whole_is_patched_later() -> None:
    model = transformers.GPT2ForSequenceClassification(build("gpt2").config)
    ek.patch(model.transformer, padding_free=True)
    ek.patch(model, padding_free=True)
    with pytest.raises(ValueError, match="GPT2ForSequenceClassification looks at ids or mask"):
        PackingCollator(model)(examples())


HEADS = {
    "bert": transformers.BertForSequenceClassification,
    "roberta": transformers.RobertaForTokenClassification,
    "llama": transformers.LlamaForCausalLM,
}


def of_task(name: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    if name == "bert":
        return rows
    labels = (lambda row: row["input_ids"]) if name in DECODERS else (lambda row: [i % 2 for i in row["input_ids"]])
    return [{"input_ids": row["input_ids"], "labels": labels(row)} for row in rows]


def trainer(model: Any, output: Path, name: str = "bert", collator: Any = None, **options: Any) -> Trainer:
    callbacks = options.pop("callbacks", None)
    model_init = options.pop("model_init", None)
    arguments = TrainingArguments(
        str(output), per_device_train_batch_size=3, per_device_eval_batch_size=4, max_steps=4, report_to=[],
        logging_steps=1, save_strategy="no", use_cpu=True, disable_tqdm=True, **options,
    )  # fmt: skip
    return Trainer(
        model=model, args=arguments, train_dataset=of_task(name, examples(12)), data_collator=collator,
        eval_dataset=of_task(name, examples(6, 1)), callbacks=callbacks, model_init=model_init,
    )  # fmt: skip


class Padding:
    """What stock collators do, without a tokenizer."""

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        batch = padded(rows)
        if "label" in rows[0]:
            return {**batch, "labels": torch.tensor([row["label"] for row in rows])}
        labels = torch.full_like(batch["input_ids"], -100)
        for i, row in enumerate(rows):
            labels[i, : len(row["labels"])] = torch.tensor(row["labels"])
        return {**batch, "labels": labels}


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_trainer_learns_the_same_from_packed_batches(name: str, accumulate: int, tmp_path: Path) -> None:
    stock = HEADS[name](build(name).config)
    for module in stock.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    free = copy.deepcopy(stock)
    ek.patch(free, padding_free=True, strict=True)
    results = []
    for model, collator in ((stock, Padding()), (free, PackingCollator(free))):
        one = trainer(model, tmp_path, name, collator, gradient_accumulation_steps=accumulate, learning_rate=1e-2)
        one.train()
        losses = [entry["loss"] for entry in one.state.log_history if "loss" in entry]
        evaluated = one.evaluate()["eval_loss"]
        predicted = one.predict(one.eval_dataset).predictions
        results.append((losses, evaluated, predicted))
    assert len(results[0][0]) == 4
    np.testing.assert_allclose(results[1][0], results[0][0], rtol=1e-4)
    np.testing.assert_allclose(results[1][1], results[0][1], rtol=1e-4)
    assert results[1][2].shape[0] == results[0][2].shape[0] == 6
    if name == "bert":
        np.testing.assert_allclose(results[1][2], results[0][2], rtol=1e-3, atol=1e-5)


def test_the_callback_patches_before_anything_runs(tmp_path: Path) -> None:
    model = transformers.BertForSequenceClassification(build("bert").config)
    callback = EmbedKernelsCallback(padding_free=True)
    one = trainer(model, tmp_path, collator=Padding(), callbacks=[callback])
    assert padding.is_padding_free(model.bert)
    report = callback.report
    assert report is not None
    assert report.active
    one.evaluate()
    one.train()
    assert callback.report is report, "patched once"
    one.save_model(str(tmp_path / "saved"))
    again = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "saved")
    assert type(again.bert) is transformers.BertModel
    assert all(
        torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values(), strict=True)
    )


def test_the_callback_patches_every_model_of_model_init(tmp_path: Path) -> None:
    made: list[Any] = []

    def model_init() -> Any:
        made.append(transformers.BertForSequenceClassification(build("bert").config))
        return made[-1]

    one = trainer(None, tmp_path, collator=Padding(), callbacks=[EmbedKernelsCallback(padding_free=True)],
                  model_init=model_init)  # fmt: skip
    one.train()
    one.train()
    assert len(made) >= 2
    assert all(padding.is_padding_free(model.bert) for model in made if model is one.model)
    assert padding.is_padding_free(one.model.bert)


def test_training_resumes_from_a_checkpoint(tmp_path: Path) -> None:
    """Stopped after two steps and continued, a patched run ends where one that never stopped does."""

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
            control.should_training_stop = state.global_step == 2

    config = build("bert").config
    start = transformers.BertForSequenceClassification(config).state_dict()
    ends = []
    for stops in (False, True):
        options = {"save_steps": 2, "callbacks": [EmbedKernelsCallback(padding_free=True)]}
        folder = tmp_path / str(stops)

        def begin(more: Any, folder: Path = folder, options: Any = options) -> Trainer:
            model = transformers.BertForSequenceClassification(config)
            model.load_state_dict(start)
            arguments = TrainingArguments(
                str(folder), per_device_train_batch_size=3, max_steps=4, report_to=[], save_strategy="steps",
                save_steps=2, use_cpu=True, disable_tqdm=True, seed=3,
            )  # fmt: skip
            return Trainer(
                model=model, args=arguments, train_dataset=examples(12), data_collator=Padding(),
                callbacks=[*options["callbacks"], *more],
            )  # fmt: skip

        one = begin([Stop()] if stops else [])
        one.train()
        if stops:
            one = begin([])
            one.train(resume_from_checkpoint=True)
        ends.append(one.model.state_dict())
    for key, value in ends[0].items():
        torch.testing.assert_close(ends[1][key], value, msg=lambda text, key=key: f"{key}: {text}")


def test_the_stock_collator_still_works(tmp_path: Path) -> None:
    """DataCollatorWithPadding needs a tokenizer; any that pads will do."""
    from tokenizers import Tokenizer, models

    words = {f"w{i}": i for i in range(VOCAB)}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")), pad_token="w1", unk_token="w0"
    )
    model = transformers.BertForSequenceClassification(build("bert").config)
    ek.patch(model, padding_free=True)
    trainer(model, tmp_path, collator=DataCollatorWithPadding(tokenizer)).train()

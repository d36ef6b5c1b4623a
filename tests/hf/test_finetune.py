"""Fine-tuning runs: the losses of a patched model follow those of the stock model, step by step."""

import copy
import math

import pytest
import torch
import transformers

import embedkernels as ek
from embedkernels.hf import guards
from tests.hf.models import VOCAB, build


def classifier(dropout=0.0, layers=2, heads=2):
    config = build("bert", layers=layers, dropout=dropout).config
    config.num_labels, config.num_attention_heads = 2, heads
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(config).train()


def batches(steps, batch=8, length=12):
    """Sentences of many lengths; the label says whether token 7 is in one, so there is something to learn."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(3)
    for _ in range(steps):
        input_ids = torch.randint(8, VOCAB, (batch, length), generator=generator)
        lengths = torch.randint(2, length + 1, (batch, 1), generator=generator)
        labels = torch.randint(0, 2, (batch,), generator=generator)
        input_ids[:, 1] = torch.where(labels.bool(), 7, input_ids[:, 1])
        mask = torch.arange(length) < lengths
        types = (torch.arange(length) > length // 2).long().expand(batch, length)
        yield {
            "input_ids": input_ids.masked_fill(~mask, 1),
            "token_type_ids": types.contiguous(),
            "attention_mask": mask.long(),
            "labels": labels,
        }


def finetune(model, data, seed=11):
    """The loss of every step of AdamW."""
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    losses = []
    for batch in data:
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


def assert_close(ours, theirs):
    assert len(ours) == len(theirs)
    for step, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert math.isclose(a, b, rel_tol=1e-4), f"step {step}: {a} and {b}"


@pytest.fixture
def runs_fused(monkeypatch):
    """Fail if any module falls back: the comparison would be of stock with stock."""

    def fail(module, what, reason):
        raise AssertionError(reason)

    monkeypatch.setattr(guards, "warn_once", fail)


@pytest.mark.usefixtures("runs_fused")
def test_fifty_steps_of_adamw_agree():
    stock = classifier()
    patched = copy.deepcopy(stock)
    ek.patch(patched, strict=True)
    data = list(batches(50))
    theirs, ours = finetune(stock, data), finetune(patched, data)
    assert_close(ours, theirs)
    assert sum(theirs[-5:]) < 0.7 * sum(theirs[:5]), "nothing was learnt: the test shows nothing"


@pytest.mark.usefixtures("runs_fused", "on_device")
def test_ten_steps_through_the_kernels_agree():
    stock = classifier(layers=1)
    patched = copy.deepcopy(stock)
    ek.patch(patched, strict=True)
    data = list(batches(10, batch=2, length=6))
    theirs = finetune(stock, data)
    with ek.use_backend("triton"):
        ours = finetune(patched, data)
    assert_close(ours, theirs)


@pytest.mark.usefixtures("runs_fused")
def test_with_dropout_the_same_seed_gives_the_same_losses_on_the_cpu():
    stock = classifier(dropout=0.2)
    torch_backend, default_backend = copy.deepcopy(stock), copy.deepcopy(stock)
    ek.patch(torch_backend, strict=True)
    ek.patch(default_backend, strict=True)
    data = list(batches(10))
    theirs = finetune(copy.deepcopy(stock), data)
    with ek.use_backend("torch"):
        assert finetune(torch_backend, data) == theirs
    # The extension may add a table's gradient in another order: the last place of its sums may differ.
    ours = finetune(default_backend, data)
    assert ours[0] == theirs[0]
    assert_close(ours, theirs)
    assert finetune(stock, data, seed=12) != theirs


def test_the_trainer_takes_a_patched_model(tmp_path):
    stock = classifier()
    patched = copy.deepcopy(stock)
    ek.patch(patched, strict=True)
    rows = [{key: value[i] for key, value in batch.items()} for batch in batches(4) for i in range(8)]
    losses = []
    for model in (stock, patched):
        arguments = transformers.TrainingArguments(
            output_dir=tmp_path / str(len(losses)),
            max_steps=4,
            per_device_train_batch_size=8,
            logging_steps=1,
            save_steps=2,
            report_to=[],
            use_cpu=True,
            gradient_checkpointing=True,
            seed=5,
            disable_tqdm=True,
        )
        trainer = transformers.Trainer(model, arguments, train_dataset=rows)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert_close(losses[1], losses[0])
    checkpoint = tmp_path / "1" / "checkpoint-2"
    loaded = transformers.BertForSequenceClassification.from_pretrained(checkpoint)
    assert loaded.config.architectures == ["BertForSequenceClassification"]
    assert "embedkernels" not in (checkpoint / "config.json").read_text()


ANSWER = 7


def sentences(number, length, seed):
    """Sentences of many lengths; the label says whether one token is anywhere in the sentence."""
    with torch.device("cpu"):
        generator = torch.Generator().manual_seed(seed)
        input_ids = torch.randint(8, VOCAB, (number, length), generator=generator)
        lengths = torch.randint(2, length + 1, (number,), generator=generator)
        labels = torch.randint(0, 2, (number,), generator=generator)
        rows, place = torch.arange(number), (torch.rand(number, generator=generator) * lengths).long()
        input_ids[rows, place] = torch.where(labels.bool(), ANSWER, input_ids[rows, place])
        mask = torch.arange(length) < lengths[:, None]
    made = {"input_ids": input_ids.masked_fill(~mask, 1), "attention_mask": mask.long(), "labels": labels}
    return {key: value.to(torch.get_default_device()) for key, value in made.items()}


def accuracy(model, length):
    """The share of right answers to unseen sentences."""
    unseen = sentences(512, length, seed=2)
    with torch.no_grad():
        right = model.eval()(**unseen).logits.argmax(1) == unseen["labels"]
    model.train()
    return right.float().mean().item()


def learn(model, steps, batch, length, learning_rate):
    """AdamW on sentences, a new batch in every step."""
    data = sentences(steps * batch, length, seed=1)
    torch.manual_seed(13)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    for step in range(steps):
        rows = slice(step * batch, (step + 1) * batch)
        optimizer.zero_grad()
        model(**{key: value[rows] for key, value in data.items()}).loss.backward()
        optimizer.step()


@pytest.mark.usefixtures("runs_fused")
def test_with_dropout_the_final_accuracy_is_stocks():
    stock = classifier(dropout=0.1, layers=1)
    patched = copy.deepcopy(stock)
    ek.patch(patched, strict=True)
    for model in (stock, patched):
        assert accuracy(model, 8) < 0.7
        learn(model, steps=80, batch=16, length=8, learning_rate=3e-3)
    assert accuracy(stock, 8) > 0.95
    assert abs(accuracy(patched, 8) - accuracy(stock, 8)) <= 0.01


@pytest.mark.usefixtures("runs_fused", "on_device")
def test_with_dropout_the_final_accuracy_through_the_kernels_is_stocks():
    """The kernels draw other numbers than stock, so the losses differ; what is learnt does not."""
    stock = classifier(dropout=0.1, layers=1, heads=1)
    patched = copy.deepcopy(stock)
    ek.patch(patched, strict=True)
    learn(stock, steps=20, batch=8, length=3, learning_rate=6e-3)
    with ek.use_backend("triton"):
        learn(patched, steps=20, batch=8, length=3, learning_rate=6e-3)
    assert accuracy(stock, 3) > 0.95
    # On a CPU not through the kernels: 512 sentences take Triton's interpreter minutes.
    assert abs(accuracy(patched, 3) - accuracy(stock, 3)) <= 0.01

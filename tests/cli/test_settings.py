"""The arguments as one value: what they may be, and back to the words of a command."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest

from embedkernels.cli import finetune as command_module
from embedkernels.cli.errors import UsageError
from embedkernels.cli.settings import Settings
from tests.cli.support import command


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"model": ""}, "--model: is empty"),
        ({"train": " "}, "--train: is empty"),
        ({"evaluation": ""}, "--eval: is empty"),
        ({"tokenizer": ""}, "--tokenizer: is empty"),
        ({"text": ""}, "--text: is empty"),
        ({"batch_size": 99999999999999999999}, "--batch-size: must be at most 2147483647, got 9999"),
        ({"max_steps": 2**31}, "--max-steps: must be at most"),
        ({"epochs": 1e300}, "--epochs: must be a number above 0 and at most 2.14748e+09, got 1e+300"),
        ({"epochs": float("nan")}, "--epochs: must be a number above 0"),
        ({"lr": 1e300}, "--lr: must be a number above 0 and at most 1e"),
        ({"weight_decay": float("inf")}, "--weight-decay: must not be negative and at most"),
        ({"warmup": 1e300}, "--warmup: must not be negative and at most"),
        ({"precision": "fp16", "device": "cpu"}, "--precision: fp16 needs a GPU"),
    ],
    ids=str,
)
def test_what_no_run_can_use_is_refused(changed: dict[str, Any], expected: str) -> None:
    with pytest.raises(UsageError) as caught:
        Settings(**{"model": "m", "train": "t", **changed})
    assert caught.value.message.startswith(expected)


OTHER: dict[str, Any] = {
    "model": "a model",
    "train": "it's.csv",
    "evaluation": "e.csv",
    "eval_fraction": 0.3,
    "tokenizer": "words",
    "task": "token-classification",
    "text": "words",
    "label": "ner",
    "epochs": 0.1,
    "max_steps": 7,
    "batch_size": 3,
    "eval_batch_size": 5,
    "accumulate": 2,
    "lr": 1 / 3,
    "weight_decay": 0.0,
    "warmup": 100.0,
    "max_length": 9,
    "precision": "bf16",
    "device": "cpu",
    "seed": 11,
    "dropout": 0.0,
    "gradient_checkpointing": True,
    "torch_compile": True,
    "padding_free": False,
}


@pytest.mark.parametrize("settings", [Settings("m", "t"), Settings(**OTHER)], ids=["defaults", "all others"])
def test_the_words_of_a_command_give_the_same_settings(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    assert OTHER.keys() == {field.name for field in fields(Settings)}
    given: list[Settings] = []
    monkeypatch.setattr(command_module, "finetune", lambda settings, *_, **__: given.append(settings))
    done = command("finetune", *settings.arguments())
    assert done.exit_code == 0, done.output
    assert given == [settings]

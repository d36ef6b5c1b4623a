"""What is wrong with a model's or tokenizer's files, said with the argument that named them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import transformers

from embedkernels.cli import models
from embedkernels.cli.errors import CliError, UsageError
from embedkernels.cli.settings import Settings


def load(path: Path) -> None:
    settings = Settings(str(path), "t")
    config = models.load_config(settings)
    tokenizer = models.load_tokenizer(settings)
    models.load_model(settings, config, tokenizer, ("a", "b"))


def without(path: Path, *names: str) -> None:
    for name in names:
        (path / name).unlink()


def corrupt_bin(path: Path) -> None:
    without(path, "model.safetensors")
    (path / "pytorch_model.bin").write_bytes(b"garbage")


def with_config(path: Path, **changed: object) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **changed}))


def only_special(path: Path) -> None:
    without(path, *TOKENIZER)
    (path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n")


TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no tokenizer": (
        lambda path: without(path, *TOKENIZER),
        "holds no tokenizer (none of tokenizer.json,",
    ),
    "no words": (
        lambda path: (
            without(path, *TOKENIZER),
            (path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n"),
        ),
        "knows no words, only special tokens",
    ),
    "broken tokenizer": (
        lambda path: (path / "tokenizer.json").write_text("{"),
        "tokenizer of {path} does not load",
    ),
    "config of a list": (lambda path: (path / "config.json").write_text("[]"), "the config of {path} does not load"),
    "activation": (lambda path: with_config(path, hidden_act="gulu"), "the name 'gulu' is unknown or missing"),
    "size": (lambda path: with_config(path, hidden_size="big"), "'hidden_size'"),
    "weights cut off": (
        lambda path: (path / "model.safetensors").write_bytes((path / "model.safetensors").read_bytes()[:5000]),
        "the model of {path} does not load: SafetensorError",
    ),
    "corrupt weights": (corrupt_bin, "its weights are no checkpoint of PyTorch"),
    "no weights": (
        lambda path: without(path, "model.safetensors"),
        "{path} does not load: Error no file",
    ),
}


@pytest.mark.parametrize(("spoil", "expected"), FAULTS.values(), ids=FAULTS)
def test_a_models_faulty_files_are_named(
    bert: Path, tmp_path: Path, spoil: Callable[[Path], object], expected: str
) -> None:
    path = shutil.copytree(bert, tmp_path / "model")
    spoil(path)
    with pytest.raises(UsageError) as caught:
        load(path)
    assert caught.value.message.startswith("--model: ")
    assert expected.format(path=path) in caught.value.message
    assert caught.value.remedy
    assert "weights_only" not in f"{caught.value.message} {caught.value.remedy}"


@pytest.mark.parametrize("file", ["tekken.json", "spm.model", "tiktoken.model", "qwen.tiktoken"])
def test_a_vocabulary_in_another_format_is_one(file: str, bert: Path, tmp_path: Path) -> None:
    """transformers has converted it, by the time that its file is looked for."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(bert)
    (tmp_path / file).write_text("")
    models._check_vocabulary(tokenizer, "--model", str(tmp_path))
    (tmp_path / file).rename(tmp_path / "notes.txt")
    with pytest.raises(UsageError, match="holds no tokenizer"):
        models._check_vocabulary(tokenizer, "--model", str(tmp_path))


def test_tokenizers_of_bytes_need_no_files(tmp_path: Path) -> None:
    transformers.ByT5Tokenizer().save_pretrained(tmp_path)
    without(tmp_path, *(one.name for one in tmp_path.iterdir() if one.name != "tokenizer_config.json"))
    assert models.load_tokenizer(Settings("m", "t", tokenizer=str(tmp_path))).pad_token == "<pad>"


def test_memory_that_runs_out_while_loading_is_no_fault_of_the_file(
    bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object, **more: object) -> None:
        raise MemoryError

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", fail)
    with pytest.raises(MemoryError):
        models.load_config(Settings(str(bert), "t"))


@pytest.mark.parametrize(
    ("error", "kind", "expected", "remedy"),
    [
        (
            ImportError("\nXLNetTokenizer requires the SentencePiece library"),
            CliError,
            "needs a package that does not import: XLNetTokenizer requires the SentencePiece",
            "pip",
        ),
        (ValueError("bad entry"), UsageError, "config of owner/name does not load: bad entry", "copy the model"),
        (
            OSError("We couldn't connect"),
            UsageError,
            "neither a directory here nor a model that can be had",
            "HF_HUB",
        ),
    ],
    ids=["package", "content", "absent"],
)
def test_a_model_of_the_hub_fails_for_its_own_reason(
    monkeypatch: pytest.MonkeyPatch, error: Exception, kind: type, expected: str, remedy: str
) -> None:
    def fail(*arguments: object, **more: object) -> None:
        raise error

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", fail)
    with pytest.raises(CliError) as caught:
        models.load_config(Settings("owner/name", "t"))
    assert type(caught.value) is kind
    assert expected in caught.value.message
    assert remedy in caught.value.remedy


@pytest.mark.parametrize("name", ["./" + "x" * 300, "x" * 300], ids=["path", "id"])
def test_a_name_too_long_for_a_file_is_not_there(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UsageError, match="--model: "):
        models.load_config(Settings(name, "t"))

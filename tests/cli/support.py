"""Tiny random models with their tokenizers, data that can be learned, and commands run in this process."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import transformers
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from typer.testing import CliRunner

from embedkernels.cli import launch, worker
from embedkernels.cli.app import app
from embedkernels.cli.settings import Settings

PLAIN = ["the", "a", "film", "plot", "cast", "score", "was", "is", "felt", "and", "but", "very", "rather", "so"]
GOOD, BAD = ("good", "great", "fine"), ("bad", "dull", "poor")
WORDS = [*PLAIN, *GOOD, *BAD]
NAMES = ["ada", "bob", "paris", "rome"]
POSITIONS = 32


def tokenizer(*, special: bool) -> transformers.PreTrainedTokenizerFast:
    """One token a word, except that words of ``xa``, ``xb`` and ``xc`` have one for each of these."""
    pieces = [f"x{letter}" for letter in "abc"]
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"] if special else ["[UNK]", "<end>"]
    vocabulary = {word: index for index, word in enumerate([*names, *WORDS, *NAMES, *pieces])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex("x[abc]"), "isolated")]
    )
    if not special:
        return transformers.PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]", eos_token="<end>")
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )


def save_bert(path: Path) -> Path:
    """A BERT without a head."""
    words = tokenizer(special=True)
    config = transformers.BertConfig(
        vocab_size=len(words),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=POSITIONS,
        pad_token_id=0,
    )
    transformers.BertModel(config).save_pretrained(path)
    words.save_pretrained(path)
    return path


def save_gpt2(path: Path) -> Path:
    """A GPT-2 without a head of its own, whose tokenizer has no padding token."""
    words = tokenizer(special=False)
    config = transformers.GPT2Config(
        vocab_size=len(words), n_embd=32, n_layer=1, n_head=2, n_positions=POSITIONS, bos_token_id=1, eos_token_id=1
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(path)
    words.save_pretrained(path)
    return path


def save_llama(path: Path) -> Path:
    """A Llama whose tokenizer is the GPT-2's."""
    words = tokenizer(special=False)
    config = transformers.LlamaConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=POSITIONS,
        bos_token_id=1,
        eos_token_id=1,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    words.save_pretrained(path)
    return path


def reviews(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """Sentences with one word that decides their class."""
    draw = random.Random(seed)
    rows = []
    for index in range(count):
        kind, deciding = [("positive", GOOD), ("negative", BAD)][index % 2]
        words = [draw.choice(PLAIN) for _ in range(draw.randint(3, 9))]
        words.insert(draw.randrange(len(words)), draw.choice(deciding))
        rows.append((" ".join(words), kind))
    return rows


def tagged(count: int, seed: int = 0) -> list[tuple[list[str], list[str]]]:
    """Sentences whose names have tags; words such as ``xaxb`` have two tokens."""
    draw = random.Random(seed)
    tags = {"ada": "B-PER", "bob": "B-PER", "paris": "B-LOC", "rome": "B-LOC"}
    rows = []
    for _ in range(count):
        words = [draw.choice([*WORDS, *NAMES, *NAMES, "xaxb"]) for _ in range(draw.randint(3, 9))]
        rows.append((words, [tags.get(word, "O") for word in words]))
    return rows


def write_csv(path: Path, rows: Sequence[Sequence[Any]], header: Sequence[str] = ("text", "label")) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def write_json_lines(path: Path, rows: Sequence[Sequence[Any]], keys: Sequence[str]) -> Path:
    path.write_text("".join(json.dumps(dict(zip(keys, row, strict=True))) + "\n" for row in rows), encoding="utf-8")
    return path


def run_here(
    settings: Settings, output: Path, *, patched: bool, log: Path, on_event: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """``launch.run`` without the process: what passes between the processes still passes through JSON."""
    log.touch()
    job = {"settings": settings.to_dict(), "patched": patched, "output": str(output)}
    try:
        found = worker.execute(json.loads(json.dumps(job)), lambda event: on_event(json.loads(json.dumps(event))))
    except Exception as error:
        event = worker.describe(error)
        raise launch.WorkerError(
            event["message"], event["remedy"], event["traceback"], usage=event["usage"]
        ) from None
    return json.loads(json.dumps(found))


def command(*arguments: object) -> Any:
    """The result of ``embedkernels ARGUMENTS``: exit_code, stdout, stderr."""
    return CliRunner().invoke(app, [str(one) for one in arguments])


def said(text: str) -> str:
    """Text with every run of blanks and line breaks as one blank."""
    return " ".join(text.split())

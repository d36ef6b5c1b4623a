"""The tokenizer and the model of a run, from a directory or the hub, with errors that name ``--model``."""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from embedkernels.cli.errors import CliError, UsageError, did_you_mean, listed, out_of_memory, siblings
from embedkernels.cli.settings import Settings

T = TypeVar("T")
_DROPOUTS = ("dropout", "pdrop", "dropout_prob")


def load_config(settings: Settings) -> Any:
    """The model's configuration, with ``--dropout`` applied.

    Raises:
        UsageError: there is no such model, or it cannot do the task.
    """
    from transformers import AutoConfig

    config = _load("--model", settings.model, "config", AutoConfig.from_pretrained)
    if settings.task == "causal-lm":
        _check_reads_forward(config, settings)
    if settings.dropout is not None:
        for name, value in config.to_dict().items():
            if isinstance(value, (int, float)) and not isinstance(value, bool) and name.endswith(_DROPOUTS):
                setattr(config, name, settings.dropout)
    return config


def load_tokenizer(settings: Settings) -> Any:
    """The tokenizer, with a padding token.

    Raises:
        UsageError: there is none, or it cannot align tokens with words where the task needs that.
    """
    from transformers import AutoTokenizer

    argument, source = ("--tokenizer", settings.tokenizer) if settings.tokenizer else ("--model", settings.model)
    # Byte-level tokenizers refuse words that were split already unless told that a blank stood before each.
    extra = {"add_prefix_space": True} if settings.task == "token-classification" else {}

    def load(name: str) -> Any:
        return AutoTokenizer.from_pretrained(name, **extra)

    tokenizer = _load(argument, source, "tokenizer", load)
    _check_vocabulary(tokenizer, argument, source)
    if settings.task == "token-classification" and not tokenizer.is_fast:
        raise UsageError(
            f"{argument}: {type(tokenizer).__name__} cannot tell which word a token belongs to",
            "Token classification needs a model with a fast tokenizer (tokenizer.json).",
        )
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise UsageError(f"{argument}: the tokenizer has neither a padding token nor an end-of-text token")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


# Vocabularies that transformers converts when it loads them, and no class names: tekken.json, spm.model ...
_VOCABULARY = re.compile(r"^tekken.*\.json$|\.(model|tiktoken)$")


def _check_vocabulary(tokenizer: Any, argument: str, name: str) -> None:
    """UsageError for a tokenizer without words: where its files are missing, transformers makes up such a one."""
    files = set(getattr(type(tokenizer), "vocab_files_names", {}).values())
    remedy = "Copy the tokenizer's files there, or name a tokenizer with --tokenizer."
    directory = os.path.expanduser(name)
    # Tokenizers of bytes and characters have no files.
    if files and os.path.isdir(directory):
        known = sorted({*files, "tokenizer.json"})
        if not any(file in known or _VOCABULARY.search(file) for file in os.listdir(directory)):
            raise UsageError(f"{argument}: directory {name} holds no tokenizer (none of {listed(known)})", remedy)
    if set(tokenizer.get_vocab()) <= {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}:
        raise UsageError(f"{argument}: the tokenizer of {name} knows no words, only special tokens", remedy)


def load_model(settings: Settings, config: Any, tokenizer: Any, labels: tuple[str, ...]) -> tuple[Any, list[str]]:
    """The model in fp32 with a head for the task.

    Args:
        config: from :func:`load_config`; gets the labels.
        labels: the names of the classes in the order of their ids; empty for causal-lm.

    Returns:
        The model, and notices about weights that the checkpoint does not have.

    Raises:
        UsageError: the architecture has no head for the task, or the checkpoint does not fit its configuration.
    """
    import torch
    import transformers

    auto = {
        "classification": transformers.AutoModelForSequenceClassification,
        "token-classification": transformers.AutoModelForTokenClassification,
        "causal-lm": transformers.AutoModelForCausalLM,
    }[settings.task]
    if type(config) not in auto._model_mapping:
        raise UsageError(
            f"--model: {config.model_type} models have no head for --task {settings.task}",
            "Choose another model or task.",
        )
    if labels:
        config.id2label = dict(enumerate(labels))
        config.label2id = {name: index for index, name in enumerate(labels)}
        if settings.task == "classification":
            config.problem_type = "single_label_classification"
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id

    def load(name: str) -> Any:
        return auto.from_pretrained(
            name, config=config, dtype=torch.float32, ignore_mismatched_sizes=bool(labels), output_loading_info=True
        )

    model, info = _load("--model", settings.model, "model", load)
    mismatched = [key[0] if isinstance(key, (tuple, list)) else key for key in info["mismatched_keys"]]
    inside = [key for key in mismatched if key.startswith(f"{model.base_model_prefix}.")]
    if inside:
        raise UsageError(f"--model: weights of {settings.model} differ in shape from its config: {listed(inside)}")
    tokens = model.get_input_embeddings().weight.shape[0]
    highest = max(tokenizer.get_vocab().values(), default=0)
    if highest >= tokens:
        raise UsageError(
            f"--tokenizer: the tokenizer has ids up to {highest}, the model's table {tokens} rows",
            "Use the tokenizer that belongs to the model.",
        )
    new = sorted({*info["missing_keys"], *mismatched})
    return model, [f"new weights, not in the checkpoint: {listed(new)}"] if new else []


def label_order(names: tuple[str, ...], config: Any) -> tuple[str, ...]:
    """The model's own order where its head already knows all these labels, so that the head keeps its meaning."""
    known = getattr(config, "label2id", None) or {}
    if names and set(names) <= set(known) and sorted(known.values()) == list(range(len(known))):
        return tuple(sorted(known, key=known.__getitem__))
    return names


def has_cache(model: Any) -> bool:
    """Whether the model's class would use a cache of keys and values by default."""
    return bool(getattr(type(model.config)(), "use_cache", False))


def position_limit(model: Any) -> int | None:
    """How many tokens the model has positions for; None if there is no limit."""
    from torch import nn

    limits = []
    stated = getattr(model.config, "max_position_embeddings", None)
    if isinstance(stated, int) and stated > 0:
        limits.append(stated)
    for name, module in model.named_modules():
        leaf = name.rpartition(".")[2]
        if isinstance(module, nn.Embedding) and leaf in ("position_embeddings", "embed_positions", "wpe"):
            # RoBERTa counts positions from padding_idx + 1 on; OPT from an offset.
            first = getattr(module, "offset", 0) if module.padding_idx is None else module.padding_idx + 1
            limits.append(module.num_embeddings - first)
    return min(limits, default=None)


def _check_reads_forward(config: Any, settings: Settings) -> None:
    """UsageError for a model that sees the token it should predict."""
    from transformers import AutoModelForMaskedLM

    if type(config) in AutoModelForMaskedLM._model_mapping and not getattr(config, "is_decoder", False):
        raise UsageError(
            f"--model: {settings.model} ({config.model_type}) reads in both directions and would see the answer",
            "--task causal-lm needs a decoder such as GPT-2 or Llama.",
        )


def check_name(argument: str, name: str, needed: str | None = None) -> None:
    """UsageError if ``name`` is a path, but not to a directory that holds the file ``needed``."""
    # os.path: a name too long for a path is none, and no error.
    path = Path(os.path.expanduser(name))
    if os.path.isfile(path):
        raise UsageError(f"{argument}: {name} is a file", "Name the directory that holds config.json.")
    if os.path.isdir(path):
        if needed is not None and not (path / needed).is_file():
            there = listed(siblings(path / needed)) or "nothing"
            raise UsageError(f"{argument}: directory {name} holds no {needed}", f"It holds: {there}.")
    elif name.startswith((".", "~", os.sep)) or name.count("/") > 1 or "\\" in name:
        raise UsageError(f"{argument}: there is no directory {name}", did_you_mean(path.name, siblings(path)).strip())


def _load(argument: str, name: str, what: str, load: Callable[[str], T]) -> T:
    """Call a ``from_pretrained`` and put its errors into words: whatever a file holds, it is the file's fault."""
    check_name(argument, name)
    path = os.path.expanduser(name)
    local = os.path.isdir(path)
    try:
        return load(path if local else name)
    except ImportError as error:
        raise CliError(
            f"{argument}: the {what} of {name} needs a package that does not import: {_reason(error)}",
            "Install the package with pip, then run again.",
        ) from error
    except Exception as error:
        if out_of_memory(error):
            raise
        if isinstance(error, OSError) and not local:
            offline = "HF_HUB_OFFLINE is set: unset it to download" if os.environ.get("HF_HUB_OFFLINE") == "1" else ""
            raise UsageError(
                f"{argument}: {name!r} is neither a directory here nor a model that can be had from the hub "
                f"({_reason(error)})",
                offline or "Check the spelling, the network and, for a gated model, your token (hf auth login).",
            ) from error
        raise UsageError(
            f"{argument}: the {what} of {name} does not load: {_reason(error)}", _REMEDIES[what]
        ) from error


_REMEDIES = {
    "config": "Check config.json, or copy the model again.",
    "tokenizer": "Copy the tokenizer's files again, or name another with --tokenizer.",
    "model": "Check that its config.json belongs to its weights, or copy the model again: a file may be cut off.",
}


def _reason(error: BaseException) -> str:
    """What an error of a library says, in a line."""
    if isinstance(error, KeyError):
        return f"the name {error} is unknown or missing"
    if isinstance(error, pickle.UnpicklingError):
        # It says at length how to load a file that one trusts and not why this one does not load.
        return "its weights are no checkpoint of PyTorch, or a damaged one"
    words = " ".join(str(error).split()) or "no message"
    # Anything else than these was not meant to be read without its kind.
    told = isinstance(error, (OSError, ImportError)) or type(error) in (ValueError, RuntimeError)
    words = words if told else f"{type(error).__name__}: {words}"
    return words if len(words) <= 300 else words[:297] + "..."

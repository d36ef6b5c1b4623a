"""Tiny random models, one for every family whose attention is patched, and inputs for them."""

from __future__ import annotations

import copy
import inspect
import os
from collections.abc import Callable

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

import embedkernels as ek

VOCAB, POSITIONS = 60, 40
_SHARED = {"vocab_size": VOCAB, "bos_token_id": 3, "eos_token_id": 2, "pad_token_id": 1}
_ENCODER = _SHARED | {
    "hidden_size": 32,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": POSITIONS,
    "type_vocab_size": 2,
}


def _encoder(config: type, model: type, **more: object) -> Callable[..., PreTrainedModel]:
    def build(layers: int, dropout: float) -> PreTrainedModel:
        probabilities = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
        return model(config(**(_ENCODER | {"num_hidden_layers": layers} | probabilities | more)))

    return build


def _distilbert(layers: int, dropout: float) -> PreTrainedModel:
    config = transformers.DistilBertConfig(
        **_SHARED,
        dim=32,
        n_heads=2,
        n_layers=layers,
        hidden_dim=48,
        max_position_embeddings=POSITIONS,
        dropout=dropout,
        attention_dropout=dropout,
    )
    return transformers.DistilBertModel(config)


def _modernbert(layers: int, dropout: float) -> PreTrainedModel:
    """A window of 3 tokens on either side in every layer but the first."""
    config = transformers.ModernBertConfig(
        **(_SHARED | {"cls_token_id": 3, "sep_token_id": 2}),
        hidden_size=32,
        num_attention_heads=2,
        num_hidden_layers=layers,
        intermediate_size=48,
        max_position_embeddings=POSITIONS,
        local_attention=6,
        global_attn_every_n_layers=3,
        embedding_dropout=dropout,
        attention_dropout=dropout,
        mlp_dropout=dropout,
    )
    return transformers.ModernBertModel(config)


def _gpt2(layers: int, dropout: float) -> PreTrainedModel:
    config = transformers.GPT2Config(
        **_SHARED,
        n_embd=32,
        n_head=2,
        n_layer=layers,
        n_positions=POSITIONS,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        resid_pdrop=dropout,
    )
    return transformers.GPT2Model(config)


def _rotary_decoder(config: type, model: type, **more: object) -> Callable[..., PreTrainedModel]:
    shared: dict[str, object] = {
        **_SHARED,
        "hidden_size": 32,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 48,
        "max_position_embeddings": POSITIONS,
    }

    def build(layers: int, dropout: float) -> PreTrainedModel:
        return model(config(**shared, num_hidden_layers=layers, attention_dropout=dropout, **more))

    return build


_BUILDERS: dict[str, Callable[..., PreTrainedModel]] = {
    "bert": _encoder(transformers.BertConfig, transformers.BertModel),
    "electra": _encoder(transformers.ElectraConfig, transformers.ElectraModel, embedding_size=32),
    "roberta": _encoder(transformers.RobertaConfig, transformers.RobertaModel),
    "xlm-roberta": _encoder(transformers.XLMRobertaConfig, transformers.XLMRobertaModel),
    "camembert": _encoder(transformers.CamembertConfig, transformers.CamembertModel),
    "albert": _encoder(transformers.AlbertConfig, transformers.AlbertModel, embedding_size=32),
    "distilbert": _distilbert,
    "modernbert": _modernbert,
    "gpt2": _gpt2,
    "llama": _rotary_decoder(transformers.LlamaConfig, transformers.LlamaModel),
    "mistral": _rotary_decoder(transformers.MistralConfig, transformers.MistralModel, head_dim=16, sliding_window=5),
    "qwen2": _rotary_decoder(transformers.Qwen2Config, transformers.Qwen2Model),
    "qwen3": _rotary_decoder(transformers.Qwen3Config, transformers.Qwen3Model, head_dim=16),
}
ALL = tuple(_BUILDERS)
# Those that a test of every model is about: few where only torch is another than in a run with all.
MODELS = ("bert", "roberta", "modernbert", "gpt2", "llama") if os.environ.get("EMBEDKERNELS_FEW_MODELS") else ALL
# Paths of the modules that patch changes.
ROTARY = ("llama", "mistral", "qwen2", "qwen3")
FUSED = dict.fromkeys(ALL, "embeddings") | {"gpt2": ""} | dict.fromkeys(ROTARY, "embed_tokens")
# Modules whose query and key are turned by rotary positions, in a model of one layer.
TURNED = dict.fromkeys(ROTARY, "layers.0.self_attn") | {"modernbert": "layers.0.attn"}
DECODERS = ("gpt2", *ROTARY)
TYPED = ("bert", "electra", "roberta", "xlm-roberta", "camembert")


def build(name: str, *, layers: int = 1, dropout: float = 0.0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A random model on the CPU whose every parameter is random, biases and norms too."""
    model = _BUILDERS[name](layers=layers, dropout=dropout)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.to(dtype).train()


def pair(name: str, device: torch.device | str = "cpu", **options: object) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A stock model and a patched copy of it."""
    stock = build(name, **options).to(device)
    patched = copy.deepcopy(stock)
    ek.patch(patched, strict=True)
    return stock, patched


def named_here(name: str, function: Callable[..., object]) -> str:
    """What the installed transformers calls an argument that is ``past_key_values(_length)`` before 5.24."""
    new = {"past_key_values": "cache", "past_key_values_length": "cache_length"}[name]
    return new if new in inspect.signature(function).parameters else name


def ids(batch: int = 3, length: int = 7) -> Tensor:
    """Token ids without padding."""
    return torch.randint(4, VOCAB, (batch, length))


def padded(batch: int = 3, length: int = 7, side: str = "right") -> dict[str, Tensor]:
    """Token ids and a mask, each row with another amount of padding on one side."""
    input_ids, mask = ids(batch, length), torch.ones(batch, length, dtype=torch.long)
    for row in range(1, batch):
        padding = slice(length - row, None) if side == "right" else slice(0, row)
        input_ids[row, padding], mask[row, padding] = 1, 0
    return {"input_ids": input_ids, "attention_mask": mask}


def on(device: torch.device, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inputs on a device."""
    return {key: value.to(device) for key, value in inputs.items()}

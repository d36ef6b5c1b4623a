"""Which Hugging Face classes can be fused, and how: one table. A new model is one row.

A row names the stock class that looks tokens up, the attributes that hold its parts and the recipe that fuses them
(``embedkernels.hf.fused``). Nothing of transformers is imported here: a module matches a row by the name of its class
and of the module that defines it.
"""

from __future__ import annotations

import functools
import sys
from dataclasses import dataclass
from typing import Literal

from torch import nn

Recipe = Literal["stem", "inline", "lookup"]


@dataclass(frozen=True)
class Adapter:
    """One row of the table.

    Attributes:
        model: the model's name in reports.
        model_type: ``config.model_type``. Models of this type hand the attention mask to the attention function as
            they got it, so it may have the compact form of ``embedkernels.hf.masks``.
        module: the transformers module that defines the model.
        cls: the class to fuse, in ``module``.
        recipe: ``"stem"``: a module of its own whose whole forward is one fused op. ``"inline"``: a model that adds
            positions and drops out at the start of its forward. ``"lookup"``: a model that only looks tokens up.
        tokens, positions, types, norm, dropout: attributes of ``cls`` that hold the parts; None where it has none.
        position_rule: where position ids come from if none are given: ``"arange"`` or, counting the tokens that are
            not padding, ``"padding"``.
    """

    model: str
    model_type: str
    module: str
    cls: str
    recipe: Recipe
    tokens: str
    positions: str | None = None
    types: str | None = None
    norm: str | None = None
    dropout: str | None = None
    position_rule: Literal["arange", "padding"] = "arange"

    @functools.cached_property
    def tables(self) -> tuple[str, ...]:
        """The attributes that hold embedding tables."""
        return tuple(part for part in (self.tokens, self.positions, self.types) if part is not None)

    @property
    def formula(self) -> str:
        """What is computed in one pass, for people."""
        summands = [word for word, part in (("position", self.positions), ("type", self.types)) if part]
        steps = [" + ".join(["token", *summands])]
        steps += ["norm"] * (self.norm is not None) + ["dropout"] * (self.dropout is not None)
        return " -> ".join(steps)

    @property
    def ops(self) -> tuple[str, ...]:
        """The ops that the fused forward and backward call (keys of ``embedkernels.ops.backend.SUPPORTED``)."""
        return ("embedding" if self.recipe == "lookup" else "embed", "embedding_grad")


def _bert_like(model: str, model_type: str, module: str, cls: str, **more: str) -> Adapter:
    return Adapter(
        model,
        model_type,
        f"transformers.models.{module}",
        cls,
        "stem",
        "word_embeddings",
        "position_embeddings",
        "token_type_embeddings",
        "LayerNorm",
        "dropout",
        **more,  # type: ignore[arg-type]
    )


ADAPTERS: tuple[Adapter, ...] = (
    _bert_like("BERT", "bert", "bert.modeling_bert", "BertEmbeddings"),
    _bert_like("ELECTRA", "electra", "electra.modeling_electra", "ElectraEmbeddings"),
    _bert_like("RoBERTa", "roberta", "roberta.modeling_roberta", "RobertaEmbeddings", position_rule="padding"),
    _bert_like(
        "XLM-RoBERTa",
        "xlm-roberta",
        "xlm_roberta.modeling_xlm_roberta",
        "XLMRobertaEmbeddings",
        position_rule="padding",
    ),
    _bert_like(
        "CamemBERT", "camembert", "camembert.modeling_camembert", "CamembertEmbeddings", position_rule="padding"
    ),
    Adapter(
        "DistilBERT",
        "distilbert",
        "transformers.models.distilbert.modeling_distilbert",
        "Embeddings",
        "stem",
        "word_embeddings",
        "position_embeddings",
        norm="LayerNorm",
        dropout="dropout",
    ),
    Adapter(
        "GPT-2",
        "gpt2",
        "transformers.models.gpt2.modeling_gpt2",
        "GPT2Model",
        "inline",
        "wte",
        "wpe",
        dropout="drop",
    ),
    Adapter(
        "Llama", "llama", "transformers.models.llama.modeling_llama", "LlamaModel", "lookup", tokens="embed_tokens"
    ),
)

_BY_CLASS = {(adapter.module, adapter.cls): adapter for adapter in ADAPTERS}
_BY_MODULE = {adapter.module: adapter for adapter in ADAPTERS}
MODEL_TYPES = frozenset(adapter.model_type for adapter in ADAPTERS)


def supported() -> str:
    """The models of the table, for messages."""
    return ", ".join(adapter.model for adapter in ADAPTERS)


def adapter_for(cls: type[nn.Module]) -> Adapter | None:
    """The row whose stock class is exactly ``cls``; None for a subclass."""
    adapter = _BY_CLASS.get((cls.__module__, cls.__qualname__))
    if adapter is None or getattr(sys.modules.get(cls.__module__), cls.__qualname__, None) is not cls:
        return None
    return adapter


def base_adapter(cls: type[nn.Module]) -> Adapter | None:
    """The row of the first base of ``cls`` that has one."""
    return next((row for row in map(adapter_for, cls.__mro__[1:]) if row is not None), None)


def family_of(module: nn.Module) -> Adapter | None:
    """The row of the model that ``module`` belongs to: its class or a base of it is defined in the row's module."""
    for base in type(module).__mro__:
        if base.__module__ in _BY_MODULE:
            return _BY_MODULE[base.__module__]
    return None

"""Fused input embeddings, attention and embedding gradients for fine-tuning Hugging Face text models.

The public names are loaded on first use, so that ``import embedkernels`` costs nothing and works on machines
that have neither Triton nor transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "attention": "embedkernels.ops.attention",
    "check_errors": "embedkernels.ops.ids",
    "count_positions": "embedkernels.ops.positions",
    "embed": "embedkernels.ops.embed",
    "embedding": "embedkernels.ops.embedding",
    "embedding_grad": "embedkernels.ops.embedding_grad",
    "embedding_plan": "embedkernels.ops.embedding_plan",
    "rope": "embedkernels.ops.rope",
    "use_backend": "embedkernels.ops.backend",
    "EmbeddingPlan": "embedkernels.ops.embedding_plan",
    "FusedEmbedding": "embedkernels.nn.embedding",
    "FusedInputEmbeddings": "embedkernels.nn.input_embeddings",
    "FusedMultiheadAttention": "embedkernels.nn.multihead_attention",
    "RowGradient": "embedkernels.ops.embedding_grad",
    "patch": "embedkernels.hf.patch",
    "unpatch": "embedkernels.hf.patch",
}
_SUBPACKAGES = ("hf", "nn", "ops", "reference")

__all__ = [
    "EmbeddingPlan",
    "FusedEmbedding",
    "FusedInputEmbeddings",
    "FusedMultiheadAttention",
    "RowGradient",
    "__version__",
    "attention",
    "check_errors",
    "count_positions",
    "embed",
    "embedding",
    "embedding_grad",
    "embedding_plan",
    "patch",
    "rope",
    "unpatch",
    "use_backend",
]

if TYPE_CHECKING:
    from embedkernels.hf.patch import patch, unpatch
    from embedkernels.nn.embedding import FusedEmbedding
    from embedkernels.nn.input_embeddings import FusedInputEmbeddings
    from embedkernels.nn.multihead_attention import FusedMultiheadAttention
    from embedkernels.ops.attention import attention
    from embedkernels.ops.backend import use_backend
    from embedkernels.ops.embed import embed
    from embedkernels.ops.embedding import embedding
    from embedkernels.ops.embedding_grad import RowGradient, embedding_grad
    from embedkernels.ops.embedding_plan import EmbeddingPlan, embedding_plan
    from embedkernels.ops.ids import check_errors
    from embedkernels.ops.positions import count_positions
    from embedkernels.ops.rope import rope


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(importlib.import_module(_HOME[name]), name)
    elif name in _SUBPACKAGES:
        value = importlib.import_module(f"embedkernels.{name}")
    else:
        raise AttributeError(f"module 'embedkernels' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME, *_SUBPACKAGES})

"""Drop-in modules."""

from embedkernels.nn.embedding import FusedEmbedding
from embedkernels.nn.input_embeddings import FusedInputEmbeddings
from embedkernels.nn.multihead_attention import FusedMultiheadAttention

__all__ = ["FusedEmbedding", "FusedInputEmbeddings", "FusedMultiheadAttention"]

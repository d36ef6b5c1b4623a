"""Drop-in modules."""

from embedkernels.nn.embedding import FusedEmbedding
from embedkernels.nn.input_embeddings import FusedInputEmbeddings

__all__ = ["FusedEmbedding", "FusedInputEmbeddings"]

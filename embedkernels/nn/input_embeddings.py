"""The input embeddings of a transformer as one module."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from embedkernels.ops.embed import embed
from embedkernels.ops.embedding_grad import normalized_padding
from embedkernels.ops.positions import count_positions


class FusedInputEmbeddings(nn.Module):
    """Token + position + token type rows, LayerNorm and dropout in one pass: :func:`embedkernels.embed` as a module.

    The children are named as in Hugging Face's ``BertEmbeddings`` (``word_embeddings``, ``position_embeddings``,
    ``token_type_embeddings``, ``LayerNorm``, ``dropout``), so its ``state_dict`` loads; they hold the parameters and
    the dropout probability, their own ``forward`` and hooks do not run.

    Args:
        num_embeddings: V, rows of the token table.
        embedding_dim: D.
        max_positions: rows of the position table; None for no positions.
        num_types: rows of the token type table; None for no types.
        norm: ``"layer"`` or None.
        norm_eps: added to the variance.
        dropout: probability, applied in training mode.
        padding_idx: token id whose row is initialised with zeros and gets no gradient. Negative values count from the
            end.
        positions: ``"arange"``: position_start + s at the s-th place. ``"padding"``: RoBERTa's count of the tokens
            that are not padding, from padding_idx + 1 on; padding has position padding_idx, whose row gets no
            gradient. Needs ``padding_idx`` and ``max_positions`` above padding_idx + 1.
        device, dtype: of the parameters.

    Shape:
        ids (..., S) -> (..., S, D)

    Raises:
        TypeError: padding_idx that is not an int.
        ValueError: settings that do not fit together.

    Example:
        >>> import torch, embedkernels as ek
        >>> stem = ek.FusedInputEmbeddings(30522, 384, max_positions=512, num_types=2, padding_idx=0)
        >>> stem(torch.tensor([[101, 7592, 102, 0]])).shape
        torch.Size([1, 4, 384])
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        max_positions: int | None = None,
        num_types: int | None = None,
        norm: str | None = "layer",
        norm_eps: float = 1e-12,
        dropout: float = 0.1,
        padding_idx: int | None = None,
        positions: Literal["arange", "padding"] = "arange",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        if norm not in (None, "layer"):
            raise ValueError(f"{name}: norm must be None or 'layer', got {norm!r}")
        if positions not in ("arange", "padding"):
            raise ValueError(f"{name}: positions must be 'arange' or 'padding', got {positions!r}")
        if padding_idx is not None:
            padding_idx = normalized_padding(padding_idx, num_embeddings, name)
        counted = positions == "padding"
        if counted and (padding_idx is None or max_positions is None):
            raise ValueError(f"{name}: positions 'padding' needs padding_idx and max_positions")
        if counted and padding_idx + 1 >= max_positions:  # type: ignore[operator]
            raise ValueError(
                f"{name}: positions 'padding' counts from padding_idx + 1 = {padding_idx + 1} on, "  # type: ignore[operator]
                f"but max_positions is {max_positions}: expected more"
            )
        self.norm = norm
        self.positions = positions
        self.word_embeddings = nn.Embedding(num_embeddings, embedding_dim, padding_idx, device=device, dtype=dtype)
        self.position_embeddings = None
        if max_positions is not None:
            self.position_embeddings = nn.Embedding(
                max_positions, embedding_dim, padding_idx if counted else None, device=device, dtype=dtype
            )
        self.token_type_embeddings = None
        if num_types is not None:
            self.token_type_embeddings = nn.Embedding(num_types, embedding_dim, device=device, dtype=dtype)
        self.LayerNorm = None
        if norm is not None:
            self.LayerNorm = nn.LayerNorm(embedding_dim, eps=norm_eps, device=device, dtype=dtype)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        ids: Tensor,
        *,
        position_ids: Tensor | None = None,
        type_ids: Tensor | None = None,
        position_start: int = 0,
    ) -> Tensor:
        """Embed token ids.

        Args:
            ids: int32 or int64, (..., S).
            position_ids: broadcastable to the shape of ``ids``; None for what ``positions`` says.
            type_ids: broadcastable to the shape of ``ids``; None for type 0.
            position_start: number of tokens before these, for decoding with a cache.

        Returns:
            (..., S, D).

        Raises:
            IndexError, TypeError, ValueError: as :func:`embedkernels.embed`.
        """
        words, places, types, norm = (
            self.word_embeddings, self.position_embeddings, self.token_type_embeddings, self.LayerNorm
        )  # fmt: skip
        if self.positions == "padding" and position_ids is None:
            assert words.padding_idx is not None
            position_ids = count_positions(
                ids, padding_idx=words.padding_idx, start=words.padding_idx + position_start,
                padding_position=words.padding_idx,
            )  # fmt: skip
            position_start = 0
        return embed(
            ids,
            words.weight,
            position_weight=None if places is None else places.weight,
            position_ids=position_ids,
            position_start=position_start,
            type_weight=None if types is None else types.weight,
            type_ids=type_ids,
            norm=self.norm,
            norm_weight=None if norm is None else norm.weight,
            norm_bias=None if norm is None else norm.bias,
            norm_eps=1e-12 if norm is None else norm.eps,
            dropout_p=self.dropout.p if self.training else 0.0,
            padding_idx=words.padding_idx,
            position_padding_idx=None if places is None else places.padding_idx,
        )

    def extra_repr(self) -> str:
        return f"norm={self.norm!r}, positions={self.positions!r}"

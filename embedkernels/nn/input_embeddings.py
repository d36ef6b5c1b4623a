"""The input embeddings of a transformer as one module."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from embedkernels.ops.arguments import checked_int
from embedkernels.ops.embed import embed
from embedkernels.ops.embed_checks import checked_scale
from embedkernels.ops.embedding_plan import normalized_padding
from embedkernels.ops.positions import count_positions
from embedkernels.reference.sinusoids import LAYOUTS


class FusedInputEmbeddings(nn.Module):
    """Token + position + token type rows, norm and dropout in one pass: :func:`embedkernels.embed` as a module.

    The children are named as in Hugging Face's ``BertEmbeddings`` (``word_embeddings``, ``position_embeddings``,
    ``token_type_embeddings``, ``LayerNorm``, ``dropout``), so its ``state_dict`` loads; they hold the parameters and
    the dropout probability, their own ``forward`` and hooks do not run.

    Args:
        num_embeddings: V, rows of the token table.
        embedding_dim: D.
        max_positions: rows of the position table; None for no table.
        num_types: rows of the token type table; None for no types.
        norm: ``"layer"``, ``"rms"`` or None.
        norm_eps: added to the variance or the mean square.
        dropout: probability, applied in training mode.
        dropout_first: drop before the norm.
        scale: factor of the token rows (BART's and Gemma's is the square root of D).
        padding_idx: token id whose row is initialised with zeros and gets no gradient. Negative values count from the
            end.
        positions: ``"arange"``: position_start + s at the s-th place. ``"padding"``: RoBERTa's count of the tokens
            that are not padding, from padding_idx + 1 on; padding has position padding_idx, whose row gets no
            gradient. Needs ``padding_idx`` and ``max_positions`` above padding_idx + 1. ``"interleaved"``,
            ``"halves"``, ``"fairseq"``: fixed sinusoids (see :func:`embedkernels.embed`), without a table.
        position_offset: added to every position that is not given (BART and OPT: 2, with a table that has 2 more
            rows). Not with ``"padding"``.
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
        dropout_first: bool = False,
        scale: float = 1.0,
        padding_idx: int | None = None,
        positions: Literal["arange", "padding", "interleaved", "halves", "fairseq"] = "arange",
        position_offset: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        if norm not in (None, "layer", "rms"):
            raise ValueError(f"{name}: norm must be None, 'layer' or 'rms', got {norm!r}")
        if positions not in ("arange", "padding", *LAYOUTS):
            raise ValueError(f"{name}: positions must be arange, padding, {', '.join(LAYOUTS)}, got {positions!r}")
        if positions in LAYOUTS and max_positions is not None:
            raise ValueError(f"{name}: positions {positions!r} have no table: max_positions must be None")
        if checked_int(position_offset, "position_offset", name) < 0 or (position_offset and positions == "padding"):
            raise ValueError(f"{name}: position_offset must not be negative, and 0 with positions 'padding'")
        if position_offset and positions == "arange" and max_positions is None:
            raise ValueError(f"{name}: position_offset is {position_offset}, but there are no positions")
        self.scale = checked_scale(scale, name)
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
        self.norm_eps = norm_eps
        self.dropout_first = dropout_first
        self.positions = positions
        self.position_offset = position_offset
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
            kind = nn.LayerNorm if norm == "layer" else nn.RMSNorm
            self.LayerNorm = kind(embedding_dim, eps=norm_eps, device=device, dtype=dtype)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        ids: Tensor | None,
        *,
        inputs_embeds: Tensor | None = None,
        position_ids: Tensor | None = None,
        type_ids: Tensor | None = None,
        position_start: int = 0,
        extra: Tensor | None = None,
        mask: Tensor | None = None,
        packed: Tensor | None = None,
    ) -> Tensor:
        """Embed token ids.

        Args:
            ids: int32 or int64, (..., S); None with ``inputs_embeds``.
            inputs_embeds: (..., S, D), rows in the place of the token table's; positions are then those of
                ``"arange"`` where ``positions`` would count padding, as in Hugging Face's RoBERTa.
            position_ids: broadcastable to the shape of ``ids``; None for what ``positions`` says.
            type_ids: broadcastable to the shape of ``ids``; None for type 0.
            position_start: number of tokens before these, for decoding with a cache; nothing without positions.
            extra: broadcastable to (..., S, D), added last.
            mask: broadcastable to (..., S), the factor of every row.
            packed: (M,), the places of the rows to make, see :func:`embedkernels.embed`.

        Returns:
            (..., S, D), or (M, D) with ``packed``.

        Raises:
            IndexError, TypeError, ValueError: as :func:`embedkernels.embed`.
        """
        words, places, types, norm = (
            self.word_embeddings, self.position_embeddings, self.token_type_embeddings, self.LayerNorm
        )  # fmt: skip
        start = position_start if position_ids is not None else position_start + self.position_offset
        if self.positions == "padding" and position_ids is None:
            assert words.padding_idx is not None
            start = words.padding_idx + position_start
            if ids is None:
                start += 1
            else:
                position_ids = count_positions(
                    ids, padding_idx=words.padding_idx, start=start, padding_position=words.padding_idx
                )
                start = 0
        sinusoids = self.positions if self.positions in LAYOUTS else None
        has_positions = places is not None or sinusoids is not None
        return embed(
            ids,
            words.weight if inputs_embeds is None else None,
            inputs_embeds=inputs_embeds,
            scale=self.scale,
            position_weight=None if places is None else places.weight,
            sinusoids=sinusoids,
            position_ids=position_ids,
            position_start=start if position_ids is not None or has_positions else 0,
            type_weight=None if types is None else types.weight,
            type_ids=type_ids,
            extra=extra,
            norm=self.norm,
            norm_weight=None if norm is None else norm.weight,
            norm_bias=getattr(norm, "bias", None),
            norm_eps=self.norm_eps,
            dropout_p=self.dropout.p if self.training else 0.0,
            dropout_first=self.dropout_first,
            mask=mask,
            packed=packed,
            padding_idx=words.padding_idx if inputs_embeds is None else None,
            position_padding_idx=None if places is None else places.padding_idx,
        )

    def extra_repr(self) -> str:
        shown = f"norm={self.norm!r}, positions={self.positions!r}"
        shown += f", scale={self.scale:g}" if self.scale != 1.0 else ""
        shown += f", position_offset={self.position_offset}" if self.position_offset else ""
        return shown + (", dropout_first=True" if self.dropout_first else "")

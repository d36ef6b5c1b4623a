"""What is measured, as data: sizes, distributions of ids, dtypes. One row per case, most important first.

A suite that runs out of time drops rows from its end. N ids, V rows of a table, D width or head size, B batch,
S sequence, H heads.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

HOT_SHARE = 0.5
FILL = 0.53  # share of tokens that are not padding in batches of reviews or questions padded to their longest


@dataclass(frozen=True)
class AttentionCase:
    """Scaled dot-product attention; ``fill`` < 1 pads the keys of every sequence to a different length.

    ``window``: keys that a query sees on its left and right, beside its own. ``packed``: the real tokens of all
    sequences lie in one row, as documents.
    """

    name: str
    batch: int
    length: int
    heads: int
    kv_heads: int
    width: int
    causal: bool = False
    fill: float = 1.0
    dropout: float = 0.0
    dtype: str = "bfloat16"
    window: tuple[int, int] | None = None
    packed: bool = False

    def tiny(self) -> AttentionCase:
        kv_heads = 1 if self.kv_heads < self.heads else 2
        window = None if self.window is None else (3, 2)
        return replace(self, batch=2, length=17, heads=2, kv_heads=kv_heads, width=16, window=window)


@dataclass(frozen=True)
class RopeCase:
    """Rotary positions of query and key, with fp32 or 16-bit tables of the head's width."""

    name: str
    batch: int
    length: int
    heads: int
    kv_heads: int
    width: int
    interleaved: bool = False
    dtype: str = "bfloat16"
    tables: str = "bfloat16"
    dropout: float = 0.0

    def tiny(self) -> RopeCase:
        return replace(self, batch=2, length=17, heads=2, kv_heads=1, width=16)


@dataclass(frozen=True)
class StepCase:
    """One fine-tuning step of a randomly initialised BERT classifier: forward, backward, AdamW."""

    name: str
    batch: int
    length: int
    layers: int = 12
    width: int = 768
    heads: int = 12
    rows: int = 30522
    fill: float = FILL
    dropout: float = 0.1
    precision: str = "bf16"  # autocast over fp32 parameters, as the Trainer's bf16=True; or fp32
    compiled: bool = True  # compare with torch.compile, whose compilation costs more than all the rest

    def tiny(self) -> StepCase:
        return replace(self, batch=2, length=12, layers=2, width=32, heads=2, rows=67)


ATTENTION = (
    AttentionCase("bert-base 128 padded", 32, 128, 12, 12, 64, fill=FILL, dropout=0.1),
    AttentionCase("bert-base 512 padded", 16, 512, 12, 12, 64, fill=FILL, dropout=0.1),
    AttentionCase("bert-large 384 padded", 16, 384, 16, 16, 64, fill=FILL, dropout=0.1),
    AttentionCase("llama-1b 2k causal", 4, 2048, 32, 8, 64, causal=True),
    AttentionCase("bert-base 512 full", 16, 512, 12, 12, 64),
    AttentionCase("llama-8b 2k causal", 2, 2048, 32, 8, 128, causal=True),
    AttentionCase("llama-1b 2k causal padded", 4, 2048, 32, 8, 64, causal=True, fill=FILL),
    AttentionCase("bert-base 512 packed", 16, 512, 12, 12, 64, fill=FILL, packed=True),
    AttentionCase("llama-1b 2k causal packed", 4, 2048, 32, 8, 64, causal=True, fill=FILL, packed=True),
    AttentionCase("bert-base 128 full", 32, 128, 12, 12, 64),
    AttentionCase("modernbert 1k window", 8, 1024, 12, 12, 64, window=(64, 64)),
    AttentionCase("bert-base 128 padded fp32", 32, 128, 12, 12, 64, fill=FILL, dropout=0.1, dtype="float32"),
)
ROPE = (
    RopeCase("llama-8b 2k", 8, 2048, 32, 8, 128),
    RopeCase("llama-1b 2k", 8, 2048, 32, 8, 64),
    RopeCase("llama-1b 128", 4, 128, 32, 8, 64),
    RopeCase("cohere 2k interleaved", 8, 2048, 32, 8, 128, interleaved=True, tables="float32"),
)
STEP = (
    StepCase("bert-base 32x128 bf16", 32, 128),
    StepCase("bert-base 32x128 fp32", 32, 128, precision="fp32", compiled=False),
)


def make_ids(count: int, rows: int, distribution: str, generator: torch.Generator) -> Tensor:
    """``count`` int64 ids in [1, rows) on the CPU; id 0 is left to padding.

    Args:
        distribution: ``"uniform"``; ``"zipf"``, the frequency of the k-th most frequent id is proportional to 1/k, as
            in text; ``"hot"``, zipf with half of all ids replaced by one.
    """
    if distribution == "uniform":
        return torch.randint(1, rows, (count,), generator=generator)
    if distribution not in ("zipf", "hot"):
        raise ValueError(f"distribution must be uniform, zipf or hot, got {distribution!r}")
    cumulative = torch.arange(1, rows, dtype=torch.float64).reciprocal().cumsum(0)
    drawn = torch.rand(count, dtype=torch.float64, generator=generator) * cumulative[-1]
    ranks = torch.searchsorted(cumulative, drawn).clamp_(max=rows - 2)
    # Frequent ids are spread over the table: their order in real vocabularies differs from one to the next.
    ids = (torch.randperm(rows - 1, generator=generator) + 1)[ranks]
    if distribution == "hot":
        ids[torch.rand(count, generator=generator) < HOT_SHARE] = ids[0].clone()
    return ids


def make_lengths(batch: int, length: int, fill: float) -> Tensor:
    """int32 (batch,): lengths spread evenly so that the longest is ``length`` and the mean ``fill`` of it."""
    if not 0.5 < fill <= 1:
        raise ValueError(f"fill must be in (0.5, 1], got {fill}")
    shortest = 2 * fill - 1
    shares = torch.linspace(shortest, 1.0, batch) if batch > 1 else torch.ones(1)
    return (shares * length).round().clamp_(min=1).to(torch.int32)

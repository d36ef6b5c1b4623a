"""Positions: the tables that models look them up in, and how they are counted over tokens that are not padding."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from embedkernels.hf.adapters import of_transformers
from embedkernels.hf.bodies import fingerprint_of
from embedkernels.ops.positions import count_positions


class PositionTable(NamedTuple):
    """A module of transformers' own that looks positions up, counting them from the number of tokens in a cache on.

    Attributes:
        example: a class that has it.
        bodies: fingerprints of its forward.
        offset: attribute with what is added to every position; None for nothing.
        learned: whether gradients reach the table.
        rows: attribute that holds the table.
        counts: it counts the tokens that are not padding, by its method, instead of all.
        grows: its forward makes the table longer where a sequence needs it.
    """

    example: str
    bodies: tuple[str, ...]
    offset: str | None = None
    learned: bool = True
    rows: str = "weight"
    counts: bool = False
    grows: bool = False


POSITION_TABLES = (
    PositionTable("bart.BartLearnedPositionalEmbedding", ("8782d1730dfe",), "offset"),
    PositionTable("blenderbot.BlenderbotLearnedPositionalEmbedding", ("953ba78701c5",)),
    PositionTable("led.LEDLearnedPositionalEmbedding", ("ec7072d59b8b",)),
    PositionTable("whisper.WhisperPositionalEmbedding", ("008431bde53a",)),
    # It counts by an attention mask where it is given no positions, which its models never do.
    PositionTable("opt.OPTLearnedPositionalEmbedding", ("d9db7c9f8f1b",), "offset"),
    PositionTable("marian.MarianSinusoidalPositionalEmbedding", ("6b9d268e2aaa",), learned=False),
    PositionTable(
        "xglm.XGLMSinusoidalPositionalEmbedding",
        ("5aa1779eab61", "d94d016f9d64"),
        "offset",
        learned=False,
        rows="weights",
        grows=True,
    ),
    PositionTable(
        "m2m_100.M2M100SinusoidalPositionalEmbedding",
        ("699087cb44e6", "b6bbea0e38d5"),
        learned=False,
        rows="weights",
        counts=True,
        grows=True,
    ),
)
_BY_BODY = {body: table for table in POSITION_TABLES for body in table.bodies}

# What stock calls the function, or the method, that counts; and those that count as ek.count_positions does: from
# padding_idx + 1, plus the tokens in a cache, and padding_idx for padding.
COUNT = "create_position_ids_from_input_ids"
_COUNTING = frozenset({"5438d6763fb4", "6064e710ee46", "600015ea6ad0", "9f6593b00e03"})


def position_table(cls: type) -> PositionTable | None:
    """The row of a class that looks positions up."""
    if not of_transformers(cls):
        return None
    return _table(cls.__mro__[1], cls.__dict__.get("forward"), getattr(cls, COUNT, None))


@functools.cache
def _table(base: type, forward: Any, count: Any) -> PositionTable | None:
    table = None if forward is None else _BY_BODY.get(fingerprint_of(forward) or "")
    if table is None or base is not (nn.Embedding if table.rows == "weight" else nn.Module):
        return None
    return None if table.counts and fingerprint_of(count) not in _COUNTING else table


def rows(part: Any) -> Tensor:
    """The table of a part that looks up, tokens or positions."""
    table = None if isinstance(part, nn.Embedding) else position_table(type(part))
    weight: Tensor = part.weight if table is None else getattr(part, table.rows)
    return weight


def known_count(function: Callable[..., Any], padding_idx: Any, past: Any) -> bool:
    """Whether what ``function`` of transformers counts is what :func:`padding_counted` does."""
    plain = isinstance(padding_idx, int) and isinstance(past, int)
    return plain and fingerprint_of(function) in _COUNTING


def padding_counted(input_ids: Tensor, padding_idx: int, past: int) -> Tensor:
    """Positions from padding_idx + 1 on, after ``past`` tokens; padding_idx for padding."""
    return count_positions(input_ids, padding_idx=padding_idx, start=padding_idx + past, padding_position=padding_idx)


def counted(past: Any, input_ids: Tensor, first: int = 0) -> tuple[Tensor | None, int]:
    """Position ids for S tokens after ``past``, and a start: ids are needed only where the past is on the device.

    ``first`` is the position of the first token there was.
    """
    if isinstance(past, Tensor):
        count = torch.arange(first, first + input_ids.shape[1], device=input_ids.device)
        return (count + past.to(input_ids.device)).unsqueeze(0), 0
    return None, past + first


def places(
    part: Any, rule: str, input_ids: Tensor, given: Tensor | None, past: Any, mask: Any
) -> tuple[Tensor | None, int, str | None]:
    """Where a model's forward looks in its table of positions: ids or a start, and why it must say so itself.

    Args:
        part: the table.
        rule: the ``position_rule`` of the model's row.
        input_ids: (B, S).
        given: position ids of the call, or None.
        past: how many tokens are in the cache, a number or a tensor.
        mask: the attention mask of the call, or None.
    """
    table = position_table(type(part))
    offset = 0 if table is None or table.offset is None else int(getattr(part, table.offset))
    counts = table is not None and table.counts
    if table is not None and table.grows:
        first = part.padding_idx + 1 if counts else offset
        if isinstance(past, Tensor):
            return None, 0, "the length of the cache is on the device, and its positions may be more than there are"
        if first + past + input_ids.shape[1] > rows(part).shape[0]:
            return None, 0, "its table of positions has to grow for the call"
    if counts:
        return padding_counted(input_ids, part.padding_idx, past), 0, None
    if given is not None:
        return given + offset if offset else given, 0, None
    if rule == "mask" and mask is not None:
        if isinstance(past, Tensor):
            return None, 0, "the length of the cache is on the device"
        if mask.shape != (input_ids.shape[0], past + input_ids.shape[1]) or mask.is_floating_point():
            return None, 0, "attention_mask is not of the shape of all tokens, or not of integers"
        # What is no padding is 1, as everywhere in transformers: another number would be a factor of the positions.
        return count_positions(mask, start=offset - 1, padding_position=offset - 1, skip=past), 0, None
    return *counted(past, input_ids, offset), None

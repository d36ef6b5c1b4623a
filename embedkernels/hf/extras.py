"""Rows that a front end adds beside those of tokens, positions and types: ``extra`` of ``embedkernels.embed``.

They come from tables of their own, which are looked up one by one, and are added in the op that reads the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Extra:
    """One kind of rows.

    Attributes:
        arguments: of the forward, that the rows are made from.
        required: those without which stock cannot make them either.
        rows: from the module, the arguments of a call by name, and its ids, (B, S), or their rows, (B, S, D): what
            broadcasts to (B, S, D), or
            None where the module has no such rows.
    """

    arguments: tuple[str, ...]
    required: tuple[str, ...]
    rows: Callable[[Any, dict[str, Any], Tensor], Tensor | None]


def _task_types(module: Any, call: dict[str, Any], tokens: Tensor) -> Tensor | None:
    """ERNIE's: of task 0 where none is given, a row that all places share."""
    if not module.use_task_id:
        return None
    tasks = call.get("task_type_ids")
    if tasks is None:
        tasks = torch.zeros(1, 1, dtype=torch.long, device=tokens.device)
    rows: Tensor = module.task_type_embeddings(tasks)
    return rows


def _boxes(module: Any, call: dict[str, Any], tokens: Tensor) -> Tensor:  # noqa: ARG001
    """LayoutLMv3's: six rows, of a box's coordinates and size, one after the other."""
    rows: Tensor = module.calculate_spatial_position_embeddings(call["bbox"])
    return rows


def _xpaths(module: Any, call: dict[str, Any], tokens: Tensor) -> Tensor:
    """MarkupLM's: what its own module makes of the path of tags above a token."""
    path: list[Tensor] = []
    for name, padding in (("xpath_tags_seq", "tag_pad_id"), ("xpath_subs_seq", "subs_pad_id")):
        given = call.get(name)
        if given is None:
            size = (*tokens.shape[:2], module.max_depth)
            given = torch.full(size, getattr(module.config, padding), dtype=torch.long, device=tokens.device)
        path.append(given)
    rows: Tensor = module.xpath_embeddings(*path)
    return rows


EXTRAS = {
    "task type": Extra(("task_type_ids",), (), _task_types),
    "boxes": Extra(("bbox",), ("bbox",), _boxes),
    "xpath": Extra(("xpath_tags_seq", "xpath_subs_seq"), (), _xpaths),
}

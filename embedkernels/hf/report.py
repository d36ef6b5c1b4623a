"""What ``patch`` did to a model and what it left alone, for people and for machines."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from embedkernels.ops.embedding_grad import Mode

Status = Literal["patched", "already", "falls back", "left alone"]


@dataclass(frozen=True)
class OpChoice:
    """Where an op runs.

    Attributes:
        op: the op's name.
        device: the device type of the module's parameters.
        backend: ``"extension"``, ``"triton"`` or ``"torch"``.
        reason: why this one, in a sentence.
    """

    op: str
    device: str
    backend: str
    reason: str


@dataclass(frozen=True)
class Entry:
    """One module, or the attention of one model.

    Attributes:
        path: the module's name in the model; empty for the model itself.
        part: ``"embeddings"``, ``"rotary"``, ``"attention"`` or ``"padding"``.
        was: the stock class, or the attention implementation before.
        now: what is computed now.
        status: ``"patched"``: changed by this call. ``"already"``: changed before. ``"falls back"``: patched, but
            at present its stock forward runs. ``"left alone"``: not changed.
        reason: why it falls back or was left alone.
        ops: the ops that it calls and where they run.
        grad_mode: what the gradients of its tables are, ``"dense"``, ``"accumulate"`` or ``"rows"``; None where no op
            of ours makes them.
    """

    path: str
    part: Literal["embeddings", "rotary", "attention", "padding"]
    was: str
    now: str
    status: Status
    reason: str = ""
    ops: tuple[OpChoice, ...] = ()
    grad_mode: Mode | None = None


@dataclass(frozen=True)
class PatchReport:
    """What was patched. ``print(report)`` shows a table, ``report.to_dict()`` is for JSON.

    Attributes:
        model: the class of the model.
        entries: one per module concerned.
    """

    model: str
    entries: tuple[Entry, ...] = field(default=())

    @property
    def active(self) -> bool:
        """Whether anything in the model runs fused now."""
        return any(entry.status in ("patched", "already") for entry in self.entries)

    def to_dict(self) -> dict[str, Any]:
        """The report in lists, dicts and strings."""
        return {"model": self.model, "active": self.active, "entries": [_plain(asdict(e)) for e in self.entries]}

    def __str__(self) -> str:
        lines = [f"embedkernels: {self.model}"]
        if not self.entries:
            return lines[0] + ": nothing to patch"
        header = ("module", "part", "was", "now", "runs on", "status")
        rows = [header, *_rows(self.entries)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
        rows.insert(1, tuple("-" * width for width in widths))
        lines += [
            "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        reasons = dict.fromkeys(
            [f"{_numberless(e)} {e.part} {e.status}: {e.reason}" for e in self.entries if e.reason]
            + [f"{o.op} on {o.device} runs on {o.backend}: {o.reason}" for e in self.entries for o in e.ops]
        )
        return "\n".join([*lines, *(f"  {reason}" for reason in reasons)])


def _plain(entry: dict[str, Any]) -> dict[str, Any]:
    entry["ops"] = list(entry["ops"])
    return entry


def _rows(entries: tuple[Entry, ...]) -> list[tuple[str, ...]]:
    """A row for every entry, one for those that differ in the number of their layer alone."""
    paths: dict[tuple[str, ...], list[Entry]] = {}
    for entry in entries:
        backends = ", ".join(f"{op.op}: {op.backend}" for op in entry.ops)
        cells = (entry.part, entry.was, entry.now, backends or "-", entry.status)
        paths.setdefault((_numberless(entry), *cells), []).append(entry)
    return [
        (f"{path} ({len(same)})" if len(same) > 1 else same[0].path or path, *cells)
        for (path, *cells), same in paths.items()
    ]


def _numberless(entry: Entry) -> str:
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", entry.path) or "(model)"

"""What the library promises to be on an H100, as data, and which of it a report shows to be met.

The numbers are those of the project's design; a goal that a report has not measured is said to be so.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from bench.ceilings import share_of_ceiling

Kind = Literal["faster", "share", "microseconds", "alike", "host"]
MEASURED_ON = "NVIDIA H100"


@dataclass(frozen=True)
class Goal:
    """One promise.

    Attributes:
        part: of the report.
        kind: ``"faster"``: the time of a rival over ours is at least ``wanted``. ``"share"``: our share of what the
            device could do is at least that. ``"microseconds"``: our time is at most that. ``"alike"``: our time over
            ours in the case ``against`` is at most that. ``"host"``: the host's time in our call over its time in the
            eager ones is at most that.
        cases: names of the part's cases; of part ``"host"`` of its calls.
        passes: those of every case that count.
        against: a rival, ``"best rival"``, or another case.
        clock: ``"median_us"``, or ``"graph_us"`` for replays of a CUDA graph.
        ours: which of ours it is about.
    """

    part: str
    kind: Kind
    wanted: float
    cases: tuple[str, ...]
    passes: tuple[str, ...] = ("training",)
    against: str = ""
    clock: Literal["median_us", "graph_us"] = "median_us"
    ours: str = "ours"

    @property
    def text(self) -> str:
        """The promise, for people."""
        what = {
            "faster": f">= {self.wanted:g} x {self.against}",
            "share": f">= {self.wanted:.0%} of the ceiling",
            "microseconds": f"<= {self.wanted:g} us",
            "alike": f"<= {self.wanted:g} x {self.against}",
            "host": f"host time <= {self.wanted:g} x eager",
        }[self.kind]
        what = what if self.ours == "ours" else f"{what}, {self.ours.removeprefix('ours, ')}"
        return f"{what}, in a CUDA graph" if self.clock == "graph_us" else what


_BERT = ("bert 16k", "bert 64k", "xlm-r large 16k")
_PADDED = ("bert-base 128 padded", "bert-base 512 padded", "bert-large 384 padded")
GOALS = (
    Goal("embed", "faster", 1.5, _BERT, against="torch.compile"),
    Goal("embed", "faster", 4, (*_BERT, "bert module 16k"), against="eager"),
    Goal("embed", "faster", 1, _BERT, ("forward",), "torch.compile"),
    Goal("embed", "faster", 1, ("bert 512", "bert module 512"), ("forward", "training"), "eager"),
    Goal("embed", "faster", 1, ("bert tokens 16k", "llama tokens 8k"), against="Liger"),
    Goal("embed", "share", 0.9, _BERT, ("forward",)),
    Goal("embed", "share", 0.8, _BERT, ("backward_to_rows",)),
    Goal("host", "host", 1, ("embed", "rope", "attention"), ("forward", "forward + backward")),
    Goal("embedding_grad", "faster", 1.15, ("llama-3 8k",), against="eager"),
    Goal("embedding_grad", "faster", 1.5, ("llama-3 131k",), against="eager"),
    Goal("embedding_grad", "faster", 2, ("bert 512", "bert 2k", "bert-large 3k"), against="eager"),
    Goal("embedding_grad", "faster", 5, ("bert 32k hot row", "llama-3 131k hot row"), against="eager"),
    Goal("embedding_grad", "alike", 1.25, ("bert 32k hot row",), against="bert 32k uniform"),
    Goal("embedding_grad", "alike", 1.25, ("llama-3 131k hot row",), against="llama-3 131k uniform"),
    Goal("embedding_grad", "faster", 15, ("llama-3 8k accumulate",), against="eager"),
    Goal("embedding_grad", "faster", 3, ("llama-3 131k accumulate",), against="eager"),
    Goal("embedding_grad", "share", 0.85, ("llama-3 8k", "llama-3 131k", "llama-3 131k uniform")),
    Goal("embedding_grad", "share", 0.7, ("llama-3 8k accumulate", "llama-3 131k accumulate", "llama-3 131k rows")),
    Goal("embedding_grad", "microseconds", 15, ("plan 512", "plan 4.8k"), ("forward",)),
    Goal("embedding_grad", "microseconds", 40, ("plan 32k", "plan 128k"), ("forward",)),
    Goal(
        "embedding_grad",
        "faster",
        1,
        ("bert 16k lookup", "xlm-r base 4k lookup", "llama-3 8k lookup"),
        ("training",),
        "best rival",
    ),
    Goal("attention", "faster", 2, _PADDED, against="best rival"),
    Goal("attention", "faster", 1, ("bert-base 128 full",), against="best rival", clock="graph_us"),
    Goal("attention", "faster", 0.97,
         ("bert-base 512 full", "llama-1b 2k causal", "llama-8b 2k causal", "modernbert 1k window"),
         ("forward", "training"), "best rival"),
    Goal("attention", "faster", 0.97, ("bert-base 512 packed", "llama-1b 2k causal packed"), ("forward", "training"),
         "best rival"),
    Goal("step", "faster", 2, ("bert-base 32x128 bf16",), ("step",), "stock", ours="ours, padding-free"),
    Goal("step", "faster", 1.5, ("bert-base 32x128 bf16",), ("step",), "stock, torch.compile",
         ours="ours, padding-free"),
)  # fmt: skip


class Verdict(NamedTuple):
    """One case and pass of a goal: ``value`` is in the goal's terms, None where the report has none."""

    goal: Goal
    case: str
    name: str
    value: float | None
    met: bool | None


def judge(report: dict[str, Any]) -> Iterator[Verdict]:
    """Every goal on every case and pass it is about, in the order of the table."""
    data = {part["name"]: part["data"] for part in report["parts"]}
    for goal in GOALS:
        found = data.get(goal.part)
        for case in goal.cases:
            for name in goal.passes:
                value = None if found is None or found.get("tiny") else _value(goal, case, name, found)
                at_least = goal.kind in ("faster", "share")
                met = None if value is None else value >= goal.wanted if at_least else value <= goal.wanted
                yield Verdict(goal, case, name, value, met)


def _value(goal: Goal, case: str, name: str, data: dict[str, Any]) -> float | None:
    if goal.kind == "host":
        one = data["results"].get(case, {}).get(name)
        return None if one is None else float(one["ratio"])
    record = _record(data, case)
    ours = _time(record, goal.ours, name, goal.clock)
    if record is None or ours is None:
        return None
    if goal.kind == "microseconds":
        return ours
    if goal.kind == "share":
        return share_of_ceiling(record["floors"][name], data["ceilings"], ours)
    if goal.kind == "alike":
        other = _time(_record(data, goal.against), "ours", name, goal.clock)
        return None if other is None else ours / other
    rivals = [entry["rival"] for entry in record["rivals"] if not entry["ours"]]
    asked = rivals if goal.against == "best rival" else [goal.against]
    times = [t for rival in asked if (t := _time(record, rival, name, goal.clock)) is not None]
    return min(times) / ours if times else None


def _record(data: dict[str, Any], case: str) -> dict[str, Any] | None:
    return next((one for one in data["cases"] if one["name"] == case), None)


def timed_in(case: dict[str, Any], name: str) -> dict[str, dict[str, Any]]:
    """What a pass of a case took, by rival; those whose results were wrong have no time."""
    return {entry["rival"]: entry["passes"][name] for entry in case["rivals"] if name in entry["passes"]}


def _time(record: dict[str, Any] | None, rival: str, name: str, clock: str) -> float | None:
    found = None if record is None else timed_in(record, name).get(rival, {}).get(clock)
    return None if found is None else float(found)

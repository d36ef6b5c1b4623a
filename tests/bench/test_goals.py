"""The goals are about cases that there are, and a report is judged by what it has measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from bench import cases, front_end, goals, host_time, markdown, rivals, step, table_grad
from bench.goals import GOALS, Goal, judge

CASES = {
    "embed": {case.name for case in front_end.CASES},
    "embedding_grad": {case.name for case in table_grad.CASES},
    "attention": {case.name for case in cases.ATTENTION},
    "step": {case.name for case in cases.STEP},
    "host": set(host_time.CASES),
}
PASSES = ("forward", "training", "backward_to_rows")
PASSES_OF = {"host": host_time.PASSES, "step": ("step",)}
RIVALS: dict[str, Callable[[bool], list[rivals.Rival]]] = {
    "embed": front_end.contestants,
    "embedding_grad": table_grad.contestants,
    "attention": rivals.attention_rivals,
    "step": lambda _: [
        rivals.Rival(name, rivals.attention_rivals(True)[0].build, ours=name in step.PATCHED)
        for name in (step.STOCK, step.COMPILED, *step.PATCHED)
    ],
}


@pytest.mark.parametrize("goal", GOALS, ids=lambda goal: f"{goal.part} {goal.text}")
def test_a_goal_is_about_what_there_is(goal: Goal, monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(goal.cases) <= CASES[goal.part]
    assert set(goal.passes) <= set(PASSES_OF.get(goal.part, PASSES))
    if goal.part in RIVALS:
        assert goal.ours in {one.name for one in RIVALS[goal.part](True) if one.ours}
    if goal.kind == "alike":
        assert goal.against in CASES[goal.part]
    if goal.kind == "faster" and goal.against != "best rival":
        for module in (front_end, table_grad, rivals):
            monkeypatch.setattr(module, "absent", tuple)
        assert goal.against in {one.name for one in RIVALS[goal.part](True) if not one.ours}


def timed(us: float) -> dict[str, dict[str, float]]:
    return {name: {"median_us": us, "graph_us": us / 2} for name in PASSES}


def suite(times: dict[str, dict[str, float]], **more: Any) -> dict[str, Any]:
    """Times by case and rival; each pass moves 3 MB, a microsecond at the ceiling."""
    records = [
        {
            "name": case,
            "floors": {name: {"bytes": 3e6, "flops": 0} for name in PASSES},
            "rivals": [
                {"rival": name, "ours": name.startswith("ours"), "passes": timed(us)} for name, us in of.items()
            ],
        }
        for case, of in times.items()
    ]
    return {"ceilings": {"copy_bytes_per_s": 3e12, "bf16_flops_per_s": 8e14}, "tiny": False, "cases": records, **more}


def verdicts(monkeypatch: pytest.MonkeyPatch, goal: Goal, data: dict[str, Any] | None) -> list[tuple[Any, Any]]:
    monkeypatch.setattr(goals, "GOALS", (goal,))
    return [(one.value, one.met) for one in judge({"parts": [{"name": goal.part, "data": data}]})]


TIMES = {
    "a": {"eager": 30.0, "ours": 10.0, "ours, plan ready": 1.0, "Liger": 20.0},
    "b": {"eager": 9.0, "ours": 12.0},
}
FASTER = Goal("embed", "faster", 2.0, ("a", "b"), against="eager")


@pytest.mark.parametrize(
    ("goal", "expected"),
    [
        (FASTER, [(3.0, True), (0.75, False)]),
        (replace(FASTER, against="best rival"), [(2.0, True), (0.75, False)]),
        (replace(FASTER, against="Liger"), [(2.0, True), (None, None)]),
        (replace(FASTER, clock="graph_us"), [(3.0, True), (0.75, False)]),
        (replace(FASTER, passes=("forward", "training"), cases=("a",)), [(3.0, True)] * 2),
        (replace(FASTER, cases=("c",)), [(None, None)]),
        (replace(FASTER, kind="share", wanted=0.1), [(0.1, True), (1 / 12, False)]),
        (replace(FASTER, kind="microseconds", wanted=10), [(10.0, True), (12.0, False)]),
        (replace(FASTER, kind="alike", wanted=1.1, against="a"), [(1.0, True), (1.2, False)]),
    ],
    ids=str,
)
def test_values_and_verdicts(goal: Goal, expected: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    found = verdicts(monkeypatch, goal, suite(TIMES))
    assert [met for _, met in found] == [met for _, met in expected]
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected])


def test_host_time(monkeypatch: pytest.MonkeyPatch) -> None:
    goal = Goal("host", "host", 1, ("embed", "rope"), ("forward",))
    data = {"results": {"embed": {"forward": {"ratio": 1.5}}, "rope": {"forward": {"ratio": 0.5}}}}
    assert verdicts(monkeypatch, goal, data) == [(1.5, False), (0.5, True)]


def test_what_was_not_run_or_says_nothing_about_speed_is_not_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    assert verdicts(monkeypatch, FASTER, None) == [(None, None)] * 2
    assert verdicts(monkeypatch, FASTER, suite(TIMES, tiny=True)) == [(None, None)] * 2
    assert all(one.met is None for one in judge({"parts": []}))


def test_the_report_names_what_is_missed_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(goals, "GOALS", (FASTER, replace(FASTER, against="Liger")))
    lines = markdown._goals({"parts": [{"name": "embed", "data": suite(TIMES)}]})
    assert lines[0] == "Of 4 promised for an NVIDIA H100: 2 met, 1 not met, 1 not measured."
    assert lines[4:] == [
        "| embed | b, training | >= 2 x eager | 0.75 x | **not met** |",
        "| embed | a, training | >= 2 x eager | 3.00 x | met |",
        "| embed | a, training | >= 2 x Liger | 2.00 x | met |",
        "| embed | b, training | >= 2 x Liger |  | not measured |",
    ]

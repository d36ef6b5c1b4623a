"""The tables at the end of a command."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

BLOCKS = "▁▂▃▄▅▆▇█"
ASCII = "_.-=*#"
WIDTH = 40


def averaged(values: Sequence[float], width: int = WIDTH) -> list[float]:
    """``values`` in at most ``width`` means of neighbours."""
    count = min(width, len(values))
    cuts = [round(i * len(values) / count) for i in range(count + 1)] if count else []
    return [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(cuts)]


def sparkline(values: Sequence[float], low: float, high: float, levels: str = BLOCKS) -> str:
    """One character a value; ``low`` and ``high`` are the ends of the scale."""
    scale = (len(levels) - 1) / (high - low) if high > low else 0.0
    return "".join(levels[min(max(round((value - low) * scale), 0), len(levels) - 1)] for value in values)


def bytes_text(count: float) -> str:
    """A number of bytes for people: 1.21 GB."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _plain(value: float) -> str:
    return f"{value:.4g}"


def _points(stock: float, patched: float) -> str:
    return f"{100 * (patched - stock):+.1f} points"


def _nothing(stock: float, patched: float) -> str:  # noqa: ARG001
    return ""


def _difference(stock: float, patched: float) -> str:
    return f"{100 * (patched / stock - 1):+.1f} %" if stock else "-"


Row = tuple[str, str, Callable[[float], str], Callable[[float, float], str]]
_ROWS: tuple[Row, ...] = (
    ("accuracy before", "accuracy_before", _percent, _points),
    ("accuracy after", "accuracy", _percent, _points),
    ("F1 before", "f1_before", _percent, _points),
    ("F1 after", "f1", _percent, _points),
    ("perplexity before", "perplexity_before", _plain, _difference),
    ("perplexity after", "perplexity", _plain, _difference),
    # Compared step by step, below.
    ("samples per second", "samples_per_second", _plain, _nothing),
    # With the first steps and every hiccup of the machine: nothing to compare by.
    ("training seconds", "train_seconds", _plain, _nothing),
    ("peak memory", "peak_memory_bytes", bytes_text, _difference),
)


def figures(content: dict[str, Any], runs: Sequence[str], console: Console) -> None:
    """Print what the runs reached, side by side, and their loss curves."""
    environment = content["environment"]
    precision, data = environment["settings"]["precision"], environment["data"]
    steps = content[runs[0]]["steps"]
    console.print(
        f"\n[bold]What came of it[/bold]: {precision} on {escape(environment['device_name'])}, {steps} steps, "
        f"{data['train_examples']} rows to train on, {data['evaluation_examples']} to evaluate on",
        highlight=False,
        soft_wrap=True,
    )
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("")
    for run in runs:
        table.add_column(run, justify="right", style="bold")
    if len(runs) == 2:
        table.add_column(f"{runs[1]} to {runs[0]}", justify="right")
    for title, key, text, compare in _ROWS:
        values = [content[run].get(key) for run in runs]
        if any(value is None for value in values):
            continue
        change = [compare(*values)] if len(runs) == 2 else []
        if change and key == "samples_per_second":
            faster = content[runs[1]]["speedup_over_stock"]
            change = [f"{faster['median']:.2f}x" if faster["verdict"] == "clear" else faster["verdict"]]
        table.add_row(title, *(text(value) for value in values), *change)
    console.print(table)
    curves = {run: averaged(content[run]["loss"]) for run in runs}
    low, high = min(map(min, curves.values())), max(map(max, curves.values()))
    width = max(len(run) for run in runs)
    for run, curve in curves.items():
        line = sparkline(curve, low, high, BLOCKS if _can_draw(console) else ASCII)
        first, last = content[run]["loss"][0], content[run]["loss"][-1]
        console.print(f"  loss {run:<{width}}  {first:.3f} {line} {last:.3f}", highlight=False)
    _print_basis(content, runs, console)


def _print_basis(content: dict[str, Any], runs: Sequence[str], console: Console) -> None:
    """What the figures are, and whether a difference in speed is more than noise."""
    first, last = content[runs[0]], content[runs[-1]]
    faster = last.get("speedup_over_stock")
    if faster is not None:
        verdict = "" if faster["verdict"] == "clear" else f": {faster['verdict']}"
        console.print(
            f"  step by step, patched is {faster['median']:.2f}x as fast as stock, "
            f"{faster['low']:.2f}x to {faster['high']:.2f}x in the middle half of the steps{verdict}",
            highlight=False,
        )
    console.print(f"  [dim]samples per second: {first['throughput_basis']}[/dim]", highlight=False)
    console.print(f"  [dim]peak memory: {first['peak_memory_basis']}[/dim]", highlight=False)


def _can_draw(console: Console) -> bool:
    try:
        BLOCKS.encode(console.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def report(content: dict[str, Any], console: Console) -> None:
    """Print what ``patch`` swapped, and by which path each op runs."""
    console.print(f"\n[bold]What was swapped[/bold] in {escape(content['model'])}", highlight=False)
    table = Table(box=box.SIMPLE_HEAD)
    for heading in ("module", "was", "now", "status"):
        table.add_column(heading)
    for entry in content["entries"]:
        status = entry["status"] + (f": {entry['reason']}" if entry["reason"] else "")
        table.add_row(*(escape(text) for text in (entry["path"] or "(model)", entry["was"], entry["now"], status)))
    console.print(table)
    paths = {(op["op"], op["device"], op["backend"], op["reason"]) for e in content["entries"] for op in e["ops"]}
    for op, device, backend, reason in sorted(paths):
        console.print(f"  {op} on {device}: [bold]{backend}[/bold] ({escape(reason)})", highlight=False)


def left_behind(paths: Sequence[tuple[str, Path]], console: Console) -> None:
    """Print where things are."""
    console.print()
    width = max(len(what) for what, _ in paths)
    for what, path in paths:
        console.print(f"  {what:<{width}}  {escape(str(path))}", highlight=False, soft_wrap=True)

"""What is shown: curves of blocks, tables, progress, the picture."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
from matplotlib import image
from rich.console import Console

from embedkernels.cli import plot, render, results
from embedkernels.cli.progress import RunProgress


def content() -> dict[str, Any]:
    def run(scale: float) -> dict[str, Any]:
        return {
            "accuracy": 0.78 * scale,
            "accuracy_before": 0.5,
            "samples_per_second": 40.0 * scale,
            "peak_memory_bytes": int(1.2e9),
            "loss": [0.7 * 0.98**step for step in range(60)],
            "steps": 60,
            "train_seconds": 55.0,
            "throughput_basis": "median",
            "peak_memory_basis": "resident",
        }

    op = {"op": "embed", "device": "cpu", "backend": "torch", "reason": "no Triton on cpu"}
    entry = {"path": "bert.embeddings", "was": "BertEmbeddings", "now": "fused", "status": "patched", "reason": ""}
    return {
        "stock": run(1.0),
        "patched": {**run(1.1), "speedup_over_stock": {"median": 1.12, "low": 1.1, "high": 1.2, "verdict": "clear"}},
        "report": {"model": "Bert", "active": True, "entries": [{**entry, "ops": [op]}]},
        "environment": {
            "device_name": "A [processor]",
            "settings": {"precision": "fp32", "model": "here/mini"},
            "data": {"train_examples": 10, "evaluation_examples": 2},
        },
    }


def test_curves() -> None:
    assert render.averaged([1.0, 3.0, 5.0, 7.0], 2) == [2.0, 6.0]
    assert render.averaged([1.0, 2.0], 40) == [1.0, 2.0]
    assert render.averaged([]) == []
    assert len(render.averaged([0.0] * 999)) == render.WIDTH
    assert render.sparkline([0.0, 0.5, 1.0], 0.0, 1.0) == "▁▅█"
    assert render.sparkline([2.0, 2.0], 2.0, 2.0) == "▁▁"


@pytest.mark.parametrize(
    ("count", "text"),
    [(512, "512 B"), (1500, "1.5 kB"), (2.5e6, "2.5 MB"), (1.234e9, "1.23 GB"), (2e12, "2000.00 GB")],
)
def test_sizes(count: float, text: str) -> None:
    assert render.bytes_text(count) == text


def test_the_table_compares_the_runs() -> None:
    stream = io.StringIO()
    console = Console(file=stream, width=120)
    render.report(content()["report"], console)
    render.figures(content(), ("stock", "patched"), console)
    lines = {line.split("  ")[1]: line for line in stream.getvalue().splitlines() if line.count("  ") > 2}
    assert "78.0 %" in lines["accuracy after"]
    assert "85.8 %" in lines["accuracy after"]
    assert "+7.8 points" in lines["accuracy after"]
    assert "1.12x" in lines["samples per second"], "step by step, not by the medians of the runs"
    assert "+0.0 %" in lines["peak memory"]
    assert "A [processor]" in stream.getvalue()
    assert "embed on cpu: torch (no Triton on cpu)" in stream.getvalue()


def test_a_difference_that_is_not_clear_has_no_figure_in_the_table() -> None:
    figures = content()
    figures["patched"]["speedup_over_stock"] = {
        "median": 2.58,
        "low": 0.9,
        "high": 3.3,
        "verdict": "too noisy to tell",
    }
    stream = io.StringIO()
    render.figures(figures, ("stock", "patched"), Console(file=stream, width=120))
    (row,) = (line for line in stream.getvalue().splitlines() if line.strip().startswith("samples per second  "))
    assert "too noisy to tell" in row
    assert "2.58x" not in row
    assert "0.90x to 3.30x in the middle half of the steps: too noisy to tell" in stream.getvalue()


def test_curves_are_ascii_where_blocks_cannot_be_written() -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    render.figures(content(), ("stock",), Console(file=stream, width=120, legacy_windows=False, safe_box=True))
    stream.seek(0)
    assert "_" in stream.read()


def test_the_picture_has_both_curves(tmp_path: Path) -> None:
    plot.draw(content(), ("stock", "patched"), tmp_path / "a.png", "A title")
    pixels = image.imread(tmp_path / "a.png")
    assert pixels.shape[:2] == (690, 1575)
    for run in ("stock", "patched"):
        color = [int(plot.COLORS[run][i : i + 2], 16) / 255 for i in (1, 3, 5)]
        near = (abs(pixels[..., :3] - color).max(axis=-1) < 0.02).sum()
        assert near > 500, f"the color of {run} is in the picture"
    plot.draw(content(), ("patched",), tmp_path / "b.png")


def test_a_name_with_signs_of_formulas_is_a_name(tmp_path: Path) -> None:
    figures = content()
    figures["environment"]["settings"]["model"] = "here/mm$^$"
    plot.draw(figures, ("patched",), tmp_path / "a.png")
    assert (tmp_path / "a.png").is_file()


def test_smoothing_is_a_mean_of_neighbours() -> None:
    line = [float(step) for step in range(50)]
    assert plot.smooth(line)[4:-4] == pytest.approx(line[4:-4])
    assert plot.smooth(line)[0] == 2.0
    assert plot.smooth([3.0]) == [3.0]


def test_a_log_gets_lines_and_a_notice_once() -> None:
    stream = io.StringIO()
    with RunProgress(Console(file=stream, width=100), named=True) as progress:
        for run in ("stock", "patched"):
            progress.show(run, {"event": "phase", "name": "reading data"})
            progress.show(run, {"event": "notice", "text": "3 rows [left] out"})
            progress.show(run, {"event": "steps", "total": 4})
            progress.show(run, {"event": "step", "step": 4, "loss": 0.5})
    assert stream.getvalue().splitlines() == [
        "stock: reading data",
        "note 3 rows [left] out",
        "stock: training",
        "patched: reading data",
        "patched: training",
    ]


def test_a_terminal_gets_a_bar() -> None:
    stream = io.StringIO()
    console = Console(file=stream, width=100, force_terminal=True)
    with RunProgress(console, named=False) as progress:
        progress.show("patched", {"event": "steps", "total": 4})
        progress.show("patched", {"event": "step", "step": 3, "loss": 0.25})
        progress._bar.refresh()
    assert "3/4" in stream.getvalue()
    assert "loss 0.2500" in stream.getvalue()


def test_a_terminal_shows_a_phase_of_unknown_length() -> None:
    stream = io.StringIO()
    with RunProgress(Console(file=stream, width=100, force_terminal=True), named=True) as progress:
        progress.show("stock", {"event": "phase", "name": "reading data"})
        progress._bar.refresh()
    assert "stock: reading data" in stream.getvalue()
    assert "0/?" in stream.getvalue()


def test_figures_that_are_not_finite_are_null(tmp_path: Path) -> None:
    results.write(tmp_path / "a.json", {"a": [math.inf, 1.0], "b": {"c": math.nan}})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": [None, 1.0], "b": {"c": None}}

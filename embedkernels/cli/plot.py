"""The picture of a command's runs: loss curves, throughput and peak memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from embedkernels.cli.errors import CliError

COLORS = {"stock": "#8a94a6", "patched": "#0b6e99"}
INK = "#1f2933"


def check() -> None:
    """CliError if pictures cannot be drawn here: better said before a training than after it."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot
    except Exception as error:  # of its settings file, too
        raise CliError(
            f"the picture of the losses needs matplotlib, which does not import ({error})",
            'pip install "embedkernels[cli]"',
        ) from error


def draw(content: dict[str, Any], runs: Sequence[str], path: Path, title: str = "") -> None:
    """Write a PNG.

    Args:
        content: what metrics.json holds.
        runs: the runs to draw, of ``"stock"`` and ``"patched"``.
        path: the file to write.
        title: heads the picture; empty for the model's name.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    style = {
        "font.size": 10,
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": "#c3cad5",
        "xtick.color": INK,
        "ytick.color": INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with plt.rc_context(style):
        figure = plt.figure(figsize=(10.5, 4.6), dpi=150, layout="constrained")
        figure.get_layout_engine().set(w_pad=0.1, h_pad=0.08, wspace=0.04)
        grid = figure.add_gridspec(2, 2, width_ratios=(1.9, 1))
        _losses(figure.add_subplot(grid[:, 0]), content, runs)
        bars = ((_speed_title(content, runs), "samples_per_second", 1.0, "{:.3g}"), _memory_bar(content, runs))
        for row, (name, key, unit, text) in enumerate(bars):
            _bars(figure.add_subplot(grid[row, 1]), name, {run: content[run][key] / unit for run in runs}, text)
        # A model's name may hold dollar signs, which are no formula.
        words = _title(content, runs, title)
        figure.suptitle(words, x=0.01, ha="left", fontsize=12, fontweight="bold", parse_math=False)
        figure.savefig(path)
        plt.close(figure)


def _title(content: dict[str, Any], runs: Sequence[str], title: str) -> str:
    environment = content["environment"]
    settings = environment["settings"]
    subject = title or Path(settings["model"]).name
    return f"{subject}: {' and '.join(runs)}, {settings['precision']}, {environment['device_name']}"


def _speed_title(content: dict[str, Any], runs: Sequence[str]) -> str:
    faster = content[runs[-1]].get("speedup_over_stock")
    if faster is None:
        return "samples per second"
    return "samples per second: " + (
        f"{faster['median']:.2f}x" if faster["verdict"] == "clear" else faster["verdict"]
    )


def _memory_bar(content: dict[str, Any], runs: Sequence[str]) -> tuple[str, str, float, str]:
    largest = max(content[run]["peak_memory_bytes"] for run in runs)
    unit, name = (1e9, "GB") if largest >= 1e9 else (1e6, "MB")
    return f"peak memory, {name}", "peak_memory_bytes", unit, "{:.2f}"


def _losses(axes: Any, content: dict[str, Any], runs: Sequence[str]) -> None:
    for index, run in enumerate(runs):
        losses = content[run]["loss"]
        steps = range(1, len(losses) + 1)
        # Curves that agree lie on each other: the second is dashed, so that both are seen.
        first = index == 0
        axes.plot(steps, losses, color=COLORS[run], alpha=0.25, linewidth=1)
        axes.plot(
            steps,
            smooth(losses),
            color=COLORS[run],
            linewidth=3.5 if first and len(runs) > 1 else 2,
            linestyle="-" if first else (0, (3, 2)),
            label=f"{run}: {_outcome(content[run])}",
        )
    axes.set_title("training loss", loc="left")
    axes.set_xlabel("step (heavy line: mean of neighbouring steps)")
    axes.set_xlim(left=0)
    axes.grid(axis="y", color="#e4e8ee", linewidth=0.8)
    axes.set_axisbelow(True)
    # Losses fall: this corner is free.
    axes.legend(frameon=False, loc="lower left")


def _outcome(run: dict[str, Any]) -> str:
    if run.get("perplexity") is not None:
        return f"perplexity {run['perplexity_before']:.4g} to {run['perplexity']:.4g}"
    return f"accuracy {100 * run['accuracy_before']:.1f} % to {100 * run['accuracy']:.1f} %"


def smooth(values: Sequence[float]) -> list[float]:
    """A moving average over the neighbours on both sides; at the ends over those there are."""
    reach = min(8, len(values) // 12)
    windows = [values[max(0, index - reach) : index + reach + 1] for index in range(len(values))]
    return [math.fsum(window) / len(window) for window in windows]


def _bars(axes: Any, title: str, values: dict[str, float], text: str) -> None:
    names = list(reversed(values))
    drawn = axes.barh(names, [values[name] for name in names], color=[COLORS[name] for name in names], height=0.5)
    axes.bar_label(drawn, [text.format(values[name]) for name in names], padding=4)
    axes.set_title(title, loc="left")
    # A single bar is as thick as one of two.
    axes.set_ylim(len(names) - 2.5, len(names) - 0.5)
    axes.set_xlim(0, max(values.values()) * 1.18)
    axes.tick_params(left=False, bottom=False, labelbottom=False)
    axes.spines["bottom"].set_visible(False)

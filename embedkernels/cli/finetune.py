"""Fine-tuning as a command does it: runs with a progress bar, tables, a picture and metrics.json."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from embedkernels.cli import plot, render, results
from embedkernels.cli.progress import RunProgress
from embedkernels.cli.settings import Settings


def make_console() -> Console:
    """The terminal; elsewhere, as in a log, lines wide enough for the tables."""
    console = Console()
    return console if console.is_terminal else Console(width=120)


def finetune(
    settings: Settings, output: Path, runs: Sequence[str], console: Console, *, overwrite: bool, title: str = ""
) -> dict[str, Any]:
    """Fine-tune with each of ``runs`` and show and save what came of it.

    Args:
        settings: what to do.
        output: directory for the models, metrics.json and the picture.
        runs: ``("patched",)``, ``("stock",)`` or ``("stock", "patched")``.
        console: where to print.
        overwrite: replace an earlier run in ``output``.
        title: heads the picture; empty for the model's name.

    Returns:
        The content of metrics.json.

    Raises:
        CliError: something failed; nothing to show.
    """
    plot.check()
    with results.claimed(output, overwrite=overwrite) as work:
        with RunProgress(console, named=len(runs) > 1) as progress:
            content = results.produce(settings, work, runs, progress.show)
        drawn = _draw(content, runs, work / results.PLOT, title, console)
        results.finish(output)
    if content["report"] is not None:
        render.report(content["report"], console)
    render.figures(content, runs, console)
    behind = [(f"{run} model", results.folder(output, runs, run)) for run in runs]
    behind += [("figures", output / results.METRICS)]
    behind += [("picture", output / results.PLOT)] if drawn else []
    render.left_behind(behind, console)
    return content


def _draw(content: dict[str, Any], runs: Sequence[str], path: Path, title: str, console: Console) -> bool:
    """Draw the picture; that it cannot be drawn costs nobody a result."""
    try:
        plot.draw(content, runs, path, title)
    except Exception as error:  # of matplotlib's fonts, cache and settings, which are the machine's
        path.unlink(missing_ok=True)
        reason = (str(error).strip() or "no message").splitlines()[0]
        console.print(
            f"[yellow]note[/yellow] no picture, drawing it failed ({escape(f'{type(error).__name__}: {reason}')})",
            highlight=False,
            soft_wrap=True,
        )
        return False
    return True

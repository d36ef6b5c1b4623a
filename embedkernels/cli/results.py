"""A command's runs, one after the other, and what they leave in the output directory."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from embedkernels.cli import launch
from embedkernels.cli.errors import CliError, UsageError
from embedkernels.cli.settings import Settings

METRICS = "metrics.json"
PLOT = "metrics.png"
# What a command may write, and --overwrite may remove.
_OURS = (METRICS, PLOT, "stock", "patched", "model", "stock.log", "patched.log")


def prepare(output: Path, *, overwrite: bool) -> None:
    """Make the output directory; an earlier run's is only taken with ``overwrite``.

    Raises:
        UsageError: the directory holds something, or is a file.
        CliError: it cannot be made.
    """
    if output.exists() and not output.is_dir():
        raise UsageError(f"--output: {output} is a file", "Name a directory.")
    try:
        there = {one.name for one in output.iterdir()} if output.is_dir() else set()
        foreign = sorted(there - set(_OURS))
        if foreign:
            raise UsageError(
                f"--output: {output} holds other files ({foreign[0]}, ...)", "Name a new or an empty directory."
            )
        if there and not overwrite:
            raise UsageError(
                f"--output: {output} holds an earlier run", "Name another directory, or replace it with --overwrite."
            )
        for name in there:
            path = output / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CliError(f"--output: {output} cannot be written: {error}") from error


def folder(output: Path, runs: Sequence[str], run: str) -> Path:
    """Where a run's model goes: ``model`` if it is the only run, else the run's name."""
    return output / (run if len(runs) > 1 else "model")


def produce(
    settings: Settings, output: Path, runs: Sequence[str], on_event: Callable[[str, dict[str, Any]], None]
) -> dict[str, Any]:
    """Run ``runs`` (of ``"stock"`` and ``"patched"``) one after the other and write metrics.json.

    Args:
        settings: the same for every run: same data, same order, same seed.
        output: a directory that exists.
        on_event: called with the run's name and each of its events.

    Returns:
        The content of metrics.json: an object per run, ``report`` (the patch report, None without a patched run) and
        ``environment``.

    Raises:
        launch.WorkerError: a run failed.
    """
    found: dict[str, Any] = {}
    report: Any = None
    environment: dict[str, Any] = {}
    for run in runs:
        log = output / f"{run}.log"
        result = launch.run(
            settings,
            folder(output, runs, run),
            patched=run == "patched",
            log=log,
            on_event=lambda event, run=run: on_event(run, event),  # type: ignore[misc]
        )
        found[run] = result["metrics"]
        report = result["report"] or report
        environment = result["environment"]
    content = {**found, "report": report, "environment": environment}
    write(output / METRICS, content)
    return content


def write(path: Path, content: dict[str, Any]) -> None:
    """JSON that every reader takes: figures that are not finite become null."""
    path.write_text(json.dumps(_finite(content), indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

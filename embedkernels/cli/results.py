"""A command's runs, one after the other, and what they leave in the output directory."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from embedkernels.cli import launch
from embedkernels.cli.errors import CliError, UsageError
from embedkernels.cli.settings import Settings
from embedkernels.cli.speed import speedup

METRICS = "metrics.json"
PLOT = "metrics.png"
# Runs work here; what they leave moves up when all of them are done, so a failure costs no earlier result.
UNFINISHED = "unfinished"
# What a command writes, and --overwrite replaces.
_OURS = (METRICS, PLOT, "stock", "patched", "model", "stock.log", "patched.log")


def prepare(output: Path, *, overwrite: bool) -> Path:
    """Make the output directory and an empty one in it to work in; an earlier result stays until :func:`finish`.

    Returns:
        The directory to work in.

    Raises:
        UsageError: the directory holds other files, or an earlier result without ``overwrite``, or is a file.
        CliError: it cannot be made.
    """
    if output.exists() and not output.is_dir():
        raise UsageError(f"--output: {output} is a file", "Name a directory.")
    work = output / UNFINISHED
    try:
        there = {one.name for one in output.iterdir()} if output.is_dir() else set()
        foreign = sorted(there - {*_OURS, UNFINISHED})
        if foreign:
            raise UsageError(f"--output: {output} holds other files ({foreign[0]})", "Name a new or empty directory.")
        if there - {UNFINISHED} and not overwrite:
            raise UsageError(
                f"--output: {output} holds an earlier run", "Name another directory, or replace it with --overwrite."
            )
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
    except OSError as error:
        raise CliError(f"--output: {output} cannot be written: {error}") from error
    return work


def finish(output: Path) -> None:
    """Replace an earlier result by what the runs left."""
    for name in _OURS:
        path = output / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    work = output / UNFINISHED
    for path in work.iterdir():
        path.rename(output / path.name)
    work.rmdir()


def abandon(output: Path) -> None:
    """Remove what was begun, and the directory if nothing else is in it."""
    shutil.rmtree(output / UNFINISHED, ignore_errors=True)
    with contextlib.suppress(OSError):
        output.rmdir()


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
    if "stock" in found and "patched" in found:
        seconds = (found[run]["step_seconds"] for run in ("stock", "patched"))
        found["patched"]["speedup_over_stock"] = speedup(*seconds)
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

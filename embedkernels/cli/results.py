"""A command's runs, one after the other, and what they leave in the output directory."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from embedkernels.cli import launch
from embedkernels.cli.errors import CliError, UsageError
from embedkernels.cli.lock import Held, lock
from embedkernels.cli.settings import Settings
from embedkernels.cli.speed import speedup

METRICS = "metrics.json"
PLOT = "metrics.png"
# Runs work here; what they leave moves up when all of them are done, so a failure costs no earlier result.
UNFINISHED = "unfinished"
# Held while they do: a second command would remove what the first one works on.
LOCK = "unfinished.lock"
# What a command writes, and --overwrite replaces.
_OURS = (METRICS, PLOT, "stock", "patched", "model", "stock.log", "patched.log")


@contextlib.contextmanager
def claimed(output: Path, *, overwrite: bool) -> Iterator[Path]:
    """Make the output directory and an empty one in it to work in, for this process alone.

    An earlier result stays until :func:`finish`. What is worked on stays after a failure, but for a usage error:
    then nothing was begun, and nothing is left.

    Yields:
        The directory to work in.

    Raises:
        UsageError: the directory holds other files, or an earlier result without ``overwrite``, is a file, cannot be
            written, or another process works in it.
    """
    with contextlib.ExitStack() as cleanup:
        try:
            if os.path.lexists(output) and not os.path.isdir(output):
                what = "a file" if os.path.exists(output) else "a link to something that is not there"
                raise UsageError(f"--output: {output} is {what}", "Name a directory.")
            _make(output, cleanup)
            cleanup.enter_context(lock(output / LOCK))
            _check_free(output, overwrite=overwrite)
            work = output / UNFINISHED
            _remove(work)
            work.mkdir()
        except Held as error:
            who = f" (process {error.pid})" if error.pid else ""
            raise UsageError(
                f"--output: another run works in {output}{who}", "Wait for its end, or name another directory."
            ) from error
        except OSError as error:
            raise UsageError(
                f"--output: {output} cannot be written: {error.strerror or error}",
                "Name a directory that you may write to.",
            ) from error
        try:
            yield work
        except CliError as error:
            if error.exit_code == UsageError.exit_code:
                _remove(work)
            raise


def _make(output: Path, cleanup: contextlib.ExitStack) -> None:
    """Make the directory; those made here are removed at the end if they are empty then."""
    missing = [path for path in (output, *output.parents) if not os.path.isdir(path)]

    def remove_empty() -> None:
        with contextlib.suppress(OSError):
            for path in missing:
                path.rmdir()

    cleanup.callback(remove_empty)
    output.mkdir(parents=True, exist_ok=True)


def _check_free(output: Path, *, overwrite: bool) -> None:
    there = {one.name for one in output.iterdir()} - {UNFINISHED, LOCK}
    foreign = sorted(there - {*_OURS})
    if foreign:
        raise UsageError(f"--output: {output} holds other files ({foreign[0]})", "Name a new or empty directory.")
    if there and not overwrite:
        raise UsageError(
            f"--output: {output} holds an earlier run", "Name another directory, or replace it with --overwrite."
        )


def _remove(path: Path) -> None:
    """Remove a file or directory, if it is there; of a link the link alone."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def finish(output: Path) -> None:
    """Replace an earlier result by what the runs left.

    Raises:
        CliError: a file cannot be replaced; says where the new result is.
    """
    work = output / UNFINISHED
    try:
        for name in _OURS:
            _remove(output / name)
        for path in work.iterdir():
            path.rename(output / path.name)
        work.rmdir()
    except OSError as error:
        raise CliError(
            f"--output: the result cannot be moved up in {output}: {error}",
            f"It is in {work}: move it away before the next run, which replaces it.",
        ) from error


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

"""Starts the process of one run and passes its events on."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from embedkernels.cli.errors import CliError, UsageError
from embedkernels.cli.settings import Settings

# The worker imports what this process would: with `python -c` the path would start with the working directory.
_BOOT = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from embedkernels.cli.worker import main; main()"


class WorkerError(CliError):
    """A run failed; ``details`` has the worker's traceback or the end of its log."""

    def __init__(self, message: str, remedy: str, details: str, *, usage: bool = False) -> None:
        super().__init__(message, remedy)
        self.details = details
        self.exit_code = UsageError.exit_code if usage else CliError.exit_code


def run(
    settings: Settings, output: Path, *, patched: bool, log: Path, on_event: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """Fine-tune once in a fresh process.

    Args:
        settings, output, patched: as for ``training.run``.
        log: file that gets what libraries print.
        on_event: called with every event but the last.

    Returns:
        What ``training.run`` returns.

    Raises:
        WorkerError: the run failed or its process died.
    """
    path = [entry or os.getcwd() for entry in sys.path]
    job = {"settings": settings.to_dict(), "patched": patched, "output": str(output)}
    with log.open("w", encoding="utf-8") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-c", _BOOT, json.dumps(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            encoding="utf-8",
        )
        assert process.stdin is not None
        assert process.stdout is not None
        result = None
        try:
            # A process that died before it could read has left its reason in the log and its exit code.
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(json.dumps(job) + "\n")
                process.stdin.flush()
            for line in process.stdout:
                event = json.loads(line)
                if event["event"] == "error":
                    usage = event["usage"]
                    raise WorkerError(event["message"], event["remedy"], event["traceback"], usage=usage)
                if event["event"] == "result":
                    result = event
                else:
                    on_event(event)
            code = process.wait()
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
            # Open until here: the process ends itself when this end is closed, as it is when this process dies.
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
            process.stdout.close()
    if result is None:
        raise _died(code, log)
    return result


def _died(code: int, log: Path) -> WorkerError:
    how = f"ended with exit code {code}"
    remedy = f"{log} has what it printed."
    if code < 0:
        how = f"was killed by {signal.Signals(-code).name}"
        if -code == signal.SIGKILL:
            how += ", as happens when memory runs out"
            remedy = "Lower --batch-size or --max-length, or use --gradient-checkpointing."
    return WorkerError(
        f"the training process {how}", remedy, log.read_text(encoding="utf-8", errors="replace")[-5000:]
    )

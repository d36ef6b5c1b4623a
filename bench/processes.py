"""Commands with a time limit that always end, with everything they started, and leave their output behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bench.environment import ROOT

GRACE = 3.0  # seconds between asking a command to stop and stopping it
TIMED_OUT = 124


_live: set[subprocess.Popen[bytes]] = set()
_stopping = False


@dataclass(frozen=True)
class Finished:
    """How a command ended.

    Attributes:
        exit_code: ``TIMED_OUT`` if it was stopped, negative for a signal.
        seconds: that it took.
        output: what it printed.
        timed_out: whether it was stopped; a command may end with ``TIMED_OUT`` of its own accord.
    """

    exit_code: int
    seconds: float
    output: str
    timed_out: bool = False


def _signal_group(process: subprocess.Popen[bytes], number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


def end_with_commands() -> None:
    """From now on a SIGTERM also ends every command that :func:`run` has under way, then this process.

    Commands have process groups of their own: a signal to this process's group does not reach them. To be called in
    the main thread.
    """

    def stop(number: int, frame: object) -> None:  # noqa: ARG001
        global _stopping
        _stopping = True
        for process in list(_live):
            _signal_group(process, signal.SIGKILL)
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, stop)


def run(command: Sequence[str], seconds: float, env: Mapping[str, str] | None = None) -> Finished:
    """Run a command in the repository's root and in a process group of its own.

    Its output goes through a file: a grandchild that outlives it must not keep a pipe open.

    Args:
        command: program and arguments.
        seconds: after which the group is asked to stop, and ``GRACE`` later stopped.
        env: additions to the environment.
    """
    started = time.monotonic()
    timed_out = False
    if _stopping:
        return Finished(TIMED_OUT, 0.0, "", True)
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            list(command),
            cwd=ROOT,
            env={**os.environ, **(env or {})},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        _live.add(process)
        try:
            # A SIGTERM that came between the two lines before found nothing to stop.
            code = process.wait(0.1 if _stopping else max(0.1, seconds))
        except subprocess.TimeoutExpired:
            code, timed_out = TIMED_OUT, True
            _signal_group(process, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)
        finally:
            _signal_group(process, signal.SIGKILL)
            process.wait()
            _live.discard(process)
        log.seek(0)
        output = log.read().decode(errors="replace")
    return Finished(code, round(time.monotonic() - started, 1), output, timed_out)

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


@dataclass(frozen=True)
class Finished:
    """How a command ended: ``exit_code`` is ``TIMED_OUT`` if it was stopped, negative for a signal."""

    exit_code: int
    seconds: float
    output: str


def _signal_group(process: subprocess.Popen[bytes], number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


def run(command: Sequence[str], seconds: float, env: Mapping[str, str] | None = None) -> Finished:
    """Run a command in the repository's root and in a process group of its own.

    Its output goes through a file: a grandchild that outlives it must not keep a pipe open.

    Args:
        command: program and arguments.
        seconds: after which the group is stopped.
        env: additions to the environment.
    """
    started = time.monotonic()
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
        try:
            code = process.wait(max(0.1, seconds))
        except subprocess.TimeoutExpired:
            code = TIMED_OUT
            _signal_group(process, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)
        finally:
            _signal_group(process, signal.SIGKILL)
            process.wait()
        log.seek(0)
        output = log.read().decode(errors="replace")
    return Finished(code, round(time.monotonic() - started, 1), output)

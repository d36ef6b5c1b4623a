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

# Seconds between asking a command to stop and killing it. A command that runs commands of its own has half of it for
# them, or it would be killed while it waits for them.
_VARIABLE = "EMBEDKERNELS_BENCH_GRACE"
GRACE = float(os.environ.get(_VARIABLE, 3.0))
TIMED_OUT = 124


_live: set[subprocess.Popen[bytes]] = set()
_stopping = False
_HANDLED = (signal.SIGTERM, signal.SIGINT)


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


def _signal_group(process: subprocess.Popen[bytes], number: int) -> bool:
    """Whether there was anything left to signal; 0 only asks."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)
        return True
    return False


def _end(commands: Sequence[subprocess.Popen[bytes]]) -> None:
    """Ask everything in the groups of some commands to stop, wait for it, and kill what does not.

    What is killed has no time to end its own commands, which may have groups of their own.
    """
    deadline = time.monotonic() + GRACE
    left = [command for command in commands if _signal_group(command, signal.SIGTERM)]
    while left and time.monotonic() < deadline:
        time.sleep(0.02)
        # A command that has ended stays in its group until it is asked for its exit code.
        left = [command for command in left if command.poll() is None or _signal_group(command, 0)]
    for command in left:
        _signal_group(command, signal.SIGKILL)


def end_with_commands() -> None:
    """From now on SIGTERM and Ctrl-C also end every command that :func:`run` has under way, then this process.

    Commands have process groups of their own: a signal to this process's group does not reach them. To be called in
    the main thread.
    """

    def stop(number: int, frame: object) -> None:  # noqa: ARG001
        global _stopping
        _stopping = True
        for handled in _HANDLED:
            signal.signal(handled, signal.SIG_IGN)
        _end(list(_live))
        raise SystemExit(128 + number)

    for handled in _HANDLED:
        signal.signal(handled, stop)


def run(command: Sequence[str], seconds: float, env: Mapping[str, str] | None = None) -> Finished:
    """Run a command in the repository's root and in a process group of its own.

    Its output goes through a file: a grandchild that outlives it must not keep a pipe open.

    Args:
        command: program and arguments.
        seconds: after which the group is asked to stop, and ``GRACE`` later killed.
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
            env={**os.environ, _VARIABLE: str(GRACE / 2), **(env or {})},
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
        finally:
            _end([process])
            process.wait()
            _live.discard(process)
        log.seek(0)
        output = log.read().decode(errors="replace")
    return Finished(code, round(time.monotonic() - started, 1), output, timed_out)

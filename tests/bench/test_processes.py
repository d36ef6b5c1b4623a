"""Commands end in time, whatever they start: nothing outlives a harness that was stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench import processes
from bench.environment import ROOT


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def endless(pid_file: Path, *, stubborn: bool = False) -> list[str]:
    """A command that leaves its process id; a stubborn one ignores the request to stop."""
    ignore = "signal.signal(signal.SIGTERM, signal.SIG_IGN); " if stubborn else ""
    partial = f"{pid_file}.partial"
    leave = f"open({partial!r}, 'w').write(str(os.getpid())); os.rename({partial!r}, {str(pid_file)!r})"
    return python(f"import os, signal, time; {ignore}{leave}; time.sleep(600)")


def harness(command: list[str], *, handles: bool = True, pool: bool = False) -> list[str]:
    """A command that runs another one as ``bench.gpu_report`` does, or three from a pool as ``bench.sanitize``."""
    # In the background of a shell Python leaves SIGINT ignored.
    handle = (
        "processes.end_with_commands()" if handles else "signal.signal(signal.SIGINT, signal.default_int_handler)"
    )
    run = f"processes.run({command!r}, 600)"
    if pool:
        run = f"with ThreadPoolExecutor(1) as pool: list(pool.map(lambda _: {run}, range(3)))"
    imports = "import signal\nfrom concurrent.futures import ThreadPoolExecutor\nfrom bench import processes"
    return python("\n".join([imports, handle, run]))


def appeared(pid_file: Path) -> int:
    deadline = time.monotonic() + 30
    while not pid_file.exists():
        assert time.monotonic() < deadline, "the command did not start"
        time.sleep(0.05)
    return int(pid_file.read_text())


def outlives(pid: int, seconds: float = 2.0) -> bool:
    """Whether a process is still there after some time; if so it is ended."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout.strip()
        if state in ("", "Z"):
            return False
        time.sleep(0.05)
    os.kill(pid, signal.SIGKILL)
    return True


def test_a_stopped_command_takes_its_children_along(tmp_path: Path) -> None:
    child = endless(tmp_path / "pid")
    finished = processes.run(python(f"import subprocess; subprocess.run({child!r})"), 2.0)
    assert finished.exit_code == processes.TIMED_OUT
    assert finished.seconds < 2.0 + processes.GRACE + 3
    assert not outlives(appeared(tmp_path / "pid"))


def test_a_stopped_command_takes_the_commands_of_its_commands_along(tmp_path: Path) -> None:
    finished = processes.run(harness(endless(tmp_path / "pid"), pool=True), 2.0)
    assert finished.timed_out
    assert finished.seconds < 2.0 + processes.GRACE, "it must not wait to be killed"
    assert not outlives(appeared(tmp_path / "pid"))


def test_a_command_that_ignores_the_request_to_stop_is_stopped(tmp_path: Path) -> None:
    finished = processes.run(endless(tmp_path / "pid", stubborn=True), 1.0)
    assert finished.exit_code == processes.TIMED_OUT
    assert finished.seconds < 1.0 + processes.GRACE + 3
    assert not outlives(appeared(tmp_path / "pid"))


def test_a_nested_command_that_ignores_it_is_stopped_before_its_harness_is(tmp_path: Path) -> None:
    finished = processes.run(harness(endless(tmp_path / "pid", stubborn=True)), 2.0)
    assert finished.timed_out
    assert finished.seconds < 2.0 + processes.GRACE
    assert not outlives(appeared(tmp_path / "pid"))


@pytest.mark.parametrize("stubborn", [False, True])
@pytest.mark.parametrize(
    ("number", "handles"), [(signal.SIGTERM, True), (signal.SIGINT, True), (signal.SIGINT, False)]
)
def test_a_harness_that_is_ended_asks_the_harness_it_runs(
    tmp_path: Path, number: int, handles: bool, stubborn: bool
) -> None:
    """A kill at once would leave the inner one no time to end its commands, which no signal to its group reaches."""
    inner = harness(endless(tmp_path / "pid", stubborn=stubborn), pool=True)
    outer = subprocess.Popen(harness(inner, handles=handles), cwd=ROOT, stderr=subprocess.DEVNULL)
    pid = appeared(tmp_path / "pid")
    outer.send_signal(number)
    assert outer.wait(processes.GRACE + 5) == (128 + number if handles else -number)
    assert not outlives(pid)


def test_a_command_that_ends_leaves_no_harness_behind(tmp_path: Path) -> None:
    inner = harness(endless(tmp_path / "pid"))
    waits = f"while not os.path.exists({str(tmp_path / 'pid')!r}): time.sleep(0.05)"
    finished = processes.run(python(f"import os, subprocess, time\nsubprocess.Popen({inner!r})\n{waits}"), 60)
    assert (finished.exit_code, finished.timed_out) == (0, False)
    assert not outlives(appeared(tmp_path / "pid"))


def test_what_was_printed_is_kept() -> None:
    finished = processes.run(python("import time; print('so far', flush=True); time.sleep(600)"), 1.0)
    assert (finished.timed_out, finished.output) == (True, "so far\n")

"""The output directory: one command at a time, nothing lost, and processes that end with their command."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from embedkernels.cli import results, worker
from embedkernels.cli.errors import CliError, UsageError
from embedkernels.cli.lock import Held, lock


def test_a_second_command_is_refused_and_takes_nothing_away(tmp_path: Path) -> None:
    output = tmp_path / "out"
    with results.claimed(output, overwrite=False) as work:
        (work / "model").mkdir()
        with (
            pytest.raises(UsageError, match=rf"--output: another run works in .*\(process {os.getpid()}\)"),
            results.claimed(output, overwrite=True),
        ):
            pytest.fail("two at once")
        assert (work / "model").is_dir()
        results.finish(output)
    assert [one.name for one in output.iterdir()] == ["model"]
    with results.claimed(output, overwrite=True):
        pass


def test_a_lock_of_another_process_holds_until_it_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    script = (
        "import sys, time; from pathlib import Path; from embedkernels.cli.lock import lock\n"
        "with lock(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with pytest.raises(Held) as caught, lock(path):
            pytest.fail("two at once")
        assert caught.value.pid == str(process.pid)
        process.kill()
        process.wait()
    assert path.exists(), "what a killed process leaves"
    with lock(path):
        pass
    assert not path.exists()


def test_what_a_failed_run_left_is_replaced_and_a_usage_error_leaves_nothing(tmp_path: Path) -> None:
    output = tmp_path / "new" / "out"
    with contextlib.suppress(CliError), results.claimed(output, overwrite=False) as work:
        (work / "patched.log").touch()
        raise CliError("failed")
    assert (output / results.UNFINISHED / "patched.log").exists()
    with contextlib.suppress(UsageError), results.claimed(output, overwrite=False) as work:
        assert not list(work.iterdir())
        raise UsageError("wrong")
    assert not list(output.iterdir()), "the directory was there before this command"
    with contextlib.suppress(UsageError), results.claimed(tmp_path / "a" / "b", overwrite=False):
        raise UsageError("wrong")
    assert not (tmp_path / "a").exists()


def test_links_in_the_way_are_removed_and_what_they_lead_to_stays(tmp_path: Path) -> None:
    output, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    output.mkdir()
    elsewhere.mkdir()
    (elsewhere / "kept").touch()
    for name in ("model", results.UNFINISHED):
        (output / name).symlink_to(elsewhere, target_is_directory=True)
    with results.claimed(output, overwrite=True) as work:
        (work / "model").mkdir()
        results.finish(output)
    assert not (output / "model").is_symlink()
    assert (elsewhere / "kept").exists()


@pytest.mark.parametrize("output", ["/dev/null/out", "x" * 300], ids=["no directory", "too long"])
def test_an_output_that_cannot_be_written_is_a_usage_error(output: str) -> None:
    with pytest.raises(UsageError, match=r"--output: .* cannot be written") as caught:
        results.claimed(Path(output), overwrite=False).__enter__()
    assert caught.value.remedy


def test_a_link_that_leads_nowhere_is_no_directory(tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to(tmp_path / "gone")
    with pytest.raises(UsageError, match="out is a link to something that is not there"):
        results.claimed(tmp_path / "out", overwrite=False).__enter__()


PARENT = """
import sys
from pathlib import Path
from embedkernels.cli import launch
from embedkernels.cli.app import told
from embedkernels.cli.settings import Settings

launch._BOOT = '''
import os, time
from embedkernels.cli import worker

def wait(job, emit):
    emit({"event": "phase", "name": str(os.getpid())})
    time.sleep(100)

worker.execute = wait
worker.main()
'''
folder = Path(sys.argv[1])
say = lambda event: print(event["name"], flush=True)
with told(debug=False):
    launch.run(Settings("m", "t"), folder, patched=True, log=folder / "log", on_event=say)
"""


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_a_commands_process_ends_with_it(tmp_path: Path, sent: int, code: int) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        process.send_signal(sent)
        assert process.wait(timeout=60) == code
    deadline = time.monotonic() + 30
    while is_running(child):
        assert time.monotonic() < deadline, "the run's process goes on alone"
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_memory_that_runs_out_is_recognised() -> None:
    import torch

    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50)
    for error in (caught.value, MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")):
        event = worker.describe(error)
        assert event["message"] == "out of memory"
        assert "--batch-size" in event["remedy"]
    assert worker.describe(ValueError("out of memory of old days"))["message"].startswith("ValueError")

"""The sanitizer's launches compute the right thing, and its findings are counted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench import sanitize
from bench.parts import MARGIN
from bench.processes import TIMED_OUT, Finished

MEMCHECK = """========= COMPUTE-SANITIZER
========= Invalid __global__ read of size 4 bytes
=========     at embed_fwd_kernel+0x1a0
========= ERROR SUMMARY: {} errors
"""
NAME = "embed 100 fp32"
RACECHECK = """========= COMPUTE-SANITIZER
========= RACECHECK SUMMARY: {} hazards displayed ({} errors, {} warnings)
"""


@pytest.mark.parametrize(
    ("output", "count"),
    [
        (MEMCHECK.format(0), 0),
        (MEMCHECK.format(3), 3),
        ("========= ERROR SUMMARY: 1 error\n", 1),
        (RACECHECK.format(0, 0, 0), 0),
        (RACECHECK.format(2, 0, 2), 2),
        ("========= Error: Target application terminated before first instrumented API call\n", None),
        ("", None),
    ],
)
def test_findings_are_counted(output: str, count: int | None) -> None:
    assert sanitize.findings(output) == count


@pytest.mark.parametrize("name", sorted(sanitize.launches()))
def test_every_launch_is_right_on_the_plain_path(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With plain PyTorch, what a launch expects is what it gets: on a GPU a failure is the kernel's."""
    import embedkernels as ek

    monkeypatch.setenv("TRITON_INTERPRET", "0")  # these sizes are a GPU's: the interpreter would take minutes
    with ek.use_backend("torch"):
        assert sanitize.launch("cpu", [name]) == 0
    assert capsys.readouterr().out.startswith((f"ok: {name}", f"absent: {name}"))


def test_a_wrong_kernel_fails_its_launch(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import embedkernels as ek

    right = ek.embedding_grad
    monkeypatch.setattr(ek, "embedding_grad", lambda *args, **kw: right(*args, **{**kw, "backend": "torch"}) * 1.1)
    monkeypatch.setattr(ek, "embedding_plan", _torch_plan(ek.embedding_plan))
    assert sanitize.launch("cpu", ["embedding_grad extension hot row"]) == 1
    assert "FAILED: embedding_grad extension hot row: AssertionError: embedding_grad bf16: off by" in (
        capsys.readouterr().out
    )


def _torch_plan(plan):  # type: ignore[no-untyped-def]
    return lambda *args, **kw: plan(*args, **{**kw, "backend": "torch"})


def test_the_command_reports_its_launches(tmp_path: Path) -> None:
    """As a GPU session runs it, on the CPU: processes, result file, no tools."""
    out = tmp_path / "sanitizer.json"
    command = [sys.executable, "-m", "bench.sanitize", "--device", "cpu", "--out", str(out), "--only", NAME]
    env = {**os.environ, "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=sanitize.processes.ROOT, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(out.read_text())
    assert list(result["launches"]) == [NAME]
    assert result["launches"][NAME]["output"] == f"ok: {NAME}\n"
    assert result["tools"] == {tool: {"not_run": "no GPU"} for tool in sanitize.TOOLS}


REFUSAL = """========= COMPUTE-SANITIZER
========= Error: Device not supported. Please refer to the "Supported Devices" section of the sanitizer documentation
========= ERROR SUMMARY: 1 error
"""


@pytest.mark.parametrize(
    ("done", "not_run", "problem"),
    [
        (Finished(0, 9.0, MEMCHECK.format(0)), None, ""),
        (Finished(86, 9.0, MEMCHECK.format(3)), None, "memcheck: 3 findings, exit code 86"),
        (Finished(1, 9.0, "no summary"), None, "memcheck: None findings, exit code 1"),
        (Finished(0, 9.0, "no summary"), None, "memcheck: None findings, exit code 0"),
        (Finished(1, 9.0, REFUSAL), "the tool refuses this device", ""),
        (Finished(TIMED_OUT, 9.0, "ok: embed", True), "out of time after 9 s", ""),
        (Finished(TIMED_OUT, 9.0, MEMCHECK.format(2), True), None, "memcheck: 2 findings, exit code 124"),
        # A launch that prints the words is not the tool that says them.
        (
            Finished(1, 9.0, "FAILED: RuntimeError: device not supported"),
            None,
            "memcheck: None findings, exit code 1",
        ),
    ],
)
def test_what_a_tool_says_is_judged(done: Finished, not_run: str | None, problem: str) -> None:
    entry, said = sanitize.judged("memcheck", done)
    assert entry.get("not_run") == not_run
    assert said == problem


def test_only_options_that_the_tool_has_are_given() -> None:
    new = "--kernel-name arg\n--report-api-errors arg (=explicit)\n--target-processes arg (=all)\n"
    assert "--report-api-errors no" in " ".join(sanitize.options_of(new, "memcheck"))
    assert "--target-processes application-only" in " ".join(sanitize.options_of(new, "racecheck"))
    assert "--report-api-errors" not in sanitize.options_of(new, "racecheck")
    named = "--kernel-name kns=embed --kernel-name kns=attention --kernel-name kns=rope"
    assert named in " ".join(sanitize.options_of(new, "memcheck"))
    old = sanitize.options_of("--kernel-regex arg\n--target-processes-filter arg\n", "memcheck")
    assert "--kernel-regex" in old
    assert not {"--report-api-errors", "--target-processes", "--kernel-name"} & set(old)


TOOL = """
import os, sys
if "--help" in sys.argv:
    print("--kernel-name --report-api-errors --target-processes ")
else:
    open(os.environ["CALLS"], "a").write(" ".join(sys.argv[1:]) + "\\n")
    print("========= ERROR SUMMARY: 0 errors")
"""


def fake_session(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, launched: str, seconds: float) -> tuple[int, dict]:  # type: ignore[type-arg]
    """A whole run with a tool that notes its calls, and launches that run ``launched``."""
    tool, out = tmp_path / "compute-sanitizer", tmp_path / "sanitizer.json"
    tool.write_text(f"#!{sys.executable}\n{TOOL}")
    tool.chmod(0o755)
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    monkeypatch.setattr(sanitize, "find_sanitizer", lambda: str(tool))
    monkeypatch.setattr(sanitize, "launches", lambda: {"embed": None, "embedding_grad extension": None})
    run = sanitize.processes.run

    def stand_in(command: list[str], limit: float, env: dict[str, str] | None = None) -> Finished:
        launches_itself = command[0] == sys.executable
        return run([sys.executable, "-c", launched] if launches_itself else command, limit, env)

    monkeypatch.setattr(sanitize.processes, "run", stand_in)
    code = sanitize.main(["--seconds", str(seconds), "--out", str(out)])
    return code, json.loads(out.read_text())


def test_racecheck_looks_at_the_extension_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    code, result = fake_session(monkeypatch, tmp_path, "print('ok: this')", 60)
    assert (code, result["problems"], result["incomplete"]) == (0, [], [])
    calls = {line.split()[1]: line for line in (tmp_path / "calls").read_text().splitlines()}
    assert calls["memcheck"].endswith("--only embed --only embedding_grad extension")
    assert calls["racecheck"].endswith("--device cuda --only embedding_grad extension")


def test_without_time_for_the_tools_they_are_not_started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Launches that would not end are stopped, and what is left of the time is not spent on the tools."""
    stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
    started = time.monotonic()
    code, result = fake_session(monkeypatch, tmp_path, stubborn, 1.0)
    assert time.monotonic() - started < 1.0 + MARGIN - 1, "must end before it is stopped from outside"
    assert result["tools"] == {tool: {"not_run": "out of time"} for tool in sanitize.TOOLS}
    assert not (tmp_path / "calls").exists()
    assert code == 0, "one second was too short to tell a launch that hangs from one that is slow"
    assert result["incomplete"][0] == "embed: out of time"


def test_an_unknown_launch_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        sanitize.main(["--device", "cpu", "--only", "nothing"])
    assert "there is no nothing; expected some of embed" in capsys.readouterr().err

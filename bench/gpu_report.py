"""One GPU session in under nine minutes: build, sanitise, benchmark, test; one JSON and one Markdown file.

    make gpu-report OUT=dir [PARTS=build,tests,sanitizer,embed,embedding_grad,attention,rope,host,step]

Needs no network and no installation. Every part is a process with a time limit; one that fails or is stopped does not
keep the others from running. Both files are written again after every part, so that what is there is never lost.
Without a GPU it says so and does what can be done: the build, the compilation of every kernel, dry runs.

A part is "incomplete" if nothing of what it did is wrong, but time or the machine kept it from doing all of it.

Exit code 0 if nothing is wrong, 1 if a part failed or was stopped before it could tell, 2 for wrong arguments.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from bench import environment, markdown, processes
from bench.files import read_json, write_json
from bench.parts import LIMIT, OVERHEAD, Machine, Part, choose, this_machine
from bench.processes import Finished

SCHEMA = 1
KEPT = 8000  # characters of a failed part's output


def status_of(finished: Finished, data: Any) -> tuple[str, str]:
    """A part's status and what is to be said about it, from how it ended and what it wrote.

    ``data`` may have ``incomplete``, a list of what was left out, and ``may_be_stopped``: True while all that matters
    is done, and done well.
    """
    data = data if isinstance(data, dict) else {}
    if finished.timed_out:
        detail = f"stopped after {finished.seconds:.0f} s"
        good = data.get("may_be_stopped") and not data.get("problems")
        return ("incomplete" if good else "timed out"), detail
    if finished.exit_code:
        return "failed", f"exit code {finished.exit_code}"
    left_out = data.get("incomplete", [])
    return ("incomplete", "; ".join(left_out)) if left_out else ("passed", "")


def run_part(part: Part, machine: Machine, seconds: float, scratch: Path) -> dict[str, Any]:
    """Run one part; its status is passed, incomplete, failed, timed out or not run."""
    record: dict[str, Any] = {"name": part.name, "limit_s": round(seconds, 1)}
    if obstacle := part.obstacle(machine):
        return {**record, "status": "not run", "detail": obstacle, "seconds": 0.0, "data": None}
    out = scratch / f"{part.name}.json"
    command = part.command(machine, seconds, out)
    env = {"PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1"}
    if machine.gpu:
        env["TRITON_INTERPRET"] = "0"  # a 1 left in the environment would run the kernels on the CPU
    finished = processes.run(command, seconds, env)
    data = read_json(out)
    status, detail = status_of(finished, data)
    record.update(status=status, detail=detail, seconds=finished.seconds, data=data)
    if status in ("failed", "timed out"):
        record["output"] = finished.output[-KEPT:]
    return record


def run_session(
    parts: Sequence[Part],
    machine: Machine,
    report: dict[str, Any],
    save: Callable[[], None],
    limit: float | None = None,
) -> None:
    """Run the parts in order, within ``limit`` seconds altogether (None: what a session may take).

    A part may take its own share and whatever is not reserved by the parts after it: time that was left over, and
    the shares of parts that are not run.
    """
    deadline = time.monotonic() + (LIMIT - OVERHEAD if limit is None else limit)
    with TemporaryDirectory(prefix="gpu-report-") as scratch:
        for done, part in enumerate(parts):
            reserved = sum(later.seconds for later in parts[done + 1 :] if not later.obstacle(machine))
            seconds = max(1.0, deadline - time.monotonic() - reserved)
            record = run_part(part, machine, seconds, Path(scratch))
            report["parts"].append(record)
            print(f"{part.name}: {record['status']} {record['detail']} ({record['seconds']:.0f} s)", flush=True)
            save()


def main(argv: list[str] | None = None) -> int:
    started = time.monotonic()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of report.json and report.md")
    parser.add_argument("--parts", default="", help="comma separated; all by default")
    args = parser.parse_args(argv)
    machine = this_machine()
    try:
        parts = choose(args.parts, machine)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    if not machine.gpu:
        print("No GPU here: building, compiling every kernel and dry runs only.", flush=True)
    report: dict[str, Any] = {
        "schema": SCHEMA,
        "gpu": machine.gpu,
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "environment": environment.describe(),
        "parts": [],
    }

    def save() -> None:
        report["seconds"] = round(time.monotonic() - started, 1)
        report["ok"] = all(part["status"] in ("passed", "incomplete", "not run") for part in report["parts"])
        write_json(args.out / "report.json", report)
        partial = args.out / "report.md.partial"
        partial.write_text(markdown.render(report))
        os.replace(partial, args.out / "report.md")

    save()
    run_session(parts, machine, report, save)
    # Clocks again: a card that throttled during the session shows it here.
    report["environment"]["clocks_at_end"] = environment.clocks()
    save()
    print(f"{args.out / 'report.md'}, {report['seconds']:.0f} s")
    return 0 if report["ok"] else 1


if __name__ == "__main__":
    processes.end_with_commands()
    sys.exit(main())

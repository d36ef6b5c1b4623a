"""The tests that gain from a GPU, with a record that survives being stopped: written after every test.

    python -m bench.gpu_tests --out tests.json

Nearly all of their time goes into compiling kernels, each for its own shapes: several processes share the GPU so that
the compilers share the processor. ``--processes 1`` runs them one after the other.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from bench.environment import ROOT
from bench.files import write_json

# What runs the same on every machine is left to CI: compilation, packaging, CPU code, this harness.
LEFT_OUT = (
    "tests/attention/test_compiled.py",
    "tests/bench/test_build.py",
    "tests/bench/test_cases.py",
    "tests/bench/test_check.py",
    "tests/bench/test_files.py",
    "tests/bench/test_gpu_report.py",
    "tests/bench/test_gpu_tests.py",
    "tests/bench/test_sanitize.py",
    "tests/bench/test_step.py",
    "tests/bench/test_suites.py",
    "tests/cli",
    "tests/compiled",
    "tests/extension/test_build.py",
    "tests/extension/test_cpu_ops.py",
    "tests/extension/test_cuda_code.py",
    "tests/extension/test_conversions.py",
    "tests/extension/test_cuda_grad_kernels.py",
    "tests/extension/test_cuda_plan_kernels.py",
    "tests/extension/test_loader.py",
    "tests/extension/test_shim.py",
    "tests/test_absence.py",
    "tests/test_layering.py",
)
# If the time runs out, it should be in the tests that say least about a GPU. Those that need one come before all.
FIRST = ("tests/extension", "tests/embedding", "tests/embed", "tests/rope", "tests/attention", "tests/hf")
KEPT = 3000  # characters of a failure's text
SLOWEST = 15


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """This module is a plugin of every test process: the order must be the same in all."""

    def order(item: pytest.Item) -> tuple[bool, int]:
        place = next((i for i, folder in enumerate(FIRST) if item.nodeid.startswith(f"{folder}/")), len(FIRST))
        return "gpu" not in item.keywords, place

    items.sort(key=order)


class Recorder:
    """A pytest plugin of the main process that keeps counts, failures and the slowest tests in a JSON file."""

    def __init__(self, path: Path, processes: int) -> None:
        self.path = path
        self.processes = processes
        self.counts = {"passed": 0, "failed": 0, "skipped": 0}
        self.failures: dict[str, str] = {}
        self.seconds: dict[str, float] = {}
        self.running: set[str] = set()
        self.selected = 0
        self.finished = False
        self.started = time.monotonic()

    def result(self) -> dict[str, Any]:
        slowest = sorted(self.seconds.items(), key=lambda item: -item[1])[:SLOWEST]
        return {
            "processes": self.processes,
            "selected": self.selected,
            "counts": self.counts,
            "failures": self.failures,
            "slowest": [{"test": name, "seconds": round(seconds, 2)} for name, seconds in slowest],
            "running": sorted(self.running),
            "finished": self.finished,
            "may_be_stopped": self.counts["passed"] > 0 and self.counts["failed"] == 0,
            "seconds": round(time.monotonic() - self.started, 1),
        }

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.selected = len(session.items)

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, ids: list[str]) -> None:
        self.selected = len(ids)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.running.add(nodeid)
        write_json(self.path, self.result())

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds[report.nodeid] = self.seconds.get(report.nodeid, 0.0) + report.duration
        if report.failed:
            self.counts["failed"] += report.nodeid not in self.failures
            self.failures[report.nodeid] = f"{report.when}: {report.longreprtext[-KEPT:]}"
        elif report.skipped:
            self.counts["skipped"] += 1
        elif report.when == "call":
            self.counts["passed"] += 1
        if report.when == "teardown":
            self.running.discard(report.nodeid)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed and report.nodeid not in self.failures:
            self.counts["failed"] += 1
            self.failures[report.nodeid] = f"collection: {report.longreprtext[-KEPT:]}"

    def pytest_sessionfinish(self) -> None:
        self.finished = True
        write_json(self.path, self.result())


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--processes", type=int, default=max(1, min(8, (os.cpu_count() or 1) // 2)))
    parser.add_argument("pytest_args", nargs="*", help="instead of the whole selection; after --")
    args = parser.parse_args(argv)
    processes = args.processes if importlib.util.find_spec("xdist") else 1
    selection = args.pytest_args or [str(ROOT / "tests"), *(f"--ignore={ROOT / place}" for place in LEFT_OUT)]
    options = ["-p", "bench.gpu_tests", "-p", "no:cacheprovider", "-q", f"--rootdir={ROOT}"]
    options += ["-n", str(processes)] if processes > 1 else ["-p", "no:xdist"]
    return int(pytest.main([*options, *selection], plugins=[Recorder(args.out, processes)]))


if __name__ == "__main__":
    sys.exit(main())

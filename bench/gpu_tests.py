"""The tests that gain from a GPU, with a record that survives being stopped: written after every test.

python -m bench.gpu_tests --out tests.json
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from bench.environment import ROOT
from bench.files import write_json

# What runs the same on every machine is left to CI: compiling for other targets, packaging, this harness.
LEFT_OUT = ("tests/compiled", "tests/bench", "tests/extension/shim", "tests/cli", "tests/packaging")
# Kernels and ops first: if the time runs out, it should be in the tests that say least about a GPU.
FIRST = ("tests/kernels", "tests/ops", "tests/extension", "tests/attention", "tests/nn", "tests/hf")
KEPT = 3000  # characters of a failure's text
SLOWEST = 15


class Recorder:
    """A pytest plugin that keeps counts, failures and the slowest tests in a JSON file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.counts = {"passed": 0, "failed": 0, "skipped": 0}
        self.failures: dict[str, str] = {}
        self.seconds: dict[str, float] = {}
        self.running: str | None = None
        self.selected = 0
        self.finished = False
        self.started = time.monotonic()

    def result(self) -> dict[str, Any]:
        slowest = sorted(self.seconds.items(), key=lambda item: -item[1])[:SLOWEST]
        return {
            "selected": self.selected,
            "counts": self.counts,
            "failures": self.failures,
            "slowest": [{"test": name, "seconds": round(seconds, 2)} for name, seconds in slowest],
            "running": self.running,
            "finished": self.finished,
            "seconds": round(time.monotonic() - self.started, 1),
        }

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        def order(item: pytest.Item) -> int:
            return next((i for i, place in enumerate(FIRST) if item.nodeid.startswith(place)), len(FIRST))

        items.sort(key=order)

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.selected = len(session.items)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.running = nodeid
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
            self.running = None

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.counts["failed"] += 1
            self.failures[report.nodeid] = f"collection: {report.longreprtext[-KEPT:]}"

    def pytest_sessionfinish(self) -> None:
        self.finished = True
        write_json(self.path, self.result())


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("pytest_args", nargs="*", help="instead of the whole selection; after --")
    args = parser.parse_args(argv)
    selection = args.pytest_args or [str(ROOT / "tests"), *(f"--ignore={ROOT / place}" for place in LEFT_OUT)]
    # One process: workers would compile the same kernels and share one GPU's memory.
    options = ["-p", "no:xdist", "-p", "no:cacheprovider", "-q", f"--rootdir={ROOT}"]
    return int(pytest.main([*options, *selection], plugins=[Recorder(args.out)]))


if __name__ == "__main__":
    sys.exit(main())

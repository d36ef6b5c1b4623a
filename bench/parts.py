"""The parts of a GPU session: what each runs and how long it may take."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bench.processes import GRACE

SUITES = ("embed", "embedding_grad", "attention", "rope", "step")
# The sanitizer stops itself this long before it would be stopped: its commands are given a grace to end, one after
# the other, and what they said must still be written.
MARGIN = 3 * GRACE + 3
LIMIT = 540.0  # seconds that a whole session may take
OVERHEAD = 14.0  # of it for reading the environment and writing the report


@dataclass(frozen=True)
class Machine:
    """What a part's command depends on. ``capability`` is like ``"90"``, None without a GPU."""

    capability: str | None
    triton: bool = True

    @property
    def gpu(self) -> bool:
        return self.capability is not None


@dataclass(frozen=True)
class Part:
    """One part of a session.

    Attributes:
        name: as in ``PARTS=``.
        seconds: its share of the session; what parts before it left over comes on top.
        command: from the machine, the seconds it may take and the file its result goes to.
        needs_gpu: not run without one.
        needs_triton: not run where it is not installed.
        without_gpu_only: stands in for what a GPU would show, and is left out where there is one.
    """

    name: str
    seconds: float
    command: Callable[[Machine, float, Path], list[str]]
    needs_gpu: bool = False
    without_gpu_only: bool = False
    needs_triton: bool = False

    def obstacle(self, machine: Machine) -> str:
        """Why this part cannot run there; "" if it can."""
        if self.needs_gpu and not machine.gpu:
            return "no GPU"
        return "triton is not installed" if self.needs_triton and not machine.triton else ""


def this_machine() -> Machine:
    """The first GPU's compute capability, as PyTorch sees it, and whether there is a Triton."""
    import torch

    triton = importlib.util.find_spec("triton") is not None
    if not torch.cuda.is_available():
        return Machine(None, triton)
    major, minor = torch.cuda.get_device_capability(0)
    return Machine(f"{major}{minor}", triton)


def _module(name: str, out: Path, *args: str) -> list[str]:
    return [sys.executable, "-m", f"bench.{name}", *args, "--out", str(out)]


def _build(machine: Machine, seconds: float, out: Path) -> list[str]:  # noqa: ARG001
    return _module("build", out, *(["--capability", machine.capability] if machine.capability else []))


def _resources(machine: Machine, seconds: float, out: Path) -> list[str]:
    targets = ["--targets", f"sm_{machine.capability}"] if machine.capability else []
    jobs = str(max(2, (os.cpu_count() or 1) // 2))
    return _module("resources", out, *targets, "--thin", "--jobs", jobs, "--seconds", f"{seconds - 1.5 * MARGIN:.0f}")


def _tests(machine: Machine, seconds: float, out: Path) -> list[str]:  # noqa: ARG001
    return _module("gpu_tests", out)


def _sanitizer(machine: Machine, seconds: float, out: Path) -> list[str]:  # noqa: ARG001
    return _module("sanitize", out, "--seconds", f"{seconds - MARGIN:.0f}")


def _host(machine: Machine, seconds: float, out: Path) -> list[str]:  # noqa: ARG001
    return [sys.executable, "-m", "bench.host_time", "--json", str(out)]


def _suite(name: str) -> Callable[[Machine, float, Path], list[str]]:
    def command(machine: Machine, seconds: float, out: Path) -> list[str]:
        where = ["--device", "cuda"] if machine.gpu else ["--device", "cpu", "--tiny"]
        # Nothing new is started after this time; what is under way, a compilation at worst, needs the rest.
        return [
            sys.executable,
            "-m",
            "bench.suites",
            name,
            *where,
            "--seconds",
            f"{max(5.0, 0.75 * seconds):.0f}",
            "--out",
            str(out),
        ]

    return command


PARTS: tuple[Part, ...] = (
    Part("build", 85, _build),
    Part("sanitizer", 75, _sanitizer, needs_gpu=True),
    Part("embed", 50, _suite("embed")),
    Part("embedding_grad", 45, _suite("embedding_grad")),
    Part("attention", 50, _suite("attention")),
    Part("rope", 18, _suite("rope")),
    Part("host", 15, _host, needs_triton=True),
    Part("step", 75, _suite("step")),
    Part("resources", 0, _resources, without_gpu_only=True, needs_triton=True),
    # Last: it takes whatever the others have left, and its record is useful however far it got.
    Part("tests", 113, _tests, needs_gpu=True),
)
assert sum(part.seconds for part in PARTS) <= LIMIT - OVERHEAD


def choose(names: str, machine: Machine) -> list[Part]:
    """The parts that ``names`` (comma separated, empty for the usual ones) asks for, in the order they run.

    Raises:
        ValueError: a name that is no part.
    """
    wanted = [name for name in names.replace(" ", "").split(",") if name]
    known = [part.name for part in PARTS]
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise ValueError(f"PARTS: there is no {', '.join(unknown)}; expected some of {', '.join(known)}")
    if wanted:
        return [part for part in PARTS if part.name in wanted]
    return [part for part in PARTS if not (part.without_gpu_only and machine.gpu)]

"""Every shipped kernel configuration compiles for every target, without spills and within its bounds.

Compiled without a GPU, each target once per session whatever the number of test processes. ``BOUNDS`` says what each
family of kernels promises and why; the first row that matches a spec and a target holds.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

import embedkernels
from bench import resources

ROOT = Path(__file__).resolve().parents[2]
NVIDIA = [target for target in resources.TARGETS if target.startswith("sm_")]


@dataclass(frozen=True)
class Bound:
    """What the specs that match ``spec`` promise on the targets that match ``target``."""

    spec: str
    target: str
    max_registers: int
    min_occupancy: float
    wide_loads: bool
    reason: str


BOUNDS: tuple[Bound, ...] = (
    Bound("*", "gfx942", 512, 0.0, False, "256 vector and 256 accumulation registers; what goes beyond is scratch"),
    Bound("*", "sm_*", 255, 0.0, False, "what an instruction can name"),
)


def bound_of(spec: str, target: str) -> Bound:
    return next(b for b in BOUNDS if fnmatchcase(spec, b.spec.replace("[", "[[]")) and fnmatchcase(target, b.target))


def sources_hash() -> str:
    """Names the state of everything a compilation depends on."""
    import triton

    digest = hashlib.sha256(triton.__version__.encode())
    kernels = Path(embedkernels.__file__).parent / "kernels"
    for path in [*sorted(kernels.glob("*.py")), Path(resources.__file__)]:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def measured(target: str, cache: Path) -> dict[str, Any]:
    """The report of ``bench.resources`` for a target, compiled by whichever test process asks first."""
    cache.mkdir(parents=True, exist_ok=True)
    path = cache / f"{target}-{sources_hash()}.json"
    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            partial = path.with_suffix(".partial")
            command = [sys.executable, "-m", "bench.resources", "--targets", target, "--out", str(partial)]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            assert partial.exists(), f"{' '.join(command)} failed:\n{done.stderr[-4000:]}"
            os.replace(partial, path)
    return json.loads(path.read_text())  # type: ignore[no-any-return]


@pytest.fixture(scope="session")
def cache(pytestconfig: pytest.Config) -> Path:
    return Path(pytestconfig.cache.mkdir("compiled"))  # type: ignore[union-attr]


@pytest.fixture(scope="session", params=resources.TARGETS)
def report(request: pytest.FixtureRequest, cache: Path) -> dict[str, Any]:
    return {"target": request.param, **measured(request.param, cache)}


def compiled(report: dict[str, Any]) -> Iterator[dict[str, Any]]:
    return (result for result in report["results"] if result["error"] is None)


def test_every_configuration_compiles(report: dict[str, Any]) -> None:
    assert report["results"], "no kernel module lists compile specs"
    failed = {result["spec"]: result["error"] for result in report["results"] if result["error"]}
    assert not failed


def test_every_kernel_has_a_configuration(report: dict[str, Any]) -> None:
    """A kernel that no spec names would ship without this proof."""
    covered = {result["kernel"] for result in report["results"]}
    assert {name.rpartition(".")[2] for name in report["kernels_defined"]} - covered == set()


def test_nothing_spills(report: dict[str, Any]) -> None:
    spills = {r["spec"]: (r["spill_stores"], r["spill_loads"]) for r in compiled(report)}
    assert {spec: bytes_ for spec, bytes_ in spills.items() if bytes_ != (0, 0)} == {}


def test_registers_stay_within_their_bounds(report: dict[str, Any]) -> None:
    over = {}
    for result in compiled(report):
        bound = bound_of(result["spec"], report["target"])
        if result["registers"] > bound.max_registers:
            over[result["spec"]] = f"{result['registers']} > {bound.max_registers}: {bound.reason}"
    assert over == {}


def test_shared_memory_fits(report: dict[str, Any]) -> None:
    limit = resources.SHARED_LIMIT[report["target"]]
    assert {r["spec"]: r["shared"] for r in compiled(report) if r["shared"] > limit} == {}


def test_occupancy_reaches_its_bound(report: dict[str, Any]) -> None:
    under = {}
    for result in compiled(report):
        bound = bound_of(result["spec"], report["target"])
        if result["occupancy"] is not None and result["occupancy"] < bound.min_occupancy:
            under[result["spec"]] = f"{result['occupancy']:.0%} < {bound.min_occupancy:.0%}: {bound.reason}"
    assert under == {}


def test_rows_are_read_and_written_in_16_byte_pieces(report: dict[str, Any]) -> None:
    if report["target"] not in NVIDIA:
        # AMD's instruction mix is not measured: there is nothing to bound.
        assert all(result["instructions"] == {} for result in compiled(report))
        return
    narrow = {}
    for result in compiled(report):
        mix = result["instructions"]
        wide = mix["ldg_128"] + mix["ldgsts_128"] + mix["tma_load"]
        if bound_of(result["spec"], report["target"]).wide_loads and (wide == 0 or mix["stg_128"] == 0):
            narrow[result["spec"]] = mix
    assert narrow == {}


def test_nothing_uses_local_memory(report: dict[str, Any]) -> None:
    """An array indexed at run time goes to local memory without being called a spill."""
    local = {r["spec"]: r["instructions"] for r in compiled(report) if r["instructions"]}
    assert {spec: mix for spec, mix in local.items() if mix["ldl"] or mix["stl"]} == {}

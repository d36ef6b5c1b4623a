"""Every shipped kernel compiles for every target, without spills and within its bounds.

Compiled without a GPU, once per session whatever the number of test processes, in some 310 seconds of one core. So
long because every tile is there; left out (``bench.resources.select``, thin) are

- fp16, which is the same as bf16 but for the type's name;
- of the attention kernels head sizes that share kernel, dtype, features and tile with a wider one: 48 and 96, 24 and
  40 (72 stands for all whose rows are not known to be aligned), and 16 or 32 where a wider one has the same tile;
- of the other kernels, whose tiles are the same everywhere, all but the largest of each kernel and dtype; on sm_90
  only of those in fp32 and fp64; of the input embeddings not what ``bench.resources.KEPT`` names.

``python -m bench.resources`` compiles them all, and with ``--variants all`` the features of the attention kernels
combined and every variant of the input embeddings in both dtypes and at four widths: its last results are
``bench/results/compiled/attention.json`` and ``embed.json``.

``BOUNDS`` says what each family of kernels promises and why; the first row that matches a spec and a target holds.
The tiles are chosen with one Triton, whose register allocation the bounds describe; what another one makes of them
must compile, fit, and keep in local memory no more than a few values.
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

pytestmark = pytest.mark.timeout(1500)  # whichever test asks first waits for all compilations

ROOT = Path(__file__).resolve().parents[2]
TUNED_WITH = "3.6."
LOCAL_ELSEWHERE = 64  # bytes per thread


@dataclass(frozen=True)
class Bound:
    """What the specs that match ``spec`` promise on the targets that match ``target``."""

    spec: str
    target: str
    max_registers: int
    min_occupancy: float
    wide: bool  # rows of 16-byte multiples are read and written in 16-byte pieces
    hgmma: bool  # products by Hopper's warpgroup instructions
    reason: str


# A memory-bound kernel hides a latency of about 0.7 us at 3.4 TB/s with 18 KB in flight on each of 132
# multiprocessors: a third of the threads with two 16-byte loads each have 21 KB.
HALF, THIRD = 0.5, 0.31
BOUNDS: tuple[Bound, ...] = (
    Bound("*", "gfx942", 512, 0.0, False, False, "256 vector and 256 accumulation registers; beyond that is scratch"),
    Bound(
        "embed_bwd_kernel[d8192,*",
        "sm_*",
        128,
        0.25,
        True,
        False,
        "two rows stay in registers",
    ),
    Bound("embed_bwd_reduce_kernel*", "sm_*", 64, HALF, False, False, "reads partial sums, writes one row"),
    Bound("embed_stats_kernel*", "sm_*", 64, HALF, False, False, "writes two numbers a row"),
    Bound("embed_projection_kernel*sinusoids,*", "sm_*", 80, 0.37, False, False, "a sine an element, in a wide row"),
    Bound("embed_projection_kernel*", "sm_*", 64, HALF, False, False, "writes two numbers a row"),
    Bound(
        "embed_bwd_kernel[d64,*sinusoids,bf16]", "sm_*", 64, HALF, False, False, "registers for 8 bytes of a row only"
    ),
    Bound("count_positions_kernel*", "sm_*", 96, THIRD, False, False, "one program a sequence: the count is serial"),
    Bound("embed_*", "sm_*", 64, HALF, True, False, "bound by memory, and half occupied for the whole front end"),
    Bound("embedding_fwd_kernel[d33,*", "sm_*", 64, HALF, False, False, "rows that are not multiples of 16 bytes"),
    Bound("embedding_fwd_kernel*", "sm_*", 64, HALF, True, False, "bound by memory: nothing but a copy"),
    Bound(
        "embedding_grad_tile_kernel*,fp64,accumulate*",
        "sm_*",
        192,
        0.15,
        False,
        False,
        "twice fp32, and rows of the table in flight too",
    ),
    Bound(
        "embedding_grad_tile_kernel*,fp32*,accumulate*",
        "sm_*",
        120,
        0.26,
        False,
        False,
        "rows of the table are in flight too",
    ),
    Bound("embedding_grad_*fp64*", "sm_*", 168, 0.18, False, False, "twice fp32: for gradient checks"),
    Bound("embedding_grad_*", "sm_*", 96, THIRD, False, False, "bound by memory"),
    Bound("rope_kernel*", "sm_*", 64, HALF, True, False, "bound by memory: two multiplications an element"),
    Bound("attention_bounds_kernel*", "sm_*", 64, HALF, False, False, "reads a mask once"),
    Bound("attention_ranges_kernel*", "sm_*", 64, HALF, False, False, "writes two numbers a token"),
    Bound("attention_bwd_preprocess_kernel[d128,*", "sm_100", 144, 0.12, False, False, "32 loads in flight a thread"),
    Bound("attention_bwd_preprocess_kernel*", "sm_*", 64, HALF, False, False, "writes a number a row"),
    *(
        Bound(
            f"attention_*,d{size},*", "sm_*", 255, 0.06, False, False, "rows that Triton does not know to be aligned"
        )
        for size in (24, 40, 72)
    ),
    Bound("attention_*fp32*", "sm_*", 255, 0.12, True, False, "fp32 products run on the ordinary units"),
    Bound("attention_*", "sm_90", 255, 0.12, True, True, "accumulators stay in registers"),
    Bound("attention_*", "sm_*", 255, 0.06, True, False, "accumulators stay in registers"),
)


def bound_of(spec: str, target: str) -> Bound:
    return next(b for b in BOUNDS if fnmatchcase(spec, b.spec.replace("[", "[[]")) and fnmatchcase(target, b.target))


def tuned() -> bool:
    import triton

    return triton.__version__.startswith(TUNED_WITH)


def targets_here() -> tuple[str, ...]:
    """With another Triton than the tiles were chosen with, Hopper alone: the time of CI is limited."""
    return resources.TARGETS if tuned() else ("sm_90",)


def sources_hash() -> str:
    """Names the state of everything a compilation depends on."""
    import triton

    digest = hashlib.sha256(triton.__version__.encode())
    kernels = Path(embedkernels.__file__).parent / "kernels"
    for path in [*sorted(kernels.glob("*.py")), Path(resources.__file__)]:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


# What the compiler made of these very sources, so that not every run compiles all of them again: a run of this file
# with EMBEDKERNELS_KEEP_COMPILED=1 writes it. A sample is compiled in any case.
KEPT = ROOT / "bench" / "results" / "compiled" / "listed.json"
ONE_IN = 12


def kept() -> dict[str, Any] | None:
    """The committed report, if it is of these sources and this compiler."""
    if os.environ.get("EMBEDKERNELS_KEEP_COMPILED") or not KEPT.exists():
        return None
    report: dict[str, Any] = json.loads(KEPT.read_text())
    return report if report["sources"] == sources_hash() else None


def measured(cache: Path) -> dict[str, Any]:
    """The report of ``bench.resources`` on all targets: the committed one, or what whichever test process asks first
    compiles.

    Kept for the next session only if every compilation was good: what went wrong may have had a passing reason. The
    other test processes of this session (they share a parent) read it all the same.
    """
    if (report := kept()) is not None:
        return report
    cache.mkdir(parents=True, exist_ok=True)
    path = cache / f"{sources_hash()}.json"
    passing = path.with_suffix(f".{os.environ.get('PYTEST_XDIST_TESTRUNUID') or os.getpid()}.json")
    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for known in (path, passing):
            if known.exists():
                return json.loads(known.read_text())  # type: ignore[no-any-return]
        for stale in [path.with_suffix(".partial"), *cache.glob(f"{path.stem}.*.json")]:
            stale.unlink(missing_ok=True)
        partial = path.with_suffix(".partial")
        done = compile_all(partial)
        assert partial.exists(), f"{' '.join(done.args)} failed:\n{done.stderr[-4000:]}"
        report = json.loads(partial.read_text())
        good = report["results"] and not report["out_of_time"] and not any(r["error"] for r in report["results"])
        os.replace(partial, path if good else passing)
        if good and os.environ.get("EMBEDKERNELS_KEEP_COMPILED"):
            keep(report)
    return report  # type: ignore[no-any-return]


def keep(report: dict[str, Any]) -> None:
    """Write the committed report, a line per result: what depends on the machine, its times, is left out."""
    lines = [json.dumps({key: x for key, x in result.items() if key != "seconds"}) for result in report["results"]]
    head = {"sources": sources_hash(), **{key: x for key, x in report.items() if key not in ("results", "seconds")}}
    KEPT.write_text(json.dumps(head)[:-1] + ', "results": [\n' + ",\n".join(lines) + "\n]}\n")


SAMPLE = """
import dataclasses, json, sys
from bench.resources import measure_one

tasks, mix = map(json.loads, sys.argv[1:])
print(json.dumps([dataclasses.asdict(measure_one(*task, mix)) for task in tasks]))
"""


def test_what_was_kept_is_what_the_compiler_makes() -> None:
    report = kept()
    if report is None:
        pytest.skip("nothing is kept of these sources: all were compiled")
    wanted = report["results"][::ONE_IN]
    assert {result["target"] for result in wanted} == set(resources.TARGETS)
    tasks = [(result["module"], result["spec"], result["target"]) for result in wanted]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", SAMPLE, json.dumps(tasks), json.dumps(list(DISASSEMBLED))],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    found = [{key: x for key, x in result.items() if key != "seconds"} for result in json.loads(done.stdout)]
    assert found == wanted


def compile_all(out: Path) -> subprocess.CompletedProcess[str]:
    # The PTX of most says what the tests ask of them: to disassemble what ptxas made of it takes a tenth of the time.
    targets = ["--targets", ",".join(targets_here())]
    command = [sys.executable, "-m", "bench.resources", "--thin", *targets, "--out", str(out), "--mix", *DISASSEMBLED]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.fixture(scope="session")
def cache(pytestconfig: pytest.Config) -> Path:
    return Path(pytestconfig.cache.mkdir("compiled"))  # type: ignore[union-attr]


@pytest.fixture(scope="session", params=targets_here())
def report(request: pytest.FixtureRequest, cache: Path) -> dict[str, Any]:
    report = measured(cache)
    results = [result for result in report["results"] if result["target"] == request.param]
    return {**report, "target": request.param, "results": results}


# Of 16 bytes, that a thread has of a tile.
FORWARD_PIECES, BACKWARD_PIECES = 2, 1
DISASSEMBLED = {
    f"embed_{kernel}_kernel[d{width},{dtype}]": (kernel, width, dtype)
    for kernel in ("fwd", "bwd")
    for width in (64, 768, 1024)
    for dtype in ("bf16", "fp32")
}


def compiled(report: dict[str, Any]) -> Iterator[dict[str, Any]]:
    return (result for result in report["results"] if result["error"] is None)


def test_a_compilation_that_failed_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reason may have been this machine's: no memory, a full disk."""
    errors: list[str | None] = ["out of memory", None]

    def stand_in(out: Path) -> subprocess.CompletedProcess[str]:
        error = errors.pop(0)
        out.write_text(json.dumps({"results": [{"spec": "one", "error": error}], "out_of_time": 0}))
        return subprocess.CompletedProcess([], int(bool(error)), "", "")

    monkeypatch.setattr(sys.modules[__name__], "compile_all", stand_in)
    monkeypatch.setattr(sys.modules[__name__], "kept", lambda: None)
    monkeypatch.delenv("EMBEDKERNELS_KEEP_COMPILED", raising=False)
    for session, error in (("first", "out of memory"), ("first", "out of memory"), ("second", None), ("third", None)):
        monkeypatch.setenv("PYTEST_XDIST_TESTRUNUID", session)
        assert measured(tmp_path)["results"] == [{"spec": "one", "error": error}]
    assert errors == []


def test_every_configuration_compiles(report: dict[str, Any]) -> None:
    assert report["results"], "no kernel module lists compile specs"
    assert report["out_of_time"] == 0
    failed = {result["spec"]: result["error"] for result in report["results"] if result["error"]}
    assert not failed


def test_every_kernel_has_a_configuration(report: dict[str, Any]) -> None:
    """A kernel that no spec names would ship without this proof."""
    covered = {result["kernel"] for result in report["results"]}
    assert {name.rpartition(".")[2] for name in report["kernels_defined"]} - covered == set()


def test_nothing_spills(report: dict[str, Any]) -> None:
    """Nor does anything else use local memory, as an array indexed at run time would."""
    limit = 0 if tuned() else LOCAL_ELSEWHERE
    spills = {r["spec"]: (r["spill_stores"], r["spill_loads"], r["local"]) for r in compiled(report)}
    assert {spec: bytes_ for spec, bytes_ in spills.items() if max(bytes_) > limit} == {}


def test_registers_stay_within_their_bounds(report: dict[str, Any]) -> None:
    over = {}
    for result in compiled(report):
        bound = bound_of(result["spec"], report["target"])
        if result["registers"] > (bound.max_registers if tuned() else 512):
            over[result["spec"]] = f"{result['registers']} > {bound.max_registers}: {bound.reason}"
    assert over == {}


def test_shared_memory_fits(report: dict[str, Any]) -> None:
    limit = resources.SHARED_LIMIT[report["target"]]
    assert {r["spec"]: r["shared"] for r in compiled(report) if r["shared"] > limit} == {}


def test_occupancy_reaches_its_bound(report: dict[str, Any]) -> None:
    under = {}
    for result in compiled(report):
        bound = bound_of(result["spec"], report["target"])
        if result["occupancy"] is not None and result["occupancy"] < (bound.min_occupancy if tuned() else 0.06):
            under[result["spec"]] = f"{result['occupancy']:.0%} < {bound.min_occupancy:.0%}: {bound.reason}"
    assert under == {}


def test_rows_are_read_and_written_in_16_byte_pieces(report: dict[str, Any]) -> None:
    narrow = {
        result["spec"]: result["ptx"]
        for result in compiled(report)
        if bound_of(result["spec"], report["target"]).wide
        and not (result["ptx"]["loads_16"] and result["ptx"]["stores_16"])
    }
    assert narrow == {}


def accesses_of(kernel: str, width: int, dtype: str) -> dict[str, int]:
    """What the instructions of a thread access in global memory where all tables are there and ids are int64."""
    if kernel == "bwd":
        # A gradient and three tables; the norm's weight. Two numbers a row; ids and the seed.
        found = {"load 128": BACKWARD_PIECES * 5, "load 32": 2, "load 64": 4, "store 128": BACKWARD_PIECES}
        # Two sums for the norm's gradients: a thread's columns, two where as many threads as columns allow it.
        return found | {"store 32" if width == 64 else "store 64": 2}
    rows = 1 if dtype == "fp32" and width > 64 else 2
    # Three tables, weight and bias; ids of each row and the seed, and ids once more, spread over the threads, in the
    # search for bad ones. One of each table is written down in six numbers after the record is claimed.
    return {
        "load 128": FORWARD_PIECES * 5, "load 64": 3 * rows + 1 + 3, "store 32": 2, "store 128": FORWARD_PIECES,
        "atomic": 3, "store 64": 3 * 6,
    }  # fmt: skip


def test_rows_are_accessed_in_16_byte_instructions_and_nothing_more(cache: Path) -> None:
    """Of every instruction that ptxas made: rows by 128 bits, and beside them only what is counted here."""
    if not tuned():
        pytest.skip("counted as one compiler makes them")
    results = [r for r in measured(cache)["results"] if r["target"] == "sm_90" and r["spec"] in DISASSEMBLED]
    found = {result["spec"]: result["accesses"] for result in results}
    assert found == {name: accesses_of(*what) for name, what in DISASSEMBLED.items()}


def test_products_run_on_the_tensor_cores(report: dict[str, Any]) -> None:
    """16-bit attention on Hopper by warpgroup instructions, where a tile is large enough for one."""
    slow = {
        result["spec"]: result["ptx"]
        for result in compiled(report)
        if bound_of(result["spec"], report["target"]).hgmma and result["ptx"]["wgmma"] == 0
    }
    assert slow == {}


def test_nothing_is_rounded_to_tf32(report: dict[str, Any]) -> None:
    """fp32 attention asks for products in fp32, which Triton has not granted everywhere."""
    assert {r["spec"]: r["ptx"] for r in compiled(report) if r["ptx"].get("tf32")} == {}

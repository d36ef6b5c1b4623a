"""The measurement sees what it must: spills, narrow loads, kernels that do not compile, a compiler that crashes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import astuple, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("triton")

from bench import resources
from embedkernels.kernels import attention_tiles
from embedkernels.kernels.specs import CompileSpec

VARIED = ("attention_forward", "attention_backward")
ROOT = Path(__file__).resolve().parents[2]


def run(*args: str) -> subprocess.CompletedProcess[str]:
    # TRITON_INTERPRET stays in the environment: the command must cope with it.
    return subprocess.run(
        [sys.executable, "-m", "bench.resources", *args], cwd=ROOT, capture_output=True, text=True, env={**os.environ}
    )


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], dict[str, Any]]:
    out = tmp_path_factory.mktemp("toys") / "toys.json"
    done = run("--modules", "tests.compiled.toy_kernels", "--targets", "sm_90,gfx942", "--out", str(out))
    assert done.returncode == 1, done.stderr  # some of the toys are broken
    return {(r["spec"], r["target"]): r for r in json.loads(out.read_text())["results"]}


def test_a_good_kernel(toys: dict[tuple[str, str], dict[str, Any]]) -> None:
    result = toys["scale[aligned]", "sm_90"]
    assert result["error"] is None
    assert 16 <= result["registers"] <= 64
    assert (result["spill_stores"], result["spill_loads"], result["local"]) == (0, 0, 0)
    assert result["threads"] == 128
    assert result["occupancy"] == 1.0
    assert result["instructions"]["ldg_128"] >= 1
    assert result["instructions"]["stg_128"] >= 1
    assert result["instructions"]["total"] > 30
    assert result["accesses"] == {"load 128": 1, "load 32": 1, "store 128": 1}
    assert result["ptx"] == {"loads_16": 1, "stores_16": 1, "wgmma": 0, "tf32": 0}


def test_loads_of_unaligned_rows_are_seen_to_be_narrow(toys: dict[tuple[str, str], dict[str, Any]]) -> None:
    result = toys["scale[unaligned]", "sm_90"]
    assert result["instructions"]["ldg_128"] == 0
    assert result["instructions"]["stg_128"] == 0
    assert result["ptx"] == {"loads_16": 0, "stores_16": 0, "wgmma": 0, "tf32": 0}
    assert result["accesses"] == {"load 16": 8, "load 32": 1, "store 16": 8}


def test_spills_are_seen(toys: dict[tuple[str, str], dict[str, Any]]) -> None:
    result = toys["spilling", "sm_90"]
    assert result["registers"] == 255
    assert result["spill_stores"] > 0
    assert result["spill_loads"] > 0
    assert result["local"] > 0
    assert result["instructions"]["stl"] > 0
    assert result["instructions"]["hgmma"] == result["ptx"]["wgmma"] > 0


def test_products_in_tf32_are_seen(toys: dict[tuple[str, str], dict[str, Any]]) -> None:
    assert toys["tf32", "sm_90"]["ptx"]["tf32"] > 0


def test_amd_code_is_measured(toys: dict[tuple[str, str], dict[str, Any]]) -> None:
    result = toys["scale[aligned]", "gfx942"]
    assert result["error"] is None
    assert result["threads"] == 256
    assert 4 <= result["registers"] <= 64


def test_a_kernel_that_does_not_compile_is_an_error(toys: dict[tuple[str, str], dict[str, Any]]) -> None:
    assert "no_such_name" in toys["broken", "sm_90"]["error"]


def test_a_spec_that_forgets_arguments_is_an_error(toys: dict[tuple[str, str], dict[str, Any]]) -> None:
    error = toys["incomplete", "sm_90"]["error"]
    assert "not given: y_ptr, factor_ptr, bias, stride" in error


def test_a_crash_is_charged_to_the_spec_that_caused_it(toys: dict[tuple[str, str], dict[str, Any]]) -> None:
    crashed = [key for key, result in toys.items() if result["error"] == "the compiler crashed"]
    assert sorted(crashed) == [("crashing", "gfx942"), ("crashing", "sm_90")]


def test_what_there_was_no_time_for_is_counted(tmp_path: Path) -> None:
    out = tmp_path / "late.json"
    done = run("--modules", "tests.compiled.toy_kernels", "--targets", "sm_90", "--seconds", "0", "--out", str(out))
    report = json.loads(out.read_text())
    assert report["out_of_time"] > 0
    assert report["out_of_time"] + len(report["results"]) == 7
    assert f"no time for {report['out_of_time']} more" in done.stdout


def test_a_result_holds_its_tile(toys: dict[tuple[str, str], dict[str, Any]]) -> None:
    """A failed one's too."""
    assert toys["scale[aligned]", "sm_90"]["tile"] == {"warps": 4, "stages": 3}
    assert toys["broken", "sm_90"]["tile"] == {"block_n": 64, "warps": 4, "stages": 3}
    limited = replace(spec("limited", BLOCK_M=16, BLOCK_N=32, GROUP=3), num_warps=8, max_registers=255)
    assert resources.tile_of(limited) == {"block_m": 16, "block_n": 32, "warps": 8, "stages": 3, "max_registers": 255}


def test_a_sweep_has_a_line_per_variant(tmp_path: Path) -> None:
    tile = {"block_m": 64, "block_n": 32, "warps": 8, "stages": 2}
    good = resources.Resources("b", "m", "k", "sm_90", registers=40, shared=512, tile=tile)
    spilling = resources.Resources("a", "m", "k", "sm_90", registers=255, local=8)
    broken = resources.Resources("a", "m", "k", "sm_80", error="CompileError: no\nsecond line")
    path = tmp_path / "new" / "sweep.json"
    resources.write_lines(path, [good, spilling, broken], 3, "3.6.0")
    found = json.loads(path.read_text())
    assert (found["triton"], found["out_of_time"], found["spilling"]) == ("3.6.0", 3, 1)
    assert found["results"] == [
        {"target": "sm_80", "spec": "a", "tile": {}, "error": "CompileError: no"},
        {"target": "sm_90", "spec": "a", "tile": {}, "registers": 255, "local": 8, "shared": 0},
        {"target": "sm_90", "spec": "b", "tile": tile, "registers": 40, "local": 0, "shared": 512},
    ]
    assert len(path.read_text().splitlines()) == 5


def test_all_variants_hold_what_is_launched() -> None:
    """And the listed ones, but for head sizes and specialisations that a sweep lets others stand for."""
    swept = {name for module in VARIED for name in resources.specs_of(module, "all")}
    assert len(swept) == 4 * 2 * (4 + 2) * 2 * 4 * (
        1 + 2 + 1
    )  # family, dtype, head size, dropout, masks, group by kernel
    for kernel in ("attention_fwd_kernel", "attention_bwd_dkdv_kernel", "attention_bwd_dq_kernel"):
        for masks in ("plain", "causal", "mask"):
            assert f"{kernel}[gfx942,d16,{masks},group 1,dropout,fp32]" in swept


def test_two_specs_of_one_name_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.compiled import toy_kernels

    twice = toy_kernels.compile_specs()[:1] * 2
    monkeypatch.setattr(toy_kernels, "compile_specs", lambda: twice)
    with pytest.raises(ValueError, match=r"two specs are named 'scale\[aligned\]'"):
        resources.specs_of("tests.compiled.toy_kernels")


def test_accesses_are_told_apart_by_their_width() -> None:
    opcodes = ["LDG.E.U8", "LDG.E.S16.CONSTANT", "LDG.E", "LDG.E.64.STRONG.SYS", "LDG.E.128", "LDG.E.128", "LDS.128"]
    opcodes += ["STG.E.U8", "STG.E.128", "ATOMG.E.CAS.STRONG.GPU", "REDG.E.ADD.STRONG.GPU", "LDL", "IADD3"]
    assert resources.global_accesses(opcodes) == {
        "atomic": 2, "load 128": 2, "load 16": 1, "load 32": 1, "load 64": 1, "load 8": 1, "store 128": 1,
        "store 8": 1,
    }  # fmt: skip


def test_an_unknown_target_is_named() -> None:
    with pytest.raises(ValueError, match="got 'volta'"):
        resources.gpu_target("volta")


@pytest.mark.parametrize(
    ("registers", "threads", "shared", "target", "expected"),
    [
        (32, 128, 0, "sm_90", 1.0),
        (64, 256, 0, "sm_90", 0.5),
        (65, 256, 0, "sm_90", 0.375),  # rounded up to 72 registers: three blocks
        (255, 256, 0, "sm_90", 0.125),
        (32, 256, 113 * 1024, "sm_90", 0.25),  # two blocks' shared memory
        (32, 256, 200 * 1024, "sm_80", 0.0),  # does not fit at all
        (32, 32, 0, "sm_86", 16 * 32 / 1536),  # sixteen blocks at most
    ],
)
def test_occupancy(registers: int, threads: int, shared: int, target: str, expected: float) -> None:
    assert resources.occupancy(registers, threads, shared, target) == pytest.approx(expected)


def spec(name: str, kernel: str = "k", dtype: str = "*bf16", targets: Any = None, **constexprs: int) -> CompileSpec:
    stand_in = SimpleNamespace(__name__=kernel)
    return CompileSpec(name, stand_in, {"x_ptr": dtype}, constexprs, targets=targets)


def own(name: str, head: int, width: int, block: int = 64, dtype: str = "*bf16", **features: bool) -> CompileSpec:
    """A spec of sm_80's own, as attention has them."""
    return spec(name, "tuned", dtype, ("sm_80", "sm_86"), D=head, BLOCK_D=width, BLOCK_M=block, **features)


# Kept by name on NVIDIA's GPUs, though larger ones stand beside it.
PROMISED = "embed_fwd_kernel[d1024,bf16]"
SPECS = [
    spec(PROMISED, BLOCK=8),
    spec("half small", dtype="*fp16", BLOCK=16),
    spec("small", BLOCK=16),
    spec("middle", BLOCK=32),
    spec("large", BLOCK=64),
    *(spec(f"single {block}", dtype="*fp32", BLOCK=block) for block in (16, 32, 64)),
    spec("only half", dtype="*fp16", BLOCK=128),
    spec("another kernel", kernel="other", BLOCK=16),
    own("d32", 32, 32),
    own("d64", 64, 64),
    own("d64 half", 64, 64, dtype="*fp16"),
    own("d48", 48, 64),
    own("d128", 128, 128, block=32),
    own("d96", 96, 128, block=32),
    own("d64 causal", 64, 64, CAUSAL=True),
    own("d64 single", 64, 64, dtype="*fp32"),
    replace(own("d64 warps", 64, 64), num_warps=8),
    replace(own("d40", 40, 64), divisible_by_16=frozenset({"x_ptr"})),
    replace(own("d72", 72, 128), divisible_by_16=frozenset({"x_ptr"})),
]
OWN = {s.name for s in SPECS if s.targets is not None}
SHARE_A_TILE = {"d32", "d48", "d64 half", "d96", "d40"}


@pytest.mark.parametrize(
    ("target", "thin", "left_out"),
    [
        ("sm_80", False, set()),
        ("sm_90", False, OWN),
        ("sm_90", True, OWN | {"half small", "single 16", "single 32"}),
        ("gfx942", True, OWN | {PROMISED, "half small", "small", "middle", "single 16", "single 32"}),
        ("sm_80", True, SHARE_A_TILE | {"half small", "small", "middle", "single 16", "single 32"}),
    ],
)
def test_what_is_left_out_has_something_standing_for_it(
    monkeypatch: pytest.MonkeyPatch, target: str, thin: bool, left_out: set[str]
) -> None:
    monkeypatch.setattr(resources, "specs_of", lambda *_: {s.name: s for s in SPECS})
    assert set(resources.select("any", target, thin)) == {s.name for s in SPECS} - left_out


@pytest.mark.parametrize("target", resources.TARGETS)
@pytest.mark.parametrize(("which", "module"), [("forward", VARIED[0]), ("dkdv", VARIED[1]), ("dq", VARIED[1])])
def test_no_tile_is_left_out(target: str, which: str, module: str) -> None:
    """Every attention tile that is launched on a target is compiled for it, for either size of an element."""
    specs = [resources.specs_of(module)[name] for name in resources.select(module, target, thin=True)]
    specs = [s for s in specs if s.kernel.__name__ == f"attention_{NAMES[which]}_kernel"]
    found = {
        (4 if s.signature["q_ptr"] == "*fp32" else 2, "q_stride_s" in s.divisible_by_16, *tile_in(s)) for s in specs
    }
    wanted = set()
    for family, dtypes, _, _, tiles in attention_tiles.shipped_tiles():
        size = 4 if "fp32" in dtypes else 2
        if family == target:
            unaligned = getattr(attention_tiles.unaligned_tiles(family, size), which)
            wanted |= {(size, True, *astuple(getattr(tiles, which))), (size, False, *astuple(unaligned))}
    assert found == wanted


NAMES = {"forward": "fwd", "dkdv": "bwd_dkdv", "dq": "bwd_dq"}


def tile_in(known: CompileSpec) -> tuple[Any, ...]:
    tile = resources.tile_of(known)
    return tuple(tile.get(key) for key in ("block_m", "block_n", "warps", "stages", "max_registers"))

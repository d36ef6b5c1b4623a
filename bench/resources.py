"""What every Triton kernel compiles to, for any target, without a GPU.

    python -m bench.resources --targets sm_80,sm_90,sm_100,gfx942 --out resources.json
    python -m bench.resources --variants all --out bench/results/compiled/attention.json    # most of an hour

Every ``CompileSpec`` of every module in ``embedkernels/kernels/`` is compiled by Triton for the asked targets.
Registers and spills come from ptxas (NVIDIA) or from the code object's metadata (AMD), shared memory from Triton, the
instruction mix from the disassembly by the nvdisasm of the Triton wheel. Nothing is launched.

Must run in a process in which Triton has not been imported with ``TRITON_INTERPRET=1``: use :func:`measure` from
such a process, or this module's command line from any.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import math
import multiprocessing
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Collection, Iterable
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from bench.files import write_json

PACKAGE = "embedkernels.kernels"
TARGETS = ("sm_90", "sm_80", "sm_100", "gfx942")  # what must always compile; sm_86, sm_89 and sm_120 on request

# Shared memory that one block may use, in bytes; on AMD the local data share of a workgroup.
# Source: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"; AMD CDNA3 ISA, section 1.
SHARED_LIMIT = {
    "sm_80": 163 * 1024,
    "sm_86": 99 * 1024,
    "sm_89": 99 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
    "sm_120": 99 * 1024,
    "gfx942": 64 * 1024,
}
# Threads and blocks a multiprocessor can hold; its 65536 registers are handed out in units of 8 per thread.
MAX_RESIDENT = {
    "sm_80": (2048, 32),
    "sm_86": (1536, 16),
    "sm_89": (1536, 24),
    "sm_90": (2048, 32),
    "sm_100": (2048, 32),
    "sm_120": (1536, 24),
}
REGISTER_FILE = 65536

# SASS opcodes that are counted, by the name they get in the report.
INSTRUCTIONS = {
    "ldg_128": r"LDG\.(?:\w+\.)*128\b",
    "stg_128": r"STG\.(?:\w+\.)*128\b",
    "ldgsts_128": r"LDGSTS\.(?:\w+\.)*128\b",
    "tma_load": r"UTMALDG",
    "hmma": r"HMMA\.",
    "hgmma": r"HGMMA\.",
    "tcgen05_mma": r"UTC\w*MMA",
    "ldl": r"LDL\b",
    "stl": r"STL\b",
}
# Compiled by a thin selection too, by target: what promises something that no other spec stands for. Every variant of
# the input embeddings is to be half occupied up to 1024 columns; of the plain ones, the accesses are counted.
KEPT = (
    ("sm_*", "embed_?wd_kernel[[]d1024,*bf16]"),
    ("sm_90", "embed_?wd_kernel[[]d64,fp32]"),
    ("sm_90", "embed_?wd_kernel[[]d768,fp32]"),
    ("sm_90", "embed_?wd_kernel[[]d1024,fp32]"),
)
# What is counted in PTX: 16 bytes and more in one instruction, Hopper's warpgroup products, products rounded to tf32.
PTX = {
    "loads_16": r"ld\.global[\w.:]*\.(?:v[48]\.\w32|v[24]\.\w64)|cp\.async\.cg\.|cp\.async\.bulk\.tensor\.",
    "stores_16": r"st\.global[\w.:]*\.(?:v[48]\.\w32|v[24]\.\w64)",
    "wgmma": r"wgmma\.mma_async",
    "tf32": r"mma[\w.:]*\.tf32",
}


@dataclass
class Resources:
    """One kernel configuration compiled for one target.

    Attributes:
        spec, module, kernel, target: what was compiled.
        error: why it did not compile, else None.
        registers: per thread (on AMD: vector registers, accumulation registers included).
        spill_stores, spill_loads: bytes per thread (NVIDIA only).
        local: bytes of local or scratch memory per thread, spills and arrays indexed at run time alike.
        shared: bytes per block.
        threads: per block.
        tile: what the spec fixes of the launch: its block sizes, warps and stages, and a limit of registers if any.
        occupancy: share of a multiprocessor's threads that registers and shared memory allow (NVIDIA only).
        ptx: static counts, keys of ``PTX`` (NVIDIA only).
        instructions: static counts, keys of ``INSTRUCTIONS`` and ``total`` (NVIDIA only, and only if asked for).
        accesses: static counts of instructions that access global memory: see :func:`global_accesses` (NVIDIA only,
            and only if asked for).
        seconds: of compilation.
    """

    spec: str
    module: str
    kernel: str
    target: str
    error: str | None = None
    registers: int = 0
    spill_stores: int = 0
    spill_loads: int = 0
    local: int = 0
    shared: int = 0
    threads: int = 0
    tile: dict[str, int] = field(default_factory=dict)
    occupancy: float | None = None
    ptx: dict[str, int] = field(default_factory=dict)
    instructions: dict[str, int] = field(default_factory=dict)
    accesses: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0


def kernel_modules() -> list[str]:
    """Names of the modules that list compile specs, in ``embedkernels/kernels/``."""
    package = importlib.import_module(PACKAGE)
    names = sorted(info.name for info in pkgutil.iter_modules(package.__path__))
    return [name for name in names if hasattr(importlib.import_module(f"{PACKAGE}.{name}"), "compile_specs")]


def kernels_defined() -> list[str]:
    """``module.kernel`` of every launchable kernel: each jitted function of the package named ``*_kernel``."""
    from triton.runtime.jit import JITFunction

    package = importlib.import_module(PACKAGE)
    found = []
    for info in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"{PACKAGE}.{info.name}")
        for name, value in vars(module).items():
            value = getattr(value, "fn", value) if not isinstance(value, JITFunction) else value
            if isinstance(value, JITFunction) and value.__module__ == module.__name__ and name.endswith("_kernel"):
                found.append(f"{info.name}.{value.__name__}")
    return sorted(set(found))


def specs_of(module: str, variants: str = "listed") -> dict[str, Any]:
    """The compile specs of a kernel module by name.

    Args:
        variants: ``"listed"``, those of ``compile_specs``; ``"all"``, those of ``every_variant`` where there is one.

    Raises:
        ValueError: two specs of one name.
    """
    specs: dict[str, Any] = {}
    found = importlib.import_module(module if "." in module else f"{PACKAGE}.{module}")
    for spec in found.every_variant() if variants == "all" else found.compile_specs():
        if spec.name in specs:
            raise ValueError(f"{module}.compile_specs: two specs are named {spec.name!r}")
        specs[spec.name] = spec
    return specs


def gpu_target(target: str) -> Any:
    """Triton's description of ``sm_90``, ``gfx942`` and their like."""
    from triton.backends.compiler import GPUTarget

    if match := re.fullmatch(r"sm_(\d+)", target):
        return GPUTarget("cuda", int(match.group(1)), 32)
    if target.startswith("gfx9"):
        return GPUTarget("hip", target, 64)
    raise ValueError(f"target must be like sm_90 or gfx942, got {target!r}")


def compile_spec(spec: Any, target: str) -> tuple[Any, str]:
    """Compile one spec; returns Triton's compiled kernel and what ptxas printed."""
    import triton
    from triton import knobs
    from triton.compiler import ASTSource

    names = spec.kernel.arg_names
    unknown = [name for name in (*spec.signature, *spec.constexprs, *spec.divisible_by_16) if name not in names]
    missing = [name for name in names if name not in spec.signature and name not in spec.constexprs]
    if unknown or missing:
        raise ValueError(
            f"{spec.name}: arguments of {spec.kernel.__name__} are {', '.join(names)}; "
            f"not among them: {', '.join(unknown) or 'none'}; not given: {', '.join(missing) or 'none'}"
        )
    signature = {name: "constexpr" if name in spec.constexprs else spec.signature[name] for name in names}
    constexprs = {(names.index(name),): value for name, value in spec.constexprs.items()}
    attrs = {(names.index(name),): [["tt.divisibility", 16]] for name in spec.divisible_by_16}
    # ptxas tells about spills only in its log, which Triton prints when asked and only if it really compiles.
    knobs.nvidia.dump_ptxas_log = True
    knobs.compilation.always_compile = True
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        compiled = triton.compile(
            ASTSource(spec.kernel, signature, constexprs, attrs),
            target=gpu_target(target),
            options={
                "num_warps": spec.num_warps,
                "num_stages": spec.num_stages,
                **({} if spec.max_registers is None else {"maxnreg": spec.max_registers}),
            },
        )
    return compiled, printed.getvalue()


def ptxas_usage(log: str) -> tuple[int, int, int, int]:
    """(registers, bytes of spill stores, of spill loads, of stack frame) out of ``ptxas -v``'s log."""
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", log)]
    if not registers:
        raise ValueError(f"no register count in the log of ptxas: {log[:500]!r}")
    stores = sum(int(n) for n in re.findall(r"(\d+) bytes spill stores", log))
    loads = sum(int(n) for n in re.findall(r"(\d+) bytes spill loads", log))
    stack = sum(int(n) for n in re.findall(r"(\d+) bytes stack frame", log))
    return max(registers), stores, loads, stack


def amdgcn_usage(assembly: str) -> tuple[int, int]:
    """(vector registers, bytes of scratch) out of the metadata of AMD assembly."""
    vgprs = [int(n) for n in re.findall(r"\.vgpr_count:\s*(\d+)", assembly)]
    if not vgprs:
        raise ValueError("no .vgpr_count in the assembly")
    scratch = [int(n) for n in re.findall(r"\.private_segment_fixed_size:\s*(\d+)", assembly)]
    return max(vgprs), max(scratch, default=0)


def opcodes_of(cubin: bytes) -> list[str]:
    """The instructions of a cubin, without their operands."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        sass = subprocess.run(
            [knobs.nvidia.nvdisasm.path, "-ndf", "-c", file.name], check=True, capture_output=True, text=True
        ).stdout
    return re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", sass)


def instruction_mix(opcodes: list[str]) -> dict[str, int]:
    """Static counts of the instructions of interest."""
    counts = {
        name: sum(re.match(pattern, op) is not None for op in opcodes) for name, pattern in INSTRUCTIONS.items()
    }
    counts["total"] = len(opcodes)
    return counts


def global_accesses(opcodes: list[str]) -> dict[str, int]:
    """Static counts of accesses to global memory by their bits: ``"load 128"``, ``"store 32"``, ``"atomic"``."""
    found: Counter[str] = Counter()
    for op in opcodes:
        name, *suffixes = op.split(".")
        if name in ("LDG", "STG"):
            bits = next(
                (match for s in suffixes if (match := re.sub(r"^[US]", "", s)) in ("8", "16", "64", "128")), "32"
            )
            found[f"{'load' if name == 'LDG' else 'store'} {bits}"] += 1
        elif name in ("ATOM", "ATOMG", "RED", "REDG"):
            found["atomic"] += 1
    return dict(sorted(found.items()))


def occupancy(registers: int, threads: int, shared: int, target: str) -> float:
    """Share of a multiprocessor's threads that can be resident, by registers and shared memory."""
    max_threads, max_blocks = MAX_RESIDENT[target]
    per_thread = -(-registers // 8) * 8
    blocks = min(
        REGISTER_FILE // (per_thread * threads),
        # 1 KiB of each block's shared memory is the system's; the pool is one block's limit and that KiB.
        (SHARED_LIMIT[target] + 1024) // (shared + 1024),
        max_threads // threads,
        max_blocks,
    )
    return blocks * threads / max_threads


def tile_of(spec: Any) -> dict[str, int]:
    """See ``Resources.tile``."""
    blocks = {name.lower(): value for name, value in spec.constexprs.items() if name.startswith("BLOCK_")}
    limit = {} if spec.max_registers is None else {"max_registers": spec.max_registers}
    return {**blocks, "warps": spec.num_warps, "stages": spec.num_stages, **limit}


def measure_one(
    module: str, name: str, target: str, mix: Collection[str] | None = None, variants: str = "listed"
) -> Resources:
    """Compile one spec and read what it takes; ``mix``: see :func:`measure`. Never raises: a failure is ``error``."""
    started = time.perf_counter()
    result = Resources(name, module, "", target)
    try:
        spec = specs_of(module, variants)[name]
        result.kernel, result.tile = spec.kernel.__name__, tile_of(spec)
        compiled, log = compile_spec(spec, target)
        result.shared = int(compiled.metadata.shared)
        if target.startswith("sm_"):
            result.threads = 32 * int(compiled.metadata.num_warps)
            result.registers, result.spill_stores, result.spill_loads, result.local = ptxas_usage(log)
            result.ptx = {name: len(re.findall(pattern, compiled.asm["ptx"])) for name, pattern in PTX.items()}
            if mix is None or name in mix:
                opcodes = opcodes_of(compiled.asm["cubin"])
                result.instructions, result.accesses = instruction_mix(opcodes), global_accesses(opcodes)
            result.occupancy = occupancy(result.registers, result.threads, result.shared, target)
        else:
            result.threads = 64 * int(compiled.metadata.num_warps)
            result.registers, result.local = amdgcn_usage(compiled.asm["amdgcn"])
    except Exception as error:
        result.error = f"{type(error).__name__}: {str(error)[:2000]}"
    result.seconds = round(time.perf_counter() - started, 3)
    return result


def _without_twins(specs: dict[str, Any]) -> dict[str, Any]:
    """Leave out what differs from another spec only by fp16 in place of bf16: the code is the same but for that."""
    seen = set()
    kept = {}
    for name, spec in sorted(specs.items(), key=lambda item: "fp16" in " ".join(item[1].signature.values())):
        key = (
            spec.kernel.__name__,
            tuple((k, v.replace("fp16", "bf16")) for k, v in spec.signature.items()),
            tuple((k, str(v).replace("fp16", "bf16")) for k, v in spec.constexprs.items()),
            (spec.num_warps, spec.num_stages, spec.divisible_by_16, spec.targets),
        )
        if key not in seen:
            seen.add(key)
            kept[name] = spec
    return kept


def _size(spec: Any) -> int:
    return math.prod(value for value in spec.constexprs.values() if isinstance(value, int) and value > 1)


def _widest(specs: dict[str, Any]) -> dict[str, Any]:
    """Of the specs that differ only in their head size the widest, which has the same tile.

    A head size whose rows Triton does not know to be aligned is not compared with one whose rows it does.
    """
    kept: dict[Any, str] = {}
    for name, spec in specs.items():
        known = {key: value for key, value in spec.constexprs.items() if key not in ("D", "BLOCK_D")}
        launch = spec.num_warps, spec.num_stages, spec.max_registers, len(spec.divisible_by_16)
        key = repr((spec.kernel.__name__, spec.signature, known, launch))
        kept[key] = max(kept.get(key, name), name, key=lambda name: _size(specs[name]))
    return {name: specs[name] for name in kept.values()}


def _largest(specs: dict[str, Any]) -> dict[str, Any]:
    """The largest spec of each kernel and signature."""
    kept: dict[Any, str] = {}
    for name, spec in specs.items():
        key = spec.kernel.__name__, tuple(spec.signature.items())
        kept[key] = max(kept.get(key, name), name, key=lambda name: _size(specs[name]))
    return {name: specs[name] for name in kept.values()}


def select(module: str, target: str, thin: bool, variants: str = "listed") -> list[str]:
    """Names of the specs of a module to compile for a target: all that are launched there.

    Args:
        thin: leave out fp16 twins; of what is the target's own, head sizes whose tile a wider one has too; of what is
            the same on every target, all but the largest of each kernel, except in 16 bits on sm_90, as models are
            trained, and what ``KEPT`` names.
    """
    specs = {
        name: spec
        for name, spec in specs_of(module, variants).items()
        if spec.targets is None or target in spec.targets
    }
    if thin:
        specs = _without_twins(specs)
        own = {name: spec for name, spec in specs.items() if spec.targets is not None}
        common = {name: spec for name, spec in specs.items() if spec.targets is None}
        kept = {
            name: spec
            for name, spec in common.items()
            if (target == "sm_90" and "*bf16" in spec.signature.values())
            or any(fnmatchcase(target, where) and fnmatchcase(name, what) for where, what in KEPT)
        }
        others = {name: spec for name, spec in common.items() if name not in kept}
        specs = {**_widest(own), **kept, **_largest(others)}
    return list(specs)


def _enter_worker(cache: str) -> None:
    os.environ["TRITON_CACHE_DIR"] = cache


def measure(
    modules: Iterable[str],
    targets: Iterable[str],
    jobs: int = 2,
    thin: bool = False,
    mix: Collection[str] | None = None,
    seconds: float | None = None,
    variants: str = "listed",
) -> tuple[list[Resources], int]:
    """Compile the specs of ``modules`` for every target (see :func:`select`), in ``jobs`` processes.

    A compiler that crashes takes its process along; what was left is then compiled one process at a time, so that
    the crash is charged to the spec that caused it.

    Args:
        mix: names of the specs to disassemble, None for all.
        seconds: after which no compilation is started; None for no limit.

    Returns:
        the results, and how many specs there was no time for.
    """
    deadline = math.inf if seconds is None else time.monotonic() + seconds
    tasks = [(m, name, target) for target in targets for m in modules for name in select(m, target, thin, variants)]
    results: dict[tuple[str, str, str], Resources] = {}
    # A cache of its own: nothing that another run left behind can be mistaken for this one's result.
    with tempfile.TemporaryDirectory(prefix="resources-") as cache:
        options: dict[str, Any] = {
            "mp_context": multiprocessing.get_context("spawn"),
            "initializer": _enter_worker,
            "initargs": (cache,),
        }
        with ProcessPoolExecutor(jobs, **options) as pool:
            futures = {pool.submit(measure_one, *task, mix, variants): task for task in tasks}
            wait(futures, None if seconds is None else seconds)
            pool.shutdown(cancel_futures=True)
            for future, task in futures.items():
                if not future.cancelled():
                    with contextlib.suppress(BrokenProcessPool):
                        results[task] = future.result()
        broken = [task for future, task in futures.items() if task not in results and not future.cancelled()]
        for task in broken:
            if time.monotonic() < deadline:
                with ProcessPoolExecutor(1, **options) as pool:
                    try:
                        results[task] = pool.submit(measure_one, *task, mix, variants).result()
                    except BrokenProcessPool:
                        results[task] = Resources(task[1], task[0], "", task[2], error="the compiler crashed")
    return [results[task] for task in tasks if task in results], len(tasks) - len(results)


def table(results: list[Resources]) -> str:
    """The results as a Markdown table."""
    head = ("spec", "target", "registers", "spills, local", "shared", "occupancy", "16 B loads, stores", "MMA", "s")
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for r in results:
        if r.error:
            lines.append(
                f"| {r.spec} | {r.target} | **{r.error.splitlines()[0][:120]}** | | | | | | | {r.seconds:.1f} |"
            )
            continue
        mix = r.instructions
        loads = mix.get("ldg_128", 0) + mix.get("ldgsts_128", 0) + mix.get("tma_load", 0)
        cells = [
            r.spec,
            r.target,
            r.registers,
            f"{r.spill_stores}/{r.spill_loads}, {r.local}",
            r.shared,
            "" if r.occupancy is None else f"{r.occupancy:.0%}",
            f"{loads}, {mix.get('stg_128', 0)}",
            mix.get("hmma", 0) + mix.get("hgmma", 0) + mix.get("tcgen05_mma", 0),
            f"{r.seconds:.1f}",
        ]
        lines.append(f"| {' | '.join(str(cell) for cell in cells)} |")
    return "\n".join(lines)


def write_lines(path: Path, results: list[Resources], missing: int, triton: str) -> None:
    """A sweep as JSON, a line per variant: its tile, registers and local bytes of a thread, shared bytes of a block.

    Lines from before the tile was noted lack it, and readers must cope with that.
    """
    lines = []
    for r in sorted(results, key=lambda r: (r.target, r.spec)):
        found: dict[str, Any] = {"registers": r.registers, "local": r.local, "shared": r.shared}
        found = {"error": r.error.splitlines()[0][:200]} if r.error else found
        lines.append(f"  {json.dumps({'target': r.target, 'spec': r.spec, 'tile': r.tile, **found})}")
    head = (
        f'"triton": {json.dumps(triton)}, "out_of_time": {missing}, "spilling": {sum(r.local > 0 for r in results)}'
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{" + head + ', "results": [\n' + ",\n".join(lines) + "\n]}\n")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--targets", default=",".join(TARGETS))
    parser.add_argument("--modules", default="", help="kernel modules, comma separated; all by default")
    parser.add_argument("--variants", choices=["listed", "all"], default="listed", help="all: a sweep")
    parser.add_argument("--thin", action="store_true", help="leave out what another spec stands for")
    parser.add_argument("--mix", nargs="*", metavar="SPEC", help="names of what to disassemble; all by default")
    parser.add_argument("--seconds", type=float, help="start no compilation after this time")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--out", type=Path, help="JSON file")
    args = parser.parse_args(argv)
    import triton

    targets = [target for target in args.targets.split(",") if target]
    modules = [module for module in args.modules.split(",") if module] or kernel_modules()
    if args.variants == "all":
        modules = [m for m in modules if hasattr(importlib.import_module(f"{PACKAGE}.{m}"), "every_variant")]
    started = time.perf_counter()
    results, missing = measure(
        modules,
        targets,
        args.jobs,
        args.thin,
        () if args.variants == "all" else args.mix,
        args.seconds,
        args.variants,
    )
    if args.out and args.variants == "all":
        write_lines(args.out, results, missing, triton.__version__)
    elif args.out:
        report = {
            "triton": triton.__version__,
            "kernels_defined": kernels_defined(),
            "results": [asdict(result) for result in results],
            "out_of_time": missing,
            "seconds": round(time.perf_counter() - started, 1),
        }
        write_json(args.out, report)
    print(table(results))
    if missing:
        print(f"\nThere was no time for {missing} more.")
    return int(any(result.error for result in results))


if __name__ == "__main__":
    # The interpreter's kernels cannot be compiled, and Triton decides when it is imported.
    os.environ.pop("TRITON_INTERPRET", None)
    sys.exit(main())

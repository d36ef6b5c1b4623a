"""Every kernel launched once on odd sizes, and the same under compute-sanitizer's tools.

    python -m bench.sanitize --out sanitizer.json     # all of it, needs a GPU and compute-sanitizer
    python -m bench.sanitize --launch                 # the launches alone, in this process

First every launch runs in a process of its own, several at a time: that compiles the kernels into Triton's cache and
says which launch is at fault if one crashes. Then one process runs them all under memcheck, and one each those of the
extension under racecheck, initcheck and synccheck. Inputs are made and results compared on the CPU, so that hardly
any kernel but ours is instrumented.

These are kept to kernels whose barriers are ours. A Triton kernel's are the compiler's, and of those racecheck
reports even plain reductions, in which several warps write the same value to one place (triton-lang/triton#7264).
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench import processes
from bench.files import write_json
from bench.processes import Finished

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
EXTENSION = "embedding_grad extension"  # what the names of the launches begin with that all tools look at
# What the tools print last. Warnings of racecheck are hazards that it cannot prove harmful: they count.
SUMMARY = re.compile(r"ERROR SUMMARY: (\d+) errors?|RACECHECK SUMMARY: (\d+) hazards? displayed")
ERRORS_FOUND = 86
# What the names of our kernels contain, mangled or not.
OUR_KERNELS = ("embed", "attention", "rope", "count_positions")
KEPT = 4000  # characters of output in the report
# Virtualised GPUs may keep debuggers out. The application then runs, or not, but nothing is checked.
REFUSED = re.compile(r"^=+ .*device not supported", re.IGNORECASE | re.MULTILINE)
ENOUGH = 20.0  # seconds in which one launch must end, and without which no tool is started


def launches() -> dict[str, Callable[[Any], None]]:
    """Small calls by name, each taking a device; together they launch every kernel.

    Raise AssertionError where a result is wrong. Sizes are odd on purpose: one past a tile, one short of a vector.
    """
    import torch
    import torch.nn.functional as F

    import embedkernels as ek
    from embedkernels.ops.backend import Backend

    def close(actual: Any, expected: Any, what: str) -> None:
        actual = actual.detach().cpu().double()
        scale = float(expected.abs().max()) or 1.0
        # Wide enough for any right result: how exact they are is for the tests to say.
        tolerance = 0.04 if what.endswith("bf16") else 1e-4
        worst = float((actual - expected.double()).abs().max()) / scale
        assert worst <= tolerance, f"{what}: off by {worst:.1e} of the largest value"

    def finite(*tensors: Any) -> None:
        bad = [tuple(t.shape) for t in tensors if not bool(torch.isfinite(t.detach().cpu()).all())]
        assert not bad, f"not finite: tensors of shapes {bad}"

    def stem(width: int, dtype: torch.dtype, dropout: float) -> Callable[[Any], None]:
        def launch(device: Any) -> None:
            ids, types = torch.randint(1, 61, (3, 43)), torch.randint(0, 2, (3, 43))
            tables = [torch.randn(rows, width).to(dtype) for rows in (61, 2, 47)]
            gain, bias, upstream = (
                torch.randn(width).to(dtype),
                torch.randn(width).to(dtype),
                torch.randn(3, 43, width),
            )
            leaves = [t.to(device).requires_grad_() for t in (*tables, gain, bias)]
            word, kind, position, gain_d, bias_d = leaves
            out = ek.embed(
                ids.to(device),
                word,
                position_weight=position,
                type_weight=kind,
                type_ids=types.to(device),
                norm="layer",
                norm_weight=gain_d,
                norm_bias=bias_d,
                dropout_p=dropout,
                padding_idx=0,
            )
            grads = torch.autograd.grad(out, leaves, upstream.to(dtype).to(device))
            finite(out, *grads)
            if dropout == 0:
                wide = [t.detach().cpu().double().requires_grad_() for t in leaves]
                summed = F.embedding(ids, wide[0]) + F.embedding(types, wide[1]) + wide[2][:43]
                expected = F.layer_norm(summed, (width,), wide[3], wide[4], 1e-12)
                wanted = torch.autograd.grad(expected, wide, upstream.to(dtype).double())
                suffix = "bf16" if dtype == torch.bfloat16 else "fp32"
                close(out, expected.detach(), f"embed {suffix}")
                for grad, want in zip(grads, wanted, strict=True):
                    close(grad, want, f"gradient of embed {suffix}")

        return launch

    def bad_ids(device: Any) -> None:
        """An id outside the table must be reported and never be used as an address."""
        table = torch.randn(61, 64, device=device)
        ids = torch.tensor([[1, 2, 61, 5, -7, 1 << 40]], device=device)
        raised = ""
        try:
            ek.embed(ids, table, norm="layer", norm_weight=table[0], norm_bias=table[1])
            ek.check_errors()
        except IndexError as error:
            raised = str(error)
        assert "out of range" in raised, f"no IndexError for ids out of range: {raised!r}"
        raised = ""
        try:
            ek.embed(ids.clamp(0, 9), table, packed=torch.tensor([0, 6, -1, 1 << 40, 5], device=device))
            ek.check_errors()
        except IndexError as error:
            raised = str(error)
        assert "packed id" in raised, f"no IndexError for packed places out of range: {raised!r}"

    def table_grad(count: int, width: int, dtype: torch.dtype, hot: bool, backend: Backend) -> Callable[[Any], None]:
        def launch(device: Any) -> None:
            ids = torch.randint(0, 97, (count,), dtype=torch.int32 if count % 2 else torch.int64)
            if hot:
                ids[: count // 2] = 5
            rows = torch.randn(count, width).to(dtype)
            plan = ek.embedding_plan(ids.to(device), 97, padding_idx=3, backend=backend)
            grad = ek.embedding_grad(rows.to(device), plan, backend=backend)
            wanted = torch.zeros(97, width, dtype=torch.float64).index_add_(0, ids, rows.double())
            wanted[3] = 0
            close(grad, wanted, f"embedding_grad {'bf16' if dtype == torch.bfloat16 else 'fp32'}")

        return launch

    def table_modes(count: int, width: int, backend: Backend) -> Callable[[Any], None]:
        """Into buffers of two dtypes, rounded at random into one, rows alone, and bags with weights."""

        def launch(device: Any) -> None:
            ids, bags = torch.randint(0, 97, (count,)), torch.arange(count) // 3
            rows = torch.randn(int(bags[-1]) + 1, width).bfloat16()
            factors = torch.rand(count)
            wanted = torch.zeros(97, width, dtype=torch.float64)
            wanted.index_add_(0, ids, rows[bags].double() * factors[:, None])
            plan = ek.embedding_plan(ids.to(device), 97, ignore=(ids == 7).to(device), backend=backend)
            wanted[7] = 0
            options: dict[str, Any] = {
                "bags": bags.to(device), "per_sample_weights": factors.to(device), "backend": backend,
            }  # fmt: skip
            for dtype, rounding in ((torch.float32, "nearest"), (bf16, "nearest"), (bf16, "stochastic")):
                buffer = torch.ones(97, width, dtype=dtype, device=device)
                ek.embedding_grad(rows.to(device), plan, out=buffer, rounding=rounding, **options)
                close(buffer, wanted + 1, f"embedding_grad, {rounding}, into {'bf16' if dtype == bf16 else 'fp32'}")
            found = ek.embedding_grad(rows.to(device), plan, mode="rows", **options)
            close(found.to_sparse().to_dense(), wanted, "embedding_grad of rows in bf16")

        return launch

    def attention(
        shape: tuple[int, int, int, int, int], dtype: torch.dtype, causal: bool, lengths: bool, dropout: float
    ) -> Callable[[Any], None]:
        def launch(device: Any) -> None:
            batch, heads, kv_heads, length, width = shape
            query, key, value, upstream = (
                torch.randn(batch, length, h, width).to(dtype).transpose(1, 2)
                for h in (heads, kv_heads, kv_heads, heads)
            )
            sizes = torch.linspace(1, length, batch).int() if lengths else None
            leaves = [t.to(device).requires_grad_() for t in (query, key, value)]
            out = ek.attention(
                leaves[0],
                leaves[1],
                leaves[2],
                dropout_p=dropout,
                is_causal=causal,
                enable_gqa=heads != kv_heads,
                key_lengths=None if sizes is None else sizes.to(device),
            )
            grads = torch.autograd.grad(out, leaves, upstream.to(device))
            finite(out, *grads)
            if dropout == 0:
                wide = [t.double().requires_grad_() for t in (query, key, value)]
                visible = torch.ones(batch, 1, length, length, dtype=torch.bool)
                if causal:
                    visible = visible.tril()
                if sizes is not None:
                    visible = visible & (torch.arange(length) < sizes[:, None, None, None])
                expected = F.scaled_dot_product_attention(
                    wide[0], wide[1], wide[2], attn_mask=visible, enable_gqa=heads != kv_heads
                )
                wanted = torch.autograd.grad(expected, wide, upstream.double())
                suffix = "bf16" if dtype == torch.bfloat16 else "fp32"
                close(out, expected.detach(), f"attention {suffix}")
                for grad, want in zip(grads, wanted, strict=True):
                    close(grad, want, f"gradient of attention {suffix}")

        return launch

    def every_part(layout: str) -> Callable[[Any], None]:
        """What BERT does not have: scaled rows, an extra term, counted places, sinusoids, RMSNorm, packed rows."""

        def launch(device: Any) -> None:
            ids = torch.randint(0, 61, (3, 43))
            table, extra, gain = (torch.randn(*size, 100) for size in ((61,), (3, 43), ()))
            real = (ids.flatten() > 9).nonzero()[:, 0]
            options: dict[str, Any] = {
                "scale": 2.5,
                "sinusoids": layout,
                "norm": "rms",
                "norm_eps": 1e-6,
                "position_padding_idx": 0,
            }

            def call(where: Any, dtype: torch.dtype, backend: Backend | None) -> list[torch.Tensor]:
                leaves = [t.to(where, dtype).requires_grad_() for t in (table, extra, gain)]
                places = ek.count_positions(ids.to(where), padding_idx=0, backend=backend)
                out = ek.embed(
                    ids.to(where), leaves[0], extra=leaves[1], norm_weight=leaves[2], position_ids=places,
                    packed=real.to(where), backend=backend, **options,
                )  # fmt: skip
                return [out, *torch.autograd.grad(out.square().sum(), leaves)]

            for ours, wanted in zip(call(device, fp32, None), call("cpu", torch.float64, "torch"), strict=True):
                close(ours, wanted.detach(), "embed, every part")

        return launch

    def rope(width: int, interleaved: bool) -> Callable[[Any], None]:
        def launch(device: Any) -> None:
            query, key = torch.randn(2, 5, 37, 80), torch.randn(2, 2, 37, 80)
            cos, sin = torch.randn(2, 1, 37, width)

            def call(where: Any, dtype: torch.dtype, backend: Backend | None) -> list[torch.Tensor]:
                q, k, c, s = (t.to(where, dtype) for t in (query, key, cos, sin))
                leaves = [q.requires_grad_(), k.requires_grad_()]
                out = [t for t in ek.rope(q, k, c, s, interleaved=interleaved, backend=backend) if t is not None]
                return [*out, *torch.autograd.grad([t.square().sum() for t in out], leaves)]

            for ours, wanted in zip(call(device, fp32, None), call("cpu", torch.float64, "torch"), strict=True):
                close(ours, wanted.detach(), "rope")

        return launch

    fp32, bf16 = torch.float32, torch.bfloat16
    return {
        "embed 100 fp32": stem(100, fp32, 0.0),
        "embed 768 bf16": stem(768, bf16, 0.0),
        "embed 768 bf16 dropout": stem(768, bf16, 0.1),
        "embed, ids out of range": bad_ids,
        "embed, every part, halves": every_part("halves"),
        "embed, every part, fairseq": every_part("fairseq"),
        "rope partial": rope(32, False),
        "rope interleaved": rope(80, True),
        "embedding_grad extension": table_grad(517, 100, fp32, False, "extension"),
        "embedding_grad extension hot row": table_grad(6000, 768, bf16, True, "extension"),
        "embedding_grad extension long segment": table_grad(20000, 64, bf16, True, "extension"),
        "embedding_grad extension modes": table_modes(5003, 136, "extension"),
        "embedding_grad extension modes, one element at a time": table_modes(301, 35, "extension"),
        "embedding_grad triton hot row": table_grad(6001, 768, bf16, True, "triton"),
        "embedding_grad triton modes": table_modes(700, 136, "triton"),
        "attention 16 padded": attention((2, 3, 3, 77, 16), bf16, False, True, 0.0),
        "attention 64 causal grouped": attention((2, 4, 2, 131, 64), bf16, True, False, 0.0),
        "attention 64 padded dropout": attention((3, 2, 2, 65, 64), bf16, False, True, 0.1),
        "attention 128 causal padded": attention((2, 2, 1, 130, 128), bf16, True, True, 0.0),
        "attention 32 fp32": attention((1, 2, 2, 33, 32), fp32, False, False, 0.0),
    }


def launch(device_name: str, only: list[str] | None) -> int:
    """Run the launches in this process; prints a line for each and returns how many failed."""
    import torch

    failed = 0
    for name, call in launches().items():
        if only and name not in only:
            continue
        torch.manual_seed(0)
        try:
            call(torch.device(device_name))
            if device_name == "cuda":
                torch.cuda.synchronize()
            print(f"ok: {name}", flush=True)
        except Exception as error:
            # Where this machine lacks the extension or Triton, there is no kernel to launch.
            if isinstance(error, RuntimeError) and "cannot run on" in str(error):
                print(f"absent: {name}: {error}", flush=True)
                continue
            failed += 1
            print(f"FAILED: {name}: {type(error).__name__}: {error}", flush=True)
    return failed


def find_sanitizer() -> str | None:
    """compute-sanitizer on the PATH, beside nvcc or in the toolkit's usual places."""
    nvcc = shutil.which("nvcc")
    places = [Path(nvcc).resolve().parent] if nvcc else []
    for toolkit in (os.environ.get("CUDA_HOME"), "/usr/local/cuda"):
        if toolkit:
            places += [Path(toolkit) / "bin", Path(toolkit) / "compute-sanitizer"]
    on_path = shutil.which("compute-sanitizer")
    found = [str(place / "compute-sanitizer") for place in places if (place / "compute-sanitizer").is_file()]
    return on_path or next(iter(found), None)


def options_of(known: str, tool: str) -> list[str]:
    """A tool's options, of those that ``known``, the sanitizer's help text, lists."""
    wanted = ["--error-exitcode", str(ERRORS_FOUND), "--print-limit", "20", "--launch-timeout", "60"]
    # Compilers that a launch starts are not what is looked at.
    if "--target-processes " in known:
        wanted += ["--target-processes", "application-only"]
    # PyTorch asks the driver for things that older ones do not have, and copes with the errors.
    if tool == "memcheck" and "--report-api-errors " in known:
        wanted += ["--report-api-errors", "no"]
    # Other people's kernels are left alone; older tools name the option differently.
    name = "--kernel-name" if "--kernel-name " in known else "--kernel-regex"
    return [*wanted, *(part for substring in OUR_KERNELS for part in (name, f"kns={substring}"))]


def findings(output: str) -> int | None:
    """The number of errors or hazards in a tool's summary lines; None if it printed none."""
    counts = [int(a or b) for a, b in SUMMARY.findall(output)]
    return sum(counts) if counts else None


def judged(tool: str, done: Finished) -> tuple[dict[str, Any], str]:
    """A tool's entry in the report, and what is wrong; "" if nothing is."""
    found = findings(done.output)
    entry: dict[str, Any] = {**asdict(done), "findings": found, "output": done.output[-KEPT:]}
    if REFUSED.search(done.output):
        return {**entry, "findings": None, "not_run": "the tool refuses this device"}, ""
    if done.timed_out and not found:
        return {**entry, "not_run": f"out of time after {done.seconds:.0f} s"}, ""
    if done.exit_code or found != 0:
        return entry, f"{tool}: {found} findings, exit code {done.exit_code}"
    return entry, ""


def run_launches(
    names: list[str], command: list[str], deadline: float
) -> tuple[dict[str, Any], list[str], list[str]]:
    """Every launch in a process of its own: the entries of the report, the problems, what there was no time for."""
    entries, problems, late = {}, [], []

    def one(name: str) -> tuple[float, Finished]:
        seconds = deadline - time.monotonic()
        return seconds, processes.run([*command, "--only", name], seconds)

    with ThreadPoolExecutor(min(len(names), os.cpu_count() or 1, 8)) as pool:
        for name, (seconds, done) in zip(names, pool.map(one, names), strict=True):
            entries[name] = {**asdict(done), "output": done.output[-KEPT:]}
            said = next((text for text in done.output.splitlines() if text.startswith(("ok:", "absent:"))), "")
            if done.timed_out and seconds < ENOUGH:
                late.append(name)
            elif done.exit_code or not said:
                what = f"stopped after {done.seconds:.0f} s; " if done.timed_out else ""
                problems.append(f"{name}: {what}{done.output.strip()[-500:]}")
    return entries, problems, late


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--launch", action="store_true", help="only run the launches, in this process")
    parser.add_argument("--only", action="append", help="one launch by name; may be repeated")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=90.0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    if args.launch:
        return min(1, launch(args.device, args.only))

    deadline = time.monotonic() + args.seconds
    command = [sys.executable, "-m", "bench.sanitize", "--launch", "--device", args.device]
    unknown = sorted(set(args.only or []) - set(launches()))
    if unknown:
        parser.error(f"--only: there is no {', '.join(unknown)}; expected some of {', '.join(launches())}")
    names = [name for name in launches() if not args.only or name in args.only]
    result: dict[str, Any] = {"launches": {}, "tools": {}, "problems": [], "incomplete": []}
    result["launches"], result["problems"], late = run_launches(names, command, deadline)
    result["incomplete"] += [f"{name}: out of time" for name in late]
    if args.out:
        write_json(args.out, result)

    sanitizer = find_sanitizer() if args.device == "cuda" else None
    reason = ""
    if args.device != "cuda":
        reason = "no GPU"
    elif sanitizer is None:
        reason = "compute-sanitizer was not found"
        result["problems"].append(reason)
    elif deadline - time.monotonic() < ENOUGH:
        reason = "out of time"
    if reason or sanitizer is None:
        result["tools"] = {tool: {"not_run": reason} for tool in TOOLS}
    else:
        known = processes.run([sanitizer, "--help"], 10).output

        def sanitized(tool: str) -> Finished:
            chosen = [name for name in names if tool == "memcheck" or name.startswith(EXTENSION)]
            only = [part for name in chosen or names for part in ("--only", name)]
            # Without PyTorch's pool every tensor is an allocation of its own, and leaving it is an error.
            env = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
            call = [sanitizer, "--tool", tool, *options_of(known, tool), *command, *only]
            return processes.run(call, deadline - time.monotonic(), env)

        with ThreadPoolExecutor(len(TOOLS)) as pool:
            for tool, done in zip(TOOLS, pool.map(sanitized, TOOLS), strict=True):
                result["tools"][tool], problem = judged(tool, done)
                result["problems"] += [problem] if problem else []
    if args.device == "cuda":
        result["incomplete"] += [f"{t}: {e['not_run']}" for t, e in result["tools"].items() if "not_run" in e]
    if args.out:
        write_json(args.out, result)
    for problem in result["problems"]:
        print(problem)
    return int(bool(result["problems"]))


if __name__ == "__main__":
    processes.end_with_commands()
    sys.exit(main())

"""Run the cases of one suite: make inputs, check every rival, time the right ones, write JSON as it grows.

    python -m bench.suites attention --out attention.json            # on the GPU there is
    python -m bench.suites attention --device cpu --tiny --out dry.json

A result that is wrong is marked and not timed. What there was no time for is listed: first the yardstick and ours
run in every case, then one wave of rivals after the other. In each wave all that are right so far are timed again, so
that the figures of a case that stand side by side were taken in turns.
"""

from __future__ import annotations

import argparse
import functools
import gc
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import embedkernels as ek
from bench import cases, check, environment, front_end, rivals, table_grad
from bench.files import write_json
from bench.rivals import Prepared, Rival
from bench.timing import CaptureLeak, Stopwatch, ceilings, summary
from embedkernels.ops.backend import choose

SEED = 20261


@dataclass(frozen=True)
class Suite:
    """What a suite is made of.

    Attributes:
        op: key of ``embedkernels.ops.backend.SUPPORTED``.
        inputs: makes a case's tensors on a device.
        expected: the results in float64, by the names that ``Prepared.training`` uses.
        floors: by pass, the fewest bytes that must move and the operations that must be done.
        rivals: the implementations; the first is the yardstick.
    """

    op: str
    cases: tuple[Any, ...]
    inputs: Callable[[Any, torch.device], SimpleNamespace]
    expected: Callable[[SimpleNamespace], dict[str, Tensor]]
    floors: Callable[[Any, SimpleNamespace], dict[str, tuple[float, float]]]
    rivals: Callable[[bool], list[Rival]]


def _leaf(t: Tensor) -> Tensor:
    return t.detach().requires_grad_()


def attention_inputs(case: cases.AttentionCase, device: torch.device) -> SimpleNamespace:
    dtype = getattr(torch, case.dtype)
    torch.manual_seed(SEED)

    batch, length, lengths, mask, ends = case.batch, case.length, None, None, None
    if case.packed:
        ends = F.pad(cases.make_lengths(batch, length, case.fill).cumsum(0), (1, 0)).int()
        batch, length = 1, int(ends[-1])
        document = torch.searchsorted(ends[1:], torch.arange(length), right=True)
        same = document[:, None] == document[None, :]
        mask = (same.tril() if case.causal else same)[None, None].to(device)
        ends = ends.to(device)

    def heads(count: int) -> Tensor:  # (B, H, S, D) as a projection leaves it: heads inside of the sequence
        return torch.randn(batch, length, count, case.width, device=device).to(dtype).transpose(1, 2)

    if not case.packed and (case.fill < 1 or case.window is not None):
        steps = torch.arange(case.length, device=device)
        visible = torch.ones(case.batch, case.length, case.length, dtype=torch.bool, device=device)
        if case.fill < 1:
            lengths = cases.make_lengths(case.batch, case.length, case.fill).to(device)
            visible = visible & (steps < lengths[:, None, None])
        if case.causal:
            visible = visible & (steps[None, :] <= steps[:, None])
        if case.window is not None:
            ahead = steps[None, :] - steps[:, None]
            visible = visible & (ahead >= -case.window[0]) & (ahead <= case.window[1])
        mask = visible[:, None].contiguous()
    return SimpleNamespace(
        query=_leaf(heads(case.heads)),
        key=_leaf(heads(case.kv_heads)),
        value=_leaf(heads(case.kv_heads)),
        upstream=heads(case.heads),
        lengths=lengths,
        mask=mask,
        causal=case.causal,
        window=case.window,
        ends=ends,
        longest=case.length,
    )


def attention_expected(x: SimpleNamespace) -> dict[str, Tensor]:
    """One sequence at a time: the scores of a whole batch in float64 would not fit."""
    found: dict[str, list[Tensor]] = {}
    length, group = x.query.shape[2], x.query.shape[1] // x.key.shape[1]
    triangle = torch.ones(length, length, dtype=torch.bool, device=x.query.device).tril()
    for b in range(x.query.shape[0]):
        wide = {name: _leaf(getattr(x, name)[b].double()) for name in ("query", "key", "value")}
        key, value = (wide[name].repeat_interleave(group, 0) for name in ("key", "value"))
        scores = wide["query"] @ key.transpose(1, 2) / x.query.shape[-1] ** 0.5
        visible = x.mask[b] if x.mask is not None else (triangle if x.causal else None)
        if visible is not None:
            scores = scores.masked_fill(~visible, float("-inf"))
        out = F.softmax(scores, dim=-1) @ value
        upstream = x.upstream[b].double()
        one = rivals.differentiable(functools.partial(torch.clone, out), wide, upstream)
        for name, t in one.training().items():
            found.setdefault(name, []).append(t)
    return {name: torch.stack(parts) for name, parts in found.items()}


def attention_floors(case: cases.AttentionCase, x: SimpleNamespace) -> dict[str, tuple[float, float]]:
    if x.mask is not None:
        pairs = float(x.mask.sum())
    else:
        pairs = case.batch * (case.length * (case.length + 1) / 2 if case.causal else case.length**2)
    # One product of the query's size by the key's for the scores, one for the output; the backward has five.
    flops = 4.0 * pairs * case.heads * case.width if case.dtype != "float32" else 0.0  # bf16's ceiling is not fp32's
    query = x.query.numel() * x.query.element_size()
    keys = (x.key.numel() + x.value.numel()) * x.key.element_size()
    forward = 2 * query + keys
    return {"forward": (forward, flops), "training": (forward + 4 * query + 2 * keys, 3.5 * flops)}


def rope_inputs(case: cases.RopeCase, device: torch.device) -> SimpleNamespace:
    dtype = getattr(torch, case.dtype)
    torch.manual_seed(SEED)

    def heads(count: int) -> Tensor:  # as a projection leaves it
        return torch.randn(case.batch, case.length, count, case.width, device=device).to(dtype).transpose(1, 2)

    rates = 10000 ** (-torch.arange(0, case.width, 2, device=device) / case.width)
    angles = torch.arange(case.length, device=device)[None, :, None] * rates
    angles = angles.repeat_interleave(2, -1) if case.interleaved else torch.cat((angles, angles), -1)
    # (1, S, R), as transformers makes them where no position ids are given.
    return SimpleNamespace(
        query=_leaf(heads(case.heads)),
        key=_leaf(heads(case.kv_heads)),
        cos=angles.cos().to(getattr(torch, case.tables)),
        sin=angles.sin().to(getattr(torch, case.tables)),
        upstream=(heads(case.heads), heads(case.kv_heads)),
        interleaved=case.interleaved,
    )


def rope_expected(x: SimpleNamespace) -> dict[str, Tensor]:
    wide = {name: getattr(x, name).double() for name in ("query", "key", "cos", "sin")}
    leaves = _leaf(wide["query"]), _leaf(wide["key"])

    def turned(t: Tensor) -> Tensor:
        pairs = t.unflatten(-1, (-1, 2)) if x.interleaved else t.unflatten(-1, (2, -1)).transpose(-1, -2)
        cos, sin = (
            (table.unflatten(-1, (-1, 2)) if x.interleaved else table.unflatten(-1, (2, -1)).transpose(-1, -2))[
                :, None
            ]
            for table in (wide["cos"], wide["sin"])
        )
        a, b = pairs.unbind(-1)
        both = torch.stack((a * cos[..., 0] - b * sin[..., 0], b * cos[..., 1] + a * sin[..., 1]), -1)
        return both.flatten(-2) if x.interleaved else both.transpose(-1, -2).flatten(-2)

    out = [turned(leaf) for leaf in leaves]
    grads = torch.autograd.grad(out, leaves, [t.double() for t in x.upstream])
    names = ("query", "key", "grad of query", "grad of key")
    return dict(zip(names, (*(t.detach() for t in out), *grads), strict=True))


def rope_floors(case: cases.RopeCase, x: SimpleNamespace) -> dict[str, tuple[float, float]]:  # noqa: ARG001
    heads = (x.query.numel() + x.key.numel()) * x.query.element_size()
    tables = (x.cos.numel() + x.sin.numel()) * x.cos.element_size()
    return {"forward": (2 * heads + tables, 0), "training": (4 * heads + 2 * tables, 0)}


SUITES: dict[str, Suite] = {
    "embed": Suite(
        "embed",
        front_end.CASES,
        front_end.inputs,
        front_end.expected,
        front_end.floors,
        front_end.contestants,
    ),
    "embedding_grad": Suite(
        "embedding_grad",
        table_grad.CASES,
        table_grad.inputs,
        table_grad.expected,
        table_grad.floors,
        table_grad.contestants,
    ),
    "attention": Suite(
        "attention", cases.ATTENTION, attention_inputs, attention_expected, attention_floors, rivals.attention_rivals
    ),
    "rope": Suite("rope", cases.ROPE, rope_inputs, rope_expected, rope_floors, rivals.rope_rivals),
}


def reason(error: BaseException) -> str:
    """An exception's kind and first line."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:500]


OUT_OF_TIME = "out of time"


class Runner:
    """Runs a suite's cases until its time is up.

    Args:
        name: key of ``SUITES``.
        device: where.
        seconds: after which nothing new is started.
        tiny: shrink every case, for a dry run.
        per_case: seconds of timing per case and pass.

    Attributes:
        waves: in which its rivals run, ascending; the first has the yardstick and ours.
    """

    def __init__(self, name: str, device: torch.device, seconds: float, tiny: bool, per_case: float = 0.6) -> None:
        self.suite, self.device, self.tiny = SUITES[name], device, tiny
        self.deadline = time.monotonic() + seconds
        self.per_case, self.most = (0.0, 2) if tiny else (per_case, 60)
        self.watch = Stopwatch(device)
        self.rivals = self.suite.rivals(tiny)
        self.waves = sorted({rival.wave for rival in self.rivals})
        self.yardsticks: dict[str, dict[str, check.Errors]] = {}

    def late(self) -> bool:
        return time.monotonic() > self.deadline

    def contestants(self, case: Any, wave: int) -> list[dict[str, Any]]:  # noqa: ARG002
        """The rivals of a wave, as their entries begin."""
        return [entry_of(rival.name, rival.ours, rival.required) for rival in self.rivals if rival.wave == wave]

    def run(self, case: Any, record: dict[str, Any], wave: int) -> None:
        """Check a case's rivals of a wave, time them and those before; what is known goes into ``record`` at once."""
        x = self.suite.inputs(case, self.device)
        expected = self.suite.expected(x)
        if self.late():
            not_reached(self, case, record, wave)
            return
        yardstick = self.yardsticks.setdefault(case.name, {})
        status = {entry["rival"]: entry["status"] for entry in record["rivals"]}
        ready: dict[str, Prepared] = {}
        for rival in self.rivals:
            if rival.wave < wave and status[rival.name] == "ok":
                ready[rival.name] = rival.build(x, case.dropout)
            if rival.wave != wave:
                continue
            entry, prepared = self.checked(rival, case, x, expected, yardstick)
            record["rivals"].append(entry)
            if prepared is not None:
                ready[rival.name] = prepared
            if not yardstick and entry["status"] == "not run":
                not_reached(self, case, record, wave)
                return
            if not yardstick:
                raise RuntimeError(f"no yardstick: {entry['detail']}")
        del expected
        self.collect()
        if wave and not any(rival.wave == wave and rival.name in ready for rival in self.rivals):
            return
        floors = self.suite.floors(case, x)
        record["floors"] = {name: {"bytes": b, "flops": f} for name, (b, f) in floors.items()}
        for name in floors:
            self.timed(name, ready, record)
        if self.device.type == "cuda":
            for name in floors:
                self.replayed(name, ready, record)

    def checked(
        self,
        rival: Rival,
        case: Any,
        x: SimpleNamespace,
        expected: dict[str, Tensor],
        yardstick: dict[str, check.Errors],
    ) -> tuple[dict[str, Any], Prepared | None]:
        """A rival's entry, and its calls if its results are right. The first rival fills in the yardstick."""
        entry = entry_of(rival.name, rival.ours, rival.required)
        if self.late():
            return {**entry, "status": "not run", "detail": OUT_OF_TIME}, None
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            try:
                # Without dropout, which draws other numbers in every implementation; everything else as timed.
                result = rival.build(x, 0.0).training()
                if not yardstick:
                    yardstick.update(check.measure_yardstick(result, expected))
                limit = check.OUR_LIMIT if rival.ours else check.RIVAL_LIMIT
                verdict = check.judge(result, expected, yardstick, limit)
                del result
                entry["error_ratios"] = verdict.ratios
                if not verdict.ok:
                    return {**entry, "status": "wrong", "detail": verdict.detail}, None
                prepared = rival.build(x, case.dropout)
                if case.dropout:
                    broken = [name for name, t in prepared.training().items() if not bool(torch.isfinite(t).all())]
                    if broken:
                        return {**entry, "status": "wrong", "detail": f"not finite with dropout: {broken}"}, None
                self.watch.synchronize()
            except Exception as error:  # whatever a rival raises is its answer
                # SDPA says in warnings why a backend cannot take a call.
                why = dict.fromkeys(str(w.message).partition("(Triggered internally")[0].strip() for w in said)
                return {**entry, "status": "refused", "detail": "; ".join([reason(error), *why])[:700]}, None
            finally:
                self.collect()
        return {**entry, "status": "ok", "detail": ""}, prepared

    def timed(self, name: str, ready: dict[str, Prepared], record: dict[str, Any]) -> None:
        """Fill in the times of one pass, of every rival that is right."""
        calls = {rival: getattr(prepared, name) for rival, prepared in ready.items()}
        calls = {rival: call for rival, call in calls.items() if call is not None}
        samples = self.watch.interleaved(calls, self.per_case * len(calls), 2 if self.tiny else 10, self.most)
        entries = {entry["rival"]: entry["passes"] for entry in record["rivals"]}
        for rival, call in calls.items():
            before = entries[rival].get(name, {})
            entries[rival][name] = {
                **{key: before[key] for key in ("graph_us", "graph_problem") if key in before},
                **summary(samples[rival]),
                "host_us": self.watch.host(call),
                "peak_bytes": self.watch.peak_bytes(call),
            }

    def replayed(self, name: str, ready: dict[str, Prepared], record: dict[str, Any]) -> None:
        """Fill in the times of one pass replayed from CUDA graphs, where they are not known yet."""
        entries = {entry["rival"]: entry["passes"] for entry in record["rivals"]}
        for rival, prepared in ready.items():
            call, found = getattr(prepared, name), entries[rival].get(name)
            if self.late() or call is None or found is None or "graph_us" in found or "graph_problem" in found:
                continue
            try:
                replay = self.watch.captured(call)
                times = self.watch.interleaved({rival: replay}, 0.0, 15, 15)[rival]
                found["graph_us"] = summary(times)["median_us"]
                del replay
            except CaptureLeak:
                raise
            except Exception as error:  # not capturable is a finding about the rival, not a fault of the run
                found["graph_problem"] = reason(error)
            self.collect()

    def collect(self) -> None:
        if self.device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()


def problems(records: list[dict[str, Any]]) -> list[str]:
    """What makes a suite fail: results of ours that are wrong, required ones that are missing, a case that broke."""
    found = []
    for record in records:
        if "error" in record:
            found.append(f"{record['name']}: {record['error']}")
        for entry in record["rivals"]:
            wrong = entry["ours"] and entry["status"] == "wrong"
            if wrong or (entry["required"] and entry["status"] == "refused"):
                found.append(f"{record['name']}: {entry['rival']} is {entry['status']}: {entry['detail']}")
    return found


def entry_of(rival: str, ours: bool, required: bool) -> dict[str, Any]:
    """How the entry of a rival in a case begins."""
    return {"rival": rival, "ours": ours, "required": required, "passes": {}}


def skipped(runner: Any, case: Any, record: dict[str, Any], wave: int, why: str) -> None:
    """Give every rival of a wave that has no entry in a case one that says why it did not run."""
    known = {entry["rival"] for entry in record["rivals"]}
    for entry in runner.contestants(case, wave):
        if entry["rival"] not in known:
            record["rivals"].append({**entry, "status": "not run", "detail": why})


def not_reached(runner: Any, case: Any, record: dict[str, Any], wave: int, why: str = OUT_OF_TIME) -> None:
    """Say of a case, or of its rivals of a later wave, that they did not run."""
    if wave == runner.waves[0]:
        record["not_run"] = why
    else:
        skipped(runner, case, record, wave, why)


def incomplete(records: list[dict[str, Any]]) -> list[str]:
    """What did not run, for want of time or after an error, counted."""
    cases_left = sum("not_run" in record for record in records)
    rivals_left = sum(entry["status"] == "not run" for record in records for entry in record["rivals"])
    return [
        f"{count} of {len(records)} cases" if what == "cases" else f"{count} rivals of the other cases"
        for what, count in (("cases", cases_left), ("rivals", rivals_left))
        if count
    ]


def run(
    name: str,
    device: torch.device,
    seconds: float,
    tiny: bool,
    save: Callable[[dict[str, Any]], None],
    only: tuple[str, ...] = (),
) -> bool:
    """Run a suite, or the cases of it that ``only`` names. True if nothing of ours failed.

    ``save`` gets the whole result whenever it grows.
    """
    runner: Any
    todo: tuple[Any, ...]
    if name == "step":
        from bench.step import StepRunner

        runner, todo = StepRunner(device, seconds, tiny), cases.STEP
    else:
        runner, todo = Runner(name, device, seconds, tiny), SUITES[name].cases
    if unknown := sorted(set(only) - {case.name for case in todo}):
        raise ValueError(f"suite {name} has no case {', '.join(unknown)}: {', '.join(case.name for case in todo)}")
    todo = tuple(case.tiny() if tiny else case for case in todo if not only or case.name in only)
    records: list[dict[str, Any]] = [
        {"name": case.name, "case": asdict(case), "rivals": [], "seconds": 0.0, "not_run": "not reached"}
        for case in todo
    ]
    result: dict[str, Any] = {
        "suite": name,
        "environment": {**environment.describe(), "threads": torch.get_num_threads()},
        "device": str(device),
        "tiny": tiny,
        "absent_rivals": rivals.absent(),
        "ceilings": ceilings(device, tiny),
        "backends": {op: asdict(choose(op, device)) for op in ("embed", "embedding_grad", "attention", "rope")},
        "cases": records,
        "problems": [],
        "incomplete": [],
        "may_be_stopped": False,
    }
    broken = ""
    for wave in runner.waves:
        # After the first wave every case has the yardstick and ours: whatever else is under way may be stopped.
        result["may_be_stopped"] = wave > runner.waves[0]
        for case, record in zip(todo, records, strict=True):
            if wave == runner.waves[0]:
                del record["not_run"]
            elif "not_run" in record:
                continue
            if "error" in record:
                skipped(runner, case, record, wave, f"skipped after {record['error']}")
                continue
            started = time.monotonic()
            if broken or runner.late():
                not_reached(runner, case, record, wave, broken or OUT_OF_TIME)
            else:
                save(result)
                try:
                    runner.run(case, record, wave)
                    ek.check_errors()
                except CaptureLeak as error:
                    broken = reason(error)
                    skipped(runner, case, record, wave, broken)
                except Exception as error:  # the next case may still work
                    record["error"] = reason(error)
                    skipped(runner, case, record, wave, f"skipped after {record['error']}")
                    print(traceback.format_exc(), file=sys.stderr)
                if device.type == "cuda":
                    record["clocks"] = environment.clocks()
            record["seconds"] = round(record["seconds"] + time.monotonic() - started, 2)
            result["problems"], result["incomplete"] = problems(records), incomplete(records)
            if broken:
                result["incomplete"].append(broken)
    save(result)
    return not result["problems"]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("suite", choices=[*SUITES, "step"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=60.0, help="start nothing new after this time")
    parser.add_argument("--tiny", action="store_true", help="a dry run: sizes that prove only that the code works")
    parser.add_argument("--cases", default="", help="names, comma separated; all by default")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    good = run(
        args.suite,
        torch.device(args.device),
        args.seconds,
        args.tiny,
        lambda result: write_json(args.out, result),
        tuple(case.strip() for case in args.cases.split(",") if case.strip()),
    )
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())

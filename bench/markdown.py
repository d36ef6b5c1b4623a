"""A GPU session's report as Markdown: losses first among the figures, nothing left out that ran."""

from __future__ import annotations

from typing import Any

from bench.ceilings import share_of_ceiling
from bench.goals import MEASURED_ON, Goal, judge, timed_in

LOSS_SHOWN = 1.02  # a rival must be this much faster to be called so: below, it is noise
OUTPUT_LINES = 25


def losses(suite: dict[str, Any]) -> list[str]:
    """Every case and pass in which a rival is faster than ours, and by how much, by each clock that has both."""
    found = []
    for case in suite["cases"]:
        for name in case.get("floors", {}):
            times = timed_in(case, name)
            ours = times.get("ours")
            theirs = {
                entry["rival"]: times[entry["rival"]]
                for entry in case["rivals"]
                if not entry["ours"] and entry["rival"] in times
            }
            for clock in ("median_us", "graph_us", "host_us"):
                known = {rival: t[clock] for rival, t in theirs.items() if clock in t}
                if not known or ours is None or clock not in ours:
                    continue
                best = min(known, key=lambda rival: known[rival])
                if ours[clock] > LOSS_SHOWN * known[best]:
                    what = {"median_us": "call", "graph_us": "CUDA graph", "host_us": "host"}[clock]
                    found.append(
                        f"{case['name']}, {name}, {what}: ours {ours[clock]:.1f} µs, {best} {known[best]:.1f} µs "
                        f"({ours[clock] / known[best]:.2f}x slower)"
                    )
    return found


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _suite(suite: dict[str, Any]) -> list[str]:
    ceilings = suite["ceilings"]
    lines = [
        f"Device copy {ceilings['copy_bytes_per_s'] / 1e12:.2f} TB/s, "
        f"bf16 product {ceilings['bf16_flops_per_s'] / 1e12:.0f} TFLOP/s in the same process. "
        f"Not installed here: {', '.join(suite['absent_rivals']) or 'nothing'}.",
        "",
    ]
    if suite["tiny"]:
        lines += ["**A dry run on tiny sizes: the figures below say nothing about speed.**", ""]
    slower = losses(suite)
    if not suite["tiny"]:
        lines += [f"**Slower than the best rival in {len(slower)} comparisons:**" if slower else "Never slower.", ""]
        lines += [*(f"- {loss}" for loss in slower), *([""] if slower else [])]
    lines += [
        "| case | pass | rival | call µs | p10–p90 | x yardstick | graph µs | host µs | of ceiling | MB | note |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for case in suite["cases"]:
        if "not_run" in case or "error" in case:
            lines.append(f"| {case['name']} | | | | | | | | | | **{case.get('not_run') or case['error']}** |")
        for name in case.get("floors", {}):
            times = timed_in(case, name)
            base = times.get(case["rivals"][0]["rival"], {}).get("median_us")
            for entry in case["rivals"]:
                timed = times.get(entry["rival"])
                if timed is None:
                    continue
                share = share_of_ceiling(case["floors"][name], ceilings, timed["median_us"])
                peak = timed["peak_bytes"]
                lines.append(
                    f"| {case['name']} | {name} | {entry['rival']} | {timed['median_us']:.1f} | "
                    f"{timed['p10_us']:.1f}–{timed['p90_us']:.1f} | "
                    f"{_cell(base / timed['median_us'] if base else None, '.2f')} | "
                    f"{_cell(timed.get('graph_us'), '.1f')} | {_cell(timed.get('host_us'), '.1f')} | "
                    f"{_cell(share, '.0%')} | {_cell(None if peak is None else peak / 2**20, '.0f')} | "
                    f"{timed.get('graph_problem', '')} |"
                )
        for entry in case["rivals"]:
            if entry["status"] != "ok":
                lines.append(
                    f"| {case['name']} | | {entry['rival']} | | | | | | | | "
                    f"**{entry['status']}**: {_line(entry['detail'])} |"
                )
    return lines


def _line(text: str, most: int = 240) -> str:
    return " ".join(text.split()).replace("|", "\\|")[:most]


def _tests(data: dict[str, Any]) -> list[str]:
    counts = data["counts"]
    done = sum(counts.values())
    lines = [
        f"{counts['passed']} passed, {counts['failed']} failed, {counts['skipped']} skipped "
        f"of {data['selected']} selected ({data['selected'] - done} not reached), {data['processes']} processes."
    ]
    if not data["finished"]:
        lines.append(f"Stopped while these ran: {', '.join(data['running']) or 'none'}.")
    lines += [f"- **{name}**: {_line(text[-400:], 400)}" for name, text in data["failures"].items()]
    return lines


def _sanitizer(data: dict[str, Any]) -> list[str]:
    absent = [name for name, run in data["launches"].items() if "absent:" in run["output"]]
    lines = [
        f"{len(data['launches']) - len(absent)} launches; not possible here: {', '.join(absent) or 'none'}. "
        "racecheck looks at the extension's kernels only: of Triton's it reports plain reductions as hazards."
    ]
    for tool, run in data["tools"].items():
        if "not_run" in run:
            lines.append(f"- **{tool}: not run**, {run['not_run']}")
        else:
            lines.append(
                f"- {tool}: {run['findings']} findings, exit code {run['exit_code']}, {run['seconds']:.0f} s"
            )
    return lines


def _build(data: dict[str, Any]) -> list[str]:
    status = data.get("status", {})
    return [f"{data['seconds']:.0f} s; {status.get('reason', 'no status')}; loaded: {status.get('loaded')}."]


def _resources(data: dict[str, Any]) -> list[str]:
    results = data["results"]
    broken = [f"{r['spec']} ({r['target']}): {_line(r['error'])}" for r in results if r["error"]]
    spilling = [f"{r['spec']} ({r['target']}): {r['local']} B" for r in results if r["local"]]
    return [
        f"{len(results)} compilations with Triton {data['triton']} in {data['seconds']:.0f} s; "
        f"{len(broken)} failed, {len(spilling)} use local memory, {data['out_of_time']} not reached.",
        *(f"- {text}" for text in (*broken, *spilling)),
    ]


def _host(data: dict[str, Any]) -> list[str]:
    lines = [f"On {data['where']}.", "", "| call | eager, us | ours, us | ours / eager |", "|---|---|---|---|"]
    for case, found in data["results"].items():
        for name, one in found.items():
            lines.append(f"| {case}, {name} | {one['eager']:.1f} | {one['ours']:.1f} | {one['ratio']:.2f} |")
    return lines


def _in_its_terms(goal: Goal, value: float) -> str:
    return {"share": f"{value:.0%}", "microseconds": f"{value:.1f} us"}.get(goal.kind, f"{value:.2f} x")


def _goals(report: dict[str, Any]) -> list[str]:
    """Those that are not met first, those that were not measured last."""
    verdicts = list(judge(report))
    missed = [one for one in verdicts if one.met is False]
    open_ones = sum(one.met is None for one in verdicts)
    counts = f"{len(verdicts) - len(missed) - open_ones} met, {len(missed)} not met, {open_ones} not measured"
    lines = [
        f"Of {len(verdicts)} promised for an {MEASURED_ON}: {counts}.",
        "",
        "| part | case, pass | goal | measured | |",
        "|---|---|---|---|---|",
    ]
    for one in (*missed, *(one for one in verdicts if one.met), *(one for one in verdicts if one.met is None)):
        said = "" if one.value is None else _in_its_terms(one.goal, one.value)
        verdict = "not measured" if one.met is None else "met" if one.met else "**not met**"
        lines.append(f"| {one.goal.part} | {one.case}, {one.name} | {one.goal.text} | {said} | {verdict} |")
    return lines


def _part(part: dict[str, Any]) -> list[str]:
    data = part["data"]
    known = {"build": _build, "resources": _resources, "tests": _tests, "sanitizer": _sanitizer, "host": _host}
    lines: list[str] = []
    if data is not None:
        lines += [f"- **{problem}**" for problem in data.get("problems", [])]
        lines += ["", *known.get(part["name"], _suite)(data)]
    elif part["status"] != "not run":
        lines.append("It left no result.")
    if part.get("output"):
        lines += ["", "```", *part["output"].rstrip().splitlines()[-OUTPUT_LINES:], "```"]
    return lines


def render(report: dict[str, Any]) -> str:
    """The whole report, from what ``report.json`` holds."""
    env = report["environment"]
    gpu = env["gpu"]
    device = (
        f"{gpu['name']} (sm_{gpu['capability'].replace('.', '')}, {gpu['multiprocessors']} multiprocessors), "
        f"driver {gpu.get('nvidia-smi driver_version', 'unknown')}, CUDA {gpu['cuda']}"
        if gpu
        else "**none: nothing below was measured on a GPU**"
    )
    versions = ", ".join(f"{name} {version}" for name, version in env["versions"].items() if version)
    changed = " with changes" if env["modified"] else ""
    lines = [
        "# GPU session",
        "",
        f"- GPU: {device}",
        f"- clocks at the start: {env['clocks'] or 'unknown'}; at the end: {env.get('clocks_at_end') or 'unknown'}",
        f"- CPU: {env['cpu']} ({env['cpus']})",
        f"- versions: {versions}",
        f"- commit: {env['commit'] or 'unknown'}{changed}, sources {env['sources_sha256'][:12]}",
        f"- {report['started']}, {report['seconds']:.0f} s",
        "",
        "| part | status | s | of |",
        "|---|---|---|---|",
    ]
    for part in report["parts"]:
        status = part["status"] if part["status"] in ("passed", "not run") else f"**{part['status']}**"
        detail = f": {part['detail']}" if part["detail"] else ""
        lines.append(f"| {part['name']} | {status}{detail} | {part['seconds']:.0f} | {part['limit_s']:.0f} |")
    if gpu:
        lines += ["", "## Goals", "", *_goals(report)]
    for part in report["parts"]:
        lines += ["", f"## {part['name']}: {part['status']}", "", *_part(part)]
    lines += [
        "",
        "`call` is the time between CUDA events around one call with cold caches, launch gaps included; `graph` the "
        "replay of the same call from a CUDA graph; `host` how long the host is busy with one call. `x yardstick` is "
        "the first rival's call time over this one's. `of ceiling` is the least time that the bytes and operations "
        "counted for the case need at the ceilings above, over the call time; `MB` the memory that the call "
        "adds at its peak.",
        "",
    ]
    return "\n".join(lines)

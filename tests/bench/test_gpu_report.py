"""A GPU session reports everything that happened in it: what passed, failed, crashed or ran out of time."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from bench import gpu_report, parts, processes
from bench.parts import Machine, Part

GPU, NO_GPU = Machine("90"), Machine(None)


def script(code: str) -> Any:
    """A part's command that runs Python code with ``out`` set to its result file."""
    return lambda _machine, _seconds, out: [sys.executable, "-c", f"out = {str(out)!r}\n{code}"]


def write(value: Any) -> str:
    return f"open(out, 'w').write({json.dumps(value)!r})\n"


SUITE = {
    "suite": "embed",
    "tiny": False,
    "absent_rivals": ["liger_kernel"],
    "ceilings": {"copy_bytes_per_s": 3e12, "bf16_flops_per_s": 8e14},
    "problems": [],
    "cases": [
        {
            "name": "bert",
            "floors": {"training": {"bytes": 3e7, "flops": 0}},
            "rivals": [
                {
                    "rival": "eager",
                    "ours": False,
                    "status": "ok",
                    "detail": "",
                    "passes": {
                        "training": {"median_us": 40.0, "p10_us": 39.0, "p90_us": 41.0, "peak_bytes": 1 << 20}
                    },
                },
                {
                    "rival": "ours",
                    "ours": True,
                    "status": "ok",
                    "detail": "",
                    "passes": {"training": {"median_us": 50.0, "p10_us": 49.0, "p90_us": 51.0, "peak_bytes": 0}},
                },
                {"rival": "odd", "ours": False, "status": "wrong", "detail": "y: 1|2", "passes": {}},
            ],
        },
        {"name": "late", "rivals": [], "not_run": "out of time"},
    ],
}
GOOD = Part("embed", 20, script(write(SUITE)))
CRASHING = Part("step", 20, script("print('about to fall')\nimport os\nos.abort()"))
HANGING = Part(
    "attention",
    2,
    script(write({**SUITE, "problems": ["half done"]}) + "print('asleep', flush=True)\nimport time\ntime.sleep(600)"),
)
NEEDS_GPU = Part("sanitizer", 5, script("raise SystemExit(5)"), needs_gpu=True)


def session(
    monkeypatch: pytest.MonkeyPatch, out: Path, chosen: list[Part], machine: Machine = GPU
) -> tuple[int, dict[str, Any], str]:
    monkeypatch.setattr(gpu_report, "this_machine", lambda: machine)
    monkeypatch.setattr(gpu_report, "choose", lambda *_: chosen)
    code = gpu_report.main(["--out", str(out)])
    assert sorted(path.name for path in out.iterdir()) == ["report.json", "report.md"]
    return code, json.loads((out / "report.json").read_text()), (out / "report.md").read_text()


def test_a_good_session(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    code, report, text = session(monkeypatch, tmp_path / "deep" / "out", [GOOD])
    assert code == 0
    assert report["ok"]
    assert report["schema"] == 1
    part = report["parts"][0]
    assert (part["name"], part["status"], part["data"]) == ("embed", "passed", SUITE)
    for key in ("gpu", "clocks", "cpu", "versions", "commit", "modified", "sources_sha256", "clocks_at_end"):
        assert key in report["environment"]
    assert report["environment"]["versions"]["torch"]
    assert len(report["environment"]["sources_sha256"]) == 64
    assert "| embed | passed |" in text


def test_losses_wrong_results_and_what_is_missing_are_in_the_summary(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _, _, text = session(monkeypatch, tmp_path, [GOOD])
    assert "bert, training, call: ours 50.0 µs, eager 40.0 µs (1.25x slower)" in text
    assert "| bert | training | ours | 50.0 | 49.0–51.0 | 0.80 |" in text
    assert "| 20% |" in text, "10 µs of traffic at 3 TB/s in 50 µs"
    assert "**wrong**: y: 1\\|2" in text
    assert "| late |" in text
    assert "**out of time**" in text
    assert "Not installed here: liger_kernel" in text


def test_a_crash_is_reported_and_the_next_part_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    code, report, text = session(monkeypatch, tmp_path, [CRASHING, GOOD])
    assert code == 1
    assert not report["ok"]
    crashed, good = report["parts"]
    assert (crashed["status"], crashed["detail"], crashed["data"]) == ("failed", "exit code -6", None)
    assert "about to fall" in crashed["output"]
    assert good["status"] == "passed"
    assert "| step | **failed**: exit code -6 |" in text
    assert "about to fall" in text
    assert "It left no result." in text


def test_a_part_out_of_time_is_stopped_and_keeps_what_it_had(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gpu_report, "LIMIT", gpu_report.OVERHEAD + 3.0)
    started = time.monotonic()
    code, report, text = session(monkeypatch, tmp_path, [HANGING])
    assert time.monotonic() - started < 60
    assert code == 1
    part = report["parts"][0]
    assert part["status"] == "timed out"
    assert part["data"]["problems"] == ["half done"]
    assert "asleep" in part["output"]
    assert "**timed out**: stopped after 3 s" in text
    assert "half done" in text


def timed_out(tmp_path: Path, result: dict[str, Any]) -> dict[str, Any]:
    part = Part("tests", 1, script(write(result) + "import time\ntime.sleep(600)"))
    return gpu_report.run_part(part, GPU, 1.0, tmp_path)


def test_a_stop_when_all_that_matters_is_done_is_no_failure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    counts = {"passed": 3, "failed": 0, "skipped": 0}
    tests = {"counts": counts, "selected": 9, "processes": 1, "finished": False, "running": ["a"], "failures": {}}
    part = Part("tests", 1, script(write({**tests, "may_be_stopped": True}) + "import time\ntime.sleep(600)"))
    monkeypatch.setattr(gpu_report, "LIMIT", gpu_report.OVERHEAD + 1.5)
    code, report, text = session(monkeypatch, tmp_path / "out", [part])
    assert (code, report["ok"], report["parts"][0]["status"]) == (0, True, "incomplete")
    assert "| tests | **incomplete**: stopped after" in text
    assert "(6 not reached)" in text
    assert timed_out(tmp_path, {"may_be_stopped": False})["status"] == "timed out"
    assert timed_out(tmp_path, {"may_be_stopped": True, "problems": ["a"]})["status"] == "timed out"


def test_a_part_stopped_just_before_the_second_is_called_stopped(tmp_path: Path) -> None:
    """The seconds that a command took are rounded: 1.04 s of 1.04 s are 1.0."""
    part = Part("embed", 1, script("import time\ntime.sleep(600)"))
    assert gpu_report.run_part(part, GPU, 1.04, tmp_path)["status"] == "timed out"
    own = Part("embed", 1, script(f"import sys\nsys.exit({processes.TIMED_OUT})"))
    record = gpu_report.run_part(own, GPU, 0.5, tmp_path)
    assert (record["status"], record["detail"]) == ("failed", "exit code 124")


def test_what_a_part_left_out_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    part = Part("embed", 20, script(write({**SUITE, "incomplete": ["3 of 7 cases"]})))
    code, _, text = session(monkeypatch, tmp_path, [part])
    assert code == 0
    assert "| embed | **incomplete**: 3 of 7 cases |" in text


def test_without_triton_its_part_is_not_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    resources = next(part for part in parts.PARTS if part.name == "resources")
    code, report, text = session(monkeypatch, tmp_path, [resources], Machine(None, triton=False))
    assert code == 0
    assert (report["parts"][0]["status"], report["parts"][0]["detail"]) == ("not run", "triton is not installed")
    assert "| resources | not run: triton is not installed |" in text
    monkeypatch.setattr(parts.importlib.util, "find_spec", lambda _: None)
    assert not parts.this_machine().triton


def test_time_that_is_left_over_goes_to_the_next_parts(tmp_path: Path) -> None:
    report: dict[str, Any] = {"parts": []}
    chosen = [Part("embed", 20, script("")), NEEDS_GPU, Part("step", 30, script(""))]
    gpu_report.run_session(chosen, NO_GPU, report, lambda: None, limit=100)
    first, skipped, last = report["parts"]
    assert first["limit_s"] == pytest.approx(100 - 30, abs=1), "all but what the last part is promised"
    assert skipped["status"] == "not run"
    assert 90 < last["limit_s"] <= 100


def test_a_machine_without_a_gpu_says_so_and_is_good(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, report, text = session(monkeypatch, tmp_path, [NEEDS_GPU, GOOD], NO_GPU)
    assert code == 0
    assert not report["gpu"]
    assert report["parts"][0]["detail"] == "no GPU"
    assert "No GPU here" in capsys.readouterr().out
    assert "nothing below was measured on a GPU" in text
    assert "| sanitizer | not run: no GPU |" in text


def test_an_unknown_part_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_report.main(["--out", str(tmp_path / "out"), "--parts", "embed,speed"]) == 2
    assert "PARTS: there is no speed; expected some of build," in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_parts_are_chosen_by_name_and_machine() -> None:
    def names(wanted: str, machine: Machine) -> list[str]:
        return [part.name for part in parts.choose(wanted, machine)]

    assert names("step, embed", GPU) == ["embed", "step"]
    assert "resources" not in names("", GPU)
    assert "resources" in names("", NO_GPU)
    assert names("resources", GPU) == ["resources"]
    assert set(names("", GPU)) == {
        "build",
        "tests",
        "sanitizer",
        "embed",
        "embedding_grad",
        "attention",
        "rope",
        "host",
        "step",
    }


def test_the_shares_fit_into_nine_minutes() -> None:
    assert sum(part.seconds for part in parts.PARTS) + parts.OVERHEAD <= parts.LIMIT <= 9 * 60
    for part in parts.PARTS:
        for machine in (GPU, NO_GPU):
            command = part.command(machine, 60, Path("x.json"))
            assert command[:2] == [sys.executable, "-m"]
            assert command[-2:] == ["--out", "x.json"] or "x.json" in command


def test_a_real_dry_run_of_the_benchmarks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The parts as they are, on this machine's CPU."""
    monkeypatch.setattr(gpu_report, "this_machine", lambda: NO_GPU)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    code = gpu_report.main(["--out", str(tmp_path), "--parts", "attention,step"])
    report = json.loads((tmp_path / "report.json").read_text())
    assert code == 0, (tmp_path / "report.md").read_text()
    assert [part["status"] for part in report["parts"]] == ["passed", "passed"]
    step = report["parts"][1]["data"]["cases"][0]
    assert {entry["rival"]: entry["status"] for entry in step["rivals"]} == {
        "stock": "ok",
        "ours": "ok",
        "ours, padding-free": "ok",
        "stock, torch.compile": "ok",
    }
    assert "Bert" in step["patch_report"]
    assert "A dry run on tiny sizes" in (tmp_path / "report.md").read_text()

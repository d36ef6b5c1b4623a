"""Suites: every case runs, a wrong result is marked and never timed, what had no time is listed."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench import cases, rivals, suites, table_grad
from bench.rivals import Prepared, Rival
from bench.timing import Stopwatch

CPU = torch.device("cpu")


def dry_run(monkeypatch: pytest.MonkeyPatch, name: str, contestants: list[Rival], **change: Any) -> dict[str, Any]:
    """Run the first tiny case of a suite with these rivals."""
    suite = suites.SUITES[name]
    changed = dataclasses.replace(suite, cases=suite.cases[:1], rivals=lambda _: contestants, **change)
    monkeypatch.setitem(suites.SUITES, name, changed)
    saved: list[dict[str, Any]] = []
    good = suites.run(name, CPU, 60, True, saved.append)
    assert good == (not saved[-1]["problems"])
    return saved[-1]


def contest(name: str) -> list[Rival]:
    """The yardstick and our own implementation."""
    return suites.SUITES[name].rivals(True)[:2]


def spoilt(rival: Rival, name: str = "wrong", **change: Any) -> Rival:
    """A rival whose every tensor is half again as large as it should be."""

    def build(x: SimpleNamespace, dropout: float) -> Prepared:
        right = rival.build(x, dropout)
        return Prepared(right.forward, lambda: {key: t * 1.5 for key, t in right.training().items()})

    return dataclasses.replace(rival, name=name, build=build, **change)


@pytest.mark.parametrize("name", sorted(suites.SUITES))
def test_every_case_runs_and_is_right(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    suite = suites.SUITES[name]
    monkeypatch.setitem(suites.SUITES, name, dataclasses.replace(suite, rivals=lambda tiny: suite.rivals(tiny)[:2]))
    saved: list[dict[str, Any]] = []
    assert suites.run(name, CPU, 60, True, saved.append), saved[-1]["problems"]
    result = saved[-1]
    assert [case["name"] for case in result["cases"]] == [case.name for case in suite.cases]
    for case in result["cases"]:
        assert [entry["status"] for entry in case["rivals"]] == ["ok", "ok"]
        assert set(case["rivals"][1]["passes"]) == set(case["floors"])
        for timed in case["rivals"][1]["passes"].values():
            assert timed["median_us"] > 0
            assert len(timed["samples_us"]) == 2
            assert timed["host_us"] > 0


@pytest.mark.parametrize("name", sorted(suites.SUITES))
def test_the_reference_agrees_with_pytorch_in_double(name: str) -> None:
    """The float64 references are written out here: PyTorch in float64 must agree with them to its own precision."""
    suite = suites.SUITES[name]
    for case in suite.cases:
        one_dtype = {"buffer": ""} if isinstance(case, table_grad.GradCase) else {}
        x = suite.inputs(dataclasses.replace(case.tiny(), dtype="float64", **one_dtype), CPU)
        expected = suite.expected(x)
        found = suite.rivals(True)[0].build(x, 0.0).training()
        for key, want in expected.items():
            torch.testing.assert_close(found[key], want, rtol=1e-10, atol=1e-12)


def test_a_wrong_rival_is_marked_and_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    eager, ours = contest("embed")
    result = dry_run(monkeypatch, "embed", [eager, ours, spoilt(eager, name="rival")])
    entry = result["cases"][0]["rivals"][2]
    assert entry["status"] == "wrong"
    assert "largest error" in entry["detail"]
    assert entry["passes"] == {}
    assert result["problems"] == [], "a rival's fault is not ours"


def test_a_wrong_result_of_ours_fails_the_suite(monkeypatch: pytest.MonkeyPatch) -> None:
    eager, ours = contest("attention")
    result = dry_run(monkeypatch, "attention", [eager, spoilt(ours)])
    entry = result["cases"][0]["rivals"][1]
    assert entry["status"] == "wrong"
    assert entry["passes"] == {}
    assert len(result["problems"]) == 1
    assert "wrong is wrong" in result["problems"][0]


def test_dropout_that_gives_nan_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    eager, ours = contest("embed")

    def build(x: SimpleNamespace, dropout: float) -> Prepared:
        right = ours.build(x, dropout)
        if dropout == 0:
            return right
        return Prepared(right.forward, lambda: {key: t / 0 - t / 0 for key, t in right.training().items()})

    result = dry_run(monkeypatch, "embed", [eager, dataclasses.replace(ours, build=build)])
    assert result["cases"][0]["rivals"][1]["status"] == "wrong"
    assert "not finite with dropout" in result["problems"][0]


def test_a_refusal_is_listed_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(x: SimpleNamespace, dropout: float) -> Prepared:
        raise NotImplementedError("no such luck\nsecond line")

    eager, ours = contest("embedding_grad")
    optional = Rival("rival", build)
    result = dry_run(monkeypatch, "embedding_grad", [eager, ours, optional])
    entry = result["cases"][0]["rivals"][2]
    assert (entry["status"], entry["passes"]) == ("refused", {})
    assert entry["detail"] == "NotImplementedError: no such luck"
    assert result["problems"] == []

    result = dry_run(monkeypatch, "embedding_grad", [eager, dataclasses.replace(ours, build=build)])
    assert len(result["problems"]) == 1, "ours may not refuse"


def test_without_a_yardstick_nothing_is_called_right(monkeypatch: pytest.MonkeyPatch) -> None:
    eager, ours = contest("embed")
    for broken, says in [
        (dataclasses.replace(eager, build=lambda *_: 1 / 0), "ZeroDivisionError"),
        (spoilt(eager), "PyTorch and the reference differ"),
    ]:
        result = dry_run(monkeypatch, "embed", [broken, ours])
        assert says in result["cases"][0]["error"]
        assert result["problems"]


def test_a_broken_case_does_not_stop_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    suite = suites.SUITES["embedding_grad"]

    def inputs(case: table_grad.GradCase, device: torch.device) -> SimpleNamespace:
        if case.name == suite.cases[0].name:
            raise MemoryError("too large")
        return suite.inputs(case, device)

    changed = dataclasses.replace(suite, cases=suite.cases[:2], inputs=inputs, rivals=lambda _: contestants)
    contestants = contest("embedding_grad")
    monkeypatch.setitem(suites.SUITES, "embedding_grad", changed)
    saved: list[dict[str, Any]] = []
    assert not suites.run("embedding_grad", CPU, 60, True, saved.append)
    first, second = saved[-1]["cases"]
    assert first["error"] == "MemoryError: too large"
    assert second["rivals"][1]["status"] == "ok"


def entries_of(case: dict[str, Any]) -> dict[str, str]:
    """Status of every rival, with its reason if it did not run."""
    return {
        entry["rival"]: entry["status"] + (f", {entry['detail']}" if entry["status"] == "not run" else "")
        for entry in case["rivals"]
    }


@pytest.mark.parametrize(("fails", "at"), [("inputs", 1), ("timed", 1), ("inputs", 3)])
def test_after_an_error_what_was_skipped_is_listed(monkeypatch: pytest.MonkeyPatch, fails: str, at: int) -> None:
    """Every rival of every case has an entry in the file, whatever broke before its turn came."""
    suite = suites.SUITES["embedding_grad"]
    calls = {"inputs": 0, "timed": 0}

    def breaking(name: str, original: Any) -> Any:
        def call(*given: Any) -> Any:
            calls[name] += 1
            if (name, calls[name]) == (fails, at):
                raise MemoryError("too large")
            return original(*given)

        return call

    eager, ours = contest("embedding_grad")
    late = [dataclasses.replace(ours, name="ours again", wave=1), dataclasses.replace(eager, name="last", wave=2)]
    inputs, contestants = breaking("inputs", suite.inputs), [eager, ours, *late]
    changed = dataclasses.replace(suite, cases=suite.cases[:2], inputs=inputs, rivals=lambda _: contestants)
    monkeypatch.setitem(suites.SUITES, "embedding_grad", changed)
    monkeypatch.setattr(suites.Runner, "timed", breaking("timed", suites.Runner.timed))
    saved: list[dict[str, Any]] = []
    assert not suites.run("embedding_grad", CPU, 60, True, saved.append)
    first, second = saved[-1]["cases"]  # the third call of inputs is the first case's in the second wave
    assert first["error"] == "MemoryError: too large"
    skipped = "not run, skipped after MemoryError: too large"
    ran = skipped if (fails, at) == ("inputs", 1) else "ok"
    assert entries_of(first) == {"eager": ran, "ours": ran, "ours again": skipped, "last": skipped}
    assert entries_of(second) == dict.fromkeys(entries_of(first), "ok")
    assert {entry["rival"]: entry["ours"] for entry in first["rivals"]} == {
        "eager": False, "ours": True, "ours again": True, "last": False,
    }  # fmt: skip


def test_a_step_that_breaks_lists_what_was_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    from bench import step

    def breaks(*_: Any) -> Any:
        raise MemoryError("too large")

    monkeypatch.setattr(step, "make_model", breaks)
    saved: list[dict[str, Any]] = []
    assert not suites.run("step", CPU, 60, True, saved.append)
    for case in saved[-1]["cases"]:
        ours = ["ours", "ours, padding-free"]
        wanted = ["stock", *ours, *(["stock, torch.compile"] if case["case"]["compiled"] else [])]
        assert entries_of(case) == dict.fromkeys(wanted, "not run, skipped after MemoryError: too large")
        assert [entry["ours"] for entry in case["rivals"]] == [name in ours for name in wanted]


def test_a_rival_of_ours_that_was_not_reached_is_still_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    eager, ours = contest("embedding_grad")
    timed = suites.Runner.timed

    def slow(*given: Any) -> None:
        timed(*given)
        clock.late = True

    monkeypatch.setattr(suites.Runner, "timed", slow)
    again = dataclasses.replace(ours, name="ours in Triton", wave=1)
    entry = dry_run(monkeypatch, "embedding_grad", [eager, ours, again])["cases"][0]["rivals"][2]
    assert (entry["rival"], entry["status"], entry["ours"]) == ("ours in Triton", "not run", True)


def test_cases_without_time_are_listed() -> None:
    saved: list[dict[str, Any]] = []
    assert suites.run("attention", CPU, -1.0, True, saved.append)
    assert [case["not_run"] for case in saved[-1]["cases"]] == ["out of time"] * len(cases.ATTENTION)


class Clock:
    """A clock that a test sets, in place of the runner's."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.late = False
        monkeypatch.setattr(suites.Runner, "late", lambda _: self.late)


def test_a_deadline_during_a_reference_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, suite = Clock(monkeypatch), suites.SUITES["embedding_grad"]

    def expected(x: SimpleNamespace) -> dict[str, torch.Tensor]:
        clock.late = True
        return suite.expected(x)

    result = dry_run(monkeypatch, "embedding_grad", contest("embedding_grad"), expected=expected)
    case = result["cases"][0]
    assert (case["not_run"], case["rivals"]) == ("out of time", [])
    assert "error" not in case
    assert result["problems"] == []
    assert result["incomplete"] == ["1 of 1 cases"]


def test_a_deadline_between_yardstick_and_ours_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    eager, ours = contest("embedding_grad")

    def build(x: SimpleNamespace, dropout: float) -> Prepared:
        clock.late = True
        return eager.build(x, dropout)

    result = dry_run(monkeypatch, "embedding_grad", [dataclasses.replace(eager, build=build), ours])
    assert [entry["status"] for entry in result["cases"][0]["rivals"]] == ["ok", "not run"]
    assert result["problems"] == []
    assert result["incomplete"] == ["1 rivals of the other cases"]


def test_no_case_lacks_ours_for_the_sake_of_a_slow_rival(monkeypatch: pytest.MonkeyPatch) -> None:
    """The time is up when the slow rival is ready in the first case: ours has run in all, the rival in one."""
    clock, suite = Clock(monkeypatch), suites.SUITES["embedding_grad"]
    eager, ours = contest("embedding_grad")

    def slow(x: SimpleNamespace, dropout: float) -> Prepared:
        clock.late = True
        return eager.build(x, dropout)

    contestants = [eager, dataclasses.replace(eager, name="slow", build=slow, wave=1), ours]
    monkeypatch.setitem(
        suites.SUITES,
        "embedding_grad",
        dataclasses.replace(suite, rivals=lambda _: contestants, cases=suite.cases[:3]),
    )
    saved: list[dict[str, Any]] = []
    stoppable: list[tuple[int, bool]] = []

    def save(result: dict[str, Any]) -> None:
        saved.append(result)
        measured = sum(len(entry["passes"]) > 0 for case in result["cases"] for entry in case["rivals"])
        stoppable.append((measured, result["may_be_stopped"]))

    assert suites.run("embedding_grad", CPU, 60, True, save)
    status = [{entry["rival"]: entry["status"] for entry in case["rivals"]} for case in saved[-1]["cases"]]
    assert status[0] == {"eager": "ok", "ours": "ok", "slow": "ok"}
    assert status[1:] == [{"eager": "ok", "ours": "ok", "slow": "not run"}] * 2
    assert all(entry["passes"] for case in saved[-1]["cases"] for entry in case["rivals"] if entry["status"] == "ok")
    assert saved[-1]["incomplete"] == ["2 rivals of the other cases"]
    assert all(measured >= 6 for measured, may in stoppable if may)
    assert not any(may for measured, may in stoppable if measured < 6)


def test_a_later_wave_is_timed_together_with_those_before(monkeypatch: pytest.MonkeyPatch) -> None:
    rounds: list[list[str]] = []
    interleaved = Stopwatch.interleaved

    def spy(self: Stopwatch, calls: dict[str, Any], *rest: Any, **options: Any) -> Any:
        rounds.append(sorted(calls))
        return interleaved(self, calls, *rest, **options)

    monkeypatch.setattr(Stopwatch, "interleaved", spy)
    eager, ours = contest("embedding_grad")
    late = dataclasses.replace(eager, name="rival", wave=2)
    dry_run(monkeypatch, "embedding_grad", [eager, ours, late])
    assert rounds == [["copy", "product"], ["eager", "ours"], ["eager", "ours", "rival"]]


def test_a_capture_that_cannot_be_undone_ends_the_suite(monkeypatch: pytest.MonkeyPatch) -> None:
    suite = suites.SUITES["embedding_grad"]
    monkeypatch.setitem(suites.SUITES, "embedding_grad", dataclasses.replace(suite, cases=suite.cases[:2]))

    def leak(*_: Any) -> None:
        raise suites.CaptureLeak("no way back")

    monkeypatch.setattr(suites.Runner, "collect", leak)
    saved: list[dict[str, Any]] = []
    assert suites.run("embedding_grad", CPU, 60, True, saved.append)
    assert saved[-1]["cases"][1]["not_run"] == "CaptureLeak: no way back"
    assert {entry["rival"] for entry in saved[-1]["cases"][0]["rivals"]} == {
        rival.name for rival in suite.rivals(True)
    }
    assert saved[-1]["incomplete"][-1] == "CaptureLeak: no way back"


def test_torch_compile_takes_part_in_dry_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    result = dry_run(monkeypatch, "embed", suites.SUITES["embed"].rivals(True))
    assert {entry["rival"]: entry["status"] for entry in result["cases"][0]["rivals"]} == {
        "eager": "ok",
        "ours": "ok",
        "torch.compile": "ok",
    }


def test_sdpa_says_why_it_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    result = dry_run(monkeypatch, "attention", suites.SUITES["attention"].rivals(True))
    entries = {entry["rival"]: entry for entry in result["cases"][0]["rivals"]}
    assert entries["sdpa flash"]["status"] == "refused", "no flash kernel takes a mask and dropout"
    assert "dropout" in entries["sdpa flash"]["detail"]


def test_rivals_that_are_not_installed_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rivals, "OPTIONAL", ("no_such_rival", "torch"))
    assert rivals.absent() == ["no_such_rival"]


def test_causal_attention_counts_half_the_pairs() -> None:
    full = cases.AttentionCase("full", 2, 16, 4, 4, 8)
    causal = dataclasses.replace(full, causal=True)
    flops = {
        case.causal: suites.attention_floors(case, suites.attention_inputs(case, CPU)) for case in (full, causal)
    }
    assert flops[False]["forward"][1] == 4 * 2 * 4 * 16 * 16 * 8
    assert flops[True]["forward"][1] == 4 * 2 * 4 * (16 * 17 / 2) * 8
    assert flops[True]["training"][1] == 3.5 * flops[True]["forward"][1]


def test_padded_attention_counts_visible_pairs_only() -> None:
    case = cases.AttentionCase("padded", 3, 16, 2, 2, 8, fill=0.6)
    x = suites.attention_inputs(case, CPU)
    assert suites.attention_floors(case, x)["forward"][1] == 4 * float(x.lengths.sum()) * 16 * 2 * 8


def test_windowed_attention_counts_visible_pairs_only() -> None:
    case = cases.AttentionCase("window", 3, 16, 2, 2, 8, window=(2, 1))
    x = suites.attention_inputs(case, CPU)
    pairs = 3 * (16 * 4 - (2 + 1) - 1)  # four keys each, but for the ends of the sequence
    assert suites.attention_floors(case, x)["forward"][1] == 4 * pairs * 2 * 8


def test_samples_of_different_rivals_alternate(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[int] = []
    sample = Stopwatch._sample

    def spy(self: Stopwatch, call: Any) -> Any:
        if "ceilings" not in call.__qualname__:
            order.append(id(call))
        return sample(self, call)

    monkeypatch.setattr(Stopwatch, "_sample", spy)
    dry_run(monkeypatch, "embedding_grad", contest("embedding_grad"))
    assert len(order) == 4
    assert order[:2] == order[2:]
    assert order[0] != order[1]


def test_cases_are_chosen_by_name() -> None:
    saved: list[dict[str, Any]] = []
    assert suites.run("rope", CPU, 60, True, saved.append, ("llama-1b 2k",))
    assert [record["name"] for record in saved[-1]["cases"]] == ["llama-1b 2k"]
    with pytest.raises(ValueError, match="suite rope has no case llama: llama-8b 2k, llama-1b 2k"):
        suites.run("rope", CPU, 60, True, saved.append, ("llama",))

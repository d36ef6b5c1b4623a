"""The fine-tuning step: checked against float64, timed per step, and a wrong model is found."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

from bench import cases, step, suites

CPU = torch.device("cpu")
CASE = dataclasses.replace(cases.STEP[1], compiled=False).tiny()


def run(monkeypatch: pytest.MonkeyPatch, change: Any, case: cases.StepCase = CASE) -> dict[str, Any]:
    """One case in which "ours" is what ``change`` makes of the stock model."""

    def rivals(self: step.StepRunner, record: dict[str, Any]) -> dict[str, Any]:
        return {step.STOCK: lambda model: model, "ours": change}

    monkeypatch.setattr(step.StepRunner, "rivals", rivals)
    record: dict[str, Any] = {"name": case.name, "rivals": []}
    step.StepRunner(CPU, 60, True).run(case, record, 0)
    return record


def test_a_step_is_checked_and_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    record = run(monkeypatch, lambda model: model)
    stock, ours = record["rivals"]
    assert (stock["status"], ours["status"]) == ("ok", "ok")
    assert set(ours["error_ratios"]) == {"logits", *step.GRADS}
    times = ours["passes"]["step"]
    assert times["samples_per_s"] == pytest.approx(CASE.batch / times["median_us"] * 1e6)
    assert len(times["samples_us"]) == 2


@pytest.mark.parametrize("name", ["classifier", "query"])
def test_a_model_that_computes_something_else_is_wrong(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def change(model: Any) -> nn.Module:
        layer = model.classifier if name == "classifier" else model.bert.encoder.layer[0].attention.self.query
        with torch.no_grad():
            layer.weight.mul_(1.01)
        return model

    record = run(monkeypatch, change)
    ours = record["rivals"][1]
    assert ours["status"] == "wrong"
    assert ours["passes"] == {}
    assert len(suites.problems([record])) == 1


def test_a_model_that_diverges_in_training_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """Right without dropout, useless with it: only the training loss can tell."""

    class Zero(nn.Dropout):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * float("nan") if self.training else x

    def change(model: Any) -> nn.Module:
        model.bert.embeddings.dropout = Zero(0.1)
        return model

    ours = run(monkeypatch, change)["rivals"][1]
    assert ours["status"] == "wrong"
    assert "training loss nan" in ours["detail"]


def test_padding_is_masked_in_the_batch() -> None:
    batch = step.make_batch(CASE, CPU)
    assert torch.equal(batch["input_ids"] == 0, batch["attention_mask"] == 0)
    assert 0 < int(batch["attention_mask"].sum()) < batch["attention_mask"].numel()


def test_operations_of_a_step_are_counted() -> None:
    case = dataclasses.replace(cases.STEP[0], batch=2, length=4, layers=1, width=8, heads=2, rows=11)
    layer = 4 * 8 * 8 + 2 * 8 * 32  # query, key, value, output; up and down
    assert step.flops(step.make_model(case, CPU), case) == 6 * layer * 8 + 14 * 2 * 16 * 8
    assert step.flops(step.make_model(case, CPU), dataclasses.replace(case, precision="fp32")) == 0


def test_the_padding_free_model_computes_real_tokens_only() -> None:
    record: dict[str, Any] = {"name": CASE.name, "rivals": []}
    changes = step.StepRunner(CPU, 60, True).rivals(record)
    model = changes[step.FREE](step.make_model(CASE, CPU))
    assert "real tokens only" in record["padding_free_report"]
    seen: list[int] = []
    model.get_submodule("bert.encoder.layer.0").register_forward_hook(lambda _, __, out: seen.append(out.shape[1]))
    batch = step.make_batch(CASE, CPU)
    model(**batch)
    assert seen == [int(batch["attention_mask"].sum())]


def test_torch_compile_waits_until_every_case_has_stock_and_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    small = tuple(dataclasses.replace(case.tiny(), compiled=True) for case in cases.STEP)
    monkeypatch.setattr(cases, "STEP", small)
    order: list[tuple[str, str]] = []
    checked = step.StepRunner.checked

    def spy(self: step.StepRunner, name: str, model: nn.Module, batch: Any, case: Any, *rest: Any) -> Any:
        order.append((case.precision, name))
        return checked(self, name, model, batch, case, *rest)

    monkeypatch.setattr(step.StepRunner, "checked", spy)
    saved: list[dict[str, Any]] = []
    assert suites.run("step", CPU, 120, True, saved.append), saved[-1]["problems"]
    waves = [[step.STOCK, *step.PATCHED], [step.COMPILED]]
    assert order == [(case.precision, name) for wave in waves for case in small for name in wave]
    for case in saved[-1]["cases"]:
        assert [entry["status"] for entry in case["rivals"]] == ["ok"] * 4
        assert all(entry["passes"]["step"]["median_us"] > 0 for entry in case["rivals"])

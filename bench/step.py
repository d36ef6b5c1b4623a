"""One fine-tuning step of BERT: stock, compiled, patched with and without padding, of the same weights and batch.

Checked in evaluation mode (no dropout): the logits and two gradients against the stock model in float64, where the
stock model in the step's own precision sets the yardstick; then the first training loss against stock's. Timed in
training mode with dropout: forward, backward, AdamW.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import embedkernels as ek
from bench import cases, check
from bench.timing import Stopwatch, summary

STOCK = "stock"
OURS = "ours"
FREE = "ours, padding-free"
PATCHED = (OURS, FREE)
COMPILED = "stock, torch.compile"
BURST = 4  # steps per sample, so that the host may run ahead of the device as it does in training
# With dropout two implementations draw different masks: their first losses agree only this well.
LOSS_MARGIN = 0.1
GRADS = {
    "grad of word embeddings": "bert.embeddings.word_embeddings.weight",
    "grad of first query": "bert.encoder.layer.0.attention.self.query.weight",
}


def make_model(case: cases.StepCase, device: torch.device) -> nn.Module:
    """A stock BERT classifier with fixed random weights, attention by SDPA."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=case.rows,
        hidden_size=case.width,
        num_hidden_layers=case.layers,
        num_attention_heads=case.heads,
        intermediate_size=4 * case.width,
        max_position_embeddings=max(512, case.length),
        hidden_dropout_prob=case.dropout,
        attention_probs_dropout_prob=case.dropout,
        attn_implementation="sdpa",
    )
    return BertForSequenceClassification(config).to(device)


def make_batch(case: cases.StepCase, device: torch.device) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = cases.make_ids(case.batch * case.length, case.rows, "zipf", generator).view(case.batch, case.length)
    lengths = cases.make_lengths(case.batch, case.length, case.fill)
    mask = torch.arange(case.length)[None] < lengths[:, None]
    labels = torch.randint(0, 2, (case.batch,), generator=generator)
    batch = {"input_ids": ids * mask, "attention_mask": mask.long(), "labels": labels}
    return {name: t.to(device) for name, t in batch.items()}


class Wrong(Exception):
    """A model computes something else than the stock model."""


class StepRunner:
    """Runs the cases of ``cases.STEP``; see ``bench.suites.Runner``."""

    waves = (0, 1)  # stock and ours; torch.compile

    def __init__(self, device: torch.device, seconds: float, tiny: bool) -> None:
        self.device, self.tiny = device, tiny
        self.yardsticks: dict[str, dict[str, check.Errors]] = {}
        self.losses: dict[str, float] = {}  # of stock's first training steps
        self.deadline = time.monotonic() + seconds
        self.watch = Stopwatch(device, flush=False)

    def late(self) -> bool:
        return time.monotonic() > self.deadline

    def contestants(self, case: cases.StepCase, wave: int) -> list[dict[str, Any]]:
        """The rivals of a wave, as their entries begin."""
        from bench.suites import entry_of

        names = ([COMPILED] if case.compiled else []) if wave else [STOCK, *PATCHED]
        return [entry_of(name, name in PATCHED, name in PATCHED) for name in names]

    def autocast(self, case: cases.StepCase) -> contextlib.AbstractContextManager[Any]:
        if case.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def rivals(self, record: dict[str, Any]) -> dict[str, Callable[[nn.Module], nn.Module]]:
        """How each rival changes a copy of the stock model."""

        def patched(model: nn.Module) -> nn.Module:
            record["patch_report"] = str(ek.patch(model, strict=True))
            return model

        def padding_free(model: nn.Module) -> nn.Module:
            record["padding_free_report"] = str(ek.patch(model, padding_free=True, strict=True))
            return model

        def compiled(model: nn.Module) -> nn.Module:
            model.compile(dynamic=False, backend="aot_eager" if self.tiny else "inductor")
            return model

        return {STOCK: lambda model: model, OURS: patched, FREE: padding_free, COMPILED: compiled}

    def outcome(self, model: nn.Module, batch: dict[str, Tensor], case: cases.StepCase | None) -> dict[str, Tensor]:
        """Logits and gradients in evaluation mode."""
        model.eval()
        with self.autocast(case) if case is not None else contextlib.nullcontext():
            output = model(**batch)
        output.loss.backward()
        parameters = dict(model.named_parameters())
        found = {"logits": output.logits.detach()}
        for name, parameter in GRADS.items():
            grad = parameters[parameter].grad
            assert grad is not None
            found[name] = grad.clone()
        model.zero_grad(set_to_none=True)
        return found

    def stepper(self, model: nn.Module, batch: dict[str, Tensor], case: cases.StepCase) -> Callable[[], Tensor]:
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5, fused=self.device.type == "cuda")
        model.train()

        def steps() -> Tensor:
            for _ in range(BURST):
                with self.autocast(case):
                    loss = model(**batch).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            return loss.detach()

        return steps

    def run(self, case: cases.StepCase, record: dict[str, Any], wave: int) -> None:
        """Check one case's rivals of a wave and time them with those before; ``record`` has what is known at once."""
        from bench.suites import entry_of, not_reached, reason

        if wave and not case.compiled:
            return
        stock, batch = make_model(case, self.device), make_batch(case, self.device)
        expected = {} if wave else self.outcome(copy.deepcopy(stock).double(), batch, None)
        if self.late():
            not_reached(self, case, record, wave)
            return
        record["floors"] = {"step": {"bytes": 0, "flops": flops(stock, case)}}
        status = {entry["rival"]: entry["status"] for entry in record["rivals"]}
        ready: dict[str, Callable[[], Tensor]] = {}
        for name, change in self.rivals(record).items():
            if wave and status.get(name) == "ok":
                ready[name] = self.stepper(change(copy.deepcopy(stock)), batch, case)
            if (name == COMPILED) != bool(wave):
                continue
            entry = {**entry_of(name, name in PATCHED, name in PATCHED), "detail": ""}
            record["rivals"].append(entry)
            if self.late():
                entry.update(status="not run", detail="out of time")
                continue
            started = time.monotonic()
            try:
                ready[name] = self.checked(name, change(copy.deepcopy(stock)), batch, case, expected, entry)
                entry["status"] = "ok"
            except Wrong as error:
                entry.update(status="wrong", detail=str(error))
            except Exception as error:
                entry.update(status="refused", detail=reason(error))
            entry["seconds_to_ready"] = round(time.monotonic() - started, 2)
        if not wave or COMPILED in ready:
            self.timed(ready, record, case)
        ready.clear()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def checked(
        self,
        name: str,
        model: nn.Module,
        batch: dict[str, Tensor],
        case: cases.StepCase,
        expected: dict[str, Tensor],
        entry: dict[str, Any],
    ) -> Callable[[], Tensor]:
        """A rival's training steps, if its results are right. The stock model, which comes first, sets the yardstick.

        Raises:
            Wrong: they are not.
        """
        yardstick = self.yardsticks.setdefault(case.name, {})
        if name == COMPILED:
            # Its evaluation mode would be compiled as well, for as long again as its training mode.
            entry["detail"] = "checked by its training loss only"
        else:
            result = self.outcome(model, batch, case)
            if name == STOCK:
                yardstick.update(check.measure_yardstick(result, expected))
            elif not yardstick:
                raise RuntimeError("no yardstick: the stock model has no result")
            limit = check.OUR_LIMIT if name in PATCHED else check.RIVAL_LIMIT
            verdict = check.judge(result, expected, yardstick, limit)
            entry["error_ratios"] = verdict.ratios
            if not verdict.ok:
                raise Wrong(verdict.detail)
        steps = self.stepper(model, batch, case)
        loss = float(steps())
        stock = self.losses.setdefault(case.name, loss)
        if not abs(loss - stock) <= LOSS_MARGIN:
            raise Wrong(f"training loss {loss:.4f}, stock {stock:.4f}")
        return steps

    def timed(self, ready: dict[str, Callable[[], Tensor]], record: dict[str, Any], case: cases.StepCase) -> None:
        samples = self.watch.interleaved(ready, 0.0 if self.tiny else 1.5 * len(ready), 2 if self.tiny else 8, 30)
        for entry in record["rivals"]:
            if entry["rival"] in ready:
                times = summary([sample / BURST for sample in samples[entry["rival"]]])
                entry["passes"]["step"] = {
                    **times,
                    "samples_per_s": case.batch / times["median_us"] * 1e6,
                    "peak_bytes": self.watch.peak_bytes(ready[entry["rival"]]),
                }


def flops(model: nn.Module, case: cases.StepCase) -> float:
    """Operations of a step's matrix products, on every position of the batch, padding included; 0 for fp32.

    6 per weight of a linear layer and token (forward, gradient of the input, gradient of the weight), and seven
    products of S x S x width per layer for attention.
    """
    if case.precision == "fp32":
        return 0.0
    weights = sum(m.weight.numel() for n, m in model.named_modules() if isinstance(m, nn.Linear) and "encoder" in n)
    attention = 14.0 * case.layers * case.batch * case.length**2 * case.width
    return 6.0 * weights * case.batch * case.length + attention

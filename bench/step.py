"""One fine-tuning step of BERT: stock, compiled and patched, from the same random weights and the same batch.

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


class StepRunner:
    """Runs the cases of ``cases.STEP``; see ``bench.suites.Runner``."""

    def __init__(self, device: torch.device, seconds: float, tiny: bool) -> None:
        self.device, self.tiny = device, tiny
        self.deadline = time.monotonic() + seconds
        self.watch = Stopwatch(device, flush=False)

    def late(self) -> bool:
        return time.monotonic() > self.deadline

    def autocast(self, case: cases.StepCase) -> contextlib.AbstractContextManager[Any]:
        if case.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def rivals(self, case: cases.StepCase, record: dict[str, Any]) -> dict[str, Callable[[nn.Module], nn.Module]]:
        """How each rival changes a copy of the stock model."""

        def patched(model: nn.Module) -> nn.Module:
            record["patch_report"] = str(ek.patch(model, strict=True))
            return model

        def compiled(model: nn.Module) -> nn.Module:
            model.compile(dynamic=False, backend="aot_eager" if self.tiny else "inductor")
            return model

        found: dict[str, Callable[[nn.Module], nn.Module]] = {STOCK: lambda model: model, "ours": patched}
        if case.compiled:
            found[COMPILED] = compiled
        return found

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

    def run(self, case: cases.StepCase, record: dict[str, Any], save: Callable[[], None]) -> None:
        """Check and time one case. The slow-to-build rivals come last and the figures so far are saved before."""
        from bench.suites import reason

        stock, batch = make_model(case, self.device), make_batch(case, self.device)
        expected = self.outcome(copy.deepcopy(stock).double(), batch, None)
        record["floors"] = {"step": {"bytes": 0, "flops": flops(stock, case)}}
        yardstick: dict[str, check.Errors] = {}
        losses: list[float] = []
        ready: dict[str, Callable[[], Tensor]] = {}
        for name, change in self.rivals(case, record).items():
            ours = name == "ours"
            entry: dict[str, Any] = {"rival": name, "ours": ours, "required": ours, "passes": {}, "detail": ""}
            record["rivals"].append(entry)
            if self.late():
                entry.update(status="not run", detail="out of time")
                continue
            started = time.monotonic()
            try:
                model = change(copy.deepcopy(stock))
                wrong = ""
                if name == COMPILED:
                    # Its evaluation mode would be compiled as well, for as long again as its training mode.
                    entry["detail"] = "checked by its training loss only"
                else:
                    result = self.outcome(model, batch, case)
                    if name == STOCK:
                        yardstick.update(check.measure_yardstick(result, expected))
                    elif not yardstick:
                        raise RuntimeError(f"no yardstick: {record['rivals'][0]['detail']}")
                    limit = check.OUR_LIMIT if ours else check.RIVAL_LIMIT
                    verdict = check.judge(result, expected, yardstick, limit)
                    wrong, entry["error_ratios"] = verdict.detail, verdict.ratios
                if not wrong:
                    steps = self.stepper(model, batch, case)
                    losses.append(float(steps()))
                    if not abs(losses[-1] - losses[0]) <= LOSS_MARGIN:
                        wrong = f"training loss {losses[-1]:.4f}, stock {losses[0]:.4f}"
                if wrong:
                    entry.update(status="wrong", detail=wrong)
                else:
                    entry["status"] = "ok"
                    ready[name] = steps
            except Exception as error:
                entry.update(status="refused", detail=reason(error))
            entry["seconds_to_ready"] = round(time.monotonic() - started, 2)
            if ours:
                self.timed(ready, record, case)
                save()
        if any(entry["rival"] in ready and not entry["passes"] for entry in record["rivals"]):
            self.timed(ready, record, case)
        ready.clear()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

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

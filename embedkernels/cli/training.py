"""One fine-tuning run with the Hugging Face Trainer, stock or patched: load, evaluate, train, evaluate, save."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments, set_seed

from embedkernels.cli import encoding, environment, metrics, models
from embedkernels.cli.errors import CliError, UsageError, listed
from embedkernels.cli.examples import Data
from embedkernels.cli.measure import PeakMemory, StepMeter
from embedkernels.cli.settings import Settings
from embedkernels.cli.speed import throughput

Emit = Callable[[dict[str, Any]], None]
# From this share of unknown tokens on, a text's meaning is lost to the model.
MANY_UNKNOWN = 0.5


class _MeasuredTrainer(Trainer):
    """The Trainer as it is, with a meter that sees every batch's loss."""

    meter: StepMeter

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        samples = len(inputs["input_ids"])
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.meter.micro_batch(loss, samples)
        return loss


class _Progress(TrainerCallback):
    """Tells the meter and the screen where training is."""

    def __init__(self, meter: StepMeter, emit: Emit) -> None:
        self.meter = meter
        self.emit = emit

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        self.emit({"event": "steps", "total": state.max_steps})
        self.meter.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        self.meter.end_step(last=state.global_step >= state.max_steps)

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        self.emit({"event": "evaluated batch"})


def run(settings: Settings, data: Data, output: Path, *, patched: bool, emit: Emit) -> dict[str, Any]:
    """Fine-tune once.

    Args:
        settings: what to do.
        data: what to learn from, of ``examples.load``.
        output: directory that gets the model and its tokenizer, loadable by transformers alone.
        patched: whether ``embedkernels.patch`` is applied.
        emit: gets events for the screen, ``{"event": KIND, ...}`` with KIND one of ``phase`` (``name``, maybe
            ``batches``), ``notice`` (``text``), ``steps`` (``total``), ``step`` (``step``, ``loss``) and
            ``evaluated batch``.

    Returns:
        ``metrics``: what metrics.json says of this run. ``report``: the patch report as a dict, None for stock.
        ``environment``: versions, device, data.

    Raises:
        UsageError: an argument, or what it names, cannot be used.
        CliError: training failed.
    """

    def phase(name: str) -> None:
        emit({"event": "phase", "name": name})

    def notice(text: str) -> None:
        emit({"event": "notice", "text": text})

    phase("loading model")
    device = _device(settings)
    set_seed(settings.seed)
    config = models.load_config(settings)
    tokenizer = models.load_tokenizer(settings)
    labels = models.label_order(data.labels, config)
    model, notices = models.load_model(settings, config, tokenizer, labels)
    for text in notices:
        notice(text)
    # The report says where ops run, so the model must be there already.
    model.to(device)
    report = _patch(model, settings, notice) if patched else None

    phase("encoding")
    length, why = _length(settings, model)
    encoding.check_length(length, tokenizer, settings.task)
    encode = encoding.Encoder(tokenizer, settings.task, {name: i for i, name in enumerate(labels)}, length)
    train, longer = encode(data.train)
    evaluation, longer_too = encode(data.evaluation)
    encoding.check_not_empty(train, "--train", settings.task)
    encoding.check_not_empty(evaluation, "--eval", settings.task)
    empty = len(data.train) + len(data.evaluation) - len(train) - len(evaluation)
    if settings.task == "token-classification" and empty:
        notice(f"{empty} texts left out: their words give no tokens")
    unknown = encoding.unknown_share(train, tokenizer)
    if unknown > MANY_UNKNOWN:
        notice(
            f"{unknown:.0%} of the training texts' tokens are unknown to the tokenizer ({tokenizer.unk_token}): "
            "does it belong to the model, and the model to the language?"
        )
    if longer + longer_too:
        done = "continued in further sequences" if settings.task == "causal-lm" else "cut"
        total = len(data.train) + len(data.evaluation)
        notice(f"{longer + longer_too} of {total} texts are longer than {length} tokens ({why}): {done}")

    meter = StepMeter(device, lambda step, loss: emit({"event": "step", "step": step, "loss": loss}))
    trainer = _MeasuredTrainer(
        model=model,
        args=_arguments(settings, output, device),
        train_dataset=train,
        eval_dataset=evaluation,
        data_collator=encoding.Collator(tokenizer),
        compute_metrics=metrics.compute(settings.task, labels),
        preprocess_logits_for_metrics=metrics.reduce_logits(settings.task),
        callbacks=[_Progress(meter, emit)],
    )
    trainer.meter = meter
    if settings.task == "classification":
        # Their loss is the mean over a batch, whatever it is told of the other batches of a step: taken at its word,
        # the Trainer would add the batches of a step up instead of averaging them.
        trainer.model_accepts_loss_kwargs = False
    trainer.remove_callback(PrinterCallback)

    def evaluate(name: str) -> dict[str, float]:
        batches = math.ceil(len(evaluation) / settings.eval_batch_size)
        emit({"event": "phase", "name": name, "batches": batches})
        found = {key.removeprefix("eval_"): value for key, value in trainer.evaluate().items()}
        # The Trainer averages over batches; per token it is what the perplexity is of.
        return {**found, "loss": found.get("token_loss", found["loss"])}

    before = evaluate("evaluating before")
    phase("training")
    # What ran before must not decide which dropout masks come now.
    set_seed(settings.seed)
    memory = PeakMemory(device)
    memory.start()
    started = time.perf_counter()
    trainer.train()
    seconds = meter.seconds()
    elapsed = time.perf_counter() - started
    peak, basis = memory.read()
    losses = meter.losses()
    _check_finite(losses)
    after = evaluate("evaluating after")
    _check_model(model, after["loss"])

    phase("saving")
    try:
        _save(model, tokenizer, output)
    except (OSError, SafetensorError) as error:
        raise CliError(
            f"--output: the model cannot be saved in {output}: {error}", "Free space, or name another directory."
        ) from error
    kept = ("accuracy", "loss", "precision", "recall", "f1", "perplexity")
    figures: dict[str, Any] = {"eval_loss" if key == "loss" else key: after[key] for key in kept if key in after}
    figures |= {f"{'eval_loss' if key == 'loss' else key}_before": before[key] for key in kept if key in before}
    figures |= throughput(seconds, meter.samples)
    figures |= {
        "peak_memory_bytes": peak,
        "peak_memory_basis": basis,
        "loss": losses,
        "steps": len(losses),
        "train_seconds": elapsed,
        "step_seconds": seconds,
        "step_samples": meter.samples,
    }
    return {
        "metrics": figures,
        "report": None if report is None else report.to_dict(),
        "environment": {
            **environment.describe(device),
            "data": {**data.origin, "sequences": len(train), "labels": list(labels), "max_length": length},
            "settings": settings.to_dict(),
        },
    }


def _device(settings: Settings) -> torch.device:
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    name = settings.device
    if name == "auto":
        name = "cuda" if cuda else "mps" if mps else "cpu"
    if (name == "cuda" and not cuda) or (name == "mps" and not mps):
        raise UsageError(
            f"--device: torch {torch.__version__} can use no {name} device here",
            "`embedkernels doctor` says why; --device cpu works everywhere.",
        )
    if settings.precision == "fp16" and name == "cpu":
        raise UsageError("--precision: fp16 needs a GPU", "Use bf16 or fp32.")
    if settings.precision == "bf16" and name == "cuda" and not torch.cuda.is_bf16_supported(False):
        raise UsageError(f"--precision: {torch.cuda.get_device_name(0)} has no bf16", "Use fp16 or fp32.")
    return torch.device(name, 0) if name == "cuda" else torch.device(name)


def _patch(model: Any, settings: Settings, notice: Callable[[str], None]) -> Any:
    from embedkernels.hf import patch

    if settings.padding_free and settings.torch_compile:
        notice("--torch-compile: a graph cannot depend on how many tokens are real, so padding is computed too")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        report = patch(model, padding_free=settings.padding_free and not settings.torch_compile)
    for warning in caught:
        notice(str(warning.message))
    return report


def _length(settings: Settings, model: Any) -> tuple[int, str]:
    """The longest sequence, and what bounds it."""
    limit = models.position_limit(model)
    asked = settings.max_length
    if limit is not None and limit < (asked or encoding.DEFAULT_LENGTH):
        return limit, "as many as the model has positions for" + (f", not --max-length {asked}" if asked else "")
    return (asked, "--max-length") if asked else (encoding.DEFAULT_LENGTH, "the default of --max-length")


def _arguments(settings: Settings, output: Path, device: torch.device) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(output),
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps or -1,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.eval_batch_size,
        gradient_accumulation_steps=settings.accumulate,
        learning_rate=settings.lr,
        weight_decay=settings.weight_decay,
        warmup_steps=settings.warmup,
        bf16=settings.precision == "bf16",
        fp16=settings.precision == "fp16",
        use_cpu=device.type == "cpu",
        seed=settings.seed,
        data_seed=settings.seed,
        gradient_checkpointing=settings.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if settings.gradient_checkpointing else None,
        torch_compile=settings.torch_compile,
        dataloader_pin_memory=device.type == "cuda",
        remove_unused_columns=False,
        label_names=["labels"],
        eval_strategy="no",
        save_strategy="no",
        logging_strategy="no",
        # The filter reads every loss, which waits for the device.
        logging_nan_inf_filter=False,
        report_to=[],
        disable_tqdm=True,
    )


def _check_finite(losses: list[float]) -> None:
    first = next((step for step, loss in enumerate(losses, 1) if not math.isfinite(loss)), None)
    if first is not None:
        raise _diverged(f"the loss of step {first} of {len(losses)} is {losses[first - 1]}")


def _check_model(model: Any, loss: float) -> None:
    """CliError for a model that the last step broke, which no training loss has seen."""
    broken = [name for name, weight in model.named_parameters() if not torch.isfinite(weight).all()]
    if broken:
        raise _diverged(f"{listed(broken, 3)} of the trained model are not finite")
    if not math.isfinite(loss):
        raise _diverged(f"the evaluation loss of the trained model is {loss}")


def _diverged(how: str) -> CliError:
    return CliError(
        f"training diverged: {how}",
        "Lower --lr, raise --warmup, or use --precision fp32 or bf16. No model was saved.",
    )


def _save(model: Any, tokenizer: Any, output: Path) -> None:
    """The model as a patched model saves itself: stock class names, stock parameter names."""
    # The Trainer turns the cache off for training; a saved decoder generates with it.
    if getattr(model.config, "use_cache", None) is False and models.has_cache(model):
        model.config.use_cache = True
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)

"""The commands and their options."""

from __future__ import annotations

import contextlib
import json
import signal
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

import embedkernels
from embedkernels.cli.errors import CliError, UsageError
from embedkernels.cli.settings import DEVICES, PRECISIONS, TASKS, Settings

app = typer.Typer(
    name="embedkernels",
    help="Fine-tune Hugging Face text models with fused embeddings and attention.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

DATA = "Data"
TRAINING = "Training"
MACHINE = "Machine"


@contextlib.contextmanager
def told(*, debug: bool) -> Iterator[None]:
    """Turn errors into a message, a remedy and an exit code; the traceback is shown with ``debug`` only."""
    try:
        with _terminable():
            yield
    except Exception as error:
        console = Console(stderr=True)
        if debug:
            details = getattr(error, "details", None) or "".join(traceback.format_exception(error))
            console.print(details.rstrip(), style="dim", markup=False, highlight=False, soft_wrap=True)
        if isinstance(error, CliError):
            message, remedy, code = error.message, error.remedy, error.exit_code
        else:
            message, code = f"{type(error).__name__}: {error}", CliError.exit_code
            remedy = "" if debug else "Run again with --debug for the traceback."
        console.print(f"[bold red]error[/bold red] {escape(message)}", highlight=False, soft_wrap=True)
        if remedy:
            console.print(f"  {escape(remedy)}", highlight=False, soft_wrap=True)
        raise SystemExit(code) from None
    except KeyboardInterrupt:
        Console(stderr=True).print("interrupted")
        raise SystemExit(130) from None


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends the command in good order, as Ctrl-C does: a run's process is ended and --output let go."""

    def end(number: int, frame: Any) -> None:  # noqa: ARG001
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():  # no other may set handlers
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"embedkernels {embedkernels.__version__}")
        raise typer.Exit


@app.callback()
def _top(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Fine-tune Hugging Face text models with fused embeddings and attention."""


@app.command()
def finetune(
    model: Annotated[str, typer.Option(help="Directory of a model, or its id on the hub.", rich_help_panel=DATA)],
    train: Annotated[
        str,
        typer.Option(
            help="Rows to learn from: .csv .tsv .jsonl .json .parquet .txt (also .gz), or a data set "
            "NAME, NAME:SPLIT or NAME:CONFIG:SPLIT of the datasets package.",
            rich_help_panel=DATA,
        ),
    ],
    evaluation: Annotated[
        str | None,
        typer.Option("--eval", help="Rows to evaluate on, before and after training.", rich_help_panel=DATA),
    ] = None,
    eval_fraction: Annotated[
        float, typer.Option(help="Share of the rows held back where there is no --eval.", rich_help_panel=DATA)
    ] = Settings.eval_fraction,
    task: Annotated[
        str, typer.Option(metavar="|".join(TASKS), help="What to learn.", rich_help_panel=DATA)
    ] = Settings.task,
    text: Annotated[
        str | None,
        typer.Option(help="Column with the text; 'text', or 'tokens' for words.", rich_help_panel=DATA),
    ] = None,
    label: Annotated[
        str | None,
        typer.Option(help="Column with the class; 'label', or 'tags' for one tag per word.", rich_help_panel=DATA),
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Directory or id of the tokenizer; the model's own.", rich_help_panel=DATA)
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option(min=1, help="Longest text in tokens; what the model takes, at most 512.", rich_help_panel=DATA),
    ] = None,
    output: Annotated[
        Path, typer.Option(help="Directory for the model, metrics.json and the picture.", rich_help_panel=DATA)
    ] = Path("runs/finetune"),
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier run in --output.", rich_help_panel=DATA)
    ] = False,
    stock: Annotated[
        bool, typer.Option("--stock", help="Leave the model as transformers has it.", rich_help_panel=TRAINING)
    ] = False,
    compare: Annotated[
        bool,
        typer.Option("--compare", help="First stock, then patched, side by side.", rich_help_panel=TRAINING),
    ] = False,
    epochs: Annotated[float, typer.Option(help="Passes over the rows.", rich_help_panel=TRAINING)] = Settings.epochs,
    max_steps: Annotated[
        int | None, typer.Option(min=1, help="Steps in all, instead of --epochs.", rich_help_panel=TRAINING)
    ] = None,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Examples per forward and backward.", rich_help_panel=TRAINING)
    ] = Settings.batch_size,
    eval_batch_size: Annotated[
        int, typer.Option(min=1, help="Examples per forward in evaluation.", rich_help_panel=TRAINING)
    ] = Settings.eval_batch_size,
    accumulate: Annotated[
        int, typer.Option(min=1, help="Batches per optimizer step.", rich_help_panel=TRAINING)
    ] = Settings.accumulate,
    lr: Annotated[
        float, typer.Option(help="Highest learning rate; it falls linearly to 0.", rich_help_panel=TRAINING)
    ] = Settings.lr,
    weight_decay: Annotated[
        float, typer.Option(help="AdamW's weight decay.", rich_help_panel=TRAINING)
    ] = Settings.weight_decay,
    warmup: Annotated[
        float,
        typer.Option(help="Steps until the highest rate; below 1: their share.", rich_help_panel=TRAINING),
    ] = Settings.warmup,
    dropout: Annotated[
        float | None,
        typer.Option(help="Replaces every dropout of the model's configuration.", rich_help_panel=TRAINING),
    ] = None,
    seed: Annotated[
        int, typer.Option(help="Decides the order of rows, new weights and dropout.", rich_help_panel=TRAINING)
    ] = Settings.seed,
    precision: Annotated[
        str, typer.Option(metavar="|".join(PRECISIONS), help="What to compute in.", rich_help_panel=MACHINE)
    ] = Settings.precision,
    device: Annotated[
        str, typer.Option(metavar="|".join(DEVICES), help="Where to compute.", rich_help_panel=MACHINE)
    ] = Settings.device,
    gradient_checkpointing: Annotated[
        bool,
        typer.Option("--gradient-checkpointing", help="Less memory, more time.", rich_help_panel=MACHINE),
    ] = False,
    torch_compile: Annotated[
        bool, typer.Option("--torch-compile", help="Compile the model with torch.compile.", rich_help_panel=MACHINE)
    ] = False,
    padding_free: Annotated[
        bool,
        typer.Option(
            "--padding-free/--no-padding-free",
            help="The patched model computes on real tokens only, where that is exact.",
            rich_help_panel=MACHINE,
        ),
    ] = Settings.padding_free,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error.", rich_help_panel=MACHINE)
    ] = False,
) -> None:
    """Fine-tune a model on your own labelled text with the Hugging Face Trainer.

    The model's embeddings and attention are fused by embedkernels, and padding is not computed; --stock leaves it as
    it is, --compare does both. What is
    saved in --output loads with transformers alone. Exit code: 0 done, 1 failed, 2 an argument or its file is wrong.

    Example: embedkernels finetune --model bert-base-uncased --train reviews.csv --label sentiment
    """
    with told(debug=debug):
        if stock and compare:
            raise UsageError("--stock: --compare runs the stock model too", "Leave one of them out.")
        settings = Settings(
            model=model,
            train=train,
            evaluation=evaluation,
            eval_fraction=eval_fraction,
            tokenizer=tokenizer,
            task=task,
            text=text,
            label=label,
            epochs=epochs,
            max_steps=max_steps,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            accumulate=accumulate,
            lr=lr,
            weight_decay=weight_decay,
            warmup=warmup,
            max_length=max_length,
            precision=precision,
            device=device,
            seed=seed,
            dropout=dropout,
            gradient_checkpointing=gradient_checkpointing,
            torch_compile=torch_compile,
            padding_free=padding_free,
        )
        from embedkernels.cli import finetune as command

        runs = ("stock", "patched") if compare else ("stock",) if stock else ("patched",)
        command.finetune(settings, output, runs, command.make_console(), overwrite=overwrite)


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Show what this machine has, and which path each op takes on it and why."""
    with told(debug=debug):
        from embedkernels.cli import doctor as command
        from embedkernels.cli.finetune import make_console

        found = command.examine()
        if as_json:
            typer.echo(json.dumps(found, indent=1))
        else:
            command.render(found, make_console())


def run() -> None:
    """Run the command line; exits."""
    app()

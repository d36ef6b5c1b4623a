"""The process of one run: reads a job from standard input, writes events to standard output, one JSON each line.

A process of its own makes a run's peak memory its own, and a crash an error message of the command.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from embedkernels.cli import examples, models
from embedkernels.cli.errors import CliError, UsageError, out_of_memory
from embedkernels.cli.settings import Settings


def main() -> None:
    """Run the job; the last event is ``result`` or ``error``."""
    # Whatever libraries print belongs to the log, not between the events.
    events = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def emit(event: dict[str, Any]) -> None:
        events.write(json.dumps(event) + "\n")
        events.flush()

    job = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_the_command, daemon=True).start()
    # One device: the Trainer would otherwise spread over all of them, with torch.nn.DataParallel.
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        emit({"event": "result", **execute(job, emit)})
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        emit(describe(error))
        sys.exit(1)


def _end_with_the_command() -> None:
    """End this process when the command's is gone: it holds the other end of standard input open while it lives.

    Also where it was killed and could end nobody. The descriptor is read, not ``sys.stdin``, whose lock would be held
    when the interpreter ends.
    """
    while os.read(0, 4096):
        pass
    os._exit(1)


def execute(job: dict[str, Any], emit: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Do a job: ``settings``, ``output`` and ``patched`` of ``training.run``.

    What is wrong with paths and data is said before the heavy imports.

    Raises:
        CliError: as ``training.run``, and if a package is missing.
    """
    settings = Settings(**job["settings"])
    emit({"event": "phase", "name": "reading data"})
    models.check_name("--model", settings.model, "config.json")
    if settings.tokenizer is not None:
        models.check_name("--tokenizer", settings.tokenizer)
    data = examples.load(settings)
    for text in data.notices:
        emit({"event": "notice", "text": text})
    emit({"event": "phase", "name": "loading torch and transformers"})
    try:
        import transformers

        from embedkernels.cli import training
    except ImportError as error:
        raise CliError(
            f"fine-tuning needs a package that does not import: {error}", 'pip install "embedkernels[cli]"'
        ) from error
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return training.run(settings, data, Path(job["output"]), patched=job["patched"], emit=emit)


def describe(error: Exception) -> dict[str, Any]:
    """An error as an event: what a person needs, and the traceback for ``--debug``."""
    if isinstance(error, CliError):
        message, remedy, usage = error.message, error.remedy, isinstance(error, UsageError)
    elif out_of_memory(error):
        message, usage = "out of memory", False
        remedy = "Lower --batch-size or --max-length, or use --gradient-checkpointing or --precision bf16."
    else:
        # Not foreseen: the kind of error is all there is to say.
        first = (str(error).strip() or "no message").splitlines()[0]
        message, remedy, usage = (
            f"{type(error).__name__}: {first}",
            "Run again with --debug for the traceback.",
            False,
        )
    text = "".join(traceback.format_exception(error))
    return {"event": "error", "message": message, "remedy": remedy, "usage": usage, "traceback": text}

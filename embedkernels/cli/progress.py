"""What a person sees while runs go on: a progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

# Elsewhere than on a terminal, training says where it is this often.
SECONDS_BETWEEN_LINES = 15.0


class RunProgress:
    """Shows the events of runs.

    Args:
        console: where to.
        named: whether lines start with the run's name, as where there are several.

    Use as a context manager; :meth:`show` takes the events.
    """

    def __init__(self, console: Console, *, named: bool) -> None:
        self.console = console
        self.named = named
        self._bar = Progress(
            TextColumn("{task.description:<28}"),
            BarColumn(),
            # Also for phases of unknown length, as reading data: it shows 0/?.
            MofNCompleteColumn(),
            TextColumn("{task.fields[loss]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task: TaskID | None = None
        self._total = 0
        self._done = 0
        self._line_at = 0.0
        self._said: set[str] = set()

    def __enter__(self) -> RunProgress:
        self._bar.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.__exit__(kind, error, trace)

    def show(self, run: str, event: dict[str, Any]) -> None:
        """Show one event of ``run``."""
        name = f"{run}: " if self.named else ""
        kind = event["event"]
        if kind == "notice":
            # The second run reads the same data and would say the same.
            if event["text"] not in self._said:
                self._said.add(event["text"])
                self.console.print(f"[yellow]note[/yellow] {escape(event['text'])}", highlight=False, soft_wrap=True)
        elif kind == "phase":
            self._begin(name + event["name"], event.get("batches"))
        elif kind == "steps":
            self._begin(f"{name}training", event["total"])
        elif kind == "evaluated batch":
            self._advance(self._done + 1)
        elif kind == "step":
            self._advance(event["step"], f"loss {event['loss']:.4f}", name)

    def _begin(self, title: str, total: int | None) -> None:
        if self._task is not None:
            self._bar.remove_task(self._task)
        self._task = self._bar.add_task(title, total=total, loss="")
        self._total, self._done = total or 0, 0
        self._line_at = time.monotonic()
        if not self.console.is_terminal and (total or "train" not in title):
            self.console.print(title, markup=False, highlight=False)

    def _advance(self, done: int, loss: str = "", name: str = "") -> None:
        self._done = done
        if self._task is not None:
            self._bar.update(self._task, completed=done, loss=loss)
        now = time.monotonic()
        if not self.console.is_terminal and loss and (now - self._line_at >= SECONDS_BETWEEN_LINES):
            self._line_at = now
            self.console.print(f"{name}step {done}/{self._total}  {loss}", markup=False, highlight=False)

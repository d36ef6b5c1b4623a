"""What goes wrong in a command, said so that a person can act on it."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable
from pathlib import Path


class CliError(Exception):
    """Something failed while the command ran: exit code 1.

    Args:
        message: what is wrong; it starts with the argument where one is at fault.
        remedy: what to do about it; may be empty.
    """

    exit_code = 1

    def __init__(self, message: str, remedy: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy


class UsageError(CliError):
    """An argument, or what it names, cannot be used: exit code 2."""

    exit_code = 2


def out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, of a GPU or of the host, whatever library says so and however."""
    text = str(error).lower()
    # Of torch on a GPU; of its CPU allocator on Linux and on Windows; of C++ libraries.
    said = ("out of memory", "can't allocate memory", "cannot allocate memory", "not enough memory", "bad_alloc")
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, (RuntimeError, OSError)) and any(part in text for part in said))
    )


def siblings(path: Path) -> list[str]:
    """The names beside ``path``, for :func:`did_you_mean`; none where its directory cannot be read."""
    try:
        return sorted(os.listdir(path.parent))
    except OSError:
        return []


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """``" Did you mean 'x'?"`` for the closest of ``known``, or nothing."""
    by_lower = {name.lower(): name for name in known}
    close = difflib.get_close_matches(word.lower(), by_lower, n=1)
    return f" Did you mean {by_lower[close[0]]!r}?" if close else ""


def listed(names: Iterable[object], limit: int = 12) -> str:
    """Names separated by commas, cut after ``limit``."""
    words = [str(name) for name in names]
    if len(words) > limit:
        words = [*words[:limit], f"and {len(words) - limit} more"]
    return ", ".join(words)

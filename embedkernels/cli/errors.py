"""What goes wrong in a command, said so that a person can act on it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


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

"""A lock file that one process at a time holds, and that the system releases when the process is gone."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

if sys.platform == "win32":
    import msvcrt

    def _take(descriptor: int) -> None:
        # Far behind the process id, which others read: on Windows what is locked cannot be read.
        os.lseek(descriptor, 1 << 20, os.SEEK_SET)
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        os.lseek(descriptor, 0, os.SEEK_SET)
else:
    import fcntl

    def _take(descriptor: int) -> None:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


class Held(Exception):
    """Another process holds the lock; ``pid`` is its id, or empty if it cannot be read."""

    def __init__(self, pid: str) -> None:
        super().__init__(f"held by process {pid}")
        self.pid = pid


@contextlib.contextmanager
def lock(path: Path) -> Iterator[None]:
    """Hold the lock ``path``, and remove it at the end.

    A file that a killed process left is no lock: what counts is the system's lock on it, which ends with its process.

    Raises:
        Held: another process has it.
        OSError: the file cannot be written.
    """
    descriptor = _open(path)
    try:
        os.write(descriptor, f"{os.getpid()}\n".encode())
        yield
    finally:
        # Removed before it is released where the system allows that: who waits for the name finds it gone or held.
        with contextlib.suppress(OSError):
            path.unlink()
        os.close(descriptor)
        if sys.platform == "win32":
            with contextlib.suppress(OSError):
                path.unlink()


def _open(path: Path) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            try:
                _take(descriptor)
            except (BlockingIOError, PermissionError):
                raise Held(_pid(path)) from None
            except OSError:
                pass  # a file system without locks: there is none to hold, and that is no reason to refuse a run
            # The holder before may have removed the file between the two lines above: then nobody sees this lock.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), path.stat()):
                    os.ftruncate(descriptor, 0)
                    return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _pid(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return ""

"""The entry point ``embedkernels``: says what to install where the command line's own packages are missing."""

from __future__ import annotations

import importlib
import sys

_NEEDED = ("typer", "rich")


def main() -> None:
    """Run the command line and exit: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    for name in _NEEDED:
        try:
            importlib.import_module(name)
        except ImportError as error:
            print(
                f"error: the embedkernels command needs {name}, which does not import ({error})\n"
                '  pip install "embedkernels[cli]"',
                file=sys.stderr,
            )
            raise SystemExit(1) from None
    from embedkernels.cli.app import run

    run()


if __name__ == "__main__":
    main()

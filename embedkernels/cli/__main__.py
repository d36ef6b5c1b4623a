"""``python -m embedkernels.cli``: the command ``embedkernels``."""

from embedkernels.cli.main import main

main()

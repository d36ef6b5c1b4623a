"""``python -m embedkernels``: the command ``embedkernels``."""

from embedkernels.cli.main import main

main()

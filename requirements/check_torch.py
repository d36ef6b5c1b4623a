"""Fails where there are GPUs (the argument, like ``80,90``) and a torch without CUDA."""

import importlib.util
import runpy
import sys
from pathlib import Path

gpus = sys.argv[1]
# Without importing torch, which takes seconds and complains about packages that are not here yet.
spec = importlib.util.find_spec("torch")
version = runpy.run_path(str(Path(spec.origin).parent / "version.py")) if spec and spec.origin else {}
if gpus and not version.get("cuda"):
    sys.exit(
        f"error: this machine has a GPU (compute capability {gpus}), but pip installed torch "
        f"{version.get('__version__')}, which was built without CUDA; name a build that has it (TORCH_SPEC=...), or "
        "leave the GPU alone (GPUS=)"
    )

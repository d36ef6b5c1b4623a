"""Fails where there are GPUs (the argument, like ``80,90``) and a torch without CUDA."""

import sys

import torch

gpus = sys.argv[1]
if gpus and not torch.version.cuda:
    sys.exit(
        f"error: this machine has a GPU (compute capability {gpus}), but pip installed torch {torch.__version__}, "
        "which was built without CUDA; name a build that has it (TORCH_SPEC=...), or leave the GPU alone (GPUS=)"
    )

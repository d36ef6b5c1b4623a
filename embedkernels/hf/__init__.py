"""Hugging Face: one table of adapters, patch and unpatch, report, attention interface.

Importing this package registers the attention implementation ``"embedkernels"`` with transformers.
"""

try:
    import transformers
except ImportError as error:
    raise ImportError("embedkernels.hf needs transformers >= 5.17: pip install 'embedkernels[hf]'") from error

if tuple(int(part) for part in transformers.__version__.split(".")[:2]) < (5, 17):
    raise ImportError(
        f"embedkernels.hf needs transformers >= 5.17, found {transformers.__version__}: "
        "pip install 'embedkernels[hf]'"
    )

from embedkernels.hf.attention import NAME as ATTENTION
from embedkernels.hf.callback import EmbedKernelsCallback
from embedkernels.hf.collator import PackingCollator
from embedkernels.hf.patch import describe, patch, unpatch
from embedkernels.hf.report import Entry, OpChoice, PatchReport

__all__ = [
    "ATTENTION",
    "EmbedKernelsCallback",
    "Entry",
    "OpChoice",
    "PackingCollator",
    "PatchReport",
    "describe",
    "patch",
    "unpatch",
]

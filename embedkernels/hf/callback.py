"""Patching as a callback of transformers' Trainer."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainerCallback

from embedkernels.hf.patch import patch
from embedkernels.hf.report import PatchReport


class EmbedKernelsCallback(TrainerCallback):
    """Patches the Trainer's model: once there is one, and again if ``model_init`` has made another for training.

    Args:
        **options: those of :func:`embedkernels.patch`.

    Attributes:
        report: what the last patch did, None before.

    Example:
        >>> import embedkernels as ek
        >>> callback = ek.hf.EmbedKernelsCallback(padding_free=True)  # Trainer(..., callbacks=[callback])
        >>> callback.report is None
        True
    """

    def __init__(self, **options: Any) -> None:
        self.options = options
        self.report: PatchReport | None = None
        self._patched: nn.Module | None = None

    def _patch(self, model: nn.Module | None) -> None:
        if model is not None and model is not self._patched:
            self.report = patch(model, **self.options)
            self._patched = model

    def on_init_end(
        self,
        args: Any,  # noqa: ARG002
        state: Any,  # noqa: ARG002
        control: Any,  # noqa: ARG002
        model: Any = None,
        **kwargs: Any,  # noqa: ARG002
    ) -> None:
        """Before anything is evaluated or trained."""
        self._patch(model)

    # A model that ``model_init`` has made for this training.
    on_train_begin = on_init_end

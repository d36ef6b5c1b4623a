"""``nn.Embedding`` with checked ids and a deterministic, fp32-accumulated gradient."""

from __future__ import annotations

from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import Parameter

from embedkernels.ops.backend import makes_a_program, needs_stock_autograd
from embedkernels.ops.embedding import embedding
from embedkernels.ops.embedding_grad import DTYPES, Mode

_PLAIN = (Tensor, Parameter)


class FusedEmbedding(nn.Embedding):
    """An ``nn.Embedding`` in every respect, whose lookup and gradient run on embedkernels' ops.

    Constructor, ``from_pretrained``, initialisation, parameters, ``state_dict`` and ``isinstance`` are those of
    ``nn.Embedding``. The gradient of the table is added in fp32 whatever its dtype, with the same bits in every run.
    An id out of range raises an IndexError that names it (see :func:`embedkernels.embedding`).

    ``max_norm`` runs the stock forward as it is, which ``fused`` tells. So do weights that are no plain
    floating-point tensor (a DTensor, a quantised tensor), nested tensors of ids, the transforms of ``torch.func``,
    forward-mode AD, ``torch.jit`` and ``torch.export``.

    Args:
        num_embeddings: V, rows of the table.
        embedding_dim: D, their size.
        padding_idx: row that gets no gradient and starts as zeros; negative values count from the end.
        max_norm, norm_type, scale_grad_by_freq, sparse: as in ``nn.Embedding``.
        _weight, _freeze, device, dtype: as in ``nn.Embedding``.
        grad_mode: ``"dense"``, ``"accumulate"`` or ``"rows"``: what the table's gradient is, see
            :func:`embedkernels.embedding`. ``"rows"`` is ``sparse=True``. None: ``"rows"`` if ``sparse``, else
            ``"dense"``. May be changed at any time.

    Shape:
        - input: any shape, int32 or int64.
        - output: (*input.shape, D), the weight's dtype.

    Raises:
        ValueError: an unknown grad_mode, or one that contradicts ``sparse=True``.

    Example:
        >>> import torch, embedkernels as ek
        >>> table = ek.FusedEmbedding(10, 4, padding_idx=0)
        >>> table(torch.tensor([[1, 2, 0]])).shape
        torch.Size([1, 3, 4])
    """

    __jit_unused_properties__ = ("fused", "grad_mode")

    def __init__(self, *args: Any, grad_mode: Mode | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if grad_mode is not None:
            if self.sparse and grad_mode in ("dense", "accumulate"):
                raise ValueError(f"FusedEmbedding: sparse=True has gradients of rows, got grad_mode {grad_mode!r}")
            self.grad_mode = grad_mode

    @property
    def grad_mode(self) -> Mode:
        """What the gradient of the table is: ``"dense"``, ``"accumulate"`` or ``"rows"``."""
        return "rows" if self.sparse else "accumulate" if self.__dict__.get("_accumulates", False) else "dense"

    @grad_mode.setter
    def grad_mode(self, mode: Mode) -> None:
        if mode not in get_args(Mode):
            raise ValueError(f"FusedEmbedding: grad_mode must be dense, accumulate or rows, got {mode!r}")
        # DistributedDataParallel and the optimizers go by ``sparse``.
        self.sparse = mode == "rows"
        self._accumulates = mode == "accumulate"

    @property
    def fused(self) -> bool:
        """Whether the options of this module are covered by the fused op; where not, the stock forward runs."""
        return self.max_norm is None

    @torch.jit.unused
    def stock_reason(self, input: Tensor | None = None) -> str | None:
        """Why a forward (of ``input``, if given) would now be the stock one, or None if it would be the fused one."""
        if not self.fused:
            return "it uses max_norm"
        weight = self.weight
        # Subclasses of Tensor bring their own implementation of F.embedding, and none of our op.
        if type(weight) not in _PLAIN:
            return f"its weight is a {type(weight).__name__}, not a plain parameter"
        if weight.dtype not in DTYPES:
            return f"its weight is of {weight.dtype}"
        if input is not None and input.is_nested:
            return "its ids are a nested tensor"
        if needs_stock_autograd(weight):
            return "torch.func or forward-mode AD differentiates it: the fused op has a backward formula only"
        if makes_a_program():
            return "torch.jit or torch.export traces: what it makes should run without embedkernels"
        return None

    def forward(self, input: Tensor) -> Tensor:
        """Rows of the table at ``input``."""
        if not torch.jit.is_scripting():  # type: ignore[attr-defined]
            return self._looked_up(input)
        return F.embedding(
            input,
            self.weight,
            self.padding_idx,
            self.max_norm,
            self.norm_type,
            self.scale_grad_by_freq,
            self.sparse,
        )

    @torch.jit.unused
    def _looked_up(self, input: Tensor) -> Tensor:
        if self.stock_reason(input) is not None:
            return super().forward(input)
        return embedding(
            input,
            self.weight,
            padding_idx=self.padding_idx,
            scale_grad_by_freq=self.scale_grad_by_freq,
            grad_mode=self.grad_mode,
        )

    def extra_repr(self) -> str:
        """As in ``nn.Embedding``, with what differs from it."""
        shown = super().extra_repr()
        if self.grad_mode == "accumulate":
            shown += ", grad_mode=accumulate"
        return shown + ("" if self.fused else ", fused=False")

"""``nn.Embedding`` with checked ids and a deterministic, fp32-accumulated gradient."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.parameter import Parameter

from embedkernels.ops.backend import makes_a_program, needs_stock_autograd
from embedkernels.ops.embedding import embedding
from embedkernels.ops.embedding_grad import DTYPES


class FusedEmbedding(nn.Embedding):
    """An ``nn.Embedding`` in every respect, whose lookup and gradient run on embedkernels' ops.

    Constructor, ``from_pretrained``, initialisation, parameters, ``state_dict`` and ``isinstance`` are those of
    ``nn.Embedding``. The gradient of the table is added in fp32 whatever its dtype, with the same bits in every run.
    An id out of range raises an IndexError that names it (see :func:`embedkernels.embedding`).

    ``max_norm``, ``scale_grad_by_freq`` and ``sparse`` run the stock forward as it is, which ``fused`` tells.
    So do weights that are no plain floating-point tensor (a DTensor, a quantised tensor), the transforms of
    ``torch.func``, forward-mode AD and ``torch.jit.trace``.

    Args:
        num_embeddings: V, rows of the table.
        embedding_dim: D, their size.
        padding_idx: row that gets no gradient and starts as zeros; negative values count from the end.
        max_norm, norm_type, scale_grad_by_freq, sparse: as in ``nn.Embedding``.
        _weight, _freeze, device, dtype: as in ``nn.Embedding``.

    Shape:
        - input: any shape, int32 or int64.
        - output: (*input.shape, D), the weight's dtype.

    Example:
        >>> import torch, embedkernels as ek
        >>> table = ek.FusedEmbedding(10, 4, padding_idx=0)
        >>> table(torch.tensor([[1, 2, 0]])).shape
        torch.Size([1, 3, 4])
    """

    @property
    def fused(self) -> bool:
        """Whether the options of this module are covered by the fused op; where not, the stock forward runs."""
        return self.max_norm is None and not self.scale_grad_by_freq and not self.sparse

    def stock_reason(self) -> str | None:
        """Why a forward would now be the stock one, or None if it would be the fused one."""
        if not self.fused:
            return "it uses max_norm, scale_grad_by_freq or sparse"
        weight = self.weight
        # Subclasses of Tensor bring their own implementation of F.embedding, and none of our op.
        if type(weight) not in (Tensor, Parameter):
            return f"its weight is a {type(weight).__name__}, not a plain parameter"
        if weight.dtype not in DTYPES:
            return f"its weight is of {weight.dtype}"
        if needs_stock_autograd(weight):
            return "torch.func or forward-mode AD differentiates it: the fused op has a backward formula only"
        if makes_a_program():
            return "torch.jit or torch.export traces: what it makes should run without embedkernels"
        return None

    def forward(self, input: Tensor) -> Tensor:
        """Rows of the table at ``input``."""
        if self.stock_reason() is not None:
            return super().forward(input)
        return embedding(input, self.weight, padding_idx=self.padding_idx)

    def extra_repr(self) -> str:
        """As in ``nn.Embedding``, with ``fused=False`` where an option makes the stock forward run."""
        return super().extra_repr() + ("" if self.fused else ", fused=False")

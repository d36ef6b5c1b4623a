"""``nn.MultiheadAttention`` whose attention is :func:`embedkernels.attention`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import Parameter

from embedkernels.ops.attention import attention
from embedkernels.ops.backend import makes_a_program

_PLAIN = (Tensor, Parameter)


class FusedMultiheadAttention(nn.MultiheadAttention):
    r"""An ``nn.MultiheadAttention`` whose scores never lie in memory: padding costs no mask of L·S.

    Constructor, parameters, initialisation, ``state_dict`` and ``isinstance`` are those of ``nn.MultiheadAttention``.
    A query that sees no key gives the output projection's bias, where stock gives NaN.

    The stock forward runs where attention weights are asked for (``need_weights=True``, the default of a call, as in
    stock), with an ``attn_mask`` that is not causal order, with an additive ``key_padding_mask``, ``add_bias_kv`` or
    ``add_zero_attn``, with nested tensors, weights that are no plain parameters, ``torch.jit.trace`` and
    ``torch.export``.

    Args:
        embed_dim: E, width of queries and of the output.
        num_heads: H, a divisor of E.
        dropout: probability of dropping an attention weight while training.
        bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype: as in ``nn.MultiheadAttention``.

    Shape:
        - query: (N, L, E) with ``batch_first``, else (L, N, E), or (L, E) without a batch.
        - key, value: the same with S in place of L, and kdim, vdim in place of E.
        - key_padding_mask: bool (N, S) or (S), True for keys to be left out.
        - output: as query; the second value is None unless weights are asked for.

    Source: Vaswani et al., "Attention is all you need", 2017.

    Example:
        >>> import torch, embedkernels as ek
        >>> mha = ek.FusedMultiheadAttention(32, 2, batch_first=True)
        >>> x, padding = torch.randn(2, 5, 32), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
        >>> mha(x, x, x, key_padding_mask=padding, need_weights=False)[0].shape
        torch.Size([2, 5, 32])
    """

    def stock_reason(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> str | None:
        """Why a call would run the stock forward, or None if it would be the fused one."""
        if need_weights:
            return "attention weights are asked for: pass need_weights=False"
        if attn_mask is not None and not is_causal:
            return "attn_mask is not causal order: with is_causal=True it is taken for that"
        if is_causal and attn_mask is None:
            return "is_causal is a hint about attn_mask, which is not there: stock says so"
        if key_padding_mask is not None and key_padding_mask.dtype != torch.bool:
            return f"key_padding_mask is {key_padding_mask.dtype}, not bool"
        if self.bias_k is not None or self.bias_v is not None or self.add_zero_attn:
            return "the module adds keys of its own"
        if query.is_nested or key.is_nested or value.is_nested:
            return "a nested tensor"
        own = (self.in_proj_weight, self.q_proj_weight, self.k_proj_weight, self.v_proj_weight, self.in_proj_bias,
               self.out_proj.weight, self.out_proj.bias)  # fmt: skip
        if any(weight is not None and type(weight) not in _PLAIN for weight in own):
            return "its weights are no plain parameters"
        if query.dim() not in (2, 3) or not query.dim() == key.dim() == value.dim():
            return "shapes that stock refuses"
        if makes_a_program():
            return "torch.jit or torch.export traces: what it makes should run without embedkernels"
        return None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As in ``nn.MultiheadAttention``."""
        if self.stock_reason(query, key, value, key_padding_mask, need_weights, attn_mask, is_causal) is not None:
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        batched = query.dim() == 3
        batch_axis = 0 if self.batch_first or not batched else 1
        q, k, v = (self._heads(x, batched, batch_axis) for x in self._projected(query, key, value))
        seen = None if key_padding_mask is None else ~key_padding_mask.reshape(-1, key_padding_mask.shape[-1])
        dropout = self.dropout if self.training else 0.0
        out = attention(q, k, v, dropout_p=dropout, is_causal=is_causal, key_mask=seen)
        # (B, H, L, D) to the layout of the query.
        out = out.transpose(1, 2).flatten(2)
        if not batched:
            out = out[0]
        elif batch_axis == 1:
            out = out.transpose(0, 1)
        return F.linear(out, self.out_proj.weight, self.out_proj.bias), None

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """Query, key and value behind their projections: one product for those that are one tensor."""
        bias, width = self.in_proj_bias, self.embed_dim
        if not self._qkv_same_embed_dim:
            biases = (None, None, None) if bias is None else bias.chunk(3)
            weights = self.q_proj_weight, self.k_proj_weight, self.v_proj_weight
            return tuple(F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True))
        weight = self.in_proj_weight
        if query is key and key is value:
            return F.linear(query, weight, bias).chunk(3, -1)
        q_weight, kv_weight = weight.split([width, 2 * width])
        q_bias, kv_bias = (None, None) if bias is None else bias.split([width, 2 * width])
        q = F.linear(query, q_weight, q_bias)
        if key is value:
            return q, *F.linear(key, kv_weight, kv_bias).chunk(2, -1)
        k_weight, v_weight = kv_weight.chunk(2)
        k_bias, v_bias = (None, None) if kv_bias is None else kv_bias.chunk(2)
        return q, F.linear(key, k_weight, k_bias), F.linear(value, v_weight, v_bias)

    def _heads(self, x: Tensor, batched: bool, batch_axis: int) -> Tensor:
        """(B, H, S, D), a view."""
        x = x.unflatten(-1, (self.num_heads, self.head_dim))
        if not batched:
            x = x[None]
        elif batch_axis == 1:
            x = x.transpose(0, 1)
        return x.transpose(1, 2)

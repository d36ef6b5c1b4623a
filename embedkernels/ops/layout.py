"""Where the outputs of ops on heads lie in memory."""

from __future__ import annotations

from torch import Tensor


def empty_in_order_of(x: Tensor) -> Tensor:
    """An empty (B, H, S, D) tensor, laid out (B, S, H, D) if ``x`` is: a projection's backward then needs no copy."""
    batch, heads, length, head_size = x.shape
    if x.stride(1) < x.stride(2):
        return x.new_empty((batch, length, heads, head_size)).transpose(1, 2)
    return x.new_empty((batch, heads, length, head_size))

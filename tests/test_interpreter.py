"""What the tests change in Triton's interpreter is what PyTorch, and a GPU, do."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.interpreter import dot, nearest_bfloat16_bits


def bits_of(x: torch.Tensor) -> np.ndarray:
    return x.bfloat16().view(torch.int16).numpy().view(np.uint16)


def test_every_pattern_of_the_upper_half_and_ties_around_it() -> None:
    upper = torch.arange(1 << 16, dtype=torch.int64) << 16
    for lower in (0x0000, 0x0001, 0x7FFF, 0x8000, 0x8001, 0xFFFF):
        x = (upper + lower).to(torch.uint32).view(torch.float32)
        number = ~torch.isnan(x).numpy()
        mine = nearest_bfloat16_bits(x.numpy())
        assert np.array_equal(mine[number], bits_of(x)[number]), hex(lower)
        assert torch.isnan(torch.from_numpy(mine[~number].view(np.int16)).view(torch.bfloat16)).all(), hex(lower)


def test_casts_and_stores_of_the_interpreter_round_to_nearest(device: torch.device) -> None:
    """On a GPU as well: the claim that the interpreter is held to."""
    triton = pytest.importorskip("triton")
    from tests.rounding_kernel import cast_kernel

    x = torch.randn(1024, device=device)
    cast, stored = torch.empty(2, 1024, dtype=torch.bfloat16, device=device)
    cast_kernel[(triton.cdiv(1024, 1024),)](x, cast, stored, 1024)
    assert torch.equal(cast, x.bfloat16())
    assert torch.equal(stored, x.bfloat16())


def test_a_product_is_a_chain_of_fused_multiply_adds() -> None:
    """In the order of the columns, and of the transposed operands the same bits."""
    generator = np.random.default_rng(0)
    a, b, acc = (generator.standard_normal(shape).astype(np.float32) for shape in ((5, 19), (19, 7), (5, 7)))
    found = dot(a, b, acc)
    assert found.dtype == np.float32
    assert np.array_equal(found, dot(b.T, a.T, acc.T).T)
    chain = float(acc[2, 3])
    for k in range(19):
        chain = float(np.float32(float(a[2, k]) * float(b[k, 3]) + chain))
    assert float(found[2, 3]) == chain
    # 1 + 2**-24 is 1 in float32: a product rounded by itself would leave no trace of its second half.
    tiny = np.float32(1 + 2**-12)
    assert dot(np.array([[tiny]]), np.array([[tiny]]), np.array([[-1]], np.float32))[0, 0] == np.float32(
        2**-11 + 2**-24
    )

"""The random bits: known answers, and the kernels' against the reference's."""

import pytest
import torch
import triton
import triton.language as tl

from embedkernels.kernels.random import keep_from_bits as kernel_keep_from_bits
from embedkernels.kernels.random import row_keep_mask as kernel_row_keep_mask
from embedkernels.reference.random import keep_from_bits, philox, row_keep_mask


def test_philox_gives_the_published_answer() -> None:
    """Random123's known-answer test of philox4x32 with 7 rounds, all-zero counter and key."""
    words = philox(0, torch.zeros(1, dtype=torch.int64))
    assert [int(word) for word in words] == [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]


@triton.jit
def _philox_kernel(out_ptr, seed_ptr, c0_ptr, c1_ptr, c2_ptr, N: tl.constexpr):
    at = tl.arange(0, N)
    c0, c1, c2 = (tl.load(ptr + at).to(tl.uint32) for ptr in (c0_ptr, c1_ptr, c2_ptr))
    words = tl.philox(tl.load(seed_ptr), c0, c1, c2, tl.zeros_like(c0), 7)
    for word in tl.static_range(4):
        tl.store(out_ptr + word * N + at, words[word].to(tl.int64))


@triton.jit
def _mask_kernel(out_ptr, seed_ptr, first_row, first_column, p, R: tl.constexpr, C: tl.constexpr):
    rows = first_row + tl.arange(0, R)
    keep = kernel_row_keep_mask(tl.load(seed_ptr), rows, first_column, p, C)
    tl.store(out_ptr + tl.arange(0, R)[:, None] * C + tl.arange(0, C)[None, :], keep.to(tl.int8))


@triton.jit
def _keep_kernel(out_ptr, bits_ptr, p, N: tl.constexpr):
    at = tl.arange(0, N)
    keep = kernel_keep_from_bits(tl.load(bits_ptr + at).to(tl.uint32), p)
    tl.store(out_ptr + at, keep.to(tl.int8))


@pytest.mark.parametrize("first_row", [0, 5, 2**30 - 16, 2**31 - 8])
@pytest.mark.parametrize("first_column", [0, 64, 16320])
@pytest.mark.parametrize("seed", [0, 1, 2**32 + 17, 2**62 - 1])
def test_kernel_and_reference_draw_the_same_mask(
    seed: int, first_column: int, first_row: int, device: torch.device
) -> None:
    rows, columns, p = 8, 64, 0.3
    out = torch.full((rows, columns), 7, dtype=torch.int8, device=device)
    seed_tensor = torch.tensor([seed], dtype=torch.int64, device=device)
    _mask_kernel[(1,)](out, seed_tensor, first_row, first_column, p, R=rows, C=columns)
    group = torch.arange(first_column // 4, (first_column + columns) // 4, device=device)[None, :]
    row = torch.arange(first_row, first_row + rows, device=device)[:, None]
    words = torch.stack(philox(seed_tensor, group, row, 0), dim=-1).reshape(rows, columns)
    assert torch.equal(out.bool(), keep_from_bits(words, p))
    if first_row == 0:
        whole = row_keep_mask(seed, rows, first_column + columns, p, device)
        assert torch.equal(out.bool(), whole[:, first_column:])


@pytest.mark.parametrize("p", [0.0, 2.0**-24, 0.1, 1 / 3, 0.5, 1.0 - 2.0**-24, 1.0])
def test_an_element_is_kept_where_its_fraction_is_at_least_p(p: float, device: torch.device) -> None:
    edge = int(p * 2**24)
    values = [0, 1, edge - 1, edge, edge + 1, 2**24 - 1]
    uppers = torch.tensor([min(max(v, 0), 2**24 - 1) for v in values] + [2**23] * 2, device=device)
    bits = uppers << 8 | 0xFF  # the lower 8 bits never matter
    out = torch.full((8,), 7, dtype=torch.int8, device=device)
    _keep_kernel[(1,)](out, bits, p, N=8)
    threshold = torch.tensor(p, dtype=torch.float32).double()
    expected = uppers.double() / 2**24 >= threshold.to(device)
    assert torch.equal(out.bool(), expected)
    assert torch.equal(keep_from_bits(bits, p), expected)


def test_seeds_and_rows_and_columns_all_matter() -> None:
    a = row_keep_mask(1, 64, 64, 0.5, torch.device("cpu"))
    assert not torch.equal(a, row_keep_mask(2, 64, 64, 0.5, torch.device("cpu")))
    assert not torch.equal(a, row_keep_mask(1 + 2**32, 64, 64, 0.5, torch.device("cpu")))
    assert len({tuple(row.tolist()) for row in a}) == 64
    assert len({tuple(column.tolist()) for column in a.t()}) == 64

"""Dropout: the same mask in the three kernels and in the reference, drawn from PyTorch's generator."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import embedkernels as ek
from embedkernels.reference.attention import attention_keep_mask
from tests.attention import cases

# The least that drops anything and less than that, the largest float32 below 1, and what float32 rounds up to 1.
PROBABILITIES = [2.0**-24, 1e-30, 1e-6, 0.25, 0.999, 1 - 2.0**-24, 1 - 2.0**-25, 0.99999999, 1.0]


@pytest.mark.parametrize("p", PROBABILITIES)
def test_the_kernels_drop_what_the_reference_drops(p: float, device: torch.device) -> None:
    """Bit for bit, in all three kernels, read off with uniform weights and one-hot values, gradients and keys."""
    num_queries, num_keys, heads = 41, 64, 2
    query = torch.zeros(1, heads, num_queries, 64, device=device, requires_grad=True)
    key = torch.zeros(1, 1, num_keys, 64, device=device, requires_grad=True)
    value = torch.eye(num_keys, device=device)[None, None].clone().requires_grad_()
    keep = attention_keep_mask(cases.drawn_seed(device), 1, heads, num_queries, num_keys, p, device)

    def run(grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
        call = cases.Call(query, key, value, grad, {"dropout_p": p})
        return cases.ours(call)

    out = run(torch.zeros_like(query))[0]
    assert torch.equal(out != 0, keep)
    # Row q of the gradient is one-hot in q mod 64, so dv[k, q] of head 0 is the weight of (q, k).
    grad = torch.zeros_like(query)
    grad[0, 0, :, :num_queries] = torch.eye(num_queries, device=device)
    _, _, _, dv = run(grad)
    assert torch.equal(dv[0, 0, :, :num_queries].t() != 0, keep[0, 0])
    # With one-hot keys and a gradient of ones, dq[q, k] is P (dropped dP - delta): two values, by what is kept.
    key = torch.eye(num_keys, device=device)[None, None].clone().requires_grad_()
    value = torch.ones_like(key).requires_grad_()
    _, dq, _, _ = run(torch.ones_like(query))
    fraction = keep.float().mean(-1, keepdim=True)
    above = dq > -dq.abs().amax(-1, keepdim=True) / 2
    mixed = (fraction > 0.01) & (fraction < 0.99)
    assert torch.equal((above & (dq > 0))[mixed.expand_as(dq)], keep[mixed.expand_as(dq)])


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_the_rate(p: float) -> None:
    """Within five standard deviations, over all elements and in every class of positions modulo 16."""
    keep = attention_keep_mask(123456789, 2, 3, 128, 160, p, torch.device("cpu")).double()
    for x in (keep.flatten()[None], keep.reshape(6, 8, 16, 10, 16).permute(2, 4, 0, 1, 3).reshape(256, -1)):
        deviation = math.sqrt(p * (1 - p) / x.shape[1])
        assert (x.mean(1) - (1 - p)).abs().max() < 5 * deviation


def test_neighbours_are_independent() -> None:
    """Elements that share a Philox call, or lie side by side, are dropped together no more often than by chance."""
    drop = 1 - attention_keep_mask(987654321, 2, 2, 256, 256, 0.5, torch.device("cpu")).double()
    for dq, dk in ((0, 1), (1, 0), (0, 8), (8, 0), (8, 8), (0, 16), (16, 0)):
        both = (drop[..., dq:, dk:] * drop[..., : 256 - dq, : 256 - dk]).mean()
        assert abs(float(both) - 0.25) < 5 * math.sqrt(0.25 * 0.75 / drop.numel())


def test_no_two_heads_or_seeds_share_a_mask() -> None:
    cpu = torch.device("cpu")
    keep = attention_keep_mask(1, 2, 2, 64, 64, 0.5, cpu).reshape(4, -1)
    other = attention_keep_mask(2**40 + 1, 2, 2, 64, 64, 0.5, cpu).reshape(4, -1)
    assert len(torch.cat([keep, other]).unique(dim=0)) == 8


@pytest.mark.parametrize("p", [0.99999999, 1.0])
def test_everything_dropped(p: float, device: torch.device) -> None:
    """p = 1, or what is 1 in float32: zeros, forward and backward."""
    for x in cases.ours(cases.inputs(lengths=(18, 20), head_size=16, dropout_p=p, device=device)):
        assert (x == 0).all()


def test_manual_seed(device: torch.device) -> None:
    """One seed, one result; the next call draws another mask; no draw without dropout."""
    call = cases.inputs(lengths=(18, 20), head_size=16, dropout_p=0.4, device=device)
    first, again, other = cases.ours(call, seed=3), cases.ours(call, seed=3), cases.ours(call, seed=4)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    torch.manual_seed(3)
    state = torch.get_rng_state() if device.type == "cpu" else torch.cuda.get_rng_state()
    ek.attention(*call.leaves, backend="triton")
    after = torch.get_rng_state() if device.type == "cpu" else torch.cuda.get_rng_state()
    assert torch.equal(state, after)


def test_activation_checkpointing(device: torch.device) -> None:
    """The forward that checkpointing runs again draws the same mask."""
    call = cases.inputs(lengths=(18, 20), head_size=16, dropout_p=0.4, device=device)
    plain = cases.ours(call)
    torch.manual_seed(1)

    def run(*leaves: torch.Tensor) -> torch.Tensor:
        with cases.use_tiles(None if device.type == "cuda" else cases.SMALL):
            return ek.attention(*leaves, backend="triton", **call.options)

    out = checkpoint(run, *call.leaves, use_reentrant=False)
    with cases.use_tiles(None if device.type == "cuda" else cases.SMALL):
        gradients = torch.autograd.grad(out, call.leaves, call.grad)
    for (name, a), b in zip(cases.pairs((out, *gradients)), plain, strict=True):
        assert torch.equal(a, b), name

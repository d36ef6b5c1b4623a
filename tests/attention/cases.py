"""Calls of ``ek.attention`` as data: inputs, the same call in PyTorch, and the same call in float64."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import embedkernels as ek
from embedkernels.kernels.attention_tiles import Tile, Tiles, use_tiles
from embedkernels.reference import attention as reference

# So small that some 40 rows are several blocks, whole ones and cut ones, with BLOCK_M below and above BLOCK_N.
SMALL = Tiles(Tile(16, 32, 4, 1), Tile(16, 32, 4, 1), Tile(32, 16, 4, 1))
NAMES = ("out", "dq", "dk", "dv")


def covering(features: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Few combinations in which every two values of two features meet: greedy, in a fixed order."""
    names = list(features)
    wanted = {
        (a, x, b, y)
        for a, b in itertools.combinations(names, 2)
        for x in range(len(features[a]))
        for y in range(len(features[b]))
    }
    rows = []
    while wanted:
        row: dict[str, int] = {}
        for name in names:
            row[name] = max(
                range(len(features[name])),
                # Pairs with what is chosen already count first, then those still to be had.
                key=lambda i: (
                    sum((a, x, name, i) in wanted for a, x in row.items()),
                    sum((name, i) in ((a, x), (b, y)) for a, x, b, y in wanted),
                ),
            )
        wanted -= {(a, row[a], b, row[b]) for a, b in itertools.combinations(names, 2)}
        rows.append({name: features[name][i] for name, i in row.items()})
    return rows


@dataclass
class Call:
    """Inputs of a call; ``options`` are the keywords that the reference shares with ``ek.attention``."""

    query: Tensor
    key: Tensor
    value: Tensor
    grad: Tensor
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def leaves(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.query, self.key, self.value


def inputs(
    *,
    batch: int = 2,
    heads: tuple[int, int] = (2, 2),
    lengths: tuple[int, int] = (33, 33),
    head_size: int = 32,
    dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
    device: torch.device,
    **options: Any,
) -> Call:
    """Random inputs. ``layout``: contiguous (B, H, S, D), transposed from (B, S, H, D), or slices of a packed row."""

    def make(n_heads: int, length: int) -> Tensor:
        if layout == "packed":
            x = torch.randn(batch, length, 3, n_heads, head_size, device=device).to(dtype)[:, :, 1].transpose(1, 2)
        elif layout == "transposed":
            x = torch.randn(batch, length, n_heads, head_size, device=device).to(dtype).transpose(1, 2)
        else:
            x = torch.randn(batch, n_heads, length, head_size, device=device).to(dtype)
        return x.requires_grad_()

    query, key, value = make(heads[0], lengths[0]), make(heads[1], lengths[1]), make(heads[1], lengths[1])
    grad = torch.randn(query.shape, device=device).to(dtype)
    return Call(query, key, value, grad, options)


def masks(kind: str, batch: int, num_keys: int, device: torch.device) -> dict[str, Tensor]:
    """Keywords that mask keys. The last batch row always counts all but a few keys, the first ones fewer."""
    keys = torch.arange(num_keys, device=device)
    lengths = torch.linspace(num_keys // 3, num_keys - 1, batch, device=device).int()
    if kind == "none":
        return {}
    if kind == "right":
        return {"key_mask": keys < lengths[:, None]}
    if kind == "left":
        return {"key_mask": keys >= num_keys - lengths[:, None]}
    if kind == "holes":
        mask = torch.rand(batch, num_keys, device=device) < 0.6
        mask[0] = False  # a row of padding only
        return {"key_mask": mask}
    if kind == "lengths":
        return {"key_lengths": lengths}
    if kind == "starts":
        return {"key_starts": (num_keys - lengths).long() // 2, "key_lengths": lengths}
    raise AssertionError(kind)


def ours(call: Call, seed: int = 1, tiles: Tiles | None = SMALL) -> tuple[Tensor, ...]:
    """out, dq, dk, dv of the Triton backend; on a GPU with the shipped tiles."""
    torch.manual_seed(seed)
    with use_tiles(None if call.query.is_cuda else tiles):
        out = ek.attention(*call.leaves, enable_gqa=True, backend="triton", **call.options)
        return out, *torch.autograd.grad(out, call.leaves, call.grad)


def drawn_seed(device: torch.device, seed: int = 1) -> Tensor:
    """The seed that ``ours`` has drawn for its dropout."""
    torch.manual_seed(seed)
    return torch.randint(0, 2**62, (1,), device=device)


def run_reference(call: Call, dtype: torch.dtype, seed: int = 1) -> tuple[Tensor, ...]:
    leaves = [x.detach().to(dtype).requires_grad_() for x in call.leaves]
    out = reference.attention(*leaves, **call.options, seed=drawn_seed(call.query.device, seed))
    return out, *torch.autograd.grad(out, leaves, call.grad.to(dtype))


def flash_in_plain_pytorch(call: Call, dtype: torch.dtype, seed: int = 1) -> tuple[Tensor, ...]:
    """The same with the backward of flash kernels: delta is the sum of out · grad, not of the products' own parts.

    The two are equal but for rounding. Where a query sees one key, dP - delta is exactly 0, which plain operations
    find as they subtract a number from itself, and a kernel that never holds a whole row of dP does not.
    """
    out, _, _, dv = run_reference(call, dtype, seed)
    query, key, value = (x.detach().to(dtype) for x in call.leaves)
    groups = query.shape[1] // key.shape[1]
    scale = call.options.get("scale") or query.shape[-1] ** -0.5
    unmasked = {name: x for name, x in call.options.items() if name != "dropout_p"}
    size = key.shape[2]
    # The probabilities, and what dropout leaves of them, are the outputs for values that name the keys.
    named = torch.eye(size, dtype=dtype, device=key.device).expand(*key.shape[:2], size, size)
    probabilities = reference.attention(query, key, named, **{**unmasked, "scale": scale})
    drawn = drawn_seed(query.device, seed)
    keep = reference.attention_keep_mask(drawn, *query.shape[:3], size, call.options["dropout_p"], query.device)
    grad = call.grad.to(dtype)
    products = grad @ value.repeat_interleave(groups, 1).transpose(2, 3)
    products = torch.where(keep, products * reference.keep_scale(call.options["dropout_p"]), 0.0)
    scores = probabilities * (products - (out.detach() * grad).sum(-1, keepdim=True))
    dq = scores @ key.repeat_interleave(groups, 1) * scale
    dk = (scores.transpose(2, 3) @ query * scale).unflatten(1, (-1, groups)).sum(2)
    return out, dq, dk, dv


def expected(call: Call, seed: int = 1) -> tuple[Tensor, ...]:
    """out, dq, dk, dv in float64."""
    return run_reference(call, torch.float64, seed)


def theirs(call: Call, fused: bool = False) -> tuple[Tensor, ...]:
    """out, dq, dk, dv of PyTorch in the call's dtype: SDPA's plain implementation with a dense mask.

    SDPA cannot drop what we drop: with dropout, plain operations in the same dtype stand in.

    Args:
        fused: SDPA as it chooses for itself: a flash kernel on a CPU and on a GPU alike; with dropout, what such a
            kernel does.
    """
    options = dict(call.options)
    if options.pop("dropout_p", 0.0):
        return (flash_in_plain_pytorch if fused else run_reference)(call, call.query.dtype)
    leaves = [x.detach().requires_grad_() for x in call.leaves]
    scale = options.pop("scale", None)
    visible = reference.visible_keys(call.query.shape[2], call.key.shape[2], call.query.device, **options)
    with contextlib.nullcontext() if fused else sdpa_kernel(SDPBackend.MATH):
        out = torch.nn.functional.scaled_dot_product_attention(
            *leaves, attn_mask=visible, scale=scale, enable_gqa=True
        )
        return out, *torch.autograd.grad(out, leaves, call.grad)


def poisoned_allocations(monkeypatch: Any) -> None:
    """From here on, fresh floating point memory is NaN: what a kernel does not write shows."""

    def poison(function: Any) -> Any:
        def allocate(*args: Any, **kwargs: Any) -> Tensor:
            fresh: Tensor = function(*args, **kwargs)
            return fresh.fill_(float("nan")) if fresh.is_floating_point() else fresh.fill_(-7)

        return allocate

    monkeypatch.setattr(torch, "empty", poison(torch.empty))
    monkeypatch.setattr(torch.Tensor, "new_empty", poison(torch.Tensor.new_empty))


def pairs(results: tuple[Tensor, ...]) -> Iterator[tuple[str, Tensor]]:
    return zip(NAMES, results, strict=True)

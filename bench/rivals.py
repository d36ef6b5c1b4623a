"""Who is compared: PyTorch eager, torch.compile, the backends of SDPA, Liger and FlagGems where installed, and ours.

A rival prepares a case's inputs into two calls: ``forward`` (which saves what a backward needs) and ``training``
(forward and backward, returning the output and every gradient by name, as the check wants them).
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import embedkernels as ek

OPTIONAL = ("liger_kernel", "flag_gems")
# Waves after the first, which is the yardstick's and ours: no case must lack these for the sake of another's rivals.
COMPILED, OTHERS = 1, 2


@dataclass(frozen=True)
class Prepared:
    """A rival's calls for one case, each None where the case has no such pass."""

    forward: Callable[[], Any] | None
    training: Callable[[], dict[str, Tensor]]
    backward_to_rows: Callable[[], Any] | None = None


@dataclass(frozen=True)
class Rival:
    """``build(inputs, dropout)`` prepares the calls, or raises and says why this rival cannot.

    ``ours`` is held to the project's own contract; a ``required`` one that cannot run is a failure of the suite.
    Rivals of a later ``wave`` wait until those before have met in every case.
    """

    name: str
    build: Callable[[SimpleNamespace, float], Prepared]
    ours: bool = False
    required: bool = False
    wave: int = 0


def absent() -> list[str]:
    """Rivals that are not installed here."""
    return [name for name in OPTIONAL if importlib.util.find_spec(name) is None]


def compiled(function: Callable[..., Any], tiny: bool) -> Callable[..., Any]:
    """``torch.compile``, specialised on shapes. Dry runs trace and partition, but generate no code."""
    torch._dynamo.config.recompile_limit = 64
    backend = "aot_eager" if tiny else "inductor"
    return torch.compile(function, fullgraph=True, dynamic=False, backend=backend)


def differentiable(run: Callable[[], Tensor], leaves: dict[str, Tensor], upstream: Tensor) -> Prepared:
    """Calls for ``run``, whose output gets the gradient ``upstream``; gradients are taken for ``leaves``."""

    def training() -> dict[str, Tensor]:
        out = run()
        grads = torch.autograd.grad(out, list(leaves.values()), upstream)
        return {"out": out.detach(), **{f"grad of {name}": grad for name, grad in zip(leaves, grads, strict=True)}}

    return Prepared(run, training)


def stock_rope(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Rotary positions as in transformers: of halves in Llama, of neighbours, in fp32, in Cohere."""

    def turned(x: Tensor) -> Tensor:
        if interleaved:
            x = x.to(torch.promote_types(x.dtype, torch.float32))
            swapped = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
        else:
            first, second = x.chunk(2, dim=-1)
            swapped = torch.cat((-second, first), dim=-1)
        return (x * cos[:, None] + swapped * sin[:, None]).to(query.dtype)

    return turned(query), turned(key)


def rope_rivals(tiny: bool) -> list[Rival]:
    """Rotary positions of query and key; the first one is the yardstick."""

    def both(function: Callable[..., Any], in_place: bool = False) -> Callable[[SimpleNamespace, float], Prepared]:
        def build(x: SimpleNamespace, dropout: float) -> Prepared:  # noqa: ARG001
            def forward() -> Any:
                return function(x.query, x.key, x.cos, x.sin, x.interleaved)

            def training() -> dict[str, Tensor]:
                out = forward()
                upstream = [t.clone() for t in x.upstream] if in_place else x.upstream
                grads = torch.autograd.grad(out, (x.query, x.key), upstream)
                names = ("query", "key", "grad of query", "grad of key")
                return dict(zip(names, (*(t.detach() for t in out), *grads), strict=True))

            return Prepared(forward, training)

        return build

    def ours(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Any:
        return ek.rope(query, key, cos, sin, interleaved=interleaved)

    def liger(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Any:
        from liger_kernel.transformers.rope import liger_rotary_pos_emb

        if interleaved:
            raise NotImplementedError("turns halves only")
        # It turns in place, gradients too: what the others are given must stay, so copies are part of its time.
        return liger_rotary_pos_emb(query.clone(), key.clone(), cos, sin)

    found = [
        Rival("eager", both(stock_rope)),
        Rival("ours", both(ours), ours=True, required=True),
        Rival("torch.compile", both(compiled(stock_rope, tiny)), wave=COMPILED),
    ]
    if "liger_kernel" not in absent():
        found.append(Rival("Liger, with copies", both(liger, in_place=True), wave=OTHERS))
    return found


def attention_rivals(tiny: bool) -> list[Rival]:  # noqa: ARG001
    """Attention; the first one is what Hugging Face's "sdpa" does, and the yardstick."""

    def sdpa(backend: SDPBackend | None) -> Callable[[SimpleNamespace, float], Prepared]:
        def run(x: SimpleNamespace, dropout: float) -> Tensor:
            key, value, grouped = x.key, x.value, x.query.shape[1] != x.key.shape[1]
            if grouped and x.mask is not None:
                # As Hugging Face does it: no SDPA kernel takes both a mask and grouped heads.
                key, value = (t.repeat_interleave(x.query.shape[1] // t.shape[1], 1) for t in (key, value))
                grouped = False
            with sdpa_kernel(backend) if backend is not None else contextlib.nullcontext():
                return F.scaled_dot_product_attention(
                    x.query,
                    key,
                    value,
                    attn_mask=x.mask,
                    dropout_p=dropout,
                    is_causal=x.causal and x.mask is None,
                    enable_gqa=grouped,
                )

        return lambda x, dropout: differentiable(lambda: run(x, dropout), leaves(x), x.upstream)

    def leaves(x: SimpleNamespace) -> dict[str, Tensor]:
        return {"query": x.query, "key": x.key, "value": x.value}

    def ours(x: SimpleNamespace, dropout: float) -> Prepared:
        return differentiable(
            lambda: ek.attention(
                x.query,
                x.key,
                x.value,
                dropout_p=dropout,
                is_causal=x.causal,
                enable_gqa=x.query.shape[1] != x.key.shape[1],
                key_lengths=x.lengths,
                window=x.window,
                cu_seqlens_q=x.ends,
            ),
            leaves(x),
            x.upstream,
        )

    def varlen(x: SimpleNamespace, dropout: float) -> Prepared:
        from torch.nn.attention.varlen import varlen_attn

        if x.ends is None or dropout:
            raise NotImplementedError("takes packed documents only, and no dropout")

        def run() -> Tensor:
            rows = (t[0].transpose(0, 1) for t in (x.query, x.key, x.value))
            options: dict[str, Any] = {"enable_gqa": True} if x.query.shape[1] != x.key.shape[1] else {}
            window = (-1, 0) if x.causal else (-1, -1)
            out = varlen_attn(*rows, x.ends, x.ends, x.longest, x.longest, window_size=window, **options)
            return torch.as_tensor(out).transpose(0, 1)[None]

        return differentiable(run, leaves(x), x.upstream)

    return [
        Rival("sdpa", sdpa(None)),
        Rival("ours", ours, ours=True, required=True),
        Rival("sdpa cuDNN", sdpa(SDPBackend.CUDNN_ATTENTION), wave=OTHERS),
        Rival("sdpa flash", sdpa(SDPBackend.FLASH_ATTENTION), wave=OTHERS),
        Rival("sdpa efficient", sdpa(SDPBackend.EFFICIENT_ATTENTION), wave=OTHERS),
        Rival("torch varlen_attn", varlen, wave=OTHERS),
    ]

"""Inputs of ``embed`` in every combination that matters, and its results beside PyTorch's and the exact ones."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import embedkernels as ek
from embedkernels.reference.embed import embed as reference_embed
from tests.contract import assert_within_contract

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Together with the parameters of an RMSNorm.
RMS_NORMS = ("rms plain", "rms weight", "rms both")
SOURCES = ("lookup", "given")
EXTRAS = ("none", "full", "one row", "one place")
PACKED = ("none", "real", "any")
MASKS = ("none", "bool", "one row", "float", "int")
SCALES = (1.0, 27.5, -0.3)
PARAMETERS = ("weight", "position_weight", "type_weight", "norm_weight", "norm_bias")
POSITIONS = ("none", "arange", "start", "ids", "one row", "expanded")
SINUSOIDS = ("interleaved", "halves", "fairseq", "halves ids", "fairseq ids")
TYPES = ("none", "zeros", "ids", "one row")
NORMS = ("none", "plain", "weight", "bias", "both")
SEED_LIMIT = 2**62


@dataclass
class Case:
    """A call of ``embed``: ids, parameters by name, everything else by keyword."""

    ids: Tensor | None
    parameters: dict[str, Tensor]
    options: dict[str, Any] = field(default_factory=dict)

    def to(self, dtype: torch.dtype) -> Case:
        """The same values in another dtype, as leaves of their own."""
        copies = {name: p.detach().to(dtype).requires_grad_(p.requires_grad) for name, p in self.parameters.items()}
        return Case(self.ids, copies, self.options)

    def run(self, **more: Any) -> Tensor:
        """``embed`` on the Triton backend: the device's own with a GPU, the interpreter without."""
        return ek.embed(self.ids, **self.parameters, **self.options, **{"backend": "triton", **more})

    def reference(self, seed: Tensor | None = None, lookup: Any = ek.embedding) -> Tensor:
        """The same sequence of PyTorch's ops.

        The lookup adds its gradient in fp32, as PyTorch's does on a GPU; its CPU kernel rounds bf16 at every step,
        which would make the contract too easy.
        """
        return reference_embed(self.ids, **self.parameters, **self.options, seed=seed, lookup=lookup)

    def gradients(self, y: Tensor, upstream: Tensor) -> dict[str, Tensor]:
        """Gradients of the parameters that ask for one."""
        wanted = {name: p for name, p in self.parameters.items() if p.requires_grad}
        return dict(zip(wanted, torch.autograd.grad(y, list(wanted.values()), upstream.to(y.dtype)), strict=True))


def make(
    shape: tuple[int, ...],
    width: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    positions: str = "ids",
    types: str = "ids",
    norm: str = "both",
    dropout_p: float = 0.0,
    padding_idx: int | None = 0,
    position_padding_idx: int | None = None,
    id_dtype: torch.dtype = torch.int64,
    norm_eps: float = 1e-5,
    source: str = "lookup",
    scale: float = 1.0,
    extra: str = "none",
    mask: str = "none",
    dropout_first: bool = False,
    packed: str = "none",
) -> Case:
    """A case with random ids and parameters; 11 tokens, so that rows meet again."""
    length = shape[-1] if shape else 1
    rows = length + 4
    lone = (1,) * (len(shape) - 1) + (length,)

    def some_ids(high: int, size: tuple[int, ...]) -> Tensor:
        return torch.randint(0, high, size, dtype=id_dtype, device=device)

    def table(count: int) -> Tensor:
        return torch.randn(count, width, device=device).to(dtype).requires_grad_()

    def some_rows(*size: int) -> Tensor:
        return torch.randn(*size, width, device=device).to(dtype).requires_grad_()

    parameters = {"weight": table(11)} if source == "lookup" else {"inputs_embeds": some_rows(*shape)}
    options: dict[str, Any] = {"dropout_p": dropout_p, "padding_idx": padding_idx if source == "lookup" else None}
    if scale != 1.0:
        options["scale"] = scale
    if dropout_first:
        options["dropout_first"] = True
    if extra != "none":
        parameters["extra"] = some_rows(*{"full": shape, "one row": lone, "one place": (1,)}[extra])
    count = math.prod(shape)
    if packed != "none":  # real tokens in their order; or any, some of them twice
        chosen = torch.rand(count, device=device) < 0.7
        places = chosen.nonzero()[:, 0] if packed == "real" else torch.randint(0, max(count, 1), (5,), device=device)
        options["packed"] = places.to(id_dtype)
        mask = "none"
    if mask != "none":
        factors = torch.rand(lone if mask == "one row" else shape, device=device)
        options["mask"] = (
            factors if mask == "float" else (factors < 0.7).to(torch.int64 if mask == "int" else torch.bool)
        )
    if positions in SINUSOIDS:
        options |= {"sinusoids": positions.removesuffix(" ids"), "position_padding_idx": position_padding_idx}
        if positions.endswith("ids"):
            options["position_ids"] = some_ids(5000, shape)
        else:
            options["position_start"] = 7
    elif positions != "none":
        parameters["position_weight"] = table(rows)
        options["position_padding_idx"] = position_padding_idx
    if positions == "start":
        options["position_start"] = 3
    if positions in ("ids", "one row", "expanded"):
        drawn = some_ids(rows, shape if positions == "ids" else lone)
        options["position_ids"] = drawn.expand(shape) if positions == "expanded" else drawn
    if types != "none":
        parameters["type_weight"] = table(3)
    if types in ("ids", "one row"):
        options["type_ids"] = some_ids(3, shape if types == "ids" else lone)
    if norm != "none":
        options |= {"norm": "rms" if norm.startswith("rms") else "layer", "norm_eps": norm_eps}
        norm = norm.removeprefix("rms ")
    if norm in ("weight", "both"):
        parameters["norm_weight"] = (1 + 0.5 * torch.randn(width, device=device)).to(dtype).requires_grad_()
    if norm in ("bias", "both"):
        parameters["norm_bias"] = torch.randn(width, device=device).to(dtype).requires_grad_()
    return Case(some_ids(11, shape) if source == "lookup" else None, parameters, options)


def drawn_seed(manual_seed: int, device: torch.device | str) -> Tensor:
    """What ``embed`` draws as its first random number after ``torch.manual_seed(manual_seed)``."""
    torch.manual_seed(manual_seed)
    return torch.randint(0, SEED_LIMIT, (1,), dtype=torch.int64, device=device)


def assert_contract(*cases: Case) -> None:
    """Output and each gradient on the Triton backend, under the numerical contract.

    Errors of several cases with the same parts are judged together: those of a few elements are a matter of luck.
    """
    results: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {}
    for case in cases:
        for name, triple in _results(case).items():
            results.setdefault(name, []).append(triple)
    for name, triples in results.items():
        ours, theirs, exact = (
            each[0] if len(each) == 1 else torch.cat([x.flatten() for x in each])
            for each in zip(*triples, strict=True)
        )
        assert_within_contract(ours, theirs, exact, name)


def _results(case: Case) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Ours, PyTorch's and the exact ones, by name."""
    device = next(iter(case.parameters.values())).device
    seed = drawn_seed(5, device) if case.options["dropout_p"] > 0 else None
    torch.manual_seed(5)
    ours = case.run()
    theirs = case.reference(seed)
    exact_case = case.to(torch.float64)
    exact = exact_case.reference(seed)
    assert ours.is_contiguous()
    upstream = torch.randn(exact.shape, device=exact.device).to(ours.dtype)
    our_grads, their_grads = case.gradients(ours, upstream), case.gradients(theirs, upstream)
    exact_grads = exact_case.gradients(exact, upstream)
    gradients = {
        f"gradient of {name}": (our_grads[name], their_grads[name], exact_grads[name]) for name in exact_grads
    }
    return {"output": (ours.detach(), theirs.detach(), exact.detach()), **gradients}

"""The suite of the input embeddings: BERT's front end as functions and as the module of transformers, tokens alone.

Beside forward and training it times the backward up to the gradients of the summed rows and of the norm: what is left
out, those rows' way into the tables, is the suite of ``bench.table_grad``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import embedkernels as ek
from bench.cases import make_ids
from bench.rivals import COMPILED, OTHERS, Prepared, Rival, absent, compiled, differentiable
from embedkernels.ops.backend import choose

SEED = 20261
EPS = 1e-12  # of BERT's LayerNorm
# The leaves of BERT's front end, and where its module has them.
PLACES = {
    "word": "word_embeddings.weight",
    "kind": "token_type_embeddings.weight",
    "position": "position_embeddings.weight",
    "gain": "LayerNorm.weight",
    "bias": "LayerNorm.bias",
}


@dataclass(frozen=True)
class EmbedCase:
    """A front end.

    Attributes:
        batch, length, rows, width: of the ids and of the table of tokens.
        ids: a distribution of :func:`bench.cases.make_ids`.
        parts: ``"bert"``, tokens + types + positions, LayerNorm, dropout; ``"module"``, the same as transformers'
            ``BertEmbeddings``, stock and patched; ``"tokens"``, the lookup that Llama and its like begin with.
    """

    name: str
    batch: int
    length: int
    rows: int
    width: int
    ids: str = "zipf"
    dtype: str = "bfloat16"
    dropout: float = 0.1
    parts: str = "bert"

    def tiny(self) -> EmbedCase:
        return replace(self, batch=2, length=9, rows=67, width=32)


CASES = (
    EmbedCase("bert 16k", 128, 128, 30522, 768),
    EmbedCase("xlm-r large 16k", 32, 512, 250002, 1024),
    EmbedCase("bert 512", 4, 128, 30522, 768),
    EmbedCase("bert 64k", 128, 512, 30522, 768),
    EmbedCase("bert module 16k", 128, 128, 30522, 768, parts="module"),
    EmbedCase("bert tokens 16k", 128, 128, 30522, 768, dropout=0.0, parts="tokens"),
    EmbedCase("bert module 512", 4, 128, 30522, 768, parts="module"),
    EmbedCase("llama tokens 8k", 8, 1024, 128256, 4096, dropout=0.0, parts="tokens"),
    EmbedCase("bert 16k uniform", 128, 128, 30522, 768, ids="uniform"),
    EmbedCase("bert 16k hot row", 128, 128, 30522, 768, ids="hot"),
    EmbedCase("bert 16k fp32", 128, 128, 30522, 768, dtype="float32"),
)


def inputs(case: EmbedCase, device: torch.device) -> SimpleNamespace:
    generator, dtype = torch.Generator().manual_seed(SEED), getattr(torch, case.dtype)
    torch.manual_seed(SEED)

    def table(rows: int) -> Tensor:
        return torch.randn(rows, case.width, device=device).to(dtype).requires_grad_()

    shape = (case.batch, case.length)
    ids = make_ids(case.batch * case.length, case.rows, case.ids, generator).view(shape).to(device)
    x = SimpleNamespace(parts=case.parts, ids=ids, word=table(case.rows), leaves=("word",))
    if case.parts != "tokens":
        x.types = torch.randint(0, 2, shape, generator=generator).to(device)
        x.kind, x.position = table(2), table(case.length)
        x.gain = (1 + torch.randn(case.width, device=device) / 8).to(dtype).requires_grad_()
        x.bias = torch.randn(case.width, device=device).to(dtype).requires_grad_()
        x.leaves = tuple(PLACES)
    x.upstream = torch.randn(*shape, case.width, device=device).to(dtype)
    return x


def expected(x: SimpleNamespace) -> dict[str, Tensor]:
    """In float64."""
    wide = SimpleNamespace(**vars(x))
    for name in x.leaves:
        setattr(wide, name, getattr(x, name).detach().double().requires_grad_())
    return differentiable(lambda: composed(wide, 0.0), leaves(wide), x.upstream.double()).training()


def floors(case: EmbedCase, x: SimpleNamespace) -> dict[str, tuple[float, float]]:
    """Every row in use, of every table, and every parameter is read once in a pass; both ids of a token are too."""
    row = case.width * x.word.element_size()
    tokens, unique = x.ids.numel(), int(x.ids.unique().numel())
    if case.parts == "tokens":
        forward = 8 * tokens + (unique + tokens) * row
        return {"forward": (forward, 0), "training": (forward + 8 * tokens + (tokens + case.rows) * row, 0)}
    lookup = 16 * tokens + (unique + case.length + int(x.types.unique().numel())) * row
    forward = lookup + (tokens + 2) * row  # norm parameters; the output
    # The gradient in and the weight of the norm; the rows' gradients and those of the norm's parameters.
    to_rows = lookup + (tokens + 1) * row + (tokens + 2) * row
    # The same, but the gradients of the tables in the place of the rows'.
    backward = to_rows + (case.rows + case.length + x.kind.shape[0] - tokens) * row
    found = {"forward": (forward, 0.0), "training": (forward + backward, 0.0)}
    if case.parts == "bert":
        found["backward_to_rows"] = to_rows, 0.0
    return found


def leaves(x: SimpleNamespace) -> dict[str, Tensor]:
    return {name: getattr(x, name) for name in x.leaves}


def lookup(ids: Tensor, word: Tensor) -> Tensor:
    return F.embedding(ids, word)


def summed(ids: Tensor, types: Tensor, word: Tensor, kind: Tensor, position: Tensor) -> Tensor:
    """In Hugging Face's order of additions."""
    return F.embedding(ids, word, padding_idx=0) + F.embedding(types, kind) + position[: ids.shape[-1]]


def stem(
    ids: Tensor, types: Tensor, word: Tensor, kind: Tensor, position: Tensor, gain: Tensor, bias: Tensor, p: float
) -> Tensor:
    return F.dropout(F.layer_norm(summed(ids, types, word, kind, position), gain.shape, gain, bias, EPS), p)


Functions = dict[str, Callable[..., Tensor]]
STOCK: Functions = {"tokens": lookup, "bert": stem, "module": stem}


def composed(x: SimpleNamespace, dropout: float, functions: Functions = STOCK) -> Tensor:
    """A front end by one of ``functions``."""
    if x.parts == "tokens":
        return functions["tokens"](x.ids, x.word)
    return functions[x.parts](x.ids, x.types, *leaves(x).values(), dropout)


def module_of(x: SimpleNamespace, dropout: float) -> torch.nn.Module:
    """``BertEmbeddings``, its parameters over the memory of the case's tables."""
    from transformers import BertConfig
    from transformers.models.bert.modeling_bert import BertEmbeddings

    config = BertConfig(
        vocab_size=x.word.shape[0],
        hidden_size=x.word.shape[1],
        max_position_embeddings=x.position.shape[0],
        hidden_dropout_prob=dropout,
        layer_norm_eps=EPS,
    )
    module = BertEmbeddings(config).to(x.word.device)
    for name, place in PLACES.items():
        owner, _, parameter = place.rpartition(".")
        setattr(module.get_submodule(owner), parameter, torch.nn.Parameter(getattr(x, name).detach()))
    return module.train()


def calls_of(module: torch.nn.Module, call: Callable[..., Tensor], x: SimpleNamespace) -> Prepared:
    parameters = {name: module.get_parameter(place) for name, place in PLACES.items()}
    return differentiable(lambda: call(input_ids=x.ids, token_type_ids=x.types), parameters, x.upstream)


def stock(x: SimpleNamespace, dropout: float) -> Prepared:
    if x.parts == "module":
        module = module_of(x, dropout)
        return calls_of(module, module, x)
    prepared = differentiable(lambda: composed(x, dropout), leaves(x), x.upstream)
    return replace(prepared, backward_to_rows=stock_to_rows(x, dropout)) if x.parts == "bert" else prepared


def ours(x: SimpleNamespace, dropout: float) -> Prepared:
    if x.parts == "module":
        module = module_of(x, dropout)
        ek.patch(module)
        return calls_of(module, module, x)
    if x.parts == "tokens":
        return differentiable(lambda: ek.embed(x.ids, x.word), leaves(x), x.upstream)
    prepared = differentiable(
        lambda: ek.embed(
            x.ids,
            x.word,
            position_weight=x.position,
            type_weight=x.kind,
            type_ids=x.types,
            norm="layer",
            norm_weight=x.gain,
            norm_bias=x.bias,
            norm_eps=EPS,
            dropout_p=dropout,
            padding_idx=0,
        ),
        leaves(x),
        x.upstream,
    )
    # On the torch backend it is stock's own sequence.
    in_kernels = choose("embed", x.word.device).backend == "triton"
    return replace(prepared, backward_to_rows=(fused_to_rows if in_kernels else stock_to_rows)(x, dropout))


def stock_to_rows(x: SimpleNamespace, dropout: float) -> Callable[[], Any]:
    """What autograd runs for dropout and norm. Without autograd, whose graph from before no capture takes."""
    aten = torch.ops.aten

    @functools.cache
    def saved() -> tuple[Tensor, ...]:
        rows = summed(x.ids, x.types, x.word, x.kind, x.position)
        normed, mean, rstd = aten.native_layer_norm(rows, x.gain.shape, x.gain, x.bias, EPS)
        return rows, mean, rstd, aten.native_dropout(normed, dropout, True)[1]

    @torch.no_grad()
    def backward() -> Any:
        rows, mean, rstd, kept = saved()
        grad = aten.native_dropout_backward(x.upstream, kept, 1 / (1 - dropout))
        wanted = [True, True, True]
        return aten.native_layer_norm_backward(grad, rows, x.gain.shape, mean, rstd, x.gain, x.bias, wanted)

    return backward


def fused_to_rows(x: SimpleNamespace, dropout: float) -> Callable[[], Any]:
    ops = torch.ops.embedkernels
    parts = (
        *(x.ids, x.word, 1.0, x.position, "none", -1, None, 0, x.kind, x.types, None, None, None),
        *("layer", x.gain, x.bias),
    )

    @functools.cache
    def saved() -> tuple[Tensor, ...]:
        seed = torch.zeros(1, dtype=torch.int64, device=x.word.device)
        return *ops.embed_forward(*parts, EPS, dropout, False, seed, x.word.dtype, 0)[1:], seed

    @torch.no_grad()
    def backward() -> Any:
        mean, rstd, seed = saved()
        return ops.embed_backward(x.upstream, *parts, mean, rstd, dropout, False, seed, 1.0, True, True)

    return backward


def liger(x: SimpleNamespace, dropout: float) -> Prepared:  # noqa: ARG001
    from liger_kernel.ops.experimental.embedding import LigerEmbeddingFunction

    if x.parts != "tokens":
        raise NotImplementedError("looks up in one table only")
    return differentiable(lambda: LigerEmbeddingFunction.apply(x.word, x.ids), leaves(x), x.upstream)


def contestants(tiny: bool) -> list[Rival]:
    """The first one is the yardstick."""
    functions = {name: compiled(function, tiny) for name, function in STOCK.items()}

    def by_inductor(x: SimpleNamespace, dropout: float) -> Prepared:
        if x.parts == "module":
            module = module_of(x, dropout)
            return calls_of(module, compiled(module, tiny), x)
        return differentiable(lambda: composed(x, dropout, functions), leaves(x), x.upstream)

    found = [
        Rival("eager", stock),
        Rival("ours", ours, ours=True, required=True),
        Rival("torch.compile", by_inductor, wave=COMPILED),
    ]
    if "liger_kernel" not in absent():
        found.append(Rival("Liger", liger, wave=OTHERS))
    return found

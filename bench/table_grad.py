"""The suite of a table's gradient: dense, added to a buffer, rows alone, its plan, and a lookup with its gradient.

Every mode has its own yardstick, which is what PyTorch does for the same end: ``embedding``'s backward; the same and
the addition that ``AccumulateGrad`` makes; a sparse gradient, coalesced; a stable sort and the runs in it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import embedkernels as ek
import embedkernels.ops.embedding_grad  # defines torch.ops.embedkernels.embedding_backward
from bench.cases import FILL, make_ids
from bench.rivals import COMPILED, OTHERS, Prepared, Rival, absent, compiled, differentiable
from embedkernels.ops.backend import Backend


@dataclass(frozen=True)
class GradCase:
    """The gradient of a table from those of the rows looked up.

    Attributes:
        ids: a distribution of :func:`bench.cases.make_ids`, or ``"cycle"``: 0, 1, ... V - 1, 0, ... like positions.
        mode: ``"dense"``, ``"accumulate"``, ``"rows"``, ``"plan"``, or ``"lookup"``: forward and backward.
        buffer: dtype of what is added to; that of the rows if empty.
    """

    name: str
    count: int
    rows: int
    width: int
    ids: str = "zipf"
    dtype: str = "bfloat16"
    padding: bool = False
    mode: str = "dense"
    buffer: str = ""
    dropout: float = 0.0

    def tiny(self) -> GradCase:
        return replace(self, count=37, rows=67, width=32)


CASES = (
    GradCase("llama-3 8k", 8192, 128256, 4096),
    GradCase("llama-3 131k", 131072, 128256, 4096),
    GradCase("llama-3 8k accumulate", 8192, 128256, 4096, mode="accumulate"),
    GradCase("llama-3 131k accumulate", 131072, 128256, 4096, mode="accumulate"),
    GradCase("bert 2k", 2048, 30522, 768),
    GradCase("bert-large 3k", 3072, 30522, 1024),
    GradCase("bert 32k hot row", 32768, 30522, 768, ids="hot"),
    GradCase("bert 32k uniform", 32768, 30522, 768, ids="uniform"),
    GradCase("plan 4.8k", 4800, 128256, 8, mode="plan"),
    GradCase("plan 128k", 131072, 128256, 8, mode="plan"),
    GradCase("llama-3 131k rows", 131072, 128256, 4096, mode="rows"),
    GradCase("xlm-r base 4k lookup", 4096, 250002, 768, mode="lookup"),
    GradCase("bert 16k lookup", 16384, 30522, 768, mode="lookup"),
    GradCase("llama-3 8k lookup", 8192, 128256, 4096, mode="lookup"),
    GradCase("llama-3 131k hot row", 131072, 128256, 4096, ids="hot"),
    GradCase("llama-3 131k uniform", 131072, 128256, 4096, ids="uniform"),
    GradCase("xlm-r base 4k", 4096, 250002, 768),
    GradCase("xlm-r base 4k rows", 4096, 250002, 768, mode="rows"),
    GradCase("bert 512", 512, 30522, 768),
    GradCase("bert 2k hot row", 2048, 30522, 768, ids="hot"),
    GradCase("llama-3 131k accumulate fp32", 131072, 128256, 4096, mode="accumulate", buffer="float32"),
    GradCase("llama-3 8k hot row", 8192, 128256, 4096, ids="hot"),
    GradCase("llama-3 8k uniform", 8192, 128256, 4096, ids="uniform"),
    GradCase("positions 64k", 65536, 512, 768, ids="cycle"),
    GradCase("types 64k", 65536, 2, 768, ids="cycle"),
    GradCase("plan 512", 512, 128256, 8, mode="plan"),
    GradCase("plan 32k", 32768, 128256, 8, mode="plan"),
    GradCase("bert 16k padded", 16384, 30522, 768, padding=True),
    GradCase("bert 16k fp32", 16384, 30522, 768, dtype="float32"),
    GradCase("xlm-r base 4k fp32", 4096, 250002, 768, dtype="float32"),
    GradCase("xlm-r base 4k rows fp32", 4096, 250002, 768, dtype="float32", mode="rows"),
    GradCase("xlm-r base 4k accumulate fp32", 4096, 250002, 768, dtype="float32", mode="accumulate"),
)


def inputs(case: GradCase, device: torch.device) -> SimpleNamespace:
    seed = 20261
    generator, dtype = torch.Generator().manual_seed(seed), getattr(torch, case.dtype)
    torch.manual_seed(seed)
    if case.ids == "cycle":
        ids = torch.arange(case.count) % case.rows
    else:
        ids = make_ids(case.count, case.rows, case.ids, generator)
    if case.padding:
        ids[torch.rand(case.count, generator=generator) > FILL] = 0
    padding = 0 if case.padding else -1
    table = None
    if case.mode == "lookup":
        table = torch.randn(case.rows, case.width, device=device).to(dtype).requires_grad_()
    return SimpleNamespace(
        ids=ids.to(device),
        grad_rows=torch.randn(case.count, case.width, device=device).to(dtype),
        rows=case.rows,
        padding=padding,
        mode=case.mode,
        buffer=getattr(torch, case.buffer) if case.buffer else None,
        used=int(ids[ids != padding].unique().numel()),
        table=table,
    )


def expected(x: SimpleNamespace) -> dict[str, Tensor]:
    """In float64."""
    if x.mode == "plan":
        kept = x.ids != x.padding
        order = torch.where(kept, x.ids, x.rows).sort(stable=True).indices[: int(kept.sum())]
        rows, sizes = x.ids[order].unique_consecutive(return_counts=True)
        offsets = torch.cat((sizes.new_zeros(1), sizes.cumsum(0)))
        return {"order": order.double(), "rows": rows.double(), "offsets": offsets.double()}
    kept_rows = x.grad_rows.double() * (x.ids != x.padding)[:, None]
    table = torch.zeros(x.rows, kept_rows.shape[1], dtype=torch.float64, device=kept_rows.device)
    table.index_add_(0, x.ids, kept_rows)
    if x.mode == "rows":
        return {"values": table[x.ids[x.ids != x.padding].unique()]}
    if x.mode == "lookup":
        return {"out": x.table.detach()[x.ids].double(), "grad of table": table}
    return {"grad": table}


def floors(case: GradCase, x: SimpleNamespace) -> dict[str, tuple[float, float]]:
    """The fewest bytes that must move; the ids are int64."""
    row = case.width * x.grad_rows.element_size()
    kept = int((x.ids != x.padding).sum())
    ids, read = 8 * case.count, kept * row
    if case.mode == "plan":
        return {"forward": (ids + 4 * case.count + 8 * x.used, 0)}
    if case.mode == "accumulate":
        return {"training": (ids + read + 2 * x.used * case.width * (x.buffer or x.grad_rows.dtype).itemsize, 0)}
    if case.mode == "rows":
        return {"training": (ids + read + x.used * row, 0)}
    dense = ids + read + case.rows * row
    if case.mode == "lookup":
        forward = ids + x.used * row + case.count * row
        return {"forward": (forward, 0), "training": (forward + dense, 0)}
    return {"training": (dense, 0)}


def aten_backward(rows: Tensor, ids: Tensor, count: int, padding: int) -> Tensor:
    return torch.ops.aten.embedding_dense_backward(rows, ids, count, padding, False)


def aten_lookup(table: Tensor, ids: Tensor) -> Tensor:
    return F.embedding(ids, table)


Backward = Callable[[Tensor, Tensor, int, int], Tensor]


def _buffer(x: SimpleNamespace) -> Tensor:
    return torch.zeros(x.rows, x.grad_rows.shape[1], dtype=x.buffer or x.grad_rows.dtype, device=x.ids.device)


def _lookup(x: SimpleNamespace, function: Callable[[Tensor, Tensor], Tensor]) -> Prepared:
    return differentiable(lambda: function(x.table, x.ids), {"table": x.table}, x.grad_rows)


def _stock(backward: Backward, lookup: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Any, float], Prepared]:
    """PyTorch's way to every mode, with its dense gradient by ``backward``."""

    def build(x: SimpleNamespace, dropout: float) -> Prepared:  # noqa: ARG001
        def dense() -> Tensor:
            return backward(x.grad_rows, x.ids, x.rows, x.padding)

        if x.mode == "lookup":
            return _lookup(x, lookup)
        if x.mode == "accumulate":
            buffer = _buffer(x)
            return Prepared(None, lambda: {"grad": buffer.add_(dense())})
        if x.mode == "rows":
            if backward is not aten_backward:
                raise NotImplementedError("no sparse gradient")

            def rows() -> dict[str, Tensor]:
                found = torch.ops.aten.embedding_sparse_backward(x.grad_rows, x.ids, x.rows, x.padding, False)
                return {"values": found.coalesce().values()}

            return Prepared(None, rows)
        if x.mode == "plan":
            if backward is not aten_backward:
                raise NotImplementedError("no plan of its own")
            return Prepared(lambda: _sorted(x), lambda: _as_numbers(*_sorted(x)))
        return Prepared(None, lambda: {"grad": dense()})

    return build


def _sorted(x: SimpleNamespace) -> tuple[Tensor, Tensor, Tensor]:
    """Order, rows in use, offsets: a stable sort and its runs; how many there are is waited for."""
    keys, order = x.ids.sort(stable=True)
    rows, sizes = keys.unique_consecutive(return_counts=True)
    return order, rows, sizes


def _as_numbers(order: Tensor, rows: Tensor, sizes: Tensor) -> dict[str, Tensor]:
    offsets = torch.cat((sizes.new_zeros(1), sizes.cumsum(0)))
    return {"order": order.double(), "rows": rows.double(), "offsets": offsets.double()}


def _ours(backend: Backend | None, plan_ready: bool = False) -> Callable[[Any, float], Prepared]:
    def build(x: SimpleNamespace, dropout: float) -> Prepared:  # noqa: ARG001
        padding = None if x.padding < 0 else x.padding

        def plan() -> ek.EmbeddingPlan:
            return ek.embedding_plan(x.ids, x.rows, padding_idx=padding, backend=backend)

        made = plan() if plan_ready else None

        def reduced(**options: Any) -> Any:
            return ek.embedding_grad(x.grad_rows, made or plan(), backend=backend, **options)

        if x.mode == "lookup":
            if plan_ready or backend == "extension":
                raise NotImplementedError("the lookup makes its plan")
            return _lookup(x, lambda table, ids: ek.embedding(ids, table, padding_idx=padding, backend=backend))
        if x.mode == "accumulate":
            buffer = _buffer(x)
            return Prepared(None, lambda: {"grad": reduced(out=buffer)})
        if x.mode == "rows":
            return Prepared(None, lambda: {"values": reduced(mode="rows").values[: x.used]})
        if x.mode == "plan":
            if plan_ready:
                raise NotImplementedError("the plan is what is measured")

            def numbers() -> dict[str, Tensor]:
                found = plan()
                parts = found.order, found.segment_ids[: x.used], found.segment_offsets[: x.used + 1]
                return dict(zip(("order", "rows", "offsets"), (part.double() for part in parts), strict=True))

            return Prepared(plan, numbers)
        if plan_ready or backend is not None:
            return Prepared(None, lambda: {"grad": reduced()})
        return Prepared(
            None,
            lambda: {"grad": torch.ops.embedkernels.embedding_backward(x.grad_rows, x.ids, x.rows, x.padding)},
        )

    return build


def _liger(x: SimpleNamespace, dropout: float) -> Prepared:  # noqa: ARG001
    from liger_kernel.ops.experimental.embedding import LigerEmbeddingFunction

    if x.padding >= 0 or x.mode in ("rows", "plan"):
        raise NotImplementedError("has no padding_idx, no rows alone and no plan")
    if x.mode == "lookup":
        return _lookup(x, LigerEmbeddingFunction.apply)
    table = torch.zeros(x.rows, x.grad_rows.shape[1], dtype=x.grad_rows.dtype, device=x.ids.device)
    looked_up = LigerEmbeddingFunction.apply(table.requires_grad_(), x.ids)

    def dense() -> Tensor:
        return torch.autograd.grad(looked_up, table, x.grad_rows, retain_graph=True)[0]

    buffer = _buffer(x) if x.mode == "accumulate" else None
    return Prepared(None, lambda: {"grad": dense() if buffer is None else buffer.add_(dense())})


def _flag_gems(rows: Tensor, ids: Tensor, count: int, padding: int) -> Tensor:
    from flag_gems.ops.embedding import embedding_backward

    return embedding_backward(rows, ids, count, padding, False, False)


def _flag_gems_lookup(table: Tensor, ids: Tensor) -> Tensor:
    from flag_gems.ops.embedding import Embedding

    return Embedding.apply(table, ids, -1, False, False)


def contestants(tiny: bool) -> list[Rival]:
    """The first one is the yardstick."""
    found = [
        Rival("eager", _stock(aten_backward, aten_lookup)),
        Rival("ours", _ours(None), ours=True, required=True),
        Rival("ours, plan ready", _ours(None, plan_ready=True), ours=True),
        Rival("ours in Triton", _ours("triton"), ours=True, wave=OTHERS),
        Rival("torch.compile", _stock(compiled(aten_backward, tiny), compiled(aten_lookup, tiny)), wave=COMPILED),
    ]
    if "liger_kernel" not in absent():
        found.append(Rival("Liger", _liger, wave=OTHERS))
    if "flag_gems" not in absent():
        found.append(Rival("FlagGems", _stock(_flag_gems, _flag_gems_lookup), wave=OTHERS))
    return found

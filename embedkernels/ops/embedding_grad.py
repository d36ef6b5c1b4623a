"""The gradient of an embedding table: a deterministic sum of gradient rows with a plan of the ids.

``embedding_grad`` adds the gradient rows of every row of the table in fp32, in an order that does not depend on
timing, and writes the dense gradient, adds it to a buffer that is there, or keeps only the rows in use. The op
``torch.ops.embedkernels.embedding_backward`` makes the plan as well and stands behind every autograd formula that
needs a table's dense gradient and has no plan yet.
"""

# ruff: noqa: ARG001 (every function of an op takes the arguments of its schema)

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from embedkernels.ops import ids as id_errors
from embedkernels.ops.backend import Backend, check_stock_autograd, choose, needs_stock_autograd
from embedkernels.ops.eager import is_eager
from embedkernels.ops.embedding_plan import LIMIT, EmbeddingPlan, check_ids_tensor, make_plan
from embedkernels.reference import embedding as reference
from embedkernels.reference.embedding import ACCUMULATE, DENSE, PADDED_ROWS, ROWS

# What tables may hold: other dtypes have no arithmetic to add rows with.
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
Mode = Literal["dense", "accumulate", "rows"]
Rounding = Literal["nearest", "stochastic"]
_MODES: dict[str, int] = {"dense": DENSE, "accumulate": ACCUMULATE, "rows": ROWS}
_SEED_LIMIT = 2**63 - 1


@dataclass(frozen=True)
class RowGradient:
    """The gradient of the rows in use, and nothing for the others.

    Attributes:
        ids: int32 (C), C = min(N, V): the rows in use, ascending, in the first ``count`` elements.
        values: (C, D), their gradients; what lies behind ``count`` means nothing.
        count: int32 (1), on the device; reading it waits for it.
        num_rows: V, rows of the table.
    """

    ids: Tensor
    values: Tensor
    count: Tensor
    num_rows: int

    def to_sparse(self) -> Tensor:
        """A coalesced ``torch.sparse_coo`` tensor (V, D). Waits for the device to know how many rows there are."""
        count = int(self.count)
        return self._sparse(self.ids[:count].long(), self.values[:count], is_coalesced=True)

    def to_padded_sparse(self) -> Tensor:
        """The same without waiting: C rows, of which those behind ``count`` repeat a row in use and must be zeros.

        Not coalesced, since an id comes more than once.
        """
        used = torch.arange(self.ids.numel(), device=self.ids.device) < self.count
        some = torch.where(self.count > 0, self.ids[:1], 0)
        return self._sparse(torch.where(used, self.ids, some).long(), self.values, is_coalesced=False)

    def _sparse(self, ids: Tensor, values: Tensor, is_coalesced: bool) -> Tensor:
        size = (self.num_rows, values.shape[1])
        return torch.sparse_coo_tensor(ids[None], values, size, check_invariants=False, is_coalesced=is_coalesced)


def names(dtypes: tuple[torch.dtype, ...]) -> str:
    """The dtypes in words, for a message."""
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def embedding_grad(
    grad_rows: Tensor,
    plan: EmbeddingPlan,
    *,
    out: Tensor | None = None,
    mode: Mode | None = None,
    bags: Tensor | None = None,
    per_sample_weights: Tensor | None = None,
    scale_grad_by_freq: bool = False,
    rounding: Rounding = "nearest",
    generator: torch.Generator | None = None,
    backend: Backend | None = None,
) -> Tensor | RowGradient:
    """Gradient of a table: for every row r, the sum of ``grad_rows`` at the positions where the ids were r.

    Added in fp32 (fp64 for double) and rounded once, bitwise reproducible, without atomics and without waiting for
    the device. Serves tables of any height: token tables, and those of positions or types with a few rows.

    Args:
        grad_rows: (N, D) or (*ids.shape, D), float32, bfloat16, float16 or float64, any strides. With
            ``bags`` (B, D).
        plan: of the ids, on the same device.
        out: (V, D), contiguous, of the dtype of ``grad_rows``, or one of the two float32 and the other bfloat16 or
            float16: written or added to, and returned. With ``mode="rows"`` the memory of the values,
            (at least min(N, V), D).
        mode: ``"dense"``: every row of the table is written, zeros included. ``"accumulate"``: added to ``out``, of
            which no other row is touched: a ``.grad`` or fp32 ``main_grad`` that is there. ``"rows"``: the rows in
            use alone. None: ``"accumulate"`` with ``out``, else ``"dense"``.
        bags: int32 or int64 (N), the row of ``grad_rows`` that belongs to each position: sums of ``nn.EmbeddingBag``,
            whose bags share one gradient row. On a GPU what lies outside adds nothing.
        per_sample_weights: (N), a factor for each position.
        scale_grad_by_freq: divide every row by the number of its positions, as in ``nn.Embedding``.
        rounding: ``"stochastic"`` rounds sums added to bfloat16 up or down at random so that the mean is right and
            many small addends do not stall.
        generator: of the device, for ``"stochastic"``; None is the default one.
        backend: ``"extension"``, ``"triton"``, ``"torch"`` or None for the best there is.

    Returns:
        Tensor (V, D) in the dtype of ``grad_rows``, or ``out``; with ``mode="rows"`` a RowGradient. Without ``out``
        the dense gradient is differentiable in ``grad_rows`` and ``per_sample_weights``.

    Raises:
        TypeError: grad_rows, out, bags or per_sample_weights of another dtype.
        ValueError: shapes or devices that do not fit, an unknown mode or rounding, stochastic rounding of anything
            but sums added to bfloat16.
        RuntimeError: ``out`` or ``mode="rows"`` where a gradient is asked for through the result.
        IndexError: on a CPU, a bag that is no row of ``grad_rows``.
        NotImplementedError: a forward-mode tangent or a transform of ``torch.func`` on a backend that was asked for
            and is not ``"torch"``.

    Example:
        >>> import torch, embedkernels as ek
        >>> plan = ek.embedding_plan(torch.tensor([1, 3, 1]), 4)
        >>> ek.embedding_grad(torch.ones(3, 2), plan)[:, 0].tolist()
        [0.0, 2.0, 0.0, 1.0]
        >>> rows = ek.embedding_grad(torch.ones(3, 2), plan, mode="rows")
        >>> rows.ids[: int(rows.count)].tolist()
        [1, 3]
    """
    op = "embedding_grad"
    if mode is None:
        mode = "dense" if out is None else "accumulate"
    if mode not in get_args(Mode):
        raise ValueError(f"{op}: mode must be dense, accumulate or rows, got {mode!r}")
    n, device = plan.order.numel(), plan.order.device
    _check_grad_rows(grad_rows, None if bags is not None else n, device, op)
    _check_out(out, grad_rows, plan, mode, op)
    sources, weights = _checked_bags(bags, grad_rows, n, op), _checked_weights(per_sample_weights, grad_rows, n, op)
    if rounding not in get_args(Rounding):
        raise ValueError(f"{op}: rounding must be nearest or stochastic, got {rounding!r}")
    stochastic = rounding == "stochastic"
    if stochastic and (mode != "accumulate" or out is None or out.dtype != torch.bfloat16):
        raise ValueError(f"{op}: stochastic rounding is for sums that are added to a bfloat16 out")
    id_errors.begin_without_ids(device)
    rows = grad_rows.reshape(-1, grad_rows.shape[-1]) if grad_rows.dim() != 2 else grad_rows
    if mode == "dense" and out is None:
        if needs_stock_autograd(grad_rows, per_sample_weights):
            check_stock_autograd(op, device, backend)
            return reference.embedding_grad_dense(
                rows, *plan.parts, plan.num_rows, sources, weights, scale_grad_by_freq
            )
        return dense_grad(rows, plan, sources, weights, scale_grad_by_freq, backend)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (grad_rows, weights, out)):
        raise RuntimeError(
            f"{op}: only the dense gradient without out is differentiable: detach the arguments or use no_grad()"
        )
    seed = None
    if stochastic:
        seed = torch.randint(0, _SEED_LIMIT, (1,), dtype=torch.int64, device=device, generator=generator)
    if out is None:
        out = rows.new_empty((plan.capacity, rows.shape[1]))
    reduce_into(out, rows, plan, _MODES[mode], sources, weights, scale_grad_by_freq, seed, backend)
    if mode == "rows":
        capacity = plan.capacity
        return RowGradient(plan.segment_ids[:capacity], out[:capacity], plan.count, plan.num_rows)
    return out


def _check_grad_rows(grad_rows: Tensor, n: int | None, device: torch.device, op: str) -> None:
    if not isinstance(grad_rows, Tensor):
        raise TypeError(f"{op}: grad_rows must be a Tensor, got {type(grad_rows).__name__}")
    if grad_rows.dtype not in DTYPES:
        raise TypeError(f"{op}: grad_rows must be one of {names(DTYPES)}, got {grad_rows.dtype}")
    if n is None and grad_rows.dim() != 2:
        raise ValueError(f"{op}: grad_rows must have one row for each bag, got shape {tuple(grad_rows.shape)}")
    if n is not None and (grad_rows.dim() < 1 or grad_rows.shape[:-1].numel() != n):
        raise ValueError(
            f"{op}: grad_rows must have one row for each of the {n} ids, got shape {tuple(grad_rows.shape)}"
        )
    if grad_rows.device != device:
        raise ValueError(f"{op}: grad_rows is on {grad_rows.device}, the ids are on {device}")


def _check_out(out: Tensor | None, grad_rows: Tensor, plan: EmbeddingPlan, mode: Mode, op: str) -> None:
    if out is None:
        if mode == "accumulate":
            raise ValueError(f"{op}: mode 'accumulate' needs an out to add to")
        return
    if not isinstance(out, Tensor):
        raise TypeError(f"{op}: out must be a Tensor, got {type(out).__name__}")
    given, wanted = {grad_rows.dtype, out.dtype}, {torch.float32, torch.bfloat16, torch.float16}
    if len(given) == 2 and not (given <= wanted and torch.float32 in given):
        raise TypeError(
            f"{op}: out must be of grad_rows' dtype, or one of the two float32 and the other bfloat16 or float16; "
            f"got {out.dtype} for {grad_rows.dtype}"
        )
    width = grad_rows.shape[-1]
    at_least = "at least " if mode == "rows" else ""
    rows = plan.capacity if mode == "rows" else plan.num_rows
    fits = out.dim() == 2 and out.shape[1] == width and (out.shape[0] == rows or (at_least and out.shape[0] > rows))
    if not fits:
        raise ValueError(f"{op}: out must have shape ({at_least}{rows}, {width}), got {tuple(out.shape)}")
    if out.device != plan.order.device:
        raise ValueError(f"{op}: out is on {out.device}, the ids are on {plan.order.device}")
    if out.untyped_storage().data_ptr() == grad_rows.untyped_storage().data_ptr() and out.numel() > 0:
        raise ValueError(f"{op}: out and grad_rows must not share memory")
    if not out.is_contiguous():
        raise ValueError(f"{op}: out must be contiguous, got strides {out.stride()}")


def _checked_bags(bags: Tensor | None, grad_rows: Tensor, n: int, op: str) -> Tensor | None:
    """As int32; on a CPU an IndexError for what is no row of ``grad_rows``."""
    if bags is None:
        return None
    check_ids_tensor(bags, op)
    if tuple(bags.shape) != (n,):
        raise ValueError(f"{op}: bags must have shape ({n},), one for each id, got {tuple(bags.shape)}")
    if bags.device != grad_rows.device:
        raise ValueError(f"{op}: bags is on {bags.device}, grad_rows is on {grad_rows.device}")
    if bags.device.type == "cpu":
        id_errors.check_ids(bags, grad_rows.shape[0], "bag", op)
    # Clamped first: what is out of range stays so where it does not fit into 32 bits.
    return bags.clamp(-1, grad_rows.shape[0]).to(torch.int32).contiguous()


def _checked_weights(weights: Tensor | None, grad_rows: Tensor, n: int, op: str) -> Tensor | None:
    """In the dtype that rows are added in."""
    if weights is None:
        return None
    if not isinstance(weights, Tensor) or weights.dtype not in DTYPES:
        what = weights.dtype if isinstance(weights, Tensor) else type(weights).__name__
        raise TypeError(f"{op}: per_sample_weights must be a Tensor, one of {names(DTYPES)}, got {what}")
    if weights.numel() != n:
        raise ValueError(
            f"{op}: per_sample_weights must have one element for each of the {n} ids, got {weights.numel()}"
        )
    if weights.device != grad_rows.device:
        raise ValueError(f"{op}: per_sample_weights is on {weights.device}, grad_rows is on {grad_rows.device}")
    wide = torch.float64 if grad_rows.dtype == torch.float64 else torch.float32
    return weights.reshape(-1).to(wide).contiguous()


def dense_grad(
    rows: Tensor, plan: EmbeddingPlan, sources: Tensor | None = None, weights: Tensor | None = None,
    scale_by_freq: bool = False, backend: str | None = None,
) -> Tensor:  # fmt: skip
    """:func:`embedding_grad`'s dense gradient without its checks: differentiable where gradients are recorded."""
    tensors = (rows, *plan.parts, sources, weights)
    if is_eager(*tensors) and not (
        torch.is_grad_enabled() and (rows.requires_grad or (weights is not None and weights.requires_grad))
    ):
        return _dense(rows, plan, sources, weights, scale_by_freq, backend)
    out: Tensor = torch.ops.embedkernels.embedding_grad(
        rows, *plan.parts, plan.num_rows, sources, weights, scale_by_freq, backend or "auto"
    )
    return out


def _dense(
    rows: Tensor, plan: EmbeddingPlan, sources: Tensor | None, weights: Tensor | None, scale_by_freq: bool,
    backend: str | None,
) -> Tensor:  # fmt: skip
    out = rows.new_empty((plan.num_rows, rows.shape[1]))
    _reduce(out, rows, plan, DENSE, sources, weights, scale_by_freq, None, backend)
    return out


def reduce_into(
    out: Tensor, rows: Tensor, plan: EmbeddingPlan, mode: int, sources: Tensor | None = None,
    weights: Tensor | None = None, scale_by_freq: bool = False, seed: Tensor | None = None,
    backend: str | None = None,
) -> None:  # fmt: skip
    """Write the sums of gradient rows into ``out``; the modes are those of ``embedkernels.reference.embedding``."""
    tensors = (out, rows, *plan.parts, sources, weights, seed)
    if is_eager(*tensors):
        _reduce(out, rows, plan, mode, sources, weights, scale_by_freq, seed, backend)
        torch.autograd.graph.increment_version(out)
        return
    torch.ops.embedkernels.embedding_grad_out(
        out, rows, *plan.parts, mode, sources, weights, scale_by_freq, seed, backend or "auto"
    )


def _reduce(
    out: Tensor, rows: Tensor, plan: EmbeddingPlan, mode: int, sources: Tensor | None, weights: Tensor | None,
    scale_by_freq: bool, seed: Tensor | None, backend: str | None,
) -> None:  # fmt: skip
    chosen = choose("embedding_grad", rows.device, backend).backend
    if out.numel() == 0:
        return
    if plan.order.numel() == 0 or rows.shape[0] == 0:
        if mode in (DENSE, PADDED_ROWS):
            out.zero_()
        elif mode == ROWS:
            out[: plan.capacity].zero_()
        return
    if rows.shape[1] > 1 and rows.stride(1) != 1:
        rows = rows.contiguous()
    given = (out, rows, *plan.parts, mode, sources, weights, scale_by_freq, seed)
    with torch.no_grad():
        if chosen == "extension":
            torch.ops.embedkernels_ext.embedding_grad(*given)
        elif chosen == "triton":
            from embedkernels.kernels.embedding_grad import embedding_grad as kernels

            with torch.cuda.device_of(rows):
                kernels(*given)
        else:
            reference.embedding_grad(*given)


def _aten_cpu(rows: Tensor, ids: Tensor, num_rows: int, padding: int, scale_by_freq: bool) -> Tensor:
    """PyTorch's CPU kernel: each thread owns rows of the table and walks the ids in order, so it is deterministic.

    It adds in the dtype of ``rows``, hence the fp32 copy of 16-bit gradients.
    """
    out_of_range = (ids < 0) | (ids >= num_rows)
    ids = ids.masked_fill(out_of_range, padding)  # the kernel skips padding, -1 included
    wide = rows if rows.dtype == torch.float64 else rows.float()
    if scale_by_freq:  # its own counts read ids of -1 out of bounds
        kept = ids.clamp(min=0)
        counts = torch.zeros(num_rows, dtype=wide.dtype, device=ids.device).index_add_(
            0, kept, (ids != padding).to(wide.dtype)
        )
        wide = wide * counts.clamp_(min=1).reciprocal_()[kept][:, None]
    return torch.ops.aten.embedding_dense_backward(wide, ids, num_rows, padding, False).to(rows.dtype)


_library = torch.library.Library("embedkernels", "FRAGMENT")
_library.define(
    "embedding_backward(Tensor grad_rows, Tensor ids, SymInt num_rows, int padding_idx, str backend='auto', "
    "bool scale_by_freq=False) -> Tensor"
)
_PLAN = "Tensor order, Tensor segment_ids, Tensor segment_offsets, Tensor count"
_library.define(
    f"embedding_grad(Tensor grad_rows, {_PLAN}, SymInt num_rows, Tensor? sources=None, Tensor? weights=None, "
    "bool scale_by_freq=False, str backend='auto') -> Tensor"
)
_library.define(
    # No argument of an op may be called ``mode``: torch calls implementations with a keyword of that name.
    f"embedding_grad_out(Tensor(a!) out, Tensor grad_rows, {_PLAN}, int kind, Tensor? sources=None, "
    "Tensor? weights=None, bool scale_by_freq=False, Tensor? seed=None, str backend='auto') -> ()"
)


def backward(
    grad_rows: Tensor,
    ids: Tensor,
    num_rows: int,
    padding_idx: int,
    backend: str = "auto",
    scale_by_freq: bool = False,
) -> Tensor:
    """The dense gradient (V, D) from ids: ``torch.ops.embedkernels.embedding_backward``, not differentiable."""
    op = "embedding_backward"
    check_ids_tensor(ids, op)
    n = ids.numel()
    _check_grad_rows(grad_rows, n, ids.device, op)
    if not 0 <= num_rows < LIMIT:
        raise ValueError(f"{op}: num_rows must be 0 to {LIMIT - 1}, got {num_rows}")
    chosen = choose("embedding_grad", grad_rows.device, backend).backend
    width = grad_rows.shape[-1]
    rows = grad_rows.reshape(n, width)
    if 0 in (n, width, num_rows):
        return grad_rows.new_zeros((num_rows, width))
    if chosen == "torch" and rows.device.type == "cpu":
        return _aten_cpu(rows, ids.reshape(-1), num_rows, padding_idx, scale_by_freq)
    plan = make_plan(ids, num_rows, padding_idx, backend=chosen)
    return _dense(rows, plan, None, None, scale_by_freq, chosen)


_library.impl("embedding_backward", backward, "CompositeExplicitAutograd")


@torch.library.register_fake("embedkernels::embedding_backward", lib=_library)
def _backward_fake(
    grad_rows: Tensor,
    ids: Tensor,
    num_rows: int,
    padding_idx: int,
    backend: str = "auto",
    scale_by_freq: bool = False,
) -> Tensor:
    return grad_rows.new_empty((num_rows, grad_rows.shape[-1]))


def _backward_setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    grad_rows, ids, ctx.num_rows, ctx.padding_idx, ctx.backend, ctx.scale_by_freq = inputs
    ctx.shape = grad_rows.shape
    ctx.save_for_backward(ids)


def _double_backward(ctx, grad):  # type: ignore[no-untyped-def]
    """The op is linear in grad_rows: its adjoint looks the rows up again, zero where an id was dropped."""
    (ids,) = ctx.saved_tensors
    dropped = (ids < 0) | (ids >= ctx.num_rows) | (ids == ctx.padding_idx)
    rows = _rows_or_zeros(grad, ids, dropped)
    if ctx.scale_by_freq:
        rows = rows * _shares(torch.where(dropped, -1, ids.long()), ctx.num_rows, rows.dtype)[..., None]
    return rows.reshape(ctx.shape), None, None, None, None, None


def _rows_or_zeros(table: Tensor, ids: Tensor, dropped: Tensor) -> Tensor:
    if table.shape[0] == 0:  # then every id is dropped, and there is no row to look up in their place
        return table.new_zeros((*ids.shape, table.shape[1]))
    return F.embedding(ids.masked_fill(dropped, 0), table).masked_fill(dropped[..., None], 0)


def _shares(rows: Tensor, num_rows: int, dtype: torch.dtype) -> Tensor:
    """For every position 1 / (positions with the same row); ``rows`` is int64, -1 where there is none."""
    counts = torch.zeros(num_rows + 1, dtype=torch.int64, device=rows.device)
    counts.scatter_add_(0, (rows.reshape(-1) + 1), torch.ones_like(rows.reshape(-1)))
    return counts[rows + 1].to(dtype).reciprocal()


torch.library.register_autograd(
    "embedkernels::embedding_backward", _double_backward, setup_context=_backward_setup_context, lib=_library
)


def _grad_impl(
    grad_rows: Tensor, order: Tensor, segment_ids: Tensor, segment_offsets: Tensor, count: Tensor, num_rows: int,
    sources: Tensor | None = None, weights: Tensor | None = None, scale_by_freq: bool = False, backend: str = "auto",
) -> Tensor:  # fmt: skip
    op = "embedding_grad"
    n = order.numel()
    _check_grad_rows(grad_rows, n if sources is None else None, order.device, op)
    id_errors.raise_pending(grad_rows.device)
    plan = EmbeddingPlan(order, segment_ids, segment_offsets, count, num_rows)
    rows = grad_rows if grad_rows.dim() == 2 else grad_rows.reshape(n, grad_rows.shape[-1])
    return _dense(rows, plan, sources, weights, scale_by_freq, backend)


_library.impl("embedding_grad", _grad_impl, "CompositeExplicitAutograd")


@torch.library.register_fake("embedkernels::embedding_grad", lib=_library)
def _grad_fake(
    grad_rows: Tensor, order: Tensor, segment_ids: Tensor, segment_offsets: Tensor, count: Tensor, num_rows: int,
    sources: Tensor | None = None, weights: Tensor | None = None, scale_by_freq: bool = False, backend: str = "auto",
) -> Tensor:  # fmt: skip
    return grad_rows.new_empty((num_rows, grad_rows.shape[-1]))


def _grad_setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    grad_rows, *parts, ctx.num_rows, sources, weights, ctx.scale_by_freq, ctx.backend = inputs
    ctx.shape = grad_rows.shape
    # The rows themselves matter to the weights' gradient alone.
    kept = grad_rows if weights is not None and ctx.needs_input_grad[7] else None
    ctx.save_for_backward(*parts, sources, weights, kept)


def _grad_backward(ctx, grad):  # type: ignore[no-untyped-def]
    *parts, sources, weights, kept = ctx.saved_tensors
    at = reference.planned_rows(*parts)
    looked_up = _rows_or_zeros(grad, at, at < 0)
    if ctx.scale_by_freq:
        looked_up = looked_up * _shares(at, ctx.num_rows, grad.dtype)[:, None]
    outside = at < 0
    if sources is not None:
        outside = (sources < 0) | (sources >= ctx.shape[0])
        looked_up = looked_up.masked_fill(outside[:, None], 0)
    rows_grad = weights_grad = None
    if ctx.needs_input_grad[0]:
        rows_grad = looked_up if weights is None else (looked_up * weights[:, None]).to(grad.dtype)
        if sources is None:
            rows_grad = rows_grad.reshape(ctx.shape)
        else:
            rows_grad = torch.ops.embedkernels.embedding_backward(rows_grad, sources, ctx.shape[0], -1, ctx.backend)
    if kept is not None:
        flat = kept.reshape(-1, kept.shape[-1])
        mine = flat if sources is None else _rows_or_zeros(flat, sources, outside)
        weights_grad = (looked_up.to(weights.dtype) * mine.to(weights.dtype)).sum(-1)
    return rows_grad, None, None, None, None, None, None, weights_grad, None, None


torch.library.register_autograd(
    "embedkernels::embedding_grad", _grad_backward, setup_context=_grad_setup_context, lib=_library
)


def _out_impl(
    out: Tensor, grad_rows: Tensor, order: Tensor, segment_ids: Tensor, segment_offsets: Tensor, count: Tensor,
    kind: int, sources: Tensor | None = None, weights: Tensor | None = None, scale_by_freq: bool = False,
    seed: Tensor | None = None, backend: str = "auto",
) -> None:  # fmt: skip
    num_rows = out.shape[0]
    plan = EmbeddingPlan(order, segment_ids, segment_offsets, count, num_rows)
    _reduce(out, grad_rows, plan, kind, sources, weights, scale_by_freq, seed, backend)


_library.impl("embedding_grad_out", _out_impl, "CompositeExplicitAutograd")
torch.library.register_fake("embedkernels::embedding_grad_out", lambda *_, **__: None, lib=_library)

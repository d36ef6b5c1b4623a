"""The plan of a table's gradient: which gradient rows meet in which row, from the ids alone.

It is made once and used by whoever needs it. A lookup has it made beside its forward (:func:`early_plan`), where the
device has time for it.
"""

# ruff: noqa: ARG001 (every function of an op takes the arguments of its schema)

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from embedkernels.ops import ids as id_errors
from embedkernels.ops.arguments import checked_int
from embedkernels.ops.backend import Backend, choose
from embedkernels.ops.eager import is_eager
from embedkernels.reference import embedding as reference

_ID_DTYPES = (torch.int32, torch.int64)
LIMIT = 2**31
# Up to so many ids a plan is one launch (csrc/cuda/plan_small.cuh), which takes less time than handing it to a second
# stream.
_ONE_LAUNCH = 5120


@dataclass(frozen=True)
class EmbeddingPlan:
    """Which gradient rows meet in which row of a table.

    Attributes:
        order: int32 (N), positions in the flattened ids; the kept ones first, sorted stably by id.
        segment_ids: int32 (N), the distinct kept rows, ascending, in the first ``count`` elements.
        segment_offsets: int32 (N + 1), segment s is ``order[segment_offsets[s]:segment_offsets[s + 1]]``.
        count: int32 (1), number of segments; on the device, reading it waits for it.
        num_rows: rows of the table, or of the shard.
    """

    order: Tensor
    segment_ids: Tensor
    segment_offsets: Tensor
    count: Tensor
    num_rows: int

    @property
    def parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``order``, ``segment_ids``, ``segment_offsets`` and ``count``."""
        return self.order, self.segment_ids, self.segment_offsets, self.count

    @property
    def capacity(self) -> int:
        """The most segments that there can be: min(N, V). A row-sparse gradient has memory for so many rows."""
        return min(self.order.numel(), self.num_rows)


def check_ids_tensor(ids: Tensor, op: str) -> None:
    """TypeError unless ``ids`` is an int32 or int64 tensor, ValueError if it has 2**31 elements or more."""
    if not isinstance(ids, Tensor):
        raise TypeError(f"{op}: ids must be a Tensor, got {type(ids).__name__}")
    if ids.dtype not in _ID_DTYPES:
        raise TypeError(f"{op}: ids must be int32 or int64, got {ids.dtype}")
    if ids.numel() >= LIMIT:
        raise ValueError(f"{op}: ids has {ids.numel()} elements, at most {LIMIT - 1} are supported")


def normalized_padding(padding_idx: int | None, num_rows: int, op: str, name: str = "padding_idx") -> int:
    """``padding_idx`` counted from the front, -1 for None. Negative values count from the end, as in nn.Embedding."""
    if padding_idx is None:
        return -1
    padding_idx = checked_int(padding_idx, name, op)
    if not -num_rows <= padding_idx < num_rows:
        raise ValueError(
            f"{op}: {name} {padding_idx} is out of range for a table of {num_rows} rows: "
            f"expected {-num_rows} to {num_rows - 1}"
        )
    return padding_idx % num_rows


def embedding_plan(
    ids: Tensor,
    num_embeddings: int,
    *,
    padding_idx: int | None = None,
    ignore: Tensor | int | None = None,
    vocab_start: int = 0,
    vocab_end: int | None = None,
    backend: Backend | None = None,
) -> EmbeddingPlan:
    """Sort ids into segments, one per distinct row of the table, without waiting for the device.

    What is dropped costs nothing later: padding, ignored positions, ids of other shards, ids out of range.

    Args:
        ids: int32 or int64, any shape, fewer than 2**31 elements.
        num_embeddings: V, rows of the whole table.
        padding_idx: the id whose row gets no gradient. Negative values count from the end of the table.
        ignore: positions that get no gradient, bool in the shape of ``ids`` (True: dropped); or an id, taken as it
            is.
        vocab_start, vocab_end: this shard holds the rows vocab_start to vocab_end - 1 of the table, and row
            vocab_start is its row 0. None is the table's end.
        backend: ``"extension"``, ``"triton"``, ``"torch"`` or None for the best there is.

    Returns:
        EmbeddingPlan: for :func:`embedding_grad`.

    Raises:
        TypeError: ids that are not int32 or int64, an ``ignore`` that is neither bool tensor nor int, numbers that
            are not ints.
        ValueError: too many ids or rows, a shard that is not one of the table, a padding_idx out of range, an
            ``ignore`` of another shape or device, two ids to ignore.

    Example:
        >>> import torch, embedkernels as ek
        >>> plan = ek.embedding_plan(torch.tensor([[5, 2, 5, 0]]), 10, padding_idx=0)
        >>> plan.segment_ids[: int(plan.count)].tolist()
        [2, 5]
    """
    op = "embedding_plan"
    check_ids_tensor(ids, op)
    id_errors.begin_without_ids(ids.device)
    num_embeddings = checked_int(num_embeddings, "num_embeddings", op)
    if not 0 <= num_embeddings < 2**63 - LIMIT:
        raise ValueError(f"{op}: num_embeddings must be 0 to {2**63 - LIMIT - 1}, got {num_embeddings}")
    start = checked_int(vocab_start, "vocab_start", op)
    end = num_embeddings if vocab_end is None else checked_int(vocab_end, "vocab_end", op)
    if not 0 <= start <= end <= num_embeddings:
        raise ValueError(
            f"{op}: vocab_start and vocab_end must be a part of the table's {num_embeddings} rows, "
            f"got {start} and {end}"
        )
    if end - start >= LIMIT:
        raise ValueError(f"{op}: a table or shard must have at most {LIMIT - 1} rows, got {end - start}")
    padding = normalized_padding(padding_idx, num_embeddings, op)
    ignored = None
    if isinstance(ignore, Tensor):
        ignored = _checked_mask(ignore, ids, op)
    elif ignore is not None:
        if padding_idx is not None:
            raise ValueError(
                f"{op}: give one id to ignore, as padding_idx or as ignore; got {padding_idx} and {ignore}"
            )
        padding = max(checked_int(ignore, "ignore", op), -1)  # no negative id is kept anyway
    if is_eager(ids, ignored):
        return make_plan(
            ids, end - start, padding, start, ignored, choose("embedding_grad", ids.device, backend).backend
        )
    order, segment_ids, offsets, count = torch.ops.embedkernels.embedding_plan(
        ids, end - start, padding, start, ignored, backend or "auto"
    )
    return EmbeddingPlan(order, segment_ids, offsets, count, end - start)


def _checked_mask(ignore: Tensor, ids: Tensor, op: str) -> Tensor:
    if ignore.dtype != torch.bool:
        raise TypeError(f"{op}: ignore must be a bool tensor or an int, got {ignore.dtype}")
    if ignore.shape != ids.shape:
        raise ValueError(f"{op}: ignore must have the shape of ids, {tuple(ids.shape)}, got {tuple(ignore.shape)}")
    if ignore.device != ids.device:
        raise ValueError(f"{op}: ignore is on {ignore.device}, ids is on {ids.device}")
    return ignore


def make_plan(
    ids: Tensor,
    num_rows: int,
    padding: int,
    start: int = 0,
    ignored: Tensor | None = None,
    backend: Backend = "torch",
) -> EmbeddingPlan:
    """:func:`embedding_plan` without its checks, on a given backend."""
    if backend == "extension":
        mask = None if ignored is None else ignored.contiguous()
        made = torch.ops.embedkernels_ext.embedding_plan(ids.contiguous(), num_rows, padding, start, mask)
    else:
        # The sort is most of it, and is PyTorch's own on both.
        made = reference.embedding_plan(ids, num_rows, padding, start, ignored)
    order, segment_ids, offsets, count = made
    return EmbeddingPlan(order, segment_ids, offsets, count, num_rows)


@dataclass(frozen=True)
class EarlyPlan:
    """A plan that another stream may still be working on; :meth:`ready` makes the current stream wait for it."""

    plan: EmbeddingPlan
    event: torch.cuda.Event | None = None

    def ready(self) -> EmbeddingPlan | None:
        """The plan, for launches on the current stream from now on; None in a capture, which can wait for no event
        from before it."""
        if self.event is None:
            return self.plan
        device = self.plan.order.device
        if id_errors.capturing(device):
            return None
        current = torch.cuda.current_stream(device)
        current.wait_event(self.event)
        # The memory belongs to the second stream, which PyTorch may hand out to others as well.
        for part in self.plan.parts:
            part.record_stream(current)
        return self.plan


# By device and stream, the stream on which its plans are made.
_beside: dict[tuple[int, int], torch.cuda.Stream] = {}


def early_plan(ids: Tensor, num_rows: int, padding: int, requested: str | None) -> EarlyPlan | None:
    """A plan for later, made on a GPU beside what the current stream does next; None where nothing is gained.

    That is on a CPU, where it is small, and within a capture, since the graph of a forward alone could not wait for
    the second stream: whoever needs the plan then makes it.
    """
    device = ids.device
    if device.type != "cuda" or ids.numel() <= _ONE_LAUNCH or id_errors.capturing(device):
        return None
    backend = choose("embedding_grad", device, requested).backend
    origin = torch.cuda.current_stream(device)
    beside = _beside.get((origin.device_index, origin.cuda_stream))
    if beside is None:
        beside = _beside[origin.device_index, origin.cuda_stream] = torch.cuda.Stream(device)
    beside.wait_stream(origin)
    with torch.cuda.stream(beside):
        plan = make_plan(ids, num_rows, padding, backend=backend)
        event = beside.record_event()
    ids.record_stream(beside)  # may be freed before the plan has read them
    return EarlyPlan(plan, event)


_library = torch.library.Library("embedkernels", "FRAGMENT")
_library.define(
    "embedding_plan(Tensor ids, SymInt num_rows, int padding_idx, SymInt vocab_start, Tensor? ignored=None, "
    "str backend='auto') -> (Tensor, Tensor, Tensor, Tensor)"
)


def _impl(
    ids: Tensor, num_rows: int, padding_idx: int, vocab_start: int, ignored: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    check_ids_tensor(ids, "embedding_plan")
    chosen = choose("embedding_grad", ids.device, backend).backend
    return make_plan(ids, num_rows, padding_idx, vocab_start, ignored, chosen).parts


_library.impl("embedding_plan", _impl, "CompositeExplicitAutograd")


@torch.library.register_fake("embedkernels::embedding_plan", lib=_library)
def _fake(
    ids: Tensor, num_rows: int, padding_idx: int, vocab_start: int, ignored: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    n = ids.numel()
    order, segment_ids, offsets, count = (ids.new_empty(size, dtype=torch.int32) for size in (n, n, n + 1, 1))
    return order, segment_ids, offsets, count

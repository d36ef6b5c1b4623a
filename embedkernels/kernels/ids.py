"""What a kernel does with an id outside its table: report the first one, never touch memory with it."""

import triton
import triton.language as tl

# The place of ``embed`` in ``embedkernels.ops.ids.OPS``.
EMBED = tl.constexpr(0)


@triton.jit
def report_bad_id(bad, ids, positions, rows, table, op, flag_ptr, record_ptr):
    """Record the first bad id of a block, once per device until the host has read it.

    ``bad`` (BLOCK,) bool, ``ids`` and ``positions`` (BLOCK,) int64, the rest scalars. The fields are those of
    ``embedkernels.ops.ids.ErrorState.record``.
    """
    if tl.max(bad.to(tl.int32), axis=0) != 0:
        if tl.atomic_cas(flag_ptr, 0, 1) == 0:
            first = tl.min(tl.where(bad, positions, 0x7FFFFFFFFFFFFFFF), axis=0)
            value = tl.sum(tl.where(positions == first, ids, 0), axis=0)
            tl.store(record_ptr + 1, table)
            tl.store(record_ptr + 2, value)
            tl.store(record_ptr + 3, first)
            tl.store(record_ptr + 4, rows)
            tl.store(record_ptr + 5, op)
            tl.store(record_ptr, 1)

"""The library's CUDA kernels, compiled for the host and run by a thread-block shim (see thread_block.h).

Built once per content of its sources, into ``build/shim`` next to the library's own objects.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from embedkernels.reference.embedding import DENSE

ROOT = Path(__file__).resolve().parents[3]
SHIM = Path(__file__).resolve().parent
DTYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
STOCHASTIC = 4  # bfloat16, rounded at random
FORWARD, REVERSE, SHUFFLED = 0, 1, 2
# Undefined behaviour (an index out of an array, an overflow) traps, and the shim reports the trap.
FLAGS = [
    *("-std=c++20", "-O1", "-fPIC", "-shared", "-DEMBEDKERNELS_HOST_SHIM", f"-I{SHIM}", "-U_FORTIFY_SOURCE"),
    *("-fsanitize=undefined", "-fsanitize-undefined-trap-on-error", "-fno-sanitize=vptr", "-Wno-unknown-pragmas"),
    "-ffp-contract=off",  # as the kernels ask nvcc for
]


def compiler() -> str:
    found = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")
    if found is None:
        pytest.skip("no C++ compiler")
    return found


@functools.cache
def library() -> ctypes.CDLL:
    sources = [SHIM / name for name in ("thread_block.cpp", "kernels.cpp", "faults.cpp")]
    read = [
        *sources,
        SHIM / "thread_block.h",
        *sorted((ROOT / "csrc").rglob("*.h")),
        *sorted((ROOT / "csrc").rglob("*.cuh")),
    ]
    digest = hashlib.sha256("".join(FLAGS).encode() + b"".join(path.read_bytes() for path in read)).hexdigest()[:16]
    target = ROOT / "build" / "shim" / f"shim-{digest}.so"
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        fresh = target.with_suffix(f".{os.getpid()}")
        subprocess.run([compiler(), *FLAGS, *map(str, sources), "-o", str(fresh)], check=True)
        fresh.replace(target)
    loaded = ctypes.CDLL(str(target))
    for name in ("shim_plan", "shim_grad", "shim_far", "shim_fault"):
        getattr(loaded, name).restype = ctypes.c_char_p
    return loaded


def _pointer(tensor: Tensor) -> ctypes.c_void_p:
    assert tensor.is_contiguous()
    return ctypes.c_void_p(tensor.data_ptr())


def _int64(value: int) -> ctypes.c_int64:
    return ctypes.c_int64(value)


def _raise(message: bytes | None) -> None:
    if message is not None:
        raise AssertionError(message.decode())


class Sorted(NamedTuple):
    """Bits that CUB was asked to sort by, from ``first_bit`` on (none: 0), and launches besides CUB's."""

    first_bit: int
    bits: int
    launches: int


def plan(
    ids: Tensor,
    num_rows: int,
    padding_idx: int = -1,
    vocab_start: int = 0,
    *,
    ignored: Tensor | None = None,
    order: int = FORWARD,
    at_start: bool = False,
    seed: int = 0,
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], Sorted]:
    """embedding_plan by the CUDA kernels' bodies, and how it was made."""
    n = ids.numel()
    out = tuple(torch.empty(size, dtype=torch.int32) for size in (n, n, n + 1, 1))
    how = (ctypes.c_int * 3)()
    _raise(
        library().shim_plan(
            *(_pointer(ids), None if ignored is None else _pointer(ignored), ids.element_size()),
            *(_int64(n), _int64(num_rows), _int64(padding_idx)),
            *(_int64(vocab_start), order, ctypes.c_uint64(seed), int(at_start)),
            *(_pointer(part) for part in out),
            how,
        )
    )
    return out, Sorted(*how)  # type: ignore[return-value]


class _GradCall(ctypes.Structure):
    """The same as in kernels.cpp."""

    _fields_ = [
        *((name, ctypes.c_int) for name in ("rows_dtype", "out_dtype", "vectors", "mode", "scale_by_freq")),
        *((name, ctypes.c_int) for name in ("schedule", "at_start")),
        ("schedule_seed", ctypes.c_uint64),
        *((name, ctypes.c_int64) for name in ("n", "row_count", "row_stride", "out_rows", "width")),
        *((name, ctypes.c_void_p) for name in ("grad_rows", "order", "segment_ids", "segment_offsets", "count")),
        *((name, ctypes.c_void_p) for name in ("sources", "weights", "seed", "out", "reads", "writes")),
        *((name, ctypes.c_int64) for name in ("loaded", "stored")),
    ]


@dataclass
class Grad:
    """What a run of the gradient's kernels left.

    Attributes:
        out: the output.
        reads, writes: of every element of ``out``, 0 or 1 (the shim fails at a second one).
        bytes: of all vectors loaded and stored, partial sums included.
        vectors: whether rows were moved in vectors.
    """

    out: Tensor
    reads: Tensor
    writes: Tensor
    bytes: int
    vectors: bool


def grad(
    grad_rows: Tensor,
    made: tuple[Tensor, Tensor, Tensor, Tensor],
    out: Tensor,
    mode: int = DENSE,
    *,
    vectors: bool = True,
    sources: Tensor | None = None,
    weights: Tensor | None = None,
    scale_by_freq: bool = False,
    seed: Tensor | None = None,
    order: int = FORWARD,
    at_start: bool = False,
    schedule_seed: int = 0,
) -> Grad:
    """embedding_grad by the CUDA kernels' bodies, on a copy of ``out``; in vectors where they fit, if at all."""
    out = out.clone()
    reads, writes = (torch.empty(out.shape, dtype=torch.uint8) for _ in range(2))
    tensors = dict(zip(("order", "segment_ids", "segment_offsets", "count"), made, strict=True))
    tensors.update(sources=sources, weights=weights, seed=seed, out=out, reads=reads, writes=writes)
    call = _GradCall(
        rows_dtype=DTYPES[grad_rows.dtype],
        out_dtype=DTYPES[out.dtype] if seed is None else STOCHASTIC,
        vectors=vectors,
        mode=mode,
        scale_by_freq=scale_by_freq,
        schedule=order,
        at_start=at_start,
        schedule_seed=schedule_seed,
        n=made[0].numel(),
        row_count=grad_rows.shape[0],
        row_stride=grad_rows.stride(0),
        out_rows=out.shape[0],
        width=out.shape[1],
        grad_rows=grad_rows.data_ptr(),
        **{name: None if tensor is None else _pointer(tensor) for name, tensor in tensors.items()},
    )
    _raise(library().shim_grad(ctypes.byref(call)))
    return Grad(out, reads, writes, call.loaded + call.stored, bool(call.vectors))

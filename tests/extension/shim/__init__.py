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
from pathlib import Path

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[3]
SHIM = Path(__file__).resolve().parent
DTYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
FORWARD, REVERSE, SHUFFLED = 0, 1, 2
# Undefined behaviour (an index out of an array, an overflow) traps, and the shim reports the trap.
FLAGS = [
    *("-std=c++20", "-O1", "-fPIC", "-shared", "-DEMBEDKERNELS_HOST_SHIM", f"-I{SHIM}", "-U_FORTIFY_SOURCE"),
    *("-fsanitize=undefined", "-fsanitize-undefined-trap-on-error", "-fno-sanitize=vptr", "-Wno-unknown-pragmas"),
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


def plan(
    ids: Tensor,
    num_rows: int,
    padding_idx: int = -1,
    vocab_start: int = 0,
    *,
    order: int = FORWARD,
    at_start: bool = False,
    seed: int = 0,
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], int]:
    """embedding_plan by the CUDA kernels' bodies; also the number of key bits that were sorted."""
    n = ids.numel()
    out = tuple(torch.empty(size, dtype=torch.int32) for size in (n, n, n + 1, 1))
    bits = ctypes.c_int(0)
    _raise(
        library().shim_plan(
            *(_pointer(ids), ids.element_size(), _int64(n), _int64(num_rows), _int64(padding_idx)),
            *(_int64(vocab_start), order, ctypes.c_uint64(seed), int(at_start)),
            *(_pointer(part) for part in out),
            ctypes.byref(bits),
        )
    )
    return out, bits.value  # type: ignore[return-value]


def grad(
    grad_rows: Tensor,
    made: tuple[Tensor, Tensor, Tensor, Tensor],
    num_rows: int,
    *,
    vectors: bool,
    order: int = FORWARD,
    at_start: bool = False,
    seed: int = 0,
) -> Tensor:
    """embedding_grad_dense by the CUDA kernels' bodies, in 16-byte vectors or one element at a time."""
    n, width = grad_rows.shape
    out = torch.empty(num_rows, width, dtype=grad_rows.dtype)
    _raise(
        library().shim_grad(
            *(DTYPES[grad_rows.dtype], int(vectors), _pointer(grad_rows), _int64(n), _int64(num_rows), _int64(width)),
            *(_pointer(part) for part in made),
            *(order, ctypes.c_uint64(seed), int(at_start), _pointer(out)),
        )
    )
    return out

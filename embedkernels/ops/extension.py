"""Loads the C++/CUDA library, once, and says what came of it.

``embedkernels/_extension.so`` is a plain shared library against PyTorch's stable ABI (2.11 and newer), built when the
package is installed. Without it everything works on the other backends; :func:`extension_status` says why it is not
there: not built, refused by ``EMBEDKERNELS_DISABLE_EXTENSION=1``, corrupt, or left over from another version.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import json
import os
import re
import threading
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

# What csrc/library.cpp must say: schemas and meaning of the ops that this version of the package calls.
INTERFACE = 2
_PACKAGE = Path(__file__).resolve().parent.parent
_LOCK = threading.Lock()
_REBUILD = "rebuild it with: python setup.py build_ext --inplace, or reinstall embedkernels"


@dataclass(frozen=True)
class ExtensionStatus:
    """What became of the C++/CUDA library.

    Attributes:
        loaded: its ops can be called on CPU tensors.
        cuda: its ops can be called on CUDA tensors: it has CUDA code, and so does this PyTorch.
        path: the file, None where there is none.
        reason: in a sentence, what it was built with, or why it is not loaded or lacks CUDA.
        architectures: what its CUDA code was compiled for, e.g. ``("sm_90", "compute_90")``; the last is PTX.
    """

    loaded: bool
    cuda: bool
    path: str | None
    reason: str
    architectures: tuple[str, ...]


def _refused(path: Path | None, reason: str) -> ExtensionStatus:
    return ExtensionStatus(False, False, None if path is None else str(path), reason, ())


def _record(package: Path, field: str) -> str:
    """What the build wrote down next to the library."""
    try:
        return str(json.loads((package / "_extension.json").read_text())[field])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _why_missing(package: Path) -> str:
    if _record(package, "built") == "True":
        return f"the C++ library was built, but _extension.so is gone: {_REBUILD}"
    why = _record(package, "reason")
    return f"the C++ library was not built: {why}" if why else "the C++ library was not built"


def _inspect(path: Path, package: Path) -> ExtensionStatus:
    """Load the file and ask it what it is.

    Raises:
        OSError: not a library, or not one for this machine and PyTorch.
        AttributeError: a library, but not this one.
    """
    # A file cut short can kill the process inside the system's loader: nothing is loaded that is not what was built.
    expected = _record(package, "sha256")
    if not expected:
        raise OSError("the build's record of its checksum, _extension.json, is missing or damaged")
    if hashlib.sha256(path.read_bytes()).hexdigest() != expected:
        raise OSError("its checksum is not the one that the build wrote down: the file is damaged")
    torch.ops.load_library(path)
    library = ctypes.CDLL(str(path))
    library.embedkernels_architectures.restype = ctypes.c_char_p
    interface = library.embedkernels_interface()
    if interface != INTERFACE:
        return _refused(
            path,
            f"{path.name} is of another version of embedkernels (interface {interface}, not {INTERFACE}): {_REBUILD}",
        )
    architectures = tuple(part for part in library.embedkernels_architectures().decode().split(",") if part)
    _register_fakes()
    reason = _record(package, "reason") or "C++"
    if not architectures:
        return ExtensionStatus(True, False, str(path), reason, ())
    reason = f"{reason} for {', '.join(architectures)}"
    if torch.version.cuda is None or not library.embedkernels_torch_has_cuda():
        return ExtensionStatus(True, False, str(path), f"{reason}; this PyTorch has no CUDA", architectures)
    return ExtensionStatus(True, True, str(path), reason, architectures)


def load(package: Path) -> ExtensionStatus:
    """Load the library in ``package``; on failure warn and say why. What :func:`extension_status` calls, once.

    Args:
        package: the folder that holds ``_extension.so`` and the build's ``_extension.json``.
    """
    path = package / "_extension.so"
    if os.environ.get("EMBEDKERNELS_DISABLE_EXTENSION", "0") == "1":
        return _refused(path if path.is_file() else None, "EMBEDKERNELS_DISABLE_EXTENSION=1 is set")
    if not path.is_file():
        status = _refused(None, _why_missing(package))
        if _record(package, "built") == "True":
            _warn(status)
        return status
    try:
        status = _inspect(path, package)
    except (OSError, AttributeError) as error:
        # PyTorch wraps the system loader's error in one that only names the file.
        text = " ".join(str(error.__cause__ or error).split())
        status = _refused(path, f"{path.name} cannot be loaded ({text}): {_REBUILD}")
    if not status.loaded:
        _warn(status)
    return status


def _warn(status: ExtensionStatus) -> None:
    warnings.warn(f"embedkernels runs without its C++ library: {status.reason}", RuntimeWarning, stacklevel=3)


@functools.cache
def _status() -> ExtensionStatus:
    return load(_PACKAGE)


def extension_status() -> ExtensionStatus:
    """Whether the C++/CUDA library is loaded, what it holds, and why. Loads it on the first call.

    A library that is there but cannot be used, or was built and is gone, is reported by one RuntimeWarning.
    """
    # Autograd may make the first call from several threads; the ops must be registered once.
    with _LOCK:
        return _status()


@functools.cache
def device_problem(index: int) -> str | None:
    """Why the library's CUDA code cannot run on a GPU, or None if it can. Asks the GPU: for devices in use.

    Args:
        index: of the CUDA device.
    """
    status = extension_status()
    if not status.cuda:
        return status.reason
    capability = torch.cuda.get_device_capability(index)
    major, minor = capability
    for target in status.architectures:
        match = re.fullmatch(r"(sm|compute)_(\d+)(\d)", target)
        if match is None:
            continue
        built = int(match[2]), int(match[3])
        # Machine code runs on its own generation from its minor version on, PTX on everything newer.
        if capability >= built and (match[1] == "compute" or major == built[0]):
            return None
    return f"the extension has no code for sm_{major}{minor} (it was built for {', '.join(status.architectures)})"


def _register_fakes() -> None:
    """Shapes and dtypes of the raw ops, so that they can be traced."""

    @torch.library.register_fake("embedkernels_ext::embedding_plan")
    def _(
        ids: Tensor,
        num_rows: int,  # noqa: ARG001
        padding_idx: int,  # noqa: ARG001
        vocab_start: int,  # noqa: ARG001
        ignored: Tensor | None,  # noqa: ARG001
    ) -> tuple[Tensor, ...]:
        n = ids.numel()
        return tuple(ids.new_empty(size, dtype=torch.int32) for size in (n, n, n + 1, 1))

    @torch.library.register_fake("embedkernels_ext::embedding_grad")
    def _(*arguments: object) -> None: ...

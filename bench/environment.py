"""Where a figure comes from: device, driver, versions, commit, clocks."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import embedkernels

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "triton", "transformers", "numpy", "embedkernels")
# What a result depends on, for checkouts that travel without their .git.
SOURCES = ("csrc/**/*", "bench/*.py", "setup.py")
CLOCKS = ("clocks.sm", "clocks.mem", "clocks.max.sm", "power.draw", "power.limit", "temperature.gpu", "pstate")
DEVICE = ("name", "driver_version", "memory.total", "vbios_version", "persistence_mode", "ecc.mode.current")


def output(*command: str, timeout: float = 20.0) -> str | None:
    """What a command prints, or None if it is missing or fails."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def nvidia_smi(fields: tuple[str, ...]) -> dict[str, str]:
    """Fields of the first GPU as nvidia-smi prints them; empty without one."""
    text = output("nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader", "--id=0")
    values = [part.strip() for part in text.splitlines()[0].split(",")] if text else []
    return dict(zip(fields, values, strict=True)) if len(values) == len(fields) else {}


def clocks() -> dict[str, str]:
    """Clocks, power and temperature at this moment."""
    return nvidia_smi(CLOCKS)


def commit() -> dict[str, Any]:
    """The commit, whether files differ from it, and a hash of the sources themselves.

    ``EMBEDKERNELS_COMMIT`` names the commit where the checkout has no ``.git``.
    """
    package = Path(embedkernels.__file__).parent  # may be installed elsewhere
    files = [(path, path.relative_to(package.parent)) for path in package.rglob("*.py")]
    files += [(path, path.relative_to(ROOT)) for pattern in SOURCES for path in ROOT.glob(pattern) if path.is_file()]
    digest = hashlib.sha256()
    for path, name in sorted(files, key=lambda file: file[1].as_posix()):
        if "__pycache__" not in name.parts:
            digest.update(f"{name.as_posix()}\0".encode() + path.read_bytes())
    status = output("git", "status", "--porcelain")
    return {
        "commit": os.environ.get("EMBEDKERNELS_COMMIT") or output("git", "rev-parse", "HEAD"),
        "modified": bool(status) if status is not None else None,
        "sources_sha256": digest.hexdigest(),
    }


def versions() -> dict[str, str | None]:
    import torch

    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    found["torch"] = torch.__version__  # names the CUDA it was built with
    nvcc = output("nvcc", "--version")
    found["nvcc"] = nvcc.splitlines()[-1] if nvcc else None
    return found


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def describe() -> dict[str, Any]:
    """Everything about this machine and checkout that a reader of a figure needs."""
    import torch

    gpu: dict[str, Any] = {}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        gpu = {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "l2_bytes": getattr(properties, "L2_cache_size", None),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            **{f"nvidia-smi {key}": value for key, value in nvidia_smi(DEVICE).items()},
        }
    return {
        "gpu": gpu,
        "clocks": clocks(),
        "cpu": cpu_name(),
        "cpus": os.cpu_count(),
        "platform": platform.platform(),
        "versions": versions(),
        **commit(),
    }

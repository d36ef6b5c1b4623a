"""Where a figure comes from: versions, device, threads and commit."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

PACKAGES = ("embedkernels", "torch", "triton", "transformers", "accelerate", "tokenizers", "numpy")


def output(*command: str, cwd: Path | None = None, timeout: float = 10.0) -> str | None:
    """What a command prints, or None if it is missing or fails."""
    try:
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=timeout, check=True)
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None
    return done.stdout.strip()


def versions() -> dict[str, str | None]:
    """Version by package; None where it is not installed."""
    import embedkernels

    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    # A checkout on the path has no metadata, and torch's does not name the CUDA it was built with.
    found["embedkernels"] = embedkernels.__version__
    try:
        import torch

        found["torch"] = torch.__version__
    except Exception:  # torch that is installed and does not import keeps the version that its metadata name
        pass
    return found


def nvidia_gpus() -> list[dict[str, str]]:
    """Name, driver and memory of every NVIDIA GPU that the driver knows, whether or not torch can use it."""
    text = output("nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader")
    rows = [[part.strip() for part in line.split(",")] for line in (text or "").splitlines()]
    return [dict(zip(("name", "driver", "memory"), row, strict=True)) for row in rows if len(row) == 3]


def cpu_name() -> str:
    """The processor as a person would call it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def commit() -> str | None:
    """The commit of the checkout that the package runs from, or that was its working directory; None elsewhere."""
    for folder in (Path(__file__).resolve().parents[2], Path.cwd()):
        if (folder / "embedkernels" / "__init__.py").is_file():
            head = output("git", "rev-parse", "HEAD", cwd=folder)
            if head:
                return head + ("+changes" if output("git", "status", "--porcelain", cwd=folder) else "")
    return None


def describe(device: Any) -> dict[str, Any]:
    """Everything about this machine that a reader of a run's figures needs.

    Args:
        device: the torch.device that training ran on.
    """
    import torch

    found: dict[str, Any] = {
        "device": str(device),
        "device_name": cpu_name(),
        "cpu": cpu_name(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "versions": versions(),
        "commit": commit(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        drivers = {gpu["driver"] for gpu in nvidia_gpus()}
        found |= {
            "device_name": properties.name,
            "device_memory_bytes": properties.total_memory,
            "capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda or torch.version.hip,
            "driver": ", ".join(sorted(drivers)) or None,
        }
    return found

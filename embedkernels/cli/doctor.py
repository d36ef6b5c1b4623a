"""What this machine has, and which path each op takes on it."""

from __future__ import annotations

import importlib
import importlib.util
import platform
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from embedkernels.cli import environment


def examine() -> dict[str, Any]:
    """Everything that ``doctor`` says, for JSON.

    Never raises for what a machine lacks: each part that cannot be examined holds the reason.

    Returns:
        ``versions``, ``platform``, ``devices`` (a list), ``triton``, ``transformers`` and ``extension`` (each with
        ``usable`` and ``reason``), ``ops`` (op, device, backend, reason) and ``advice`` (what to change, a list).
    """
    found: dict[str, Any] = {
        "versions": environment.versions(),
        "platform": f"{platform.platform()}, Python {platform.python_version()}",
    }
    gpus = environment.nvidia_gpus()
    found["nvidia_driver"] = gpus[0]["driver"] if gpus else None
    try:
        import torch
    except Exception as error:
        reason = f"torch does not import ({_told(error)})"
        return {
            **found,
            "devices": [],
            "triton": _state(reason),
            "transformers": _transformers(),
            "extension": {**_state(reason), "cuda": False, "path": None, "architectures": []},
            "ops": [],
            "advice": [f"{reason}: pip install torch"],
        }
    found["torch_cuda"] = torch.version.cuda
    found["devices"] = _devices(torch)
    found["triton"] = _triton(any(device["type"] == "cuda" for device in found["devices"]))
    found["transformers"] = _transformers()
    found["extension"] = _extension()
    found["ops"] = _ops([torch.device(device["type"]) for device in found["devices"]])
    found["advice"] = _advice(found, gpus, torch)
    return found


def _told(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"


def _state(problem: str | None, fine: str = "") -> dict[str, Any]:
    return {"usable": problem is None, "reason": problem or fine}


def _devices(torch: Any) -> list[dict[str, Any]]:
    devices = [{"type": "cpu", "name": environment.cpu_name(), "threads": torch.get_num_threads()}]
    try:
        for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
            properties = torch.cuda.get_device_properties(index)
            devices.append(
                {
                    "type": "cuda",
                    "index": index,
                    "name": properties.name,
                    "capability": f"{properties.major}.{properties.minor}",
                    "memory_bytes": properties.total_memory,
                }
            )
    except Exception as error:  # a driver that torch finds but cannot use
        devices.append({"type": "cuda", "name": f"unusable ({_told(error)})"})
    if torch.backends.mps.is_available():
        devices.append({"type": "mps", "name": "Apple GPU"})
    return devices


def _triton(gpu: bool) -> dict[str, Any]:
    from embedkernels.ops import backend

    fine = "kernels are compiled when they are first called" if gpu else "but there is no GPU here to compile for"
    return _state(backend.triton_problem(), fine)


def _transformers() -> dict[str, Any]:
    if importlib.util.find_spec("transformers") is None:
        return _state("transformers is not installed: the ops and modules work, patch() and finetune do not")
    try:
        importlib.import_module("embedkernels.hf")
        adapters = importlib.import_module("embedkernels.hf.adapters")
    except Exception as error:
        return _state(f"embedkernels.hf does not import ({_told(error)})")
    return _state(None, f"patch() knows {adapters.supported()}")


def _extension() -> dict[str, Any]:
    try:
        status = importlib.import_module("embedkernels.ops.extension").extension_status()
    except Exception as error:
        return {**_state(f"its status is unknown ({_told(error)})"), "cuda": False, "path": None, "architectures": []}
    return {
        "usable": status.loaded,
        "reason": status.reason,
        "cuda": status.cuda,
        "path": status.path,
        "architectures": list(status.architectures),
    }


def _ops(devices: list[Any]) -> list[dict[str, str]]:
    from embedkernels.ops import backend

    ops = []
    for device in dict.fromkeys(devices):
        for op in backend.SUPPORTED:
            try:
                choice = backend.choose(op, device)
                path, reason = str(choice.backend), choice.reason
            except Exception as error:
                path, reason = "none", _told(error)
            ops.append({"op": op, "device": device.type, "backend": path, "reason": reason})
    return ops


def _advice(found: dict[str, Any], gpus: list[dict[str, str]], torch: Any) -> list[str]:
    advice = []
    usable = [device for device in found["devices"] if device["type"] == "cuda"]
    if gpus and not usable:
        why = "was built without CUDA" if torch.version.cuda is None else "cannot use it"
        advice.append(
            f"there is an {gpus[0]['name']} with driver {gpus[0]['driver']}, but torch {torch.__version__} {why}: "
            "install a torch build for this driver's CUDA"
        )
    if usable and not found["triton"]["usable"]:
        advice.append(f'{found["triton"]["reason"]}: pip install "embedkernels[triton]" for the fused kernels')
    if found["versions"]["transformers"] is None:
        advice.append(f'{found["transformers"]["reason"]}: pip install "embedkernels[hf]"')
    if usable and found["extension"]["usable"] and not found["extension"]["cuda"]:
        advice.append(
            "the extension was built without CUDA, embedding gradients take the Triton path: reinstall where nvcc is"
        )
    return advice


def render(found: dict[str, Any], console: Console) -> None:
    """Print what :func:`examine` found."""

    def section(title: str, headings: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
        console.print(f"[bold]{title}[/bold]")
        table = Table(box=box.SIMPLE_HEAD)
        for heading in headings:
            table.add_column(heading, overflow="fold")
        for row in rows:
            table.add_row(*(escape(cell) for cell in row))
        console.print(table)

    versions = [(name, version or "not installed") for name, version in found["versions"].items()]
    versions.append(("CUDA of torch", found.get("torch_cuda") or "none"))
    versions.append(("NVIDIA driver", found["nvidia_driver"] or "none"))
    section("Versions", ("what", "version"), versions)
    section("Devices", ("device", "name", ""), [_device_row(device) for device in found["devices"]])
    extension = found["extension"]
    parts = [
        (name, "yes" if state["usable"] else "no", text)
        for name, state, text in (
            ("extension", extension, extension["reason"]),
            ("triton", found["triton"], found["triton"]["reason"]),
            ("transformers", found["transformers"], found["transformers"]["reason"]),
        )
    ]
    section("Parts", ("part", "usable", "why"), parts)
    ops = [(one["op"], one["device"], one["backend"], one["reason"]) for one in found["ops"]]
    section("Path of each op", ("op", "device", "runs on", "why"), ops)
    for advice in found["advice"]:
        console.print(f"[yellow]advice[/yellow] {escape(advice)}", highlight=False, soft_wrap=True)


def _device_row(device: dict[str, Any]) -> tuple[str, str, str]:
    label = device["type"] + (f":{device['index']}" if "index" in device else "")
    details = [f"{device['threads']} threads"] if "threads" in device else []
    if "capability" in device:
        details += [f"sm_{device['capability'].replace('.', '')}", f"{device['memory_bytes'] / 2**30:.0f} GiB"]
    return label, device["name"], ", ".join(details)

"""What this machine can build the library with: PyTorch's headers, a C++ compiler, ninja, and nvcc.

Each finder returns what it found, or raises :class:`Missing` with the sentence that ``embedkernels doctor`` shows.
PyTorch is looked for without importing it: an isolated build environment has no torch, but the Python that started
the build mostly does, and only headers and the names of the libraries are needed.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from gpus import capabilities

OLDEST_TORCH = (2, 11)
OLDEST_CUDA = (12, 0)  # the first nvcc that knows C++20
# What is shipped. PTX of the last one serves GPUs that are newer than all of them.
ARCHITECTURES = ("80", "86", "89", "90", "100", "120")


class Missing(Exception):
    """Something the build needs is not here; the message says what and where it was looked for."""


@dataclass(frozen=True)
class Torch:
    root: Path
    version: str


@dataclass(frozen=True)
class Cuda:
    nvcc: str
    root: Path
    version: tuple[int, int]
    architectures: tuple[str, ...]
    libraries: Path

    @property
    def name(self) -> str:
        return f"CUDA {self.version[0]}.{self.version[1]}"

    @property
    def include_dirs(self) -> list[Path]:
        # The C++ core libraries (CUB) moved to a folder of their own in CUDA 13.
        return [path for path in (self.root / "include" / "cccl", self.root / "include") if path.is_dir()]

    @property
    def targets(self) -> list[str]:
        """Names as ``cuobjdump`` shows them; the last one is PTX."""
        return [*(f"sm_{arch}" for arch in self.architectures), f"compute_{self.architectures[-1]}"]


def _site_packages() -> list[Path]:
    """Where an installed torch may be, also from inside an isolated build environment."""
    paths = [Path(sysconfig.get_path(name)) for name in ("platlib", "purelib")]
    if virtual_env := os.environ.get("VIRTUAL_ENV"):
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        paths.append(Path(virtual_env) / "lib" / version / "site-packages")
    return paths


def find_torch() -> Torch:
    spec = importlib.util.find_spec("torch")
    candidates = [Path(spec.origin).parent] if spec and spec.origin else []
    candidates += [path / "torch" for path in _site_packages()]
    old = None
    for root in candidates:
        version_file = root / "version.py"
        if not (root / "include/torch/csrc/stable/library.h").is_file() or not version_file.is_file():
            continue
        match = re.search(r"__version__ = '([^']+)'", version_file.read_text())
        version = match[1] if match else "0.0"
        if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) >= OLDEST_TORCH:
            return Torch(root, version)
        old = version
    wanted = ".".join(map(str, OLDEST_TORCH))
    if old:
        raise Missing(f"PyTorch {old} was found when it was built, and its headers are older than {wanted}")
    raise Missing(f"no PyTorch headers ({wanted} or newer) were found when it was built")


def find_compiler() -> str:
    if sys.platform == "win32":
        raise Missing("the library is built on Linux and macOS only")
    named = os.environ.get("CXX")
    for name in (named,) if named else ("g++", "clang++", "c++"):
        if path := shutil.which(name):
            return path
    raise Missing(f"no C++ compiler was found when it was built ({named or 'g++, clang++, c++'} on PATH)")


def find_ninja() -> str:
    if path := shutil.which("ninja"):
        return path
    try:
        import ninja
    except ImportError:
        raise Missing("ninja was not found when it was built (pip install ninja)") from None
    return str(Path(ninja.BIN_DIR) / "ninja")


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        raise Missing(f"CPU only: {' '.join(command[:2])} failed when it was built ({error})") from error
    return done.stdout + done.stderr


def _nvcc() -> str:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home:
        path = Path(home) / "bin" / "nvcc"
        if not path.is_file():
            raise Missing(f"CPU only: CUDA_HOME was {home} when it was built, and there is no bin/nvcc in it")
        return str(path)
    found = shutil.which("nvcc")
    if found is None:
        raise Missing("CPU only: nvcc was not found when it was built (CUDA_HOME not set, not on PATH)")
    return found


def _native(nvcc: str, known: set[str]) -> tuple[str, ...]:
    """For the GPUs of this machine: each one's own code, or the nearest older one's, of which drivers compile PTX."""
    here = capabilities()
    if not here:
        raise Missing("CPU only: EMBEDKERNELS_CUDA_ARCHS was native when it was built, and nvidia-smi showed no GPU")
    nearest = (max((arch for arch in known if int(arch) <= int(gpu)), key=int, default=None) for gpu in here)
    if found := {arch for arch in nearest if arch}:
        return tuple(sorted(found, key=int))
    raise Missing(
        f"CPU only: this machine's GPU ({_spelled(here)}) is too old for {nvcc}: it knows {_spelled(known)}"
    )


def _spelled(architectures: Iterable[str]) -> str:
    return ", ".join(sorted(architectures, key=int))


def _architectures(nvcc: str) -> tuple[str, ...]:
    known = set(re.findall(r"compute_(\d+)", _output(nvcc, "--list-gpu-arch")))
    asked = os.environ.get("EMBEDKERNELS_CUDA_ARCHS", "").strip()
    if asked == "native":
        return _native(nvcc, known)
    if not asked:
        if shipped := tuple(arch for arch in ARCHITECTURES if arch in known):
            return shipped
        raise Missing(f"CPU only: {nvcc} knows none of {', '.join(ARCHITECTURES)}")
    parts = [part for part in re.split(r"[;,\s]+", asked) if part]
    if not parts or not all(re.fullmatch(r"[0-9]+\.?[0-9]", part) for part in parts):
        raise ValueError(
            'EMBEDKERNELS_CUDA_ARCHS must be "native" or compute capabilities like "80,90" or "8.0 9.0",'
            f" got {os.environ['EMBEDKERNELS_CUDA_ARCHS']!r}"
        )
    wanted = {part.replace(".", "") for part in parts}
    for arch in sorted(wanted):
        if arch not in known:
            raise ValueError(f"EMBEDKERNELS_CUDA_ARCHS: {nvcc} has no compute_{arch}; it knows {_spelled(known)}")
    return tuple(sorted(wanted, key=int))


def find_cuda() -> Cuda:
    """nvcc and its toolkit.

    Raises:
        Missing: the library is then built for the CPU alone.
        ValueError: EMBEDKERNELS_CUDA_ARCHS is no list of architectures, or names one that this nvcc does not know.
            What is found by itself never raises it.
    """
    if os.environ.get("EMBEDKERNELS_CUDA", "1") == "0":
        raise Missing("CPU only: EMBEDKERNELS_CUDA was 0 when it was built")
    nvcc = _nvcc()
    release = re.search(r"release (\d+)\.(\d+)", _output(nvcc, "--version"))
    version = (int(release[1]), int(release[2])) if release else (0, 0)
    if version < OLDEST_CUDA:
        raise Missing(f"CPU only: nvcc {version[0]}.{version[1]} is older than {OLDEST_CUDA[0]}.{OLDEST_CUDA[1]}")
    # nvcc on PATH may be a script that calls another one: it knows best where its toolkit is.
    top = re.search(r"#\$ TOP=(.+)", _output(nvcc, "--dryrun", "-x", "cu", "-c", os.devnull, "-o", os.devnull))
    root = Path(top[1].strip()).resolve() if top else Path(nvcc).resolve().parent.parent
    folders = [root / "lib64", root / "lib", *root.glob("targets/*/lib")]
    libraries = next((folder for folder in folders if (folder / "libcudart_static.a").is_file()), None)
    if libraries is None:
        raise Missing(f"CPU only: libcudart_static.a was not found in {root} when it was built")
    cuda = Cuda(nvcc, root, version, _architectures(nvcc), libraries)
    if not any((path / "cub" / "cub.cuh").is_file() for path in cuda.include_dirs):
        raise Missing(f"CPU only: CUB was not found in {root} when it was built")
    return cuda

"""Builds ``_extension.so`` through ninja and writes down, next to it, what was built or why nothing was.

The file names in ``build.ninja`` are relative to the build folder, so neither the library nor its error messages
carry the path of the checkout.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

from toolchain import Cuda, Missing, Torch, find_compiler, find_cuda, find_ninja, find_torch

LIBRARY = "_extension.so"
RECORD = "_extension.json"
SOURCES = Path(__file__).resolve().parent.parent
CPU_SOURCES = ("library.cpp", "checks.cpp", "cpu/plan.cpp", "cpu/rows.cpp", "cpu/grad.cpp")
# The slowest first, so that it does not end up alone on the last core.
CUDA_SOURCES = ("cuda/grad.cu", "cuda/sort.cu", "cuda/plan.cu", "cuda/launcher.cu")
# PyTorch's stable ABI as of 2.11: the library then runs with every later version.
TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"
COMPRESS_MODE = (12, 8)  # the first nvcc that knows --compress-mode


@dataclass(frozen=True)
class Record:
    """What the loader is told.

    Attributes:
        built: whether there is a library.
        reason: in a sentence, what it was built with, or why it was not.
        architectures: its CUDA targets, empty for a CPU-only library.
        torch: version of the headers.
        sha256: of the library, so that a damaged file is refused before the system's loader trips over it.
    """

    built: bool
    reason: str
    architectures: list[str] = field(default_factory=list)
    torch: str = ""
    sha256: str = ""


def _flags(arguments: list[str]) -> str:
    """Arguments as the value of a ninja variable, quoted for the shell: paths may hold blanks."""
    return shlex.join(arguments).replace("$", "$$")


def _path(path: str) -> str:
    """A path in one of ninja's build lines."""
    return re.sub(r"([$ :])", r"$\1", path)


def _for_host(flag: str) -> str:
    """A flag that nvcc hands on to the C++ compiler. It pastes it into a command line of its own as it is."""
    return '-Xcompiler="' + re.sub(r'([\\"$`])', r"\\\1", flag) + '"'


def _compile_flags(compiler: str, torch: Torch, cuda: Cuda | None) -> tuple[list[str], list[str]]:
    """For C++ and for CUDA sources."""
    include = torch.root / "include"
    common = ["-std=c++20", "-O3", TARGET]
    for folder in (include, include / "torch/csrc/api/include"):
        common += ["-isystem", str(folder)]
    host = ["-fPIC", "-fvisibility=hidden", f"-ffile-prefix-map={include}=torch"]
    # Nobody traps floating-point exceptions here, and compilers must know it to vectorise a conversion's selects.
    cxx = [*common, *host, "-fno-trapping-math", "-Wall", "-Wextra"]
    if cuda is None:
        return cxx, []
    built_for = f'-DEMBEDKERNELS_ARCHITECTURES="{",".join(cuda.targets)}"'
    nvcc = [*common, built_for, f"-ccbin={compiler}", *map(_for_host, host)]
    if cuda.version >= COMPRESS_MODE:
        nvcc.append("--compress-mode=size")
    for folder in cuda.include_dirs:
        nvcc += ["-isystem", str(folder)]
    nvcc += [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in cuda.architectures]
    newest = cuda.architectures[-1]
    nvcc.append(f"-gencode=arch=compute_{newest},code=compute_{newest}")
    return [*cxx, built_for], nvcc


def _link_flags(torch: Torch, cuda: Cuda | None) -> list[str]:
    if sys.platform == "darwin":
        flags = ["-undefined", "dynamic_lookup"]
    else:
        # libtorch.so names libtorch_cuda.so where there is one: the weak symbol is then looked for there too.
        flags = [f"-L{torch.root / 'lib'}", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-Wl,--as-needed"]
        flags += ["-Wl,--exclude-libs,ALL"]
    if cuda is not None:
        flags += [f"-L{cuda.libraries}", "-lcudart_static", "-lrt", "-lpthread", "-ldl"]
    return flags


def _ninja_file(compiler: str, torch: Torch, cuda: Cuda | None, build_dir: Path) -> str:
    """The rules: one object per source with the headers it reads, and the link."""
    cxxflags, nvccflags = _compile_flags(compiler, torch, cuda)
    lines = [
        "ninja_required_version = 1.5",
        f"cxx = {_flags([compiler])}",
        f"nvcc = {_flags([cuda.nvcc]) if cuda else ''}",
        f"cxxflags = {_flags(cxxflags)}",
        f"nvccflags = {_flags(nvccflags)}",
        f"ldflags = {_flags(_link_flags(torch, cuda))}",
        "rule cxx",
        "  command = $cxx -MD -MF $out.d $cxxflags -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = C++  $in",
        "rule nvcc",
        "  command = $nvcc -MD -MF $out.d $nvccflags -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = CUDA $in",
        "rule link",
        "  command = $cxx -shared $in -o $out $ldflags",
        "  description = link $out",
    ]
    objects = []
    for source in (*(CUDA_SOURCES if cuda else ()), *CPU_SOURCES):
        rule = "nvcc" if source.endswith(".cu") else "cxx"
        lines.append(f"build {source}.o: {rule} {_path(os.path.relpath(SOURCES / source, build_dir))}")
        objects.append(f"{source}.o")
    lines.append(f"build {LIBRARY}: link {' '.join(objects)}")
    return "\n".join([*lines, f"default {LIBRARY}", ""])


def _replace(source: Path, target: Path) -> None:
    """Copy a file by way of a new one: a running Python may have the old one mapped."""
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = target.with_suffix(".new")
    shutil.copy2(source, fresh)
    fresh.replace(target)


def install(built: Path, package_dir: Path) -> None:
    """Copy what :func:`build` left in ``built``; an older library does not outlive a build that made none."""
    for name in (LIBRARY, RECORD):
        if (built / name).is_file():
            _replace(built / name, package_dir / name)
        else:
            (package_dir / name).unlink(missing_ok=True)


def _run_ninja(ninja: str, build_dir: Path) -> tuple[str, list[str]]:
    """What went wrong, with the first line of the output that looks like a cause, and the files that failed."""
    command = [ninja, "-C", str(build_dir)]
    if jobs := os.environ.get("MAX_JOBS"):
        command += ["-j", jobs]
    print("building embedkernels' library:", shlex.join(command), flush=True)
    error, files = "", []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            if not error and re.search(r"\berror\b|fatal|not found", line, re.IGNORECASE):
                error = f": {' '.join(line.split())}"
            if failed := re.match(r"FAILED: (?:\[code=\d+\] )?(\S+)", line):
                files.append(failed[1])
    return (f"did not compile{error}" if process.returncode else ""), files


def _build(build_dir: Path, library: Path) -> Record:
    if os.environ.get("EMBEDKERNELS_BUILD_EXTENSION", "1") == "0":
        raise Missing("EMBEDKERNELS_BUILD_EXTENSION was 0 when it was installed")
    compiler, torch, ninja = find_compiler(), find_torch(), find_ninja()
    build_dir.mkdir(parents=True, exist_ok=True)

    def compile_with(cuda: Cuda | None) -> tuple[str, list[str]]:
        rules = build_dir / "build.ninja"
        text = _ninja_file(compiler, torch, cuda, build_dir)
        if not rules.is_file() or rules.read_text() != text:
            rules.write_text(text)
        return _run_ninja(ninja, build_dir)

    cuda, targets = None, []
    try:
        cuda = find_cuda()
        reason, targets = f"C++ and {cuda.name}", cuda.targets
    except Missing as missing:
        reason = str(missing)
    failed, files = compile_with(cuda)
    if failed and cuda is not None and not any(file.endswith(".cpp.o") for file in files):
        # Mostly a C++ compiler that is too new for this nvcc: C++ alone compiles.
        _warn(f"embedkernels' library is built WITHOUT its CUDA code: it {failed}")
        reason, targets = f"CPU only: the CUDA code {failed}", []
        failed, _ = compile_with(None)
    if failed:
        raise Missing(f"it {failed}")
    _replace(build_dir / LIBRARY, library)
    digest = hashlib.sha256(library.read_bytes()).hexdigest()
    return Record(True, reason, targets, torch.version, digest)


def _warn(text: str) -> None:
    line = "*" * 100
    print(f"{line}\n{text}\n{line}", file=sys.stderr, flush=True)


def build(build_dir: Path, package_dir: Path) -> Record:
    """Build the library into ``package_dir``, or record why the package has to do without it.

    Args:
        build_dir: objects and ``build.ninja``; kept between builds.
        package_dir: gets ``_extension.so`` (or loses an old one) and ``_extension.json``.

    Raises:
        Missing: with ``EMBEDKERNELS_REQUIRE_EXTENSION=1``, in place of a package without the library.
        ValueError: an environment variable of the build makes no sense.
    """
    library = package_dir / LIBRARY
    try:
        record = _build(build_dir, library)
    except Missing as missing:
        if os.environ.get("EMBEDKERNELS_REQUIRE_EXTENSION", "0") == "1":
            raise
        library.unlink(missing_ok=True)
        record = Record(False, str(missing))
        _warn(
            f"embedkernels is installed WITHOUT its C++ library: {missing}.\nEverything works, more slowly."
            " EMBEDKERNELS_REQUIRE_EXTENSION=1 makes this an error."
        )
    package_dir.mkdir(parents=True, exist_ok=True)
    (package_dir / RECORD).write_text(json.dumps(asdict(record), indent=2) + "\n")
    return record

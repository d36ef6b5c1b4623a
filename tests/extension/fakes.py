"""Programs and packages that look like what a build needs, for as long as nobody looks closely."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ROOT / "csrc" / "tools"


def script(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


NVCC = """
case "$*" in
  *--version*) echo "Cuda compilation tools, release {version}, V{version}.0" ;;
  *--list-gpu-arch*) printf 'compute_%s\\n' {architectures} ;;
  *--dryrun*) echo '#$ TOP={top}' >&2 ;;
  *) {compile} ;;
esac
"""
TOO_NEW = "echo 'host_config.h:3:2: error: #error -- unsupported GNU version! gcc later than 12' >&2; exit 1"

# A C++ compiler that writes empty files where files are asked for, and notes each argument it got in a line.
COMPILER = """
for argument in "$@"; do echo "$argument" >> "{log}"; done
while [ $# -gt 0 ]; do
  case "$1" in -o) out=$2 ;; -MF) depfile=$2 ;; esac
  shift
done
: > "$out"
[ -z "$depfile" ] || echo "$out:" > "$depfile"
"""


def nvcc(
    home: Path,
    version: str = "13.0",
    architectures: tuple[str, ...] = ("80", "90", "120"),
    compile: str = TOO_NEW,
) -> str:
    """An nvcc for the toolkit at ``home`` that compiles by the shell commands ``compile``."""
    text = NVCC.format(version=version, top=home, architectures=" ".join(architectures), compile=compile)
    return script(home / "bin/nvcc", text)


def fake_torch(root, version, headers=True):
    root.mkdir(parents=True)
    (root / "__init__.py").touch()
    (root / "version.py").write_text(f"__version__ = '{version}'\n")
    if headers:
        (root / "include/torch/csrc/stable").mkdir(parents=True)
        (root / "include/torch/csrc/stable/library.h").touch()
    return root

"""Build the extension in place and say what came out.

    python -m bench.build --out build.json

On a machine with a GPU only that GPU's architecture is built, unless ``EMBEDKERNELS_CUDA_ARCHS`` says otherwise.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bench.environment import ROOT
from bench.files import write_json

KEPT = 6000  # characters of the compiler's output
STATUS = (
    "import dataclasses, json; from embedkernels.ops.extension import extension_status; "
    "print(json.dumps(dataclasses.asdict(extension_status())))"
)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--capability", help="of the GPU whose code must come out, like 90")
    args = parser.parse_args(argv)
    env = dict(os.environ)
    if args.capability:
        env.setdefault("EMBEDKERNELS_CUDA_ARCHS", args.capability)
    started = time.monotonic()
    built = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=ROOT,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    result: dict[str, Any] = {
        "exit_code": built.returncode,
        "architectures": env.get("EMBEDKERNELS_CUDA_ARCHS"),
        "seconds": round(time.monotonic() - started, 1),
        "output": built.stdout[-KEPT:],
        "problems": [] if built.returncode == 0 else [f"the build ended with exit code {built.returncode}"],
    }
    asked = subprocess.run([sys.executable, "-c", STATUS], cwd=ROOT, capture_output=True, text=True)
    if asked.returncode == 0:
        result["status"] = json.loads(asked.stdout.splitlines()[-1])
        if args.capability and not result["status"]["cuda"]:
            result["problems"].append(f"no CUDA code on a machine with a GPU: {result['status']['reason']}")
    else:
        result["problems"].append(f"the package does not import: {asked.stderr[-1000:]}")
    write_json(args.out, result)
    print(result["output"] if result["problems"] else f"built in {result['seconds']} s")
    return int(bool(result["problems"]))


if __name__ == "__main__":
    sys.exit(main())

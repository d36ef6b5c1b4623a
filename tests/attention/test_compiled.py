"""What the compiler made of the kernels: no product is transposed into another, and Hopper's products are wgmma.

Compiled for sm_90 without a GPU, in a process of its own because the interpreter cannot be switched off here.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]

COMPILE = """
import json, sys
from bench.resources import compile_spec
from embedkernels.kernels import attention_backward, attention_forward
from tests.attention import transposed_product

specs = [*attention_forward.compile_specs(), *attention_backward.compile_specs(), *transposed_product.compile_specs()]
wanted = [spec for spec in specs if any(name in spec.name for name in sys.argv[1].split())]
compiled = {spec.name: compile_spec(spec, "sm_90")[0].asm for spec in wanted}
print(json.dumps({name: {"ttgir": asm["ttgir"], "ptx": asm["ptx"]} for name, asm in compiled.items()}))
"""


@pytest.fixture(scope="module")
def compiled() -> dict[str, Any]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, "[sm_90,d64,dropout,bf16 transposed_product"],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def transposed_products(ttgir: str) -> list[str]:
    """Transposes of a value in a matrix unit's layout, in registers or once it is in shared memory."""
    found = [line for line in ttgir.splitlines() if re.search(r"tt\.trans .*#mma\d*>\s*->", line)]
    stored = re.findall(r"(%[\w#]+) = ttg\.local_alloc %[\w#]+ : \(tensor<[^>]*#mma\d*>\)", ttgir)
    for line in ttgir.splitlines():
        match = re.search(r"ttg\.memdesc_trans (%[\w#]+)", line)
        if match and match[1] in stored:
            found.append(line)
    return found


def test_the_check_finds_a_transposed_product(compiled: dict[str, Any]) -> None:
    assert transposed_products(compiled["transposed_product"]["ttgir"])


def test_no_product_is_transposed_into_another(compiled: dict[str, Any]) -> None:
    """Wrong gradients have been reported for tl.dot(tl.trans(product), x) on Hopper (flash-linear-attention #640)."""
    kernels = [name for name in compiled if name.startswith("attention")]
    assert len(kernels) == 3
    for name in kernels:
        assert transposed_products(compiled[name]["ttgir"]) == [], name


def test_products_are_wgmma(compiled: dict[str, Any]) -> None:
    """Two products forward, four for dk and dv, three for dq; each in both loops, whole and cut blocks."""
    products = {"fwd": 2, "dkdv": 4, "dq": 3}
    for name, asm in compiled.items():
        if name.startswith("attention"):
            kind = next(kind for kind in products if kind in name)
            dots = re.findall(r"ttng\.warp_group_dot ", asm["ttgir"])
            assert len(dots) == 2 * products[kind], name
            assert "wgmma.mma_async" in asm["ptx"], name
            assert "mma.sync" not in asm["ptx"], name

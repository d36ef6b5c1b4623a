"""The package on machines that lack Triton, transformers or the extension: everything still computes."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest

BLOCK = """
import importlib.abc, sys

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
"""

USE = """
import torch
import embedkernels as ek

torch.manual_seed(0)
ids = torch.randint(0, 50, (2, 7))
stem = ek.FusedInputEmbeddings(50, 16, max_positions=8, num_types=2, dropout=0.1)
x = stem(ids)
q, k, v = x.view(2, 7, 2, 8).transpose(1, 2).repeat(1, 1, 1, 2).chunk(1, -1) * 3
y = ek.attention(q, k, v, key_lengths=torch.tensor([7, 3], dtype=torch.int32), is_causal=True)
y.backward(torch.randn_like(y))
grad = stem.word_embeddings.weight.grad
assert torch.isfinite(y).all() and torch.isfinite(grad).all()
assert grad[ids.unique()].abs().sum(1).min() > 0, "a row in use got no gradient"
unused = torch.ones(50, dtype=torch.bool)
unused[ids.unique()] = False
assert grad[unused].abs().max() == 0, "a row not in use got a gradient"
try:
    stem(torch.tensor([[50]]))
except IndexError as error:
    assert "50" in str(error)
else:
    raise AssertionError("an id out of range was accepted")
print("ok", ek.ops.backend.choose("embed", torch.device("cpu")).backend)
"""


def run(source: str, **environment: str) -> str:
    clean = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", source],
        env={**clean, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("extension", ["", "1"], ids=["as installed", "extension disabled"])
@pytest.mark.parametrize("absent", [(), ("triton",), ("transformers",), ("triton", "transformers")], ids=str)
def test_ops_and_modules_work(absent: tuple[str, ...], extension: str) -> None:
    source = BLOCK.format(blocked=set(absent)) if absent else ""
    assert run(source + textwrap.dedent(USE), EMBEDKERNELS_DISABLE_EXTENSION=extension).split() == ["ok", "torch"]


def test_patch_without_transformers_says_what_is_missing() -> None:
    source = BLOCK.format(blocked={"transformers"}) + textwrap.dedent(
        """
        import torch
        import embedkernels as ek

        try:
            ek.patch(torch.nn.Linear(2, 2))
        except ImportError as error:
            print(error)
        """
    )
    assert "transformers" in run(source)

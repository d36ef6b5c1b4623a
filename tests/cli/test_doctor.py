"""``embedkernels doctor``: what is here, which path each op takes, and that it never fails for what is missing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from embedkernels.cli import doctor, environment
from embedkernels.ops import backend
from tests.cli.support import command, said

BLOCK = """
import sys

# What a missing package looks like to import and to importlib.util.find_spec.
sys.modules.update(dict.fromkeys({blocked!r}))
sys.argv = ["embedkernels", *{arguments!r}]
from embedkernels.cli.main import main
main()
"""


def without(*blocked: str, arguments: tuple[str, ...] = ("doctor", "--json")) -> subprocess.CompletedProcess[str]:
    clean = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-c", BLOCK.format(blocked=set(blocked), arguments=arguments)],
        env={**clean, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_text_names_versions_devices_and_the_path_of_every_op() -> None:
    done = command("doctor")
    assert done.exit_code == 0, done.output
    for word in ("torch", torch.__version__, "transformers", "extension", "cpu", *backend.SUPPORTED):
        assert word in done.stdout


def test_json_says_for_every_op_and_device_what_a_call_will_do() -> None:
    done = command("doctor", "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["devices"][0]["type"] == "cpu"
    chosen = {(one["op"], one["device"]): one["backend"] for one in found["ops"]}
    for op in backend.SUPPORTED:
        for device in {device["type"] for device in found["devices"]}:
            assert chosen.pop((op, device)) == backend.choose(op, torch.device(device)).backend
    assert not chosen
    assert found["versions"]["torch"] == torch.__version__
    assert found["extension"].keys() == {"usable", "reason", "cuda", "path", "architectures"}


@pytest.mark.parametrize(
    "reasons",
    [
        {"triton": "triton is not installed"},
        {"transformers": "transformers is not installed", "extension": "its status is unknown (ModuleNotFoundError"},
    ],
    ids=" and ".join,
)
def test_what_is_missing_is_said(reasons: dict[str, str]) -> None:
    done = without(*("embedkernels.ops.extension" if part == "extension" else part for part in reasons))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    for part, reason in reasons.items():
        assert found[part]["usable"] is False
        assert reason in found[part]["reason"]
    assert {one["op"] for one in found["ops"]} == set(backend.SUPPORTED)


def test_without_torch_it_still_answers() -> None:
    done = without("torch")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["advice"] == [
        "torch does not import (ModuleNotFoundError: import of torch halted; None in sys.modules): pip install torch"
    ]
    text = without("torch", arguments=("doctor",))
    assert text.returncode == 0, text.stderr
    assert "pip install torch" in text.stdout


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_without_its_own_packages_the_command_says_what_to_install(missing: str) -> None:
    done = without(missing)
    assert done.returncode == 1
    assert f"the embedkernels command needs {missing}" in done.stderr
    assert 'pip install "embedkernels[cli]"' in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("module", ["embedkernels", "embedkernels.cli", "embedkernels.cli.main"])
def test_the_package_is_a_command(module: str) -> None:
    words = [sys.executable, "-m", module, "--version"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("embedkernels ")
    block = f"import runpy, sys; sys.modules['typer'] = None; runpy.run_module({module!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", block], capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert done.stderr.splitlines()[1:] == ['  pip install "embedkernels[cli]"']


def test_an_op_that_cannot_run_has_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(op: str, device: torch.device) -> Any:
        raise RuntimeError("broken in some way\nsecond line")

    monkeypatch.setattr(backend, "choose", fail)
    ops = doctor.examine()["ops"]
    assert {(one["backend"], one["reason"]) for one in ops} == {("none", "RuntimeError: broken in some way")}


def test_a_gpu_that_torch_cannot_use_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = {"name": "NVIDIA H100", "driver": "580.1", "memory": "81559 MiB"}
    monkeypatch.setattr(environment, "nvidia_gpus", lambda: [gpu])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (advice,) = doctor.examine()["advice"]
    assert advice.startswith("there is an NVIDIA H100 with driver 580.1, but torch")


def test_a_gpu_is_described_with_its_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(name="NVIDIA H100", major=9, minor=0, total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    shown = said(command("doctor").stdout)
    for word in ("cuda:0", "cuda:1", "NVIDIA H100", "sm_90", "80 GiB"):
        assert word in shown


def test_version() -> None:
    import embedkernels

    done = command("--version")
    assert (done.exit_code, done.stdout.strip()) == (0, f"embedkernels {embedkernels.__version__}")


def test_help_names_the_commands() -> None:
    done = command("--help")
    assert done.exit_code == 0
    assert "finetune" in done.stdout
    assert "doctor" in done.stdout

"""How long the host is busy with a call of ours, and with the sequence of ops that it replaces in eager mode.

    python -m bench.host_time [--cases embed,rope] [--samples 40] [--calls 50] [--until launcher] [--json FILE]

Tensors are tiny, so that there is nothing to wait for; calls of both kinds alternate in samples of ``--calls``; the
clock is the processor's time of this process, so that waiting for the device or for other programs does not count.

On a GPU both are called as they are. Without one the other sequence runs on the CPU, which computes a few numbers
where a GPU would be told to, and our launches end before the driver: ``--until launcher`` leaves all of a launch
away, ``--until driver`` compiles the kernels and goes as far as the call into the driver.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

Call = Callable[[], Any]
# BERT's front end in small.
VOCABULARY, POSITIONS, TYPES, BATCH, LENGTH, WIDTH = 50, 16, 2, 2, 4, 64
UNTIL = ("launcher", "driver")
PASSES = ("no gradients", "forward", "forward + backward")


def without_a_gpu(until: str) -> None:
    """Have calls on the CPU take the way of a GPU's: Triton kernels, ids unseen, and no device behind them."""
    from embedkernels.kernels import launch
    from embedkernels.ops import backend, ids

    backend.interpreting = lambda: True
    ids.check_ids = lambda *_: None
    if until == "launcher":
        launch.Launcher.__call__ = lambda *_, **__: None  # type: ignore[method-assign]
        launch.Launch.__call__ = lambda *_: None  # type: ignore[method-assign]
        return
    from triton.runtime import driver

    driver.set_active(NoDevice())


class NoDevice:
    """A driver of Triton whose launches do nothing, for a device of compute capability 9.0."""

    def __init__(self) -> None:
        self.utils = self

    def launcher_cls(self, *_: Any) -> Call:
        return lambda *_: None

    def load_binary(self, *_: Any) -> tuple[int, ...]:
        return 1, 1, 32, 0, 1024  # module, function, registers, spills, most threads

    def get_device_properties(self, _: int) -> dict[str, int]:
        return {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32}

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


def with_backward(call: Call, leaves: list[torch.Tensor]) -> Call:
    """Forward and gradients of ``leaves``."""
    with torch.no_grad():
        out = call()
    upstream = [torch.randn_like(y) for y in (out if isinstance(out, tuple) else (out,))]

    def both() -> Any:
        y = call()
        return torch.autograd.grad(y, leaves, upstream if isinstance(y, tuple) else upstream[0])

    return both


def embed_calls(device: torch.device) -> tuple[Call, Call, list[torch.Tensor]]:
    """The op against the ops of BertEmbeddings' forward: three lookups, two sums, norm, dropout."""
    import embedkernels as ek

    def table(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device, requires_grad=True)

    words, places, kinds = table(VOCABULARY, WIDTH), table(POSITIONS, WIDTH), table(TYPES, WIDTH)
    weight, bias = table(WIDTH), table(WIDTH)
    ids = torch.randint(0, VOCABULARY, (BATCH, LENGTH), device=device)
    types, positions = torch.zeros_like(ids), torch.arange(LENGTH, device=device)[None]

    def theirs() -> torch.Tensor:
        x = F.embedding(ids, words, 0) + F.embedding(types, kinds)
        x = x + F.embedding(positions, places)
        return F.dropout(F.layer_norm(x, (WIDTH,), weight, bias, 1e-12), 0.1)

    def ours() -> torch.Tensor:
        return ek.embed(
            ids, words, position_weight=places, type_weight=kinds, type_ids=types, norm="layer", norm_weight=weight,
            norm_bias=bias, norm_eps=1e-12, dropout_p=0.1, padding_idx=0, backend="triton",
        )  # fmt: skip

    return theirs, ours, [words, places, kinds, weight, bias]


def module_calls(device: torch.device) -> tuple[Call, Call, list[torch.Tensor]]:
    """A patched BertEmbeddings against a stock one."""
    import transformers
    from transformers.models.bert.modeling_bert import BertEmbeddings

    import embedkernels as ek

    config = transformers.BertConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, max_position_embeddings=POSITIONS, type_vocab_size=TYPES
    )
    stock = BertEmbeddings(config).to(device)
    patched = copy.deepcopy(stock)
    ek.patch(patched)
    ids = torch.randint(0, VOCABULARY, (BATCH, LENGTH), device=device)
    types = torch.zeros_like(ids)

    def ours() -> torch.Tensor:
        with ek.use_backend("triton"):
            return patched(ids, types)

    # The gradients of both are those of one list: the parameters are shared.
    for mine, other in zip(stock.modules(), patched.modules(), strict=True):
        other._parameters.update(mine._parameters)
    return lambda: stock(ids, types), ours, list(stock.parameters())


def rope_calls(device: torch.device) -> tuple[Call, Call, list[torch.Tensor]]:
    """The op against Llama's rotation of query and key."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    import embedkernels as ek

    query, key = (torch.randn(BATCH, heads, LENGTH, 16, device=device, requires_grad=True) for heads in (4, 2))
    cos, sin = (torch.randn(BATCH, LENGTH, 16, device=device) for _ in range(2))
    return (
        lambda: apply_rotary_pos_emb(query, key, cos, sin),
        lambda: ek.rope(query, key, cos, sin, backend="triton"),
        [query, key],
    )


def attention_calls(device: torch.device) -> tuple[Call, Call, list[torch.Tensor]]:
    """The op with a padding mask against scaled_dot_product_attention with the mask that it takes."""
    import embedkernels as ek

    query, key, value = (torch.randn(BATCH, 4, LENGTH, 16, device=device, requires_grad=True) for _ in range(3))
    mask = torch.ones(BATCH, LENGTH, dtype=torch.bool, device=device)
    wide = mask[:, None, None]
    return (
        lambda: F.scaled_dot_product_attention(query, key, value, wide.expand(-1, 1, LENGTH, -1), 0.1),
        lambda: ek.attention(query, key, value, dropout_p=0.1, key_mask=mask, backend="triton"),
        [query, key, value],
    )


def position_calls(device: torch.device) -> tuple[Call, Call, list[torch.Tensor]]:
    """The op against RoBERTa's sequence."""
    import embedkernels as ek

    ids = torch.randint(0, VOCABULARY, (BATCH, LENGTH), device=device)

    def theirs() -> torch.Tensor:
        mask = ids.ne(1).int()
        return (torch.cumsum(mask, dim=1).type_as(mask) * mask).long() + 1

    return (
        theirs,
        lambda: ek.count_positions(ids, padding_idx=1, start=1, padding_position=1, backend="triton"),
        [],
    )


CASES: dict[str, Callable[[torch.device], tuple[Call, Call, list[torch.Tensor]]]] = {
    "embed": embed_calls,
    "patched BertEmbeddings": module_calls,
    "rope": rope_calls,
    "attention": attention_calls,
    "count_positions": position_calls,
}


def passes(name: str, device: torch.device) -> dict[str, tuple[Call, Call]]:
    """Both calls of a case by what is asked of them."""
    theirs, ours, leaves = CASES[name](device)

    def quiet(call: Call) -> Call:
        def run() -> Any:
            with torch.no_grad():
                return call()

        return run

    no_gradients, forward, both = PASSES
    found = {no_gradients: (quiet(theirs), quiet(ours))}
    if leaves:
        found[forward] = theirs, ours
        found[both] = with_backward(theirs, leaves), with_backward(ours, leaves)
    return found


def measure(theirs: Call, ours: Call, samples: int, calls: int, wait: Call) -> dict[str, Any]:
    """Medians in us and their ratio; neither always runs first."""
    taken: dict[str, list[float]] = {"eager": [], "ours": []}
    order = [("eager", theirs), ("ours", ours)]
    for sample in range(samples + 2):  # two to warm up
        order.reverse()
        for name, call in order:
            wait()
            begin = time.process_time()
            for _ in range(calls):
                call()
            spent = (time.process_time() - begin) / calls * 1e6
            if sample >= 2:
                taken[name].append(spent)
    medians = {name: statistics.median(values) for name, values in taken.items()}
    return {**medians, "ratio": medians["ours"] / medians["eager"], "samples_us": taken}


def run(cases: list[str], samples: int, calls: int) -> dict[str, dict[str, Any]]:
    """Results by case and pass."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    wait: Call = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    results: dict[str, dict[str, Any]] = {}
    for case in cases:
        results[case] = {
            name: measure(theirs, ours, samples, calls, wait) for name, (theirs, ours) in passes(case, device).items()
        }
    return results


def main(arguments: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--cases", default=",".join(CASES), help="some of: " + ", ".join(CASES))
    parser.add_argument("--samples", type=int, default=40)
    parser.add_argument("--calls", type=int, default=50, help="in a sample")
    parser.add_argument("--until", choices=UNTIL, default="launcher", help="without a GPU: where launches end")
    parser.add_argument("--json", type=Path, default=None, help="write all samples here")
    options = parser.parse_args(arguments)
    cases = options.cases.split(",")
    if unknown := set(cases) - set(CASES):
        parser.error(f"no such case: {', '.join(sorted(unknown))}")
    torch.manual_seed(0)
    where = "cuda"
    if not torch.cuda.is_available():
        if os.environ.get("TRITON_INTERPRET", "0") == "1":
            parser.error("TRITON_INTERPRET=1 has kernels interpreted, which is none of a launch")
        torch.set_num_threads(1)
        without_a_gpu(options.until)
        where = f"cpu, launches until the {options.until}"
    results = run(cases, options.samples, options.calls)
    for case, found in results.items():
        for name, one in found.items():
            print(
                f"{case}, {name}: eager {one['eager']:.1f} us, ours {one['ours']:.1f} us, ratio {one['ratio']:.2f}",
                flush=True,
            )
    if options.json is not None:
        from bench.environment import describe

        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(
            json.dumps({"where": where, "results": results, "environment": describe()}, indent=1) + "\n"
        )


if __name__ == "__main__":
    sys.exit(main())

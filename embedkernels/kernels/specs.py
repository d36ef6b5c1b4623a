"""What it takes to compile a kernel without running it: every kernel module lists its shipped configurations.

A module's ``compile_specs()`` yields one :class:`CompileSpec` per tile configuration with the heaviest set of
features it is launched with, so that registers, spills and shared memory can be bounded for any target.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class CompileSpec:
    """One compilation of one kernel.

    Attributes:
        name: unique and stable, e.g. ``"attention_fwd_kernel[d64,causal,dropout,bf16]"``.
        kernel: the ``@triton.jit`` function.
        signature: type of every run-time argument by name, e.g. ``{"x_ptr": "*bf16", "n": "i32"}``.
        constexprs: value of every constexpr argument by name.
        num_warps, num_stages: as at launch.
        divisible_by_16: names of the arguments that a launch specialises as multiples of 16.
        max_registers: of a thread, as at launch; None leaves it to the compiler. Only NVIDIA's obeys it.
        targets: the targets that are launched with this configuration, e.g. ``("sm_80", "sm_86")``; None for all.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    divisible_by_16: frozenset[str] = field(default_factory=frozenset)
    targets: tuple[str, ...] | None = None
    max_registers: int | None = None

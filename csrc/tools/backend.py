"""The build backend: setuptools', and PyTorch's headers where the build would not find any.

An isolated build environment holds what ``pyproject.toml`` requires. PyTorch is not listed there: mostly it is
installed already and found (``toolchain.find_torch``), and fetching it again would cost gigabytes. Only where there
is none, and a compiler to use it, it is asked for, at one version: the library targets 2.11's stable ABI whichever
headers it is built with, so a fixed one makes builds repeatable.
"""

from __future__ import annotations

import os
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403
from toolchain import Missing, find_compiler, find_torch

TORCH = "torch==2.13.0"


def _torch_requirement() -> list[str]:
    if os.environ.get("EMBEDKERNELS_BUILD_EXTENSION", "1") == "0":
        return []
    try:
        find_compiler()
    except Missing:
        return []
    try:
        find_torch()
    except Missing:
        return [TORCH]
    return []


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    return [*build_meta.get_requires_for_build_wheel(config_settings), *_torch_requirement()]


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    return [*build_meta.get_requires_for_build_editable(config_settings), *_torch_requirement()]

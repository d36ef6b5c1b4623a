"""Builds the C++/CUDA library next to the package; everything else is in pyproject.toml.

The library is no Python module: PyTorch loads it. So one wheel per platform (``py3-none-<platform>``) serves every
Python, and every torch from 2.11 on. Environment variables:

    EMBEDKERNELS_CUDA=0                 leave the CUDA code out
    EMBEDKERNELS_CUDA_ARCHS=80,90       only these compute capabilities; "native": those of this machine's GPUs
    EMBEDKERNELS_BUILD_EXTENSION=0      pure Python
    EMBEDKERNELS_REQUIRE_EXTENSION=1    fail instead of falling back to pure Python (not: to a library without CUDA)
    CUDA_HOME, CXX, MAX_JOBS            as usual
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import OptionError

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "csrc" / "tools"))

import builder  # noqa: E402


class BuildPackage(build_py):
    """Starts from an empty folder: a module that was deleted must not come back from an earlier build."""

    def run(self) -> None:
        built = Path(self.build_lib) / "embedkernels"
        target, source = built.resolve(), (ROOT / "embedkernels").resolve()
        if target == source or target in source.parents or source in target.parents:
            raise OptionError(f"--build-lib must be outside of the package's source, got {self.build_lib!r}")
        shutil.rmtree(built, ignore_errors=True)
        super().run()


class BuildLibrary(build_ext):
    """Runs ninja where setuptools would compile a Python module."""

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", "/") + ".so"

    def build_extension(self, ext: Extension) -> None:  # noqa: ARG002
        record = builder.build(ROOT / "build" / "extension", self._built())
        print(f"embedkernels' library: {record.reason}")

    def _built(self) -> Path:
        return Path(self.build_lib).resolve() / "embedkernels"

    def copy_extensions_to_source(self) -> None:
        """For ``--inplace`` and editable installations."""
        builder.install(self._built(), ROOT / "embedkernels")

    def get_outputs(self) -> list[str]:
        names = (builder.LIBRARY, builder.RECORD)
        return [str(self._built() / name) for name in names if (self._built() / name).is_file()]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class Wheel(bdist_wheel):
    """``py3-none-<platform>`` with the library, ``py3-none-any`` without."""

    def get_tag(self) -> tuple[str, str, str]:
        library = Path(self.bdist_dir or "") / "embedkernels" / builder.LIBRARY
        return "py3", "none", super().get_tag()[2] if library.is_file() else "any"


setup(
    ext_modules=[Extension("embedkernels._extension", sources=[])],
    cmdclass={"build_py": BuildPackage, "build_ext": BuildLibrary, "bdist_wheel": Wheel},
)

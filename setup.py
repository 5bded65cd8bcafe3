"""Builds the C++ kernels; everything else about the package is in pyproject.toml.

The library is optional: where there is no C++17 compiler, or it fails, the install goes on and says
that the torch reference will be used.
"""

from __future__ import annotations

import platform
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

NATIVE = Path("kernels/tandem_kernels/cpu/native")


class BuildOptionalKernels(build_ext):
    """Says what a failed build means, then lets the install go on."""

    def build_extension(self, ext: Extension) -> None:
        try:
            super().build_extension(ext)
        except Exception as error:
            print(
                f"warning: the C++ kernels were not built ({error}); "
                "on CPUs Tandem will use its torch reference, which is slower",
                file=sys.stderr,
            )


def extensions() -> list[Extension]:
    if platform.system() != "Linux":
        return []
    return [
        Extension(
            "tandem_kernels.cpu._native",
            sources=sorted(str(path) for path in NATIVE.glob("*.cpp")),
            depends=sorted(str(path) for path in (*NATIVE.glob("*.h"), *NATIVE.glob("*.inl"))),
            include_dirs=[str(NATIVE)],
            language="c++",
            extra_compile_args=[
                *("-std=c++17", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-pthread"),
                *("-g0", "-Wno-psabi", "-Wno-uninitialized"),
            ],
            extra_link_args=["-pthread"],
            optional=True,
        )
    ]


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildOptionalKernels})

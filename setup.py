"""Build the CPU kernels: one plain shared object, optional, for any Python 3 of the platform.

Everything else about the package is in `pyproject.toml`. The library is called through ctypes and knows nothing of
Python, so its file name and the wheel's tag do not depend on the Python version. Without a C++ compiler the install
goes on without it, and the reference serves.
"""

from __future__ import annotations

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

CSRC = Path("fedq/kernels/csrc")
NAME = "fedq.kernels.libfedq"
FLAGS = [
    "-std=c++17",
    "-O3",
    "-g0",
    "-fvisibility=hidden",
    "-pthread",
    "-Wno-psabi",
    # The bytes are a promise: no fused multiply-add, no reordered sums, denormals as they are.
    "-ffp-contract=off",
    "-fno-fast-math",
    "-fno-math-errno",
]


class BuildLibrary(build_ext):
    """`build_ext` for a shared object that is not a Python module."""

    def get_ext_filename(self, fullname: str) -> str:
        """Return the library's path without the suffix of a Python version."""
        return fullname.replace(".", "/") + ".so"

    def run(self) -> None:
        """Build, and say in one line if that was not possible; a library of an older build never stays behind."""
        in_tree = self.inplace or self.editable_mode
        built = Path("" if in_tree else self.build_lib, self.get_ext_filename(NAME))
        if in_tree:
            built.unlink(missing_ok=True)
        super().run()
        if not built.exists():
            print(
                "fedq: the C++ kernels were not built, so the slower reference in plain torch will serve; "
                "for the fast ones install a C++ compiler (apt install g++) and install fedq again",
                file=sys.stderr,
            )

    def build_extension(self, ext: Extension) -> None:
        """Compile the translation units side by side and link them."""

        def compiled(source: str) -> str:
            flags = {"extra_postargs": ext.extra_compile_args, "depends": ext.depends}
            objects: list[str] = self.compiler.compile([source], output_dir=self.build_temp, **flags)
            return objects[0]

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            ext.extra_objects = list(pool.map(compiled, ext.sources))
        ext.sources = []
        super().build_extension(ext)


class PlatformWheel(bdist_wheel):
    """`bdist_wheel` tagged ``py3-none-<platform>``."""

    def get_tag(self) -> tuple[str, str, str]:
        """Return the tag: any Python 3, no ABI, this platform."""
        return "py3", "none", super().get_tag()[2]


library = Extension(
    NAME,
    sources=sorted(str(path) for path in CSRC.glob("*.cpp")),
    depends=sorted(str(path) for pattern in ("*.h", "*.inl") for path in CSRC.glob(pattern)),
    language="c++",
    extra_compile_args=FLAGS,
    extra_link_args=["-pthread", "-s"] if sys.platform == "linux" else ["-pthread"],
    optional=True,
)

setup(ext_modules=[library], cmdclass={"build_ext": BuildLibrary, "bdist_wheel": PlatformWheel})

"""The shared object behind the CPU kernels: where it is, whether it loads, and how its functions are called.

Nothing is loaded at import; the first call to `load` does it, once a process.
"""

from __future__ import annotations

import ctypes
import os
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from fedq.errors import FieldError

INSTALLED = Path(__file__).parents[1] / "libfedq.so"
"""Path at which `pip install` puts the library; ``FEDQ_LIBRARY`` names another."""
ISAS = ("avx512", "avx2", "portable")
"""Instruction sets, the best first; ``FEDQ_ISA`` chooses one."""
REMEDY = "apt install g++, then in the checkout of fedq: pip install --no-deps -e ."
"""Commands that build the library where it is missing."""

ABI = 4
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def path() -> Path:
    """Return the library's file, which need not exist."""
    return Path(os.environ.get("FEDQ_LIBRARY") or INSTALLED)


@cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    """Return the library, or None, and in words why there is none."""
    file = path()
    if not file.exists():
        return None, f"{file} was not built: there was no C++ compiler, or nothing was installed yet"
    try:
        lib = ctypes.CDLL(str(file))
        abi = int(lib.fedq_abi())
    except (OSError, AttributeError) as error:
        return None, f"{file} does not load: {error}"
    if abi != ABI:
        return None, f"{file} is of another version of fedq (interface {abi}, wanted {ABI})"
    lib.fedq_isa.restype = ctypes.c_char_p
    lib.fedq_select.argtypes = [ctypes.c_char_p]
    lib.fedq_select.restype = ctypes.c_int64
    wanted = os.environ.get("FEDQ_ISA")
    if wanted:
        _select(lib, wanted)
    return lib, ""


def _select(lib: ctypes.CDLL, isa: str) -> None:
    if lib.fedq_select(isa.encode()) != 0:
        raise FieldError("FEDQ_ISA", isa, f"what this machine runs: {', '.join(_usable(lib))}")


def _usable(lib: ctypes.CDLL) -> list[str]:
    before = lib.fedq_isa()
    found = [name for name in ISAS if lib.fedq_select(name.encode()) == 0]
    lib.fedq_select(before)
    return found


def usable_isas() -> list[str]:
    """Return the instruction sets that this machine runs, the best first; none without a library."""
    lib = load()
    return [] if lib is None else _usable(lib)


def load() -> ctypes.CDLL | None:
    """Return the loaded library, or None where it is missing or unfit (`why_missing` says why).

    Raises:
        FieldError: ``FEDQ_ISA`` names an instruction set that is unknown or that this machine does not have.
    """
    return _load()[0]


def why_missing() -> str:
    """Return in words why there is no library, empty if there is one."""
    return _load()[1]


def newer_sources() -> str:
    """Return the name of a source that is newer than the library, in a source tree that was changed since the build."""
    written = {source.stat().st_mtime: source.name for source in (INSTALLED.parent / "csrc").glob("*.*")}
    newest = max(written, default=0.0)
    return written[newest] if newest > path().stat().st_mtime else ""


def isa() -> str:
    """Return the instruction set in use: ``avx512``, ``avx2`` or ``portable``."""
    return _needed().fedq_isa().decode()


def select_isa(name: str) -> None:
    """Use another instruction set from now on, for tests and benchmarks.

    Raises:
        FieldError: The instruction set is unknown, or this machine does not have it.
    """
    _select(_needed(), name)


def call(name: str, *args: object) -> int:
    """Call the library's ``fedq_<name>`` without the GIL and return its int64.

    Args:
        name: Name of a function that takes pointers (`pointer`), int64 sizes, and structures by `ctypes.byref`.
        args: Arguments of the function; integers are passed as 64 bits, None as a null pointer.
    """
    function = getattr(_needed(), f"fedq_{name}")
    function.restype = ctypes.c_int64
    return int(function(*(ctypes.c_int64(a) if type(a) is int else a for a in args)))


def pointer(x: Tensor | None) -> ctypes.c_void_p | None:
    """Return the address of a tensor's first element, a null pointer for None."""
    return None if x is None else ctypes.c_void_p(x.data_ptr())


def dtype_code(dtype: torch.dtype) -> int:
    """Return the library's number of an input's data type (0 float32, 1 bfloat16, 2 float16)."""
    return _DTYPES[dtype]


def num_threads() -> int:
    """Return the threads that a kernel may use: those of torch."""
    return torch.get_num_threads()


def _needed() -> ctypes.CDLL:
    lib = load()
    if lib is None:
        raise FieldError("FEDQ_KERNELS", "cpp", f"reference, or a built library ({why_missing()}; {REMEDY})")
    return lib

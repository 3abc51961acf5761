"""What this machine offers to fedq, what serves, and what is missing with the command that gets it.

``python -m fedq.doctor`` or ``fedq doctor``. It reads and measures; it changes nothing.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version

import torch
import torch.distributed as dist

import fedq
from fedq import kernels
from fedq.errors import FieldError
from fedq.kernels.cpu import library
from fedq.report.encoding import make_readable
from fedq.runtime.hardware import cpu_name

_BANDWIDTH_BYTES = 64 << 20


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Args:
        name: Name of the part that was looked at.
        text: The state in which it was found.
        remedy: The command that installs what is missing; empty if nothing is.
        is_broken: Whether fedq cannot work this way.
    """

    name: str
    text: str
    remedy: str = ""
    is_broken: bool = False


def examine() -> list[Finding]:
    """Return the findings, in the order in which they are printed."""
    return [
        *_versions(),
        _processor(),
        _memory(),
        *_gpus(),
        _backends(),
        _cpu_kernels(),
        _triton(),
        *_serving(),
    ]


def report(findings: Sequence[Finding]) -> str:
    """Return the findings as text, what is missing last, once for each command."""
    width = max(len(finding.name) for finding in findings)
    lines = [f"{finding.name:<{width}}  {finding.text}" for finding in findings]
    remedies = [(f.name, f.remedy, f.is_broken) for f in findings if f.remedy]
    if remedies:
        lines += ["", "missing"]
        lines += [f"  {name}{' (needed)' if needed else ''}: {remedy}" for name, remedy, needed in remedies]
    return "\n".join(lines)


def main() -> int:
    """Print the report; return 0, or 1 if something that fedq needs is broken."""
    make_readable()
    findings = examine()
    print(report(findings))
    return int(any(finding.is_broken for finding in findings))


# ---- what is looked at -------------------------------------------------------------------------------------------


def _versions() -> list[Finding]:
    found = [
        Finding("fedq", f"{fedq.__version__}, {os.path.dirname(fedq.__file__)}"),
        Finding("python", f"{platform.python_version()}, {platform.system()} {platform.machine()}"),
        Finding("torch", f"{torch.__version__}, {torch.get_num_threads()} threads"),
    ]
    missing = [name for name in _required() if not _is_installed(name)]
    if missing:
        found.append(Finding("packages", f"missing: {', '.join(missing)}", f"pip install {' '.join(missing)}", True))
    return found


def _required() -> list[str]:
    """Return the names of the packages that fedq's own metadata ask for."""
    try:
        wanted = requires("fedq") or []
    except PackageNotFoundError:  # a source tree that was never installed
        return []
    names = [re.match(r"[\w.-]+", text) for text in wanted if "extra ==" not in text]
    return [name[0] for name in names if name]


def _is_installed(name: str) -> bool:
    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True


def _processor() -> Finding:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return Finding("processor", f"{cpu_name()}, {cores} cores for this process")


def _memory() -> Finding:
    one, all_threads = memory_bandwidth(1), memory_bandwidth(torch.get_num_threads())
    return Finding("memory", f"copies {one:.1f} GB/s with 1 thread, {all_threads:.1f} with {torch.get_num_threads()}")


def memory_bandwidth(num_threads: int) -> float:
    """Return how many GB of float32 a plain copy reads a second (it writes as many): what the kernels compare with."""
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        source = torch.ones(_BANDWIDTH_BYTES // 4)
        copy = source.clone()
        seconds = [_timed(lambda: copy.copy_(source)) for _ in range(7)]
    finally:
        torch.set_num_threads(before)
    return _BANDWIDTH_BYTES / statistics.median(seconds) / 1e9


def _timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _gpus() -> list[Finding]:
    if not torch.cuda.is_available():
        built = (
            f"torch was built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch was built without CUDA"
        )
        return [Finding("gpu", f"none ({built})")]
    found = []
    for i in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(i)
        found.append(Finding(f"gpu {i}", f"{gpu.name}, {gpu.total_memory >> 30} GiB, CUDA {torch.version.cuda}"))
    return found


def _backends() -> Finding:
    """Say which of torch.distributed's back ends are built in; without Gloo several ranks cannot work."""
    if not dist.is_available():
        return Finding("collectives", "torch.distributed is missing", "pip install torch", True)
    states = {"Gloo": dist.is_gloo_available(), "NCCL": dist.is_nccl_available(), "MPI": dist.is_mpi_available()}
    there = [name for name, available in states.items() if available]
    text = f"{', '.join(there) or 'none'}{_nccl_version() if states['NCCL'] else ''}"
    return Finding("collectives", text, "" if states["Gloo"] else "pip install torch", not states["Gloo"])


def _nccl_version() -> str:
    return " " + ".".join(map(str, torch.cuda.nccl.version())) if torch.cuda.is_available() else " (no GPU to use it)"


def _cpu_kernels() -> Finding:
    try:
        missing = library.why_missing()
    except FieldError as error:
        return Finding("C++ kernels", str(error), "unset FEDQ_ISA", True)
    if missing:
        return Finding("C++ kernels", f"the reference serves: {missing}", library.REMEDY)
    forced = " (FEDQ_ISA)" if os.environ.get("FEDQ_ISA") else ""
    stale = library.newer_sources()
    text = f"{library.isa()}{forced}, {library.path()}"
    if stale:
        return Finding("C++ kernels", f"{text}, older than {stale}", "pip install -e .")
    return Finding("C++ kernels", text)


def _triton() -> Finding:
    if importlib.util.find_spec("triton") is None:
        return Finding("triton", "not installed", "pip install triton" if torch.cuda.is_available() else "")
    return Finding("triton", version("triton") + ("" if torch.cuda.is_available() else " (no GPU to use it)"))


def _serving() -> list[Finding]:
    """Say what serves tensors on each device, and whether a variable decided it."""
    forced = os.environ.get("FEDQ_KERNELS")
    found = []
    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        try:
            text = kernels.implementation(device) + (" (FEDQ_KERNELS)" if forced else "")
            found.append(Finding(f"serves {device}", text))
        except FieldError as error:
            found.append(Finding(f"serves {device}", str(error), "unset FEDQ_KERNELS", True))
    return found


if __name__ == "__main__":
    sys.exit(main())

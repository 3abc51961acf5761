"""Time the CPU kernels against a memcpy of the same tensor and against rivals, alternated in one run.

    python benchmarks/speed/bench_kernels.py --threads 2 --out kernels.json
    python benchmarks/speed/bench_kernels.py --rival-python PATH      # an interpreter that has bitsandbytes

Each repeat times the copy, every implementation of a kernel and every rival once, in turn; the table gives medians,
GB/s of the input (4 bytes an element) and the time as a multiple of the copy's, with the spread (half the distance
between the quartiles, relative to the median). Before it is timed, each implementation must give the reference's bytes.
Rivals run in this interpreter if it has them, otherwise in the one that ``--rival-python`` names.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import rival_quantizers as quantizers
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # of what the benchmarks share

from evidence import replace_section
from rival_quantizers import Pass, timed
from torch import Tensor

from fedq import kernels
from fedq.kernels import BlockPlan, CastPlan, Plan, SparsePlan, cpu
from fedq.report.encoding import make_readable
from fedq.runfolder.environment import environment_info

TITLE = "Kernels on the CPU"


@dataclass(frozen=True)
class Kernel:
    """One fused pass: what it computes and which rival does something comparable."""

    plan: Plan
    does: str = "encode"
    with_residual: bool = False
    rivals: tuple[str, ...] = ()


SIGN = BlockPlan("sign", 1, 1024)
INT4, INT4_ROTATED = BlockPlan("integer", 4, 256), BlockPlan("integer", 4, 256, rotate=True)
INT8, INT2_ROTATED = BlockPlan("integer", 8, 256), BlockPlan("integer", 2, 256, rotate=True)
KERNELS = {
    "bf16_encode": Kernel(CastPlan("bf16"), rivals=("torch .to(bfloat16)",)),
    "sign_encode": Kernel(SIGN),
    "sign_ef_encode": Kernel(SIGN, with_residual=True, rivals=("torch operations",)),
    "sign_rotated_ef_encode": Kernel(BlockPlan("sign", 1, 256, rotate=True), with_residual=True),
    "ternary_ef_encode": Kernel(BlockPlan("ternary", 0, 256), with_residual=True),
    "int8_encode": Kernel(INT8, rivals=("bitsandbytes 8-bit", "torch quantize_per_channel")),
    "int8_stochastic_encode": Kernel(BlockPlan("integer", 8, 256, stochastic=True)),
    "int4_encode": Kernel(INT4, rivals=("bitsandbytes nf4",)),
    "int4_ef_encode": Kernel(INT4, with_residual=True),
    "int4_rotated_ef_encode": Kernel(INT4_ROTATED, with_residual=True),
    "int3_rotated_ef_encode": Kernel(BlockPlan("integer", 3, 256, rotate=True), with_residual=True),
    "int2_rotated_ef_encode": Kernel(INT2_ROTATED, with_residual=True),
    "blocktopk_ef_encode": Kernel(SparsePlan("blocktopk", 2, k=1, block=64), with_residual=True),
    "topk_ef_encode": Kernel(SparsePlan("topk", 16, density=0.01), with_residual=True, rivals=("torch topk",)),
    "randk_ef_encode": Kernel(SparsePlan("randk", 16, density=0.01), with_residual=True),
    "threshold_ef_encode": Kernel(SparsePlan("threshold", 8, value=60.0), with_residual=True),
    "decode_accumulate": Kernel(SIGN, does="decode_accumulate"),
    "int8_decode_accumulate": Kernel(INT8, does="decode_accumulate"),
    "int4_rotated_decode_accumulate": Kernel(INT4_ROTATED, does="decode_accumulate"),
    "blocktopk_decode_accumulate": Kernel(SparsePlan("blocktopk", 2, k=1, block=64), does="decode_accumulate"),
    "reduce_sign_4": Kernel(SIGN, does="reduce", with_residual=True),
    "reduce_int4_rotated_4": Kernel(INT4_ROTATED, does="reduce", with_residual=True),
}
SEED = 0x1234_5678_9ABC_DEF0
REDUCED = 4
"""Payloads that a ``reduce`` takes in."""


@dataclass(frozen=True)
class Row:
    """What one implementation of one kernel measured."""

    kernel: str
    implementation: str
    gb_per_s: float
    ratio_to_memcpy: float
    spread: float
    milliseconds: float
    threads: int
    num_elements: int


# ---- ours ----------------------------------------------------------------------------------------------------------


@contextmanager
def serving(implementation: str) -> Iterator[None]:
    """Let one implementation serve: ``reference``, ``cpp`` or ``cpp-<instruction set>``."""
    name, _, isa = implementation.partition("-")
    before, native = os.environ.get("FEDQ_KERNELS"), cpu.isa() if isa else ""
    os.environ["FEDQ_KERNELS"] = name
    if isa:
        cpu.select_isa(isa)
    try:
        yield
    finally:
        os.environ.pop("FEDQ_KERNELS")
        if before is not None:
            os.environ["FEDQ_KERNELS"] = before
        if isa:
            cpu.select_isa(native)


def our_pass(kernel: Kernel, x: Tensor, residual: Tensor, payload: Tensor) -> Pass:
    """Return the pass to time; it writes into buffers that exist already."""
    plan, num = kernel.plan, x.numel()
    kept = residual if kernel.with_residual else None
    if kernel.does == "encode":
        out = None if isinstance(plan, SparsePlan) and plan.kind == "threshold" else torch.empty_like(payload)
        return lambda: kernels.encode(plan, x, seed=SEED, out=out, residual=kept)
    if kernel.does == "decode_accumulate":
        total = torch.zeros(num)
        return lambda: kernels.decode(plan, payload, num, seed=SEED, out=total, weight=0.5)
    datas, weights, seeds = [payload] * REDUCED, [0.25] * REDUCED, [SEED] * REDUCED
    out = torch.empty_like(payload)
    return lambda: kernels.reduce(plan, datas, weights, seeds, plan, num, seed=SEED, out=out, residual=kept)


def result_of(kernel: Kernel, num: int) -> tuple[Tensor, ...]:
    """Return everything that a kernel writes, for a small tensor."""
    x, residual = torch.randn(num, generator=torch.Generator().manual_seed(1)), torch.linspace(-1, 1, num)
    payload = kernels.encode(kernel.plan, x, seed=SEED)
    if kernel.does == "decode_accumulate":
        total = torch.linspace(-1, 1, num)
        kernels.decode(kernel.plan, payload, num, seed=SEED, out=total, weight=0.5)
        return (total,)
    if kernel.does == "reduce":
        plan, four = kernel.plan, [payload] * REDUCED
        data = kernels.reduce(plan, four, [0.25] * REDUCED, [SEED] * REDUCED, plan, num, seed=SEED, residual=residual)
        return data, residual
    data = kernels.encode(kernel.plan, x, seed=SEED, residual=residual if kernel.with_residual else None)
    return data, residual


def check_equal(name: str, implementation: str, num: int = 100_003) -> None:
    """Stop unless the implementation gives what the reference gives, bit for bit."""
    with serving("reference"):
        expected = result_of(KERNELS[name], num)
    with serving(implementation):
        found = result_of(KERNELS[name], num)
    for a, b in zip(expected, found, strict=True):
        if not torch.equal(a.view(torch.uint8), b.view(torch.uint8)):
            raise SystemExit(f"{name}: {implementation} differs from the reference")


# ---- rivals --------------------------------------------------------------------------------------------------------


class RivalProcess:
    """Rivals in an interpreter of their own; idle except while one is timed."""

    def __init__(self, python: str, num: int, threads: int) -> None:
        command = [python, quantizers.__file__, str(num), str(threads)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        hello = json.loads(self._read())
        self.versions: dict[str, str] = hello["versions"]
        self.names: list[str] = hello["names"]

    def seconds(self, name: str) -> float:
        assert self._process.stdin is not None
        self._process.stdin.write(name + "\n")
        self._process.stdin.flush()
        return float(self._read())

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _read(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("the rivals' interpreter ended early; its errors are above")
        return line


# ---- measuring -----------------------------------------------------------------------------------------------------


def measure(
    name: str, implementations: list[str], x: Tensor, rival_seconds: dict[str, Callable[[], float]], repeats: int
) -> list[Row]:
    """Time every implementation of a kernel and its rivals, alternated with the copy."""
    kernel, copied = KERNELS[name], torch.empty_like(x)
    payload = kernels.encode(kernel.plan, x, seed=SEED)
    residual = torch.zeros_like(x)
    if isinstance(kernel.plan, SparsePlan) and kernel.plan.kind == "threshold":
        residual.uniform_(-kernel.plan.value, kernel.plan.value)  # as after many steps: about 1 in 75 passes
    work = our_pass(kernel, x, residual, payload)

    def ours(implementation: str) -> float:
        with serving(implementation):
            return timed(work)

    contenders: dict[str, Callable[[], float]] = {"memcpy": lambda: timed(lambda: copied.copy_(x))}
    contenders |= {i: (lambda i=i: ours(i)) for i in implementations}  # type: ignore[misc]
    contenders |= {rival: rival_seconds[rival] for rival in kernel.rivals if rival in rival_seconds}
    seconds: dict[str, list[float]] = {contender: [] for contender in contenders}
    slow: set[str] = set()
    for repeat in range(repeats + 1):
        # Another order each time: whoever comes after a copy finds the cache full of what it wrote.
        names = list(contenders)
        for contender in names[repeat % len(names) :] + names[: repeat % len(names)]:
            if contender in slow and repeat > 3:
                continue
            took = contenders[contender]()
            if repeat:  # the first is a warm-up
                seconds[contender].append(took)
            if took > 1.0:
                slow.add(contender)
    copy = statistics.median(seconds["memcpy"])
    return [summary(name, contender, values, copy, x.numel()) for contender, values in seconds.items()]


def summary(kernel: str, implementation: str, seconds: list[float], copy: float, num: int) -> Row:
    median = statistics.median(seconds)
    low, _, high = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else (median, median, median)
    return Row(
        kernel=kernel,
        implementation=implementation,
        gb_per_s=4 * num / median / 1e9,
        ratio_to_memcpy=median / copy,
        spread=(high - low) / 2 / median,
        milliseconds=1e3 * median,
        threads=torch.get_num_threads(),
        num_elements=num,
    )


def table(rows: list[Row], about: dict[str, Any]) -> str:
    first = rows[0]
    lines = [
        f"## {TITLE}",
        "",
        f"{4 * first.num_elements / 1e6:.0f} MB of float32, {first.threads} threads, {about['hardware']}, "
        f"{about['date']}, {', '.join(f'{k} {v}' for k, v in about['versions'].items())}. Copy: torch's `copy_` of "
        "the same tensor, alternated with everything else. Medians; the spread is half the distance of the quartiles.",
        "",
        "| kernel | implementation | GB/s of input | time / copy | spread |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {r.kernel} | {r.implementation} | {r.gb_per_s:.2f} | {r.ratio_to_memcpy:.2f} | {100 * r.spread:.0f} % |"
        for r in rows
        if r.implementation != "memcpy"
    ]
    copies = [r.gb_per_s for r in rows if r.implementation == "memcpy"]
    lines += ["", f"The copy itself: {statistics.median(copies):.2f} GB/s (read and written at once).", ""]
    lines += ["Re-made by `python benchmarks/speed/bench_kernels.py --rival-python PATH --table docs/results.md`.", ""]
    return "\n".join(lines)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--elements", type=int, default=25 * 1024 * 1000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--kernels", nargs="+", default=list(KERNELS), choices=list(KERNELS), metavar="KERNEL")
    parser.add_argument("--implementations", nargs="+", default=["cpp", "cpp-avx2", "cpp-portable", "reference"])
    parser.add_argument("--rival-python", help="interpreter with bitsandbytes")
    parser.add_argument("--out", type=Path, help="write the rows as JSON")
    parser.add_argument("--table", type=Path, help="Markdown file whose section is replaced; default: print")
    args = parser.parse_args()
    if args.elements % 1024:
        parser.error(f"--elements {args.elements}: a multiple of 1024, for the rivals' blocks")
    return args


def main() -> None:
    make_readable()
    args = parse_args()
    torch.set_num_threads(args.threads)
    x = torch.randn(args.elements)
    here = {name: (lambda work=work: timed(work)) for name, work in quantizers.passes(x).items()}
    versions, process = quantizers.versions(), None
    if args.rival_python:
        process = RivalProcess(args.rival_python, args.elements, args.threads)
        versions |= process.versions
        there = {name: (lambda name=name: process.seconds(name)) for name in process.names}
        here = there | here  # type: ignore[assignment]
    if "bitsandbytes" not in versions:
        print("bitsandbytes is not here: pip install bitsandbytes, or --rival-python PATH", file=sys.stderr)
    rows: list[Row] = []
    for name in args.kernels:
        for implementation in args.implementations:
            check_equal(name, implementation)
        measured = measure(name, args.implementations, x, here, args.repeats)  # type: ignore[arg-type]
        for row in measured:
            print(
                f"{name:32} {row.implementation:26} {row.ratio_to_memcpy:7.2f}x  {row.gb_per_s:7.2f} GB/s", flush=True
            )
        rows += measured
    if process:
        process.close()
    about = {
        "hardware": f"{environment_info()['cpu']}, {os.cpu_count()} CPUs, {platform.machine()}",
        "date": datetime.date.today().isoformat(),
        "versions": versions | {"python": platform.python_version()},
    }
    if args.out:
        args.out.write_text(json.dumps([asdict(row) | about for row in rows], indent=1) + "\n")
    section = table(rows, about)
    if args.table:
        replace_section(args.table, TITLE, section)
    else:
        print(section)


if __name__ == "__main__":
    main()

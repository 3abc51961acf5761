"""Time the Triton kernels against the device's own copy and the torch reference, alternated in one run.

    python benchmarks/speed/bench_gpu_kernels.py --out gpu_kernels.json

GB/s counts the bytes that a fused pass must move: 4 an element, 8 more with feedback, and the payload to encode; 8 and
the payload to decode and add; the payloads, 8 and the payload to reduce; 8 to copy. ``ratio_to_memcpy`` is the time as
a multiple of a copy of the same tensor, ``of_copy_bandwidth`` the GB/s as a fraction of the copy's. A sample is a few
calls in a row between two CUDA events, launches included; medians, with the spread (half the distance between the
quartiles, relative to the median). ``cycle_*`` is what a 25 MiB bucket costs from gradient to averaged gradient:
encode, reduce of four payloads, decode. Before it is timed, each kernel must give the reference's bytes on this GPU.

Without a GPU this says what it would run.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedq.kernels import BlockPlan, Plan, SparsePlan, reference
from fedq.kernels import triton as fused
from fedq.report.encoding import make_readable

Pass = Callable[[], object]

SIGN = BlockPlan("sign", 1, 1024)
INT4, INT4_ROTATED = BlockPlan("integer", 4, 256), BlockPlan("integer", 4, 256, rotate=True)
BLOCKTOPK = SparsePlan("blocktopk", 2, k=1, block=64)
PLANS: dict[str, Plan] = {
    "sign_ef_encode": SIGN,
    "int8_encode": BlockPlan("integer", 8, 256),
    "int4_encode": INT4,
    "int4_ef_encode": INT4,
    "int4_rotated_ef_encode": INT4_ROTATED,
    "blocktopk_ef_encode": BLOCKTOPK,
    "decode_accumulate": SIGN,
    "int4_rotated_decode_accumulate": INT4_ROTATED,
    "reduce": SIGN,
    "reduce_int4_rotated": INT4_ROTATED,
    "cycle_sign": SIGN,
    "cycle_int4_rotated": INT4_ROTATED,
}
"""The passes by name, and what each computes."""
IMPLEMENTATIONS = {"triton": fused, "reference": reference}
SEED = 0x1234_5678_9ABC_DEF0
REDUCED = 4
"""Payloads that a reduce takes in."""
BUCKET = 25 * (1 << 20) // 4
"""Elements of a 25 MiB bucket."""
CALLS = 5
"""Calls in a sample, on as many sets of buffers: small ones must not stay in the cache."""


@dataclass(frozen=True)
class Row:
    """What one implementation of one pass measured."""

    kernel: str
    implementation: str
    gb_per_s: float
    ratio_to_memcpy: float
    of_copy_bandwidth: float
    spread: float
    microseconds: float
    num_elements: int


@dataclass
class Buffers:
    """What one call reads and writes."""

    x: Tensor
    residual: Tensor
    payload: Tensor
    payloads: list[Tensor]
    out: Tensor
    total: Tensor


# ---- passes ----------------------------------------------------------------------------------------------------------


def buffers(plan: Plan, num: int, set_index: int) -> Buffers:
    generator = torch.Generator("cuda").manual_seed(set_index)
    x = torch.randn(num, device="cuda", generator=generator)
    payload = reference.encode(plan, x, seed=SEED)
    payloads = [payload.clone() for _ in range(REDUCED)]
    return Buffers(x, 0.1 * x.flip(0), payload, payloads, torch.zeros_like(payload), torch.zeros_like(x))


def call(module: Any, name: str, b: Buffers) -> None:
    """Run one pass of an implementation."""
    plan, num = PLANS[name], b.x.numel()
    if "encode" in name:
        kept = b.residual if "_ef_" in name else None
        module.encode(plan, b.x, seed=SEED, out=b.out, residual=kept)
    elif "decode" in name:
        module.decode(plan, b.payload, num, seed=SEED, out=b.total, weight=0.5)
    else:
        if name.startswith("cycle"):
            module.encode(plan, b.x, seed=SEED, out=b.payload, residual=b.residual)
        weights, seeds = [1 / REDUCED] * REDUCED, [SEED] * REDUCED
        module.reduce(plan, b.payloads, weights, seeds, plan, num, seed=SEED, out=b.out, residual=b.residual)
        if name.startswith("cycle"):
            module.decode(plan, b.out, num, seed=SEED, out=b.total)


def moved_bytes(name: str, b: Buffers) -> int:
    """Return the bytes that a fused pass must read and write."""
    num, payload = b.x.numel(), b.payload.numel()
    reduce = REDUCED * payload + 8 * num + payload
    if "encode" in name:
        return 4 * num + (8 * num if "_ef_" in name else 0) + payload
    if "decode" in name:
        return 8 * num + payload
    return reduce + (12 * num + payload + 4 * num + payload if name.startswith("cycle") else 0)


def check_equal(name: str, num: int = 1_000_003) -> None:
    """Stop unless the kernels give what the reference gives on this GPU, bit for bit."""
    ours, theirs = buffers(PLANS[name], num, 0), buffers(PLANS[name], num, 0)
    call(fused, name, ours)
    call(reference, name, theirs)
    for field in ("residual", "payload", "out", "total"):
        if not torch.equal(getattr(ours, field).view(torch.uint8), getattr(theirs, field).view(torch.uint8)):
            raise SystemExit(f"{name}: {field} differs from the reference")


# ---- measuring -------------------------------------------------------------------------------------------------------


def microseconds(passes: list[Pass]) -> float:
    """Return the device time of a pass, the mean over one call of each."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for work in passes:
        work()
    end.record()
    end.synchronize()
    return 1e3 * begin.elapsed_time(end) / len(passes)


def measure(name: str, num: int, implementations: list[str], repeats: int) -> list[Row]:
    """Time the copy and every implementation in turn."""
    sets = [buffers(PLANS[name], num, i) for i in range(CALLS)]
    contenders: dict[str, list[Pass]] = {"memcpy": [lambda b=b: b.total.copy_(b.x) for b in sets]}  # type: ignore[misc]
    for i in implementations:
        contenders[i] = [lambda b=b, i=i: call(IMPLEMENTATIONS[i], name, b) for b in sets]  # type: ignore[misc]
    samples: dict[str, list[float]] = {contender: [] for contender in contenders}
    for repeat in range(repeats + 2):
        for contender, passes in contenders.items():
            if contender == "reference" and repeat > 5:
                continue
            took = microseconds(passes)
            if repeat >= 2:  # the first ones compile and warm up
                samples[contender].append(took)
    copy = statistics.median(samples["memcpy"])
    copy_speed = 8 * num / copy / 1e3
    rows = []
    for contender, values in samples.items():
        median = statistics.median(values)
        low, _, high = statistics.quantiles(values, n=4)
        speed = (8 * num if contender == "memcpy" else moved_bytes(name, sets[0])) / median / 1e3
        spread = (high - low) / 2 / median
        rows.append(Row(name, contender, speed, median / copy, speed / copy_speed, spread, median, num))
    return rows


def about() -> dict[str, Any]:
    import triton

    return {
        "hardware": torch.cuda.get_device_name(),
        "date": datetime.date.today().isoformat(),
        "versions": {
            "torch": torch.__version__,
            "triton": triton.__version__,
            "cuda": torch.version.cuda,
            "python": platform.python_version(),
        },
    }


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--elements", type=int, default=25 * 1024 * 1000)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--kernels", nargs="+", default=list(PLANS), choices=list(PLANS), metavar="KERNEL")
    parser.add_argument("--implementations", nargs="+", default=list(IMPLEMENTATIONS), choices=list(IMPLEMENTATIONS))
    parser.add_argument("--out", type=Path, help="write the rows as JSON")
    args = parser.parse_args()
    if args.repeats < 2:
        parser.error(f"--repeats {args.repeats}: at least 2, for a spread")
    return args


def main() -> None:
    make_readable()
    args = parse_args()
    if fused.why_missing() or not torch.cuda.is_available():
        missing = fused.why_missing() or "there is no CUDA device"
        print(f"Nothing was timed: {missing}. With a GPU this would check and time, against a copy:")
        for name in args.kernels:
            num = BUCKET if name.startswith("cycle") else args.elements
            print(f"  {name:32} {num:>11,} elements  {PLANS[name]}")
        return
    rows: list[Row] = []
    for name in args.kernels:
        check_equal(name)
        num = BUCKET if name.startswith("cycle") else args.elements
        for row in measure(name, num, args.implementations, args.repeats):
            rows.append(row)
            print(
                f"{name:32} {row.implementation:10} {row.microseconds:9.1f} us  {row.gb_per_s:7.0f} GB/s  "
                f"{row.ratio_to_memcpy:6.2f}x a copy  {100 * row.of_copy_bandwidth:4.0f} % of its bandwidth  "
                f"+-{100 * row.spread:.0f} %",
                flush=True,
            )
    if args.out:
        args.out.write_text(json.dumps([asdict(row) | about() for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()

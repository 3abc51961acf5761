"""What each codec loses and costs on known distributions, beside theory and the design's reference figures.

    python benchmarks/speed/distortion.py --markdown

NMSE is ``|decoded - x|^2 / |x|^2`` on iid samples; ``2^(-2R)`` is the rate-distortion bound of a Gaussian at the bits
an element that really travel. Times are medians, on one thread unless ``--threads`` says otherwise.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedq.codecs import codec
from fedq.report.encoding import make_readable

DISTRIBUTIONS: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "gauss": lambda generator, num: generator.standard_normal(num),
    "laplace": lambda generator, num: generator.laplace(size=num),
    "student-t3": lambda generator, num: generator.standard_t(3, num),
}

SPECS = (
    *("fp32", "fp16", "bf16", "int8", "int7", "int6", "int5", "int4", "int4:rotate=false", "int3"),
    *("int2", "int2:rotate=false", "int1", "ternary", "ternary:rotate=true"),
    *("sign", "sign:block=256", "sign:block=256,rotate=true", "sign:scale=unbiased"),
    *(
        "int8:rounding=stochastic",
        "int4:rounding=stochastic",
        "ternary:rounding=stochastic",
        "sign:rounding=stochastic",
    ),
    *("topk:density=0.01", "topk:density=0.01,bits=4", "blocktopk", "blocktopk:k=1,block=64,bits=2"),
    *("randk:density=0.01", "threshold:value=2.5"),
)

REFERENCE = {
    "int4": (0.011, 0.011, 0.011),
    "int4:rotate=false": (0.016, 0.032, 0.076),
    "int2": (0.118, 0.117, 0.112),
    "int2:rotate=false": (0.65, 0.69, 0.62),
    "int1": (0.36, 0.50, 0.60),
    "sign:block=256": (0.36, 0.50, 0.60),
    "sign:block=256,rotate=true": (0.36, 0.36, 0.33),
}
"""NMSE by distribution that the design expects; the scaled sign and absmax at blocks of 256."""


def milliseconds(action: Callable[[], object], repeats: int) -> float:
    """Return the median time of an action."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        action()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def measure(spec: str, x: Tensor, *, seed: int, repeats: int) -> dict[str, float]:
    """Return bits an element, NMSE, its bound, cosine and times a million elements of one codec on flat float32."""
    chosen, millions = codec(spec), x.numel() / 1e6
    payload = chosen.encode(x, seed=seed)
    exact, decoded = x.double(), payload.decode().double()
    norms = exact.norm() * decoded.norm()
    return {
        "bits_per_element": payload.bits_per_element,
        "nmse": ((decoded - exact).square().sum() / exact.square().sum()).item(),
        "bound": 2.0 ** (-2 * payload.bits_per_element),
        "cosine": (exact @ decoded / norms).item() if norms > 0 else 0.0,
        "encode_ms": milliseconds(lambda: chosen.encode(x, seed=seed), repeats) / millions,
        "decode_ms": milliseconds(payload.decode, repeats) / millions,
    }


def measure_all(specs: Sequence[str], *, num: int, seed: int, repeats: int) -> list[dict[str, Any]]:
    """Return a row for each codec and distribution."""
    rows = []
    for index, (name, draw) in enumerate(DISTRIBUTIONS.items()):
        x = torch.from_numpy(draw(np.random.default_rng([seed, index]), num)).float()
        for spec in specs:
            expected = REFERENCE[spec][index] if spec in REFERENCE else None
            result = measure(spec, x, seed=seed, repeats=repeats)
            rows.append(
                {"codec": spec, "distribution": name, "num": num, "seed": seed, "reference": expected, **result}
            )
    return rows


def hardware() -> str:
    """Return the processor's name, or what the platform knows of it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def figure(value: float | None) -> str:
    """Return three significant digits, or a dash."""
    return "-" if value is None else "0" if value == 0 else f"{value:.3g}"


def table(rows: list[dict[str, Any]]) -> list[list[str]]:
    """Return header and lines: one codec a line, the distributions side by side; times are those of the first."""
    names = list(DISTRIBUTIONS)
    head = [
        "codec",
        "bits/element",
        "2^(-2R)",
        *[f"NMSE {n}" for n in names],
        "reference",
        "cosine",
        "encode",
        "decode",
    ]
    lines = [head]
    for spec in dict.fromkeys(row["codec"] for row in rows):
        mine = {row["distribution"]: row for row in rows if row["codec"] == spec}
        first = mine[names[0]]
        known = [figure(mine[n]["reference"]) for n in names]
        lines.append(
            [
                f"{spec}",
                f"{first['bits_per_element']:.3f}",
                figure(first["bound"]),
                *[figure(mine[n]["nmse"]) for n in names],
                " / ".join(known) if spec in REFERENCE else "-",
                f"{first['cosine']:.4f}",
                f"{first['encode_ms']:.1f}",
                f"{first['decode_ms']:.1f}",
            ]
        )
    return lines


def render(lines: list[list[str]], *, markdown: bool) -> str:
    """Return the table as aligned text or as Markdown."""
    if markdown:
        quoted = [lines[0], ["---"] * len(lines[0]), *[[f"`{line[0]}`", *line[1:]] for line in lines[1:]]]
        return "\n".join("| " + " | ".join(line) + " |" for line in quoted)
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, and write what was asked for."""
    make_readable()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--codecs", nargs="+", default=SPECS, metavar="SPEC", help="spec strings instead of the usual list"
    )
    parser.add_argument("--num", type=int, default=1_000_000, help="elements (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of data and codecs (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="timed repetitions (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="write the rows as JSON")
    parser.add_argument("--markdown", action="store_true", help="print a Markdown table")
    args = parser.parse_args(argv)
    if min(args.num, args.repeats, args.threads) < 1:
        parser.error("--num, --repeats and --threads must be at least 1")

    torch.set_num_threads(args.threads)
    where = f"torch {torch.__version__}, {hardware()}, {args.threads} thread(s)"
    print(f"{args.num:,} elements, seed {args.seed}; encode and decode in ms a million elements; {where}\n")
    rows = measure_all(args.codecs, num=args.num, seed=args.seed, repeats=args.repeats)
    print(render(table(rows), markdown=args.markdown))
    if args.out is not None:
        args.out.write_text(json.dumps({"torch": torch.__version__, "hardware": hardware(), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()

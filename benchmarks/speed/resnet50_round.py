"""Run one round of five steps with ResNet-50 for several codecs: bytes against the formula, images a second.

    python benchmarks/speed/resnet50_round.py --work DIR --table docs/results.md

Every arm is a job of `train_resnet50.py` with two clients. The formula is written out here, from the shapes alone and
not with the library's own size functions: codes and scales of a parameter are padded to whole blocks, 1-D parameters
and BatchNorm statistics travel as bfloat16 (in the codec's own type under a cast), and a message has a 52-byte header.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # of what the benchmarks share

from evidence import ROOT, replace_section

from fedq.models import build_model
from fedq.report.encoding import make_readable

HEADER_NBYTES = 52
CLIENTS, STEPS, BATCH = 2, 5, 16

Formula = Callable[[int], float]


def blocks(num: int, width: int) -> int:
    return -(-num // width)


def grouped(bits: int, width: int, *, is_padded: bool) -> Formula:
    """Codes of ``bits`` bits (of whole blocks where values are rotated), one bfloat16 scale a block."""
    return lambda num: (width * blocks(num, width) if is_padded else num) * bits / 8 + 2 * blocks(num, width)


ARMS: dict[str, tuple[Formula, int]] = {
    "fp32": (lambda num: 4 * num, 4),
    "bf16": (lambda num: 2 * num, 2),
    "int8": (grouped(8, 256, is_padded=False), 2),
    "int4": (grouped(4, 256, is_padded=True), 2),
    "int2": (grouped(2, 256, is_padded=True), 2),
    "sign": (grouped(1, 1024, is_padded=False), 2),
    "blocktopk:k=1,block=64,bits=2": (lambda num: blocks(num, 64) * (6 + 2) / 8 + 2 * blocks(num, 4096), 2),
}
"""Bytes of a parameter of two or more dimensions, and bytes of every other value, by codec."""


def formula_nbytes(codec: str, model: torch.nn.Module) -> float:
    """Return the bytes of one message."""
    coded, plain = ARMS[codec]
    params = list(model.parameters())
    buffers = [b for b in model.buffers() if b.is_floating_point()]
    exact = sum(t.numel() for t in (*(p for p in params if p.dim() < 2), *buffers))
    return HEADER_NBYTES + plain * exact + sum(coded(p.numel()) for p in params if p.dim() >= 2)


def run(codec: str, work: Path, threads: int) -> dict[str, Any]:
    """Run one job unless its summary exists; return the summary and the round's own seconds."""
    out = work / codec.split(":")[0]
    if not (out / "summary.json").exists():
        flags = f"""--dataset digits --val-fraction 0.02 --num-clients {CLIENTS} --rounds 1 --local-steps {STEPS}
            --batch-size {BATCH} --uplink {codec} --downlink int8 --threads {threads}"""
        job = [sys.executable, str(ROOT / "train_resnet50.py"), *flags.split()]
        subprocess.run([*job, "--out", str(out)], check=True, stdout=subprocess.DEVNULL)
    summary: dict[str, Any] = json.loads((out / "summary.json").read_text())
    summary["round_seconds"] = json.loads((out / "metrics.jsonl").read_text().splitlines()[0])["seconds"]
    return summary


def table(results: dict[str, dict[str, Any]], model: torch.nn.Module) -> str:
    head = next(iter(results.values()))
    lines = [
        "## ResNet-50: one round of five steps",
        "",
        f"32x32 images, {head['num_params']:,} parameters, {CLIENTS} clients, {STEPS} steps of {BATCH} images each, "
        f"{head['precision']}, {head['threads']} threads of {head['cpu']}, torch {head['versions']['torch']}, commit "
        f"{(head['git_commit'] or 'unknown')[:10]}. Images a second are those of the whole round: training, coding, "
        "server step, downlink and one validation pass over 29 images.",
        "",
        "| uplink | MB up, counted | MB up, formula | counted / formula | float32 / counted | s | images/s |",
        "|---|---|---|---|---|---|---|",
    ]
    for codec, summary in results.items():
        counted, formula = summary["uplink_bytes"], CLIENTS * formula_nbytes(codec, model)
        seconds = summary["round_seconds"]
        cells = [
            f"`{codec}`",
            f"{counted / 1e6:.3f}",
            f"{formula / 1e6:.3f}",
            f"{counted / formula:.5f}",
            f"{summary['uplink_bytes_fp32'] / counted:.1f}x",
            f"{seconds:.1f}",
            f"{CLIENTS * STEPS * BATCH / seconds:.1f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    remade = "python benchmarks/speed/resnet50_round.py --work DIR --table docs/results.md"
    return "\n".join([*lines, "", f"Re-made by `{remade}`.", ""])


def main() -> None:
    make_readable()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="where the runs' folders go")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--table", type=Path, help="Markdown file whose section is replaced; default: print")
    args = parser.parse_args()
    results = {codec: run(codec, args.work, args.threads) for codec in ARMS}
    model = build_model("resnet50", num_classes=10, in_channels=1, image_size=32)
    section = table(results, model)
    if args.table:
        replace_section(args.table, "ResNet-50: one round of five steps", section)
    else:
        print(section)


if __name__ == "__main__":
    main()

"""Size on disk and latency of few-bit models on this CPU, beside float32 and torch's own int8.

    python benchmarks/speed/bench_lowbit.py --threads 2 --out lowbit.json --table docs/few_bit_models.md

Sizes are those of files: safetensors for float32, `model.fedq` for few bits, `torch.save` of the state dict for torch's
int8. The error is ``|Q(w) - w|² / |w|²`` over the few-bit weights, for weights as they are drawn before training.

Latency is that of one forward pass. All arms of a network and batch size run in turns that begin with another arm each
time, and the first turn is not timed; medians, and half the distance of the quartiles. No arm needs trained weights:
the work does not depend on their values. Before they are timed, arms that should agree are compared.
"""

from __future__ import annotations

import argparse
import copy
import io
import json
import operator
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # of what the benchmarks share

from evidence import replace_section
from links import about_run, median_and_spread
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F

from fedq.kernels.cpu import library
from fedq.lowbit import PackedModel, PackedWeight, deploy, pack, save_packed, use_few_bits
from fedq.lowbit.packed import relative_error
from fedq.lowbit.xnor import use_xnor
from fedq.models import build_model
from fedq.report.encoding import make_readable

TITLE = "Size and latency on a CPU"
COMMAND = "python benchmarks/speed/bench_lowbit.py --table docs/few_bit_models.md"
SPECS = {"1": "binary", "1.6": "ternary", "2": "int2", "4": "int4", "8": "int8"}
FLOAT, FLOAT_BINARY = "float32", "binary inputs and weights, float arithmetic"
CALIBRATION = 4
"""Batches of 16 from which torch's static int8 takes its ranges."""
Arms = dict[str, Callable[[Tensor], Tensor]]


@dataclass
class Size:
    """One file."""

    model: str
    arm: str
    nbytes: int
    ratio_to_float32: float
    overhead: float | None
    """Beyond codes, scales and exact tensors, relative to these."""
    error: float | None


@dataclass
class Latency:
    """One arm at one batch size."""

    model: str
    arm: str
    batch_size: int
    ms: float
    spread: float
    ratio_to_float32: float
    threads: int
    num_passes: int


# ---- arms ----------------------------------------------------------------------------------------------------------


class Unpacking(nn.Module):
    """A layer that holds packed codes and makes float weights of them in every forward pass."""

    def __init__(self, layer: nn.Conv2d | nn.Linear, weight: PackedWeight) -> None:
        super().__init__()
        self.layer, self.packed = layer, weight

    def forward(self, x: Tensor) -> Tensor:
        layer, weight = self.layer, self.packed.values
        if isinstance(layer, nn.Linear):
            return F.linear(x, weight, layer.bias)
        return layer._conv_forward(x, weight, layer.bias)


def network(model: str) -> nn.Module:
    torch.manual_seed(0)
    return build_model(model).eval()


def few_bit(model: str, spec: str, activations: str = "float") -> nn.Module:
    made = network(model)
    use_few_bits(made, spec, activations=activations)
    return made.eval()


def unpacked_at_load(model: str, packed: PackedModel) -> nn.Module:
    made = network(model)
    packed.load_into(made)
    return made


def unpacking(model: str, packed: PackedModel) -> nn.Module:
    made = unpacked_at_load(model, packed)
    for name, weight in packed.weights.items():
        parent, _, attribute = name.removesuffix(".weight").rpartition(".")
        layer = made.get_submodule(name.removesuffix(".weight"))
        setattr(made.get_submodule(parent), attribute, Unpacking(layer, weight))  # type: ignore[arg-type]
    return made


def dynamic_int8(model: str) -> nn.Module:
    """Quantize linear layers alone: torch's dynamic quantization has no convolutions."""
    made: nn.Module = torch.ao.quantization.quantize_dynamic(network(model), {nn.Linear}, torch.qint8)
    return made


def static_int8(model: str) -> nn.Module:
    """Quantize all layers and inputs: FX graph mode with the default settings of the x86 (oneDNN, fbgemm) engine."""
    from torch.ao.quantization import get_default_qconfig_mapping, quantize_fx

    traced = torch.fx.symbolic_trace(network(model))
    for node in traced.graph.nodes:
        if node.op == "call_method" and node.target == "add_":  # of which FX knows no quantized form
            node.op, node.target = "call_function", operator.add
    traced.recompile()
    torch.backends.quantized.engine = "x86"
    prepared = quantize_fx.prepare_fx(traced, get_default_qconfig_mapping("x86"), (torch.randn(1, 3, 32, 32),))
    generator = torch.Generator().manual_seed(1)
    for _ in range(CALIBRATION):
        prepared(torch.randn(16, 3, 32, 32, generator=generator))
    made: nn.Module = quantize_fx.convert_fx(prepared)
    return made


def contenders(model: str) -> Arms:
    """Return every arm by name, checked against those with the same weights."""
    trained, packed = few_bit(model, "binary"), pack(few_bit(model, "binary"))
    both = few_bit(model, "binary", "binary")
    channels_last = network(model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    arms: Arms = {
        FLOAT: network(model),
        "float32, channels last": lambda x: channels_last(x.to(memory_format=torch.channels_last)),
        "binary weights, unpacked at load": unpacked_at_load(model, packed),
        "binary weights, unpacked in every pass": unpacking(model, packed),
        "int4 weights, unpacked in every pass": unpacking(model, pack(few_bit(model, "int4"))),
        "binary weights, as in training": trained,
        "torch int8, dynamic (linear layers alone)": dynamic_int8(model),
        "torch int8, static (FX, x86)": static_int8(model),
        FLOAT_BINARY: deploy(copy.deepcopy(both)),
    }
    if library.load() is not None:
        use_xnor(both)
        arms[f"binary inputs and weights, bits counted ({library.isa()})"] = both
    x = torch.randn(2, 3, 32, 32)
    for name in list(arms)[3:6:2]:
        if not torch.equal(arms[name](x), arms["binary weights, unpacked at load"](x)):
            raise SystemExit(f"{name} differs from the weights unpacked at load")
    return arms


# ---- measuring -----------------------------------------------------------------------------------------------------


def sizes(model: str) -> list[Size]:
    floats = network(model).state_dict()
    raw = len(save({name: tensor.contiguous() for name, tensor in floats.items()}))
    rows = [Size(model, FLOAT, raw, 1.0, None, None)]
    for bits, spec in SPECS.items():
        packed = pack(few_bit(model, spec))
        with tempfile.TemporaryDirectory() as folder:
            nbytes = save_packed(packed, Path(folder) / "model.fedq")
        names = list(packed.weights)
        values, originals = (torch.cat([s[n].flatten() for n in names]) for s in (packed.state_dict(), floats))
        overhead = nbytes / packed.payload_nbytes - 1
        arm = f"{bits} bit{'' if bits == '1' else 's'} ({spec})"
        rows.append(Size(model, arm, nbytes, raw / nbytes, overhead, relative_error(values, originals)))
    buffer = io.BytesIO()
    torch.save(static_int8(model).state_dict(), buffer)
    nbytes = len(buffer.getvalue())
    return [*rows, Size(model, "torch int8, static (FX, x86)", nbytes, raw / nbytes, None, None)]


def latencies(model: str, batch_size: int, arms: Arms, seconds_per_arm: float) -> list[Latency]:
    x = torch.randn(batch_size, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    took: dict[str, list[float]] = {name: [] for name in arms}
    names, begin, turn = list(arms), time.perf_counter(), 0
    while turn < 6 or time.perf_counter() - begin < seconds_per_arm * len(arms):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            start = time.perf_counter()
            arms[name](x)
            took[name].append(time.perf_counter() - start)
        turn += 1
    medians = {name: median_and_spread(seconds[1:]) for name, seconds in took.items()}
    return [
        Latency(
            model=model,
            arm=name,
            batch_size=batch_size,
            ms=1e3 * median,
            spread=spread,
            ratio_to_float32=median / medians[FLOAT][0],
            threads=torch.get_num_threads(),
            num_passes=turn - 1,
        )
        for name, (median, spread) in medians.items()
    ]


# ---- the table -----------------------------------------------------------------------------------------------------


def table(size_rows: list[Size], latency_rows: list[Latency], about: dict[str, str]) -> str:
    threads = latency_rows[0].threads
    engines = f"engines {', '.join(torch.backends.quantized.supported_engines)}"
    lines = [
        f"## {TITLE}",
        "",
        f"{about['hardware']}, {threads} thread{'' if threads == 1 else 's'}, torch {about['torch']} ({engines}), "
        f"{about['date']}. Images of 32x32; stem and last layer float32 in all few-bit models.",
        "",
        "| network | file | bytes | float32 / this | beyond codes, scales, exact tensors | error of fresh weights |",
        "|---" * 6 + "|",
    ]
    for size in size_rows:
        overhead = "" if size.overhead is None else f"{100 * size.overhead:.2f} %"
        error = "" if size.error is None else f"{size.error:.2g}"
        ratio = f"{size.ratio_to_float32:.1f}"
        lines.append(f"| {size.model} | {size.arm} | {size.nbytes:,} | {ratio} | {overhead} | {error} |")
    batches = list(dict.fromkeys(row.batch_size for row in latency_rows))
    heads = "".join(f" batch {size}, ms | ± | to float32 |" for size in batches)
    lines += ["", f"| network | arm |{heads}", "|---" * (2 + 3 * len(batches)) + "|"]
    for model, arm in dict.fromkeys((row.model, row.arm) for row in latency_rows):
        mine = [row for row in latency_rows if (row.model, row.arm) == (model, arm)]
        cells = "".join(f" {r.ms:.2f} | {100 * r.spread:.0f} % | {r.ratio_to_float32:.2f} |" for r in mine)
        lines.append(f"| {model} | {arm} |{cells}")
    return "\n".join([*lines, "", *verdict(latency_rows), "", f"Re-made by `{COMMAND}`.", ""])


def verdict(rows: list[Latency]) -> list[str]:
    """Return in words what few-bit weights do for the time, from the figures alone."""
    lines = []
    for model, size in dict.fromkeys((row.model, row.batch_size) for row in rows):
        ratios = {r.arm: r.ratio_to_float32 for r in rows if (r.model, r.batch_size) == (model, size)}
        weights = {arm: ratio for arm, ratio in ratios.items() if "weights" in arm and "inputs" not in arm}
        best, ratio = min(weights.items(), key=lambda item: item[1])
        faster = [f"{arm} ({ratio:.2f})" for arm, ratio in ratios.items() if ratio < 0.9 and arm not in weights]
        said = "are not faster than float32" if ratio > 0.9 else "are faster than float32"
        lines.append(
            f"- {model}, batch {size}: few-bit weights with float arithmetic {said} (at best {ratio:.2f} of its time, "
            f"{best}). At most 0.9 of it: {', '.join(faster) or 'none'}."
        )
    return lines


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["resnet20", "resnet18"])
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 64])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds-per-arm", type=float, default=8.0, help="at least five passes are timed")
    parser.add_argument("--out", type=Path, help="takes the rows as JSON")
    parser.add_argument("--table", type=Path, help="Markdown file whose section is replaced; default: print")
    return parser.parse_args()


@torch.inference_mode()
def measure(models: list[str], batch_sizes: list[int], seconds_per_arm: float) -> tuple[list[Size], list[Latency]]:
    size_rows: list[Size] = []
    latency_rows: list[Latency] = []
    for model in models:
        size_rows += sizes(model)
        arms = contenders(model)
        for batch_size in batch_sizes:
            latency_rows += latencies(model, batch_size, arms, seconds_per_arm)
            for row in latency_rows[-len(arms) :]:
                print(f"{model:9} {batch_size:3} {row.arm:55} {row.ms:9.2f} ms {row.ratio_to_float32:6.2f}", flush=True)
    return size_rows, latency_rows


def main() -> None:
    make_readable()
    args = parse_args()
    warnings.filterwarnings("ignore")  # torch.ao is deprecated in favour of a package of its own
    torch.set_num_threads(args.threads)
    size_rows, latency_rows = measure(args.models, args.batch_sizes, args.seconds_per_arm)
    about = about_run()
    if args.out:
        rows: list[dict[str, Any]] = [asdict(row) | about for row in size_rows]
        rows += [asdict(row) | about for row in latency_rows]
        args.out.write_text(json.dumps(rows, indent=1) + "\n")
    section = table(size_rows, latency_rows, about)
    if args.table:
        replace_section(args.table, TITLE, section)
    else:
        print(section)


if __name__ == "__main__":
    main()

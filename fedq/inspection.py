"""`fedq inspect`: what a model's file holds, layer by layer, and what few bits would lose."""

from __future__ import annotations

import argparse
import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from torch import Tensor

from fedq.convert import add_choice_arguments, pack_file, read_tensors, refuse_choice
from fedq.errors import FieldError
from fedq.files import replace_file, writable
from fedq.lowbit.packed import PackedModel, PackedWeight, relative_error
from fedq.lowbit.packed_file import is_packed, load_packed
from fedq.report import human_bytes, print_header

_WIDTH = 100
"""Width of the table in characters where standard output is no terminal."""


@dataclass(frozen=True)
class Row:
    """One tensor of a file.

    Args:
        name: Name of the tensor; of a weight without its ``.weight``.
        shape: Sizes of the dimensions, such as ``64x3x3x3``.
        quantizer: Spec of the quantizer, or the type of an exact tensor.
        bits: Bits of one value, without scales.
        packed_bytes: Bytes of codes and scales, or of the exact values.
        float32_bytes: Bytes of the unpacked values in float32; exact tensors in their own type.
        nmse: ``|Q(w) - w|² / |w|²``; None where ``w`` is not known.
        min: Smallest value; None of an empty tensor.
        max: Largest value; None of an empty tensor.
        num_values: Number of different values.
    """

    name: str
    shape: str
    quantizer: str
    bits: float
    packed_bytes: int
    float32_bytes: int
    nmse: float | None
    min: float | None
    max: float | None
    num_values: int

    @property
    def is_layer(self) -> bool:
        """Whether it has a line of its own for people: biases and normalisation have not."""
        return "x" in self.shape


def main(argv: Sequence[str], program: str) -> None:
    """Print a table with a line a layer, and write all tensors as CSV.

    Raises:
        FieldError: A file, a setting or a combination cannot be used.
        SystemExit: Help was asked for (code 0), or an argument is wrong (code 2).
    """
    parser = argparse.ArgumentParser(prog=program, description="Show what a model's file holds, layer by layer.")
    parser.add_argument("file", type=Path, help="model.fedq or model.safetensors")
    help_ = "the float model that errors are against; default: what the file knows of them"
    parser.add_argument("--against", type=Path, metavar="FILE", help=help_)
    add_choice_arguments(parser)
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write all tensors, figures in full")
    given = parser.parse_args(argv)
    model = _model(given)
    original = None if given.against is None else read_tensors(given.against)
    rows = inspect(model, original)
    if given.csv is not None:
        _write_csv(rows, given.csv)
    print_rows(rows)
    print_header([f"{given.file}: {given.file.stat().st_size:,} bytes on disk"])


def inspect(model: PackedModel, original: Mapping[str, Tensor] | None = None) -> list[Row]:
    """Return a row for each tensor.

    Args:
        model: A model with packed and exact tensors.
        original: Float tensors, by name, against which errors are measured. Default: the errors measured in packing.

    Raises:
        FieldError: The original lacks a tensor, or has one of another shape.
    """
    return [_row(name, tensor, _original(name, tensor, original)) for name, tensor in model.tensors.items()]


def print_rows(rows: Sequence[Row]) -> None:
    """Print layers, the other tensors in one line, and totals."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if not console.is_terminal:
        console = Console(width=_WIDTH)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading, side in _HEADINGS:
        table.add_column(heading, justify=side, overflow="fold")  # type: ignore[arg-type]
    for row in rows:
        if row.is_layer:
            table.add_row(*_cells(row))
    others = [row for row in rows if not row.is_layer]
    if others:
        table.add_row(f"{len(others)} others", "", "", "", *_sizes(others))
    table.add_row("total", "", "", "", *_sizes(rows))
    console.print(table)


_HEADINGS = (
    ("layer", "left"),
    ("shape", "left"),
    ("weights", "left"),
    ("bits", "right"),
    ("packed", "right"),
    ("float32", "right"),
    ("error", "right"),
    ("range", "left"),
    ("values", "right"),
)


def _model(given: argparse.Namespace) -> PackedModel:
    if is_packed(given.file):
        refuse_choice(given)
        return load_packed(given.file)
    if given.bits is not None or given.weights is not None:
        return pack_file(given.file, given)[0]
    for name in ("model", "keep"):
        if getattr(given, name):
            raise FieldError(name, getattr(given, name), "left out, unless with --bits or --weights")
    return PackedModel(dict(read_tensors(given.file)))


def _original(name: str, tensor: PackedWeight | Tensor, original: Mapping[str, Tensor] | None) -> Tensor | None:
    if original is None:
        return None
    found = original.get(name)
    if found is None or tuple(found.shape) != tuple(tensor.shape):
        has = "no such tensor" if found is None else f"{list(found.shape)}"
        raise FieldError("against", name, f"a model with {name} of the shape {list(tensor.shape)}; this one has {has}")
    return found


def _row(name: str, tensor: PackedWeight | Tensor, original: Tensor | None) -> Row:
    if isinstance(tensor, PackedWeight):
        values, nmse = tensor.values, tensor.error
        kind, bits = tensor.quantizer.spec, tensor.quantizer.bits_per_weight
    else:
        values, nmse = tensor, None
        kind, bits = str(tensor.dtype).removeprefix("torch."), 8.0 * tensor.element_size()
    low, high = (float(x) for x in torch.aminmax(values.double())) if values.numel() else (None, None)
    return Row(
        name=name.removesuffix(".weight") if values.dim() > 1 else name,
        shape="x".join(map(str, values.shape)),
        quantizer=kind,
        bits=bits,
        packed_bytes=tensor.nbytes,
        float32_bytes=values.nbytes,
        nmse=nmse if original is None else relative_error(values, original),
        min=low,
        max=high,
        num_values=values.unique().numel(),
    )


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.name,
        row.shape,
        row.quantizer,
        f"{row.bits:g}",
        human_bytes(row.packed_bytes),
        human_bytes(row.float32_bytes),
        "-" if row.nmse is None else f"{row.nmse:.2g}",
        "-" if row.min is None else f"{row.min:.3g}..{row.max:.3g}",
        f"{row.num_values:,}",
    )


def _sizes(rows: Sequence[Row]) -> tuple[str, str]:
    return human_bytes(sum(row.packed_bytes for row in rows)), human_bytes(sum(row.float32_bytes for row in rows))


def _write_csv(rows: Sequence[Row], path: Path) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(Row)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    with writable("csv", path):
        replace_file(path, text.getvalue().encode())

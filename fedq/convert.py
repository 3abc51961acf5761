"""`fedq convert`: float models to packed few-bit files and back. Also which layers a file of tensors has."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import Tensor, nn

from fedq.config import Config
from fedq.configfile import load_config
from fedq.errors import FieldError
from fedq.files import replace_file, writable
from fedq.lowbit.packed import PackedModel, pack_state
from fedq.lowbit.packed_file import is_packed, load_packed, save_packed
from fedq.lowbit.quantizers import Quantizer, quantizer
from fedq.lowbit.which import is_list, layer_names, quantizers_by_name
from fedq.models import build_model
from fedq.report import human_bytes, print_header

_SUFFIX_PACKED, _SUFFIX_FLOAT = ".fedq", ".safetensors"
_OPTIONAL = re.compile(r"\.(binary_input\.threshold|running_mean|running_var|num_batches_tracked)$")


@dataclass(frozen=True)
class Choice:
    """Which layers of a file get few bits.

    Args:
        quantizers: Quantizer of each packed layer, by layer name.
        kept: Names of the layers that stay float.
        known_by: Source of the layers, in words.
    """

    quantizers: dict[str, Quantizer]
    kept: list[str]
    known_by: str


def main(argv: Sequence[str], program: str) -> None:
    """Pack a model.safetensors in few bits, or turn a packed model back into float tensors.

    Raises:
        FieldError: A file, a setting or a combination cannot be used; nothing is written then.
        SystemExit: Help was asked for (code 0), or an argument is wrong (code 2).
    """
    parser = argparse.ArgumentParser(prog=program, description="Pack a float model in few bits, or turn one back.")
    parser.add_argument("file", type=Path, help="model.safetensors, or model.fedq for the way back")
    add_choice_arguments(parser)
    parser.add_argument("--out", type=Path, help="file to write; default: beside FILE, with the other suffix")
    given = parser.parse_args(argv)
    to_float = is_packed(given.file)
    out = given.out or given.file.with_suffix(_SUFFIX_FLOAT if to_float else _SUFFIX_PACKED)
    _check_out(out, given.file, _SUFFIX_FLOAT if to_float else _SUFFIX_PACKED)
    if to_float:
        refuse_choice(given)
        lines = _to_float(given.file, out)
    else:
        if given.bits is None and given.weights is None:
            raise FieldError("bits", None, "1 to 16, or a spec for --weights")
        lines = _to_packed(given, out)
    print_header([*lines, f"{'file':<8} {out}"])


def add_choice_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what says which layers of a float model get how many bits."""
    bits = parser.add_mutually_exclusive_group()
    bits.add_argument("--bits", type=int, help="1 to 16, for all layers but the first and the last")
    bits.add_argument("--weights", help="quantizers as in train.py: ternary, int4:grid=dorefa, head=8,body=1,tail=8")
    help_ = "network, for its layers; default: that of the config.yaml beside the file, otherwise tensors' names serve"
    parser.add_argument("--model", help=help_)
    help_ = "layers that stay float, in place of the first and the last one; may be given several times"
    parser.add_argument("--keep", action="append", default=[], metavar="PATTERN", help=help_)


def refuse_choice(given: argparse.Namespace) -> None:
    """Refuse, for a packed file, what `add_choice_arguments` adds.

    Raises:
        FieldError: One of these arguments was given.
    """
    for name in ("bits", "weights", "model", "keep"):
        value = getattr(given, name)
        if value not in (None, []):
            raise FieldError(name, value, f"left out, since {given.file} is packed already")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a model.safetensors, in the order of their names, or the float values of a packed model.

    Raises:
        FieldError: The file cannot be read, or is neither a safetensors file nor a packed model.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    if is_packed(path):
        return load_packed(path).state_dict()
    try:
        tensors = load(path.read_bytes())
        return {name: tensors[name] for name in sorted(tensors, key=_natural)}
    except OSError as error:
        raise FieldError("file", str(path), f"a file that can be read ({error.strerror})") from None
    except SafetensorError as error:
        raise FieldError("file", str(path), f"a safetensors file or a packed model ({error})") from None


def pack_file(path: Path, given: argparse.Namespace) -> tuple[PackedModel, Choice]:
    """Pack the tensors of a file as `add_choice_arguments` says.

    Raises:
        FieldError: A file, spec or pattern cannot be used, or the file holds another model than the one named.
    """
    state = read_tensors(path)
    network, known_by = _network(state, path, given.model)
    if network is None:
        names = _layers_by_name(state)
    else:
        names = layer_names(network)
        state = {name: state[name] for name in dict.fromkeys([*network.state_dict(), *state]) if name in state}
    quantizers = _quantizers(names, given.weights or str(given.bits), given.keep)
    kept = [name for name in names if name not in quantizers]
    return pack_state(state, quantizers), Choice(quantizers, kept, known_by)


# ---- both ways ---------------------------------------------------------------------------------------------------


def _to_packed(given: argparse.Namespace, out: Path) -> list[str]:
    packed, choice = pack_file(given.file, given)
    nbytes = save_packed(packed, out)
    weights = packed.weights.values()
    raw = sum(4 * one.values.numel() for one in weights) + packed.payload_nbytes - sum(one.nbytes for one in weights)
    errors = [one.error for one in weights if one.error is not None]
    specs = ", ".join(dict.fromkeys(chosen.spec for chosen in choice.quantizers.values()))
    return [
        f"{'packed':<8} {_counted(choice.quantizers)}: {specs}",
        f"{'float':<8} {_counted(choice.kept)}{': ' if choice.kept else ''}{', '.join(choice.kept)}",
        f"{'layers':<8} {choice.known_by}",
        f"{'size':<8} {human_bytes(nbytes)}, float32 {human_bytes(raw)}, {raw / nbytes:.1f}x less",
        f"{'error':<8} {min(errors):.2g} to {max(errors):.2g} of a layer's squared norm",
    ]


def _to_float(path: Path, out: Path) -> list[str]:
    from safetensors.torch import save

    packed = load_packed(path)
    state = packed.state_dict()
    data = save(state)
    with writable("out", out):
        replace_file(out, data)
    return [f"{'tensors':<8} {len(state)}, {len(packed.weights)} of them with few-bit values, {human_bytes(len(data))}"]


def _check_out(out: Path, source: Path, suffix: str) -> None:
    if out.suffix != suffix:
        kind = "a float" if suffix == _SUFFIX_PACKED else "a packed"
        raise FieldError("out", str(out), f"a file *{suffix}, since {source} is {kind} model")
    if out.exists() and out.samefile(source):
        raise FieldError("out", str(out), "another file than the one that is read")


def _counted(layers: Sequence[str] | Mapping[str, object]) -> str:
    return f"{len(layers)} layer{'' if len(layers) == 1 else 's'}"


# ---- layers ------------------------------------------------------------------------------------------------------


def _network(state: Mapping[str, Tensor], path: Path, model: str | None) -> tuple[nn.Module | None, str]:
    """Return the network that a file is of, without values, or None if nobody says it; and that in words."""
    if model is not None:
        return _build(model, state), f"of {model}"
    settings = path.parent / "config.yaml"
    if not settings.is_file():
        return None, "by names and shapes of the tensors; --model says them exactly"
    try:
        local = load_config(settings, Config()).local
    except FieldError:  # somebody else's
        return None, f"by names and shapes of the tensors, since {settings} is not of a run"
    return _build(local.model, state), f"of {local.model}, as in {settings}"


def _build(model: str, state: Mapping[str, Tensor]) -> nn.Module:
    """Return the network that has tensors of these names; statistics and binary inputs may be there or not."""
    with torch.device("meta"):
        network = build_model(model)
    own, found = ({n for n in names if not _OPTIONAL.search(n)} for names in (network.state_dict(), state))
    if own != found:
        missing, other = sorted(own - found), sorted(found - own)
        words = [f"{what} {', '.join(names[:3])}" for what, names in (("lacks", missing), ("has", other)) if names]
        raise FieldError("model", model, f"the network of the file, which {' and '.join(words)}")
    return network


def _layers_by_name(state: Mapping[str, Tensor]) -> list[str]:
    """Return what look like layers: convolutions in the order of their names, then matrices, so the head is last."""
    names = [n for n, t in state.items() if n.endswith(".weight") and t.dim() > 1 and t.is_floating_point()]
    ordered = sorted(names, key=lambda name: (state[name].dim() == 2, _natural(name)))
    return [name.removesuffix(".weight") for name in ordered]


def _natural(name: str) -> list[tuple[int, str]]:
    """Return a key that puts ``layer2`` before ``layer10``."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _quantizers(names: list[str], spec: str, keep: Sequence[str]) -> dict[str, Quantizer]:
    if not keep:
        return quantizers_by_name(names, spec, "file")
    kept: set[str] = set()
    for pattern in keep:
        fits = {name for name in names if fnmatchcase(name, pattern.removesuffix(".weight"))}
        if not fits:
            raise FieldError("keep", pattern, f"patterns of layer names, which are {', '.join(names)}")
        kept |= fits
    everywhere = quantizers_by_name(names, spec, "file") if is_list(spec) else dict.fromkeys(names, quantizer(spec))
    chosen = {name: one for name, one in everywhere.items() if name not in kept}
    if not chosen:
        raise FieldError("keep", ", ".join(keep), "patterns that leave a layer to pack")
    return chosen

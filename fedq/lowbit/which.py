"""Which layers of a model have few-bit weights, and how many bits each: ``int4``, or ``head=8,body=1,tail=8``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from fnmatch import fnmatchcase

from torch import nn

from fedq.errors import FieldError
from fedq.lowbit.quantizers import Quantizer, quantizer

FEW_BIT_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
"""Layers whose weights may have few bits."""


def layer_names(model: nn.Module) -> list[str]:
    """Return the names of a model's convolutions and linear layers, in the model's order."""
    return [name for name, module in model.named_modules() if isinstance(module, FEW_BIT_LAYERS)]


def inner_layers(model: nn.Module) -> list[str]:
    """Return the layers that have few bits by default: all but the first (stem) and the last (classifier).

    Raises:
        FieldError: The model has none.
    """
    return _inner(layer_names(model), type(model).__name__)


def choose_quantizers(model: nn.Module, spec: str) -> dict[str, Quantizer]:
    """Return the quantizer of each layer that a spec gives few bits, by layer name, in the model's order.

    Args:
        model: The model; its convolutions and linear layers count, normalisation and biases always stay float.
        spec: One quantizer for all layers but the first and the last, such as ``binary`` or
            ``int4:grid=symmetric``; or a list of ``where=bits``, separated by commas (by spaces where a quantizer has
            options). ``where`` is ``head`` or ``head:2`` (the first layer, the first two), ``tail`` or ``tail:2``
            (the last ones), ``body`` (those between; without one they stay float) or a pattern of layer names such
            as ``layer1.*``; the last entry that fits a layer counts. ``bits`` is 1 to 16, 32 for float, or a quantizer.

    Raises:
        FieldError: The spec cannot be read, fits no layer, or a model has no layer for it.
    """
    return quantizers_by_name(layer_names(model), spec, type(model).__name__)


def quantizers_by_name(names: list[str], spec: str, model: str) -> dict[str, Quantizer]:
    """Do the work of `choose_quantizers` for layers that are known by name alone.

    Args:
        names: Names of the layers, the first layer first.
        spec: Spec of the bits of each layer, see `choose_quantizers`.
        model: Name of the model in errors.
    """
    if not is_list(spec):
        chosen = quantizer(spec)
        return dict.fromkeys(_inner(names, model), chosen)
    if not names:
        raise FieldError("weights", model, "a model with convolutions or linear layers")
    entries = _entries(spec)
    ends = {end: _count(entries, end) for end in ("head", "tail")}
    if ends["head"] + ends["tail"] > len(names):
        raise FieldError("weights", spec, f"head and tail of at most {len(names)} layers together, as the model has")
    found: dict[str, Quantizer | None] = {}
    for where, choice in entries.items():
        fits = _layers_at(where, names, ends)
        if not fits:
            raise FieldError("weights", spec, f"patterns of layer names; {where!r} fits none of {', '.join(names)}")
        found |= dict.fromkeys(fits, choice)
    return {name: choice for name in names if (choice := found.get(name)) is not None}


def _inner(names: list[str], model: str) -> list[str]:
    if len(names) < 3:
        raise FieldError("weights", model, "a model with a layer between its first and its last one")
    return names[1:-1]


def is_list(spec: str) -> bool:
    """Return whether a spec says which layers have how many bits, rather than one quantizer for all."""
    return "=" in spec.partition(":")[0] or bool(re.match(r"(head|tail):\d+=", spec))


def _entries(spec: str) -> dict[str, Quantizer | None]:
    """Read a list; None is float."""
    entries: dict[str, Quantizer | None] = {}
    for item in spec.split() if " " in spec.strip() else spec.strip().split(","):
        match = re.fullmatch(r"((?:head|tail)(?::[1-9]\d*)?|[\w.*?\[\]-]+)=(.+)", item)
        if match is None or match[1] in entries:
            raise FieldError("weights", spec, "where=bits, each place once, as in head=8,body=1,tail=8")
        entries[match[1]] = None if match[2] in ("32", "float") else quantizer(match[2])
    return entries


def _count(entries: Mapping[str, object], end: str) -> int:
    counts = [int(where.partition(":")[2] or 1) for where in entries if where.partition(":")[0] == end]
    if len(counts) > 1:
        raise FieldError("weights", ",".join(entries), f"{end} once")
    return sum(counts)


def _layers_at(where: str, names: list[str], ends: Mapping[str, int]) -> list[str]:
    head, tail = ends["head"], len(names) - ends["tail"]
    places = {"head": names[:head], "body": names[head:tail], "tail": names[tail:]}
    place = where.partition(":")[0]
    return places[place] if place in places else [name for name in names if fnmatchcase(name, where)]

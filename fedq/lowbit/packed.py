"""Packed few-bit models: codes and scales of the few-bit weights, all other tensors exact.

How they are written to a file is the business of `fedq.lowbit.packed_file`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from fedq.errors import FieldError
from fedq.kernels.reference import pack_bits, pack_trits, packed_nbytes, unpack_bits, unpack_trits
from fedq.layout import plain_name
from fedq.lowbit.layers import FewBitWeight, deployed_state_dict, few_bit_layers, few_bit_weight
from fedq.lowbit.quantizers import Quantizer

_CHUNK = 40 * 2**15
"""Number of codes that are packed at a time, whole bytes at any width: the work takes many bytes a code."""
_MAX_NAMED = 3


@dataclass(frozen=True)
class PackedWeight:
    """One weight as codes and scales.

    Args:
        quantizer: The quantizer that the codes belong to.
        shape: Shape of the weight.
        codes: Codes, uint8 [`codes_nbytes`]: ``bits`` a code, least significant first, or five ternary codes a byte.
        scales: Scales of each group, float32 [groups, num_scales].
        error: ``|Q(w) - w|² / |w|²`` against the float weight, three digits; None where that is not known.
    """

    quantizer: Quantizer
    shape: tuple[int, ...]
    codes: Tensor
    scales: Tensor
    error: float | None = None

    @classmethod
    def of(cls, weight: Tensor, quantizer: Quantizer, scales: Tensor | None = None, *, name: str) -> PackedWeight:
        """Pack a float weight.

        Args:
            weight: The float weight, of any shape with at least one element.
            quantizer: The quantizer of the weight; it rounds to nearest here.
            scales: Scales to use, float32 [groups, num_scales]; None: those that follow from the weight.
            name: Name of the tensor, for errors.

        Raises:
            FieldError: The weight is empty, or its few-bit values are not finite.
        """
        if weight.numel() == 0 or weight.dim() == 0:
            raise FieldError(name, list(weight.shape), "a shape with elements, of at least one dimension")
        rows = quantizer.rows(weight.detach().float())
        scales = quantizer.scales(rows) if scales is None else scales
        codes = quantizer.codes(rows, scales, stochastic=False)
        values = quantizer.values(codes, scales)
        if quantizer.learns_scale:  # may be negative; sign(w)·(-a) is sign(-w)·a, whose codes the values give back
            codes, scales = torch.where(scales < 0, 1.0 - codes, codes), scales.abs()
        if not values.isfinite().all():
            raise FieldError(name, f"{quantizer.spec} of values that are not finite", "finite weights")
        error = float(f"{relative_error(values, rows):.3g}")
        packed = _pack(codes.flatten(), quantizer).cpu()
        return cls(quantizer, tuple(weight.shape), packed, scales.cpu(), error)

    @property
    def values(self) -> Tensor:
        """The weight, float32: bit for bit what the quantizer gave on the same device."""
        codes = _unpack(self.codes, self.quantizer, math.prod(self.shape)).float()
        return self.quantizer.values(codes.view(len(self.scales), -1), self.scales).view(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return self.codes.numel() + 4 * self.scales.numel()


@dataclass(frozen=True)
class PackedModel:
    """A model's tensors by their plain names, the few-bit weights packed.

    Args:
        tensors: The tensors by plain name, in the order of the model's state dict.
    """

    tensors: dict[str, PackedWeight | Tensor]

    @property
    def weights(self) -> dict[str, PackedWeight]:
        """The packed ones."""
        return {name: tensor for name, tensor in self.tensors.items() if isinstance(tensor, PackedWeight)}

    @property
    def payload_nbytes(self) -> int:
        """Bytes of codes, scales and exact tensors: a file's size without its header."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def state_dict(self) -> dict[str, Tensor]:
        """Return all tensors under their plain names, the few-bit weights as float32 values."""
        return {n: t.values if isinstance(t, PackedWeight) else t.clone() for n, t in self.tensors.items()}

    @torch.no_grad()
    def load_into(self, model: nn.Module) -> None:
        """Copy the tensors into a model, which then computes what the packed one did.

        Args:
            model: A plain model (few-bit values become its float weights), or one of
                `fedq.lowbit.layers.use_few_bits` with the same quantizers, whose scales are loaded too.

        Raises:
            FieldError: The model is another one; tensors that are missing, left over or of another shape are named,
                and nothing is changed.
        """
        own = model.state_dict()
        targets = {plain_name(n): t for n, t in own.items() if not n.endswith(".parametrizations.weight.0.scale")}
        self._check(model, targets)
        for name, values in self.state_dict().items():
            targets[name].copy_(values)
        for layer in few_bit_layers(model):
            packed, weight = self.weights[f"{layer}.weight"], few_bit_weight(model.get_submodule(layer))
            assert isinstance(weight, FewBitWeight)
            weight.load_scales(packed.scales)

    def _check(self, model: nn.Module, targets: Mapping[str, Tensor]) -> None:
        packed, chosen = self.weights, {f"{name}.weight": q for name, q in few_bit_layers(model).items()}
        both = [name for name in targets if name in self.tensors]
        problems = {
            "missing in the file": [name for name in targets if name not in self.tensors],
            "not in the model": [name for name in self.tensors if name not in targets],
            "of another shape": [
                f"{name} {list(self.tensors[name].shape)} (model: {list(targets[name].shape)})"
                for name in both
                if tuple(self.tensors[name].shape) != tuple(targets[name].shape)
            ],
            "of another quantizer": [
                f"{name} {found} (model: {chosen[name].spec})"
                for name in both
                if name in chosen
                and (found := packed[name].quantizer.spec if name in packed else "float") != chosen[name].spec
            ],
        }
        words = [f"{problem}: {_listed(names)}" for problem, names in problems.items() if names]
        if words:
            raise FieldError("model", type(model).__name__, f"the model that was packed; {'; '.join(words)}")


def pack(model: nn.Module) -> PackedModel:
    """Pack a model with few-bit layers as it is deployed; one without them becomes exact tensors.

    Args:
        model: The model, on any device. Few-bit weights are rounded to nearest, with learned scales where they exist;
            the error of each is that against its float weight.

    Raises:
        FieldError: A few-bit weight is not finite.
    """
    tensors: dict[str, PackedWeight | Tensor] = {n: _exact(t) for n, t in deployed_state_dict(model).items()}
    for layer, quantizer in few_bit_layers(model).items():
        module, name = model.get_submodule(layer), f"{layer}.weight"
        weight, original = few_bit_weight(module), module.parametrizations["weight"].original  # type: ignore
        assert isinstance(weight, FewBitWeight)
        tensors[name] = PackedWeight.of(original, quantizer, weight.scales(original), name=name)
    return PackedModel(tensors)


def pack_state(state: Mapping[str, Tensor], quantizers: Mapping[str, Quantizer]) -> PackedModel:
    """Pack float tensors.

    Args:
        state: Float tensors by name, as in a state dict.
        quantizers: Quantizer of each layer by its name; the layer's tensor is ``<layer>.weight``.

    Raises:
        FieldError: A layer has no such tensor, or its tensor is empty, not float or not finite.
    """
    tensors: dict[str, PackedWeight | Tensor] = {name: _exact(tensor) for name, tensor in state.items()}
    for layer, quantizer in quantizers.items():
        name = f"{layer}.weight"
        if name not in state:
            raise FieldError("weights", layer, f"layers with a weight among the tensors; there is no {name}")
        if not state[name].is_floating_point():
            raise FieldError(name, str(state[name].dtype), "a float tensor")
        tensors[name] = PackedWeight.of(state[name], quantizer, name=name)
    return PackedModel(tensors)


def relative_error(values: Tensor, original: Tensor) -> float:
    """Return ``|values - original|² / |original|²``, zero for two equal tensors."""
    lost = (values.double() - original.double()).square().sum()
    return float(lost / original.double().square().sum()) if lost else 0.0


def codes_nbytes(quantizer: Quantizer, num: int) -> int:
    """Return the bytes of so many packed codes."""
    return -(-num // 5) if _is_ternary(quantizer) else packed_nbytes(num, _bits(quantizer))


def scales_shape(quantizer: Quantizer, shape: tuple[int, ...]) -> tuple[int, int]:
    """Return the shape of a weight's scales."""
    return (shape[0] if quantizer.per == "channel" else 1, quantizer.num_scales)


def _pack(codes: Tensor, quantizer: Quantizer) -> Tensor:
    parts = codes.to(torch.int32).split(_CHUNK)
    return torch.cat([_pack_part(part, quantizer) for part in parts])


def _pack_part(codes: Tensor, quantizer: Quantizer) -> Tensor:
    bits = _bits(quantizer)
    if _is_ternary(quantizer):
        return pack_trits(codes)
    if bits <= 8:
        return pack_bits(codes.to(torch.uint8), bits)
    # The same bytes as of pack_bits, which spreads bits over int64.
    wide = np.unpackbits(codes.cpu().numpy().astype("<u2").view(np.uint8), bitorder="little")
    kept = np.ascontiguousarray(wide.reshape(-1, 16)[:, :bits])
    return torch.from_numpy(np.packbits(kept.reshape(-1), bitorder="little"))


def _unpack(data: Tensor, quantizer: Quantizer, num: int) -> Tensor:
    parts = data.split(codes_nbytes(quantizer, _CHUNK))
    counts = [min(_CHUNK, num - begin) for begin in range(0, num, _CHUNK)]
    return torch.cat([_unpack_part(part, quantizer, count) for part, count in zip(parts, counts, strict=True)])


def _unpack_part(data: Tensor, quantizer: Quantizer, num: int) -> Tensor:
    bits = _bits(quantizer)
    if _is_ternary(quantizer):
        return unpack_trits(data, num)
    if bits <= 8:
        return unpack_bits(data, bits, num)
    wide = np.zeros((num, 16), np.uint8)
    wide[:, :bits] = np.unpackbits(data.numpy(), count=num * bits, bitorder="little").reshape(num, bits)
    return torch.from_numpy(np.packbits(wide.reshape(-1), bitorder="little").view("<u2").astype(np.int32))


def _is_ternary(quantizer: Quantizer) -> bool:
    return quantizer.bits_per_weight == 1.6


def _bits(quantizer: Quantizer) -> int:
    return math.ceil(quantizer.bits_per_weight)


def _exact(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def _listed(names: list[str]) -> str:
    more = len(names) - _MAX_NAMED
    return ", ".join(names[:_MAX_NAMED]) + (f" and {more} more" if more > 0 else "")

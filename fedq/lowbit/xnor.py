"""Binary layers with binary inputs on the CPU without float products, for models that are trained already.

Where and how fast the kernel is stands in `docs/few_bit_models.md`; it is `fedq.kernels.cpu.xnor`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fedq.errors import FieldError
from fedq.kernels.cpu.library import REMEDY, load, why_missing
from fedq.kernels.cpu.xnor import MAX_PLACES, BinaryConv
from fedq.lowbit.activations import BinaryInput
from fedq.lowbit.layers import few_bit_layers, few_bit_weight
from fedq.lowbit.quantizers import Binary


class XnorLayer(nn.Module):
    """A layer of `fedq.lowbit.layers.use_few_bits` with binary weights and inputs, by counting bits.

    Its outputs are those of the layer up to the rounding of float sums: here ``scale·sum`` has an exact sum. It has no
    gradient and no state dict: pack or save the model before.

    Args:
        layer: A convolution or linear layer that `serves` accepts.
    """

    def __init__(self, layer: nn.Conv2d | nn.Linear) -> None:
        super().__init__()
        weight, binary_input = few_bit_weight(layer), layer.binary_input
        assert weight is not None
        assert isinstance(binary_input, BinaryInput)
        values = layer.weight.detach()
        self.is_linear = isinstance(layer, nn.Linear)
        scales = weight.scales(layer.parametrizations["weight"].original).flatten()  # type: ignore[index, union-attr]
        bias = None if layer.bias is None else layer.bias.detach().clone()
        signs = (values >= 0) ^ (scales < 0).view(-1, *[1] * (values.dim() - 1))
        if isinstance(layer, nn.Conv2d):
            stride, padding = layer.stride, layer.padding
            assert not isinstance(padding, str)
        else:
            signs, stride, padding = signs[:, :, None, None], (1, 1), (0, 0)
        expanded = scales.expand(len(values)).contiguous()
        self.conv = BinaryConv.of(signs, expanded, bias, stride, padding)  # type: ignore[arg-type]
        self.thresholds = binary_input.threshold.detach().clone()

    def forward(self, x: Tensor) -> Tensor:
        """Map images [N, channels, height, width], or [..., features], as the layer does."""
        if not self.is_linear:
            return self.conv(x, self.thresholds)
        rows = x.reshape(-1, x.shape[-1])
        columns = self.conv(rows.t()[None, :, None, :], self.thresholds)  # an image one pixel high
        return columns[0, :, 0].t().reshape(*x.shape[:-1], -1)


def serves(layer: nn.Module) -> bool:
    """Return whether `XnorLayer` can take a layer's place: binary, on the CPU, in float32, of a common kind."""
    weight = few_bit_weight(layer)
    if weight is None or not isinstance(weight.quantizer, Binary) or not hasattr(layer, "binary_input"):
        return False
    values = layer.weight
    assert isinstance(values, Tensor)
    if values.device.type != "cpu" or values.dtype != torch.float32:
        return False
    if isinstance(layer, nn.Conv2d):
        is_plain = layer.groups == 1 and layer.dilation == (1, 1) and layer.padding_mode == "zeros"
        return is_plain and not isinstance(layer.padding, str) and values[0, 0].numel() <= MAX_PLACES
    return isinstance(layer, nn.Linear)


def use_xnor(model: nn.Module) -> list[str]:
    """Let a trained model's binary layers with binary inputs count bits, in place.

    Returns:
        The names of these layers; all others stay as they are.

    Raises:
        FieldError: The model has no such layer, or the C++ library is missing.
    """
    if load() is None:
        raise FieldError("xnor", why_missing(), f"a built library: {REMEDY}")
    names = [name for name in few_bit_layers(model) if serves(model.get_submodule(name))]
    if not names:
        allowed = "a model with binary weights and binary inputs, float32 on the CPU"
        raise FieldError("xnor", type(model).__name__, allowed)
    for name in names:
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, XnorLayer(model.get_submodule(name)))  # type: ignore[arg-type]
    return names

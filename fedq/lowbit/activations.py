"""Binary inputs of a layer: signs around a learned threshold, with a straight-through gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fedq.errors import FieldError

_START = 0.25


class BinaryInput(nn.Module):
    """``sign(x - t)`` with one learned threshold ``t`` a channel.

    XNOR-Net (Rastegari et al. 2016) takes ``sign(x)``, in networks whose convolutions follow a normalisation. Behind a
    ReLU, as in a ResNet, no input is negative and that would be the constant 1; the learned threshold (ReActNet, Liu et
    al. 2020, arXiv 2003.03488, eq. 4) works in both. The gradient is that of the identity where ``|x - t| <= 1``.

    Args:
        num_channels: Size of the channel dimension.
        dim: The channel dimension: 1 of images, -1 of what a linear layer takes.
    """

    def __init__(self, num_channels: int, dim: int = 1) -> None:
        super().__init__()
        self.dim = dim
        self.threshold = nn.Parameter(torch.full((num_channels,), _START))

    @classmethod
    def of(cls, layer: nn.Module) -> BinaryInput:
        """Return the binary input of a convolution or linear layer.

        Raises:
            FieldError: The layer is neither a convolution nor a linear layer.
        """
        weight = layer.weight
        assert isinstance(weight, Tensor)
        if isinstance(layer, nn.Linear):
            made = cls(layer.in_features, -1)
        elif isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            made = cls(layer.in_channels, 1)
        else:
            raise FieldError("activations", type(layer).__name__, "convolutions and linear layers")
        return made.to(weight.device)

    def forward(self, x: Tensor) -> Tensor:
        """Return -1 and 1, of the shape and type of ``x``."""
        shape = [1] * x.dim()
        shape[self.dim] = -1
        signs: Tensor = _Sign.apply(x - self.threshold.view(shape).to(x.dtype))  # type: ignore[no-untyped-call]
        return signs


class _Sign(torch.autograd.Function):
    """The sign, +1 at zero; its gradient is passed on within [-1, 1] (hard tanh, Hubara et al. 2016)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return 2.0 * (x >= 0).to(x.dtype) - 1.0

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grads[0] * (x.abs() <= 1)

"""Pieces every network here is made of: 3x3 convolutions, normalisation by name, initial weights.

Networks themselves live in the modules beside this one.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import nn

Norm = Callable[[int], nn.BatchNorm2d | nn.GroupNorm]
"""Makes the normalisation layer for a number of channels."""

NORMS: dict[str, Norm] = {
    "batch": nn.BatchNorm2d,
    "group": partial(nn.GroupNorm, 2),  # two groups, as in Reddi et al. 2021 (arXiv 2003.00295), section 5
}


def conv3x3(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    """Return a 3x3 convolution with padding 1 and no bias, which the normalisation after it would cancel."""
    return nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)


def initialize_convolutions(model: nn.Module) -> None:
    """Draw every convolution kernel from N(0, 2 / fan_in) and zero its bias (He et al. 2015, arXiv 1502.01852).

    Linear and normalisation layers keep torch's own initial values.

    Args:
        model: Network, changed in place; random numbers come from torch's global generator.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)

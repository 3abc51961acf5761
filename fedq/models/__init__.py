"""Networks by name, built for small square images.

The networks are in `resnet` and `convnets`; training them is not done here. Seeding is the caller's business: the
initial weights come from torch's global generator and from nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from fedq.errors import FieldError, one_of
from fedq.models.convnets import ConvNet9, ImprovedCNN, cnn1m, cnn62k
from fedq.models.layers import NORMS, initialize_convolutions
from fedq.models.own import build_own, check_model, is_own
from fedq.models.resnet import resnet18, resnet20, resnet32, resnet50

__all__ = ["MODELS", "build_model", "check_model", "is_own", "num_parameters"]


@dataclass(frozen=True)
class _Recipe:
    """How a network is built, and what it asks of the settings."""

    build: Callable[..., nn.Module]
    has_norm: bool = True
    flattens: bool = False  # its first linear layer depends on the image size
    min_image_size: int = 1


_RECIPES = {
    "resnet18": _Recipe(resnet18),
    "resnet50": _Recipe(resnet50),
    "resnet20": _Recipe(resnet20),
    "resnet32": _Recipe(resnet32),
    "improved_cnn": _Recipe(ImprovedCNN, flattens=True, min_image_size=4),
    "convnet9": _Recipe(ConvNet9),
    "cnn62k": _Recipe(cnn62k, has_norm=False, flattens=True, min_image_size=16),
    "cnn1m": _Recipe(cnn1m, has_norm=False, flattens=True, min_image_size=4),
}

MODELS: tuple[str, ...] = tuple(_RECIPES)
"""Names that `build_model` knows."""


def build_model(
    name: str, *, num_classes: int = 10, in_channels: int = 3, image_size: int = 32, norm: str = "batch"
) -> nn.Module:
    """Build a network in float32 on the CPU, in training mode, with fresh weights from torch's global generator.

    Trainable parameters at the default settings:

    | name | parameters | network |
    |---|---|---|
    | resnet18 | 11,173,962 | He et al. 2016 with a 3x3 stem of stride 1 and no max-pool |
    | resnet50 | 23,520,842 | likewise, bottleneck blocks |
    | resnet20, resnet32 | 269,722 and 464,154 | He et al. 2016, section 4.2, parameter-free shortcuts |
    | improved_cnn | 2,122,378 (1,630,282 for 1x28x28) | two convolutions with BatchNorm, one hidden layer, dropout |
    | convnet9 | 1,212,778 | nine convolutions with BatchNorm |
    | cnn62k | 62,006 | two 5x5 convolutions of 6 and 16 channels, 120 and 84 hidden units |
    | cnn1m | 1,203,666 | two padded 5x5 convolutions of 32 and 64 channels, 280 hidden units |

    Args:
        name: One of `MODELS`, or ``package.module:function`` of one's own, which is called with those of
            ``num_classes``, ``in_channels`` and ``image_size`` that it takes. Whether it fits, `check_model` tells.
        num_classes: Number of classes: outputs of the last layer.
        in_channels: Channels of the images.
        image_size: Side of the square images, in pixels.
        norm: ``batch``, or ``group`` for GroupNorm with two groups (Reddi et al. 2021), which has as many parameters
            and no running statistics.

    Returns:
        A module that maps images [N, in_channels, image_size, image_size] to logits [N, num_classes].

    Raises:
        FieldError: The name or norm is unknown, ``group`` is for a network without normalisation layers or of one's
            own, a size is too small, or a function cannot be imported or called, or returns no module.
    """
    if is_own(name):
        if norm != "batch":
            raise FieldError("norm", norm, f"batch, since {name} has layers of its own")
        return build_own(name, {"num_classes": num_classes, "in_channels": in_channels, "image_size": image_size})
    if name not in _RECIPES:
        raise FieldError("model", name, one_of(MODELS, name))
    recipe = _RECIPES[name]
    if norm not in NORMS:
        raise FieldError("norm", norm, one_of(NORMS, norm))
    if norm == "group" and not recipe.has_norm:
        raise FieldError("norm", norm, f"batch, since {name} has no normalisation layers")
    _check_at_least("num_classes", num_classes, 1)
    _check_at_least("in_channels", in_channels, 1)
    _check_at_least("image_size", image_size, recipe.min_image_size)
    options: dict[str, object] = {"num_classes": num_classes, "in_channels": in_channels}
    if recipe.has_norm:
        options["norm"] = NORMS[norm]
    if recipe.flattens:
        options["image_size"] = image_size
    model = recipe.build(**options)
    initialize_convolutions(model)
    return model


def num_parameters(model: nn.Module) -> int:
    """Return the number of trainable elements; running statistics and other buffers are not counted."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def _check_at_least(field: str, value: int, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise FieldError(field, value, f"an integer of at least {least}")

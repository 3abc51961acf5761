"""Residual networks for small images: ResNet-18/50 with a 3x3 stem, and the thin ResNet-20/32 made for CIFAR.

He et al. 2016 (arXiv 1512.03385). The 7x7 stem and max-pool for large images are not here.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F

from fedq.models.layers import Norm, conv3x3

Shortcut = Callable[[int, int, int, Norm], nn.Module]
"""Makes the layer that fits a block's input to its output from (in_channels, out_channels, stride, norm)."""


class ZeroPadShortcut(nn.Module):
    """Take every ``stride``-th pixel and append channels of zeros (option A of section 4.2): no parameters."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, norm: Norm) -> None:
        super().__init__()
        self.stride = stride
        self.new_channels = out_channels - in_channels

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, in_channels, H, W] to [N, out_channels, ceil(H / stride), ceil(W / stride)]."""
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.new_channels))


def projection_shortcut(in_channels: int, out_channels: int, stride: int, norm: Norm) -> nn.Module:
    """Return a strided 1x1 convolution and its normalisation (option B)."""
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False), norm(out_channels))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut."""

    expansion = 1

    def __init__(self, in_channels: int, width: int, stride: int, norm: Norm, shortcut: Shortcut) -> None:
        super().__init__()
        self.conv1 = conv3x3(in_channels, width, stride)
        self.norm1 = norm(width)
        self.conv2 = conv3x3(width, width)
        self.norm2 = norm(width)
        changes_shape = stride != 1 or in_channels != width
        self.shortcut = shortcut(in_channels, width, stride, norm) if changes_shape else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, in_channels, H, W] to [N, width, ceil(H / stride), ceil(W / stride)]."""
        out = F.relu(self.norm1(self.conv1(x)), inplace=True)
        out = self.norm2(self.conv2(out))
        return F.relu(out.add_(self.shortcut(x)), inplace=True)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions around a shortcut; the output has four times ``width`` channels.

    The last normalisation starts with weight 0, so that a block starts as its shortcut (Goyal et al. 2017,
    arXiv 1706.02677, section 5.1); otherwise ResNet-50's loss jumps in its first steps at usual learning rates.
    """

    expansion = 4

    def __init__(self, in_channels: int, width: int, stride: int, norm: Norm, shortcut: Shortcut) -> None:
        super().__init__()
        out_channels = self.expansion * width
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.norm1 = norm(width)
        self.conv2 = conv3x3(width, width, stride)
        self.norm2 = norm(width)
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.norm3 = norm(out_channels)
        nn.init.zeros_(self.norm3.weight)
        changes_shape = stride != 1 or in_channels != out_channels
        self.shortcut = shortcut(in_channels, out_channels, stride, norm) if changes_shape else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, in_channels, H, W] to [N, 4 * width, ceil(H / stride), ceil(W / stride)]."""
        out = F.relu(self.norm1(self.conv1(x)), inplace=True)
        out = F.relu(self.norm2(self.conv2(out)), inplace=True)
        out = self.norm3(self.conv3(out))
        return F.relu(out.add_(self.shortcut(x)), inplace=True)


class ResNet(nn.Module):
    """A 3x3 stem, stages of residual blocks that halve the image from the second stage on, mean pool, linear head.

    Args:
        block: The residual block.
        depths: Blocks in each stage.
        widths: Width of each stage's blocks; the stem has the first.
        shortcut: Makes the shortcut where a block changes the shape; elsewhere it is the identity.
        num_classes: Outputs of the head.
        in_channels: Channels of the images.
        norm: Makes a normalisation layer.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        depths: tuple[int, ...],
        widths: tuple[int, ...],
        shortcut: Shortcut,
        *,
        num_classes: int,
        in_channels: int,
        norm: Norm,
    ) -> None:
        super().__init__()
        self.conv1 = conv3x3(in_channels, widths[0])
        self.norm1 = norm(widths[0])
        stage_inputs = (widths[0], *(block.expansion * width for width in widths))
        stages = []
        for stage, (depth, width) in enumerate(zip(depths, widths, strict=True)):
            inputs = (stage_inputs[stage],) + (stage_inputs[stage + 1],) * (depth - 1)
            strides = (1 if stage == 0 else 2,) + (1,) * (depth - 1)
            blocks = (block(i, width, s, norm, shortcut) for i, s in zip(inputs, strides, strict=True))
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.Sequential(*stages)
        self.fc = nn.Linear(stage_inputs[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images [N, in_channels, H, W] to logits [N, num_classes]."""
        out = F.relu(self.norm1(self.conv1(x)), inplace=True)
        return self.fc(self.stages(out).mean((2, 3)))


resnet18 = partial(ResNet, BasicBlock, (2, 2, 2, 2), (64, 128, 256, 512), projection_shortcut)
resnet50 = partial(ResNet, Bottleneck, (3, 4, 6, 3), (64, 128, 256, 512), projection_shortcut)
resnet20 = partial(ResNet, BasicBlock, (3, 3, 3), (16, 32, 64), ZeroPadShortcut)
resnet32 = partial(ResNet, BasicBlock, (5, 5, 5), (16, 32, 64), ZeroPadShortcut)

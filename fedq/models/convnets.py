"""Plain convolutional networks: the small ones of the benchmarks and those of two earlier federated projects.

Residual networks live in `fedq.models.resnet`.
"""

from __future__ import annotations

from functools import partial
from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional as F

from fedq.models.layers import Norm, conv3x3


class TwoConvNet(nn.Module):
    """Two 5x5 convolutions, each followed by 2x2 max-pool and ReLU, then fully connected layers with ReLU between.

    Args:
        channels: Outputs of the two convolutions.
        padding: Pixels of zeros around the input of each convolution.
        hidden: Widths of the fully connected layers before the last.
        num_classes: Outputs of the last layer.
        in_channels: Channels of the images.
        image_size: Side of the square images, in pixels.
    """

    def __init__(
        self,
        channels: tuple[int, int],
        padding: int,
        hidden: tuple[int, ...],
        *,
        num_classes: int,
        in_channels: int,
        image_size: int,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels[0], 5, padding=padding)
        self.conv2 = nn.Conv2d(channels[0], channels[1], 5, padding=padding)
        side = image_size
        for _ in channels:
            side = (side + 2 * padding - 4) // 2
        widths = (channels[1] * side * side, *hidden, num_classes)
        self.fc = nn.ModuleList(nn.Linear(i, o) for i, o in pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        """Map images [N, in_channels, image_size, image_size] to logits [N, num_classes]."""
        # ReLU and max commute, and after the pool there is a quarter of the elements.
        out = F.relu(F.max_pool2d(self.conv1(x), 2), inplace=True)
        out = F.relu(F.max_pool2d(self.conv2(out), 2), inplace=True).flatten(1)
        for layer in self.fc[:-1]:
            out = F.relu(layer(out), inplace=True)
        return self.fc[-1](out)


class ImprovedCNN(nn.Module):
    """Two 3x3 convolutions of 32 and 64 channels with normalisation and max-pool, 512 hidden units, dropout 0.5.

    Args:
        num_classes: Outputs of the last layer.
        in_channels: Channels of the images.
        image_size: Side of the square images, in pixels; halved twice.
        norm: Makes a normalisation layer.
    """

    def __init__(self, *, num_classes: int, in_channels: int, image_size: int, norm: Norm) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 32, 3, padding=1)
        self.norm1 = norm(32)
        self.conv2 = nn.Conv2d(32, 64, 3, padding=1)
        self.norm2 = norm(64)
        self.fc1 = nn.Linear(64 * (image_size // 4) ** 2, 512)
        self.dropout = nn.Dropout(0.5)
        self.fc2 = nn.Linear(512, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images [N, in_channels, image_size, image_size] to logits [N, num_classes]."""
        # ReLU and max commute, and after the pool there is a quarter of the elements.
        out = F.relu(F.max_pool2d(self.norm1(self.conv1(x)), 2), inplace=True)
        out = F.relu(F.max_pool2d(self.norm2(self.conv2(out)), 2), inplace=True).flatten(1)
        return self.fc2(self.dropout(F.relu(self.fc1(out), inplace=True)))


class ConvNet9(nn.Module):
    """Nine 3x3 convolutions with normalisation and ReLU, strided where the width first doubles and doubles again.

    Args:
        num_classes: Outputs of the last layer.
        in_channels: Channels of the images.
        norm: Makes a normalisation layer.
    """

    widths_and_strides = ((32, 1), (32, 1), (64, 2), (64, 1), (64, 1), (128, 2), (128, 1), (256, 1), (256, 1))

    def __init__(self, *, num_classes: int, in_channels: int, norm: Norm) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = in_channels
        for width, stride in self.widths_and_strides:
            layers += [conv3x3(channels, width, stride), norm(width), nn.ReLU(inplace=True)]
            channels = width
        self.features = nn.Sequential(*layers)
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images [N, in_channels, H, W] to logits [N, num_classes]."""
        return self.fc(self.features(x).mean((2, 3)))


cnn62k = partial(TwoConvNet, (6, 16), 0, (120, 84))
cnn1m = partial(TwoConvNet, (32, 64), 2, (280,))

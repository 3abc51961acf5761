"""Convolutions of binary weights with binary inputs in C++: signs in 64-bit words, products by exclusive or."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fedq.errors import FieldError
from fedq.kernels.cpu.library import call, num_threads, pointer

MAX_PLACES = 64
"""Largest product of a kernel's height and width."""
_LANES, _WORD = 8, 64
_FIELDS = (
    *("num", "channels", "height", "width", "outputs", "real_outputs", "kernel_height", "kernel_width"),
    *("stride_height", "stride_width", "pad_height", "pad_width"),
)


class _Plan(ctypes.Structure):
    """``XnorPlan`` of ``csrc/xnor.h``."""

    _fields_ = tuple((name, ctypes.c_int64) for name in _FIELDS)


@dataclass(frozen=True)
class BinaryConv:
    """A convolution whose weights are signs times one scale for each output.

    Args:
        weights: Signs of the weights, int64 [outputs / 8, kernel height · kernel width · words, 8], 64 signs a word.
        sums: Sums of the signs of each place, int32 [kernel height · kernel width, outputs], for padding.
        scales: Scale of each output, float32 [outputs]; `outputs` is rounded up to a multiple of 8.
        bias: Bias of each output, float32 [real outputs]; None: no bias.
        shape: Shape of the weight: real outputs, channels, kernel height, kernel width.
        stride: Stride of the convolution in pixels, down and right.
        padding: Pixels of zeros on each side, down and right.
    """

    weights: Tensor
    sums: Tensor
    scales: Tensor
    bias: Tensor | None
    shape: tuple[int, int, int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)

    @classmethod
    def of(
        cls,
        signs: Tensor,
        scales: Tensor,
        bias: Tensor | None = None,
        stride: tuple[int, int] = (1, 1),
        padding: tuple[int, int] = (0, 0),
    ) -> BinaryConv:
        """Pack signs.

        Args:
            signs: Signs, bool [outputs, channels, kernel height, kernel width], True for +1; up to `MAX_PLACES` places.
            scales: Scale of each output, float32 [outputs].
            bias: Bias of each output, float32 [outputs]; None: no bias.
            stride: Stride of the convolution in pixels, down and right.
            padding: Pixels of zeros on each side, down and right.
        """
        outputs, channels, height, width = signs.shape
        places, more = height * width, -outputs % _LANES
        by_place = signs.permute(0, 2, 3, 1).reshape(outputs, places, channels).to(torch.int64)
        padded = F.pad(by_place, (0, -channels % _WORD, 0, 0, 0, more)).reshape(outputs + more, -1, _WORD)
        words = (padded << torch.arange(_WORD)).sum(dim=2)
        sums = F.pad(2 * by_place.sum(dim=2) - channels, (0, 0, 0, more)).to(torch.int32)
        return cls(
            weights=words.view(-1, _LANES, words.shape[1]).transpose(1, 2).contiguous(),
            sums=sums.t().contiguous(),
            scales=F.pad(scales, (0, more)),
            bias=bias,
            shape=(outputs, channels, height, width),
            stride=stride,
            padding=padding,
        )

    def __call__(self, x: Tensor, thresholds: Tensor) -> Tensor:
        """Return ``conv2d(sign(x - thresholds), signs)·scales + bias``; the convolution itself is exact.

        Args:
            x: Images, float32 [N, channels, height, width] on the CPU; ``sign(0)`` is +1.
            thresholds: Threshold of each channel, float32 [channels].

        Returns:
            The outputs, float32 [N, outputs, out height, out width].

        Raises:
            FieldError: The images have another type, device or number of channels, which the library would not notice.
        """
        outputs, channels, *kernel = self.shape
        if x.dim() != 4 or x.shape[1] != channels or x.dtype != torch.float32 or x.device.type != "cpu":
            allowed = f"float32 [N, {channels}, height, width] on the CPU"
            raise FieldError("x", f"{x.dtype} {list(x.shape)} on {x.device.type}", allowed)
        x = x.contiguous()
        num, _, *image = x.shape
        sizes = (num, channels, *image, len(self.scales), outputs, *kernel, *self.stride, *self.padding)
        plan = ctypes.byref(_Plan(*sizes))
        padded = [size + 2 * pad for size, pad in zip(image, self.padding, strict=True)]
        signs = torch.zeros(num, *padded, -(-channels // _WORD), dtype=torch.int64)
        out_sizes = [(p - k) // s + 1 for p, k, s in zip(padded, kernel, self.stride, strict=True)]
        out = torch.empty(num, outputs, *out_sizes)
        threads = num_threads()
        call("xnor_signs", plan, pointer(x), pointer(thresholds), pointer(signs), threads)
        given = (pointer(t) for t in (signs, self.weights, self.sums, self.scales, self.bias, out))
        call("xnor_conv", plan, *given, threads)
        return out

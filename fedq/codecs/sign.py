"""One bit an element: packed signs with one bfloat16 magnitude a group."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedq import kernels
from fedq.codecs.base import Codec, register
from fedq.codecs.grouped import Grouped, rounded_scale, safe_inverse
from fedq.errors import FieldError


@register("sign")
@dataclass(frozen=True)
class Sign(Grouped):
    """Scaled sign: ``1 + 16/block`` bits an element, bit 1 for a negative value.

    ``magnitude=mean`` is ``|x|_1 / n``, the contraction of EF-signSGD (Karimireddy et al. 2019); ``unbiased`` is
    ``|x|_2^2 / |x|_1`` (DRIVE, Vargaftik et al. 2021), for rotated values without feedback; ``auto`` picks.
    ``scale=mean`` and ``scale=unbiased`` are short for these. ``rounding=stochastic``: P(+) = (1 + x/absmax)/2.
    """

    block: int = 1024
    magnitude: str = "auto"

    def __post_init__(self) -> None:
        if self.scale in ("mean", "unbiased"):
            if self.magnitude not in ("auto", self.scale):
                raise FieldError("sign:magnitude", self.magnitude, f"{self.scale}, as scale={self.scale} says")
            object.__setattr__(self, "magnitude", self.scale)
            object.__setattr__(self, "scale", "block")
        if self.magnitude not in ("auto", "mean", "unbiased"):
            raise FieldError("sign:magnitude", self.magnitude, "auto, mean, unbiased")
        super().__post_init__()
        if self.rounding == "stochastic" and self.magnitude != "auto":
            raise FieldError("sign:magnitude", self.magnitude, "left out with rounding=stochastic (it takes absmax)")

    def resolved(self, *, feedback: bool) -> Codec:
        """Choose ``unbiased`` without error feedback if rotated, otherwise ``mean``.

        DRIVE's magnitude is unbiased under a random rotation only. On plain heavy-tailed updates it overshoots and, as
        measured in ``docs/results.md``, training can diverge.
        """
        if self.magnitude != "auto" or self.rounding == "stochastic":
            return self
        return replace(self, magnitude="unbiased" if self.rotates and not feedback else "mean")

    def _quantize(self, groups: Tensor, counts: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor]:
        if noise is not None:
            scale = rounded_scale(kernels.absmax(groups), up=True)
            positive = groups * safe_inverse(scale).unsqueeze(1) > 2.0 * noise - 1.0
            return (~positive).to(torch.uint8), scale
        total = kernels.tree_sum(groups.abs())
        if self.magnitude == "unbiased":
            # x·(x/|x|_1) instead of x²/|x|_1: a square leaves float32's range at 1e19 and at 1e-23.
            scale = kernels.tree_sum(groups * (groups * safe_inverse(total).unsqueeze(1)))
        else:
            scale = total / counts[:, 0]
        return (groups < 0).to(torch.uint8), rounded_scale(scale)

    def _levels(self, codes: Tensor) -> Tensor:
        return 1.0 - 2.0 * codes.to(torch.float32)

    def _pack(self, codes: Tensor) -> Tensor:
        return kernels.pack_bits(codes, 1)

    def _unpack(self, data: Tensor, num: int) -> Tensor:
        return kernels.unpack_bits(data, 1, num)

    def _codes_nbytes(self, num: int) -> int:
        return kernels.packed_nbytes(num, 1)

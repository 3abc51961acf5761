"""One bit an element: packed signs with one bfloat16 magnitude a group."""

from __future__ import annotations

from dataclasses import dataclass, replace

from fedq.codecs.base import Codec, Shape, register
from fedq.codecs.grouped import PlannedScaled
from fedq.errors import FieldError
from fedq.kernels import BlockPlan


@register("sign")
@dataclass(frozen=True)
class Sign(PlannedScaled):
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

    def _plan(self, shape: Shape) -> BlockPlan:
        return BlockPlan(
            "sign",
            1,
            self._group_width(shape),
            rotate=self.rotates,
            stochastic=self.rounding == "stochastic",
            unbiased=self.magnitude == "unbiased",
        )

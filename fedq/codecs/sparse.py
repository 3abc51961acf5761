"""Codecs that keep a few values: the largest of a tensor or of each block, random ones, or all above a threshold."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass, replace

from torch import Tensor

from fedq import kernels
from fedq.codecs.base import Codec, Planned, Shape, register
from fedq.errors import FieldError
from fedq.kernels import SparsePlan


@dataclass(frozen=True)
class Sparse(Planned):
    """A codec that keeps some elements: ``indices | codes | scales``.

    ``bits`` of a kept value: 32 (float32), 16 (bfloat16), or 1-8: a sign and a magnitude ``s·(j + 1/2)`` with one
    bfloat16 scale for every 4,096 elements of the tensor. Codes are chosen with the step ``absmax / 2^(bits-1)``, at 2
    bits with 5/3 of the mean kept magnitude (updates have heavy tails: a grid up to the largest would send most values
    as the same level); then ``s`` is the least-squares scale of the chosen levels.
    """

    bits: int = 16

    def __post_init__(self) -> None:
        if self.bits not in (1, 2, 3, 4, 5, 6, 7, 8, 16, 32):
            raise FieldError(f"{self.spec.partition(':')[0]}:bits", self.bits, "1 to 8, 16 (bfloat16), 32 (float32)")

    @property
    @abstractmethod
    def plan(self) -> SparsePlan:
        """What to compute, whatever the shape."""

    def _plan(self, shape: Shape) -> SparsePlan:
        return self.plan

    def check(self, data: Tensor, shape: Shape) -> None:
        """Raise `FieldError` unless ``data`` is a payload that decodes: of the right size, its positions in order."""
        super().check(data, shape)
        if data.numel():
            kernels.check(self.plan, data, math.prod(shape))

    def _sections(self, shape: Shape, data: Tensor | None = None) -> dict[str, int]:
        plan, num = self.plan, math.prod(shape)
        kept = kernels.reference.sparse.num_kept(plan, num, data)
        return {
            "indices": plan.indices_nbytes(num, kept),
            "codes": plan.codes_nbytes(kept),
            "scales": plan.scales_nbytes(num),
        }


def _check_density(name: str, density: float) -> None:
    if not 0.0 < density <= 1.0:
        raise FieldError(f"{name}:density", density, "a fraction above 0, at most 1")


@register("topk")
@dataclass(frozen=True)
class TopK(Sparse):
    """Keep the ``k = max(1, round(density·n))`` largest magnitudes of each tensor (Aji and Heafield 2017).

    Positions as Elias-Fano: ``k·(2 + log2(n/k))`` bits, about 8.6 an entry at 1 %. Of equal magnitudes the first wins.
    """

    density: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_density("topk", self.density)

    @property
    def plan(self) -> SparsePlan:
        """What to compute."""
        return SparsePlan("topk", self.bits, density=self.density)


@register("blocktopk")
@dataclass(frozen=True)
class BlockTopK(Sparse):
    """Keep the ``k`` largest magnitudes of every block: ``k·(log2(block) + bits)/block`` bits an element, plus scales.

    The size never depends on the values, and an index costs 6 bits at block 64 (the idea of DeMo, Peng et al. 2024,
    and SparseLoCo: static k of B). Of equal magnitudes the first wins.
    """

    k: int = 1
    block: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block < 2 or self.block & (self.block - 1) or self.block > 1 << 20:
            raise FieldError("blocktopk:block", self.block, "a power of two from 2 to 2^20")
        if not 1 <= self.k <= self.block:
            raise FieldError("blocktopk:k", self.k, f"1 to block={self.block}")

    @property
    def plan(self) -> SparsePlan:
        """What to compute."""
        return SparsePlan("blocktopk", self.bits, k=self.k, block=self.block)


@register("randk")
@dataclass(frozen=True)
class RandK(Sparse):
    """Keep ``k = max(1, round(density·n))`` elements at random, one of each of ``k`` equal runs; no indices travel.

    All clients of a round keep the same positions (the shared seed), so payloads can be summed. ``unbias=true``
    multiplies by the run's length, so the mean over seeds is the input (without feedback); under feedback the plain
    values are the contraction that converges (Stich et al. 2018). ``auto`` picks between them.
    """

    density: float = 0.01
    unbias: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_density("randk", self.density)
        if self.unbias not in ("auto", "true", "false"):
            raise FieldError("randk:unbias", self.unbias, "auto, true, false")

    @property
    def reducible(self) -> bool:
        """True for plain values: every client's payload holds the same positions."""
        return self.bits >= 16

    @property
    def unbiased(self) -> bool:
        """True with ``unbias=true`` and unquantized values."""
        return self.unbias == "true" and self.bits >= 16

    @property
    def wants_feedback(self) -> bool:
        """True unless the values were asked to be unbiased."""
        return self.unbias != "true"

    def resolved(self, *, feedback: bool) -> Codec:
        """Send plain values with error feedback and unbiased ones without."""
        return replace(self, unbias="false" if feedback else "true") if self.unbias == "auto" else self

    @property
    def plan(self) -> SparsePlan:
        """What to compute."""
        return SparsePlan("randk", self.bits, density=self.density, unbias=self.unbias == "true")


@register("threshold")
@dataclass(frozen=True)
class Threshold(Sparse):
    """Keep every magnitude of at least ``value``: 8 bytes for the count, then Elias-Fano positions and values.

    ``k`` kept of ``n``: ``8 + k·(2 + log2(n/k))/8 + k·bits/8`` bytes, plus scales; the size depends on the values.
    """

    fixed_size = False

    value: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (math.isfinite(self.value) and self.value > 0):
            raise FieldError("threshold:value", self.value, "a finite number above 0")

    @property
    def plan(self) -> SparsePlan:
        """What to compute."""
        return SparsePlan("threshold", self.bits, value=self.value)

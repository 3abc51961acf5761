"""Pruned tensors: a few values travel with their positions; what is left out stays in the residual.

`Sparse` codes the kept values; each codec adds which positions it keeps and how it names them.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedq import kernels
from fedq.codecs.base import Codec, Shape, register
from fedq.codecs.grouped import rounded_scale, safe_inverse
from fedq.errors import FieldError

_GROUP = 4096
"""Tensor elements that share one scale of kept values."""


@dataclass(frozen=True)
class Sparse(Codec):
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

    @abstractmethod
    def _select(self, x: Tensor, seed: int) -> Tensor:
        """Return the kept positions, sorted int64."""

    @abstractmethod
    def _num_kept(self, num: int, data: Tensor | None) -> int:
        """Return how many of ``num`` elements are kept."""

    def _indices_encode(self, indices: Tensor, num: int) -> Tensor:
        return kernels.elias_fano_encode(indices, num)

    def _indices_decode(self, data: Tensor, kept: int, num: int, seed: int) -> Tensor:
        return kernels.elias_fano_decode(data, kept, num)

    def _indices_nbytes(self, kept: int, num: int) -> int:
        return kernels.elias_fano_nbytes(kept, num)

    def _sent(self, values: Tensor, num: int) -> Tensor:
        """Return what is sent of the kept values."""
        return values

    def _encode(self, x: Tensor, shape: Shape, seed: int) -> list[Tensor]:
        indices = self._select(x, seed)
        inside = indices < x.numel()
        values = torch.where(inside, x[indices.clamp(max=x.numel() - 1)], 0.0)
        codes = self._values_encode(self._sent(values, x.numel()), indices, x.numel())
        return [self._indices_encode(indices, x.numel()), *codes]

    def _decode(self, data: Tensor, shape: Shape, seed: int) -> Tensor:
        num = math.prod(shape)
        kept = self._num_kept(num, data)
        at = self._indices_nbytes(kept, num)
        indices = self._indices_decode(data[:at], kept, num, seed)
        values = self._values_decode(data[at:], indices, num)
        inside = indices < num
        out = torch.zeros(num, device=data.device)
        out[indices[inside]] = values[inside]
        return out

    def _sections(self, shape: Shape, data: Tensor | None = None) -> dict[str, int]:
        num = math.prod(shape)
        kept = self._num_kept(num, data)
        scales = 2 * -(-num // _GROUP) if self.bits <= 8 else 0
        return {
            "indices": self._indices_nbytes(kept, num),
            "codes": kernels.packed_nbytes(kept, self.bits),
            "scales": scales,
        }

    # ---- kept values ---------------------------------------------------------------------------------------------

    @property
    def _num_levels(self) -> int:
        return 1 << (self.bits - 1)

    def _values_encode(self, values: Tensor, indices: Tensor, num: int) -> list[Tensor]:
        if self.bits == 32:
            return [values.contiguous().view(torch.uint8)]
        if self.bits == 16:
            return [kernels.bf16_bytes(values)]
        magnitude, group = values.abs(), self._group(indices, num)
        step = self._first_step(magnitude, indices, num)
        cell = (magnitude * safe_inverse(step)[group]).floor_()
        cell = cell.clamp_(0, self._num_levels - 1).nan_to_num_(0.0)
        level = cell + 0.5
        scale = self._group_sum(magnitude * level, indices, num) * safe_inverse(
            self._group_sum(level * level, indices, num)
        )
        codes = cell.to(torch.uint8) | ((values < 0).to(torch.uint8) << (self.bits - 1))
        return [kernels.pack_bits(codes, self.bits), kernels.bf16_bytes(rounded_scale(scale))]

    def _values_decode(self, data: Tensor, indices: Tensor, num: int) -> Tensor:
        kept = indices.numel()
        if self.bits == 32:
            return data.clone().view(torch.float32)
        if self.bits == 16:
            return kernels.bf16_from_bytes(data)
        at = kernels.packed_nbytes(kept, self.bits)
        codes = kernels.unpack_bits(data[:at], self.bits, kept)
        scale = kernels.bf16_from_bytes(data[at:])[self._group(indices, num)]
        level = (codes & (self._num_levels - 1)).to(torch.float32) + 0.5
        return torch.where(codes >= self._num_levels, -level, level) * scale

    def _group(self, indices: Tensor, num: int) -> Tensor:
        """Return the group of each position; padding after the last element belongs to the last group."""
        return (indices // _GROUP).clamp(max=(num - 1) // _GROUP)

    def _first_step(self, magnitude: Tensor, indices: Tensor, num: int) -> Tensor:
        """Return the step that chooses codes, by group (at 1 bit there is nothing to choose)."""
        if self.bits > 2:
            return kernels.absmax(self._spread(magnitude, indices, num)) / self._num_levels
        count = self._group_sum(torch.ones_like(magnitude), indices, num)
        return self._group_sum(magnitude, indices, num) / count.clamp(min=1.0) * (5.0 / 3.0)

    def _spread(self, values: Tensor, indices: Tensor, num: int) -> Tensor:
        """Return the kept values at their positions, (groups, 4096), zeros elsewhere."""
        size = max(num, int(indices[-1]) + 1) if indices.numel() else num
        dense = torch.zeros(size, device=values.device)
        dense[indices] = values
        return kernels.to_groups(dense[:num], _GROUP)

    def _group_sum(self, values: Tensor, indices: Tensor, num: int) -> Tensor:
        return kernels.tree_sum(self._spread(values, indices, num))


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

    def _num_kept(self, num: int, data: Tensor | None) -> int:
        return min(num, max(1, round(self.density * num)))

    def _select(self, x: Tensor, seed: int) -> Tensor:
        kept = self._num_kept(x.numel(), None)
        magnitude = torch.where(x.isnan(), torch.inf, x.abs())
        smallest = magnitude.topk(kept, sorted=False).values.min()
        above = (magnitude > smallest).nonzero().view(-1)
        ties = (magnitude == smallest).nonzero().view(-1)[: kept - above.numel()]
        return torch.cat((above, ties)).sort().values


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
    def _index_bits(self) -> int:
        return self.block.bit_length() - 1

    def _num_kept(self, num: int, data: Tensor | None) -> int:
        return self.k * -(-num // self.block)

    def _select(self, x: Tensor, seed: int) -> Tensor:
        blocks = kernels.to_groups(torch.where(x.isnan(), torch.inf, x.abs()), self.block)
        if self.k == 1:
            local = blocks.argmax(dim=1, keepdim=True)
        else:
            order = blocks.sort(dim=1, descending=True, stable=True).indices
            local = order[:, : self.k].sort(dim=1).values
        return (local + self.block * torch.arange(blocks.shape[0], device=x.device).unsqueeze(1)).view(-1)

    def _indices_encode(self, indices: Tensor, num: int) -> Tensor:
        return kernels.pack_bits(indices % self.block, self._index_bits)

    def _indices_decode(self, data: Tensor, kept: int, num: int, seed: int) -> Tensor:
        local = kernels.unpack_bits(data, self._index_bits, kept).to(torch.int64)
        return local + self.block * (torch.arange(kept, device=data.device) // self.k)

    def _indices_nbytes(self, kept: int, num: int) -> int:
        return kernels.packed_nbytes(kept, self._index_bits)


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

    def _num_kept(self, num: int, data: Tensor | None) -> int:
        return min(num, max(1, round(self.density * num)))

    def _runs(self, num: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return first element and length of each run."""
        kept = self._num_kept(num, None)
        edges = torch.arange(kept + 1, device=device) * num // kept
        return edges[:-1], edges[1:] - edges[:-1]

    def _select(self, x: Tensor, seed: int) -> Tensor:
        return self._positions(x.numel(), seed, x.device)

    def _positions(self, num: int, seed: int, device: torch.device) -> Tensor:
        first, length = self._runs(num, device)
        counter = torch.arange(first.numel(), device=device)
        return first + kernels.hash32(counter, kernels.reference.shared_key(seed)) % length

    def _sent(self, values: Tensor, num: int) -> Tensor:
        return values * self._runs(num, values.device)[1] if self.unbias == "true" else values

    def _indices_encode(self, indices: Tensor, num: int) -> Tensor:
        return indices.new_empty(0, dtype=torch.uint8)

    def _indices_decode(self, data: Tensor, kept: int, num: int, seed: int) -> Tensor:
        return self._positions(num, seed, data.device)

    def _indices_nbytes(self, kept: int, num: int) -> int:
        return 0


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

    def _select(self, x: Tensor, seed: int) -> Tensor:
        return (~(x.abs() < self.value)).nonzero().view(-1)

    def _num_kept(self, num: int, data: Tensor | None) -> int:
        if data is None or data.numel() < 8:
            raise FieldError("threshold:payload bytes", 0 if data is None else data.numel(), "at least 8")
        kept = int(data[:8].clone().view(torch.int64))
        if not 0 <= kept <= num:
            raise FieldError("threshold:count", kept, f"0 to {num}")
        return kept

    def _indices_encode(self, indices: Tensor, num: int) -> Tensor:
        count = torch.tensor([indices.numel()], dtype=torch.int64, device=indices.device).view(torch.uint8)
        return torch.cat((count, super()._indices_encode(indices, num)))

    def _indices_decode(self, data: Tensor, kept: int, num: int, seed: int) -> Tensor:
        return super()._indices_decode(data[8:], kept, num, seed)

    def _indices_nbytes(self, kept: int, num: int) -> int:
        return 8 + super()._indices_nbytes(kept, num)

"""Few-bit codes with one scale a block in plain torch: the rules of the grids, and the passes over blocks.

A rule says how a block's values become a scale and codes; the passes cut a tensor into blocks, rotate, draw noise and
work in cache-sized chunks. A codec may bring its own rule (`fedq.codecs.grouped.Grouped`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from fedq.kernels.plan import LARGE, ROTATION, SHRINK, BlockPlan
from fedq.kernels.reference.primitives import (
    LARGEST,
    LARGEST_BF16,
    absmax,
    bf16_bytes,
    bf16_from_bytes,
    element_mask,
    from_groups,
    pack_bits,
    pack_trits,
    rotate,
    rounded_scale,
    safe_inverse,
    to_groups,
    tree_sum,
    uniform,
    unpack_bits,
    unpack_trits,
    unrotate,
)

CHUNK = 1 << 15
"""A fifth of the elements a pass works on at a time, so that its temporaries stay in cache; never visible in the
bytes. Five of them are whole bytes of trits too."""
GAUSSIAN_STEP = {1: 1.5958, 2: 0.9957, 3: 0.5860, 4: 0.3352, 5: 0.1881, 6: 0.1041, 7: 0.0569, 8: 0.0308}
"""Step of the best uniform mid-rise grid for a unit Gaussian (Max 1960, table II), by bits."""
MEAN_TO_SIGMA = math.sqrt(math.pi / 2.0)
"""Standard deviation of a Gaussian over its mean magnitude."""
TERNARY_THRESHOLD = 0.75
"""Magnitudes above this multiple of the block's mean are kept."""


@dataclass(frozen=True)
class Rule:
    """How the values of a block become codes and back.

    Args:
        quantize: Maps groups (g, 2^n), counts (g, 1), noise like groups or None, and the largest scale that there
            may be, to uint8 codes like groups and float32 scales (g,) that bfloat16 holds exactly.
        levels: Maps uint8 codes to their float32 values at scale 1.
        pack: Maps flat codes to bytes.
        unpack: Maps bytes and a number of codes to the flat codes.
        codes_nbytes: Maps a number of codes to their packed bytes.
        measure: Maps groups to values that show which are `LARGE`: their largest magnitudes, or sums of magnitudes.
        largest_scale: Largest scale that decodes to finite values; None: what the levels in use allow.
    """

    quantize: Callable[[Tensor, Tensor, Tensor | None, float], tuple[Tensor, Tensor]]
    levels: Callable[[Tensor], Tensor]
    pack: Callable[[Tensor], Tensor]
    unpack: Callable[[Tensor, int], Tensor]
    codes_nbytes: Callable[[int], int]
    measure: Callable[[Tensor], Tensor]
    largest_scale: float | None = None


# ---- the built-in rules ------------------------------------------------------------------------------------------


def rule_of(plan: BlockPlan) -> Rule:
    """Return the rule of a plan."""
    quantize = {"integer": _quantize_integer, "ternary": _quantize_ternary, "sign": _quantize_sign}[plan.kind]
    levels = {"integer": _integer_levels, "ternary": _ternary_levels, "sign": _sign_levels}[plan.kind]
    is_ternary = plan.kind == "ternary"
    return Rule(
        quantize=partial(quantize, plan),
        levels=partial(levels, plan),
        pack=pack_trits if is_ternary else lambda codes: pack_bits(codes, plan.bits),
        unpack=unpack_trits if is_ternary else lambda data, num: unpack_bits(data, plan.bits, num),
        codes_nbytes=plan.codes_nbytes,
        measure=absmax if plan.by_absmax else sum_of_magnitudes,
        largest_scale=plan.largest_scale,
    )


def sum_of_magnitudes(groups: Tensor) -> Tensor:
    """Return the sum of each row's magnitudes."""
    return tree_sum(groups.abs())


def _quantize_integer(
    plan: BlockPlan, groups: Tensor, counts: Tensor, noise: Tensor | None, largest: float
) -> tuple[Tensor, Tensor]:
    if noise is not None:
        return _quantize_stochastic(plan, groups, noise, largest)
    if plan.midrise:
        return _quantize_gaussian(plan, groups, counts, largest)
    return _quantize_absmax(plan, groups, largest)


def _quantize_gaussian(plan: BlockPlan, groups: Tensor, counts: Tensor, largest: float) -> tuple[Tensor, Tensor]:
    """Mid-rise grid: codes by the best Gaussian step, then the least-squares scale of the chosen levels."""
    half = 1 << (plan.bits - 1)
    mean = tree_sum(groups.abs()).unsqueeze(1) / counts
    inverse = safe_inverse(mean * (GAUSSIAN_STEP[plan.bits] * MEAN_TO_SIGMA))
    cell = (groups * inverse).floor_().clamp_(-half, half - 1)
    levels = (cell + 0.5) * element_mask(groups, counts)
    scale = tree_sum(groups * levels) / tree_sum(levels * levels)
    return _codes(cell, half), rounded_scale(scale, largest=largest)


def _quantize_absmax(plan: BlockPlan, groups: Tensor, largest: float) -> tuple[Tensor, Tensor]:
    """Mid-tread grid up to the largest magnitude."""
    half = 1 << (plan.bits - 1)
    scale = rounded_scale(_divided(absmax(groups), half - 1), largest=largest)
    q = (groups * safe_inverse(scale).unsqueeze(1)).round_().clamp_(1 - half, half - 1)
    return _codes(q, half), scale


def _quantize_stochastic(plan: BlockPlan, groups: Tensor, noise: Tensor, largest: float) -> tuple[Tensor, Tensor]:
    """Either grid with a scale that is never too small, rounded up with the probability of the remainder."""
    half = 1 << (plan.bits - 1)
    offset = 0.5 if plan.midrise else 0.0
    top = half - 1 + offset
    scale = rounded_scale(_divided(absmax(groups), top), up=True, largest=largest)
    cell = (groups * safe_inverse(scale).unsqueeze(1) - offset + noise).floor_()
    return _codes(cell.clamp_(-top - offset, top - offset), half), scale


def _divided(x: Tensor, divisor: float) -> Tensor:
    """Return the correctly rounded quotient: for a plain number, torch multiplies by its reciprocal on CUDA."""
    return x / torch.full_like(x, divisor)


def _codes(cell: Tensor, half: int) -> Tensor:
    """Return uint8 codes; a NaN cell becomes the lowest code (its block's scale carries the NaN)."""
    return cell.add_(half).nan_to_num_(0.0).to(torch.uint8)


def _integer_levels(plan: BlockPlan, codes: Tensor) -> Tensor:
    half = 1 << (plan.bits - 1)
    return codes.to(torch.float32) - (half - 0.5 if plan.midrise else float(half))


def _quantize_ternary(
    plan: BlockPlan, groups: Tensor, counts: Tensor, noise: Tensor | None, largest: float
) -> tuple[Tensor, Tensor]:
    magnitude = groups.abs()
    if noise is not None:
        scale = rounded_scale(absmax(groups), up=True, largest=largest)
        keep = magnitude * safe_inverse(scale).unsqueeze(1) > noise
    else:
        keep = magnitude > TERNARY_THRESHOLD * (tree_sum(magnitude).unsqueeze(1) / counts)
        kept = tree_sum(keep.to(torch.float32))
        total = tree_sum(torch.where(keep | ~magnitude.isfinite(), magnitude, 0.0))
        scale = rounded_scale(total / kept.clamp(min=1.0), largest=largest)
    trit = torch.where(keep, groups.sign(), 0.0)
    return (trit + 1.0).to(torch.uint8), scale


def _ternary_levels(plan: BlockPlan, codes: Tensor) -> Tensor:
    return codes.to(torch.float32) - 1.0


def _quantize_sign(
    plan: BlockPlan, groups: Tensor, counts: Tensor, noise: Tensor | None, largest: float
) -> tuple[Tensor, Tensor]:
    if noise is not None:
        scale = rounded_scale(absmax(groups), up=True, largest=largest)
        positive = groups * safe_inverse(scale).unsqueeze(1) > 2.0 * noise - 1.0
        return (~positive).to(torch.uint8), scale
    total = tree_sum(groups.abs())
    scale = total / counts[:, 0]
    if plan.unbiased:
        # x·(x/|x|_1) instead of x²/|x|_1: a square leaves float32's range at 1e19 and at 1e-23.
        scale = tree_sum(groups * (groups * safe_inverse(total).unsqueeze(1)))
    return (groups < 0).to(torch.uint8), rounded_scale(scale, largest=largest)


def _sign_levels(plan: BlockPlan, codes: Tensor) -> Tensor:
    return 1.0 - 2.0 * codes.to(torch.float32)


# ---- the passes --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Blocks:
    """How a flat tensor falls into blocks.

    Args:
        width: Number of elements of a block.
        rotate: Whether runs of 256 are rotated first.
        stochastic: Whether the rule gets noise.
    """

    width: int
    rotate: bool
    stochastic: bool

    def num_codes(self, num: int) -> int:
        """Codes of ``num`` elements: rotation codes its padding too."""
        return BlockPlan("integer", 8, self.width, self.rotate).num_codes(num)

    def chunk(self, num: int) -> int:
        """Elements a chunk: whole blocks and whole bytes of codes; all of them if the width is no power of two."""
        return num if self.width & (self.width - 1) else 5 * max(self.width, CHUNK)


def encode_blocks(rule: Rule, blocks: Blocks, x: Tensor, *, seed: int) -> list[Tensor]:
    """Return the sections ``codes | scales``, in pieces, of flat non-empty float32 ``x``."""
    step = blocks.chunk(x.numel())
    codes, scales = [], []
    for start in range(0, x.numel(), step):
        chunk_codes, chunk_scales = _encode_chunk(rule, blocks, x[start : start + step], seed, start)
        codes.append(chunk_codes)
        scales.append(bf16_bytes(chunk_scales))
    return codes + scales


def _encode_chunk(rule: Rule, blocks: Blocks, x: Tensor, seed: int, start: int) -> tuple[Tensor, Tensor]:
    groups, num = _groups_of(blocks, x, seed, start), blocks.num_codes(x.numel())
    counts = torch.full((groups.shape[0], 1), float(blocks.width), device=x.device)
    counts[-1] = num - blocks.width * (groups.shape[0] - 1)
    noise = None
    if blocks.stochastic:
        noise = to_groups(uniform(num, seed, start=start, device=x.device), blocks.width)
    largest = rule.largest_scale or LARGEST_BF16
    codes, scales = rule.quantize(groups, counts, noise, largest)
    if not bool(torch.stack(torch.aminmax(groups)).abs().amax() * blocks.width < LARGE):
        large = ~(rule.measure(groups) < LARGE) & to_groups(x, blocks.width).isfinite().all(dim=1)
        shrunk = rule.quantize(_groups_of(blocks, x * SHRINK, seed, start), counts, noise, largest * SHRINK)
        codes = torch.where(large.unsqueeze(1), shrunk[0], codes)
        scales = torch.where(large, _grown(rule, *shrunk), scales)
    return rule.pack(from_groups(codes, blocks.width, num)), scales


def _groups_of(blocks: Blocks, x: Tensor, seed: int, start: int) -> Tensor:
    return to_groups(rotate(x, seed, start=start) if blocks.rotate else x, blocks.width)


def _grown(rule: Rule, codes: Tensor, scales: Tensor) -> Tensor:
    """Return the scales of values that were multiplied by `SHRINK`."""
    grown = scales / SHRINK
    if rule.largest_scale is not None:
        return grown
    return torch.minimum(grown, rounded_scale(LARGEST / absmax(rule.levels(codes)).clamp(min=1.0) * (1 - 2.0**-7)))


def decode_blocks(rule: Rule, blocks: Blocks, data: Tensor, num: int, *, seed: int) -> Tensor:
    """Return the flat float32 values of a payload."""
    step = blocks.chunk(num)
    scales = bf16_from_bytes(data[rule.codes_nbytes(blocks.num_codes(num)) :])
    out = torch.empty(num, device=data.device)
    for start in range(0, num, step):
        size = min(step, num - start)
        num_codes, at, first = blocks.num_codes(size), rule.codes_nbytes(start), start // blocks.width
        codes = rule.unpack(data[at : at + rule.codes_nbytes(num_codes)], num_codes)
        levels = to_groups(rule.levels(codes), blocks.width)
        some = scales[first : first + levels.shape[0]].unsqueeze(1)
        if blocks.rotate:
            out[start : start + size] = _unrotated(levels, some, blocks.width, seed, size, start)
        else:
            out[start : start + size] = from_groups(levels * some, blocks.width, num_codes)
    return out


def _unrotated(levels: Tensor, scales: Tensor, width: int, seed: int, num: int, start: int) -> Tensor:
    """Return ``num`` values of rotated groups; none leaves float32's range whose scale, of either sign, is finite."""
    num_codes = -(-num // ROTATION) * ROTATION
    large = (scales.abs() >= LARGE) & scales.isfinite()
    if not bool(large.any()):
        return unrotate(from_groups(levels * scales, width, num_codes), seed, num, start=start)
    unit = torch.where(large, SHRINK, 1.0)
    values = unrotate(from_groups(levels * (scales * unit), width, num_codes), seed, num, start=start)
    units = from_groups(unit.expand_as(levels), width, num)
    return torch.where(units < 1.0, (values / units).clamp(-LARGEST, LARGEST), values)


def codes(plan: BlockPlan, data: Tensor, num: int) -> Tensor:
    """Return the unpacked codes of ``num`` elements, flat uint8; with rotation those of the padding too."""
    return rule_of(plan).unpack(data[: plan.codes_nbytes(num)], plan.num_codes(num))


def encode(plan: BlockPlan, x: Tensor, *, seed: int) -> list[Tensor]:
    """Return the sections of a plan's payload for flat non-empty float32 ``x``."""
    return encode_blocks(rule_of(plan), _blocks(plan), x, seed=seed)


def decode(plan: BlockPlan, data: Tensor, num: int, *, seed: int) -> Tensor:
    """Return the flat float32 values of a plan's payload."""
    return decode_blocks(rule_of(plan), _blocks(plan), data, num, seed=seed)


def _blocks(plan: BlockPlan) -> Blocks:
    return Blocks(plan.block, plan.rotate, plan.stochastic)

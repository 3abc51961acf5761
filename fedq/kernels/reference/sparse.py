"""A few values with their positions in plain torch: which are kept, and how values and positions become bytes."""

from __future__ import annotations

import torch
from torch import Tensor

from fedq.errors import FieldError
from fedq.kernels.plan import LARGE, SCALE_GROUP, SHRINK, SparsePlan
from fedq.kernels.reference.primitives import (
    LARGEST,
    absmax,
    bf16_bytes,
    bf16_from_bytes,
    elias_fano_decode,
    elias_fano_encode,
    hash32,
    out_of_order,
    pack_bits,
    packed_nbytes,
    rounded_scale,
    safe_inverse,
    shared_key,
    to_groups,
    tree_sum,
    unpack_bits,
)

FIRST_STEP = 5.0 / 3.0
"""Step that chooses codes at 1 and 2 bits, as a multiple of the mean kept magnitude."""


def encode(plan: SparsePlan, x: Tensor, *, seed: int, ranked: Tensor | None = None) -> list[Tensor]:
    """Return the sections of flat float32 ``x``.

    Args:
        plan: The plan, which says what to keep, and how.
        x: The values, flat float32.
        seed: Seed of 64 bits.
        ranked: Values like ``x`` whose magnitudes decide which are kept; default: ``x``.
    """
    num = x.numel()
    kept_of = x if ranked is None else ranked
    indices = positions(plan, num, seed, x.device) if plan.kind == "randk" else select(plan, kept_of)
    values = torch.where(indices < num, x[indices.clamp(max=num - 1)], 0.0)
    if plan.unbias:
        longer = values * _runs(plan, num, x.device)[1]
        values = torch.where(values.isfinite(), longer.clamp(-LARGEST, LARGEST), longer)
    return [_indices_encode(plan, indices, num), *_values_encode(plan, values, indices, num)]


def decode(plan: SparsePlan, data: Tensor, num: int, *, seed: int) -> Tensor:
    """Return flat float32 values, zero where none was kept."""
    indices, values = kept(plan, data, num, seed=seed)
    out = torch.zeros(num, device=data.device)
    out[indices] = values
    return out


def add(plan: SparsePlan, data: Tensor, num: int, *, seed: int, out: Tensor, weight: float) -> None:
    """Add ``weight`` times the kept values to ``out``; where none was kept, ``out`` is not touched."""
    indices, values = kept(plan, data, num, seed=seed)
    out[indices] += values.mul_(weight)


def check(plan: SparsePlan, data: Tensor, num: int) -> None:
    """Raise `FieldError` unless the positions in a payload of the right size can be decoded."""
    if plan.kind != "randk":
        count = num_kept(plan, num, data)
        _indices_decode(plan, data[: plan.indices_nbytes(num, count)], count, num, 0)


def kept(plan: SparsePlan, data: Tensor, num: int, *, seed: int) -> tuple[Tensor, Tensor]:
    """Return the kept positions (sorted int64, all below ``num``) and their float32 values.

    Raises:
        FieldError: The positions do not rise inside the tensor (``blocktopk``: inside each block).
    """
    count = num_kept(plan, num, data)
    at = plan.indices_nbytes(num, count)
    indices = _indices_decode(plan, data[:at], count, num, seed)
    values = _values_decode(plan, data[at:], indices, num)
    inside = indices < num
    return indices[inside], values[inside]


def num_kept(plan: SparsePlan, num: int, data: Tensor | None) -> int:
    """Return how many of ``num`` elements are kept, padding of the last block included.

    Raises:
        FieldError: The plan is ``threshold`` and there is no data, or data with a count outside 0 to ``num``.
    """
    if plan.kind != "threshold":
        return plan.num_kept(num)
    if data is None or data.numel() < 8:
        raise FieldError("threshold:payload bytes", 0 if data is None else data.numel(), "at least 8")
    count = int(data[:8].clone().view(torch.int64))
    if not 0 <= count <= num:
        raise FieldError("threshold:count", count, f"0 to {num}")
    return count


# ---- which are kept ----------------------------------------------------------------------------------------------


def select(plan: SparsePlan, x: Tensor) -> Tensor:
    """Return the positions that the values decide, sorted int64; of equal magnitudes the first wins."""
    if plan.kind == "threshold":
        return (~(x.abs() < plan.value)).nonzero().view(-1)
    magnitude = torch.where(x.isnan(), torch.inf, x.abs())
    return _strongest(plan, magnitude) if plan.kind == "topk" else _strongest_of_blocks(plan, magnitude)


def _strongest(plan: SparsePlan, magnitude: Tensor) -> Tensor:
    count = plan.num_kept(magnitude.numel())
    smallest = magnitude.topk(count, sorted=False).values.min()
    above = (magnitude > smallest).nonzero().view(-1)
    ties = (magnitude == smallest).nonzero().view(-1)[: count - above.numel()]
    return torch.cat((above, ties)).sort().values


def _strongest_of_blocks(plan: SparsePlan, magnitude: Tensor) -> Tensor:
    blocks = to_groups(magnitude, plan.block)
    if plan.k == 1:
        local = blocks.argmax(dim=1, keepdim=True)
    else:
        order = blocks.sort(dim=1, descending=True, stable=True).indices
        local = order[:, : plan.k].sort(dim=1).values
    return (local + plan.block * torch.arange(blocks.shape[0], device=magnitude.device).unsqueeze(1)).view(-1)


def positions(plan: SparsePlan, num: int, seed: int, device: torch.device) -> Tensor:
    """Return the positions of ``randk``: one of each run, the same for all clients of a round."""
    first, length = _runs(plan, num, device)
    return first + hash32(torch.arange(first.numel(), device=device), shared_key(seed)) % length


def _runs(plan: SparsePlan, num: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return first element and length of each run of ``randk``."""
    count = plan.num_kept(num)
    edges = torch.arange(count + 1, device=device) * num // count
    return edges[:-1], edges[1:] - edges[:-1]


# ---- positions as bytes ------------------------------------------------------------------------------------------


def _indices_encode(plan: SparsePlan, indices: Tensor, num: int) -> Tensor:
    if plan.kind == "randk":
        return indices.new_empty(0, dtype=torch.uint8)
    if plan.kind == "blocktopk":
        return pack_bits(indices % plan.block, plan.block.bit_length() - 1)
    coded = elias_fano_encode(indices, num)
    if plan.kind == "topk":
        return coded
    count = torch.tensor([indices.numel()], dtype=torch.int64, device=indices.device).view(torch.uint8)
    return torch.cat((count, coded))


def _indices_decode(plan: SparsePlan, data: Tensor, count: int, num: int, seed: int) -> Tensor:
    if plan.kind == "randk":
        return positions(plan, num, seed, data.device)
    if plan.kind == "blocktopk":
        local = unpack_bits(data, plan.block.bit_length() - 1, count).to(torch.int64)
        if not (local.view(-1, plan.k).diff(dim=1) > 0).all():
            raise out_of_order(plan.kind, num)
        return local + plan.block * (torch.arange(count, device=data.device) // plan.k)
    return elias_fano_decode(data[8:] if plan.kind == "threshold" else data, count, num)


# ---- values as bytes ---------------------------------------------------------------------------------------------


def _values_encode(plan: SparsePlan, values: Tensor, indices: Tensor, num: int) -> list[Tensor]:
    if plan.bits == 32:
        return [values.masked_fill(values.isnan(), torch.nan).view(torch.uint8)]  # one NaN: 0x7FC00000
    if plan.bits == 16:
        return [bf16_bytes(values)]
    levels = 1 << (plan.bits - 1)
    magnitude, group = values.abs(), _group(indices, num)
    largest = absmax(_spread(magnitude, indices, num))
    unit = torch.where((largest >= LARGE) & largest.isfinite(), SHRINK, 1.0)
    magnitude = magnitude * unit[group]
    step = _first_step(plan, magnitude, indices, num)
    cell = (magnitude * safe_inverse(step)[group]).floor_()
    cell = cell.clamp_(0, levels - 1).nan_to_num_(0.0)
    level = cell + 0.5
    scale = _group_sum(magnitude * level, indices, num) * safe_inverse(_group_sum(level * level, indices, num))
    codes = cell.to(torch.uint8) | ((values < 0).to(torch.uint8) << (plan.bits - 1))
    # The scale is bounded before it grows by the unit's inverse: its largest level is then finite.
    scale = torch.where(scale.isfinite(), torch.minimum(scale, plan.largest_scale * unit), scale)
    return [pack_bits(codes, plan.bits), bf16_bytes(rounded_scale(scale) / unit)]


def _values_decode(plan: SparsePlan, data: Tensor, indices: Tensor, num: int) -> Tensor:
    count, levels = indices.numel(), 1 << (plan.bits - 1)
    if plan.bits == 32:
        return data.clone().view(torch.float32)
    if plan.bits == 16:
        return bf16_from_bytes(data)
    at = packed_nbytes(count, plan.bits)
    codes = unpack_bits(data[:at], plan.bits, count)
    scale = bf16_from_bytes(data[at:])[_group(indices, num)]
    level = (codes & (levels - 1)).to(torch.float32) + 0.5
    return torch.where(codes >= levels, -level, level) * scale


def _group(indices: Tensor, num: int) -> Tensor:
    """Return the group of each position; padding after the last element belongs to the last group."""
    return (indices // SCALE_GROUP).clamp(max=(num - 1) // SCALE_GROUP)


def _first_step(plan: SparsePlan, magnitude: Tensor, indices: Tensor, num: int) -> Tensor:
    """Return the step that chooses codes, by group (at 1 bit there is nothing to choose)."""
    if plan.bits > 2:
        return absmax(_spread(magnitude, indices, num)) / (1 << (plan.bits - 1))
    count = _group_sum(torch.ones_like(magnitude), indices, num)
    return _group_sum(magnitude, indices, num) / count.clamp(min=1.0) * FIRST_STEP


def _spread(values: Tensor, indices: Tensor, num: int) -> Tensor:
    """Return the kept values at their positions, (groups, 4096), zeros elsewhere."""
    size = max(num, int(indices[-1]) + 1) if indices.numel() else num
    dense = torch.zeros(size, device=values.device)
    dense[indices] = values
    return to_groups(dense[:num], SCALE_GROUP)


def _group_sum(values: Tensor, indices: Tensor, num: int) -> Tensor:
    return tree_sum(_spread(values, indices, num))

"""What every implementation does where it has no single pass for it, built of its own encode and decode."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fedq.kernels.plan import Plan


def reduce(
    encode: Callable[..., Tensor],
    decode: Callable[..., None],
    plan_in: Plan,
    datas: Sequence[Tensor],
    weights: Sequence[float],
    seeds: Sequence[int],
    plan_out: Plan,
    num: int,
    *,
    seed: int,
    out: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Encode ``sum(weight · decoded) + residual``; the sum starts from zero and runs in the order given.

    Args:
        encode: The implementation's own `fedq.kernels.encode`.
        decode: The implementation's own `fedq.kernels.decode`; the rest as for `fedq.kernels.reduce`.
    """
    total = torch.zeros(num, device=datas[0].device)
    for data, weight, data_seed in zip(datas, weights, seeds, strict=True):
        decode(plan_in, data, num, seed=data_seed, out=total, weight=weight)
    return encode(plan_out, total, seed=seed, out=out, residual=residual)

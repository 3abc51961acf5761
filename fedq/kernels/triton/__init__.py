"""The kernels in Triton: the reference's functions with the same bytes, for tensors on a CUDA device.

`blocks` (casts and block codecs, `reduce`) and `sparse` launch the kernels, `primitives` holds what both are built of.
They import Triton, so this module imports them on the first call. Under ``TRITON_INTERPRET=1`` the same kernels run
on the CPU, slowly: that is how they are tested where there is no GPU.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from fedq.kernels import unfused
from fedq.kernels.plan import Plan, SparsePlan

__all__ = ["decode", "encode", "reduce", "supports", "why_missing"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@cache
def why_missing() -> str:
    """Return in words why the kernels cannot run here, empty if they can."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        if not torch.cuda.is_available():
            return "there is no CUDA device"
        if torch.cuda.get_device_capability() < (8, 0):
            return f"they need a GPU of compute capability 8.0, this one has {torch.cuda.get_device_capability()}"
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return str(error)
    return ""


def supports(plan: Plan, num: int, dtype: torch.dtype) -> bool:
    """Return whether the kernels can run here and serve this plan for ``num`` elements of ``dtype``."""
    return not why_missing() and num > 0 and dtype in _DTYPES and _module(plan).supports(plan)


def encode(plan: Plan, x: Tensor, *, seed: int, out: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """Encode ``x + residual``; see `fedq.kernels.encode`."""
    with torch.cuda.device_of(x):
        data: Tensor = _module(plan).encode(plan, x, seed=seed, out=out, residual=residual)
    return data


def decode(plan: Plan, data: Tensor, num: int, *, seed: int, out: Tensor, weight: float | None = None) -> None:
    """Decode into ``out``, or add ``weight`` times it; see `fedq.kernels.decode`."""
    with torch.cuda.device_of(out):
        _module(plan).decode(plan, data, num, seed=seed, out=out, weight=weight)


def reduce(
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
    """Encode ``sum(weight · decoded) + residual``; see `fedq.kernels.reduce`.

    One kernel if both plans are casts or block plans and fit one tile; otherwise decode-add in a loop, then encode.
    """
    from fedq.kernels.triton import blocks

    with torch.cuda.device_of(datas[0]):
        if (
            not isinstance(plan_in, SparsePlan)
            and not isinstance(plan_out, SparsePlan)
            and blocks.fits(plan_in, plan_out)
        ):
            return blocks.reduce(plan_in, datas, weights, seeds, plan_out, num, seed=seed, out=out, residual=residual)
        return unfused.reduce(
            encode, decode, plan_in, datas, weights, seeds, plan_out, num, seed=seed, out=out, residual=residual
        )


def _module(plan: Plan) -> ModuleType:
    """Return the module that serves plans of this kind."""
    return importlib.import_module(f"{__name__}.{'sparse' if isinstance(plan, SparsePlan) else 'blocks'}")

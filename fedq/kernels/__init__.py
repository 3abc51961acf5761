"""Numeric passes that the codecs stand on: one set of names, served by device.

A plan (`CastPlan`, `BlockPlan`, `SparsePlan`) says what to compute; `encode`, `decode` and `reduce` compute it. There
are three implementations: `reference` in plain torch, the oracle, for every plan and device; `cpu` in C++ and `triton`
on the GPU, with the same bytes and the same floats, for the plans that they `supports`. Which one serves is decided
here and nowhere else: by the tensor's device, by what is available, or by ``FEDQ_KERNELS=reference|cpp|triton``.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from functools import cache
from types import ModuleType

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedq.errors import FieldError, one_of
from fedq.kernels import reference
from fedq.kernels.plan import BlockPlan, CastPlan, Plan, SparsePlan
from fedq.kernels.reference import (
    absmax,
    bf16_bytes,
    bf16_from_bytes,
    derive_seed,
    elias_fano_decode,
    elias_fano_encode,
    elias_fano_nbytes,
    from_groups,
    hash32,
    hash_int,
    join_bytes,
    message_seed,
    mix32,
    pack_bits,
    pack_trits,
    packed_nbytes,
    rotate,
    signs,
    span_seed,
    to_groups,
    tree_sum,
    uniform,
    unpack_bits,
    unpack_trits,
    unrotate,
)

__all__ = [
    "BlockPlan",
    "CastPlan",
    "Plan",
    "SparsePlan",
    "absmax",
    "bf16_bytes",
    "bf16_from_bytes",
    "check",
    "crc32c",
    "decode",
    "derive_seed",
    "elias_fano_decode",
    "elias_fano_encode",
    "elias_fano_nbytes",
    "encode",
    "from_groups",
    "hash32",
    "hash_int",
    "implementation",
    "join_bytes",
    "message_seed",
    "mix32",
    "pack_bits",
    "pack_trits",
    "packed_nbytes",
    "reduce",
    "rotate",
    "signs",
    "span_seed",
    "to_groups",
    "tree_sum",
    "uniform",
    "unpack_bits",
    "unpack_trits",
    "unrotate",
]

_MODULES = {"reference": "fedq.kernels.reference", "cpp": "fedq.kernels.cpu", "triton": "fedq.kernels.triton"}
_BY_DEVICE = {"cpu": "cpp", "cuda": "triton"}


# ---- which implementation ----------------------------------------------------------------------------------------


def implementation(device: torch.device | str) -> str:
    """Return which implementation serves tensors on a device: ``reference``, ``cpp`` or ``triton``.

    Raises:
        FieldError: ``FEDQ_KERNELS`` names an unknown implementation, or one that is not available or not for this
            device.
    """
    kind = torch.device(device).type
    wanted = os.environ.get("FEDQ_KERNELS", "")
    if not wanted:
        name = _BY_DEVICE.get(kind, "reference")
        return "reference" if _why_missing(name) else name
    if wanted not in _MODULES:
        raise FieldError("FEDQ_KERNELS", wanted, one_of(_MODULES, wanted))
    missing = _why_missing(wanted)
    if not missing and wanted not in ("reference", _BY_DEVICE.get(kind)):
        missing = f"its tensors are not on {kind!r}"
    if missing:
        raise FieldError("FEDQ_KERNELS", wanted, f"reference, or one that is available here ({missing})")
    return wanted


@cache
def _module(name: str) -> ModuleType:
    return importlib.import_module(_MODULES[name])


def _why_missing(name: str) -> str:
    """Return in words why an implementation cannot serve, empty if it can."""
    if name == "reference":
        return ""
    try:
        module = _module(name)
    except ImportError as error:
        return str(error)
    reason: str = module.why_missing()
    return reason


def _serving(device: torch.device, *plans: Plan, num: int, dtype: torch.dtype = torch.float32) -> ModuleType:
    """Return the module that serves all these plans."""
    name = implementation(device)
    if name == "reference":
        return reference
    module = _module(name)
    return module if all(module.supports(plan, num, dtype) for plan in plans) else reference


def _check(name: str, x: Tensor, dtype: torch.dtype, device: torch.device, num: int | None = None) -> None:
    """Raise `FieldError` unless a tensor is flat, contiguous and as asked: fast kernels see bare addresses."""
    good = x.dtype == dtype and x.device == device and x.dim() == 1 and (num is None or x.numel() == num)
    if not good or not (dtype == torch.uint8 or x.is_contiguous()):
        size = "" if num is None else f" of {num} elements"
        found = f"{x.dtype} {tuple(x.shape)}, strides {x.stride()}, {x.device}"
        raise FieldError(name, found, f"flat contiguous {dtype}{size} on {device}")


# ---- the interface -----------------------------------------------------------------------------------------------


def encode(plan: Plan, x: Tensor, *, seed: int, out: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """Encode a flat tensor.

    Args:
        plan: The plan, which says how to encode.
        x: The tensor: flat, contiguous, at least one element, float32, bfloat16 or float16.
        seed: Seed of 64 bits; the low 32 are shared by all clients of a round, the high 32 are the client's own.
        out: Buffer for the payload, uint8 of exactly its size; None: one is made.
        residual: Flat contiguous float32 like ``x``, added to it and replaced in place, value by value, by
            ``total - decoded``; where that is not finite the old value stays. None: no error feedback.

    Returns:
        The uint8 payload, in ``out`` if given. Its bytes do not depend on implementation, device or threads.

    Raises:
        FieldError: A tensor has another type, size or device than described.
    """
    _check("x", x, x.dtype, x.device)
    if residual is not None:
        _check("residual", residual, torch.float32, x.device, x.numel())
    if out is not None:
        _check("out", out, torch.uint8, x.device)
    return _serving(x.device, plan, num=x.numel(), dtype=x.dtype).encode(  # type: ignore[no-any-return]
        plan, x, seed=seed, out=out, residual=residual
    )


def decode(plan: Plan, data: Tensor, num: int, *, seed: int, out: Tensor, weight: float | None = None) -> None:
    """Decode a payload into a flat float32 buffer, or add it.

    Args:
        plan: The plan that encoded it.
        data: The payload.
        num: Number of elements.
        seed: The seed that encoded it.
        out: Buffer that is written, flat contiguous float32 of ``num`` elements.
        weight: Factor of the values that are added: ``out += weight · decoded``, product and sum rounded separately.
            None: ``out = decoded``.

    Raises:
        FieldError: A tensor has another type, size or device than described.
    """
    _check("data", data, torch.uint8, data.device)
    _check("out", out, torch.float32, data.device, num)
    _serving(data.device, plan, num=num).decode(plan, data, num, seed=seed, out=out, weight=weight)


def check(plan: Plan, data: Tensor, num: int) -> None:
    """Check what `decode` checks, without decoding; only the positions in a sparse payload can be wrong.

    Args:
        plan: The plan that encoded it.
        data: The payload, of the size that the plan calls for.
        num: Number of elements.

    Raises:
        FieldError: The payload does not decode.
    """
    _check("data", data, torch.uint8, data.device)
    module = reference if data.is_cuda else _serving(data.device, plan, num=num)
    module.check(plan, data, num)


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
    """Encode the weighted sum of payloads of one tensor: what the owner of a shard does.

    Args:
        plan_in: The plan of the payloads.
        datas: The payloads, at least one.
        weights: Weight of each payload.
        seeds: The seed of each payload.
        plan_out: The plan of the result.
        num: Number of elements of the tensor.
        seed: The seed of the result.
        out: Buffer for the result, as for `encode`.
        residual: Residual as for `encode`, of ``sum(weight · decoded)``, summed in float32 from 0 in the order given.

    Returns:
        The uint8 payload, the same as of `decode` with weights in a loop and `encode`.

    Raises:
        FieldError: A tensor has another type, size or device than described, or there is no payload.
    """
    if not datas or not len(datas) == len(weights) == len(seeds):
        raise FieldError("payloads", (len(datas), len(weights), len(seeds)), "as many weights and seeds, at least one")
    for data in datas:
        _check("data", data, torch.uint8, datas[0].device)
    if residual is not None:
        _check("residual", residual, torch.float32, datas[0].device, num)
    if out is not None:
        _check("out", out, torch.uint8, datas[0].device)
    module = _serving(datas[0].device, plan_in, plan_out, num=num)
    return module.reduce(  # type: ignore[no-any-return]
        plan_in, datas, weights, seeds, plan_out, num, seed=seed, out=out, residual=residual
    )


def crc32c(data: npt.NDArray[np.uint8], value: int = 0) -> int:
    """Return the CRC32C (Castagnoli) of flat contiguous bytes after bytes whose checksum is ``value``."""
    return _module(implementation("cpu")).crc32c(data, value)  # type: ignore[no-any-return]

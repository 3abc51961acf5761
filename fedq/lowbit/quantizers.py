"""Few-bit weights: what values a float weight becomes, as codes and scales, and how the result is written.

A quantizer is stateless; its fields are its options, and its spec string names it. Training with one is the business
of `fedq.lowbit.layers`, files are that of `fedq.lowbit.packed`.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedq.errors import FieldError, one_of
from fedq.kernels.reference import safe_inverse
from fedq.kernels.reference.blocks import GAUSSIAN_STEP, MEAN_TO_SIGMA
from fedq.specs import split_spec

MAX_BITS = 16


@dataclass(frozen=True)
class Quantizer(ABC):
    """A map from float weights to few-bit ones: ``Q(w) = values(codes(w), scales(w))``.

    Args:
        per: Weights that share a set of scales: the whole ``tensor``, or each output ``channel`` (the first dimension).
    """

    per: str = "tensor"

    num_scales: ClassVar[int] = 1
    """Number of scales of a group."""

    def __post_init__(self) -> None:
        _check(self, "per", ("tensor", "channel"))

    @property
    @abstractmethod
    def num_levels(self) -> int:
        """Different values that a weight can have: codes are 0 to ``num_levels - 1``."""

    @property
    @abstractmethod
    def name(self) -> str:
        """First word of the spec."""

    @property
    def bits_per_weight(self) -> float:
        """Bits of a packed code, without scales."""
        return 1.6 if self.num_levels == 3 else float((self.num_levels - 1).bit_length())

    @abstractmethod
    def scales(self, rows: Tensor) -> Tensor:
        """Return what the levels are multiples of.

        Args:
            rows: Weights of each group, float32 [groups, elements].

        Returns:
            The scales, float32 [groups, num_scales].
        """

    @abstractmethod
    def codes(self, rows: Tensor, scales: Tensor, *, stochastic: bool) -> Tensor:
        """Return codes as float32, of the shape of ``rows``."""

    @abstractmethod
    def values(self, codes: Tensor, scales: Tensor) -> Tensor:
        """Return the weights that codes stand for, float32 [groups, elements]."""

    @property
    def is_stochastic(self) -> bool:
        """Whether training rounds at random; a deployed model never does."""
        return False

    @property
    def learns_scale(self) -> bool:
        """Whether the scale is a parameter of the model."""
        return False

    @property
    def spec(self) -> str:
        """Name and all options that are not the default, as `quantizer` reads them."""
        options = [f"{f.name}={getattr(self, f.name)}" for f in fields(self) if f.init and f.name != "bits"]
        defaults = [f"{f.name}={f.default}" for f in fields(self)]
        return ":".join(filter(None, (self.name, ",".join(o for o in options if o not in defaults))))

    def rows(self, weight: Tensor) -> Tensor:
        """Return a weight as [groups, elements]."""
        return weight.reshape(len(weight) if self.per == "channel" else 1, -1)

    def quantize(self, weight: Tensor, *, stochastic: bool = False, scales: Tensor | None = None) -> Tensor:
        """Return ``Q(w)``, of the shape of the weight.

        Args:
            weight: Float weight of any shape with at least one element; non-finite values make non-finite weights.
            stochastic: Whether to round at random (unbiased within the grid), with torch's generator.
            scales: Learned scales, float32 [groups, num_scales]; None: those that follow from the weight.
        """
        rows = self.rows(weight)
        scales = self.scales(rows) if scales is None else scales
        return self.values(self.codes(rows, scales, stochastic=stochastic), scales).view(weight.shape)


@dataclass(frozen=True)
class Binary(Quantizer):
    """Two values, ``sign(w)·mean|w|`` (BWN, Rastegari et al. 2016, arXiv 1603.05279, eq. 6): 1 bit.

    Args:
        scale: ``mean`` magnitude, the least-squares scale, or ``learned``: a parameter that starts there, whose
            gradient ``sum g·sign(w)`` is divided by the root of the number of weights (LSQ, Esser et al. 2020).
    """

    scale: str = "mean"

    num_levels: ClassVar[int] = 2  # type: ignore[misc]
    name: ClassVar[str] = "binary"  # type: ignore[misc]

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self, "scale", ("mean", "learned"))

    @property
    def learns_scale(self) -> bool:
        """Whether the scale is a parameter of the model."""
        return self.scale == "learned"

    def scales(self, rows: Tensor) -> Tensor:
        """Return mean magnitudes."""
        return _mean_magnitude(rows)

    def codes(self, rows: Tensor, scales: Tensor, *, stochastic: bool) -> Tensor:
        """Return 1 where a weight is not negative."""
        return (rows >= 0).to(rows.dtype)

    def values(self, codes: Tensor, scales: Tensor) -> Tensor:
        """Return plus or minus the scale."""
        return (2.0 * codes - 1.0) * scales


@dataclass(frozen=True)
class Ternary(Quantizer):
    """Three values ``{-a, 0, a}``: weights above 0.7 of the mean magnitude are kept, ``a`` is their mean magnitude.

    Ternary Weight Networks (Li et al. 2016, arXiv 1605.04711, eq. 6); five codes to a byte: 1.6 bits.
    """

    num_levels: ClassVar[int] = 3  # type: ignore[misc]
    name: ClassVar[str] = "ternary"  # type: ignore[misc]

    def scales(self, rows: Tensor) -> Tensor:
        """Return the mean magnitude of kept weights."""
        kept = _is_kept(rows)
        total = (rows.abs() * kept).sum(dim=1, keepdim=True, dtype=torch.float64)
        return (total / kept.sum(dim=1, keepdim=True).clamp(min=1)).to(rows.dtype)

    def codes(self, rows: Tensor, scales: Tensor, *, stochastic: bool) -> Tensor:
        """Return 0, 1 or 2 for a negative weight, a small one, a positive one."""
        return 1.0 + rows.sign() * _is_kept(rows)

    def values(self, codes: Tensor, scales: Tensor) -> Tensor:
        """Return the signs times the scale."""
        return (codes - 1.0) * scales


@dataclass(frozen=True)
class Uniform(Quantizer):
    """Evenly spaced values: 2 to 16 bits.

    Args:
        bits: Bits of a code.
        grid: ``minmax``: ``2^bits`` levels from the smallest to the largest weight, so scales are the step and the
            smallest. ``symmetric``: ``2^bits - 1`` levels ``q·s`` around an exact zero, up to the largest magnitude.
            ``dorefa``: ``2^bits`` levels, as many above zero as below, up to the largest magnitude (DoReFa-Net, Zhou
            et al. 2016, arXiv 1606.06160, eq. 9 without the tanh). ``gaussian``: likewise, with the step of the best
            grid for a Gaussian (Max 1960, up to 8 bits): outliers are clipped, the others keep more levels. ``auto``:
            gaussian up to 4 bits, minmax above.
        rounding: ``nearest``, or ``stochastic`` in training (always nearest in a deployed model).
    """

    bits: int = 8
    grid: str = "auto"
    rounding: str = "nearest"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 2 <= self.bits <= MAX_BITS:
            raise FieldError("bits", self.bits, f"1 to {MAX_BITS} (1 is binary), or 32 for float")
        _check(self, "grid", ("auto", "minmax", "symmetric", "dorefa", "gaussian"))
        if self.grid == "gaussian" and self.bits not in GAUSSIAN_STEP:
            raise FieldError(
                f"{self.name}:grid", self.grid, f"minmax, symmetric, dorefa above {max(GAUSSIAN_STEP)} bits"
            )
        _check(self, "rounding", ("nearest", "stochastic"))

    @property
    def name(self) -> str:
        """First word of the spec."""
        return f"int{self.bits}"

    @property
    def spacing(self) -> str:
        """The grid, chosen if it is ``auto``."""
        return {True: "gaussian", False: "minmax"}[self.bits <= 4] if self.grid == "auto" else self.grid

    @property
    def num_levels(self) -> int:
        """Different values that a weight can have."""
        return 2**self.bits - (self.spacing == "symmetric")

    @property
    def bits_per_weight(self) -> float:
        """Bits of a packed code."""
        return float(self.bits)

    @property
    def is_stochastic(self) -> bool:
        """Whether training rounds at random."""
        return self.rounding == "stochastic"

    @property
    def num_scales(self) -> int:  # type: ignore[override]
        """Scales of a group: the step and, of ``minmax``, the smallest value."""
        return 2 if self.spacing == "minmax" else 1

    def scales(self, rows: Tensor) -> Tensor:
        """Return the step, and for ``minmax`` the smallest weight."""
        num_steps = self.num_levels - 1
        if self.spacing == "minmax":
            low, high = torch.aminmax(rows, dim=1, keepdim=True)
            # Halves first: the range of the largest floats would be infinite.
            return torch.cat(((high / num_steps - low / num_steps), low), dim=1)
        if self.spacing == "gaussian":
            return _mean_magnitude(rows) * (GAUSSIAN_STEP[self.bits] * MEAN_TO_SIGMA)
        return torch.linalg.vector_norm(rows, torch.inf, dim=1, keepdim=True) * (2.0 / num_steps)

    def codes(self, rows: Tensor, scales: Tensor, *, stochastic: bool) -> Tensor:
        """Return the numbers of the levels."""
        step = scales[:, :1]
        inverse = safe_inverse(step)  # all weights alike: code 0 or the middle one
        if self.spacing == "minmax":
            places = (rows - scales[:, 1:]) * inverse
        else:
            places = rows * inverse + (self.num_levels - 1) / 2
        if stochastic:
            # Not floor(place + noise): at 16 bits that sum has 8 bits after the point, and its rounding is a bias.
            low = places.floor()
            places = low + (torch.rand_like(places) < places - low)
        else:
            places = places.round_()
        return places.clamp(0, self.num_levels - 1)  # not in place, for which vmap has no rule

    def values(self, codes: Tensor, scales: Tensor) -> Tensor:
        """Return the levels."""
        step = scales[:, :1]
        if self.spacing == "minmax":
            return codes * step + scales[:, 1:]
        return (codes - (self.num_levels - 1) / 2) * step


def quantizer(spec: str | int | Quantizer) -> Quantizer:
    """Return the quantizer that a spec names: ``binary:per=channel``, ``ternary``, ``int4:grid=dorefa``, or bits.

    Args:
        spec: ``binary``, ``ternary``, ``int2`` to ``int16``, each with options; or bits alone: ``1`` is binary, ``2``
            to ``16`` are ``int2`` to ``int16``.

    Raises:
        FieldError: The name or an option is unknown, bits are outside 1 to 16, or a value is not allowed.
    """
    if isinstance(spec, Quantizer):
        return spec
    name, texts = split_spec(str(spec))
    options: dict[str, Any] = dict(texts)
    if re.fullmatch(r"(int)?-?\d+", name):
        bits = int(name.removeprefix("int"))
        cls: type[Binary | Ternary | Uniform] = Binary if bits == 1 else Uniform
        options |= {} if bits == 1 else {"bits": bits}
    elif name in ("binary", "ternary"):
        cls = Binary if name == "binary" else Ternary
    else:
        raise FieldError("weights", str(spec), one_of(["binary", "ternary", "int2 to int16", "float"], name))
    known = [f.name for f in fields(cls) if f.name != "bits"]
    for option in texts:
        if option not in known:
            raise FieldError(f"{name}:option", option, one_of(known, option))
    return cls(**options)


def _mean_magnitude(rows: Tensor) -> Tensor:
    # In float64, so that memory order and threads do not show in the result.
    total = torch.linalg.vector_norm(rows, 1, dim=1, keepdim=True, dtype=torch.float64)
    return (total / rows.shape[1]).to(rows.dtype)


def _is_kept(rows: Tensor) -> Tensor:
    """Return which weights do not become zero in a ternary layer."""
    return rows.abs() > 0.7 * _mean_magnitude(rows)


def _check(chosen: Quantizer, option: str, allowed: tuple[str, ...]) -> None:
    value = getattr(chosen, option)
    if value not in allowed:
        raise FieldError(f"{chosen.name}:{option}", value, ", ".join(allowed))

"""What a codec is: `Codec`, `Payload`, and the registry that turns a spec string into a codec.

A codec is a frozen dataclass whose fields are its options, so the codec is its own configuration. It has no state:
residuals live in `fedq.feedback`, and which tensor gets which codec is `fedq.layout`'s business.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from torch import Tensor

from fedq import kernels
from fedq.errors import FieldError, one_of
from fedq.kernels import CastPlan, Plan

Shape = Sequence[int]
CodecType = TypeVar("CodecType", bound="type[Codec]")


@dataclass(frozen=True)
class Payload:
    """One encoded tensor: a contiguous 1-D uint8 tensor and the little that is needed to decode it.

    Args:
        data: Bytes of the payload, which travel.
        codec: The codec that encoded it.
        shape: Shape of the original tensor.
        dtype: Data type of the original tensor.
        seed: Seed of rotation, of shared index choice and of rounding noise.
    """

    data: Tensor
    codec: Codec
    shape: tuple[int, ...]
    dtype: torch.dtype
    seed: int

    @property
    def nbytes(self) -> int:
        """Bytes that travel."""
        return self.data.numel()

    @property
    def bits_per_element(self) -> float:
        """Bits an element of the original tensor."""
        return 8 * self.nbytes / max(1, math.prod(self.shape))

    def decode(self) -> Tensor:
        """Return the decoded tensor, in the original shape and data type."""
        return self.codec.decode(self)

    def to_bytes(self) -> bytes:
        """Return a message that describes itself: `fedq.decode` gives the tensor back, in any process.

        It holds codec, shape, data type and checksums; ``docs/wire_format.md`` is its specification.

        Raises:
            FieldError: The message has no room for it: its data type has no number, or it has more than 255 dimensions.
        """
        return _PACKING[-1](self)


_PACKING: list[Callable[[Payload], bytes]] = []


def packs_payloads(pack: Callable[[Payload], bytes]) -> Callable[[Payload], bytes]:
    """Let a function be `Payload.to_bytes`: messages are made above codecs, by `fedq.wire`, which `fedq` imports."""
    _PACKING.append(pack)
    return pack


class Codec(ABC):
    """A stateless compressor of one tensor.

    A subclass is a frozen dataclass that writes `_encode`, `_decode` and `_sections`; everything else has a default.
    A codec that the kernels know is a `Planned`. See ``docs/adding_a_codec.md``.
    """

    fixed_size: ClassVar[bool] = True
    """Whether the payload's size follows from the shape alone."""

    @property
    def reducible(self) -> bool:
        """Whether payloads of one seed may be summed value by value on the way (no scales, the same indices)."""
        return False

    @property
    def unbiased(self) -> bool:
        """Whether the decoded tensor has the input as its mean over the noise."""
        return False

    @property
    def wants_feedback(self) -> bool:
        """Whether error feedback is worth its memory: true unless the codec is a mere cast or unbiased."""
        return not self.unbiased

    def resolved(self, *, feedback: bool) -> Codec:
        """Return this codec with its ``auto`` options chosen for use with or without error feedback."""
        return self

    # ---- what a codec writes -------------------------------------------------------------------------------------

    @abstractmethod
    def _encode(self, x: Tensor, shape: Shape, seed: int) -> list[Tensor]:
        """Return the payload's uint8 sections, in the order of `_sections`, for flat non-empty float32 ``x``."""

    @abstractmethod
    def _decode(self, data: Tensor, shape: Shape, seed: int) -> Tensor:
        """Return flat float32 values."""

    @abstractmethod
    def _sections(self, shape: Shape, data: Tensor | None = None) -> dict[str, int]:
        """Return bytes by part (``codes``, ``scales``, ``indices``); ``data`` is given if the size is not fixed."""

    # ---- what a codec offers -------------------------------------------------------------------------------------

    def encode(self, x: Tensor | np.ndarray, *, seed: int = 0, out: Tensor | None = None) -> Payload:
        """Encode a tensor.

        No finite value decodes to one that is not; NaN and infinity travel. What is beyond the range of float32, in
        which everything is computed, or of a 16-bit cast counts as the largest number there.

        Args:
            x: A tensor or a numpy array of any shape, floating point.
            seed: Seed of 64 bits; the low 32 are shared by all clients of a round, the high 32 are the client's own.
            out: Buffer for the payload, uint8 of exactly its size (fixed-size codecs); None: one is made.

        Returns:
            A payload whose bytes depend on values, shape, options and seed only.

        Raises:
            FieldError: ``x`` is no floating-point tensor or array, or ``out`` has another size.
        """
        x = as_tensor(x)
        shape, flat = tuple(x.shape), _flat(x)
        if out is not None and self.fixed_size:
            self._check_out(out, self.payload_nbytes(shape), shape)
        data = self._encode_flat(flat, shape, seed, out, None) if flat.numel() else _nothing(flat, out)
        return Payload(data, self, shape, x.dtype, seed)

    def decode(self, payload: Payload) -> Tensor:
        """Return the decoded tensor, in the original shape and data type; a finite value stays finite in that.

        Raises:
            FieldError: The payload is cut short or too long for its shape.
        """
        num = math.prod(payload.shape)
        out = torch.empty(num, device=payload.data.device)
        if num:
            self.check_nbytes(payload.data, payload.shape)
            self._decode_flat(payload, out, None)
        return _cast(out.view(payload.shape), payload.dtype)

    def encode_with_residual(
        self, x: Tensor | np.ndarray, residual: Tensor, *, seed: int = 0, out: Tensor | None = None
    ) -> Payload:
        """Encode ``x + residual`` and replace the residual in place by what the payload lost.

        Guarantees ``decoded + new residual = x + old residual`` to one float32 rounding. Where that is not finite the
        residual stays as it was, and the payload carries the NaN or infinity on, or, if ``x`` and residual are finite
        themselves, the largest number of the sum's sign.

        Args:
            x: A tensor or a numpy array of any shape, floating point.
            residual: The residual, float32, of the same shape.
            seed: Seed, as for `encode`.
            out: Buffer for the payload, as for `encode`.
        """
        x = as_tensor(x)
        shape, flat = tuple(x.shape), _flat(x)
        if residual.dtype != torch.float32 or residual.shape != x.shape:
            raise FieldError("residual", (residual.dtype, tuple(residual.shape)), f"torch.float32, {shape}")
        if out is not None and self.fixed_size:
            self._check_out(out, self.payload_nbytes(shape), shape)
        kept = residual.detach().reshape(-1).contiguous()
        data = self._encode_flat(flat, shape, seed, out, kept) if flat.numel() else _nothing(flat, out)
        if not residual.is_contiguous():
            residual.copy_(kept.view(shape))
        return Payload(data, self, shape, x.dtype, seed)

    def decode_add(self, payload: Payload, out: Tensor, weight: float = 1.0) -> None:
        """Add ``weight · decoded`` to ``out`` in place (product and sum rounded separately)."""
        plain = payload.dtype == out.dtype == torch.float32 and out.is_contiguous() and out.numel() > 0
        if not plain or out.shape != payload.shape:
            out.add_(self.decode(payload).to(out.dtype).mul_(weight))
            return
        self.check_nbytes(payload.data, payload.shape)
        self._decode_flat(payload, out.detach().view(-1), weight)

    def decode_sum(self, payloads: Sequence[Payload], weights: Sequence[float], out: Tensor) -> None:
        """Replace ``out`` by the sum of ``weight · decoded``, from zero and in the order given: `decode_add` of each.

        Args:
            payloads: Payloads of this codec, all of one shape.
            weights: Weight of each payload.
            out: Buffer that is written, contiguous float32 of that shape.
        """
        out.zero_()
        for payload, weight in zip(payloads, weights, strict=True):
            self.decode_add(payload, out, weight)

    # ---- the same, flat; what `Planned` gives to the kernels ------------------------------------------------------

    def _encode_flat(self, x: Tensor, shape: Shape, seed: int, out: Tensor | None, residual: Tensor | None) -> Tensor:
        """Encode flat, contiguous, non-empty ``x`` (float32, bfloat16, float16) with a flat residual or none."""
        values = total = x.to(torch.float32)
        if residual is not None:
            values, total = kernels.reference.add_finite(values, residual), values + residual
        sections = self._encode(values, shape, seed)
        if out is not None:
            self._check_out(out, sum(section.numel() for section in sections), shape)
        data = kernels.join_bytes(sections, out)
        if residual is not None:
            new = total - self._decode(data, shape, seed)
            residual.copy_(torch.where(new.isfinite(), new, residual))
        return data

    def _decode_flat(self, payload: Payload, out: Tensor, weight: float | None) -> None:
        """Decode into flat float32 ``out``, or add ``weight`` times it."""
        decoded = self._decode(payload.data, payload.shape, payload.seed)
        if weight is None:
            out.copy_(decoded)
        else:
            out.add_(decoded.mul_(weight))

    def _check_out(self, out: Tensor, nbytes: int, shape: Shape) -> None:
        if out.numel() != nbytes:
            raise FieldError("out bytes", out.numel(), f"{nbytes} for {self.spec} and shape {tuple(shape)}")

    def codes(self, payload: Payload) -> Tensor | None:
        """Return the unpacked integer codes, for statistics, or None if the codec has none."""
        return None

    def payload_nbytes(self, shape: int | Shape) -> int:
        """Return the exact payload size before encoding.

        Args:
            shape: The tensor's shape, or its number of elements.

        Raises:
            FieldError: The size depends on the values (``fixed_size`` is false).
        """
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        if not self.fixed_size:
            raise FieldError("codec", self.spec, "a codec whose payload size follows from the shape alone")
        return sum(self._sections(shape).values()) if math.prod(shape) else 0

    def section_nbytes(self, shape: Shape, data: Tensor | None = None) -> dict[str, int]:
        """Return the payload's bytes by part; ``data`` is needed for codecs without a fixed size."""
        return self._sections(shape, data) if math.prod(shape) else {"codes": 0}

    def check_nbytes(self, data: Tensor, shape: Shape) -> None:
        """Raise `FieldError` unless ``data`` has exactly the size that ``shape`` calls for."""
        expected = sum(self._sections(shape, data).values())
        if data.numel() != expected:
            raise FieldError(f"{self.spec}:payload bytes", data.numel(), f"{expected} for shape {tuple(shape)}")

    def check(self, data: Tensor, shape: Shape) -> None:
        """Raise `FieldError` unless ``data`` is a payload that decodes to ``shape``, without decoding it."""
        if math.prod(shape):
            self.check_nbytes(data, shape)
        elif data.numel():
            raise FieldError(f"{self.spec}:payload bytes", data.numel(), f"none for shape {tuple(shape)}")

    @cached_property
    def spec(self) -> str:
        """The codec as a spec string: its name and the options that differ from their defaults."""
        options = [
            f"{f.name}={_option_text(getattr(self, f.name))}"
            for f in fields(self)  # type: ignore[arg-type]
            if f.name not in _fixed_options(self) and getattr(self, f.name) != f.default
        ]
        return spec_name(self) + (":" + ",".join(options) if options else "")

    def __str__(self) -> str:
        return self.spec


class Planned(Codec):
    """A codec whose work is a plan of `fedq.kernels`: one pass for residual and code, none for anything in between."""

    @abstractmethod
    def _plan(self, shape: Shape) -> Plan:
        """Return the plan for a non-empty shape."""

    def _encode(self, x: Tensor, shape: Shape, seed: int) -> list[Tensor]:
        return [kernels.encode(self._plan(shape), x, seed=seed)]

    def _decode(self, data: Tensor, shape: Shape, seed: int) -> Tensor:
        out = torch.empty(math.prod(shape), device=data.device)
        kernels.decode(self._plan(shape), data, out.numel(), seed=seed, out=out)
        return out

    def _encode_flat(self, x: Tensor, shape: Shape, seed: int, out: Tensor | None, residual: Tensor | None) -> Tensor:
        data = kernels.encode(self._plan(shape), x, seed=seed, out=out if self.fixed_size else None, residual=residual)
        if self.fixed_size or out is None:
            return data
        self._check_out(out, data.numel(), shape)
        return out.copy_(data)

    def decode_sum(self, payloads: Sequence[Payload], weights: Sequence[float], out: Tensor) -> None:
        """Replace ``out`` by the weighted sum: chunk by chunk in cache, so memory sees ``out`` once."""
        if not payloads or not out.numel():
            out.zero_()
            return
        for payload in payloads:
            self.check_nbytes(payload.data, payload.shape)
        datas, seeds = [p.data for p in payloads], [p.seed for p in payloads]
        plan, flat = self._plan(payloads[0].shape), out.detach().view(-1)
        into = flat.view(torch.uint8)
        kernels.reduce(plan, datas, weights, seeds, CastPlan("fp32"), flat.numel(), seed=0, out=into)

    def _decode_flat(self, payload: Payload, out: Tensor, weight: float | None) -> None:
        plan = self._plan(payload.shape)
        kernels.decode(plan, payload.data, out.numel(), seed=payload.seed, out=out, weight=weight)


def as_tensor(x: Tensor | np.ndarray) -> Tensor:
    """Return a tensor as it is, and a numpy array as one, without a copy where that can be.

    Raises:
        FieldError: ``x`` is neither, or an array of a type that torch does not have.
    """
    if isinstance(x, Tensor):
        return x
    if not isinstance(x, np.ndarray):
        raise FieldError("x", type(x).__name__, "a floating-point torch.Tensor or numpy.ndarray")
    try:
        return torch.from_numpy(np.require(x, x.dtype.newbyteorder("="), ("C", "W")))
    except TypeError:
        raise FieldError("x.dtype", x.dtype, "a floating-point type that torch has too") from None


def _flat(x: Tensor) -> Tensor:
    """Return ``x`` flat in row-major order and contiguous, in a type that the kernels read."""
    if not x.is_floating_point():
        raise FieldError("x.dtype", x.dtype, "a floating-point tensor")
    flat = x.detach().reshape(-1).contiguous()
    return flat if flat.dtype in (torch.float32, torch.bfloat16, torch.float16) else _cast(flat, torch.float32)


def _cast(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the values in another type, in which finite ones stay finite."""
    if values.dtype == dtype or torch.finfo(values.dtype).max <= torch.finfo(dtype).max:
        return values.to(dtype)
    return kernels.reference.saturated(values, torch.finfo(dtype).max).to(dtype)


def _nothing(flat: Tensor, out: Tensor | None) -> Tensor:
    return flat.new_empty(0, dtype=torch.uint8) if out is None else out


# ---- the registry ------------------------------------------------------------------------------------------------

_REGISTRY: dict[str, tuple[type[Codec], dict[str, Any]]] = {}


def register(name: str, **fixed: Any) -> Callable[[CodecType], CodecType]:
    """Register a codec class under a spec name, with the options that the name itself settles."""

    def add(cls: CodecType) -> CodecType:
        _REGISTRY[name] = (cls, fixed)
        return cls

    return add


def codec_names() -> tuple[str, ...]:
    """Return the registered spec names."""
    return tuple(sorted(_REGISTRY))


def make(name: str, options: Mapping[str, str]) -> Codec:
    """Build a codec from its spec name and the text of its options.

    Raises:
        FieldError: The name or an option is unknown, or a value is not allowed.
    """
    if name not in _REGISTRY:
        raise FieldError("codec", name, one_of(_REGISTRY, name))
    cls, fixed = _REGISTRY[name]
    free = {f.name: f.default for f in fields(cls) if f.name not in fixed}  # type: ignore[arg-type]
    values: dict[str, Any] = dict(fixed)
    for option, text in options.items():
        if option not in free:
            raise FieldError(f"{name}:option", option, one_of(free, option) or "no options")
        values[option] = _parse(f"{name}:{option}", text, free[option])
    return cls(**values)


def spec_name(codec: Codec) -> str:
    """Return the registered name of a codec."""
    for name, (cls, fixed) in _REGISTRY.items():
        if type(codec) is cls and all(getattr(codec, k) == v for k, v in fixed.items()):
            return name
    return type(codec).__name__


def _fixed_options(codec: Codec) -> dict[str, Any]:
    name = spec_name(codec)
    return _REGISTRY[name][1] if name in _REGISTRY else {}


def _option_text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _parse(field: str, text: str, default: Any) -> Any:
    """Turn an option's text into the type of its default."""
    if isinstance(default, bool):
        if text.lower() not in ("true", "false"):
            raise FieldError(field, text, "true or false")
        return text.lower() == "true"
    if isinstance(default, int | float):
        kind = type(default)
        try:
            return kind(text)
        except ValueError:
            raise FieldError(field, text, "a whole number" if kind is int else "a number") from None
    return text

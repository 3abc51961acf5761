"""How a model's tensors lie in one flat buffer, and which codec each of them gets.

A `Layout` is shared by client and server: spans, residual keys, ledger rows and the check that both sides speak of
the same model all come from it. It holds no values.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from itertools import accumulate, groupby
from typing import Literal

import torch
from torch import Tensor, nn

from fedq import kernels
from fedq.codecs import Codec, Payload, codec, codec_schedule
from fedq.codecs.dense import Cast
from fedq.errors import FieldError

Role = Literal["coded", "exempt", "stats"]
_MARKS = {"change": "", "values": " values"}
_STATISTICS = ("running_mean", "running_var")


def exempt_codec(chosen: Codec) -> Codec:
    """Return what carries the parameters that a lossy codec must not touch: bfloat16, or the chosen cast itself."""
    return chosen if isinstance(chosen, Cast) else Cast("bf16")


def as_real(tensor: Tensor) -> Tensor:
    """Return a complex tensor's real and imaginary parts, in a last dimension of two, and any other tensor itself."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


@lru_cache(1 << 14)  # every round asks for the same ones
def uncompiled_name(name: str) -> str:
    """Return a tensor's name without what `torch.compile` puts into it: ``a.weight`` of ``_orig_mod.a.weight``."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


@lru_cache(1 << 14)
def plain_name(name: str) -> str:
    """Return a tensor's name without torch's parametrizations: ``conv1.weight``, and ``conv1.weight_scale``.

    The float values behind a parametrized weight have the weight's own name, so that residuals, ledger rows and files
    are called alike whether or not a model is trained with few bits, or compiled.

    Args:
        name: Name of the tensor as in ``named_parameters``, such as ``conv1.parametrizations.weight.original``.
    """
    name = re.sub(r"\bparametrizations\.(\w+)\.original$", r"\1", uncompiled_name(name))
    return re.sub(r"\bparametrizations\.(\w+)\.0\.(\w+)$", r"\1_\2", name)


def difference(after: Tensor, before: Tensor) -> Tensor:
    """Return ``after - before`` in float32, rounded once from tensors of any float type."""
    return (after.double() - before.double()).float()


def trained_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that travel by their plain names: those that are trained, and are not ``stays_here``."""
    return {
        plain_name(name): param
        for name, param in module.named_parameters()
        if param.requires_grad and not getattr(param, "stays_here", False)
    }


def frozen_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters with ``requires_grad=False`` by their plain names: all participants have the same ones."""
    return {plain_name(name): param for name, param in module.named_parameters() if not param.requires_grad}


def _statistics(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Return the float and complex buffers that belong to the module's `state_dict`."""
    local = {
        f"{path}.{name}" if path else name
        for path, part in module.named_modules()
        for name in part._non_persistent_buffers_set
    }
    named = ((name, buffer) for name, buffer in module.named_buffers() if name not in local)
    return [(uncompiled_name(n), b) for n, b in named if b.is_floating_point() or b.is_complex()]


@dataclass(frozen=True)
class Span:
    """One tensor's place in the flat buffer.

    Args:
        name: The tensor's name in the module, see `plain_name`.
        shape: The tensor's shape.
        offset: Index of the tensor's first element in the flat buffer.
        codec: The codec that encodes the tensor.
        role: ``coded`` (the chosen codec), ``exempt`` (1-D parameters, a cast) or ``stats`` (float buffers, such as
            BatchNorm's running statistics, a cast; never through a server optimizer).
        sent: The form in which clients send the tensor: its ``change``, or its ``values`` as they are, which leave no
            residual.
    """

    name: str
    shape: tuple[int, ...]
    offset: int
    codec: Codec
    role: Role
    sent: Literal["change", "values"] = "change"

    @cached_property
    def numel(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    @property
    def slice(self) -> slice:
        """Place in the flat buffer."""
        return slice(self.offset, self.offset + self.numel)

    @property
    def has_residual(self) -> bool:
        """Whether error feedback keeps what its codec loses: of parameters' changes, not of values or statistics."""
        return self.role != "stats" and self.sent == "change"


@dataclass(frozen=True)
class _Run:
    """Neighbours that are coded in one call: several of the same cast, or one span.

    Args:
        members: Indices of the spans in the layout.
        place: Slice of the flat buffer that holds the spans' elements.
        data: Slice of an encoded model that holds the spans' bytes; None where a codec's size depends on the values.
        sizes: Bytes of each span's payload; empty if the run is one span.
        codec: The codec that encodes the spans.
        shape: Shape of the tensor that the codec is given: flat if there are several spans.
        has_residual: Whether a residual keeps what the codec loses.
    """

    members: range
    place: slice
    data: slice | None
    sizes: tuple[int, ...]
    codec: Codec
    shape: tuple[int, ...]
    has_residual: bool


@dataclass(frozen=True)
class Layout:
    """Ordered spans: coded parameters first, then exempt ones, then statistics.

    The order depends on the model alone, so layouts of one model with different codecs share their offsets.

    Args:
        spans: The tensors, one after another.
        whole: The layout of which this one is a `part`; None: this is a whole layout.
    """

    spans: tuple[Span, ...]
    whole: Layout | None = None
    _by_name: dict[str, Span] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_by_name", {span.name: span for span in self.spans})

    @classmethod
    def of(cls, module: nn.Module, spec: str | Codec) -> Layout:
        """Lay out what travels of a module, its trained parameters and its float statistics, for a codec.

        Parameters with at most one dimension are exempt from lossy codecs and travel as bfloat16, as statistics do;
        under a cast (``fp32``, ``fp16``, ``bf16``) everything travels in that type. Complex tensors travel as real and
        imaginary parts, in a last dimension of two. Frozen parameters (``requires_grad=False``) never travel, nor do
        integer buffers, buffers outside of `state_dict`, and parameters with a true attribute ``stays_here``.

        Raises:
            FieldError: All parameters of the module are frozen.
        """
        chosen = codec(spec)
        plain = exempt_codec(chosen)
        params = list(trained_parameters(module).items())
        if not params and frozen_parameters(module):
            raise FieldError("model", "every parameter is frozen", "at least one with requires_grad=True")
        groups: list[tuple[list[tuple[str, Tensor]], Codec, Role]] = [
            ([(n, p) for n, p in params if p.dim() > 1], chosen, "coded"),
            ([(n, p) for n, p in params if p.dim() <= 1], plain, "exempt"),
            (_statistics(module), plain, "stats"),
        ]
        rows = [(n, as_real(t.detach()), c, role) for tensors, c, role in groups for n, t in tensors]
        return cls._stacked([(n, tuple(t.shape), c, role) for n, t, c, role in rows])

    @classmethod
    def of_shapes(cls, shapes: Mapping[str, Sequence[int]], spec: str | Codec) -> Layout:
        """Lay out a model of which only names and shapes are known, as `of` does with a module.

        Names that end in ``running_mean`` or ``running_var`` are statistics. The order within a role is that of
        ``shapes``.

        Args:
            shapes: The shape of every float32 tensor that is to travel, by name.
            spec: The codec.
        """
        chosen = codec(spec)
        plain = exempt_codec(chosen)
        rows: dict[Role, list[tuple[str, tuple[int, ...], Codec, Role]]] = {"coded": [], "exempt": [], "stats": []}
        for name, shape in shapes.items():
            role: Role = "stats" if name.endswith(_STATISTICS) else "coded" if len(shape) > 1 else "exempt"
            rows[role].append((name, tuple(shape), chosen if role == "coded" else plain, role))
        return cls._stacked([row for of_role in rows.values() for row in of_role])

    @classmethod
    def _stacked(cls, rows: Sequence[tuple[str, tuple[int, ...], Codec, Role]]) -> Layout:
        """Return the spans one after another."""
        offsets = accumulate((math.prod(shape) for _, shape, _, _ in rows), initial=0)
        spans = (Span(n, shape, at, c, role) for (n, shape, c, role), at in zip(rows, offsets, strict=False))
        return cls(tuple(spans))

    def part(self, numbers: Sequence[int]) -> Layout:
        """Return the layout of some of the spans, in a flat buffer of their own: with the same codes, seeds and hash.

        Args:
            numbers: Indices of the chosen spans, rising.
        """
        spans = [self.spans[number] for number in numbers]
        offsets = accumulate((span.numel for span in spans), initial=0)
        moved = tuple(replace(span, offset=offset) for span, offset in zip(spans, offsets, strict=False))
        return Layout(moved, whole=self)

    def __getitem__(self, name: str) -> Span:
        return self._by_name[name]

    def __hash__(self) -> int:
        return self.hash

    @cached_property
    def numbers(self) -> tuple[int, ...]:
        """Place of each span in the whole layout."""
        if self.whole is None:
            return tuple(range(len(self.spans)))
        places = {span.name: number for number, span in enumerate(self.whole.spans)}
        return tuple(places[span.name] for span in self.spans)

    @cached_property
    def numel(self) -> int:
        """Elements of the flat buffer."""
        return sum(span.numel for span in self.spans)

    @cached_property
    def num_params(self) -> int:
        """Elements that are parameters: the first part of the flat buffer."""
        return sum(span.numel for span in self.spans if span.role != "stats")

    @cached_property
    def hash(self) -> int:
        """64 bits that agree only if names, shapes, order and codecs agree; of a part, those of the whole."""
        if self.whole is not None:
            return self.whole.hash
        text = "\n".join(f"{s.name} {list(s.shape)} {s.codec.spec} {s.role}{_MARKS[s.sent]}" for s in self.spans)
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")

    @cached_property
    def payload_nbytes(self) -> tuple[int, ...] | None:
        """Bytes of each span's payload, or None if a codec's size depends on the values."""
        if not all(span.codec.fixed_size for span in self.spans):
            return None
        return tuple(span.codec.payload_nbytes(span.shape) for span in self.spans)

    @cached_property
    def fixed_nbytes(self) -> int | None:
        """Bytes of an encoded model, or None if a codec's size depends on the values."""
        return None if self.payload_nbytes is None else sum(self.payload_nbytes)

    # ---- tensors <-> flat buffer ---------------------------------------------------------------------------------

    def flatten(self, module: nn.Module) -> Tensor:
        """Copy a module's tensors into a new flat float32 buffer, in logical (row-major) order."""
        flat = torch.empty(self.numel, device=next(module.parameters()).device)
        views = [flat[s.slice].view(s.shape) for s in self.spans]
        torch._foreach_copy_(views, self.tensors(module))
        return flat

    def unflatten_(self, flat: Tensor, module: nn.Module) -> None:
        """Copy a flat buffer into a module's tensors, keeping their memory formats."""
        torch._foreach_copy_(self.tensors(module), [flat[s.slice].view(s.shape) for s in self.spans])

    def held(self, module: nn.Module) -> dict[str, Tensor]:
        """Return copies of the module's tensors of another type than float32, by name: none of a float32 module.

        After `unflatten_` these are not the flat buffer's values but those rounded to bfloat16, say, and training
        starts from there.
        """
        named = zip(self.spans, self.tensors(module), strict=True)
        return {span.name: tensor.clone() for span, tensor in named if tensor.dtype != torch.float32}

    def changes(self, module: nn.Module, held: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return what became of tensors that were `held` before, as float32 differences that were rounded once."""
        named = {span.name: tensor for span, tensor in zip(self.spans, self.tensors(module), strict=True)}
        return {name: difference(named[name], before) for name, before in held.items()}

    def named_tensors(self, module: nn.Module) -> dict[str, Tensor]:
        """Return the module's own tensors, detached, by name in span order."""
        named: dict[str, Tensor] = {plain_name(n): p for n, p in module.named_parameters()}
        named |= {uncompiled_name(n): b for n, b in module.named_buffers()}
        return {span.name: named[span.name].detach() for span in self.spans}

    def tensors(self, module: nn.Module) -> list[Tensor]:
        """Return the module's own tensors, detached and as real ones, in span order."""
        return [as_real(tensor) for tensor in self.named_tensors(module).values()]

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """Return the flat buffer's tensors by name, without a copy."""
        return {span.name: flat[span.slice].view(span.shape) for span in self.spans}

    def take(self, flat: Tensor) -> Tensor:
        """Return the values of this part from a flat buffer of the whole; of a whole layout, the buffer itself."""
        if self.whole is None:
            return flat
        spans = [self.whole[span.name] for span in self.spans]
        return torch.cat([flat[span.slice] for span in spans]) if spans else flat[:0]

    def with_values(self, codecs: Mapping[str, Codec]) -> Layout:
        """Return the layout in which the values of the tensors named travel, each in the codec given."""
        spans = [replace(s, codec=codecs[s.name], sent="values") if s.name in codecs else s for s in self.spans]
        return replace(self, spans=tuple(spans))

    def check_trained(self, module: nn.Module) -> None:
        """Check that the module trains the parameters that it trained when it was laid out.

        Raises:
            FieldError: A parameter was frozen or unfrozen since; the text names it.
        """
        laid_out = {span.name for span in self.spans if span.role != "stats"}
        for name in sorted(laid_out.symmetric_difference(trained_parameters(module))):
            before, after = ("trained", "frozen") if name in laid_out else ("frozen", "trained")
            raise FieldError(name, after, f"{before}, as when the rounds began: what travels is settled there")

    def to_sent_(self, flat: Tensor, replica: Tensor, changes: Mapping[str, Tensor] | None = None) -> Tensor:
        """Turn a trained model into what is sent of it, changes or values, in place.

        Args:
            flat: The trained model, flat; changed in place.
            replica: The model before training, flat.
            changes: The changes of the tensors whose type cannot hold the replica; see `changes`.
        """
        sent = self._subtract_(flat, replica, "change") if self.sends_values else flat.sub_(replica)
        for name, change in (changes or {}).items():
            if self[name].sent == "change":
                sent[self[name].slice] = change.reshape(-1)
        return sent

    def to_change_(self, mean: Tensor, replica: Tensor) -> Tensor:
        """Turn a mean of what was sent into the model's change, in place; the replica is that of the whole model."""
        return self._subtract_(mean, self.take(replica), "values") if self.sends_values else mean

    def _subtract_(self, flat: Tensor, replica: Tensor, sent: str) -> Tensor:
        """Subtract the replica from the tensors of which that is sent."""
        for span in self.spans:
            if span.sent == sent:
                flat[span.slice] -= replica[span.slice]
        return flat

    @cached_property
    def sends_values(self) -> bool:
        """Whether values of some tensors travel, and not their change."""
        return any(span.sent == "values" for span in self.spans)

    # ---- flat buffer <-> payloads --------------------------------------------------------------------------------

    def encode(self, flat: Tensor, *, seed: int, residual: Tensor | None = None) -> list[Payload]:
        """Encode every span; the i-th of the whole layout takes ``span_seed(seed, i)``.

        On a CPU, payloads of fixed size lie one after another in one buffer, as in a message's body.

        Args:
            flat: The values, a flat buffer.
            seed: Seed of the message.
            residual: Flat float32 of the parameters, added to them and replaced in place by what their codecs lose;
                statistics, and spans whose values travel, have none.
        """
        body = None
        if self.fixed_nbytes is not None and flat.device.type == "cpu":
            body = torch.empty(self.fixed_nbytes, dtype=torch.uint8)
        payloads: list[Payload] = []
        for run in self._runs:
            x, first = flat[run.place].view(run.shape), kernels.span_seed(seed, self.numbers[run.members.start])
            out = None if body is None else body[run.data]
            if residual is not None and run.has_residual:
                old = residual[run.place].view(run.shape)
                payload = run.codec.encode_with_residual(x, old, seed=first, out=out)
            else:
                payload = run.codec.encode(x, seed=first, out=out)
            payloads += self._members(run, payload, seed) if run.sizes else [payload]
        return payloads

    def _members(self, run: _Run, payload: Payload, seed: int) -> list[Payload]:
        """Return the payloads of a run's spans, views of the run's."""
        return [
            replace(payload, data=data, shape=self.spans[i].shape, seed=kernels.span_seed(seed, self.numbers[i]))
            for i, data in zip(run.members, payload.data.split(list(run.sizes)), strict=True)
        ]

    @cached_property
    def _runs(self) -> tuple[_Run, ...]:
        """The spans in as few calls of a codec as there can be: a cast of neighbours is the cast of all of them."""

        def same_call(number: int) -> tuple[object, ...]:
            span = self.spans[number]
            return span.codec, span.has_residual, None if isinstance(span.codec, Cast) else number

        starts = [0, *accumulate(self.payload_nbytes)] if self.payload_nbytes is not None else []
        runs = []
        for _, group in groupby(range(len(self.spans)), key=same_call):
            numbers = list(group)
            spans = [self.spans[number] for number in numbers]
            members, first, last = range(numbers[0], numbers[-1] + 1), spans[0], spans[-1]
            place = slice(first.offset, last.offset + last.numel)
            data = slice(starts[members.start], starts[members.stop]) if starts else None
            several = len(spans) > 1
            shape = (place.stop - place.start,) if several else first.shape
            sizes = tuple(first.codec.payload_nbytes(span.shape) for span in spans) if several else ()
            runs.append(_Run(members, place, data, sizes, first.codec, shape, first.has_residual))
        return tuple(runs)

    def payloads(self, datas: Sequence[Tensor], *, seed: int) -> Iterator[tuple[Span, Payload]]:
        """Pair the spans with payloads made of received bytes, in order."""
        self.check_number(datas)
        for i, span, data in zip(self.numbers, self.spans, datas, strict=True):
            yield span, Payload(data, span.codec, span.shape, torch.float32, kernels.span_seed(seed, i))

    def decode_sum(
        self, messages: Sequence[Sequence[Tensor]], out: Tensor, *, seeds: Sequence[int], weights: Sequence[float]
    ) -> None:
        """Replace a flat float32 buffer by the sum of ``weight · decoded`` over messages, in the order given.

        The same floats as `decode_add` of each message to zeros, but the buffer passes through memory once.
        """
        rows = [self._run_payloads(datas, seed=seed) for datas, seed in zip(messages, seeds, strict=True)]
        for run, *payloads in zip(self._runs, *rows, strict=True):
            run.codec.decode_sum(payloads, weights, out[run.place].view(run.shape))

    def decode_add(self, datas: Sequence[Tensor], out: Tensor, *, seed: int, weight: float = 1.0) -> None:
        """Add ``weight · decoded`` to a flat float32 buffer in place."""
        for run, payload in zip(self._runs, self._run_payloads(datas, seed=seed), strict=True):
            run.codec.decode_add(payload, out[run.place].view(run.shape), weight)

    def check(self, datas: Sequence[Tensor]) -> None:
        """Raise `FieldError` unless each span's bytes decode, without decoding them."""
        for run, payload in zip(self._runs, self._run_payloads(datas, seed=0), strict=True):
            run.codec.check(payload.data, run.shape)

    def _run_payloads(self, datas: Sequence[Tensor], *, seed: int) -> list[Payload]:
        """Return a payload for each run."""
        self.check_number(datas)
        return [
            Payload(
                end_to_end(datas[run.members.start : run.members.stop]),
                run.codec,
                run.shape,
                torch.float32,
                kernels.span_seed(seed, self.numbers[run.members.start]),
            )
            for run in self._runs
        ]

    def check_number(self, datas: Sequence[Tensor]) -> None:
        """Raise `FieldError` unless there are as many payloads as spans."""
        if len(datas) != len(self.spans):
            raise FieldError("payloads", len(datas), f"{len(self.spans)}, one for each tensor of the layout")


def end_to_end(datas: Sequence[Tensor]) -> Tensor:
    """Return the bytes of all, one after another: a view where they lie so in memory already, otherwise a copy.

    Args:
        datas: Buffers, flat uint8, at least one.
    """
    first, stop = datas[0], 0
    if len(datas) == 1:
        return first
    memory, start = first.untyped_storage().data_ptr(), first.storage_offset()
    for data in datas:
        if data.untyped_storage().data_ptr() != memory or data.storage_offset() != start + stop or data.stride(0) != 1:
            return torch.cat(tuple(datas))
        stop += data.numel()
    return first.as_strided((stop,), (1,), start)


@dataclass(frozen=True)
class LayoutSchedule:
    """A model's layouts by round: the same spans at the same offsets, with codecs that may change.

    Args:
        layouts: The first round of each layout and the layout; the first round of all is 0, and rounds rise.
    """

    layouts: tuple[tuple[int, Layout], ...]

    @classmethod
    def of(cls, module: nn.Module, spec: str, *, feedback: bool) -> LayoutSchedule:
        """Lay out a module for a codec schedule such as ``"int4 sign@7"``; see `fedq.codecs.codec_schedule`."""
        entries = codec_schedule(spec)
        return cls(tuple((first, Layout.of(module, c.resolved(feedback=feedback))) for first, c in entries))

    def with_values(self, codecs: Mapping[str, Codec]) -> LayoutSchedule:
        """Return the schedule in which the values of the tensors named travel, each in the codec given."""
        return LayoutSchedule(tuple((first, layout.with_values(codecs)) for first, layout in self.layouts))

    @classmethod
    def always(cls, layout: Layout) -> LayoutSchedule:
        """Return the schedule with one layout for all rounds."""
        return cls(((0, layout),))

    def at(self, round: int) -> Layout:
        """Return the layout of a round, counted from 0."""
        return [layout for first, layout in self.layouts if first <= round][-1]

    @property
    def hash(self) -> str:
        """Text that agrees only if rounds and layouts agree."""
        return " ".join(f"{first}:{layout.hash:016x}" for first, layout in self.layouts)

"""What averaging a model's gradients sends, without values: a model's shapes, DDP's buckets, and each rank's bytes.

Codecs, segments, owners and schedules are those of the real exchange, made from a model on the meta device.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from fedq.codecs import Codec
from fedq.codecs.dense import Cast
from fedq.collectives import Segment
from fedq.collectives.mean import Leg
from fedq.collectives.peers import Peers
from fedq.hooks import PowerSGDExchange, StepExchange, StepState, make_exchange
from fedq.hooks.gradients import RUN_BYTES
from fedq.models import build_model, check_model

FIRST_BUCKET_BYTES = 1 << 20
"""Size of DDP's first bucket in bytes, smaller than the others so that an exchange can begin early."""
SMALL_NUMEL = 4096
"""Most elements of a cast that travels with others in one message."""
_INSIDE_NBYTES = 4  # float32, which `hierarchical` sends inside a node


@dataclass(frozen=True)
class Shapes:
    """A model without values.

    Args:
        name: Name of the model.
        module: The module, on the meta device.
        image: Shape of one input.
        buckets: Indices of the parameters in each of DDP's buckets, in the order in which these become ready.
        ready: Share of the backward pass after which each bucket's gradients are there.
    """

    name: str
    module: nn.Module = field(repr=False)
    image: tuple[int, ...]
    buckets: tuple[tuple[int, ...], ...]
    ready: tuple[float, ...]

    @classmethod
    def of(
        cls, name: str, *, num_classes: int = 10, image: tuple[int, ...] = (3, 32, 32), norm: str = "batch"
    ) -> Shapes:
        """Build a model by name; see `fedq.models.build_model`.

        Raises:
            FieldError: The model is unknown, cannot have the size, or does not fit the images.
        """
        with torch.device("meta"):
            module = build_model(name, num_classes=num_classes, in_channels=image[0], image_size=image[1], norm=norm)
            check_model(name, module, torch.empty((2, *image)), num_classes)
        return cls.of_module(name, module, image)

    @classmethod
    def of_module(cls, name: str, module: nn.Module, image: tuple[int, ...]) -> Shapes:
        """Describe a module on the meta device."""
        params = [param for param in module.parameters() if param.requires_grad]
        last_first = list(reversed(range(len(params))))
        limits = [FIRST_BUCKET_BYTES, RUN_BYTES]
        found, _ = dist._compute_bucket_assignment_by_size(
            [params[number] for number in last_first], limits, [False] * len(params)
        )
        buckets = tuple(tuple(last_first[place] for place in bucket) for bucket in found)
        done = _backward_shares(module, params, image)
        return cls(name, module, image, buckets, tuple(max(done[n] for n in bucket) for bucket in buckets))

    @cached_property
    def numel(self) -> int:
        """Trainable elements."""
        return sum(param.numel() for param in self.module.parameters() if param.requires_grad)


def _backward_shares(module: nn.Module, params: Sequence[Tensor], image: tuple[int, ...]) -> list[float]:
    """Return, for each parameter, the share of the backward pass after which its gradient is there.

    The time of a layer is taken as proportional to its multiplications, output positions times weights, and the pass
    as the forward one in reverse.
    """
    order: list[tuple[nn.Module, float]] = []

    def note(layer: nn.Module, _: object, out: Tensor) -> None:
        weights = max((p for p in layer.parameters(recurse=False)), key=torch.numel)
        positions = out.numel() / weights.shape[0] if weights.dim() > 1 else out.numel() / weights.numel()
        order.append((layer, positions * weights.numel()))

    layers = [layer for layer in module.modules() if any(True for _ in layer.parameters(recurse=False))]
    handles = [layer.register_forward_hook(note) for layer in layers]
    was_training = module.training
    try:
        module.eval()(torch.empty((2, *image), device="meta"))
    finally:
        module.train(was_training)
        for handle in handles:
            handle.remove()
    total, so_far = sum(cost for _, cost in order), 0.0
    done: dict[int, float] = {}
    for layer, cost in reversed(order):
        so_far += cost
        for param in layer.parameters(recurse=False):
            done[id(param)] = so_far / total  # of a shared one, the last place counts
    return [done.get(id(param), 1.0) for param in params]


@dataclass(frozen=True)
class Part:
    """What one bucket of a model is made of, for one codec.

    Args:
        ready: Share of the backward pass after which the bucket's gradients are there.
        numel: Number of elements.
        segments: The bucket's segments, with their owners.
        num_coded: Number of segments that are payloads of their own.
        num_small: Number of small casts, which travel together.
    """

    ready: float
    numel: int
    segments: tuple[Segment, ...]
    num_coded: int
    num_small: int

    @cached_property
    def num_coded_owned(self) -> int:
        """Payloads of the rank that owns most."""
        counts: dict[int, int] = {}
        for segment in self.segments:
            counts[segment.owner] = counts.get(segment.owner, 0) + 1
        return max(counts.values(), default=0)

    @cached_property
    def numel_owned(self) -> int:
        """Elements of the rank that owns most."""
        counts: dict[int, int] = {}
        for segment in self.segments:
            counts[segment.owner] = counts.get(segment.owner, 0) + segment.numel
        return max(counts.values(), default=0)


@dataclass(frozen=True)
class Traffic:
    """How one codec's gradients travel.

    Args:
        exchange: The exchange of a real run; it is asked for its layout and never run.
        parts: Make-up of each bucket.
        world_size: Number of ranks.
        ranks_per_node: Number of ranks on each node.
    """

    exchange: StepExchange = field(repr=False)
    parts: tuple[Part, ...]
    world_size: int
    ranks_per_node: int

    @classmethod
    def of(
        cls,
        shapes: Shapes,
        spec: str | Codec,
        world_size: int,
        *,
        ranks_per_node: int = 1,
        second: str | Codec | None = None,
        schedule: str = "auto",
        feedback: bool | None = None,
    ) -> Traffic:
        """Lay out a model's gradients for a codec and schedule.

        Raises:
            FieldError: The codec or schedule cannot be used, see `fedq.hooks.step_state`.
        """
        exchange = make_exchange(
            shapes.module,
            Peers(members=range(world_size)),
            spec,
            second=second,
            schedule=schedule,
            ranks_per_node=ranks_per_node,
            feedback=feedback,
        )
        if isinstance(exchange, PowerSGDExchange):
            return cls(exchange, (Part(1.0, shapes.numel, (), 0, 0),), world_size, ranks_per_node)
        assert isinstance(exchange, StepState)
        by_param: dict[int, list[Segment]] = {}
        for segment in exchange.segments():
            by_param.setdefault(segment.param, []).append(segment)
        buckets = [[s for number in bucket for s in by_param.get(number, [])] for bucket in shapes.buckets]
        parts = tuple(_part(ready, segments) for ready, segments in zip(shapes.ready, buckets, strict=True))
        return cls(exchange, parts, world_size, ranks_per_node)

    @property
    def schedule(self) -> str:
        """By which schedule it travels; PowerSGD's matrices are summed on the way."""
        return self.exchange.schedule if isinstance(self.exchange, StepState) else "reduce"

    @property
    def is_whole_cast(self) -> bool:
        """Whether everything travels in one type and is summed on the way, a bucket at a time."""
        return (
            self.schedule == "reduce"
            and isinstance(self.exchange, StepState)
            and isinstance(self.exchange.codecs[0], Cast)
        )

    @cached_property
    def sent(self) -> np.ndarray:
        """Bytes of a step that each rank hands to the process group, by leg; (ranks, 2) int64.

        What `StepExchange.sent` counts, once DDP has its final buckets.
        """
        if self.schedule == "reduce":
            first, second = self._reduced
            total = np.empty((self.world_size, 2), dtype=np.int64)
            total[:] = sum(map(self._ring, first)), sum(map(self._ring, second))
            return total
        result = np.zeros((self.world_size, 2), dtype=np.int64)
        every = [segment for part in self.parts for segment in part.segments]
        if self.world_size == 1:
            return result
        if self.schedule == "one_phase":
            result[:, 0] = (self.world_size - 1) * _nbytes(every, "first")
        elif self.schedule == "two_phase":
            result[:, 0] = _nbytes(every, "first") - self._owned(every, "first")
            result[:, 1] = (self.world_size - 1) * self._owned(every, "second")
        else:
            result += self._hierarchical_sent(every)
        return result

    @cached_property
    def messages(self) -> tuple[list[int], list[int]]:
        """Bytes of each buffer of a step that is summed on the way (schedule ``reduce``), by leg."""
        return self._reduced

    @property
    def _reduced(self) -> tuple[list[int], list[int]]:
        if isinstance(self.exchange, PowerSGDExchange):
            rows = self.exchange.makeup("first")
            exempt, codes = (sum(size for _, part, size in rows if part == kind) for kind in ("exempt", "codes"))
            return [exempt, codes], [sum(size for _, _, size in self.exchange.makeup("second"))]
        if self.is_whole_cast:
            return [_nbytes(part.segments, "first") for part in self.parts], []
        return [nbytes for part in self.parts for nbytes in _payloads(part.segments)], []

    def _ring(self, nbytes: int) -> int:
        return 2 * (self.world_size - 1) * nbytes // self.world_size

    def _owned(self, segments: Iterable[Segment], leg: Leg) -> np.ndarray:
        """Return the payload bytes that each rank owns."""
        owned = np.zeros(self.world_size, dtype=np.int64)
        for segment in segments:
            owned[segment.owner] += segment.nbytes[leg]
        return owned

    def _hierarchical_sent(self, segments: Sequence[Segment]) -> np.ndarray:
        each, nodes = self.ranks_per_node, self.world_size // self.ranks_per_node
        inside = np.zeros(each, dtype=np.int64)
        for segment in segments:
            inside[segment.owner % each] += _INSIDE_NBYTES * segment.numel
        own = {leg: self._owned(segments, leg).reshape(nodes, each) for leg in ("first", "second")}  # type: ignore[arg-type]
        of_place = {leg: owned.sum(axis=0) for leg, owned in own.items()}
        first = (inside.sum() - inside) + (of_place["first"] - own["first"])
        second = (nodes - 1) * own["second"] + (each - 1) * of_place["second"]
        return np.stack([first.reshape(-1), second.reshape(-1)], axis=1)


@dataclass(frozen=True)
class Fan:
    """Bytes of one exchange between several ranks: what the busiest moves in one direction.

    Args:
        across: Bytes that a rank moves over its share of its node's link.
        inside: Bytes that a rank moves inside its node.
        num_across: Number of messages to or from ranks of other nodes.
        num_inside: Number of messages to or from ranks of the own node.
        other_way: Bytes that the rank moves in the other direction, as a share of those in the busier one.
        is_inward: Whether the busier direction is inward.
    """

    across: float
    inside: float
    num_across: int
    num_inside: int
    other_way: float = 1.0
    is_inward: bool = True


def to_owners(segments: Sequence[Segment], leg: Leg, world_size: int, ranks_per_node: int) -> Fan:
    """Return the exchange of a leg: every rank sends owners their segments, or owners send theirs to all."""
    owned, of_node = np.zeros(world_size), np.zeros(world_size // ranks_per_node)
    for segment in segments:
        owned[segment.owner] += segment.nbytes[leg]
        of_node[segment.owner // ranks_per_node] += segment.nbytes[leg]
    total, outside = owned.sum(), world_size - ranks_per_node
    in_across, out_across = of_node.max() * outside, ranks_per_node * (total - of_node.min())
    in_inside = owned.max() * (ranks_per_node - 1)
    out_inside = of_node.max() - (owned.min() if ranks_per_node > 1 else of_node.max())
    across = max(in_across, out_across) / ranks_per_node if outside else 0.0
    inside = max(in_inside, out_inside) if ranks_per_node > 1 else 0.0
    into, out_of = owned.max() * (world_size - 1), total - owned.max()
    share = min(1.0, out_of / into) if into else 1.0
    return Fan(float(across), float(inside), outside, ranks_per_node - 1, float(share), leg == "first")


@dataclass(frozen=True)
class Hierarchy:
    """The four exchanges of ``hierarchical``, and the work of the rank that has most of it.

    Args:
        inside: First exchange, in float32 inside a node: each segment to the rank in the place of its owner.
        to_owners: Second exchange, across nodes among ranks in the same place: segments to their owners.
        to_place: Third exchange, across nodes: means, coded again, from their owners to the same place of each node.
        shared: Fourth exchange, inside a node: the means that came, to all its ranks.
        numel_of_place: Number of elements that a rank sums and encodes for its node.
        numel_owned: Number of elements that a rank owns.
        num_of_place: Number of segments that a rank sums and encodes for its node.
        num_owned: Number of segments that a rank owns.
    """

    inside: Fan
    to_owners: Fan
    to_place: Fan
    shared: Fan
    numel_of_place: int
    numel_owned: int
    num_of_place: int
    num_owned: int

    @classmethod
    def of(cls, segments: Sequence[Segment], world_size: int, each: int) -> Hierarchy:
        """Lay out a bucket; segments go to place ``owner % each`` of node ``owner // each``."""
        nodes = world_size // each
        # By node and place of the owner: float32, first leg, second leg, elements, segments.
        owned = np.zeros((5, nodes, each))
        for s in segments:
            figures = (_INSIDE_NBYTES * s.numel, s.nbytes["first"], s.nbytes["second"], s.numel, 1)
            owned[:, s.owner // each, s.owner % each] += figures
        of_place = owned.sum(axis=1)

        def inside(figure: int) -> Fan:
            place = of_place[figure]
            return Fan(0.0, float(max(place.max() * (each - 1), place.sum() - place.min())), 0, each - 1)

        def across(figure: int, is_inward: bool) -> Fan:
            of_node = owned[figure].sum(axis=1)
            into, out_of = of_node.max() * (nodes - 1), of_node.sum() - of_node.max()
            busiest = max(into, of_node.sum() - of_node.min()) / each
            return Fan(float(busiest), 0.0, nodes - 1, 0, float(min(1.0, out_of / max(1.0, into))), is_inward)

        most = [int(of_place[f].max()) for f in (3, 4)] + [int(owned[f].max()) for f in (3, 4)]
        return cls(inside(0), across(1, True), across(2, False), inside(2), most[0], most[2], most[1], most[3])


def to_everyone(nbytes: float, world_size: int, ranks_per_node: int) -> Fan:
    """Return the exchange in which every rank sends every other the same buffer."""
    outside = world_size - ranks_per_node
    return Fan(nbytes * outside, nbytes * (ranks_per_node - 1), outside, ranks_per_node - 1)


def _part(ready: float, segments: Sequence[Segment]) -> Part:
    small = [s for s in segments if s.numel <= SMALL_NUMEL and isinstance(s.first, Cast)]
    numel = sum(segment.numel for segment in segments)
    return Part(ready, numel, tuple(segments), len(segments) - len(small), len(small))


def _payloads(segments: Sequence[Segment]) -> list[int]:
    """Return the bytes of a bucket's payloads, the small casts as one."""
    small = [s.nbytes["first"] for s in segments if s.numel <= SMALL_NUMEL and isinstance(s.first, Cast)]
    rest = [s.nbytes["first"] for s in segments if not (s.numel <= SMALL_NUMEL and isinstance(s.first, Cast))]
    return [*([sum(small)] if small else []), *rest]


def _nbytes(segments: Iterable[Segment], leg: Leg) -> int:
    return sum(segment.nbytes[leg] for segment in segments)

"""The server's side of the downlink: one replica that all nodes share, in versions, and the changes between them.

The server sends ``C(model - replica)``, and the replica takes the decoded change, so whatever the codec loses stays in
the difference and is sent later. Every distinct model that the server has to send is one version, so evaluating a
model and training from it costs one change. A change names its version (`Message.sequence`) and leads there from the
version before, so a node may get several at once, and none is applied twice.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from flwr.app import ArrayRecord
from torch import Tensor

from fedq.errors import FieldError
from fedq.federated.aggregate import apply_change
from fedq.federated.change_log import ChangeLog
from fedq.federated.training import RoundContext, is_finite
from fedq.flower.arrays import Model, layout_of, log, read_record
from fedq.layout import Layout
from fedq.wire import SERVER, Frame, Kind, Message, join_payloads

_KEPT = 8
"""Number of replicas in memory: answers to messages that were pushed and not waited for may be that late."""


class Versions:
    """The replica and how to get there.

    Args:
        downlink: Spec of the codec of changes.
        seed: Seed of everything random in them.
    """

    def __init__(self, downlink: str, seed: int) -> None:
        self._downlink = downlink
        self._seed = seed
        self._models: dict[int, Model] = {}
        self._changes = ChangeLog[Message](lambda change: change.nbytes, fewest=1)
        self._whole: ArrayRecord | None = None
        self._target: dict[str, Any] = {}

    @property
    def number(self) -> int:
        """The newest version; 0: there is none yet."""
        return self._changes.newest

    @property
    def model(self) -> Model:
        """The replica of the newest version."""
        return self._models[self.number]

    def at(self, number: int) -> Model:
        """Return the replica of a version.

        Raises:
            FieldError: The replica of this version is not kept.
        """
        if number not in self._models:
            raise FieldError("version", number, f"one of {sorted(self._models)}")
        return self._models[number]

    def advance(self, record: ArrayRecord, *, anew: bool) -> None:
        """Make a new version that brings the replica to a model, unless the newest one was made for it.

        Args:
            record: The model's arrays.
            anew: Whether nobody holds an older version, so that the replica becomes the model itself.
        """
        target = {name: (array.dtype, array.shape, array.stype, array.data) for name, array in record.items()}
        if self.number and target == self._target:
            return
        self._target = target
        model = read_record(record, self.model.shapes if self.number else None)
        if self.number and (model.names, model.shapes) != (self.model.names, self.model.shapes):
            log.warning("fedq: the model has other arrays than before; everyone gets it whole")
            model, anew = read_record(record), True
        change = None if anew or not self.number else self._change(model)
        if change is None:
            self._changes.restart(self.number + 1)
            self._models[self.number], self._whole = model, record
            return
        moved = replace(model, flat=changed(self.model.flat, change))
        self._changes.add(change, moved.plain_nbytes)
        self._models[self.number], self._whole = moved, None

    def _change(self, model: Model) -> Message | None:
        """Return the message from the newest version to a model; None if that is not finite."""
        replica = self.model
        layout = layout_of(model.shapes, self._downlink, feedback=True)
        sent = layout.to_sent_(model.flat.clone(), replica.flat)
        if not all_finite(sent):
            log.warning("fedq: the server's model is not finite; everyone gets it whole")
            return None
        seed = RoundContext(self.number, 0.0, self._seed).downlink_seed()
        body = join_payloads(layout, layout.encode(sent, seed=seed))
        frame = Frame(Kind.CHANGE, self.number, SERVER, layout.hash, seed, 0.0, 0.0, 0.0, body)
        exact = {name: tensor for name, tensor in model.exact.items() if not _same(tensor, replica.exact.get(name))}
        return Message(frame, layout, self.number + 1, exact)

    def since(self, held: int) -> list[Message] | None:
        """Return the changes that lead from a version to the newest, or None if the whole model has to be sent."""
        return self._changes.since(held) if held > 0 else None

    def whole(self) -> ArrayRecord:
        """Return the newest version as plain arrays."""
        if self._whole is None:
            self._whole = self.model.record()
        return self._whole

    def keep(self, numbers: Iterable[int]) -> None:
        """Forget every replica but the newest and those that answers may still refer to, at most `_KEPT` in all."""
        kept = sorted({*numbers, self.number})[-_KEPT:]
        for number in self._models.keys() - kept:
            del self._models[number]


def changed(flat: Tensor, message: Message) -> Tensor:
    """Return a new flat buffer: that given, after a message's payloads.

    A variance that has shrunk to almost nothing may be overshot by its bfloat16 change; it becomes zero, on both sides.

    Raises:
        FieldError: The payloads are of another size than the buffer.
    """
    layout = message.layout
    assert layout is not None, "a message with payloads"
    flat = flat.clone()
    apply_change(layout, message.frame, flat)
    for span in layout.spans:
        if span.name.endswith("running_var") and span.sent == "change":
            flat[span.slice].clamp_(min=0.0)
    return flat


def check_shapes(layout: Layout | None, model: Model) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a received layout, in the model's order.

    Raises:
        FieldError: The layout is not one of some of the model's arrays in their order.
    """
    if layout is None:
        raise FieldError("message layout", None, "one of the model's arrays")
    found = {span.name: span.shape for span in layout.spans}
    for name, shape in found.items():
        if model.shapes.get(name) != shape:
            raise FieldError(f"shape of {name}", shape, f"{model.shapes.get(name, 'no such array')}, as in the model")
    shapes = {name: shape for name, shape in model.shapes.items() if name in found}
    expected = layout_of(shapes, "fp32", feedback=False)
    if [(s.name, s.offset, s.role) for s in layout.spans] != [(s.name, s.offset, s.role) for s in expected.spans]:
        raise FieldError("message layout", [span.name for span in layout.spans], "the order and roles of the model")
    return shapes


def all_finite(values: Tensor) -> bool:
    """Say whether no value is NaN or infinite; true of none at all."""
    return not values.numel() or is_finite(values)


def _same(a: Tensor, b: Tensor | None) -> bool:
    return b is not None and a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)

"""What clients need to catch up: the changes of the last rounds, and the whole model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedq.federated.change_log import ChangeLog
from fedq.layout import Layout
from fedq.wire import SERVER, Frame, Kind, Message, crc32c


@dataclass(frozen=True)
class Model:
    """The replica after some rounds.

    Args:
        version: Number of rounds that the model has seen.
        checksum: CRC32C of the model's float32 bytes, in the layout's order.
        message: The whole model as a message, in float32.
    """

    version: int
    checksum: int
    message: Message


class CatchUp:
    """What leads a client from the version that it holds to the newest: the changes since, or the whole model.

    A client that holds an older version gets every change since, or the whole model where that is smaller; one whose
    version is unknown, or was of another run, gets the whole model.

    Args:
        layout: Layout of the model in float32.
    """

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.model: Model | None = None
        self._changes = ChangeLog[Message](lambda change: change.nbytes)
        self._checksums: dict[int, int] = {}

    def publish(self, version: int, replica: Tensor, change: Message | None = None) -> None:
        """Offer the replica of a version, and the change that made it of the one before.

        Args:
            version: Number of rounds that the replica has seen.
            replica: The model as one flat float32 tensor; it is copied.
            change: The message that the round's server step sent; None if the round changed nothing.
        """
        follows = self.model is not None and self.model.version == version - 1
        self.model = Model(version, checksum(replica), whole_model(self.layout, replica, version))
        if follows:
            self._changes.add(change, self.model.message.nbytes)
        else:
            self._changes.restart(version)
            self._checksums.clear()
        self._checksums[version] = self.model.checksum
        for forgotten in [known for known in self._checksums if known < self._changes.oldest]:
            del self._checksums[forgotten]

    def lacking(self, version: int | None) -> list[Message]:
        """Return the messages that bring a holder of a version to the newest."""
        assert self.model is not None
        changes = None if version is None else self._changes.since(version)
        return [self.model.message] if changes is None else changes

    def recognise(self, version: object, checksum: object) -> int | None:
        """Return the version that a client says it holds, if it is one of ours with the right checksum."""
        if not isinstance(version, int) or isinstance(version, bool):
            return None
        return version if self._checksums.get(version) == checksum else None


def whole_model(layout: Layout, replica: Tensor, round: int) -> Message:
    """Return the model in float32 as a message; the values are copied."""
    body = replica.detach().to("cpu", copy=True).view(torch.uint8)  # spans lie one after another, as in a body
    frame = Frame(Kind.MODEL, round, SERVER, layout.hash, 0, 0.0, 0.0, 0.0, body)
    return Message(frame, layout)


def checksum(replica: Tensor) -> int:
    """Return CRC32C of a flat float32 model's bytes."""
    return crc32c(replica.detach().cpu().contiguous().view(torch.uint8).numpy().data)

"""How ranks' messages reach the server, and how its change reaches all ranks: by way of rank 0, or not at all.

`TwoPhase` is the other way, with a part of the server on every rank. All book what crossed.
"""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from fedq.collectives import Moved, Transport
from fedq.errors import FieldError
from fedq.federated.accounting import framing, message_parts, plain_model
from fedq.federated.aggregate import NO_OTHERS, Facts
from fedq.federated.delivery import Ranked
from fedq.federated.training import RoundContext
from fedq.layout import Layout
from fedq.ledger import NO_CLIENT, Ledger, MessageParts
from fedq.wire import Frame


class Exchange(Facts, ABC):
    """The same three acts on every rank; a rank with a server aggregates between `collect` and `spread`.

    Args:
        transport: What moves buffers between ranks.
        ledger: Ledger in which rank 0 books bytes.
    """

    is_spread: ClassVar[bool] = False
    """Whether every rank has the server of a part of the model."""

    def __init__(self, transport: Transport, ledger: Ledger) -> None:
        self.transport = transport
        self.ledger = ledger

    @property
    @abstractmethod
    def serves(self) -> bool:
        """Whether this rank has a server."""

    def part(self, layout: Layout) -> Layout:
        """Return what this rank's server has of a layout of the model."""
        return layout

    @abstractmethod
    def collect(
        self,
        frames: Sequence[Frame],
        counts: Sequence[int],
        layout: Layout,
        round: int,
        others: Mapping[int, Layout] = NO_OTHERS,
    ) -> Ranked:
        """Send this rank's messages to where they are averaged; return those that are averaged here.

        Args:
            frames: Messages of this rank's clients.
            counts: Number of messages of each rank, known to all.
            layout: Layout of the updates.
            round: Number of the round, from 0.
            others: Layouts, by hash, of clients that use codecs of their own; known to rank 0.
        """

    @abstractmethod
    def spread(self, change: Frame | None, layout: Layout, context: RoundContext) -> Frame | None:
        """Give the whole change to every rank; None if there is none.

        Args:
            change: This rank's part of the change; None: there is no server here, or no change.
            layout: Layout of changes.
            context: The round.
        """

    def share_model(self, replica: Tensor, layout: Layout) -> None:
        """Replace every rank's model by rank 0's, flat float32."""
        self._book_broadcast(0, plain_model(layout), self.transport.share(replica))

    def check_model(self, replica: Tensor) -> None:
        """Compare the ranks' models, which each has drawn from the same seed, by a checksum.

        Raises:
            FieldError: The ranks' models differ.
        """
        mine = zlib.crc32(replica.cpu().numpy().data)
        gathered, moved = self.transport.all_gather(torch.tensor([float(mine)], dtype=torch.float64))
        self.book_peer(0, "metrics", moved.payload)
        if (gathered != mine).any():
            allowed = "sent: the ranks drew different models from one seed (other versions of torch?)"
            raise FieldError("start", "seed", allowed)

    def gather(self, frames: Sequence[Frame], counts: Sequence[int]) -> tuple[Ranked, Moved]:
        """Gather all messages on rank 0, in the order of their clients; nothing comes back on the others."""
        gathered, moved = self.transport.gather([frame.pack() for frame in frames], counts)
        ranked = [(rank, Frame.unpack(m)) for rank, messages in enumerate(gathered) for m in messages]
        return sorted(ranked, key=lambda pair: pair[1].client), moved

    def book_peer(self, round: int, name: str, nbytes: int) -> None:
        """Book bytes between ranks that are no message of a client, on rank 0; nothing if there are none."""
        if nbytes:
            self._book(round, NO_CLIENT, "peer", framing(name, nbytes), wire_times=1)

    def _book_broadcast(self, round: int, parts: MessageParts, moved: Moved) -> None:
        others = self.transport.world_size - 1
        if others:
            self._book(round, NO_CLIENT, "downlink", parts, wire_times=others)
            self._book(round, NO_CLIENT, "downlink", framing("sizes", moved.sizes), wire_times=1)

    def _book(
        self, round: int, client: int, direction: str, parts: MessageParts, *, payload_times: int = 0, wire_times: int
    ) -> None:
        """Book on rank 0; nothing elsewhere."""
        if self.transport.rank == 0:
            self.ledger.record(
                round=round,
                client=client,
                direction=direction,
                parts=parts,
                payload_times=payload_times,
                wire_times=wire_times,
            )


class Rooted(Exchange):
    """Rank 0 has the server: messages are gathered there, and the change is broadcast."""

    @property
    def serves(self) -> bool:
        """Whether this is rank 0."""
        return self.transport.rank == 0

    def collect(
        self,
        frames: Sequence[Frame],
        counts: Sequence[int],
        layout: Layout,
        round: int,
        others: Mapping[int, Layout] = NO_OTHERS,
    ) -> Ranked:
        """Gather all messages on rank 0; nothing comes back on the others."""
        ranked, moved = self.gather(frames, counts)
        for rank, frame in ranked:
            parts = message_parts(others.get(frame.layout_hash, layout), frame)
            self._book(round, frame.client, "uplink", parts, payload_times=1, wire_times=int(rank != 0))
        if moved.sizes:
            self._book(round, NO_CLIENT, "uplink", framing("sizes", moved.sizes), wire_times=1)
        return ranked

    def spread(self, change: Frame | None, layout: Layout, context: RoundContext) -> Frame | None:
        """Broadcast the change; an empty message says that there is none."""
        message = None
        if self.transport.rank == 0:
            message = change.pack() if change else torch.empty(0, dtype=torch.uint8, device=self.transport.device)
        message, moved = self.transport.broadcast(message)
        frame = Frame.unpack(message) if message.numel() else None
        self._book_broadcast(context.round, message_parts(layout, frame) if frame else framing("change", 0), moved)
        return frame


class Unsent(Exchange):
    """No rank has a server: what clients tell of their training is gathered on rank 0, and nothing comes back.

    It is a matter of the simulation, booked as bytes between ranks.
    """

    @property
    def serves(self) -> bool:
        """Whether this rank has a server: none has."""
        return False

    def collect(
        self,
        frames: Sequence[Frame],
        counts: Sequence[int],
        layout: Layout,
        round: int,
        others: Mapping[int, Layout] = NO_OTHERS,
    ) -> Ranked:
        """Gather all messages on rank 0; nothing comes back on the others."""
        ranked, moved = self.gather(frames, counts)
        self.book_peer(round, "metrics", moved.payload + moved.sizes)
        return ranked

    def spread(self, change: Frame | None, layout: Layout, context: RoundContext) -> Frame | None:
        """Return that there is no change."""
        return None

"""What brings tasks to clients and their answers back: over ranks, across a network, or what is built for it.

A round is: ask, aggregate, step, tell, apply. A delivery does the asking and the telling, and books what crossed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from fedq.federated.aggregate import Facts
from fedq.federated.parts import Part
from fedq.federated.training import RoundContext
from fedq.layout import Layout, LayoutSchedule
from fedq.wire import Frame

Ranked = list[tuple[int, Frame]]
"""Messages with the rank that each came from, in client order."""
_SEEN_WHOLE = Facts()


@dataclass(frozen=True)
class Answers:
    """What came back in a round, to a place where a server is.

    Args:
        ranked: The clients' messages, or this server's share of each.
        layout: Layout of the messages' bodies.
        others: Layouts, by hash, of clients that use codecs of their own.
    """

    ranked: Ranked
    layout: Layout
    others: Mapping[int, Layout] = field(default_factory=dict)


class Delivery(ABC):
    """Brings tasks to clients, answers to the server, and its change to everybody; the same acts on every rank.

    Args:
        uplink: Layouts of the updates of clients without a codec of their own, by round.
    """

    is_spread = False
    """Whether several processes have the server of a part of the model each."""

    def __init__(self, uplink: LayoutSchedule) -> None:
        self.uplink = uplink

    @property
    def serves(self) -> bool:
        """Whether this process has a server, of the model or a part of it."""
        return True

    @property
    def reports(self) -> bool:
        """Whether this process knows of a round what a person is told."""
        return True

    @property
    def facts(self) -> Facts:
        """What is known of whole updates where servers have a part each."""
        return _SEEN_WHOLE

    def part(self, layout: Layout) -> Layout:
        """Return what this process's server has of a layout of the model."""
        return layout

    def compare(self, model: nn.Module) -> None:
        """Compare what does not travel of the participants' models, where they are at hand.

        Raises:
            FieldError: The participants' models differ.
        """

    def share(self, replica: Tensor, layout: Layout) -> None:
        """Bring everybody to the first model, flat float32, or compare what each has drawn from the seed.

        Raises:
            FieldError: The participants have drawn different models.
        """

    def begin(self, change: Frame, layout: Layout) -> None:
        """Note the message that everybody begins with, where the server sends values."""

    @abstractmethod
    def ask(self, replica: Tensor, context: RoundContext, parts: Part) -> Answers:
        """Have clients train, and bring their answers to where a server is.

        Args:
            replica: The model that everybody holds, flat float32.
            context: The round.
            parts: What takes part in the round; told what goes on.
        """

    @abstractmethod
    def tell(self, change: Frame | None, layout: Layout, context: RoundContext) -> Frame | None:
        """Give the whole change to everybody; None if there is none.

        Args:
            change: This server's part of the change; None: there is no server here, or no change.
            layout: Layout of changes.
            context: The round.
        """

    @abstractmethod
    def settle(self, change: Frame | None, replica: Tensor, layout: Layout, context: RoundContext) -> None:
        """Note what everybody holds, or can have, after the round.

        Args:
            change: The whole change, applied; None if there was none.
            replica: The model, flat float32.
            layout: Layout of changes.
            context: The round.
        """

    def note_peer(self, round: int, nbytes: int) -> None:
        """Book bytes that crossed between processes and are no message of a client."""

    def state_dict(self) -> dict[str, Any]:
        """Return what must be known to go on, for a checkpoint."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint's state, which has what `state_dict` returned among other things."""

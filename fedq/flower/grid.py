"""A grid whose messages travel packed: what the strategy's own loop, or any other, sends and receives through."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

from flwr.app import Message as FlowerMessage
from flwr.app import RecordDict
from flwr.serverapp import Grid

from fedq.flower.arrays import log
from fedq.flower.exchange import Exchange, is_training
from fedq.flower.weighing import Weighing

DEFAULT_TIMEOUT_S = 3600.0
"""Seconds that Flower's strategies wait by default; its grid would wait for ever."""


class RoundsFailed(RuntimeError):
    """Nobody answered usefully in several rounds in a row; the text has the last reasons."""


class CompressedGrid(Grid):
    """Flower's grid, with fedq between it and the caller.

    Args:
        grid: Flower's grid, which carries the messages.
        exchange: Exchange that packs messages and unpacks answers.
        max_failed_rounds: Number of training rounds in a row in which every node failed, at which it gives up.
        weighing: Rule by which the answers will be weighed; default: they may be used in any way.
    """

    def __init__(
        self, grid: Grid, exchange: Exchange, max_failed_rounds: int, weighing: Weighing | None = None
    ) -> None:
        self._grid = grid
        self._exchange = exchange
        self._weighing = weighing or Weighing()
        self._watch = FailedRounds(max_failed_rounds)

    def send_and_receive(
        self, messages: Iterable[FlowerMessage], *, timeout: float | None = None
    ) -> list[FlowerMessage]:
        """Send packed messages, wait for the answers, and return them with plain arrays.

        A node that lost what it held says so at once, and is sent what it lacks within the same timeout.

        Raises:
            RoundsFailed: Every node failed too many times in a row.
        """
        messages = list(messages)
        contents = {id(message): message.content for message in messages}
        deadline = time.monotonic() + (DEFAULT_TIMEOUT_S if timeout is None else timeout)
        replies = self._sent(self._exchange.pack(messages), deadline)
        behind = self._exchange.behind(replies)
        again = [_again(m, contents[id(m)]) for m in messages if m.metadata.dst_node_id in behind]
        if again:
            log.info("fedq: %d nodes lack the version that they should hold, and are sent more", len(again))
            for reply in (r for r in replies if r.metadata.src_node_id in behind):
                self._exchange.book_answer(reply)
            replies = [r for r in replies if r.metadata.src_node_id not in behind]
            second = self._sent(self._exchange.pack(again), deadline)
            self._exchange.forget(self._exchange.behind(second))
            replies += second
        unpacked = self._weighing.checked(self._exchange.unpack(replies))
        self._exchange.give_up(messages)
        if any(is_training(message) for message in messages):
            self._watch.round_done(len(messages), unpacked)
        return unpacked

    def _sent(self, messages: Sequence[FlowerMessage], deadline: float) -> list[FlowerMessage]:
        return list(self._grid.send_and_receive(messages, timeout=max(0.1, deadline - time.monotonic())))

    def push_messages(self, messages: Iterable[FlowerMessage]) -> Iterable[str]:
        """Send packed messages without waiting."""
        return self._grid.push_messages(self._exchange.pack(messages))

    def pull_messages(self, message_ids: Iterable[str]) -> list[FlowerMessage]:
        """Return the answers that have come, with plain arrays."""
        return self._exchange.unpack(self._grid.pull_messages(message_ids))

    # ---- the rest is Flower's ------------------------------------------------------------------------------------

    def set_run(self, run):  # type: ignore[no-untyped-def]  # noqa: D102
        self._grid.set_run(run)

    @property
    def run(self):  # type: ignore[no-untyped-def]  # noqa: D102
        return self._grid.run

    def create_message(self, *args, **kwargs) -> FlowerMessage:  # type: ignore[no-untyped-def]  # noqa: D102
        return self._grid.create_message(*args, **kwargs)

    def get_node_ids(self) -> Iterable[int]:  # noqa: D102
        return self._grid.get_node_ids()

    def get_nodes(self):  # type: ignore[no-untyped-def]  # noqa: D102
        return self._grid.get_nodes()


class FailedRounds:
    """Counts the rounds in a row that brought nothing, and does not stay silent about them.

    Args:
        most: Number of such rounds in a row at which `RoundsFailed` is raised.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._num = 0

    def round_done(self, num_asked: int, replies: Sequence[FlowerMessage]) -> None:
        """Note a training round.

        Raises:
            RoundsFailed: So many rounds in a row have failed that it gives up.
        """
        if any(reply.has_content() for reply in replies):
            self._num = 0
            return
        self._num += 1
        reasons = [f"node {r.metadata.src_node_id}: {(r.error.reason or '').strip()[-300:]}" for r in replies]
        missing = [f"{num_asked - len(replies)} did not answer in time"] if len(replies) < num_asked else []
        text = f"fedq: all {num_asked} nodes failed, {self._num} rounds in a row: " + "; ".join(reasons + missing)
        log.error(text)
        if self._num >= self._most:
            raise RoundsFailed(text)


def _again(message: FlowerMessage, content: RecordDict) -> FlowerMessage:
    """Return a new message like one that was sent, with the content that it had before packing."""
    meta = message.metadata
    return FlowerMessage(content, meta.dst_node_id, meta.message_type, ttl=meta.ttl, group_id=meta.group_id)

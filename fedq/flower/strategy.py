"""The server's four lines: `compressed` wraps any strategy of Flower's message API."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, MetricRecord
from flwr.app import Message as FlowerMessage
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from fedq.codecs import codec, codec_schedule
from fedq.errors import FieldError
from fedq.flower.accounting import in_words, totals, write_totals
from fedq.flower.arrays import log
from fedq.flower.exchange import Exchange
from fedq.flower.grid import CompressedGrid, FailedRounds
from fedq.flower.weighing import Weighing
from fedq.ledger import Ledger


def compressed(
    strategy: Strategy,
    uplink: str = "int4",
    downlink: str = "int8",
    *,
    seed: int = 0,
    ledger: str | Path | None = None,
    max_failed_rounds: int = 3,
) -> Compressed:
    """Return the strategy with packed updates up and packed changes down.

    Wrap last: ``compressed(DifferentialPrivacyServerSideFixedClipping(FedAvg(...), ...))``, so that every strategy
    inside sees plain arrays.

    Args:
        strategy: Any strategy; its own ``start``, if it has one, is the one that runs.
        uplink: Codec that clients are asked to use, or a schedule such as ``"int4 sign@7"``; a client's mod may have
            one of its own.
        downlink: Codec of the model's changes.
        seed: Seed of everything random in the codecs.
        ledger: Path of the JSON file that takes the counted bytes at the end; None: no file.
        max_failed_rounds: Number of training rounds in a row in which every node failed, at which it gives up.

    Raises:
        FieldError: A codec does not exist.
    """
    return Compressed(strategy, uplink, downlink, seed, Path(ledger) if ledger else None, max_failed_rounds)


class Compressed(Strategy):
    """What `compressed` returns.

    Args:
        inner: The strategy that chooses nodes and averages.
        uplink: Codec that clients are asked to use, or a schedule; see `compressed`, as for the rest.
        downlink: Codec of the model's changes.
        seed: Seed of everything random in the codecs.
        path: Path of the JSON file of counted bytes; None: no file.
        max_failed_rounds: Number of failed training rounds in a row at which it gives up.
    """

    def __init__(
        self, inner: Strategy, uplink: str, downlink: str, seed: int, path: Path | None, max_failed_rounds: int
    ) -> None:
        codec_schedule(uplink)
        codec(downlink)
        if max_failed_rounds < 1:
            raise FieldError("max_failed_rounds", max_failed_rounds, "1 or more")
        self.inner = inner
        self._settings = uplink, downlink
        self._exchange = Exchange(uplink, downlink, seed)
        self._path = path
        self._max_failed_rounds = max_failed_rounds
        self._watch = FailedRounds(max_failed_rounds)
        self._num_asked = 0
        self._weighing = Weighing.of(inner)

    @property
    def ledger(self) -> Ledger:
        """The counted bytes by round, node, direction, tensor and part; nodes are numbered as they appear."""
        return self._exchange.ledger

    def totals(self) -> dict[str, Any]:
        """Return the counted bytes and those of the same in float32, by direction and by round."""
        return totals(self.ledger)

    def grid(self, grid: Grid) -> CompressedGrid:
        """Return a grid whose messages travel packed, for a loop of one's own."""
        return CompressedGrid(grid, self._exchange, self._max_failed_rounds)

    def start(self, grid: Grid, initial_arrays: ArrayRecord, *args: Any, **kwargs: Any) -> Result:  # type: ignore[override]
        """Run the inner strategy's own loop, through a grid whose messages travel packed.

        Args:
            grid: Flower's grid.
            initial_arrays: Arrays of the first model.
            args, kwargs: Arguments that the inner strategy's ``start`` takes beside them.
        """
        uplink, downlink = self._settings
        log.info("fedq: uplink %s, downlink %s", uplink, downlink)
        try:
            packing = CompressedGrid(grid, self._exchange, self._max_failed_rounds, self._weighing)
            return self.inner.start(packing, initial_arrays, *args, **kwargs)
        finally:
            log.info("fedq: %s", in_words(self.totals()))
            if self._path is not None:
                write_totals(self.ledger, self._path)

    # ---- for those who write the loop themselves: each half of a round, packed or unpacked ------------------------

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[FlowerMessage]:
        """Return the inner strategy's messages, packed."""
        messages = self._exchange.pack(self.inner.configure_train(server_round, arrays, config, grid))
        self._num_asked = len(messages)
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[FlowerMessage]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Unpack the answers and let the inner strategy average them.

        Raises:
            RoundsFailed: Every node failed too many times in a row.
        """
        unpacked = self._weighing.checked(self._exchange.unpack(replies))
        if self._num_asked:
            self._watch.round_done(self._num_asked, unpacked)
        return self.inner.aggregate_train(server_round, unpacked)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[FlowerMessage]:
        """Return the inner strategy's messages, packed."""
        return self._exchange.pack(self.inner.configure_evaluate(server_round, arrays, config, grid))

    def aggregate_evaluate(self, server_round: int, replies: Iterable[FlowerMessage]) -> MetricRecord | None:
        """Unpack the answers and let the inner strategy put their metrics together."""
        unpacked = self._weighing.checked(self._exchange.unpack(replies))
        return self.inner.aggregate_evaluate(server_round, unpacked)

    def summary(self) -> None:
        """Log the settings of both."""
        log.info("\t├──> fedq: uplink %s, downlink %s", *self._settings)
        self.inner.summary()

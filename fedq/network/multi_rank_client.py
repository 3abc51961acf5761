"""One client of several ranks: how they train together, in every step or in a round of their own.

Rank 0 speaks with the server; the others wait for what it is asked. What moves between the ranks moves by the
collectives of every other job and is not the server's business: it is counted for this client alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedq.collectives import Transport
from fedq.config import Config
from fedq.federated.assembly import RoundSettings, Seats, make_rounds, over_ranks
from fedq.federated.client import Client
from fedq.federated.frozen import check_ranks
from fedq.federated.image_training import LocalTraining, Passed
from fedq.federated.rounds import Rounds
from fedq.federated.training import OnExamples, RoundContext, Start, Trained, counters_restored, seeded
from fedq.hooks import StepExchange
from fedq.kernels import derive_seed
from fedq.layout import Layout
from fedq.ledger import Ledger
from fedq.runtime import Runtime, from_root
from fedq.trainers.steps import share_statistics, share_weights


@dataclass(frozen=True)
class Order:
    """What all ranks of a client do next: train the client's examples from a model that rank 0 has."""

    lr: float
    seed: int


class MultiRankClient:
    """The ranks of one client; stands where `LocalTraining` does on rank 0.

    Args:
        runtime: Runtime of this rank: its device, and its place among the ranks.
        training: The training of this rank alone.
        indices: Indices of the client's examples, int64; each rank takes its share of them.
        config: Settings of the federation.
        exchange: When ranks average. ``step``: gradients, in every step. ``round``: each rank trains on its share, and
            the models are averaged, weighted by examples, at the end.
        uplink: Codec towards the average.
        downlink: Codec from the average.

    Raises:
        FieldError: The ranks' frozen parameters, which are not sent, differ.
    """

    def __init__(
        self,
        runtime: Runtime,
        training: LocalTraining,
        indices: Tensor,
        config: Config,
        *,
        exchange: str,
        uplink: str,
        downlink: str,
    ) -> None:
        self.runtime = runtime
        self.training = training
        self.indices = indices
        self.transport = Transport(runtime.device)
        check_ranks(training.model, self.transport)
        self._shared: StepExchange | None = None
        self._rounds: Rounds | None = None
        if exchange == "step":
            share_weights(training.layout, training.model, self.transport)  # which the hook compares
            options = {"spec": uplink, "second": downlink, "seed": derive_seed(config.run.seed, "gradients")}
            self._shared = training.steps_by.share_gradients(options)
        else:
            self._rounds = self._make_rounds(uplink, downlink)

    @property
    def model(self) -> nn.Module:
        """What is trained."""
        return self.training.model

    @property
    def layout(self) -> Layout:
        """Its layout."""
        return self.training.layout

    def run(self, start: Tensor, indices: Tensor, *, lr: float, seed: int) -> Trained:
        """Train with all ranks, on rank 0; ``indices`` are the client's, which every rank knows."""
        from_root(self.runtime, Order(lr, seed))
        return self._train(start.clone(), lr, seed)

    def follow(self) -> None:
        """Do what rank 0 is asked, on the other ranks, until it says that it is over."""
        while (order := from_root(self.runtime, None)) is not None:
            start = torch.empty(self.layout.numel, device=self.runtime.device)
            self._train(start, order.lr, order.seed)

    def dismiss(self) -> None:
        """Let the other ranks go."""
        if self.runtime.world_size > 1:
            from_root(self.runtime, None)

    def _train(self, start: Tensor, lr: float, seed: int) -> Trained:
        self.transport.share(start)
        if self._rounds is not None:
            return self._train_round(self._rounds, start, lr, seed)
        with counters_restored(self.model):
            return self._train_steps(start, lr, seed)

    def _train_steps(self, start: Tensor, lr: float, seed: int) -> Trained:
        training, rank, world_size = self.training, self.transport.rank, self.transport.world_size
        began = Start(self.layout, self.model, start)
        training.steps_by.start(lr)
        order = torch.randperm(len(self.indices), generator=torch.Generator().manual_seed(seed))
        each = math.ceil(len(order) / world_size)
        own = self.indices[order.repeat(2)[: each * world_size][rank::world_size]]
        generator = seeded(derive_seed(seed, "rank", rank))
        passed = training.train(own, training.index_batches(len(own), generator), generator)
        training.steps_by.finish()
        share_statistics(self.layout, self.model, self.transport)
        return self._trained(began, passed)

    def _train_round(self, rounds: Rounds, start: Tensor, lr: float, seed: int) -> Trained:
        rounds.replica.copy_(start)
        if rounds.server is not None:
            rounds.server.start(start)
        result = rounds.run(RoundContext(0, lr, seed))
        if self.transport.rank == 0 and result.left_out:
            raise RuntimeError(f"ranks failed: {result.left_out}")
        return Trained(rounds.replica.clone(), result.train_loss, result.train_accuracy, 0)

    def _trained(self, began: Start, passed: Passed) -> Trained:
        own = (passed.loss_sum, passed.num_correct, passed.num_seen, passed.num_steps)
        rows, _ = self.transport.all_gather(torch.tensor(own, dtype=torch.float64))
        loss_sum, num_correct, num_seen, _ = rows.sum(dim=0).tolist()
        return began.trained(loss_sum / max(1, num_seen), num_correct / max(1, num_seen), passed.num_steps)

    def _make_rounds(self, uplink: str, downlink: str) -> Rounds:
        """Return rounds in which every rank is a client, and rank 0 averages."""
        world_size = self.transport.world_size
        settings = RoundSettings(uplink=uplink, downlink=downlink, feedback="off")

        def client(rank: int) -> Client:
            share = self.indices[rank::world_size]
            return Client(OnExamples(self.training, share), num_examples=len(share))

        seats = Seats(world_size, client, self.model, settings, None)
        delivery = over_ranks(self.model, settings, seats, self.transport, Ledger(), sticky=True)
        return make_rounds(self.model, settings, delivery, transport=self.transport)

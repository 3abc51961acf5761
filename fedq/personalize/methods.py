"""What every personalised method is: how a client trains in a round, and which model it is tested with.

Here are the base class and the two ends of the scale: one model for all, and every client alone. `meta` has methods
whose personal models lie near the global one, `distilled` those that learn from it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from fedq.engines import TorchEngine
from fedq.federated.evaluate import batch_sums
from fedq.federated.image_training import LocalTraining
from fedq.federated.training import Start, Trained, counters_restored
from fedq.layout import Layout
from fedq.personalize.own_models import Network, OwnModels

Examples = tuple[Tensor, Tensor]
"""A batch: images as a model takes them, and labels."""


class Method(ABC):
    """Trains the clients of a rank, one at a time.

    Args:
        local: How the model that travels is trained: module, optimizer, batches.
        models: The clients' own models.
    """

    sends: ClassVar[bool] = True
    """Whether anything travels."""
    keeps_models: ClassVar[bool] = True
    """Whether clients keep a model of their own between rounds."""
    is_shared: ClassVar[bool] = False
    """Whether all clients are tested with one model."""

    def __init__(self, local: LocalTraining, models: OwnModels) -> None:
        self.local = local
        self.models = models
        self.round = 0
        """Number of the round that runs, from 0; schedules follow it."""

    @abstractmethod
    def run(self, client: int, start: Tensor, indices: Tensor, *, lr: float, seed: int) -> Trained:
        """Train a client; keep its own model, and return the one that travels.

        Args:
            client: Number of the client.
            start: The model that the client downloaded, flat float32.
            indices: Places of the client's examples in the split.
            lr: Local learning rate of the round.
            seed: Seed of everything random.

        Raises:
            ArithmeticError: The client's own model got values that are not finite; the one before is kept.
        """

    def deploy(self, client: int, start: Tensor, indices: Tensor, *, seed: int) -> Network:
        """Put what a client is tested with into its network's module, and return the network; see `run`."""
        own = self.models.load(client, start)
        own.fill(quantized=True)
        return own.network

    def training_of(self, client: int) -> ClientTraining:
        """Return how a client trains, in the place of `LocalTraining`."""
        return ClientTraining(client, self)

    def examples(self, indices: Tensor, generator: torch.Generator) -> Iterator[Examples]:
        """Yield the round's batches, drawn as `LocalTraining` draws them."""
        yield from self.draw(indices, self.local.index_batches(len(indices), generator), generator)

    def draw(self, indices: Tensor, index_batches: list[Tensor], generator: torch.Generator) -> Iterator[Examples]:
        """Yield batches of examples by their places in ``indices``."""
        indices = indices.to(self.local.split.images.device)
        for batch in index_batches:
            yield self.local.examples(indices[batch.to(indices.device)], generator)
            self.local.beat()


@dataclass(frozen=True)
class ClientTraining:
    """One client's training by a method, in the place of `LocalTraining`.

    Args:
        client: Number of the client.
        method: Method that trains the client.
    """

    client: int
    method: Method

    @property
    def model(self) -> nn.Module:
        """Module of the model that travels."""
        return self.method.local.model

    @property
    def layout(self) -> Layout:
        """Layout of the model that travels."""
        return self.method.local.layout

    def run(self, start: Tensor, indices: Tensor, *, lr: float, seed: int) -> Trained:
        """Train the client, and return the model that travels, in the layout's order."""
        with counters_restored(self.model), counters_restored(self.method.models.networks[self.client].module):
            return self.method.run(self.client, start, indices, lr=lr, seed=seed)


class Tally:
    """Counts what a client saw while it trained."""

    def __init__(self) -> None:
        self.num_seen = 0
        self.num_steps = 0
        self._sums: Tensor | float = 0.0

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Take a step's logits of the model that counts, for the cross-entropy and the share classified correctly."""
        self._sums = self._sums + batch_sums(logits.detach(), labels)
        self.num_seen += len(labels)
        self.num_steps += 1

    @property
    def means(self) -> tuple[float, float]:
        """Loss, and share classified correctly."""
        loss, correct = (torch.as_tensor(self._sums).expand(2) / max(1, self.num_seen)).tolist()
        return loss, correct

    def trained(self, began: Start) -> Trained:
        """Return what training leaves behind."""
        return began.trained(*self.means, self.num_steps)


class GlobalModel(Method):
    """One model for all (FedAvg, FedBAT): clients train as ever, and are tested on their own classes."""

    keeps_models = False
    is_shared = True

    def run(self, client: int, start: Tensor, indices: Tensor, *, lr: float, seed: int) -> Trained:
        """Train from what was downloaded."""
        return self.local.run(start, indices, lr=lr, seed=seed)

    def deploy(self, client: int, start: Tensor, indices: Tensor, *, seed: int) -> Network:
        """Put the downloaded model into the module."""
        network = self.models.networks[client]
        network.layout.unflatten_(start, network.module)
        return network


class Local(Method):
    """Every client for itself: nothing travels.

    Args:
        local: How clients train.
        models: The clients' own models.
        lr_ratio: The clients' learning rate, as a multiple of the round's.
    """

    sends = False

    def __init__(self, local: LocalTraining, models: OwnModels, lr_ratio: float = 1.0) -> None:
        super().__init__(local, models)
        self.lr_ratio = lr_ratio

    def run(self, client: int, start: Tensor, indices: Tensor, *, lr: float, seed: int) -> Trained:
        """Train on from the client's own model."""
        own = self.models.load(client, start)
        module, layout = own.network.module, own.network.layout
        engine = TorchEngine(module, self.local.make_optimizer, self.local.precision)
        training = replace(self.local, model=module, layout=layout, engine=engine)
        trained = training.run(own.flat, indices, lr=lr * self.lr_ratio, seed=seed)
        own.flat = trained.flat
        self.models.save(client, own)
        return replace(trained, flat=start.clone(), changes={})

"""What every kind of local training begins with and leaves behind, and the seeds of what is random in it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from types import MappingProxyType
from typing import Protocol

import torch
from torch import Tensor, nn

from fedq.kernels import derive_seed
from fedq.layout import Layout

_NO_METRICS: Mapping[str, float] = MappingProxyType({})


@dataclass(frozen=True)
class RoundContext:
    """What every participant knows of a round.

    Args:
        round: Number of the round, from 0.
        lr: Local learning rate.
        seed: The run's seed.
    """

    round: int
    lr: float
    seed: int

    def local_seed(self, client: int) -> int:
        """Return the seed of everything random in a client's training."""
        return derive_seed(self.seed, "local", self.round, client)

    def uplink_seed(self, client: int) -> int:
        """Return the client's message seed: rotation and index choice shared, rounding noise its own."""
        shared = derive_seed(self.seed, "uplink", self.round)
        return shared | derive_seed(self.seed, "noise", self.round, client) << 32

    def downlink_seed(self) -> int:
        """Return the server's message seed."""
        shared = derive_seed(self.seed, "downlink", self.round)
        return shared | derive_seed(self.seed, "noise", self.round, "server") << 32


@dataclass(frozen=True)
class Trained:
    """What local training leaves behind.

    Args:
        flat: The trained model in the layout's order, float32.
        loss: Mean training loss over the examples seen.
        accuracy: Share of the examples seen that were classified correctly while training.
        num_steps: Number of optimizer steps; 0 where they are not counted.
        changes: What training changed in the tensors that are not float32, by name: there ``flat`` less the model that
            training was given holds the rounding of that model too.
    """

    flat: Tensor
    loss: float
    accuracy: float
    num_steps: int
    changes: Mapping[str, Tensor] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Means of what a training of the user's own has measured, by name, the loss among them."""


class Start:
    """The beginning of a training: writes a flat model into a module, and knows afterwards what training changed.

    Args:
        layout: The module's layout.
        model: The module.
        flat: The flat model that training starts from, float32.

    Raises:
        FieldError: A parameter was frozen or unfrozen since the module was laid out; the text names it.
    """

    def __init__(self, layout: Layout, model: nn.Module, flat: Tensor) -> None:
        layout.check_trained(model)
        layout.unflatten_(flat, model)
        self._layout = layout
        self._model = model
        self._held = layout.held(model)

    def trained(
        self, loss: float, accuracy: float, num_steps: int, metrics: Mapping[str, float] = _NO_METRICS
    ) -> Trained:
        """Return what training has left in the module.

        Raises:
            FieldError: Training froze or unfroze a parameter; the text names it.
        """
        layout, model = self._layout, self._model
        layout.check_trained(model)
        return Trained(layout.flatten(model), loss, accuracy, num_steps, layout.changes(model, self._held), metrics)


class Training(Protocol):
    """How one client trains."""

    @property
    def model(self) -> nn.Module:
        """A module like the model that travels; after training it may hold what was trained."""

    @property
    def layout(self) -> Layout:
        """The module's layout."""

    def run(self, start: Tensor, context: RoundContext, client: int) -> Trained:
        """Train client number ``client`` from a flat model in a round, with the seed `RoundContext.local_seed`."""


class ExampleTraining(Protocol):
    """How any client trains on examples that it is told: `LocalTraining`, or a method that gives clients models of
    their own as well."""

    @property
    def model(self) -> nn.Module:
        """A module like the model that travels; after training it may hold what was trained."""

    @property
    def layout(self) -> Layout:
        """The module's layout."""

    def run(self, start: Tensor, indices: Tensor, *, lr: float, seed: int) -> Trained:
        """Train from a flat model on the examples at ``indices``; everything random follows from ``seed``."""


@dataclass(frozen=True)
class OnExamples:
    """A client's training on its own share of the examples.

    Args:
        training: How clients train.
        indices: Places of the client's examples.
    """

    training: ExampleTraining
    indices: Tensor

    @property
    def model(self) -> nn.Module:
        """The module that is trained."""
        return self.training.model

    @property
    def layout(self) -> Layout:
        """The module's layout."""
        return self.training.layout

    def run(self, start: Tensor, context: RoundContext, client: int) -> Trained:
        """Train on the client's examples."""
        return self.training.run(start, self.indices, lr=context.lr, seed=context.local_seed(client))


def seeded(seed: int) -> torch.Generator:
    """Seed torch (dropout draws from it), and return a generator of the same seed for batches and augmentation."""
    seed_torch(seed)
    return torch.Generator().manual_seed(seed)


def seed_torch(seed: int) -> None:
    """Set the seed of torch's own random numbers, as `torch.manual_seed`, which asks in vain for GPUs every time."""
    if _has_accelerator():
        torch.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)


@cache
def _has_accelerator() -> bool:
    return torch.accelerator.is_available()


def is_finite(values: Tensor) -> bool:
    """Say whether no value is NaN or infinite: one pass and no temporary, ten times faster than `torch.isfinite`.

    A NaN anywhere makes both the smallest and the largest value NaN.
    """
    return not values.numel() or bool(torch.stack(torch.aminmax(values)).isfinite().all())


@contextmanager
def counters_restored(model: nn.Module) -> Iterator[None]:
    """Put integer buffers back at the end, also of a training that fails: never averaged, no client's may stay."""
    counters = [buffer for buffer in model.buffers() if not (buffer.is_floating_point() or buffer.is_complex())]
    before = [counter.clone() for counter in counters]
    try:
        yield
    finally:
        for counter, value in zip(counters, before, strict=True):
            counter.copy_(value)

"""How a client trains a classifier on its own images, with an engine that takes the steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedq.data import Split, augment, batches, normalize
from fedq.engines import Engine, MakeOptimizer, Precision, TorchEngine
from fedq.federated.training import Start, Trained, counters_restored, seeded
from fedq.layout import Layout


@dataclass(frozen=True)
class Passed:
    """What some steps saw.

    Args:
        loss_sum: Sum of the training loss over the examples seen.
        num_correct: How many of them were classified correctly while training.
        num_seen: Number of examples seen.
        num_steps: Number of optimizer steps.
    """

    loss_sum: float
    num_correct: float
    num_seen: int
    num_steps: int

    def __add__(self, other: Passed) -> Passed:
        return Passed(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    @property
    def loss(self) -> float:
        """Mean training loss."""
        return self.loss_sum / max(1, self.num_seen)

    @property
    def accuracy(self) -> float:
        """Share that was classified correctly."""
        return self.num_correct / max(1, self.num_seen)


@dataclass(frozen=True)
class LocalTraining:
    """How a client trains: its own images, with optimizer state that is new each round.

    Args:
        model: A module to train in; its values are overwritten.
        layout: The model's layout.
        split: Training images and labels of all clients, on the model's device or mapped from disk.
        mean: Channel means of pixels in 0..1.
        std: Channel standard deviations.
        make_optimizer: Returns an optimizer for parameters and a learning rate.
        precision: Arithmetic of forward and backward.
        batch_size: Images a step; a smaller client uses a smaller batch.
        epochs: Passes over the client's images.
        steps: Optimizer steps a round, instead of ``epochs``; None: whole epochs.
        prox_mu: Factor of FedProx (Li et al. 2020), which adds ``prox_mu · (w - w_0)`` to the gradient.
        augment: Whether images are cropped at random, with padding 4.
        flip: Whether augmentation also flips images horizontally at random.
        beat: Function that is called after every step, as a sign of life.
        engine: Engine that takes the steps; default: plain PyTorch, with ``make_optimizer`` and ``precision``.
    """

    model: nn.Module
    layout: Layout
    split: Split
    mean: tuple[float, ...]
    std: tuple[float, ...]
    make_optimizer: MakeOptimizer
    precision: Precision
    batch_size: int = 32
    epochs: int = 1
    steps: int | None = None
    prox_mu: float = 0.0
    augment: bool = True
    flip: bool = False
    beat: Callable[[], None] = lambda: None
    engine: Engine | None = None

    @cached_property
    def steps_by(self) -> Engine:
        """What takes the steps: the engine given, or plain PyTorch."""
        return self.engine or TorchEngine(self.model, self.make_optimizer, self.precision)

    def run(self, start: Tensor, indices: Tensor, *, lr: float, seed: int) -> Trained:
        """Train from a flat model on the images at ``indices``; everything random follows from ``seed``."""
        began = Start(self.layout, self.model, start)
        generator = seeded(seed)
        self.steps_by.start(lr)
        with counters_restored(self.model):
            passed = self._train_round(indices, generator)
        self.steps_by.finish()
        return began.trained(passed.loss, passed.accuracy, passed.num_steps)

    def _train_round(self, indices: Tensor, generator: torch.Generator) -> Passed:
        return self.train(indices, self.index_batches(len(indices), generator), generator)

    def train(self, indices: Tensor, index_batches: Sequence[Tensor], generator: torch.Generator) -> Passed:
        """Take a step for each batch, with an engine that was started.

        Args:
            indices: Places in the split of the examples that may be used.
            index_batches: Places in ``indices``, a tensor for each step.
            generator: Random generator of the augmentation.
        """
        engine, device, where = self.steps_by, next(self.model.parameters()).device, self.split.images.device
        params = [p for p in self.model.parameters() if p.requires_grad]
        anchors = [p.detach().clone() for p in params] if self.prox_mu else []
        indices = indices.to(where)
        seen, totals = 0, torch.zeros(2, dtype=torch.float64, device=device)
        self.model.train()
        for batch in index_batches:
            x, y = self.examples(indices[batch.to(where)], generator)
            logits = engine.forward(x)
            loss = functional.cross_entropy(logits, y)
            engine.backward(loss)
            if anchors:
                engine.unscale()
                self._pull(params, anchors)
            engine.step()
            totals += torch.stack((loss.detach() * len(y), (logits.argmax(1) == y).sum())).to(torch.float64)
            seen += len(y)
            self.beat()
        loss_sum, num_correct = totals.tolist()
        return Passed(loss_sum, num_correct, seen, len(index_batches))

    def _pull(self, params: list[nn.Parameter], anchors: list[Tensor]) -> None:
        """Add the gradient of the proximal term."""
        for param, anchor in zip(params, anchors, strict=True):
            if param.grad is not None:
                param.grad.add_(param.detach() - anchor, alpha=self.prox_mu)

    def index_batches(self, num: int, generator: torch.Generator) -> list[Tensor]:
        """Return the round's index batches: whole epochs, or exactly ``steps`` batches."""
        result: list[Tensor] = []
        if self.steps is None:
            for _ in range(self.epochs):
                result += batches(num, self.batch_size, generator=generator)
            return result
        while len(result) < self.steps:
            result += batches(num, self.batch_size, generator=generator)
        return result[: self.steps]

    def examples(self, picked: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return images of the split, augmented and normalised, and their labels, on the model's device."""
        device = next(self.model.parameters()).device
        images, labels = self.split.images[picked], self.split.labels[picked]
        return self.inputs(images.to(device), generator), labels.to(device)

    def inputs(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Return images as the model takes them, augmented."""
        if self.augment:
            images = augment(images, generator=generator, flip=self.flip)
        return normalize(images, self.mean, self.std, channels_last=self.precision.channels_last)

"""One client: local training from the replica, and the message that its update becomes.

Nothing here knows ranks or transports; the same client runs in one process, over a process group, or across a
network. Which client runs where is decided by the rounds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import cache, cached_property
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedq.data import Split, augment, batches, normalize
from fedq.engines import Engine, MakeOptimizer, Precision, TorchEngine
from fedq.feedback import Feedback
from fedq.kernels import derive_seed
from fedq.layout import Layout, LayoutSchedule
from fedq.wire import Frame, Kind, join_payloads

_MAX_ERROR_NBYTES = 500


@dataclass(frozen=True)
class Trained:
    """What local training leaves behind.

    Args:
        flat: The trained model in the layout's order, float32.
        loss: Mean training loss over the examples seen.
        accuracy: Share of them that were classified correctly while training.
        num_steps: Optimizer steps.
        changes: What training changed in the tensors that are not float32, by name: there ``flat`` less the model that
            training was given holds the rounding of that model too.
    """

    flat: Tensor
    loss: float
    accuracy: float
    num_steps: int
    changes: Mapping[str, Tensor] = field(default_factory=dict)


class Start:
    """The beginning of a training: writes a flat model into a module, and knows afterwards what training changed.

    Args:
        layout: The module's layout.
        model: The module.
        flat: The model.

    Raises:
        FieldError: A parameter was frozen or unfrozen since the module was laid out; the text names it.
    """

    def __init__(self, layout: Layout, model: nn.Module, flat: Tensor) -> None:
        layout.check_trained(model)
        layout.unflatten_(flat, model)
        self._layout = layout
        self._model = model
        self._held = layout.held(model)

    def trained(self, loss: float, accuracy: float, num_steps: int) -> Trained:
        """Return what training has left in the module.

        Raises:
            FieldError: Training froze or unfroze a parameter; the text names it.
        """
        layout, model = self._layout, self._model
        layout.check_trained(model)
        return Trained(layout.flatten(model), loss, accuracy, num_steps, layout.changes(model, self._held))


@dataclass(frozen=True)
class Passed:
    """What some steps saw.

    Args:
        loss_sum: Sum of the training loss over the examples seen.
        num_correct: How many of them were classified correctly while training.
        num_seen: Examples.
        num_steps: Optimizer steps.
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


class Training(Protocol):
    """How a client trains: `LocalTraining`, or a method that gives clients models of their own as well."""

    @property
    def model(self) -> nn.Module:
        """A module like the model that travels; after training it may hold what was trained."""

    @property
    def layout(self) -> Layout:
        """Its layout."""

    def run(self, start: Tensor, indices: Tensor, *, lr: float, seed: int) -> Trained:
        """Train from a flat model on the images at ``indices``; everything random follows from ``seed``."""


@dataclass(frozen=True)
class LocalTraining:
    """How a client trains: its own images, with optimizer state that is new each round.

    Args:
        model: A module to train in; its values are overwritten.
        layout: The model's layout.
        split: Training images and labels of all clients, on the model's device or mapped from disk.
        mean: Channel means of pixels in 0..1.
        std: Channel standard deviations.
        make_optimizer: From parameters and learning rate to an optimizer.
        precision: Arithmetic of forward and backward.
        batch_size: Images a step; a smaller client uses a smaller batch.
        epochs: Passes over the client's images.
        steps: Optimizer steps instead of ``epochs``.
        prox_mu: FedProx (Li et al. 2020): adds ``prox_mu · (w - w_0)`` to the gradient.
        augment: Random crop with padding 4.
        flip: Random horizontal flip too.
        beat: Called after every step, as a sign of life.
        engine: What takes the steps; default: plain PyTorch, with ``make_optimizer`` and ``precision``.
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
            indices: The examples that may be used.
            index_batches: For each step, places in ``indices``.
            generator: Of the augmentation.
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


@dataclass(frozen=True)
class RoundContext:
    """What every participant knows of a round.

    Args:
        round: Number, from 0.
        lr: Local learning rate.
        seed: The run's seed.
    """

    round: int
    lr: float
    seed: int

    def uplink_seed(self, client: int) -> int:
        """Return the client's message seed: rotation and index choice shared, rounding noise its own."""
        shared = derive_seed(self.seed, "uplink", self.round)
        return shared | derive_seed(self.seed, "noise", self.round, client) << 32

    def downlink_seed(self) -> int:
        """Return the server's message seed."""
        shared = derive_seed(self.seed, "downlink", self.round)
        return shared | derive_seed(self.seed, "noise", self.round, "server") << 32


@dataclass(frozen=True)
class Client:
    """A member of the federation.

    Args:
        number: From 0.
        indices: Its training examples.
        training: How it trains.
        uplink: Layouts of its updates, by round.
        feedback: What encodes its updates.
    """

    number: int
    indices: Tensor
    training: Training
    uplink: LayoutSchedule
    feedback: Feedback

    def train(self, replica: Tensor, context: RoundContext) -> Trained:
        """Train from the replica in this round."""
        return self.training.run(replica, self.indices, lr=context.lr, seed=self.local_seed(context))

    def local_seed(self, context: RoundContext) -> int:
        """Return the seed of everything random in this round's training."""
        return derive_seed(context.seed, "local", context.round, self.number)

    def message(self, update: Tensor, trained: Trained, context: RoundContext, *, memory: float = 1.0) -> Frame:
        """Return the update as a frame; one with a NaN or infinity becomes a frame that says so, without a body.

        The residual changes only when an update is sent; ``memory`` is the share of the old one that counts.
        """
        if not is_finite(update):
            empty = torch.empty(0, dtype=torch.uint8, device=update.device)
            return self._frame(Kind.LEFT_OUT, context, trained.loss, trained.accuracy, empty)
        seed, layout = context.uplink_seed(self.number), self.uplink.at(context.round)
        body = join_payloads(layout, self.feedback.encode(self.number, layout, update, seed=seed, memory=memory))
        return self._frame(Kind.UPDATE, context, trained.loss, trained.accuracy, body)

    def report(self, trained: Trained, context: RoundContext) -> Frame:
        """Return a frame without an update, where none is sent: how training went."""
        return self._frame(Kind.UPDATE, context, trained.loss, trained.accuracy, torch.empty(0, dtype=torch.uint8))

    def failure(self, error: Exception, context: RoundContext) -> Frame:
        """Return the frame that says why there is no update."""
        text = f"{type(error).__name__}: {error}".encode()[:_MAX_ERROR_NBYTES]
        body = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        return self._frame(Kind.FAILED, context, math.nan, math.nan, body)

    def _frame(self, kind: Kind, context: RoundContext, loss: float, accuracy: float, body: Tensor) -> Frame:
        return Frame(
            kind=kind,
            round=context.round,
            client=self.number,
            layout_hash=self.uplink.at(context.round).hash,
            seed=context.uplink_seed(self.number),
            weight=float(len(self.indices)),
            loss=loss,
            accuracy=accuracy,
            body=body,
        )

"""Methods in which a client's own model and its copy of the global one learn from each other: mutual learning, QuPeD,
and QuPeL, which ties them by their distance instead.

Both models see the same batches. The own model may have another architecture (not with QuPeL) and few bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from fedq.federated.image_training import LocalTraining
from fedq.federated.training import Start, Trained, seeded
from fedq.personalize.learners import Learner, Pull, Quantization, make_learner
from fedq.personalize.methods import Method, Tally
from fedq.personalize.own_models import OwnModel, OwnModels


def divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return ``T^2 KL(softmax(teacher/T) || softmax(student/T))``, the mean over the batch (Hinton et al. 2015).

    Both sides are divided by ``T``; the factor keeps the gradient's size. Either may have a gradient.

    Args:
        student: Logits [N, classes].
        teacher: Logits [N, classes].
        temperature: Temperature ``T``, above 0.
    """
    log_p, log_q = ((logits / temperature).log_softmax(1) for logits in (teacher, student))
    return temperature**2 * (log_p.exp() * (log_p - log_q)).sum(1).mean()


@dataclass(frozen=True)
class Distillation:
    """``(1 - weight) CE + weight T^2 KL``.

    Args:
        weight: Weight ``lambda_p`` of the divergence, 0 to 1.
        temperature: Temperature ``T`` of the divergence, above 0.
    """

    weight: float
    temperature: float = 1.0

    def loss(self, logits: Tensor, labels: Tensor, teacher: Tensor) -> Tensor:
        """Return the loss of a student; the teacher is taken as it is."""
        cross_entropy = functional.cross_entropy(logits, labels)
        if self.weight == 0:
            return cross_entropy
        distilled = divergence(logits, teacher.detach(), self.temperature)
        return (1 - self.weight) * cross_entropy + self.weight * distilled


class Mutual(Method):
    """Mutual learning of a client's own model and its copy of the global one.

    Deep mutual learning (Zhang et al. 2018, arXiv 1706.00384), federated as in FML (Shen et al. 2020, arXiv
    2006.16765): each minimises `Distillation` with the other as its teacher, in the same step.

    Args:
        local: How the global model is trained.
        models: The clients' own models.
        lr_ratio: Learning rate of the own models, as a multiple of the round's.
        distillation: Weight and temperature of the loss.
    """

    quantization: Quantization | None = None

    def __init__(self, local: LocalTraining, models: OwnModels, lr_ratio: float, distillation: Distillation) -> None:
        super().__init__(local, models)
        self.lr_ratio = lr_ratio
        self.distillation = distillation

    def run(self, client: int, start: Tensor, indices: Tensor, *, lr: float, seed: int) -> Trained:
        """Train both models; loss and accuracy are those of the client's own float model."""
        local, tally, generator = self.local, Tally(), seeded(seed)
        began = Start(local.layout, local.model, start)
        local.model.train()
        engine = local.steps_by
        engine.start(lr)
        learner = self.learner(client, self.models.load(client, start), lr)
        for images, labels in self.examples(indices, generator):
            logits = engine.forward(images)
            own = learner.step(images, partial(self.distillation.loss, labels=labels, teacher=logits.detach()))
            engine.backward(self.global_loss(logits, labels, own))
            engine.step()
            tally.add(own[0], labels)
        engine.finish()
        self.models.save(client, learner.finish())
        return tally.trained(began)

    def learner(self, client: int, own: OwnModel, lr: float) -> Learner:
        """Return what trains the client's own model in this round."""
        bits = self.models.bits[client]
        return make_learner(own, self.local, lr * self.lr_ratio, bits, self.quantization, self.round)

    def global_loss(self, logits: Tensor, labels: Tensor, own: list[Tensor]) -> Tensor:
        """Return the loss of the copy of the global model.

        Args:
            logits: Logits of the copy of the global model.
            labels: Labels of the batch.
            own: Logits of the client's float model, and of its quantized one if there is one.
        """
        return self.distillation.loss(logits, labels, own[0])


class QuPeD(Mutual):
    """Quantized personalization by distillation (Ozkara et al. 2021, arXiv 2107.13892, Algorithm 2).

    With ``KD(x, w) = T^2 KL(w's softmax || x's softmax)`` a client minimises

    ``F(x, c, w) = (1 - lp) [f(x) + f(Q_c(x))] + lambda R(x, c) + lp [KD(x, w) + KD(Q_c(x), w)]``

    by steps of its weights ``x`` and its centres ``c`` (`learners`), and of its copy ``w`` of the global model, which
    alone travels: along ``lp grad_w [KD(x, w) + KD(Q_c(x), w)]``, and with ``global_loss="mutual"`` along
    ``(1 - lp) grad f(w)`` as well. A float client has neither ``c`` nor the terms of ``Q_c``. Clients are tested with
    ``Q_c(x)``.

    Args:
        local: How ``w`` is trained.
        models: The clients' own models.
        lr_ratio: Learning rate of ``x``, as a multiple of the round's.
        distillation: Weight ``lp`` and temperature ``T``.
        quantization: How quantized models learn; None: all learn as float models.
        global_loss: Loss of ``w``: ``distill``, that of ``F``, or ``mutual``, with the cross-entropy of ``w`` as well.
    """

    def __init__(
        self,
        local: LocalTraining,
        models: OwnModels,
        lr_ratio: float,
        distillation: Distillation,
        quantization: Quantization | None = None,
        global_loss: Literal["mutual", "distill"] = "mutual",
    ) -> None:
        super().__init__(local, models, lr_ratio, distillation)
        self.quantization = quantization
        self.with_labels = global_loss == "mutual"

    def global_loss(self, logits: Tensor, labels: Tensor, own: list[Tensor]) -> Tensor:
        """Return ``lp`` times the divergences from the copy to the own models, and its cross-entropy."""
        weight, temperature = self.distillation.weight, self.distillation.temperature
        loss = weight * sum(divergence(student, logits, temperature) for student in own)
        if self.with_labels:
            loss = loss + (1 - weight) * functional.cross_entropy(logits, labels)
        return torch.as_tensor(loss)


class QuPeL(Method):
    """Quantized personalization with a squared distance (Ozkara et al. 2021, arXiv 2102.11786).

    ``F(x, c, w) = f(x) + f(Q_c(x)) + lambda R(x, c) + lp/2 |Q_c(x) - w|^2`` over the parameters, which all clients have
    alike. The distance's gradient ``lp (Q_c(x) - w)`` is added to that of ``x`` as it is, and summed over the members
    of each centre to that of ``c``; then ``w <- w - lr lp (w - Q_c(x))``, a plain step. As ``w`` never sees an image,
    its statistics of normalisation layers are those of ``x``. The published method's schedules are unknown: rates, and
    the moment at which weights become centres, are those of QuPeD here.

    Args:
        local: Local training, which gives optimizer and batches.
        models: The clients' own models.
        lr_ratio: Learning rate of ``x``, as a multiple of the round's.
        weight: Weight ``lp`` of the squared distance.
        quantization: How quantized models learn; None: all learn as float models.
    """

    def __init__(
        self,
        local: LocalTraining,
        models: OwnModels,
        lr_ratio: float,
        weight: float,
        quantization: Quantization | None = None,
    ) -> None:
        super().__init__(local, models)
        self.lr_ratio = lr_ratio
        self.weight = weight
        self.quantization = quantization

    def run(self, client: int, start: Tensor, indices: Tensor, *, lr: float, seed: int) -> Trained:
        """Train both models; loss and accuracy are those of the client's own float model."""
        local, tally, generator = self.local, Tally(), seeded(seed)
        own, bits = self.models.load(client, start), self.models.bits[client]
        learner = make_learner(own, local, lr * self.lr_ratio, bits, self.quantization, self.round)
        flat = start.clone()
        views = local.layout.views(flat)
        anchors = [views[name] for name in learner.params]
        for images, labels in self.examples(indices, generator):
            loss = partial(functional.cross_entropy, target=labels)
            logits, *_ = learner.step(images, loss, Pull(self.weight, anchors))
            torch._foreach_lerp_(anchors, learner.values(), lr * self.weight)
            tally.add(logits, labels)
        own = learner.finish()
        self.models.save(client, own)
        statistics = slice(local.layout.num_params, local.layout.numel)
        flat[statistics] = own.flat[statistics]
        local.layout.unflatten_(flat, local.model)
        return Trained(flat, *tally.means, tally.num_steps)

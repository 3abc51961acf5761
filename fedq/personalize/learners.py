"""How a client's own model takes a step: a float one, one with learned centres, and one whose weights are its centres.

The methods say what the loss is, and what else pulls.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fedq.engines import TorchEngine
from fedq.federated.image_training import LocalTraining
from fedq.layout import plain_name
from fedq.lowbit.centres import Centres, CentreSchedule, CentreStep, QuantizedPass, inner_weights
from fedq.personalize.own_models import OwnModel

_log = logging.getLogger(__name__)

Loss = Callable[[Tensor], Tensor]
"""Returns the loss of logits."""


@dataclass(frozen=True)
class Quantization:
    """How quantized models learn.

    Args:
        schedule: Rates of the centres and of the pull to them by round, and when weights become centres.
        regularizer: Distance to the nearest centre that is penalised; see `CentreStep`.
        sign: Sign of the penalty in the l1 step of the centres; see `CentreStep`.
        centres: Whether centres are ``learned`` or ``fixed``; see `CentreStep`.
    """

    schedule: CentreSchedule
    regularizer: Literal["l1", "l2"] = "l1"
    sign: Literal["corrected", "published"] = "corrected"
    centres: Literal["learned", "fixed"] = "learned"

    def step(self, bits: int) -> CentreStep:
        """Return the options of both proximal steps."""
        return CentreStep(bits, regularizer=self.regularizer, sign=self.sign, centres=self.centres)


@dataclass(frozen=True)
class Pull:
    """``weight/2 |Q(x) - w|^2`` over parameters.

    Args:
        weight: Weight of the squared distance.
        anchors: Values of ``w``, in the order of `Learner.params`.
    """

    weight: float
    anchors: Sequence[Tensor]


class Learner:
    """Trains a client's float model.

    Args:
        own: The client's own model; `finish` writes the trained values into it.
        local: Local training, which gives optimizer and arithmetic.
        lr: Learning rate of the parameters.

    Attributes:
        params: The parameters that the model's layout has, by name: what the user has frozen is none of them.
    """

    def __init__(self, own: OwnModel, local: LocalTraining, lr: float) -> None:
        self.own = own
        self.module = own.fill(quantized=self.is_frozen)
        self.lr = lr
        named = {plain_name(name): param for name, param in self.module.named_parameters()}
        self.params = {span.name: named[span.name] for span in own.network.layout.spans if span.name in named}
        fixed = list(inner_weights(self.module).values()) if self.is_frozen else []
        for param in self.params.values():  # the optimizer takes those that require a gradient
            param.requires_grad_(all(param is not weight for weight in fixed))
        self.engine = TorchEngine(self.module, local.make_optimizer, local.precision)
        self.engine.start(lr)
        self.module.train()

    is_frozen = False
    """Whether weights are centres and stay where they are."""

    def step(self, images: Tensor, loss: Loss, pull: Pull | None = None) -> list[Tensor]:
        """Take a step.

        Returns:
            The logits of each model that the loss was taken of: the float one, then the quantized one if there is one.
        """
        logits = self.engine.forward(images)
        self.engine.backward(loss(logits))
        if pull is not None:
            self.engine.unscale()
            self._pull(pull)
        self.engine.step()
        return [logits.detach()]

    def values(self) -> list[Tensor]:
        """Return ``Q(x)``: the parameters as deployed, in the order of `params`."""
        return [param.detach() for param in self.params.values()]

    def finish(self) -> OwnModel:
        """Let go of the optimizer's state, and return the trained model."""
        self.engine.finish()
        for param in self.params.values():
            param.requires_grad_(True)
        self.own.flat = self.own.network.layout.flatten(self.module)
        return self.own

    def _pull(self, pull: Pull) -> None:
        for param, value, anchor in zip(self.params.values(), self.values(), pull.anchors, strict=True):
            if param.grad is not None:
                param.grad.add_(value - anchor, alpha=pull.weight)


class QuantizedLearner(Learner):
    """Trains a float model and the centres of its quantized one (QuPeD, arXiv 2107.13892, Algorithm 2).

    A step is a step of the optimizer on the float model and the proximal step towards the centres, then, with the
    same loss of the quantized model, the proximal step of the centres.

    Args:
        own: The client's own model, with its centres.
        local: Local training, which gives optimizer and arithmetic.
        lr: Learning rate ``e_1`` of the weights.
        step: Options of the proximal steps.
        centre_lr: Learning rate ``e_2`` of the centres.
        regularizer_weight: Weight ``lambda`` of the regularizer in this round.
    """

    def __init__(
        self,
        own: OwnModel,
        local: LocalTraining,
        lr: float,
        *,
        step: CentreStep,
        centre_lr: float,
        regularizer_weight: float,
    ) -> None:
        super().__init__(own, local, lr)
        assert own.centres is not None
        self.centres: Centres = own.centres
        self.options = step
        self.centre_lr = centre_lr
        self.regularizer_weight = regularizer_weight

    def step(self, images: Tensor, loss: Loss, pull: Pull | None = None) -> list[Tensor]:
        """Take a step of the weights, and one of the centres."""
        outputs = super().step(images, loss, pull)
        strength = self.regularizer_weight
        self.centres.prox_weights_(self.module, strength * self.lr, self.options)
        learns = self.options.centres == "learned"
        with QuantizedPass(self.module, self.centres) as quantized, torch.set_grad_enabled(learns):
            logits = self.engine.forward(images)  # with fixed centres for the statistics alone
            gradients = quantized.gradients(loss(logits)) if learns else {}
            if pull is not None and learns:
                self._pull_centres(pull, quantized, gradients)
        self.centres.update(
            quantized, gradients, lr=self.centre_lr, strength=strength * self.centre_lr, step=self.options
        )
        return [*outputs, logits.detach()]

    def values(self) -> list[Tensor]:
        """Return the parameters, those of inner layers at their centres, in the order of `params`."""
        values: list[Tensor] = []
        with QuantizedPass(self.module, self.centres):
            values = [param.detach().clone() for param in self.params.values()]
        return values

    def finish(self) -> OwnModel:
        """Report centres that collapsed, and return the trained model."""
        for line in self.centres.take_reports():
            _log.warning("centres of %s", line)
        return super().finish()

    def _pull_centres(self, pull: Pull, quantized: QuantizedPass, gradients: dict[str, Tensor]) -> None:
        """Add the pull's gradient with respect to quantized weights, inside the pass."""
        anchors = dict(zip(self.params, pull.anchors, strict=True))
        for name, weight in quantized.weights.items():
            gradients[name] = gradients[name] + pull.weight * (weight.detach() - anchors[f"{name}.weight"])


class FrozenLearner(Learner):
    """Trains what is left of a quantized model whose weights are its centres for good."""

    is_frozen = True

    def finish(self) -> OwnModel:
        """Return the trained model, whose statistics are the quantized one's."""
        own = super().finish()
        assert own.centres is not None
        own.centres.statistics = {name: buffer.detach().clone() for name, buffer in self.module.named_buffers()}
        return own


def make_learner(
    own: OwnModel, local: LocalTraining, lr: float, bits: int, quantization: Quantization | None, round: int
) -> Learner:
    """Return what trains a client's own model in a round."""
    if own.centres is None or quantization is None:
        return Learner(own, local, lr)
    schedule = quantization.schedule
    if round >= schedule.freeze_epoch:
        return FrozenLearner(own, local, lr)
    return QuantizedLearner(
        own,
        local,
        lr,
        step=quantization.step(bits),
        centre_lr=schedule.lr(round),
        regularizer_weight=schedule.weight(round),
    )

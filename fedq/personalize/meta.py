"""Methods whose personal models lie a few steps from the global one: Per-FedAvg and pFedMe."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedq.engines import TorchEngine
from fedq.engines.optimizers import lean
from fedq.federated.image_training import LocalTraining
from fedq.federated.training import Start, Trained, counters_restored, seeded
from fedq.personalize.methods import Method, Tally
from fedq.personalize.own_models import Network, OwnModels


class PerFedAvg(Method):
    """A global model that is good after a step (Fallah et al. 2020, arXiv 2002.07948, Algorithm 1, first order).

    Each local step: ``v = w - alpha grad f(w; D)``, then a step of the optimizer on ``w`` along ``grad f(v; D')``;
    ``D'`` is the batch after ``D`` (the last is followed by the first). The factor ``I - alpha hessian`` of the exact
    gradient is left out (FO). A client is tested with the global model after ``steps`` plain steps of rate ``alpha`` on
    its own batches.

    Args:
        local: How the global model is trained.
        models: Networks of the clients, into which the tested models are put.
        rate: Learning rate ``alpha`` of the inner steps.
        steps: Number of steps from the global model to a client's.
    """

    keeps_models = False

    def __init__(self, local: LocalTraining, models: OwnModels, rate: float, steps: int) -> None:
        super().__init__(local, models)
        self.rate = rate
        self.steps = steps

    def run(self, client: int, start: Tensor, indices: Tensor, *, lr: float, seed: int) -> Trained:
        """Train the global model for one step less; loss and accuracy are those after the inner step."""
        local, tally, generator = self.local, Tally(), seeded(seed)
        model, outer = local.model, local.steps_by
        began = Start(local.layout, model, start)
        model.train()
        inner = self._inner(model)
        outer.start(lr)
        params = [param.detach() for param in model.parameters() if param.requires_grad]
        order = local.index_batches(len(indices), generator)
        pairs = [batch for pair in zip(order, order[1:] + order[:1], strict=True) for batch in pair]
        examples = self.draw(indices, pairs, generator)
        for images, labels in examples:
            before = [param.clone() for param in params]
            inner.backward(functional.cross_entropy(inner.forward(images), labels))
            inner.step()
            images, labels = next(examples)
            logits = outer.forward(images)
            outer.backward(functional.cross_entropy(logits, labels))
            torch._foreach_copy_(params, before)
            outer.step()
            tally.add(logits, labels)
        outer.finish()
        return tally.trained(began)

    def deploy(self, client: int, start: Tensor, indices: Tensor, *, seed: int) -> Network:
        """Put the global model after a few steps on the client's batches into the module."""
        network, generator = self.models.networks[client], seeded(seed)
        network.layout.unflatten_(start, network.module)
        network.module.train()
        engine = self._inner(network.module)
        with counters_restored(network.module):
            for images, labels in self.draw(indices, self._batches(len(indices), generator), generator):
                engine.backward(functional.cross_entropy(engine.forward(images), labels))
                engine.step()
        return network

    def _batches(self, num: int, generator: torch.Generator) -> list[Tensor]:
        order: list[Tensor] = []
        while num and len(order) < self.steps:
            order += self.local.index_batches(num, generator)
        return order[: self.steps]

    def _inner(self, model: nn.Module) -> TorchEngine:
        engine = TorchEngine(model, _plain_sgd, self.local.precision)
        engine.start(self.rate)
        return engine


class PFedMe(Method):
    """Personal models tied to the global one by a Moreau envelope (Dinh et al. 2020, arXiv 2006.08848, Algorithm 1).

    For each batch ``theta ~ argmin f(theta; batch) + lambda/2 |theta - w|^2`` by ``steps`` steps of the local optimizer
    with a rate of its own, from where the last batch left ``theta`` (at first ``w``), and then
    ``w <- w - lr lambda (w - theta)``. A client is tested with its ``theta``. Statistics of normalisation layers are
    those of ``theta``'s passes, in both models. The paper's mixing at the server, ``beta``, is ``--server fedavg:lr=``.

    Args:
        local: Local training, which gives optimizer and batches.
        models: The clients' own models, the ``theta``.
        rate: Learning rate of the inner steps.
        steps: Number of inner steps on a batch.
        attachment: Weight ``lambda`` of the squared distance to the global model.
    """

    def __init__(self, local: LocalTraining, models: OwnModels, rate: float, steps: int, attachment: float) -> None:
        super().__init__(local, models)
        self.rate = rate
        self.steps = steps
        self.attachment = attachment

    def run(self, client: int, start: Tensor, indices: Tensor, *, lr: float, seed: int) -> Trained:
        """Train both models; loss and accuracy are those of ``theta`` before a batch's inner steps."""
        local, tally, generator = self.local, Tally(), seeded(seed)
        model, engine = local.model, local.steps_by
        began = Start(local.layout, model, start)
        model.train()
        params = [param for param in model.parameters() if param.requires_grad]
        thetas = [param.detach() for param in params]
        anchors = [theta.clone() for theta in thetas]
        engine.start(self.rate)
        for images, labels in self.examples(indices, generator):
            first = None
            for _ in range(self.steps):
                logits = engine.forward(images)
                engine.backward(functional.cross_entropy(logits, labels))
                engine.unscale()
                for param, theta, anchor in zip(params, thetas, anchors, strict=True):
                    assert param.grad is not None
                    param.grad.add_(theta - anchor, alpha=self.attachment)
                engine.step()
                first = logits.detach() if first is None else first
            torch._foreach_lerp_(anchors, thetas, lr * self.attachment)
            if first is not None:
                tally.add(first, labels)
        engine.finish()
        own = self.models.load(client, start)
        own.flat = local.layout.flatten(model)
        self.models.save(client, own)
        torch._foreach_copy_(thetas, anchors)
        return tally.trained(began)


def _plain_sgd(params: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    options: dict[str, Any] = {"fused": True}
    return lean(torch.optim.SGD)(params, lr=lr, **options)

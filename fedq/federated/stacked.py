"""Several clients trained side by side: one stacked model, one set of kernels a step instead of one a client.

It computes what `LocalTraining.run` computes for each client by itself, with the same batches and crops, to float
tolerance. It pays where a step is too small to fill the device; on a CPU clients one after another are faster.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap
from torch.nn import functional

from fedq.data import crop_and_flip, draw_crops, normalize
from fedq.federated.image_training import LocalTraining
from fedq.federated.training import Trained, seed_torch
from fedq.layout import difference, plain_name

Named = dict[str, Tensor]


@dataclass(frozen=True)
class _Step:
    """What one client does in one step: examples of the split, and where each image is cropped and flipped."""

    indices: Tensor
    crops: Tensor | None


def can_stack(training: object) -> TypeGuard[LocalTraining]:
    """Return whether clients may share a step: not with float16, whose loss scale would be shared too, nor a model with
    complex numbers."""
    if not isinstance(training, LocalTraining) or training.precision.name == "fp16":
        return False
    return not any(tensor.is_complex() for tensor in training.layout.named_tensors(training.model).values())


def train_stacked(
    training: LocalTraining, start: Tensor, parts: Sequence[Tensor], *, lr: float, seeds: Sequence[int]
) -> list[Trained]:
    """Train several clients from a flat model, each on its own images and with its own seed.

    Clients may differ in size: those whose batches are of one size share a step, and one that has done its last step
    is read out while the others go on. Dropout draws other masks than it does one by one.

    Args:
        training: How each client trains.
        start: The flat model that all start from.
        parts: Indices of each client's examples.
        lr: Local learning rate.
        seeds: A seed for each client, as in `LocalTraining.run`.
    """
    plans = [list(_steps(training, part, seed)) for part, seed in zip(parts, seeds, strict=True)]
    seed_torch(seeds[0])  # dropout
    return _Stack(training, start, len(parts), lr).run(plans)


def _steps(training: LocalTraining, part: Tensor, seed: int) -> Iterator[_Step]:
    """Yield a client's steps, drawn in the order in which one by one draws them."""
    generator = torch.Generator().manual_seed(seed)
    for batch in training.index_batches(len(part), generator):
        crops = draw_crops(len(batch), generator=generator, flip=training.flip) if training.augment else None
        yield _Step(part[batch], crops)


class _Stack:
    """Parameters, buffers and optimizer state of all clients, stacked along a new first dimension."""

    def __init__(self, training: LocalTraining, start: Tensor, num_clients: int, lr: float) -> None:
        self.training = training
        module, layout = training.model, training.layout
        layout.check_trained(module)
        module.train()
        values = layout.views(start)

        def stacked(name: str, like: Tensor) -> Tensor:
            value = values.get(plain_name(name), like).detach().to(like.dtype)
            return value.expand(num_clients, *like.shape).contiguous()

        self.params: Named = {n: nn.Parameter(stacked(n, p)) for n, p in module.named_parameters() if p.requires_grad}
        self.fixed: Named = {n: stacked(n, p) for n, p in module.named_parameters() if not p.requires_grad}
        self.buffers: Named = {n: stacked(n, b) for n, b in module.named_buffers()}
        self.held = {name: values[name].to(tensor.dtype) for name, tensor in layout.held(module).items()}
        self.anchors = {n: p.detach().clone() for n, p in self.params.items()} if training.prox_mu else {}
        self.optimizer = training.make_optimizer(list(self.params.values()), lr)  # type: ignore[arg-type]
        self.totals = torch.zeros(num_clients, 2, dtype=torch.float64, device=start.device)
        self.gradient = vmap(grad_and_value(self._loss, has_aux=True), randomness="different")

    def run(self, plans: list[list[_Step]]) -> list[Trained]:
        left: dict[int, tuple[Tensor, Named]] = {}
        for number in range(max(map(len, plans))):
            active = [k for k, steps in enumerate(plans) if number < len(steps)]
            self._step(active, [plans[k][number] for k in active])
            done = [k for k in active if len(plans[k]) == number + 1]
            left |= zip(done, self._left(done), strict=True)
            self.training.beat()
        nothing = [k for k, steps in enumerate(plans) if not steps]
        left |= zip(nothing, self._left(nothing), strict=True)
        seen = [sum(len(step.indices) for step in steps) for steps in plans]
        means = (self.totals.cpu() / torch.tensor(seen).clamp(min=1).unsqueeze(1)).tolist()
        return [Trained(left[k][0], means[k][0], means[k][1], len(steps), left[k][1]) for k, steps in enumerate(plans)]

    def _step(self, active: list[int], steps: list[_Step]) -> None:
        """Move the active clients by one optimizer step; what happens to the others is never read."""
        for param in self.params.values():
            if param.grad is None:
                param.grad = torch.zeros_like(param)
        by_size = sorted(zip(active, steps, strict=True), key=lambda pair: len(pair[1].indices))
        for _, pairs in groupby(by_size, key=lambda pair: len(pair[1].indices)):
            rows, group = zip(*sorted(pairs, key=lambda pair: pair[0]), strict=True)
            self._backward(list(rows), list(group))
        self.optimizer.step()

    def _backward(self, rows: list[int], steps: list[_Step]) -> None:
        """Write the gradients of clients whose batches have one size."""
        x, y = self._inputs(steps)
        everyone = len(rows) == len(self.totals)
        where = torch.tensor(rows, device=x.device)
        params, fixed, buffers = (
            values if everyone else {n: v.detach()[where] for n, v in values.items()}
            for values in (self.params, self.fixed, self.buffers)
        )
        grads, (loss, correct) = self.gradient({n: p.detach() for n, p in params.items()}, fixed, buffers, x, y)
        for name, grad in grads.items():
            if self.anchors:
                grad = grad + self.training.prox_mu * (params[name].detach() - self.anchors[name][where])
            target = self.params[name].grad
            assert target is not None
            target[where] = grad
        if not everyone:
            for name, buffer in buffers.items():
                self.buffers[name][where] = buffer
        self.totals[where] += torch.stack((loss * y.shape[1], correct), dim=1).to(torch.float64)

    def _loss(self, params: Named, fixed: Named, buffers: Named, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        with self.training.precision.autocast():
            logits = functional_call(self.training.model, params | fixed | buffers, (x,))
            loss = functional.cross_entropy(logits.float(), y)
        return loss, (logits.argmax(1) == y).sum()

    def _inputs(self, steps: list[_Step]) -> tuple[Tensor, Tensor]:
        """Return the clients' batches (clients, batch, ...), gathered, cropped and normalised at once."""
        training, device = self.training, self.totals.device
        picked = torch.cat([step.indices for step in steps]).to(training.split.images.device)
        images = training.split.images[picked].to(device)
        if training.augment:
            images = crop_and_flip(images, *torch.cat([s.crops for s in steps if s.crops is not None], dim=1))
        x = normalize(images, training.mean, training.std)
        shape = (len(steps), len(steps[0].indices))
        return x.view(*shape, *x.shape[1:]), training.split.labels[picked].to(device).view(shape)

    def _left(self, rows: list[int]) -> list[tuple[Tensor, Named]]:
        """Return the models of these clients, flat in the layout's order, each with its `Trained.changes`."""
        named = {plain_name(name): value for name, value in (self.params | self.fixed | self.buffers).items()}
        spans = self.training.layout.spans
        values = {span.name: named[span.name].detach()[rows] for span in spans}
        flats = torch.cat([values[span.name].reshape(len(rows), span.numel).float() for span in spans], dim=1)
        return [
            (flat, {name: difference(values[name][place], before) for name, before in self.held.items()})
            for place, flat in enumerate(flats)
        ]

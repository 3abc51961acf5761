"""QuPeD's Algorithm 1: a client on its own learns float weights, and centres to which they are pulled.

Ozkara, Singh, Data and Diggavi 2021, arXiv 2107.13892, Algorithm 1 (centralised); with fixed centres ProxQuant (Bai,
Wang and Liberty 2019, arXiv 1810.00861). Its step is that of every client's own model, in `learners`; here it learns
from labels alone.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from fedq.federated.evaluate import batch_sums
from fedq.federated.image_training import LocalTraining, Passed
from fedq.federated.training import counters_restored, seeded
from fedq.personalize.learners import Quantization, make_learner
from fedq.personalize.own_models import OwnModel


def train_alone(
    own: OwnModel,
    local: LocalTraining,
    indices: Tensor,
    *,
    bits: int,
    quantization: Quantization,
    round: int,
    lr: float,
    seed: int,
) -> list[Passed]:
    """Train a client's own model for a round, in place, on its images alone.

    Each batch, as Algorithm 1 has it: optimizer step of the weights along the float model's gradient, their proximal
    step, gradient of the quantized model on the same batch, proximal step of the centres. From the freezing round on,
    weights are their centres and only the rest is trained. Batches, augmentation and optimizer are those of plain
    training with the same seed; with 32 bits it is plain training.

    Args:
        own: The model; its network's module is `local`'s.
        local: Local training, which gives images, batches and optimizer.
        indices: Places of the client's images in the split.
        bits: Bits of the model's weights; 32: they are not quantized.
        quantization: How quantized models learn.
        round: Number of the round, from 0.
        lr: Learning rate of the weights.
        seed: Seed of batches and augmentation.

    Returns:
        What the steps saw of the float model and, before freezing, of the quantized one.
    """
    generator, where = seeded(seed), local.split.images.device
    batches = local.index_batches(len(indices), generator)
    indices = indices.to(where)
    sums, num_seen = [], 0
    with counters_restored(local.model):
        learner = make_learner(own, local, lr, bits, quantization, round)
        for batch in batches:
            images, labels = local.examples(indices[batch.to(where)], generator)
            outputs = learner.step(images, partial(functional.cross_entropy, target=labels))
            sums.append(torch.stack([batch_sums(logits, labels) for logits in outputs]))
            num_seen += len(labels)
            local.beat()
        learner.finish()
    totals = torch.stack(sums).sum(dim=0).tolist()
    return [Passed(loss_sum, num_correct, num_seen, len(batches)) for loss_sum, num_correct in totals]

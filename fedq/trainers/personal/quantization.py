"""From settings to how models with learned centres are trained, centrally or by clients."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import nn

from fedq.federated.local_optimizer import Sgd, local_optimizer
from fedq.lowbit.centres import CentreSchedule, inner_weights
from fedq.personalize.learners import Quantization
from fedq.personalize.own_models import FLOAT_BITS, OwnModel
from fedq.trainers.alone import share
from fedq.trainers.job import Job

_NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)


def make_quantization(job: Job) -> Quantization:
    """Return how the job's quantized models learn."""
    personal = job.config.personal
    schedule = CentreSchedule(
        num_epochs=job.config.run.rounds,
        freeze_at=personal.freeze_at,
        regularizer_weight=personal.regularizer_weight,
        centre_lr=personal.centre_lr,
    )
    return Quantization(schedule, personal.regularizer, personal.centre_sign, personal.centres)


def starts_at_one(job: Job, model: nn.Module) -> bool:
    """Whether a network's outer centres start at -1 and +1.

    They do where they are fixed there, and with Adam, whose steps of one size take weights of any scale to them, if
    normalisation layers absorb that scale. Otherwise the weights say where.
    """
    has_norm = any(isinstance(module, _NORMS) for module in model.modules())
    is_adam = not isinstance(local_optimizer(job.config.local.optimizer), Sgd)
    return job.config.personal.centres == "fixed" or (has_norm and is_adam)


def log_centres(
    job: Job,
    round: int,
    modules: Sequence[nn.Module],
    bits: Sequence[int],
    mine: Iterable[int],
    load: Callable[[int], OwnModel],
) -> None:
    """Write every quantized client's centres, and how many weights each stands for; ranks other than 0 send theirs.

    Args:
        job: The job.
        round: Number of the round, from 0.
        modules: Network of each client's model, on every rank.
        bits: Bits of each client's weights; 32: they are not quantized.
        mine: Numbers of this rank's clients.
        load: Returns the own model of one of this rank's clients.
    """
    places = {
        client: [(layer, index) for layer in inner_weights(modules[client]) for index in range(2**own_bits)]
        for client, own_bits in enumerate(bits)
        if own_bits != FLOAT_BITS
    }
    if not places:
        return
    rows = {client: _centre_values(load(client)) for client in mine if client in places}
    width = 2 * max(map(len, places.values()))
    values = share(job, {c: row + [0.0] * (width - len(row)) for c, row in rows.items()}, round, width)
    job.folder.log_centres(
        [
            {"round": round, "client": c, "layer": layer, "index": i, "value": value, "members": int(members)}
            for c, own_places in places.items()
            for (layer, i), (value, members) in zip(own_places, values[c].view(-1, 2).tolist(), strict=False)
        ]
    )


def _centre_values(own: OwnModel) -> list[float]:
    """Return each layer's centres, every one followed by its number of members."""
    assert own.centres is not None
    members = own.centres.members(own.fill(quantized=False))
    pairs = [torch.stack((own.centres.values[layer], members[layer]), dim=1) for layer in members]
    return torch.cat(pairs).double().flatten().tolist()

"""From settings to how models with learned centres are trained, centrally or by clients."""

from __future__ import annotations

from torch import nn

from fedq.lowbit.centres import CentreSchedule
from fedq.personalize.learners import Quantization
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
    is_adam = job.config.local.optimizer != "sgd"
    return job.config.personal.centres == "fixed" or (has_norm and is_adam)

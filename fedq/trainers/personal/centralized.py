"""QuPeD's Algorithm 1 as a job: every client learns a few-bit model on its own; with one client it is centralised."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fedq.federated.cohort import assign
from fedq.federated.evaluate import Scores
from fedq.federated.image_training import Passed
from fedq.kernels import derive_seed
from fedq.lowbit.centres import Centres
from fedq.personalize.centralized import train_alone as train_student
from fedq.personalize.learners import Quantization
from fedq.personalize.own_models import FLOAT_BITS, Network, OwnModel
from fedq.personalize.settings import parse_client_bits
from fedq.trainers.alone import scores_here, share, train_alone
from fedq.trainers.divergence import check_losses
from fedq.trainers.job import Job
from fedq.trainers.personal.first_weights import load_weights
from fedq.trainers.personal.quantization import log_centres, make_quantization, starts_at_one
from fedq.trainers.records import client_row, finish
from fedq.trainers.state import Unsaved

_log = logging.getLogger(__name__)

_METRICS = (
    "train_loss",
    "train_accuracy",
    "train_quantized_loss",
    "train_quantized_accuracy",
    "val_float_accuracy",
    "val_accuracy",
)
"""Names of what is measured in a client's round; `val_accuracy` is that of the quantized model."""


@dataclass
class _Student:
    """A client on this rank, its model, and the best one it had to deploy: flat, as quantized, by validation data."""

    client: int
    bits: int
    own: OwnModel
    best: Tensor | None = None
    best_round: int = -1
    best_val_accuracy: float = -1.0


def run_centralized(job: Job) -> dict[str, Any]:
    """Train every client from the same start on its own images by Algorithm 1; nothing is sent.

    Rounds are epochs. A client's deployed model is the one whose quantized weights did best on the validation set, of
    those evaluated after freezing (the last round's where nothing is frozen). Accuracies are means over clients, each
    on the whole validation or test set; `model.safetensors` is client 0's. There are no checkpoints.
    """
    quantization = make_quantization(job)
    if job.config.personal.warm_start is not None:
        load_weights(job.config.personal.warm_start, job.model)
    students = _students(job)
    passed: dict[int, list[Passed]] = {}
    first_to_deploy = min(quantization.schedule.freeze_epoch, job.config.run.rounds - 1)

    def train(number: int) -> None:
        passed.update({s.client: _train(job, s, quantization, number) for s in students})

    def evaluate(number: int) -> float:
        can_deploy = number >= first_to_deploy
        rows = {s.client: _measure(job, s, passed[s.client], number, can_deploy) for s in students}
        return _log_round(job, students, rows, number)

    tested: dict[str, Any] = {}

    def test(number: int) -> Scores:
        tested.update(_test(job, students, number))
        return Scores(math.nan, tested["test_accuracy"], tested["test_balanced_accuracy"])

    state = Unsaved(job, can_stop=lambda num_rounds: num_rounds > first_to_deploy)
    results = train_alone(job, state, train, evaluate, test)
    return finish(
        job,
        algorithm=job.config.personal.algorithm,
        client_bits=parse_client_bits(job.config.personal.client_bits, len(job.parts)),
        **results | tested,
    )


def _students(job: Job) -> list[_Student]:
    personal, layout = job.config.personal, job.training.layout
    bits = parse_client_bits(personal.client_bits, len(job.parts))
    network = Network(job.config.local.model, job.model, layout)
    start = layout.flatten(job.model)
    mine = assign(range(len(job.parts)), job.transport.world_size, sticky=True)[job.transport.rank]
    at_one, students = starts_at_one(job, job.model), []
    for client in mine:
        centres = None
        if bits[client] != FLOAT_BITS:
            centres = Centres.of(job.model, bits[client], outer_at_one=at_one)
        students.append(_Student(client, bits[client], OwnModel(network, start.clone(), centres)))
    return students


def _train(job: Job, student: _Student, quantization: Quantization, round: int) -> list[Passed]:
    return train_student(
        student.own,
        job.training,
        job.parts[student.client],
        bits=student.bits,
        quantization=quantization,
        round=round,
        lr=job.lr(round),
        seed=derive_seed(job.config.run.seed, "local", round, student.client),
    )


def _measure(job: Job, student: _Student, passed: list[Passed], round: int, can_deploy: bool) -> list[float]:
    """Evaluate both models of a client, keep the quantized one if it is the best to deploy; return its `_METRICS`."""
    floats, quantized = passed[0], passed[-1]
    student.own.fill(quantized=False)
    float_accuracy = accuracy = scores_here(job, job.dataset.val).accuracy
    if len(passed) > 1:
        student.own.fill(quantized=True)
        accuracy = scores_here(job, job.dataset.val).accuracy
    if can_deploy and accuracy > student.best_val_accuracy:
        student.own.fill(quantized=True)
        student.best = job.training.layout.flatten(job.model)
        student.best_round, student.best_val_accuracy = round, accuracy
    return [floats.loss, floats.accuracy, quantized.loss, quantized.accuracy, float_accuracy, accuracy]


def _log_round(job: Job, students: list[_Student], rows: Mapping[int, list[float]], round: int) -> float:
    """Write the round's rows on rank 0; return the mean validation accuracy of quantized models, on every rank."""
    values = share(job, dict(rows), round, len(_METRICS))
    check_losses(job, round, values[:, 0])
    world_size = job.transport.world_size
    job.folder.log_clients(
        [
            client_row(job, round, client, client % world_size, row[0], row[1], val_accuracy=row[-1])
            for client, row in enumerate(values.tolist())
        ]
    )
    bits = parse_client_bits(job.config.personal.client_bits, len(job.parts))
    own = {student.client: student.own for student in students}
    log_centres(job, round, [job.model] * len(bits), bits, own, own.__getitem__)
    means = dict(zip(_METRICS, values.mean(dim=0).tolist(), strict=True))
    job.folder.log_metrics(round, **means, lr=job.lr(round))
    return means["val_accuracy"]


def _test(job: Job, students: list[_Student], round: int) -> dict[str, Any]:
    """Test every client's best and last model, and leave client 0's best one in the job's model, on rank 0."""
    rows = {}
    for student in reversed(students):
        student.own.fill(quantized=True)
        last = scores_here(job, job.dataset.test).accuracy
        assert student.best is not None, "the last round is evaluated, and can be deployed"
        job.training.layout.unflatten_(student.best, job.model)
        test = scores_here(job, job.dataset.test)
        best = [student.best_val_accuracy, student.best_round]
        rows[student.client] = [*best, test.accuracy, last, test.balanced_accuracy]
    values = share(job, rows, round, 5)
    best_val, _, test_mean, last_mean, balanced_mean = values.mean(dim=0).tolist()
    return {
        "test_accuracy": test_mean,
        "test_balanced_accuracy": balanced_mean,
        "last_test_accuracy": last_mean,
        "best_val_accuracy": best_val,
        "client_test_accuracy": values[:, 2].tolist(),
        "client_best_round": [int(best_round) for best_round in values[:, 1]],
    }

"""Training without any exchange: one client is the centralised arm, several are the local-only arm."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fedq.data import Split
from fedq.federated.cohort import assign
from fedq.federated.evaluate import Scores
from fedq.federated.training import Trained
from fedq.kernels import derive_seed
from fedq.trainers.divergence import check_losses
from fedq.trainers.job import Job
from fedq.trainers.loop import Ran, run_to_the_end
from fedq.trainers.records import book_metrics, client_row, finish
from fedq.trainers.state import Unsaved


def run_alone(job: Job) -> dict[str, Any]:
    """Train every client from the same start on its own images; nothing is sent.

    The cohort does not matter: every client trains in every round. Accuracies are means over clients, each on the
    whole validation or test set; `model.safetensors` is client 0's model. There are no checkpoints.
    """
    mine = assign(range(len(job.parts)), job.transport.world_size, sticky=True)[job.transport.rank]
    start = job.training.layout.flatten(job.model)
    models = {client: start.clone() for client in mine}
    trained: dict[int, Trained] = {}
    accuracies: list[float] = []

    def train(number: int) -> None:
        for client in mine:
            trained[client] = _train(job, client, models[client], number)
            models[client] = trained[client].flat

    def test(number: int) -> Scores:
        rows = {client: _test(job, flat) for client, flat in models.items()}
        of_clients, balanced = share(job, rows, number, 2).T.contiguous()
        accuracies.extend(of_clients.tolist())
        return Scores(math.nan, float(of_clients.mean()), float(balanced.mean()))

    results = train_alone(job, Unsaved(job), train, lambda number: _evaluate_round(job, trained, number), test)
    if job.is_root:
        job.training.layout.unflatten_(models[0], job.model)
    return finish(job, client_test_accuracy=accuracies, **results)


def train_alone(
    job: Job,
    state: Unsaved,
    train: Callable[[int], None],
    evaluate: Callable[[int], float],
    test: Callable[[int], Scores],
) -> dict[str, Any]:
    """Train clients that send nothing, and evaluate them, until the last round or the target accuracy.

    Args:
        job: The job.
        state: The job's progress.
        train: Trains this rank's clients in a round.
        evaluate: Evaluates every client after a round and writes its rows; returns the mean validation accuracy, on
            every rank.
        test: Tests every client after the last round.

    Returns:
        The training's results, as fields of the summary.

    Raises:
        DivergedError: All clients' models have diverged.
    """

    def run_one(number: int) -> Ran:
        job.watch.beat(f"training in round {number}")
        with job.timer.phase("compute"):
            train(number)
        return Ran(lambda metrics: None)

    def measure(job: Job, split: Split, number: int) -> Scores:
        return test(number) if split is job.dataset.test else Scores(math.nan, evaluate(number))

    results = run_to_the_end(job, state, run_one, measure=measure)
    return results | {"test_loss": None}


def _evaluate_round(job: Job, trained: dict[int, Trained], round: int) -> float:
    """Evaluate every client, write the round's rows, and return the mean validation accuracy."""
    mine = {c: [t.loss, t.accuracy, _scores(job, t.flat, job.dataset.val).accuracy] for c, t in trained.items()}
    values = share(job, mine, round, 3)
    check_losses(job, round, values[:, 0])
    world_size = job.transport.world_size
    job.folder.log_clients(
        [
            client_row(job, round, client, client % world_size, loss, train_accuracy, val_accuracy=val_accuracy)
            for client, (loss, train_accuracy, val_accuracy) in enumerate(values.tolist())
        ]
    )
    loss, train_accuracy, val_accuracy = values.mean(dim=0).tolist()
    job.folder.log_metrics(
        round, train_loss=loss, train_accuracy=train_accuracy, val_accuracy=val_accuracy, lr=job.lr(round)
    )
    return float(val_accuracy)


def _train(job: Job, client: int, flat: Tensor, round: int) -> Trained:
    seed = derive_seed(job.config.run.seed, "local", round, client)
    return job.training.run(flat, job.parts[client], lr=job.lr(round), seed=seed)


def _scores(job: Job, flat: Tensor, split: Split) -> Scores:
    """Evaluate one client's model on this rank alone."""
    job.training.layout.unflatten_(flat, job.model)
    return scores_here(job, split)


def _test(job: Job, flat: Tensor) -> list[float]:
    scores = _scores(job, flat, job.dataset.test)
    return [scores.accuracy, scores.balanced_accuracy]


def scores_here(job: Job, split: Split) -> Scores:
    """Evaluate the job's model as it is on this rank alone; test data also by class."""
    num_classes = job.dataset.num_classes if split is job.dataset.test else 0
    return replace(job.evaluator, transport=None).run(job.model, split, num_classes=num_classes)[0]


def share(job: Job, mine: dict[int, list[float]], round: int, num_values: int) -> Tensor:
    """Return every client's values, (clients, values) float64, of which each rank knows its own clients'."""
    values = torch.zeros(len(job.parts), num_values, dtype=torch.float64)
    for client, row in mine.items():
        values[client] = torch.tensor(row, dtype=torch.float64)
    gathered, moved = job.transport.all_gather(values)
    book_metrics(job, moved.payload, round)
    return gathered.sum(dim=0)

"""Training without any exchange: one client is the centralised arm, several are the local-only arm."""

from __future__ import annotations

import time
from collections import Counter
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
from fedq.report import round_progress
from fedq.trainers.divergence import check_losses
from fedq.trainers.job import Job
from fedq.trainers.records import accuracy_text, book_metrics, client_row, finish, log_phases


def run_alone(job: Job) -> dict[str, Any]:
    """Train every client from the same start on its own images; nothing is sent.

    The cohort does not matter: every client trains in every round. Accuracies are means over clients, each on the
    whole validation or test set; `model.safetensors` is client 0's model.
    """
    mine = assign(range(len(job.parts)), job.transport.world_size, sticky=True)[job.transport.rank]
    start = job.training.layout.flatten(job.model)
    models = {client: start.clone() for client in mine}
    trained: dict[int, Trained] = {}

    def train(number: int) -> None:
        for client in mine:
            trained[client] = _train(job, client, models[client], number)
            models[client] = trained[client].flat

    results = rounds_alone(job, train, lambda number: _evaluate_round(job, trained, number))
    rows = {client: _test(job, flat) for client, flat in models.items()}
    accuracies, balanced = share(job, rows, results["rounds"] - 1, 2).T.contiguous()
    if job.is_root:
        job.training.layout.unflatten_(models[0], job.model)
    return finish(
        job,
        test_accuracy=float(accuracies.mean()),
        test_balanced_accuracy=float(balanced.mean()),
        client_test_accuracy=accuracies.tolist(),
        seconds=time.perf_counter() - job.started,
        **results,
    )


def rounds_alone(
    job: Job,
    train: Callable[[int], None],
    evaluate: Callable[[int], float],
    can_stop: Callable[[int], bool] = lambda number: True,
) -> dict[str, Any]:
    """Train and evaluate until the last round or the target accuracy.

    Args:
        job: The job.
        train: Trains this rank's clients in a round.
        evaluate: Evaluates every client after a round; returns the mean validation accuracy, on every rank.
        can_stop: Whether the target accuracy counts after a round.

    Returns:
        Of the summary: ``rounds``, ``best_val_accuracy``, ``seconds_per_round`` and ``seconds_by_phase``.
    """
    run, begin = job.config.run, time.perf_counter()
    best_val, num_rounds, spent = 0.0, 0, Counter[str]()
    job.timer.take()  # the start is no round's
    with round_progress(run.rounds, job.is_root) as progress:
        for number in range(run.rounds):
            job.watch.beat(f"training in round {number}")
            with job.timer.phase("compute"):
                train(number)
            job.trace.stop()
            num_rounds = number + 1
            if num_rounds % run.eval_every and num_rounds != run.rounds:
                continue
            job.watch.beat(f"evaluating round {number}")
            with job.timer.phase("evaluation"):
                val_accuracy = evaluate(number)
            spent.update(log_phases(job, number))
            best_val = max(best_val, val_accuracy)
            progress.update(num_rounds, accuracy_text(val_accuracy).rstrip(", "))
            if can_stop(number) and run.target_accuracy is not None and val_accuracy >= run.target_accuracy:
                break
    seconds_per_round = (time.perf_counter() - begin) / num_rounds
    return {
        "rounds": num_rounds,
        "best_val_accuracy": best_val,
        "seconds_per_round": seconds_per_round,
        "seconds_by_phase": dict(spent),
    }


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

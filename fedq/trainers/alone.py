"""Training without any exchange: one client is the centralised arm, several are the local-only arm."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fedq.data import Split
from fedq.federated.accounting import framing
from fedq.federated.client import Trained
from fedq.federated.rounds import assign
from fedq.kernels import derive_seed
from fedq.ledger import NO_CLIENT
from fedq.report import round_progress
from fedq.trainers.job import Job


def run_alone(job: Job) -> dict[str, Any]:
    """Train every client from the same start on its own images; nothing is sent.

    The cohort does not matter: every client trains in every round. Accuracies are means over clients, each on the
    whole validation or test set.
    """
    run = job.config.run
    mine = assign(range(len(job.parts)), job.transport.world_size, sticky=True)[job.transport.rank]
    start = job.training.layout.flatten(job.model)
    models = {client: start.clone() for client in mine}
    best_val, rounds_done, begin = 0.0, 0, time.perf_counter()
    with round_progress(run.rounds, job.is_root) as progress:
        for number in range(run.rounds):
            trained = {client: _train(job, client, models[client], number) for client in mine}
            models = {client: result.flat for client, result in trained.items()}
            rounds_done = number + 1
            if rounds_done % run.eval_every and rounds_done != run.rounds:
                continue
            val = _mean_over_clients(job, {c: _accuracy(job, flat, job.dataset.val) for c, flat in models.items()})
            best_val = max(best_val, val)
            loss = _mean_over_clients(job, {c: result.loss for c, result in trained.items()})
            job.folder.log_metrics(number, train_loss=loss, val_accuracy=val, lr=job.lr(number))
            progress.update(rounds_done, f"val accuracy {100 * val:.1f} %")
            if run.target_accuracy is not None and val >= run.target_accuracy:
                break
    seconds_per_round = (time.perf_counter() - begin) / rounds_done
    accuracies = {c: _accuracy(job, flat, job.dataset.test) for c, flat in models.items()}
    test = _mean_over_clients(job, accuracies)
    if not job.is_root:
        return {}
    job.training.layout.unflatten_(models[0], job.model)
    job.folder.save_model(job.model.state_dict())
    job.folder.write_ledger(job.ledger)
    summary = job.summary(
        rounds=rounds_done,
        test_accuracy=test,
        best_val_accuracy=best_val,
        uplink_bytes=0,
        downlink_bytes=0,
        uplink_bytes_fp32=0,
        downlink_bytes_fp32=0,
        wire_bytes=job.ledger.totals().wire,
        seconds=time.perf_counter() - job.started,
        seconds_per_round=seconds_per_round,
    )
    job.folder.write_summary(summary)
    return summary


def _train(job: Job, client: int, flat: Tensor, round: int) -> Trained:
    seed = derive_seed(job.config.run.seed, "local", round, client)
    return job.training.run(flat, job.parts[client], lr=job.lr(round), seed=seed)


def _accuracy(job: Job, flat: Tensor, split: Split) -> float:
    """Evaluate one client's model on this rank alone."""
    job.training.layout.unflatten_(flat, job.model)
    return replace(job.evaluator, transport=None).run(job.model, split)[1]


def _mean_over_clients(job: Job, values: dict[int, float]) -> float:
    """Return the mean over all clients of values that each rank knows for its own."""
    mine = torch.zeros(len(job.parts), dtype=torch.float64)
    for client, value in values.items():
        mine[client] = value
    gathered, moved = job.transport.all_gather(mine)
    if job.is_root and moved.payload:
        job.ledger.record(
            round=0,
            client=NO_CLIENT,
            direction="peer",
            parts=framing("metrics", moved.payload),
            payload_times=0,
            wire_times=1,
        )
    return float(gathered.sum(dim=0).mean())

"""The federated job: rounds until the end or the target accuracy, then the test set, the summary and the model."""

from __future__ import annotations

import time
from typing import Any

from torch import Tensor

from fedq.config import Config
from fedq.data import Split
from fedq.federated.client import RoundContext
from fedq.federated.rounds import FederatedRounds
from fedq.report import print_summary, round_progress
from fedq.trainers.alone import run_alone
from fedq.trainers.build import build_rounds, residual_store
from fedq.trainers.job import Job, open_job
from fedq.trainers.records import evaluate, finish, log_round, progress_text, report_left_out
from fedq.trainers.state import Progress, RunState
from fedq.trainers.stepwise import run_steps


def run_job(config: Config) -> dict[str, Any]:
    """Run the job that a config describes, on this rank.

    Returns:
        The summary, on rank 0; the run's folder has everything else.

    Raises:
        FieldError: A setting that cannot be used.
    """
    with open_job(config) as job:
        summary = {"none": run_alone, "step": run_steps, "round": run_rounds}[config.exchange.exchange](job)
    if job.folder.path is not None:
        print_summary(job.folder.path)
    return summary


def run_rounds(job: Job) -> dict[str, Any]:
    """Run federated rounds, a checkpoint after each, and write their results."""
    run, so_far = job.config.run, Progress()
    store = residual_store(job)
    rounds = build_rounds(job, store)
    state = RunState(job, rounds, so_far, store)
    if not (run.resume and state.go_on()):
        rounds.share_start()
    setup_s, seconds_before = time.perf_counter() - job.started, so_far.seconds
    with round_progress(run.rounds, job.is_root) as progress:
        while not so_far.is_done(run):
            _run_round(job, rounds, so_far, state)
            so_far.seconds = seconds_before + time.perf_counter() - job.started
            if so_far.num_rounds % run.checkpoint_every == 0 or so_far.is_done(run):
                job.watch.beat(f"saving round {so_far.num_rounds}")
                with job.watch.writing():
                    state.save()
            progress.update(so_far.num_rounds, progress_text(job, so_far.val_accuracy))
    job.watch.beat("testing")
    test_loss, test_accuracy = _evaluate(job, rounds.replica, job.dataset.test, so_far.num_rounds - 1)
    return finish(
        job,
        feedback=rounds.sticky,
        rounds=so_far.num_rounds,
        test_accuracy=test_accuracy,
        test_loss=test_loss,
        best_val_accuracy=so_far.best_val_accuracy,
        root_ingress_bytes=job.transport.received,
        left_out=so_far.left_out,
        seconds=seconds_before + time.perf_counter() - job.started,
        seconds_setup=setup_s,
        seconds_per_round=so_far.seconds_in_rounds / so_far.num_rounds,
    )


def _run_round(job: Job, rounds: FederatedRounds, so_far: Progress, state: RunState) -> None:
    """Run one round, evaluate where it is due, and write its rows."""
    run, begin, number = job.config.run, time.perf_counter(), so_far.num_rounds
    context = RoundContext(number, job.lr(number), run.seed)
    result = rounds.run(context)
    state.note(result)
    so_far.num_rounds = number + 1
    so_far.left_out += report_left_out(number, result)
    metrics: dict[str, Any] = {"lr": context.lr}
    if so_far.num_rounds % run.eval_every == 0 or so_far.num_rounds == run.rounds:
        job.watch.beat(f"evaluating round {number}")
        metrics["val_loss"], metrics["val_accuracy"] = _evaluate(job, rounds.replica, job.dataset.val, number)
        so_far.val_accuracy = metrics["val_accuracy"]
        so_far.best_val_accuracy = max(so_far.best_val_accuracy, so_far.val_accuracy)
    seconds = time.perf_counter() - begin
    so_far.seconds_in_rounds += seconds
    log_round(job, number, result, metrics | {"seconds": seconds})


def _evaluate(job: Job, flat: Tensor, split: Split, round: int) -> tuple[float, float]:
    """Evaluate the replica."""
    job.training.layout.unflatten_(flat, job.model)
    return evaluate(job, split, round)

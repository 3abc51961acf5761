"""The federated job: rounds until the end or the target accuracy, then the test set, the summary and the model."""

from __future__ import annotations

import time
from typing import Any

from torch import Tensor

from fedq.config import Config, RunConfig
from fedq.data import Split
from fedq.federated.accounting import framing
from fedq.federated.client import RoundContext
from fedq.federated.rounds import FederatedRounds
from fedq.ledger import NO_CLIENT
from fedq.report import print_header, print_summary, round_progress
from fedq.trainers.alone import run_alone
from fedq.trainers.build import build_rounds, residual_store
from fedq.trainers.job import Job, open_job
from fedq.trainers.records import log_round, progress_text, report_left_out
from fedq.trainers.state import Progress, RunState


def run_job(config: Config) -> dict[str, Any]:
    """Run the job that a config describes, on this rank.

    Returns:
        The summary, on rank 0; the run's folder has everything else.

    Raises:
        FieldError: A setting that cannot be used.
    """
    with open_job(config) as job:
        summary = run_alone(job) if config.exchange.exchange == "none" else run_rounds(job)
    if job.folder.path is not None:
        print_summary(job.folder.path)
    return summary


def run_rounds(job: Job) -> dict[str, Any]:
    """Run federated rounds, a checkpoint after each, and write their results."""
    run, so_far = job.config.run, Progress()
    store = residual_store(job)
    rounds = build_rounds(job, store)
    state = RunState(job, rounds, so_far, store)
    if not (run.resume and _resume(job, state)):
        rounds.share_start()
    setup_s, seconds_before = time.perf_counter() - job.started, so_far.seconds
    with round_progress(run.rounds, job.is_root) as progress:
        while not _is_done(run, so_far):
            _run_round(job, rounds, so_far, state)
            so_far.seconds = seconds_before + time.perf_counter() - job.started
            if so_far.num_rounds % run.checkpoint_every == 0 or _is_done(run, so_far):
                job.watch.beat(f"saving round {so_far.num_rounds}")
                with job.watch.writing():
                    state.save()
            progress.update(so_far.num_rounds, progress_text(job, so_far.val_accuracy))
    job.watch.beat("testing")
    test_loss, test_accuracy = _evaluate(job, rounds.replica, job.dataset.test, so_far.num_rounds - 1)
    return _finish(
        job,
        rounds,
        rounds=so_far.num_rounds,
        test_accuracy=test_accuracy,
        test_loss=test_loss,
        best_val_accuracy=so_far.best_val_accuracy,
        left_out=so_far.left_out,
        seconds=seconds_before + time.perf_counter() - job.started,
        seconds_setup=setup_s,
        seconds_per_round=so_far.seconds_in_rounds / so_far.num_rounds,
    )


def _resume(job: Job, state: RunState) -> bool:
    """Load the newest checkpoint, if there is one, and say what is gone on with."""
    found, words = state.resume()
    if job.is_root:
        print_header([words])
    return found


def _is_done(run: RunConfig, so_far: Progress) -> bool:
    reached = run.target_accuracy is not None and so_far.val_accuracy >= run.target_accuracy
    return reached or so_far.num_rounds >= run.rounds


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
    """Evaluate the replica, and book the shared sums as peer bytes."""
    job.training.layout.unflatten_(flat, job.model)
    loss, accuracy, moved = job.evaluator.run(job.model, split)
    if job.is_root and moved.payload:
        parts = framing("metrics", moved.payload)
        job.ledger.record(round=round, client=NO_CLIENT, direction="peer", parts=parts, payload_times=0, wire_times=1)
    return loss, accuracy


def _finish(job: Job, federation: FederatedRounds, **results: Any) -> dict[str, Any]:
    """Write model, ledger and summary on rank 0."""
    if not job.is_root:
        return {}
    job.training.layout.unflatten_(federation.replica, job.model)
    job.folder.save_model(job.model.state_dict())
    job.folder.write_ledger(job.ledger)
    up, down = job.ledger.totals("uplink"), job.ledger.totals("downlink")
    summary = job.summary(
        feedback=federation.sticky,
        uplink_bytes=up.payload,
        downlink_bytes=down.payload,
        uplink_bytes_fp32=up.raw,
        downlink_bytes_fp32=down.raw,
        wire_bytes=job.ledger.totals().wire,
        **results,
    )
    job.folder.write_summary(summary)
    return summary

"""From the first round to the last, or to the target accuracy; an epoch of data-parallel training is a round too."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fedq.data import Split
from fedq.federated.evaluate import Scores
from fedq.report import round_progress
from fedq.trainers.divergence import Divergence
from fedq.trainers.job import Job
from fedq.trainers.records import compare_interfaces, evaluate, log_phases, progress_text
from fedq.trainers.state import JobState

Log = Callable[[dict[str, Any]], None]
"""Writes a round's rows, given its metrics."""


@dataclass(frozen=True)
class Ran:
    """A round that was run.

    Args:
        log: Writes the round's rows, given its metrics.
        is_lost: Whether nothing of the round could be used; the same on every rank.
    """

    log: Log
    is_lost: bool = False


Measure = Callable[[Job, Split, int], Scores]


def run_to_the_end(
    job: Job, state: JobState, run_one: Callable[[int], Ran], *, noun: str = "round", measure: Measure = evaluate
) -> dict[str, Any]:
    """Run rounds, evaluate where it is due, save a checkpoint after each where there are any, and test at the end.

    Args:
        job: The job.
        state: State of the job, with its progress, that checkpoints hold.
        run_one: Runs the round of a number, and leaves what is to be evaluated in the job's model.
        noun: Name of a round in the progress bar and the watch: ``round`` or ``epoch``.
        measure: Returns the scores on a split, the validation set or at the end the test set, after a round.

    Returns:
        The rounds' results, as fields of the summary.

    Raises:
        DivergedError: The model has diverged.
    """
    divergence = Divergence(job, state, has_one_model=measure is evaluate)
    run, so_far = job.config.run, state.so_far
    setup_s, seconds_before = time.perf_counter() - job.started, so_far.seconds
    job.timer.take()  # the start is no round's
    with round_progress(run.rounds, job.is_root, noun=noun) as progress:
        while not state.is_done(run):
            _run_and_evaluate(job, state, run_one, noun, measure, divergence)
            so_far.seconds = seconds_before + time.perf_counter() - job.started
            if state.is_due(run):
                job.watch.beat(f"saving {noun} {so_far.num_rounds}")
                with job.watch.writing():
                    state.save()
            progress.update(so_far.num_rounds, progress_text(job, so_far.val_accuracy))
    job.watch.beat("testing")
    with job.timer.phase("evaluation"):
        test = measure(job, job.dataset.test, so_far.num_rounds - 1)
    return {
        "rounds": so_far.num_rounds,
        "test_accuracy": test.accuracy,
        "test_balanced_accuracy": test.balanced_accuracy,
        "test_loss": test.loss,
        "best_val_accuracy": so_far.best_val_accuracy,
        "left_out": so_far.left_out,
        "rollbacks": so_far.rollbacks,
        "seconds": seconds_before + time.perf_counter() - job.started,
        "seconds_setup": setup_s,
        "seconds_per_round": so_far.seconds_in_rounds / so_far.num_rounds,
        "seconds_by_phase": so_far.seconds_by_phase,
        "interface": compare_interfaces(job, so_far.num_rounds - 1),
    }


def _run_and_evaluate(
    job: Job, state: JobState, run_one: Callable[[int], Ran], noun: str, measure: Measure, divergence: Divergence
) -> None:
    run, so_far, begin = job.config.run, state.so_far, time.perf_counter()
    number, val = so_far.num_rounds, None
    ran = run_one(number)
    so_far.num_rounds = number + 1
    metrics: dict[str, Any] = {"lr": state.lr(number)}
    if so_far.num_rounds % run.eval_every == 0 or so_far.num_rounds == run.rounds:
        job.watch.beat(f"evaluating {noun} {number}")
        with job.timer.phase("evaluation"):
            val = measure(job, job.dataset.val, number)
        metrics |= {"val_loss": val.loss, "val_accuracy": val.accuracy}
        so_far.val_accuracy = val.accuracy
        so_far.best_val_accuracy = max(so_far.best_val_accuracy, so_far.val_accuracy)
    seconds = time.perf_counter() - begin
    so_far.seconds_in_rounds += seconds
    job.trace.stop()
    for phase, spent in log_phases(job, number).items():
        so_far.seconds_by_phase[phase] = so_far.seconds_by_phase.get(phase, 0.0) + spent
    ran.log(metrics | {"seconds": seconds})
    divergence.check(number, is_lost=ran.is_lost, val_loss=None if val is None else val.loss)

"""The federated job: rounds until the end or the target accuracy, then the test set, the summary and the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from fedq.config import Config
from fedq.federated.rounds import Rounds
from fedq.federated.training import RoundContext
from fedq.personalize.settings import is_personal
from fedq.report import print_summary
from fedq.trainers.alone import run_alone
from fedq.trainers.build import build_rounds, residual_store, round_settings
from fedq.trainers.centralized import run_centralized
from fedq.trainers.divergence import rolling_back
from fedq.trainers.job import Job, open_job
from fedq.trainers.loop import Ran, run_to_the_end
from fedq.trainers.personal import run_personal
from fedq.trainers.records import finish, is_lost, log_round, report_left_out
from fedq.trainers.state import Progress, RunState
from fedq.trainers.stepwise import run_steps


def run_job(config: Config) -> dict[str, Any]:
    """Run the job that a config describes, on this rank.

    Returns:
        The summary, on rank 0; the run's folder has everything else.

    Raises:
        FieldError: A setting that cannot be used.
        DivergedError: The model has diverged.
    """
    return rolling_back(config, _run_once)


def _run_once(config: Config, rollbacks: int) -> dict[str, Any]:
    with open_job(config, rollbacks) as job:
        summary = _trainer(config)(job)
    if job.folder.path is not None:
        print_summary(job.folder.path)
    return summary


def _trainer(config: Config) -> Callable[[Job], dict[str, Any]]:
    if config.exchange.exchange == "round" and is_personal(asdict(config.personal)):
        return run_personal
    if config.exchange.exchange == "none" and config.personal.algorithm == "quped":
        return run_centralized
    return {"none": run_alone, "step": run_steps, "round": run_rounds}[config.exchange.exchange]


def run_rounds(job: Job) -> dict[str, Any]:
    """Run federated rounds, a checkpoint after each, and write their results."""
    settings = round_settings(job.config, job.model)
    store = residual_store(job, settings)
    rounds = build_rounds(job, settings, store)
    state = RunState(job, rounds, Progress(), store)
    if not (job.config.run.resume and state.go_on()):
        rounds.share_start(job.model)
    show_replica(job, rounds)
    results = run_to_the_end(job, state, lambda number: _run_round(job, rounds, state, number))
    return finish(job, feedback=store is not None, root_ingress_bytes=job.transport.received, **results)


def _run_round(job: Job, rounds: Rounds, state: RunState, number: int) -> Ran:
    result = rounds.run(RoundContext(number, state.lr(number), job.config.run.seed))
    state.note(result)
    state.so_far.left_out += report_left_out(number, result)
    show_replica(job, rounds)
    return Ran(lambda metrics: log_round(job, number, result, metrics), is_lost(job, number, result))


def show_replica(job: Job, rounds: Rounds) -> None:
    """Put what clients hold into the job's model, which is evaluated and saved."""
    job.training.layout.unflatten_(rounds.replica, job.model)

"""The job of federated rounds: until the end or the target accuracy, then the test set, the summary and the model."""

from __future__ import annotations

from typing import Any

from fedq.federated.rounds import Rounds
from fedq.federated.training import RoundContext
from fedq.trainers.build import build_rounds, residual_store, round_settings
from fedq.trainers.job import Job
from fedq.trainers.loop import Ran, run_to_the_end
from fedq.trainers.records import finish, is_lost, log_round, report_left_out
from fedq.trainers.state import Progress, RunState


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

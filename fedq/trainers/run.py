"""Which job a config describes: rounds, steps, clients alone, or clients with models of their own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from fedq.config import Config
from fedq.personalize.settings import is_personal
from fedq.report import print_summary
from fedq.trainers.alone import run_alone
from fedq.trainers.divergence import rolling_back
from fedq.trainers.job import Job, open_job
from fedq.trainers.personal.centralized import run_centralized
from fedq.trainers.personal.rounds import run_personal
from fedq.trainers.rounds import run_rounds
from fedq.trainers.steps import run_steps


def run_job(config: Config) -> dict[str, Any]:
    """Run the job that a config describes, on this rank.

    Returns:
        The run's summary on rank 0; the run's folder has everything else.

    Raises:
        FieldError: A setting cannot be used.
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

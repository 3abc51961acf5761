"""Small jobs that are stopped at a moment of a round, for tests, and what their folders then say."""

from __future__ import annotations

import io
import json
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from jobs import small_config

from fedq.checkpoint import CheckpointError
from fedq.config import Config
from fedq.errors import FieldError
from fedq.federated.rounds import Rounds
from fedq.feedback import ResidualStore
from fedq.trainers import rounds
from fedq.trainers.run import run_job


@dataclass(frozen=True)
class Stop:
    """When a job raises, on every rank: in round ``round``, before it begins, once it is logged, or in between saving
    residuals and the checkpoint that names them."""

    round: int
    moment: str


class Stopped(Exception):
    """What a job is stopped by."""


def run_jobs(rank: int, jobs: list[tuple[Config, Stop | None]]) -> list[tuple[dict | str, str]]:
    """Run jobs one after another; return the summary, or the text of what stopped it, and what was printed."""
    results: list[tuple[dict | str, str]] = []
    for config, stop in jobs:
        heard = io.StringIO()
        with redirect_stdout(heard), redirect_stderr(heard), pytest.MonkeyPatch.context() as patch:
            if stop:
                _stop_at(patch, stop)
            try:
                summary: dict | str = run_job(config)
            except (Stopped, FieldError, CheckpointError) as error:
                summary = f"{type(error).__name__}: {error}"
        results.append((summary, heard.getvalue()))
    return results


def whole_run(make: pytest.TempPathFactory, **flags: Any) -> Path:
    """Return the folder of a small job on one rank that has run to its end."""
    folder = make.mktemp("whole") / "run"
    run_job(small_config(folder, **flags))
    return folder


def stopped_run(make: pytest.TempPathFactory, **flags: Any) -> Path:
    """Return the folder of a small job on one rank that was stopped before its third round."""
    folder = make.mktemp("stopped") / "run"
    assert run_jobs(0, [(small_config(folder, **flags), Stop(2, "begin"))])[0][0] == "Stopped: "
    return folder


def _stop_at(patch: pytest.MonkeyPatch, stop: Stop) -> None:
    run, log, save = Rounds.run, rounds.log_round, ResidualStore.save

    def stopped_run(rounds: Rounds, context: Any) -> Any:
        if (context.round, "begin") == (stop.round, stop.moment):
            raise Stopped
        return run(rounds, context)

    def stopped_log(job: Any, round: int, *given: Any) -> None:
        log(job, round, *given)
        if (round, "log") == (stop.round, stop.moment):
            raise Stopped

    def stopped_save(store: ResidualStore, number: int) -> list[int]:
        saved = save(store, number)
        if (number, "residuals") == (stop.round + 1, stop.moment):
            raise Stopped
        return saved

    patch.setattr(Rounds, "run", stopped_run)
    patch.setattr(rounds, "log_round", stopped_log)
    patch.setattr(ResidualStore, "save", stopped_save)


def metrics(folder: Path, *leave_out: str) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", *leave_out)} for line in lines]


def summary(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())

"""The starts of a run: whether this one begins a run or goes on with one, and what became of those before.

A supervisor (torchrun, SLURM, Kubernetes) gives the same command again after a failure. Where the run lies is then told
by `--out`, or was left in the store of torchrun's agent.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from fedq.config import Config, RunConfig
from fedq.configfile import load_config
from fedq.errors import FieldError
from fedq.report import read_summary
from fedq.runtime import Runtime, agent_store, from_root, num_restarts, on_root

C = TypeVar("C", bound=Config)

# Numbers this process's jobs: a script may run several, and does so in the same order when it is started again.
_job_numbers = itertools.count()


class Finished(Exception):
    """The run that the command describes was finished by an earlier start.

    Args:
        summary: Its summary, on rank 0; empty on the others.
    """

    def __init__(self, summary: dict[str, Any]) -> None:
        super().__init__("the run is finished")
        self.summary = summary


class Place:
    """Where this job's run lies, if an earlier start has begun it; rank 0 knows, and tells the others.

    Args:
        runtime: This rank's.
        environ: The launcher's environment; default `os.environ`.
    """

    def __init__(self, runtime: Runtime, environ: Mapping[str, str] | None = None) -> None:
        environ = os.environ if environ is None else environ
        self.runtime = runtime
        argv = hashlib.sha256("\0".join(sys.argv).encode(errors="surrogateescape")).hexdigest()
        self._key = f"fedq/run/{argv}/{next(_job_numbers)}"
        self._store = agent_store(runtime, environ) if runtime.is_root else None
        self._known = self._look_up()
        self.is_restart = self._known is not None or num_restarts(environ) > 0
        """Whether a supervisor has given the command again, as far as this rank knows."""

    def found(self, config: C) -> C:
        """Return the settings, the same on every rank, with the run that is gone on with as `resume`.

        Raises:
            FieldError: `resume` was given with --exchange none, which has no checkpoints.
        """
        run = from_root(self.runtime, on_root(self.runtime, lambda: self._choose(config)))
        assert run is not None
        return replace(config, run=run)

    def keep(self, path: Path) -> None:
        """Leave the run's folder where the next start of the same command finds it, on rank 0."""
        if self._store is not None:
            self._store.set(self._key, str(path.resolve()))

    def _choose(self, config: Config) -> RunConfig:
        run = config.run
        if run.resume is not None:
            if config.exchange.exchange == "none":
                raise FieldError("resume", str(run.resume), "a run with --exchange round or step")
            return run
        path = self._known or run.out
        if path is None or not holds_run(path):
            return run
        doing = run.on_existing
        if doing == "new" and self._known is not None:  # an earlier start of this command has made it
            doing = "resume"
        if doing == "auto":
            is_finished = (path / "summary.json").exists()
            doing = "refuse" if is_finished and not self.is_restart else "resume"
        if doing == "new":
            return replace(run, out=_beside(path))
        return replace(run, resume=path) if doing == "resume" else replace(run, out=path)

    def _look_up(self) -> Path | None:
        if self._store is None or not self._store.check([self._key]):
            return None
        return Path(self._store.get(self._key).decode())


def holds_run(path: Path) -> bool:
    """Whether a folder holds a run, begun or finished."""
    return any((path / file).exists() for file in ("summary.json", "config.yaml"))


def finished_summary(config: Config) -> dict[str, Any] | None:
    """Return the summary of the run to go on with, if there is nothing left to do; None if there is."""
    path = config.run.resume
    if path is None:
        return None
    try:
        summary = read_summary(path)
    except FieldError:  # not there, or damaged, and then written anew
        return None
    before = load_config(path / "config.yaml", type(config)()).run
    is_same_end = (before.rounds, before.target_accuracy) == (config.run.rounds, config.run.target_accuracy)
    return summary if is_same_end else None


def _beside(path: Path) -> Path:
    """Return the first of `path-2`, `path-3`... that holds no run."""
    return next(
        beside for number in itertools.count(2) if not holds_run(beside := path.with_name(f"{path.name}-{number}"))
    )

"""What a data-parallel job needs to go on as if it had never stopped."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from fedq.checkpoint import Checkpoints, Loaded
from fedq.engines import Engine
from fedq.errors import FieldError
from fedq.federated.training import is_finite
from fedq.hooks import StepExchange
from fedq.layout import uncompiled_name
from fedq.trainers.fingerprint import KEY
from fedq.trainers.job import Job
from fedq.trainers.state import JobState, Progress


class StepRunState(JobState):
    """Saves and loads model, optimizer, residuals, ledger and files.

    Every rank saves its own residuals, in ``residuals/rank<r>/``; rank 0 writes the rest. On another number of ranks
    each rank starts from the mean of the old ranks' residuals.

    Args:
        job: The job.
        so_far: The job's progress.
        engine: Engine that takes the steps.
        shared: Exchange that averages the gradients, which has the residuals.
    """

    def __init__(self, job: Job, so_far: Progress, engine: Engine, shared: StepExchange) -> None:
        super().__init__(job, so_far)
        self.engine = engine
        self.shared = shared

    def is_finite(self) -> bool:
        """Whether the model has finite values alone."""
        return is_finite(self.job.training.layout.flatten(self.job.model))

    def save(self) -> None:
        """Write a checkpoint of the epochs so far; every rank calls it."""
        number = self.so_far.num_rounds
        self._of_rank(self.job.runtime.rank).save(number, self.shared.state_dict())
        self.job.transport.barrier()  # the residuals are on disk before a checkpoint needs them
        if self.job.is_root:
            self.checkpoints.save(number, self.state_dict())

    def state_dict(self) -> dict[str, Any]:
        """Return everything but the residuals, on rank 0."""
        job = self.job
        return {
            "progress": asdict(self.so_far),
            "model": {uncompiled_name(name): value for name, value in job.model.state_dict().items()},
            "engine": self.engine.state_dict(),
            "ledger": job.ledger.state_dict(),
            "files": job.folder.position(),
            "layout": job.training.layout.hash,
            "where": self.where(),
            KEY: job.fingerprint.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned, on every rank."""
        job, layout = self.job, self.job.training.layout.hash
        if state["layout"] != layout:
            raise FieldError("resume", state["layout"], f"{layout}: the same model as before")
        vars(self.so_far).update(state["progress"])
        names = {uncompiled_name(name): name for name in job.model.state_dict()}
        job.model.load_state_dict({names.get(name, name): value for name, value in state["model"].items()})
        self.engine.load_state_dict(state["engine"])
        number, old_ranks = self.so_far.num_rounds, state["where"]["world_size"]
        same = old_ranks == job.runtime.world_size
        ranks = [job.runtime.rank] if same else range(old_ranks)
        self.shared.load_state_dict(*(self._of_rank(rank).load(number).state for rank in ranks))
        if job.is_root:
            job.ledger.load_state_dict(state["ledger"])
            job.folder.rewind(number, state["files"])

    def check(self, loaded: Loaded) -> None:
        """Read the residuals of all ranks."""
        for rank in range(loaded.state["where"]["world_size"]):
            self._of_rank(rank).load(loaded.number)

    def _of_rank(self, rank: int) -> Checkpoints:
        folder: Path = self.job.path / "residuals" / f"rank{rank}"
        return Checkpoints(folder)

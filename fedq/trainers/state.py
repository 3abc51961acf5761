"""What a federated job needs to go on as if it had never stopped: one state, saved after a round, loaded by `--resume`.

Random states are not among it: everything random is seeded by round and client, so a round's number is enough.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from types import MappingProxyType
from typing import Any

import torch

from fedq.checkpoint import Checkpoints, Loaded
from fedq.config import RunConfig
from fedq.federated.rounds import Outcome, Rounds
from fedq.federated.rounds_state import RoundsState
from fedq.federated.training import is_finite
from fedq.federated.versions import OwnerStore, Versions
from fedq.feedback import ResidualStore
from fedq.report import print_header
from fedq.trainers.fingerprint import KEY
from fedq.trainers.job import Job
from fedq.trainers.starts import note_repeated, wire_after_rounds
from fedq.wire import Kind

_NOTHING: Mapping[str, OwnerStore] = MappingProxyType({})


@dataclass
class Progress:
    """How far the rounds are: what the summary and the decision to stop need."""

    num_rounds: int = 0
    val_accuracy: float = math.nan
    best_val_accuracy: float = 0.0
    left_out: list[dict[str, Any]] = field(default_factory=list)
    lost_in_a_row: int = 0
    """Number of rounds in a row, up to now, of which no update could be used."""
    rollbacks: int = 0
    """Number of times that the model has diverged and the run gone back; each halves the learning rate."""
    seconds: float = 0.0
    """Seconds of the job, those of stopped processes included."""
    seconds_in_rounds: float = 0.0
    seconds_by_phase: dict[str, float] = field(default_factory=dict)
    """Seconds of the rounds so far by phase, mean over ranks."""

    def is_done(self, run: RunConfig) -> bool:
        """Whether the last round or the target accuracy is reached."""
        reached = run.target_accuracy is not None and self.val_accuracy >= run.target_accuracy
        return reached or self.num_rounds >= run.rounds


class JobState(ABC):
    """Saves and loads a job; what its state consists of is for each kind of job to say.

    Args:
        job: The job.
        so_far: The job's progress.
    """

    def __init__(self, job: Job, so_far: Progress) -> None:
        self.job = job
        self.so_far = so_far
        self.checkpoints = Checkpoints(job.path / "checkpoints")

    def is_done(self, run: RunConfig) -> bool:
        """Whether the last round or the target accuracy is reached."""
        return self.so_far.is_done(run)

    def is_due(self, run: RunConfig) -> bool:
        """Whether a checkpoint is to be written now: not of a model that nobody has trained since the last one."""
        so_far = self.so_far
        return self.is_done(run) or not (so_far.num_rounds % run.checkpoint_every or so_far.lost_in_a_row)

    @abstractmethod
    def save(self) -> None:
        """Write a checkpoint of the rounds so far; every rank calls it."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint's state, on every rank.

        Raises:
            FieldError: The state belongs to another model or other codecs.
        """

    @abstractmethod
    def is_finite(self) -> bool:
        """Whether the model that everybody holds has finite values alone; the same on every rank."""

    @abstractmethod
    def check(self, loaded: Loaded) -> None:
        """Read what the checkpoint names outside itself.

        Raises:
            CheckpointError: A file is damaged.
            FieldError: A file cannot be used.
        """

    def go_on(self) -> bool:
        """Load the newest checkpoint, if there is one, and say what is gone on with."""
        before = wire_after_rounds(self.job.path) if self.job.is_root else {}
        found, words = self.resume()
        if self.job.rollbacks > self.so_far.rollbacks:
            self.so_far.rollbacks = self.job.rollbacks
            words += f"; rolled back, with {0.5**self.job.rollbacks:g} of the learning rate"
        if self.job.is_root:
            note_repeated(self.job.path, self.job.start, before, self.so_far.num_rounds)
            print_header([words])
        return found

    def resume(self) -> tuple[bool, str]:
        """Load the newest checkpoint that is whole, with all that it names.

        Returns:
            Whether there was a checkpoint (a run that was stopped before its first starts again from the beginning),
            and what a user should know, in words.

        Raises:
            FieldError: Checkpoints exist, and all are damaged.
        """
        if not self.checkpoints.numbers():
            self.job.folder.rewind(0, {"metrics_bytes": 0})
            return False, "no round was finished before: starting from the first"
        loaded, damaged = self.checkpoints.newest_whole(self.check)
        self.load_state_dict(loaded.state)
        for number in damaged if self.job.is_root else ():
            self.checkpoints.set_aside(number)
        before, now = loaded.state["where"], self.where()
        changed = [f"{key} {before[key]} -> {now[key]}" for key in now if before.get(key, now[key]) != now[key]]
        refused = [f"round {number} is refused: {why}" for number, why in damaged.items()]
        lines = [f"resumed after round {loaded.number}", *changed, *refused]
        return True, "; ".join(lines)

    def lr(self, round: int) -> float:
        """Return the local learning rate of a round: half as high after each rollback."""
        return float(self.job.lr(round) * 0.5**self.so_far.rollbacks)

    def where(self) -> dict[str, Any]:
        """Return where the job runs: what may change when it is resumed."""
        runtime = self.job.runtime
        return {
            "world_size": runtime.world_size,
            "launcher": runtime.launcher,
            "device": runtime.device.type,
            "threads": torch.get_num_threads(),
        }


class Unsaved(JobState):
    """The progress of a job without checkpoints.

    Args:
        job: The job.
        can_stop: Returns whether the target accuracy counts after a number of rounds.
    """

    def __init__(self, job: Job, can_stop: Callable[[int], bool] = lambda num_rounds: True) -> None:
        super().__init__(job, Progress())
        self._can_stop = can_stop

    def is_done(self, run: RunConfig) -> bool:
        """Whether the last round is reached, or the target accuracy where it counts."""
        so_far = self.so_far
        return so_far.num_rounds >= run.rounds or (self._can_stop(so_far.num_rounds) and so_far.is_done(run))

    def is_due(self, run: RunConfig) -> bool:
        """Whether a checkpoint is to be written now: never."""
        return False

    def is_finite(self) -> bool:
        """Whether the model that everybody holds is finite: there is none."""
        return True

    def save(self) -> None:
        """Do nothing."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Do nothing: there is nothing to load."""

    def check(self, loaded: Loaded) -> None:
        """Do nothing: there is nothing to read."""


class RunState(JobState):
    """Saves and loads rounds, with the run's progress and its files.

    Args:
        job: The job.
        rounds: The job's rounds.
        so_far: The job's progress.
        store: Residuals of this rank's clients; None without error feedback.
        kept: Stores of what else every rank has in files of its own, by name in a checkpoint.
    """

    def __init__(
        self,
        job: Job,
        rounds: Rounds,
        so_far: Progress,
        store: ResidualStore | None,
        kept: Mapping[str, OwnerStore] = _NOTHING,
    ) -> None:
        super().__init__(job, so_far)
        self.federation = rounds
        files = {"residuals": Versions(store)} | {name: Versions(one) for name, one in kept.items()}
        self.rounds = RoundsState(rounds, job.model, job.transport, job.ledger, job.path, files)

    @property
    def files(self) -> Mapping[str, Versions]:
        """What every rank has in files of its own, by its name in a checkpoint."""
        return self.rounds.files

    def note(self, result: Outcome) -> None:
        """Remember whose residuals a round changed."""
        self.files["residuals"].note(frame.client for _, frame in result.frames if frame.kind == Kind.UPDATE)

    def state_dict(self) -> dict[str, Any]:
        """Return everything, on rank 0."""
        return {
            "progress": asdict(self.so_far),
            **self.rounds.state_dict(),
            "files": self.job.folder.position(),
            "where": self.where(),
            KEY: self.job.fingerprint.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned, on every rank.

        Raises:
            FieldError: The state belongs to another model or other codecs.
        """
        self.rounds.load_state_dict(state, is_compared=KEY in state)
        vars(self.so_far).update(state["progress"])
        if self.job.is_root:
            self.job.folder.rewind(self.so_far.num_rounds, state["files"])

    def is_finite(self) -> bool:
        """Whether the model that everybody holds has finite values alone."""
        return is_finite(self.federation.replica)

    def save(self) -> None:
        """Write a checkpoint of the rounds so far; every rank calls it."""
        self.rounds.save(self.so_far.num_rounds, self.checkpoints, self.state_dict)

    def check(self, loaded: Loaded) -> None:
        """Read what the checkpoint names outside itself."""
        self.rounds.check(loaded)

    def where(self) -> dict[str, Any]:
        """Return where the job runs, and who averages."""
        return super().where() | {"aggregate": self.job.config.exchange.aggregate}

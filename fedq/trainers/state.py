"""What a federated job needs to go on as if it had never stopped: one state, saved after a round, loaded by `--resume`.

Random states are not among it: everything random is seeded by round and client, so a round's number is enough.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from fedq.checkpoint import CheckpointError, Checkpoints, Loaded
from fedq.config import RunConfig
from fedq.errors import FieldError
from fedq.federated.rounds import Outcome, Rounds
from fedq.federated.server_shards import ServerShards
from fedq.federated.training import is_finite
from fedq.federated.versions import Versions
from fedq.feedback import ResidualStore
from fedq.layout import frozen_parameters
from fedq.report import print_header
from fedq.trainers.fingerprint import KEY
from fedq.trainers.job import Job
from fedq.trainers.starts import note_repeated, wire_after_rounds
from fedq.wire import Kind


@dataclass
class Progress:
    """How far the rounds are: what the summary and the decision to stop need."""

    num_rounds: int = 0
    val_accuracy: float = math.nan
    best_val_accuracy: float = 0.0
    left_out: list[dict[str, Any]] = field(default_factory=list)
    lost_in_a_row: int = 0
    """Rounds up to now of which no update could be used."""
    rollbacks: int = 0
    """How often the model has diverged and the run gone back; each halves the learning rate."""
    seconds: float = 0.0
    """Seconds of the job, those of stopped processes included."""
    seconds_in_rounds: float = 0.0
    seconds_by_phase: dict[str, float] = field(default_factory=dict)
    """Of the rounds, mean over ranks."""

    def is_done(self, run: RunConfig) -> bool:
        """Whether the last round or the target accuracy is reached."""
        reached = run.target_accuracy is not None and self.val_accuracy >= run.target_accuracy
        return reached or self.num_rounds >= run.rounds


class JobState(ABC):
    """Saves and loads a job; what its state consists of is for each kind of job to say.

    Args:
        job: The job.
        so_far: Its progress.
    """

    def __init__(self, job: Job, so_far: Progress) -> None:
        self.job = job
        self.so_far = so_far
        self.checkpoints = Checkpoints(job.path / "checkpoints")

    def is_due(self, run: RunConfig) -> bool:
        """Whether a checkpoint is to be written now: not of a model that nobody has trained since the last one."""
        so_far = self.so_far
        return so_far.is_done(run) or not (so_far.num_rounds % run.checkpoint_every or so_far.lost_in_a_row)

    @abstractmethod
    def save(self) -> None:
        """Write a checkpoint of the rounds so far; every rank calls it."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint's state, on every rank.

        Raises:
            FieldError: It belongs to another model or other codecs.
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
            Whether there was one (a run that was stopped before its first starts again from the beginning), and what
            a user should know.

        Raises:
            FieldError: Checkpoints exist, and all are damaged.
        """
        if not self.checkpoints.numbers():
            self.job.folder.rewind(0, {"metrics_bytes": 0})
            return False, "no round was finished before: starting from the first"
        loaded, damaged = self._newest_whole()
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

    def _newest_whole(self) -> tuple[Loaded, dict[int, str]]:
        """Return the newest checkpoint that is whole, and what is wrong with those after it; all ranks agree because
        all read the same files."""
        damaged: dict[int, str] = {}
        for number in reversed(self.checkpoints.numbers()):
            try:
                loaded = self.checkpoints.load(number)
                self.check(loaded)
            except (CheckpointError, FieldError) as error:
                damaged[number] = str(error)
                continue
            return loaded, damaged
        refused = [f"round {number} is refused: {why}" for number, why in damaged.items()]
        raise FieldError("resume", str(self.checkpoints.folder), "a checkpoint that is whole; " + "; ".join(refused))


class RunState(JobState):
    """Saves and loads rounds: model, replica, server optimizer, residuals, sampler position, ledger, files.

    Every rank saves the files of its own clients, only those that changed, and its part of the server where that is
    spread over the ranks; rank 0 writes the rest. Every rank loads what it needs from the run's folder, so nothing
    travels.

    Args:
        job: The job.
        federation: Its rounds.
        so_far: Its progress.
        store: This rank's residuals, None without error feedback.
    """

    def __init__(self, job: Job, federation: Rounds, so_far: Progress, store: ResidualStore | None) -> None:
        super().__init__(job, so_far)
        self.federation = federation
        self.files = {"residuals": Versions(store)}
        """What every rank has in files of its own, by its name in a checkpoint."""
        self.shards = ServerShards(job.path / "checkpoints" / "servers")

    def note(self, result: Outcome) -> None:
        """Remember whose residuals a round changed."""
        self.files["residuals"].note(frame.client for _, frame in result.frames if frame.kind == Kind.UPDATE)

    def state_dict(self) -> dict[str, Any]:
        """Return everything, on rank 0; residuals are named by owner and version, a spread server by its parts."""
        job, federation = self.job, self.federation
        server: dict[str, Any] = {"parts": job.runtime.world_size}
        if not federation.delivery.is_spread:
            server = federation.server.state_dict() if federation.server is not None else {}
        return {
            "progress": asdict(self.so_far),
            "replica": federation.replica,
            **_frozen(job.model),
            "server": server,
            "root_ingress_bytes": job.transport.received,
            **federation.delivery.state_dict(),
            "ledger": job.ledger.state_dict(),
            "files": job.folder.position(),
            **{name: dict(files.named) for name, files in self.files.items()},
            "layouts": [federation.delivery.uplink.hash, federation.downlink.hash],
            "where": self.where(),
            KEY: job.fingerprint.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned, on every rank.

        Raises:
            FieldError: It belongs to another model or other codecs.
        """
        hashes = [self.federation.delivery.uplink.hash, self.federation.downlink.hash]
        if KEY not in state and state["layouts"] != hashes:  # a fingerprint was compared before
            raise FieldError("resume", state["layouts"], f"{hashes}: the same model and codecs as before")
        vars(self.so_far).update(state["progress"])
        self.federation.replica.copy_(state["replica"])
        for name, param in frozen_parameters(self.job.model).items():
            param.data.copy_(state["frozen"][name])
        for name, files in self.files.items():
            files.attach(state[name])
        if self.federation.server is not None:
            self.federation.server.load_state_dict(state["server"])
        if self.job.is_root:
            self.job.transport.received = state.get("root_ingress_bytes", 0)
            self.federation.delivery.load_state_dict(state)
            self.job.ledger.load_state_dict(state["ledger"])
            self.job.folder.rewind(self.so_far.num_rounds, state["files"])

    def is_finite(self) -> bool:
        """Whether the model that everybody holds has finite values alone."""
        return is_finite(self.federation.replica)

    def save(self) -> None:
        """Write a checkpoint of the rounds so far; every rank calls it."""
        number = self.so_far.num_rounds
        for files in self.files.values():
            files.save(number)
        if self.federation.server is not None and self.federation.delivery.is_spread:
            self.shards.save(number, self.job.runtime.rank, self.job.runtime.world_size, self.federation.server)
        self.job.transport.barrier()  # all that a checkpoint names is on disk before it is written
        if not self.job.is_root:
            return
        for files in self.files.values():
            files.advance(number)
        self.checkpoints.save(number, self.state_dict())
        self.shards.prune(self.checkpoints.numbers())
        for files in self.files.values():
            files.prune()

    def check(self, loaded: Loaded) -> None:
        """Read the residuals that the checkpoint names, and the parts of a spread server, which are put together."""
        for name, files in self.files.items():
            files.check(loaded.state[name])
        if "parts" in (server := loaded.state["server"]):
            loaded.state["server"] = self.shards.load(loaded.number, server["parts"], self.federation.downlink)

    def where(self) -> dict[str, Any]:
        """Return where the job runs, and who averages."""
        return super().where() | {"aggregate": self.job.config.exchange.aggregate}


def _frozen(model: nn.Module) -> dict[str, Any]:
    """Return the entry of the parameters that do not travel, which the replica therefore lacks; none without any."""
    frozen = {name: param.detach() for name, param in frozen_parameters(model).items()}
    return {"frozen": frozen} if frozen else {}

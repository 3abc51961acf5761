"""Small real jobs for tests, watched: every uplink frame, every byte that the process group was given."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import Spy, run_group

from fedq.collectives import Transport
from fedq.config import Config, validate
from fedq.federated import rounds
from fedq.federated.client import Client
from fedq.federated.training import RoundContext, Trained
from fedq.trainers import job
from fedq.trainers import rounds as rounds_job
from fedq.trainers.run import run_job

SMALL = {
    "dataset": "digits",
    "train_examples": 280,
    "model": "cnn62k",
    "num_clients": 7,
    "cohort": 5,
    "local_steps": 2,
    "batch_size": 16,
    "rounds": 3,
    "precision": "fp32",
    "threads": 1,
    "device": "cpu",
}


def small_config(out: Path, **flags: Any) -> Config:
    """Return the settings of a job of a second: `SMALL`, with other values by the names of the flags."""
    given, parts = SMALL | {"out": out} | flags, {}
    for part in fields(Config):
        section = getattr(Config(), part.name)
        names = {field.name for field in fields(section)} & given.keys()
        parts[part.name] = replace(section, **{name: given.pop(name) for name in names})
    assert not given, f"no such settings: {given}"
    config = Config(**parts)
    validate(config)
    return config


def flags(out: Path | None, **changes: object) -> list[str]:
    """Return the flags of a small job on the command line."""
    given = SMALL | ({"out": out} if out else {}) | changes
    return [text for name, value in given.items() for text in (f"--{name.replace('_', '-')}", str(value))]


@dataclass(frozen=True)
class Watched:
    """What one rank saw of a job; frames by (round, client), as hash and bytes, on rank 0 alone; its last replica."""

    summary: dict[str, Any]
    frames: dict[tuple[int, int], tuple[str, int]]
    sent: int
    received: int
    replica: str | None


def run_watched(rank: int, jobs: list[tuple[Config, tuple[int, int] | None]]) -> list[Watched]:
    """Run jobs one after another; a (round, client) says whose update becomes NaN.

    Ranks other than 0 draw another initial model, so only what rank 0 sends can make them agree.

    Bytes count from the moment when the job has its transport: the handshake before (one all-reduce, one small object
    with the verdict on the run's folder) belongs to the launcher and is no part of training.
    """
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        return [_run(rank, config, nan_at) for config, nan_at in jobs]


def _run(rank: int, config: Config, nan_at: tuple[int, int] | None) -> Watched:
    frames: dict[tuple[int, int], tuple[str, int]] = {}
    spies: list[Spy] = []
    replicas: list[torch.Tensor] = []
    aggregate, train, build = rounds.aggregate, Client.train, rounds_job.build_rounds

    def watched_aggregate(layout, received, device, **limits):
        for frame in received:
            data = frame.pack().numpy().tobytes()
            frames[frame.round, frame.client] = (hashlib.sha256(data).hexdigest(), len(data))
        return aggregate(layout, received, device, **limits)

    def broken_train(client: Client, replica: torch.Tensor, context: RoundContext) -> Trained:
        trained = train(client, replica, context)
        if (context.round, client.number) == nan_at:
            trained.flat[0] = float("nan")
        return trained

    def noted_build(*given: Any) -> rounds.Rounds:
        built = build(*given)
        built.replica += rank
        replicas.append(built.replica)
        return built

    with pytest.MonkeyPatch.context() as patch:

        def spied_transport(device: torch.device, **options: Any) -> Transport:
            spies.append(Spy(patch))
            return Transport(device, **options)

        patch.setattr(rounds, "aggregate", watched_aggregate)
        patch.setattr(Client, "train", broken_train)
        patch.setattr(rounds_job, "build_rounds", noted_build)
        patch.setattr(job, "Transport", spied_transport)
        summary = run_job(config)
    (spy,) = spies
    hashes = [hashlib.sha256(replica.numpy().tobytes()).hexdigest() for replica in replicas]
    return Watched(summary, frames, spy.sent, spy.received, *(hashes or [None]))


class LazyJobs:
    """The jobs of a group of ranks, each run when it is first asked for.

    Args:
        world_size: Number of ranks.
        folder: Folder of the jobs' folders, which are named by their cases.
        body: Function of a rank and a list of jobs that runs them and returns what it saw of each.
        job: Function from a job's folder and case to what `body` is given of it.
    """

    def __init__(self, world_size: int, folder: Path, body: Callable, job: Callable[[Path, str], Any]) -> None:
        self.world_size = world_size
        self._folder, self._body, self._job = folder, body, job
        self._seen: dict[str, list[Any]] = {}

    def ranks(self, case: str) -> list[Any]:
        """Return what each rank saw of a job."""
        if case not in self._seen:
            job = self._job(self._folder / case, case)
            self._seen[case] = [seen for (seen,) in run_group(self.world_size, self._body, [job])]
        return self._seen[case]

    def folder(self, case: str) -> Path:
        """Return a job's folder, after the job."""
        self.ranks(case)
        return self._folder / case

    def model(self, case: str) -> str:
        """Return the hash of the model that a job left."""
        return file_hash(self.folder(case) / "model.safetensors")


def file_hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()

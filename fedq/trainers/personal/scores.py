"""Tests clients' models on their own classes, keeps each client's best, and writes how they did."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from fedq.data import Split
from fedq.federated.cohort import assign
from fedq.federated.evaluate import Scores
from fedq.federated.rounds import Rounds
from fedq.feedback import ResidualStore
from fedq.files import make_folder
from fedq.kernels import derive_seed
from fedq.personalize.evaluate import PersonalEvaluator
from fedq.personalize.methods import Method
from fedq.personalize.own_models import Network
from fedq.runfolder import write_model
from fedq.trainers.alone import share
from fedq.trainers.job import Job
from fedq.trainers.personal.quantization import log_centres


class PersonalScores:
    """The clients' scores, the same on every rank; each rank tests its own clients.

    Args:
        job: The job.
        method: Method, which says what model a client is tested with.
        rounds: The job's rounds, whose replica is what clients have downloaded.
        best: Store of the best models of this rank's clients, as they were tested.
    """

    def __init__(self, job: Job, method: Method, rounds: Rounds, best: ResidualStore) -> None:
        self.job = job
        self.method = method
        self.rounds = rounds
        self.best = best
        self.evaluator = PersonalEvaluator(job.evaluator, job.label_counts)
        num = len(job.parts)
        self.mine = assign(range(num), job.transport.world_size, sticky=True)[job.transport.rank]
        self.best_rounds = [-1] * num
        self.best_accuracies = [math.nan] * num
        self.test_accuracies = [math.nan] * num
        self.last_test_accuracies = [math.nan] * num
        self._latest: tuple[int, dict[int, float | None]] = (-1, {})
        self._improved: set[int] = set()

    def measure(self, job: Job, split: Split, round: int) -> Scores:
        """Return mean scores over clients: in a round on validation data, at the end on test data."""
        scores = self._test(round) if split is job.dataset.test else self._validate(round)
        return Scores(*scores.nanmean(dim=0).tolist())

    def val_accuracies(self, round: int) -> Mapping[int, float | None]:
        """Return the clients' validation accuracies of a round; none if it was not evaluated."""
        number, accuracies = self._latest
        return accuracies if number == round else {}

    def take_improved(self) -> set[int]:
        """Return whose best model changed since the last call."""
        improved, self._improved = self._improved, set()
        return improved

    def save_models(self) -> None:
        """Write this rank's clients' best models, and on rank 0 `personal.parquet`."""
        folder = self.job.path / "personal"
        make_folder(folder)
        for client in self.mine:
            module = self.fill_best(client).module
            tensors = {
                name: value if value.is_floating_point() else torch.zeros_like(value)  # counters are nobody's
                for name, value in module.state_dict().items()
            }
            write_model(folder / f"client-{client:06d}.safetensors", tensors)
        self.job.folder.write_personal([self._row(client) for client in range(len(self.best_rounds))])

    def fill_best(self, client: int) -> Network:
        """Put one of this rank's clients' best model into its network's module, and return the network."""
        network = self.method.models.networks[client]
        network.layout.unflatten_(self.best.get(client, network.layout.numel), network.module)
        return network

    def state_dict(self) -> dict[str, Any]:
        """Return whose best round was which."""
        return {"rounds": list(self.best_rounds), "val_accuracies": list(self.best_accuracies)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        self.best_rounds = list(state["rounds"])
        self.best_accuracies = list(state["val_accuracies"])

    # ---- scores ----

    def _validate(self, round: int) -> Tensor:
        """Score every client on validation data, float64 [clients, 2], and keep models that are better than before."""
        mine: dict[int, list[float]] = {}
        for client, network, means in self._means(self.job.dataset.val, round):
            own = self.evaluator.score(client, means)
            mine[client] = [own.loss, own.accuracy]
            if self._is_better(client, own.accuracy):
                self.best.put(client, network.layout.flatten(network.module))
        scores = share(self.job, mine, round, 2)
        for client, accuracy in enumerate(scores[:, 1].tolist()):
            if self._is_better(client, accuracy):
                self.best_rounds[client], self.best_accuracies[client] = round, accuracy
                self._improved.add(client)
        self._latest = round, {c: None if math.isnan(a) else a for c, a in enumerate(scores[:, 1].tolist())}
        models = self.method.models
        modules = [network.module for network in models.networks]
        log_centres(
            self.job, round, modules, models.bits, self.mine, lambda client: models.load(client, self.rounds.replica)
        )
        return scores

    def _is_better(self, client: int, accuracy: float) -> bool:
        """Whether a model is the best so far; without validation data every later one is."""
        return not accuracy <= self.best_accuracies[client]

    def _test(self, round: int) -> Tensor:
        """Score every client's best model and its last one on test data; return the best ones' scores."""
        split, last = self.job.dataset.test, {}
        for client, _, means in self._means(split, round):
            last[client] = self.evaluator.score(client, means)
        best = dict(last)
        for client in self.mine:
            if self.best_rounds[client] != round:
                module = self.fill_best(client).module
                means = self.evaluator.class_means(module, split, self.evaluator.classes(client))
                best[client] = self.evaluator.score(client, means)
        mine = {c: [one.loss, one.accuracy, one.balanced_accuracy, last[c].accuracy] for c, one in best.items()}
        scores = share(self.job, mine, round, 4)
        self.test_accuracies, self.last_test_accuracies = scores[:, 1].tolist(), scores[:, 3].tolist()
        return scores[:, :3]

    def _means(self, split: Split, round: int) -> Iterator[tuple[int, Network, Tensor]]:
        """Yield each of this rank's clients, the network that holds what it is tested with, and scores by class."""
        means, replica, job = None, self.rounds.replica, self.job
        for client in self.mine:
            job.watch.beat(f"testing client {client} after round {round}")
            seed = derive_seed(job.config.run.seed, "adapt", round, client)
            network = self.method.deploy(client, replica, job.parts[client], seed=seed)
            if self.method.is_shared:
                means = self.evaluator.class_means(network.module, split) if means is None else means
            else:
                means = self.evaluator.class_means(network.module, split, self.evaluator.classes(client))
            yield client, network, means

    # ---- tables ----

    def _row(self, client: int) -> dict[str, Any]:
        models = self.method.models
        return {
            "client": client,
            "bits": models.bits[client],
            "model": models.networks[client].name,
            "num_examples": len(self.job.parts[client]),
            "classes": self.evaluator.classes(client),
            "best_round": self.best_rounds[client],
            "val_accuracy": _known(self.best_accuracies[client]),
            "test_accuracy": _known(self.test_accuracies[client]),
            "last_test_accuracy": _known(self.last_test_accuracies[client]),
        }


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value

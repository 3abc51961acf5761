"""What a personalised job needs to go on: the state of its rounds, and the clients' own and best models."""

from __future__ import annotations

from typing import Any

from fedq.federated.rounds import Outcome, Rounds
from fedq.feedback import ResidualStore
from fedq.trainers.job import Job
from fedq.trainers.personal.scores import PersonalScores
from fedq.trainers.state import Progress, RunState
from fedq.wire import Kind


class PersonalState(RunState):
    """Saves and loads rounds with what clients keep: every rank its own clients' files, in `personal/`.

    Args:
        job: The job.
        rounds: The job's rounds.
        so_far: The job's progress.
        store: Residuals of this rank's clients; None without error feedback.
        test: Scores of the clients, with the method that has their models, and with their best models.
    """

    def __init__(
        self, job: Job, rounds: Rounds, so_far: Progress, store: ResidualStore | None, test: PersonalScores
    ) -> None:
        kept = {"own_models": test.method.models.store, "best_models": test.best}
        super().__init__(job, rounds, so_far, store, kept)
        self.test = test

    def note(self, result: Outcome) -> None:
        """Remember whose residual and whose own model a round changed; a client that failed kept its model."""
        super().note(result)
        if self.test.method.keeps_models:
            trained = (frame.client for _, frame in result.frames if frame.kind != Kind.FAILED)
            self.files["own_models"].note(trained)

    def save(self) -> None:
        """Write a checkpoint of the rounds so far; every rank calls it."""
        self.files["best_models"].note(self.test.take_improved())
        super().save()

    def state_dict(self) -> dict[str, Any]:
        """Return everything, on rank 0; the clients' models are named by client and version."""
        return super().state_dict() | {"best": self.test.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned, on every rank.

        Raises:
            FieldError: The state belongs to another model or other codecs.
        """
        super().load_state_dict(state)
        self.test.load_state_dict(state["best"])

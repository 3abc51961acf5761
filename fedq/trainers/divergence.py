"""What becomes of a run whose model diverges: it stops at its last good checkpoint, or goes back there.

A model is looked at before it is saved, so every checkpoint is a good one; all ranks come to the same end. As it was,
the run would diverge again: one that goes back trains on with half of the learning rate.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

from torch import Tensor

from fedq.config import Config
from fedq.data import Split
from fedq.errors import DivergedError
from fedq.trainers.job import Job
from fedq.trainers.records import on_any_rank
from fedq.trainers.starts import Finished
from fedq.trainers.state import JobState

C = TypeVar("C", bound=Config)

LOST_IN_A_ROW = 2
"""Rounds in a row of which no update could be used, after which a run is not worth its time."""
MOST_ROLLBACKS = 5
_LOOKED_AT = 16
"""Images that a model is tried on after a round without an evaluation."""


class Divergence:
    """Looks at a run's model after each round; every rank comes to the same end.

    Args:
        job: The job.
        state: The job's state, which has the model that everybody holds.
        has_one_model: Whether the job's model is the one that everybody holds, so that its loss says how that is.
    """

    def __init__(self, job: Job, state: JobState, *, has_one_model: bool) -> None:
        self.job = job
        self.state = state
        self.has_one_model = has_one_model
        self._has_gained = False

    def check(self, round: int, *, is_lost: bool, val_loss: float | None) -> None:
        """Look at the model after a round, before a checkpoint is written.

        Args:
            round: Number of the round, from 0.
            is_lost: Whether no update of the round could be used.
            val_loss: Loss on the validation data; None if the round was not evaluated.

        Raises:
            DivergedError: The model is of no use any more, or the clients cannot train it.
        """
        so_far = self.state.so_far
        so_far.lost_in_a_row = so_far.lost_in_a_row + 1 if is_lost else 0
        self._has_gained |= not is_lost
        reason = self._reason(round, val_loss)
        if reason is None:
            return
        if self.job.rollbacks and not self._has_gained:
            self._forget_newest()
        wants_end = self.job.config.run.on_divergence == "stop"
        raise _error(
            self.job,
            f"the model has diverged in round {round}: {reason}",
            rollbacks=so_far.rollbacks,
            is_final=wants_end or so_far.rollbacks >= MOST_ROLLBACKS,
        )

    def _forget_newest(self) -> None:
        """Delete a checkpoint that nobody could train from, also not gentler; the one before it has been trained from.

        Before the first round there is the start.
        """
        *before, newest = self.state.checkpoints.numbers() or [0]
        if self.job.is_root and (before or newest == 1):
            self.state.checkpoints.remove(newest)

    def _reason(self, round: int, val_loss: float | None) -> str | None:
        if not self.state.is_finite():
            return "its values are not finite"
        if self.state.so_far.lost_in_a_row >= LOST_IN_A_ROW:
            return f"no update of the last {LOST_IN_A_ROW} rounds could be used"
        if self.has_one_model and not self._has_finite_loss(round, val_loss):
            return "its loss is not finite"
        return None

    def _has_finite_loss(self, round: int, val_loss: float | None) -> bool:
        data = self.job.dataset
        if val_loss is not None and len(data.val):
            return math.isfinite(val_loss)
        split = data.val if len(data.val) else data.train
        few = Split(split.images[:_LOOKED_AT], split.labels[:_LOOKED_AT])
        with self.job.timer.phase("evaluation"):
            scores, _ = replace(self.job.evaluator, transport=None).run(self.job.model, few)
        return not on_any_rank(self.job, not math.isfinite(scores.loss), round)


def check_losses(job: Job, round: int, losses: Tensor) -> None:
    """Look at the losses of clients that train each for itself.

    Raises:
        DivergedError: No loss is finite.
    """
    if not losses.isfinite().any():
        raise _error(job, f"every model has diverged by round {round}: no loss is finite", rollbacks=0, is_final=True)


def _error(job: Job, words: str, *, rollbacks: int, is_final: bool) -> DivergedError:
    if is_final:
        words += f"; {job.watch.farewell('divergence')}"
        if job.config.exchange.exchange != "none":
            words += " with other settings (--lr lower --resume-changed lr, or --on-divergence rollback)"
    return DivergedError(words, path=job.path, rollbacks=rollbacks, is_final=is_final)


def rolling_back(config: C, run_once: Callable[[C, int], dict[str, Any]]) -> dict[str, Any]:
    """Run a job to its end, by way of its last good checkpoint as often as its model diverges and may be rolled back.

    Args:
        config: The job's settings.
        run_once: Runs the job with the settings, given the number of rollbacks before, and returns the summary.

    Returns:
        The summary, also of a run that was finished before.

    Raises:
        DivergedError: The model has diverged for good.
    """
    rollbacks = 0
    while True:
        try:
            return run_once(config, rollbacks)
        except Finished as finished:
            return finished.summary
        except DivergedError as error:
            if error.is_final:
                raise
            rollbacks = error.rollbacks + 1
            config = replace(config, run=replace(config.run, resume=error.path))

"""What a federation leaves in its run's folder, and what it must remember of its rounds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from fedq.checkpoint import Checkpoints
from fedq.errors import FieldError
from fedq.federated.results import RoundResult, Summary
from fedq.federated.rounds import Outcome
from fedq.ledger import Ledger
from fedq.metrics import Metric
from fedq.runfolder import NullRunFolder, RunFolder, environment_info, holds_run

_BYTES = ("uplink_bytes", "downlink_bytes", "uplink_bytes_fp32", "downlink_bytes_fp32")


class Record:
    """The run's folder, written on rank 0, and the sums of its rounds, known on every rank.

    Args:
        path: The run's folder; None: nothing is written.
        metrics: What is measured; the first one decides what is best.
    """

    def __init__(self, path: Path | None, metrics: Sequence[Metric]) -> None:
        self.path = path
        self.metrics = metrics
        self.checkpoints = None if path is None else Checkpoints(path / "checkpoints")
        self.total = Summary(0)
        """Summary of the rounds so far."""
        self._folder: RunFolder | NullRunFolder = NullRunFolder()
        self._left_out: list[dict[str, Any]] = []

    def open(self, *, resume: bool) -> None:
        """Make the folder this process's own, on rank 0.

        Raises:
            FieldError: The folder cannot be written, is another process's, or holds a run that is not resumed.
        """
        if self.path is None:
            return
        if not resume and holds_run(self.path):
            raise FieldError("out", str(self.path), "a folder without a run, or resume=True, which goes on with it")
        self._folder = RunFolder.create(self.path, name="", exist_ok=resume)

    def begin(self) -> None:
        """Forget the rounds of a run that has no checkpoint."""
        self._folder.rewind(0, {"metrics_bytes": 0})

    def describe(self, settings: Mapping[str, Any]) -> None:
        """Write the settings."""
        self._folder.write_config({**settings, "metrics": [asdict(metric) for metric in self.metrics]})

    def add(self, result: RoundResult, lr: float, outcome: Outcome, ledger: Ledger, received: int) -> None:
        """Take a round: on rank 0 write its rows.

        Args:
            result: The round's result, known to every rank.
            lr: The round's local learning rate.
            outcome: What rank 0 alone knows of the round.
            ledger: Ledger of the bytes that were counted so far.
            received: Bytes that have come to rank 0 so far.
        """
        total, values = self.total, dict(result.metrics)
        first = values.get(f"val_{self.metrics[0].name}", values.get(f"train_{self.metrics[0].name}"))
        sums = {name: getattr(total, name) + getattr(result, name) for name in _BYTES}
        self.total = Summary(
            result.round + 1,
            result.loss,
            self.metrics[0].best([total.best, first]),
            values,
            seconds=total.seconds + result.seconds,
            **sums,
        )
        self._left_out += [{"round": result.round, "client": c, "reason": why} for c, why in result.left_out.items()]
        if self._folder.path is None:
            return
        self._folder.log_clients(
            [
                {
                    "round": result.round,
                    "client": frame.client,
                    "rank": rank,
                    "num_examples": int(frame.weight),
                    "train_loss": _known(frame.loss),
                    "train_accuracy": _known(frame.accuracy),
                    "status": result.left_out.get(frame.client) or result.clipped.get(frame.client, "ok"),
                    "label_counts": [],
                }
                for rank, frame in outcome.frames
            ]
        )
        counted = {f"{direction}_bytes": ledger.totals(direction).payload for direction in ("uplink", "downlink")}
        self._folder.log_metrics(
            result.round,
            **({} if math.isnan(result.loss) else {"train_loss": result.loss}) | values,
            lr=lr,
            seconds=result.seconds,
            root_ingress_bytes=received,
            **counted,
            wire_bytes=ledger.totals().wire,
        )

    def write(
        self, ledger: Ledger, tensors: Mapping[str, Tensor], settings: Mapping[str, Any], place: Mapping[str, Any]
    ) -> None:
        """Write model, ledger and summary, on rank 0.

        Args:
            ledger: Ledger of the bytes that were counted.
            tensors: The model's tensors, by name.
            settings: The run's settings, as `describe` has written them.
            place: Fields of the summary that say what was trained, and where.
        """
        if self._folder.path is None:
            return
        total = self.total
        self._folder.save_model(tensors)
        self._folder.write_ledger(ledger)
        self._folder.write_summary(
            {
                "dataset": "own data",
                **place,
                **settings["clients"],
                **settings["exchange"],
                "seed": settings["run"]["seed"],
                "rounds": total.rounds,
                "metrics": [asdict(metric) for metric in self.metrics],
                "best": total.best,
                "last": {
                    name.removeprefix("val_"): value for name, value in total.metrics.items() if name.startswith("val_")
                },
                "train_loss": _known(total.loss),
                "test_accuracy": None,
                "best_val_accuracy": None,
                **{name: getattr(total, name) for name in _BYTES},
                "wire_bytes": ledger.totals().wire,
                "left_out": self._left_out,
                "seconds": total.seconds,
                "seconds_per_round": total.seconds / max(1, total.rounds),
                "git_commit": None,
                **environment_info(),
            }
        )

    def state_dict(self) -> dict[str, Any]:
        """Return what must be known to go on, on rank 0."""
        total = asdict(self.total) | {"metrics": dict(self.total.metrics)}
        return {"files": self._folder.position(), "total": total, "left_out": self._left_out}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned, and forget what was written later."""
        self.total = Summary(**state["total"])
        self._left_out = list(state["left_out"])
        self._folder.rewind(self.total.rounds, state["files"])

    def close(self) -> None:
        """Write what is still in memory, and let other processes in."""
        self._folder.close()


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value

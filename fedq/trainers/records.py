"""What a round leaves in the run's folder, the log and the progress bar."""

from __future__ import annotations

import logging
import math
from typing import Any

from fedq.federated.rounds import RoundResult
from fedq.report import human_bytes
from fedq.trainers.job import Job

_log = logging.getLogger(__name__)


def report_left_out(round: int, result: RoundResult) -> list[dict[str, Any]]:
    """Warn of clients that were left out or clipped; return the rows for the summary."""
    for client, words in result.clipped.items():
        _log.warning("round %d: client %d: %s", round, client, words)
    for client, reason in result.left_out.items():
        _log.warning("round %d: client %d is left out: %s", round, client, reason)
    return [{"round": round, "client": client, "reason": reason} for client, reason in result.left_out.items()]


def log_round(job: Job, round: int, result: RoundResult, metrics: dict[str, Any]) -> None:
    """Write the round's rows on rank 0."""
    if not job.is_root:
        return
    rows = [
        {
            "round": round,
            "client": frame.client,
            "rank": rank,
            "num_examples": len(job.parts[frame.client]),
            "train_loss": _known(frame.loss),
            "train_accuracy": _known(frame.accuracy),
            "val_accuracy": None,
            "status": result.left_out.get(frame.client) or result.clipped.get(frame.client, "ok"),
            "label_counts": job.label_counts[frame.client].tolist(),
        }
        for rank, frame in result.frames
    ]
    job.folder.log_clients(rows)
    totals = {f"{d}_bytes": job.ledger.totals(d).payload for d in ("uplink", "downlink")}
    job.folder.log_metrics(
        round,
        train_loss=result.train_loss,
        train_accuracy=result.train_accuracy,
        **metrics,
        **totals,
        wire_bytes=job.ledger.totals().wire,
    )


def progress_text(job: Job, val_accuracy: float) -> str:
    """Return what stands beside the progress bar, on rank 0."""
    if not job.is_root:
        return ""
    up, down = (human_bytes(job.ledger.totals(d).payload) for d in ("uplink", "downlink"))
    return f"{accuracy_text(val_accuracy)}up {up}, down {down}"


def accuracy_text(val_accuracy: float) -> str:
    """Return the last validation accuracy in words; nothing before the first."""
    return "" if math.isnan(val_accuracy) else f"val accuracy {100 * val_accuracy:.1f} %, "


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value

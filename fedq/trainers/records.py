"""What a round leaves in the run's folder, the log and the progress bar."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch

from fedq.data import Split
from fedq.errors import FieldError
from fedq.federated.accounting import framing
from fedq.federated.evaluate import Scores
from fedq.federated.rounds import Outcome
from fedq.ledger import NO_CLIENT, MessageParts
from fedq.lowbit import deployed_state_dict, few_bit_layers, pack
from fedq.phases import PHASES
from fedq.report import human_bytes
from fedq.trainers.job import Job

_log = logging.getLogger(__name__)
_UNKNOWN: Mapping[int, float | None] = MappingProxyType({})


def report_left_out(round: int, result: Outcome) -> list[dict[str, Any]]:
    """Warn of clients that were left out or clipped; return the rows for the summary."""
    for client, words in result.clipped.items():
        _log.warning("round %d: client %d: %s", round, client, words)
    for client, reason in result.left_out.items():
        _log.warning("round %d: client %d is left out: %s", round, client, reason)
    return [{"round": round, "client": client, "reason": reason} for client, reason in result.left_out.items()]


def book_peer(job: Job, round: int, parts: MessageParts, *, times: int = 1) -> None:
    """Book what crossed between ranks for no client, on rank 0; nothing if nothing did."""
    if job.is_root and parts.nbytes:
        job.ledger.record(
            round=round, client=NO_CLIENT, direction="peer", parts=parts, payload_times=0, wire_times=times
        )


def book_metrics(job: Job, nbytes: int, round: int) -> None:
    """Book shared metrics as bytes between ranks."""
    book_peer(job, round, framing("metrics", nbytes))


def on_any_rank(job: Job, holds: bool, round: int) -> bool:
    """Return whether something holds on any rank, on every rank."""
    told, moved = job.transport.all_gather(torch.tensor([float(holds)], dtype=torch.float64))
    book_metrics(job, moved.payload, round)
    return bool(told.any())


def is_lost(job: Job, round: int, result: Outcome) -> bool:
    """Return whether no update of a round could be used, on every rank; a round that has changed the model is none."""
    return not result.has_change and on_any_rank(job, result.is_lost, round)


def evaluate(job: Job, split: Split, round: int) -> Scores:
    """Return how the job's model does as it is, on every rank, and book the shared sums; test data also by class."""
    num_classes = job.dataset.num_classes if split is job.dataset.test else 0
    scores, moved = job.evaluator.run(job.model, split, num_classes=num_classes)
    book_metrics(job, moved.payload, round)
    return scores


def log_phases(job: Job, round: int) -> dict[str, float]:
    """Share every rank's phases of a round and write them on rank 0; return the mean seconds over ranks by phase."""
    spent = job.timer.take()
    own = [[spent[name].seconds, spent[name].hidden, spent[name].calls] for name in PHASES]
    shared, moved = job.transport.all_gather(torch.tensor(own, dtype=torch.float64))
    book_metrics(job, moved.payload, round)
    rows = [
        {
            "round": round,
            "rank": rank,
            "phase": name,
            "seconds": seconds,
            "hidden_seconds": hidden,
            "calls": int(calls),
        }
        for rank, phases in enumerate(shared.tolist())
        for name, (seconds, hidden, calls) in zip(PHASES, phases, strict=True)
    ]
    job.folder.log_phases(rows)
    return dict(zip(PHASES, shared[..., 0].mean(dim=0).tolist(), strict=True))


def compare_interfaces(job: Job, round: int) -> dict[str, Any] | None:
    """Return on rank 0 what the interfaces sent beside what was counted, since this start, as the summary has it."""
    compared, told = job.interfaces.total(job.ledger.since_start().wire)
    book_metrics(job, told, round)
    return compared


def finish(job: Job, **results: Any) -> dict[str, Any]:
    """Write the job's model as it is, ledger and summary on rank 0; return the summary there."""
    if not job.is_root:
        return {}
    tensors = deployed_state_dict(job.model)
    job.folder.save_model(tensors)
    if few_bit_layers(job.model):
        results |= _save_packed(job, sum(tensor.nbytes for tensor in tensors.values()))
    job.folder.write_ledger(job.ledger)
    up, down = job.ledger.totals("uplink"), job.ledger.totals("downlink")
    summary = job.summary(
        uplink_bytes=up.payload,
        downlink_bytes=down.payload,
        uplink_bytes_fp32=up.raw,
        downlink_bytes_fp32=down.raw,
        wire_bytes=job.ledger.totals().wire,
        **results,
    )
    job.folder.write_summary(summary)
    return summary


def _save_packed(job: Job, float_nbytes: int) -> dict[str, Any]:
    """Write the packed model; return its bytes and those of the float one, for the summary."""
    try:
        packed = pack(job.model)
    except FieldError as error:  # a model that has diverged; its float tensors and its summary say so
        _log.warning("there will be no model.fedq: %s", error)
        return {}
    return {"packed_bytes": job.folder.save_packed(packed), "packed_bytes_fp32": float_nbytes}


def log_round(
    job: Job,
    round: int,
    result: Outcome,
    metrics: dict[str, Any],
    val_accuracies: Mapping[int, float | None] = _UNKNOWN,
) -> None:
    """Write the round's rows on rank 0; validation accuracies are those of clients' own models, where there are any."""
    if not job.is_root:
        return
    job.folder.log_clients(
        [
            client_row(
                job,
                round,
                frame.client,
                rank,
                _known(frame.loss),
                _known(frame.accuracy),
                num_examples=int(frame.weight),
                val_accuracy=val_accuracies.get(frame.client),
                status=result.left_out.get(frame.client) or result.clipped.get(frame.client, "ok"),
            )
            for rank, frame in result.frames
        ]
    )
    means = {"train_loss": result.train_loss, "train_accuracy": result.train_accuracy}
    log_metrics(job, round, metrics | means | {"root_ingress_bytes": job.transport.received})


def client_row(
    job: Job,
    round: int,
    client: int,
    rank: int,
    train_loss: float | None,
    train_accuracy: float | None,
    *,
    num_examples: int | None = None,
    val_accuracy: float | None = None,
    status: str = "ok",
) -> dict[str, Any]:
    """Return a client's row of a round, for `clients.parquet`; examples: by default all that it holds."""
    return {
        "round": round,
        "client": client,
        "rank": rank,
        "num_examples": len(job.parts[client]) if num_examples is None else num_examples,
        "train_loss": train_loss,
        "train_accuracy": train_accuracy,
        "val_accuracy": val_accuracy,
        "status": status,
        "label_counts": job.label_counts[client].tolist(),
    }


def log_metrics(job: Job, round: int, metrics: dict[str, Any]) -> None:
    """Write a round's metrics, with the bytes so far, on rank 0."""
    totals = {f"{d}_bytes": job.ledger.totals(d).payload for d in ("uplink", "downlink")}
    job.folder.log_metrics(round, **metrics, **totals, wire_bytes=job.ledger.totals().wire)


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

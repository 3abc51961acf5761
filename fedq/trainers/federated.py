"""The federated job: rounds until the end or the target accuracy, then the test set, the summary and the model."""

from __future__ import annotations

import logging
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedq.codecs import codec
from fedq.config import Config
from fedq.data import Split
from fedq.federated.accounting import framing
from fedq.federated.client import Client, RoundContext
from fedq.federated.downlink import DownlinkCost
from fedq.federated.optim import server_optimizer
from fedq.federated.rounds import FederatedRounds, RoundResult
from fedq.federated.server import Server
from fedq.feedback import ErrorFeedback, Feedback, NoFeedback, ResidualStore
from fedq.layout import Layout
from fedq.ledger import NO_CLIENT
from fedq.report import human_bytes, print_summary, round_progress
from fedq.trainers.alone import run_alone
from fedq.trainers.histograms import HistogramLog
from fedq.trainers.job import GIB, Job, open_job

_log = logging.getLogger(__name__)


def run_job(config: Config) -> dict[str, Any]:
    """Run the job that a config describes, on this rank.

    Returns:
        The summary, on rank 0; the run's folder has everything else.

    Raises:
        FieldError: A setting that cannot be used.
    """
    with open_job(config) as job:
        summary = run_alone(job) if config.exchange.exchange == "none" else run_rounds(job)
    if job.folder.path is not None:
        print_summary(job.folder.path)
    return summary


@dataclass
class Progress:
    """How far the rounds are: what the summary and the decision to stop need."""

    num_rounds: int = 0
    val_accuracy: float = math.nan
    best_val_accuracy: float = 0.0
    left_out: list[dict[str, Any]] = field(default_factory=list)


def run_rounds(job: Job) -> dict[str, Any]:
    """Run federated rounds and write their results."""
    run, so_far = job.config.run, Progress()
    rounds = build_rounds(job)
    rounds.share_start()
    begin = time.perf_counter()
    with round_progress(run.rounds, job.is_root) as progress:
        for number in range(run.rounds):
            _run_round(job, rounds, number, so_far)
            progress.update(so_far.num_rounds, _progress_text(job, so_far.val_accuracy))
            if run.target_accuracy is not None and so_far.val_accuracy >= run.target_accuracy:
                break
    training_s = time.perf_counter() - begin
    test_loss, test_accuracy = _evaluate(job, rounds.replica, job.dataset.test, so_far.num_rounds - 1)
    return _finish(
        job,
        rounds,
        rounds=so_far.num_rounds,
        test_accuracy=test_accuracy,
        test_loss=test_loss,
        best_val_accuracy=so_far.best_val_accuracy,
        left_out=so_far.left_out,
        seconds_setup=begin - job.started,
        seconds_per_round=training_s / so_far.num_rounds,
    )


def _run_round(job: Job, rounds: FederatedRounds, number: int, so_far: Progress) -> None:
    """Run one round, evaluate where it is due, and write its rows."""
    run, begin = job.config.run, time.perf_counter()
    context = RoundContext(number, job.lr(number), run.seed)
    result = rounds.run(context)
    so_far.num_rounds = number + 1
    so_far.left_out += _report_left_out(number, result)
    metrics: dict[str, Any] = {"lr": context.lr}
    if so_far.num_rounds % run.eval_every == 0 or so_far.num_rounds == run.rounds:
        metrics["val_loss"], metrics["val_accuracy"] = _evaluate(job, rounds.replica, job.dataset.val, number)
        so_far.val_accuracy = metrics["val_accuracy"]
        so_far.best_val_accuracy = max(so_far.best_val_accuracy, so_far.val_accuracy)
    _log_round(job, number, result, metrics | {"seconds": time.perf_counter() - begin})


def build_rounds(job: Job) -> FederatedRounds:
    """Put clients, server, codecs and residuals together as the settings say."""
    exchange, num_clients = job.config.exchange, job.config.clients.num_clients
    feedback_on = wants_feedback(exchange.feedback, exchange.uplink)
    uplink = Layout.of(job.model, codec(exchange.uplink).resolved(feedback=feedback_on))
    # The replica is the downlink's memory, so its codec always works with feedback.
    downlink = Layout.of(job.model, codec(exchange.downlink).resolved(feedback=True))
    feedback = _feedback(job) if feedback_on else NoFeedback()
    replica = uplink.flatten(job.model)
    clients = {i: Client(i, part, job.training, uplink, feedback) for i, part in enumerate(job.parts)}
    server = None
    if job.is_root:
        server = Server(replica, downlink, lambda params: server_optimizer(exchange.server, params))
    return FederatedRounds(
        transport=job.transport,
        clients=clients,
        server=server,
        uplink=uplink,
        downlink=downlink,
        replica=replica,
        ledger=job.ledger,
        downlink_cost=DownlinkCost(job.ledger, downlink, exchange.downlink_to, num_clients),
        cohort_size=job.config.cohort_size,
        sticky=feedback_on,
        observe=HistogramLog(job, uplink),
    )


def wants_feedback(setting: str, uplink: str) -> bool:
    """Resolve ``auto``: error feedback for every codec that loses more than a cast does and is not unbiased."""
    return setting == "on" or (setting == "auto" and codec(uplink).wants_feedback)


def _feedback(job: Job) -> Feedback:
    """Return error feedback whose residuals spill into the run's folder, which all ranks share."""
    path = job.folder.path
    message, moved = job.transport.broadcast(
        None if path is None else torch.tensor(list(str(path.resolve()).encode()), dtype=torch.uint8)
    )
    if job.is_root and moved.payload:
        job.ledger.record(
            round=0, client=NO_CLIENT, direction="peer", parts=framing("folder", moved.payload + moved.sizes),
            payload_times=0, wire_times=1,
        )  # fmt: skip
    folder = Path(bytes(message.cpu().tolist()).decode()) / "residuals"
    return ErrorFeedback(ResidualStore(int(job.config.run.memory_limit_gib * GIB), folder))


def _evaluate(job: Job, flat: Tensor, split: Split, round: int) -> tuple[float, float]:
    """Evaluate the replica, and book the shared sums as peer bytes."""
    job.training.layout.unflatten_(flat, job.model)
    loss, accuracy, moved = job.evaluator.run(job.model, split)
    if job.is_root and moved.payload:
        parts = framing("metrics", moved.payload)
        job.ledger.record(round=round, client=NO_CLIENT, direction="peer", parts=parts, payload_times=0, wire_times=1)
    return loss, accuracy


def _report_left_out(round: int, result: RoundResult) -> list[dict[str, Any]]:
    for client, reason in result.left_out.items():
        _log.warning("round %d: client %d is left out: %s", round, client, reason)
    return [{"round": round, "client": client, "reason": reason} for client, reason in result.left_out.items()]


def _log_round(job: Job, round: int, result: RoundResult, metrics: dict[str, Any]) -> None:
    """Write the round's rows on rank 0."""
    if not job.is_root:
        return
    rows = [
        {
            "round": round,
            "client": frame.client,
            "rank": rank,
            "num_examples": len(job.parts[frame.client]),
            "train_loss": frame.loss,
            "train_accuracy": frame.accuracy,
            "val_accuracy": None,
            "status": result.left_out.get(frame.client, "ok"),
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


def _progress_text(job: Job, val_accuracy: float) -> str:
    if not job.is_root:
        return ""
    up, down = (human_bytes(job.ledger.totals(d).payload) for d in ("uplink", "downlink"))
    return f"val accuracy {100 * val_accuracy:.1f} %, up {up}, down {down}"


def _finish(job: Job, federation: FederatedRounds, **results: Any) -> dict[str, Any]:
    """Write model, checkpoint, ledger and summary on rank 0."""
    if not job.is_root:
        return {}
    assert federation.server is not None
    job.training.layout.unflatten_(federation.replica, job.model)
    job.folder.save_model(job.model.state_dict())
    views = {
        "master": job.training.layout.views(federation.server.master),
        "replica": job.training.layout.views(federation.replica),
    }
    job.folder.save_checkpoint({f"{kind}/{name}": t for kind, named in views.items() for name, t in named.items()})
    job.folder.write_ledger(job.ledger)
    up, down = job.ledger.totals("uplink"), job.ledger.totals("downlink")
    summary = job.summary(
        feedback=federation.sticky,
        uplink_bytes=up.payload,
        downlink_bytes=down.payload,
        uplink_bytes_fp32=up.raw,
        downlink_bytes_fp32=down.raw,
        wire_bytes=job.ledger.totals().wire,
        seconds=time.perf_counter() - job.started,
        **results,
    )
    job.folder.write_summary(summary)
    return summary

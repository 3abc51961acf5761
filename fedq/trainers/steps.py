"""Data-parallel training: in every step the gradients are averaged over the ranks in few bits. An epoch is a round.

Every rank is a client. With ``--partition iid`` the training set is shuffled anew and dealt over the ranks each epoch,
as a distributed sampler does; with any other partition a rank keeps its own images. Either way all ranks take equally
many steps.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from fedq.collectives import Moved, Transport
from fedq.federated.accounting import plain_model
from fedq.federated.frozen import check_ranks
from fedq.federated.image_training import Passed
from fedq.federated.training import seeded
from fedq.feedback import feedback_rule
from fedq.hooks import StepExchange, is_powersgd
from fedq.kernels import derive_seed
from fedq.layout import Layout
from fedq.trainers.job import Job
from fedq.trainers.loop import Ran, run_to_the_end
from fedq.trainers.records import book_metrics, book_peer, client_row, finish, log_metrics
from fedq.trainers.state import JobState, Progress
from fedq.trainers.step_ledger import StepLedger, statistics_parts
from fedq.trainers.step_state import StepRunState


def run_steps(job: Job) -> dict[str, Any]:
    """Train epochs, a checkpoint after each, and write their results."""
    engine = job.training.steps_by
    _share_start(job)  # first: the ranks compare their models when they begin to share gradients
    shared = engine.share_gradients(_options(job))
    engine.start(job.lr(0))
    state = StepRunState(job, Progress(), engine, shared)
    if job.config.run.resume:
        state.go_on()
    books = StepLedger(job.ledger, shared, job.runtime.world_size)
    results = run_to_the_end(job, state, lambda number: _run_epoch(job, state, shared, books, number), noun="epoch")
    return finish(job, feedback=shared.feedback, **results)


def _options(job: Job) -> dict[str, Any]:
    exchange, runtime = job.config.exchange, job.runtime
    several_nodes = runtime.local_world_size < runtime.world_size
    return {
        "spec": exchange.uplink,
        "second": None if is_powersgd(exchange.uplink) else exchange.downlink,
        "feedback": feedback_rule(exchange.feedback).asked,
        "schedule": exchange.schedule,
        "ranks_per_node": runtime.local_world_size if several_nodes else 1,
        "seed": derive_seed(job.config.run.seed, "gradients"),
        "timer": job.timer,
    }


def _share_start(job: Job) -> None:
    """Send rank 0's initial model to all, in float32, so that no rank relies on having drawn the same one.

    Raises:
        FieldError: The ranks' frozen parameters, which are not sent, differ.
    """
    layout = job.training.layout
    book_metrics(job, check_ranks(job.model, job.transport), 0)
    moved = share_weights(layout, job.model, job.transport)
    if moved.payload:
        book_peer(job, 0, plain_model(layout), times=job.runtime.world_size - 1)
        book_metrics(job, moved.sizes, 0)


def share_weights(layout: Layout, model: nn.Module, transport: Transport) -> Moved:
    """Replace every rank's model by rank 0's, and return the bytes that crossed."""
    flat = layout.flatten(model)
    moved = transport.share(flat)
    layout.unflatten_(flat, model)
    return moved


def _run_epoch(job: Job, state: JobState, shared: StepExchange, books: StepLedger, number: int) -> Ran:
    job.watch.beat(f"training in epoch {number}")
    training = job.training
    training.steps_by.set_lr(state.lr(number))
    generator = seeded(derive_seed(job.config.run.seed, "local", number, job.runtime.rank))
    indices = epoch_indices(job, number)
    with job.timer.phase("compute"):
        passed = training.train(indices, training.index_batches(len(indices), generator), generator)
    job.watch.beat(f"sharing statistics of epoch {number}")
    book_peer(job, number, statistics_parts(share_statistics(training.layout, job.model, job.transport)))
    rows = _share_totals(job, passed, shared, number)
    books.book_steps(number, passed.num_steps, rows[:, 3:])
    has_loss = bool(rows[:, 0].isfinite().any())
    return Ran(lambda metrics: _log(job, number, rows, metrics), is_lost=not has_loss)


def epoch_indices(job: Job, epoch: int) -> Tensor:
    """Return this rank's examples of an epoch; equally many on every rank, so a few may come twice."""
    num, world_size, rank = len(job.dataset.train), job.runtime.world_size, job.runtime.rank
    each = math.ceil(num / world_size)
    seed = derive_seed(job.config.run.seed, "order", epoch)
    if job.config.clients.partition == "iid":
        order = torch.randperm(num, generator=torch.Generator().manual_seed(seed))
        return _repeated(order, each * world_size)[rank::world_size]
    own, generator = job.parts[rank], torch.Generator().manual_seed(seed)
    return _repeated(own[torch.randperm(len(own), generator=generator)], each)


def _repeated(indices: Tensor, length: int) -> Tensor:
    return indices.repeat(math.ceil(length / len(indices)))[:length]


def share_statistics(layout: Layout, model: nn.Module, transport: Transport) -> int:
    """Average the normalisation layers' float statistics over ranks, in rank order; return the bytes that crossed."""
    tensors = [tensor for span, tensor in zip(layout.spans, layout.tensors(model), strict=True) if span.role == "stats"]
    if not tensors or transport.world_size == 1:
        return 0
    gathered, moved = transport.all_gather(torch.cat([tensor.flatten().float() for tensor in tensors]))
    mean = gathered.mean(dim=0)
    for tensor, part in zip(tensors, mean.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))
    return moved.payload


def _share_totals(job: Job, passed: Passed, shared: StepExchange, round: int) -> Tensor:
    """Return each rank's loss sum, correct answers, examples, and bytes sent so far by leg, (ranks, 5) float64."""
    own = (passed.loss_sum, passed.num_correct, passed.num_seen, shared.sent.first, shared.sent.second)
    rows, moved = job.transport.all_gather(torch.tensor(own, dtype=torch.float64))
    book_metrics(job, moved.payload, round)
    return rows


def _log(job: Job, round: int, rows: Tensor, metrics: dict[str, Any]) -> None:
    """Write the epoch's rows on rank 0."""
    if not job.is_root:
        return
    means = [(loss / max(1, seen), correct / max(1, seen), int(seen)) for loss, correct, seen, *_ in rows.tolist()]
    job.folder.log_clients(
        [
            client_row(job, round, rank, rank, loss, accuracy, num_examples=seen)
            for rank, (loss, accuracy, seen) in enumerate(means)
        ]
    )
    loss, correct, seen = rows[:, :3].sum(dim=0).tolist()
    log_metrics(job, round, metrics | {"train_loss": loss / max(1, seen), "train_accuracy": correct / max(1, seen)})

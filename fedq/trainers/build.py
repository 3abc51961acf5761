"""From settings to federated rounds: codecs, residuals, clients, server."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from fedq.codecs import Codec, codec, codec_schedule
from fedq.config import Config
from fedq.federated.chaos import chaos
from fedq.federated.client import Client, Training
from fedq.federated.downlink import DownlinkCost
from fedq.federated.exchange import Exchange, Rooted
from fedq.federated.optim import server_optimizer
from fedq.federated.rounds import FederatedRounds
from fedq.federated.server import NormLimit, Server
from fedq.federated.two_phase import TwoPhase
from fedq.feedback import ErrorFeedback, NoFeedback, ResidualStore
from fedq.layout import Layout, LayoutSchedule
from fedq.lowbit import few_bit_layers
from fedq.report import print_header
from fedq.trainers.histograms import HistogramLog
from fedq.trainers.job import GIB, Job


def residual_store(job: Job) -> ResidualStore | None:
    """Return this rank's residuals, in the run's folder, which all ranks share; None without error feedback."""
    exchange = job.config.exchange
    if job.config.personal.algorithm == "fedbat":  # what it sends is what it has learned: nothing is left
        return None
    if not wants_feedback(exchange.feedback, exchange.uplink):
        return None
    return ResidualStore(int(job.config.run.memory_limit_gib * GIB), job.path / "residuals")


def build_rounds(
    job: Job,
    store: ResidualStore | None,
    training_of: Callable[[int], Training] | None = None,
    rounds: type[FederatedRounds] = FederatedRounds,
) -> FederatedRounds:
    """Put clients, server, codecs and residuals together as the settings say.

    Args:
        job: The job.
        store: Of residuals.
        training_of: How each client trains, where clients have something of their own; they then keep to their ranks.
        rounds: What runs them.
    """
    exchange, members = job.config.exchange, job.config.clients
    norm_limit = None if members.max_update_norm is None else NormLimit(members.max_update_norm, members.norm_rule)
    uplink = uplink_schedule(job.config, job.model, exchange.uplink, feedback=store is not None)
    # The replica is the downlink's memory, so its codec always works with feedback.
    downlink = Layout.of(job.model, codec(exchange.downlink).resolved(feedback=True))
    if job.config.lowbit.server_sends == "weights":
        plain = dict.fromkeys((span.name for span in downlink.spans), codec("bf16"))
        downlink = downlink.with_values(plain | binary_codecs(job.model))
    feedback = NoFeedback() if store is None else ErrorFeedback(store)
    replica = downlink.flatten(job.model)
    clients = {
        i: Client(i, part, training_of(i) if training_of else job.training, uplink, feedback)
        for i, part in enumerate(job.parts)
    }
    way: Exchange = Rooted(job.transport, job.ledger)
    if exchange.aggregate == "two_phase" and job.transport.world_size > 1:
        way = TwoPhase(job.transport, job.ledger, uplink.at(0))
        if job.is_root:
            print_header([way.note])
    server = None
    if way.serves:
        server = Server(replica, way.part(downlink), lambda params: server_optimizer(exchange.server, params))
    return rounds(
        transport=job.transport,
        clients=clients,
        server=server,
        uplink=uplink,
        downlink=downlink,
        replica=replica,
        ledger=job.ledger,
        downlink_cost=DownlinkCost(
            job.ledger, downlink, exchange.downlink_to, members.num_clients, has_start=exchange.start == "seed"
        ),
        cohort_size=job.config.cohort_size,
        sticky=store is not None or training_of is not None,
        observe=HistogramLog(job, uplink),
        chaos=chaos(job.config.run.chaos, start=job.start),
        min_cohort=members.min_cohort,
        norm_limit=norm_limit,
        residual_memory=exchange.residual_memory,
        side_by_side=job.config.local.side_by_side,
        beat=job.watch.beat,
        exchange=way,
        has_start=exchange.start == "seed",
    )


def uplink_schedule(config: Config, model: nn.Module, uplink: str, *, feedback: bool) -> LayoutSchedule:
    """Return the layouts of a client's updates, by round.

    Args:
        config: The job's settings.
        model: What is trained.
        uplink: The client's codecs, which may be its own.
        feedback: Whether it keeps a residual.
    """
    schedule = LayoutSchedule.of(model, uplink, feedback=feedback)
    return schedule.with_values(binary_codecs(model)) if config.lowbit.sends == "weights" else schedule


def binary_codecs(model: nn.Module) -> dict[str, Codec]:
    """Return the codec that carries each few-bit weight as it is: its signs, and a scale for each group of it."""
    return {
        f"{name}.weight": codec(f"sign:magnitude=mean,scale={chosen.per},rotate=false")
        for name, chosen in few_bit_layers(model).items()
    }


def wants_feedback(setting: str, uplink: str) -> bool:
    """Resolve ``auto``: error feedback if a codec loses more than a cast does and is not unbiased."""
    return setting == "on" or (setting == "auto" and any(c.wants_feedback for _, c in codec_schedule(uplink)))

"""From a job's settings to its rounds."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from fedq.codecs import Codec, codec
from fedq.config import Config
from fedq.federated.assembly import RoundSettings, Seats, make_rounds, over_ranks
from fedq.federated.chaos import chaos
from fedq.federated.client import Client
from fedq.federated.delivery import Delivery
from fedq.federated.parts import Part
from fedq.federated.rounds import Rounds
from fedq.federated.training import ExampleTraining, OnExamples
from fedq.federated.two_phase import TwoPhase
from fedq.feedback import ResidualStore
from fedq.layout import Layout
from fedq.lowbit import few_bit_layers
from fedq.report import print_header
from fedq.runtime.watch import Watch
from fedq.trainers.histograms import HistogramLog
from fedq.trainers.job import GIB, Job


class SignsOfLife(Part):
    """Tells the watch what goes on.

    Args:
        watch: This rank's watch.
    """

    def __init__(self, watch: Watch) -> None:
        self.watch = watch

    def alive(self, doing: str) -> None:
        """Note progress and what comes next."""
        self.watch.beat(doing)


def round_settings(config: Config, model: nn.Module, *, sends: bool = True) -> RoundSettings:
    """Return how the clients of a job exchange.

    Args:
        config: The job's settings.
        model: Model that is trained.
        sends: Whether updates are sent at all.
    """
    exchange, members, lowbit = config.exchange, config.clients, config.lowbit
    binary = binary_codecs(model)
    plain = dict.fromkeys((span.name for span in Layout.of(model, "fp32").spans), codec("bf16"))
    return RoundSettings(
        uplink=exchange.uplink,
        downlink=exchange.downlink,
        server=exchange.server,
        cohort=config.cohort_size,
        # What FedBAT sends is what it has learned: nothing is left.
        feedback="off" if config.personal.algorithm == "fedbat" else exchange.feedback,
        aggregate=exchange.aggregate,
        min_cohort=members.min_cohort,
        norm_limit=members.norm_limit,
        start=exchange.start,
        downlink_to=exchange.downlink_to,
        side_by_side=config.local.side_by_side,
        sends=sends,
        uplink_values=binary if lowbit.sends == "weights" else {},
        downlink_values=plain | binary if lowbit.server_sends == "weights" else {},
    )


def residual_store(job: Job, settings: RoundSettings) -> ResidualStore | None:
    """Return this rank's residuals, in the run's folder, which all ranks share; None without error feedback."""
    if not settings.has_feedback:
        return None
    return ResidualStore(int(job.config.run.memory_limit_gib * GIB), job.path / "residuals")


def build_rounds(
    job: Job,
    settings: RoundSettings,
    store: ResidualStore | None = None,
    training_of: Callable[[int], ExampleTraining] | None = None,
    delivery: Delivery | None = None,
    parts: Sequence[Part] = (),
) -> Rounds:
    """Put a job's rounds together.

    Args:
        job: The job.
        settings: How the job's clients exchange.
        store: Residuals of this rank's clients; None: no residual is kept.
        training_of: Returns how a client trains, where clients keep models of their own and so keep to their ranks.
        delivery: What brings tasks to clients; default: the ranks train them.
        parts: What takes part in rounds, beside the parts of every job.
    """

    def client(number: int) -> Client:
        part = job.parts[number]
        training = job.training if training_of is None else training_of(number)
        return Client(OnExamples(training, part), num_examples=len(part))

    if delivery is None:
        seats = Seats(len(job.parts), client, job.model, settings, store)
        sticky = store is not None or training_of is not None
        delivery = over_ranks(job.model, settings, seats, job.transport, job.ledger, sticky=sticky)
        if job.is_root and isinstance(delivery.exchange, TwoPhase):
            print_header([delivery.exchange.note])
    usual = [SignsOfLife(job.watch), chaos(job.config.run.chaos, start=job.start), HistogramLog(job)]
    return make_rounds(job.model, settings, delivery, parts=[*usual, *parts], transport=job.transport)


def binary_codecs(model: nn.Module) -> dict[str, Codec]:
    """Return the codec that carries each few-bit weight as it is: its signs, and a scale for each group of it."""
    return {
        f"{name}.weight": codec(f"sign:magnitude=mean,scale={chosen.per},rotate=false")
        for name, chosen in few_bit_layers(model).items()
    }

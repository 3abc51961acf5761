"""A federation of somebody's own model, served to clients across a network; the server needs no data."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedq.errors import FieldError
from fedq.federated.federation import Federation
from fedq.federated.frozen import frozen_checksums
from fedq.federated.results import Summary
from fedq.layout import Layout, LayoutSchedule
from fedq.network.certs import Revoked, load_identity
from fedq.network.delivery import NetworkDelivery, OwnWeights
from fedq.network.fields import check_settings
from fedq.network.hub import Hub, Terms
from fedq.network.server import listening, run_name, speak
from fedq.network.service import Service
from fedq.network.settings import DEFAULT_PORT, NetworkConfig, check_network
from fedq.waiting import Say


def serve(
    federation: Federation,
    *,
    rounds: int,
    lr: float | Callable[[int], float],
    bind: str = f"localhost:{DEFAULT_PORT}",
    certs: Path | str | None = None,
    insecure: bool = False,
    round_timeout: float = 600.0,
    join_timeout: float = 60.0,
    quorum: float = 1.0,
    max_weight_share: float = 0.5,
    say: Say = print,
) -> Summary:
    """Run a federation's rounds with clients that come across a network by `fedq.network.join`.

    How many examples a client has, it alone knows: one that claims more than ``max_weight_share`` of three or more
    counts as the heaviest of the others.

    Args:
        federation: A federation made with a number of clients instead of clients; its callbacks hear of every round.
        rounds: Number of rounds in all, those before a resume included.
        lr: Local learning rate, or a function from the round's number to it.
        bind: Host and port to listen on; port 0 takes a free one.
        certs: The server's folder of certificates, as `fedq certs` makes it.
        insecure: Whether to do without TLS; on loopback only.
        round_timeout: Seconds after which a round closes with those who have answered.
        join_timeout: Seconds that the first round waits for all clients; then ``min_cohort`` of them are enough.
        quorum: Share of a round's clients whose answers close it at once.
        max_weight_share: Largest share of a mean of three or more that a client may count for, 0 to 1.
        say: Function that takes a line at a time, such as where the server listens.

    Returns:
        What the rounds have come to; the federation's model holds the result.

    Raises:
        FieldError: A setting that cannot be used, a port that is taken, or a federation that has clients here.
    """
    network = NetworkConfig(
        bind=bind,
        certs=None if certs is None else Path(certs),
        insecure=insecure,
        round_timeout=round_timeout,
        join_timeout=join_timeout,
        quorum=quorum,
        max_weight_share=max_weight_share,
        accept_own_data=True,
    )
    check_network(network)
    if federation.has_clients or federation.runtime.world_size > 1:
        here = f"{federation.num_clients} clients on {federation.runtime.world_size} ranks"
        raise FieldError("federation", here, "one of a number of clients, Federation(model, 3), in one process")
    identity = load_identity(network.certs, serves=True) if network.certs is not None else None
    revoked = Revoked(network.certs) if network.certs is not None else None
    terms = _terms(federation, network, rounds)
    speak()
    delivery = NetworkDelivery(
        federation.settings.uplink_layouts(federation.model, feedback=False), federation.transport, federation.ledger
    )
    version = federation.deliver_by(delivery, parts=[OwnWeights(delivery, max_weight_share)])
    hub = Hub(terms, first_sequence=secrets.randbits(31) << 32)
    with Service(hub, bind, identity, revoked) as service:
        delivery.serve_by(service, version, federation.replica)
        say(listening(network, service.port, federation.num_clients))
        summary = federation.run(rounds, lr)
        service.say_goodbye({"rounds": summary.rounds}, round_timeout, lambda: None)
        delivery.book(summary.rounds - 1)
    federation.save()
    return federation.summary()


def _terms(federation: Federation, network: NetworkConfig, rounds: int) -> Terms:
    settings, model, num = federation.settings, federation.model, federation.num_clients

    def schedule(spec: str, feedback: bool) -> LayoutSchedule:
        return settings.uplink_layouts(model, feedback=feedback, uplink=spec)

    shared: dict[str, dict[str, Any]] = {
        "clients": {"num_clients": num},
        "exchange": {"uplink": settings.uplink, "feedback": settings.feedback},
        "run": {"seed": federation.seed, "rounds": rounds},
    }
    check_settings(shared)
    return Terms(
        run=secrets.token_hex(16) if federation.path is None else run_name(federation.path),
        num_clients=num,
        cohort_size=num if settings.cohort is None else settings.cohort,
        min_cohort=settings.min_cohort,
        shares=shared,
        shares_held=[-1] * num,
        layout=Layout.of(model, "fp32"),
        schedule=schedule,
        network=network,
        frozen=frozen_checksums(model),
    )

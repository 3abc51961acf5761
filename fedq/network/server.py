"""`fedq server`: a job like any other, whose clients come over the network.

Data (for validation and test), model, rounds, evaluation, checkpoints, the run's folder and its report are those of
every federated job; tasks and answers go by a `NetworkDelivery`.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedq.data import NAMED
from fedq.errors import DivergedError
from fedq.federated.assembly import RoundSettings
from fedq.federated.frozen import frozen_checksums
from fedq.federated.rounds import Rounds
from fedq.federated.training import RoundContext
from fedq.files import read_or_nothing, replace_file, set_aside
from fedq.layout import Layout, LayoutSchedule
from fedq.network.certs import Identity, Revoked, load_identity
from fedq.network.delivery import NetworkDelivery, OwnWeights
from fedq.network.fields import FOLDER, SETTINGS, check_settings
from fedq.network.hub import Hub, Terms
from fedq.network.service import Service
from fedq.network.settings import NetworkConfig, ServerConfig, check_address
from fedq.network.traffic import InterfaceTraffic
from fedq.report import NETWORK_SERVER, print_header, print_summary
from fedq.runtime.allocator import keep_freed_memory
from fedq.trainers.build import build_rounds, round_settings
from fedq.trainers.divergence import rolling_back
from fedq.trainers.job import Job, open_job
from fedq.trainers.loop import Ran, run_to_the_end
from fedq.trainers.records import finish, is_lost, log_round, report_left_out
from fedq.trainers.rounds import show_replica
from fedq.trainers.state import Progress, RunState

_NAME = re.compile("[0-9a-f]{32}")


def run_server(config: ServerConfig) -> dict[str, Any]:
    """Serve a federation until its last round or target accuracy.

    Returns:
        The summary; the run's folder has everything else.

    Raises:
        FieldError: A setting that cannot be used, or that no client would take; or a port that is taken.
        DivergedError: The model has diverged.
    """
    network = config.network
    check_settings(shared_settings(config))
    speak()
    keep_freed_memory(of_any_size=True)
    identity = load_identity(network.certs, serves=True) if network.certs is not None else None

    def serve_once(config: ServerConfig, rollbacks: int) -> dict[str, Any]:
        with open_job(config, rollbacks) as job:
            summary = _serve(job, config, identity)
        if job.folder.path is not None:
            print_summary(job.folder.path)
        return summary

    return rolling_back(config, serve_once)


def speak() -> None:
    """Say on standard output who comes and goes."""
    log = logging.getLogger("fedq.network")
    if not log.handlers:
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(logging.Formatter("%(message)s"))
        log.addHandler(handler)
        log.setLevel(logging.INFO)
        log.propagate = False


def _serve(job: Job, config: ServerConfig, identity: Identity | None) -> dict[str, Any]:
    settings = round_settings(config, job.model)
    uplink = settings.uplink_layouts(job.model, feedback=False)
    delivery = NetworkDelivery(uplink, job.transport, job.ledger)
    limit = OwnWeights(delivery, config.network.max_weight_share)
    rounds = build_rounds(job, settings, delivery=delivery, parts=[limit])
    state = RunState(job, rounds, Progress(), None)
    if not (job.config.run.resume and state.go_on()):
        rounds.share_start(job.model)
    show_replica(job, rounds)
    traffic = InterfaceTraffic()
    hub = Hub(_terms(job, config, settings), first_sequence=job.start << 32)
    revoked = Revoked(config.network.certs) if config.network.certs is not None else None
    with Service(hub, config.network.bind, identity, revoked) as service:
        delivery.serve_by(service, state.so_far.num_rounds, rounds.replica)
        print_header([listening(config.network, service.port, config.clients.num_clients), *_unbounded(config)])
        try:
            results = run_to_the_end(job, state, lambda number: _run_round(job, rounds, delivery, state, number))
        except DivergedError as error:
            if error.is_final:
                words = {"rounds": state.so_far.num_rounds, "stopped": "the model has diverged"}
                service.say_goodbye(words, config.network.round_timeout, job.watch.beat)
            raise
        job.watch.beat("telling clients the end")
        last_words = {"rounds": results["rounds"], "test_accuracy": results["test_accuracy"]}
        service.say_goodbye(last_words, config.network.round_timeout, job.watch.beat)
        delivery.book(results["rounds"] - 1)
        results["interface"] = traffic.total(job.ledger.since_start().wire)
        return finish(
            job,
            launcher=NETWORK_SERVER,
            feedback=None,
            root_ingress_bytes=job.transport.received,
            offences={str(record.number): record.offences for record in hub.records.values() if record.offences},
            **results,
        )


def _run_round(job: Job, rounds: Rounds, delivery: NetworkDelivery, state: RunState, number: int) -> Ran:
    result = rounds.run(RoundContext(number, state.lr(number), job.config.run.seed))
    for client in delivery.with_own_data():
        job.label_counts[client] = 0  # nobody but the client knows them
    state.so_far.left_out += report_left_out(number, result)
    show_replica(job, rounds)
    return Ran(lambda metrics: log_round(job, number, result, metrics), is_lost(job, number, result))


def _terms(job: Job, config: ServerConfig, settings: RoundSettings) -> Terms:
    def schedule(spec: str, feedback: bool) -> LayoutSchedule:
        return settings.uplink_layouts(job.model, feedback=feedback, uplink=spec)

    return Terms(
        run=run_name(job.path),
        num_clients=config.clients.num_clients,
        cohort_size=config.cohort_size,
        min_cohort=config.clients.min_cohort,
        shares=shared_settings(_named(config, job.dataset.name)),
        shares_held=[len(part) for part in job.parts],
        layout=Layout.of(job.model, "fp32"),
        schedule=schedule,
        network=config.network,
        frozen=frozen_checksums(job.model),
    )


def shared_settings(config: ServerConfig) -> dict[str, Any]:
    """Return the settings that every client of a federation has in common, as plain values."""
    shared = {
        group: {name: getattr(getattr(config, group), name) for name in names} for group, names in SETTINGS.items()
    }
    if config.data.dataset not in NAMED:
        shared["data"]["dataset"] = FOLDER
    return shared


def _named(config: ServerConfig, dataset: str) -> ServerConfig:
    """Return the settings with the data set that was found in place of `auto`: a client might find another."""
    if config.data.dataset != "auto":
        return config
    return replace(config, data=replace(config.data, dataset=dataset))


def run_name(path: Path) -> str:
    """Return the run's name, which clients compare with that of the run they remember; made once.

    A damaged one is made anew: clients then forget what they remember.
    """
    file = path / "federation"
    if os.path.lexists(file) and not _NAME.fullmatch(read_or_nothing(file)):
        set_aside(file, "it holds no name")
    if not file.exists():
        replace_file(file, secrets.token_hex(16).encode())
    return file.read_text()


def _unbounded(config: ServerConfig) -> list[str]:
    """Return a warning where a client's own weight cannot be bounded."""
    if config.network.accept_own_data and config.cohort_size < 3:
        return ["with fewer than three clients a round nobody's own weight is bounded (--max-weight-share)"]
    return []


def listening(network: NetworkConfig, port: int, num_clients: int) -> str:
    """Return where a server listens, and for whom, in words."""
    host, _ = check_address("bind", network.bind)
    trust = "without TLS" if network.insecure else "TLS, client certificates"
    return f"listening on {host}:{port}, {trust}; waiting for {num_clients} clients"

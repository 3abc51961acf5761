"""`fedq server`: a job like any other, whose clients come over the network.

Data (for validation and test), model, server optimizer, evaluation, checkpoints, the run's folder and its report are
those of every federated job; `NetworkRounds` stands where the rounds over a process group do.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fedq.federated.client import RoundContext
from fedq.federated.frozen import frozen_checksums
from fedq.files import read_or_nothing, replace_file, set_aside
from fedq.layout import Layout, LayoutSchedule
from fedq.network.certs import Identity, Revoked, load_identity
from fedq.network.hub import Federation, Hub
from fedq.network.rounds import NetworkRounds
from fedq.network.service import Service
from fedq.network.settings import ServerConfig, check_address
from fedq.network.traffic import InterfaceTraffic
from fedq.report import NETWORK_SERVER, print_header, print_summary
from fedq.trainers.allocator import keep_freed_memory
from fedq.trainers.build import build_rounds, uplink_schedule
from fedq.trainers.federated import show_replica
from fedq.trainers.job import Job, open_job
from fedq.trainers.loop import Log, run_to_the_end
from fedq.trainers.records import finish, log_round, report_left_out
from fedq.trainers.starts import Finished
from fedq.trainers.state import Progress, RunState

_NAME = re.compile("[0-9a-f]{32}")
_SHARED = ("data", "clients", "local", "exchange", "lowbit")
"""Groups of settings that every client gets."""
_OWN = {"data": ("data_dir", "download"), "exchange": ("link",)}
"""Settings in them that are the server's own."""


def run_server(config: ServerConfig) -> dict[str, Any]:
    """Serve a federation until its last round or target accuracy.

    Returns:
        The summary; the run's folder has everything else.

    Raises:
        FieldError: A setting that cannot be used, or a port that is taken.
    """
    network = config.network
    _speak()
    keep_freed_memory(of_any_size=True)
    identity = load_identity(network.certs, serves=True) if network.certs is not None else None
    try:
        with open_job(config) as job:
            summary = _serve(job, config, identity)
    except Finished as finished:
        return finished.summary
    if job.folder.path is not None:
        print_summary(job.folder.path)
    return summary


def _speak() -> None:
    """Say on standard output who comes and goes."""
    log = logging.getLogger("fedq.network")
    if not log.handlers:
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(logging.Formatter("%(message)s"))
        log.addHandler(handler)
        log.setLevel(logging.INFO)
        log.propagate = False


def _serve(job: Job, config: ServerConfig, identity: Identity | None) -> dict[str, Any]:
    rounds = build_rounds(job, None, rounds=NetworkRounds)
    assert isinstance(rounds, NetworkRounds)
    state = RunState(job, rounds, Progress(), None)
    if not (job.config.run.resume and state.go_on()):
        rounds.share_start(job.model)
    show_replica(job, rounds)
    traffic = InterfaceTraffic()
    hub = Hub(_federation(job, config), first_sequence=job.start << 32)
    revoked = Revoked(config.network.certs) if config.network.certs is not None else None
    with Service(hub, config.network.bind, identity, revoked) as service:
        rounds.serve_by(service, state.so_far.num_rounds)
        print_header([_listening(config, service.port), *_unbounded(config)])
        results = run_to_the_end(job, state, lambda number: _run_round(job, rounds, state, number))
        job.watch.beat("telling clients the end")
        last_words = {"rounds": results["rounds"], "test_accuracy": results["test_accuracy"]}
        service.say_goodbye(last_words, config.network.round_timeout, job.watch.beat)
        rounds.book(results["rounds"] - 1)
        results["interface"] = traffic.total(job.ledger.since_start().wire)
        return finish(
            job,
            launcher=NETWORK_SERVER,
            feedback=None,
            root_ingress_bytes=job.transport.received,
            offences={str(seat.number): seat.offences for seat in hub.seats.values() if seat.offences},
            **results,
        )


def _run_round(job: Job, rounds: NetworkRounds, state: RunState, number: int) -> Log:
    """Run one round, and return what writes its rows."""
    result = rounds.run(RoundContext(number, job.lr(number), job.config.run.seed))
    for client in rounds.with_own_data():
        job.label_counts[client] = 0  # nobody but the client knows them
    state.so_far.left_out += report_left_out(number, result)
    show_replica(job, rounds)
    return lambda metrics: log_round(job, number, result, metrics)


def _federation(job: Job, config: ServerConfig) -> Federation:
    def schedule(spec: str, feedback: bool) -> LayoutSchedule:
        return uplink_schedule(config, job.model, spec, feedback=feedback)

    return Federation(
        run=_run_name(job.path),
        num_clients=config.clients.num_clients,
        cohort_size=config.cohort_size,
        min_cohort=config.clients.min_cohort,
        shares=shared_settings(config),
        shares_held=[len(part) for part in job.parts],
        layout=Layout.of(job.model, "fp32"),
        schedule=schedule,
        network=config.network,
        frozen=frozen_checksums(job.model),
    )


def shared_settings(config: ServerConfig) -> dict[str, Any]:
    """Return the settings that every client of a federation has in common, as plain values."""
    shared = {
        group: {name: value for name, value in values.items() if name not in _OWN.get(group, ())}
        for group, values in asdict(config).items()
        if group in _SHARED
    }
    return shared | {"run": {"seed": config.run.seed, "rounds": config.run.rounds}}


def _run_name(path: Path) -> str:
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


def _listening(config: ServerConfig, port: int) -> str:
    host, _ = check_address("bind", config.network.bind)
    trust = "without TLS" if config.network.insecure else "TLS, client certificates"
    return f"listening on {host}:{port}, {trust}; waiting for {config.clients.num_clients} clients"

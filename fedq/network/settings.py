"""Settings of a server and of a client across a network, and what must hold between them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

from fedq.config import ClientsConfig, Config, DataConfig, ExchangeConfig, LocalConfig, RunConfig, validate
from fedq.errors import FieldError, check_all
from fedq.proxies import is_loopback

DEFAULT_PORT = 8470
MNIST_SIZE = 28
"""Side of MNIST's images where nothing else is asked for: their own, which `improved_cnn` was made for."""
CHUNK_NBYTES = 1 << 20
"""Bytes of a piece of a message, as gRPC sends it."""


@dataclass(frozen=True)
class NetworkConfig:
    """Where the server listens, whom it trusts, and how long it waits."""

    bind: str = f"localhost:{DEFAULT_PORT}"
    """Host and port to listen on; 0.0.0.0:8470 for every interface."""
    certs: Path | None = None
    """Folder with ca.pem, cert.pem and key.pem, as `fedq certs` makes it for the server."""
    insecure: bool = False
    """No TLS and no certificates: anybody who can connect is a client. On loopback only."""
    round_timeout: float = 600.0
    """Seconds from the start of a round after which it closes with those who have answered."""
    quorum: float = 1.0
    """Share of a round's clients whose answers close it at once; 1: all."""
    join_timeout: float = 60.0
    """Seconds that the first round waits for all clients; then --min-cohort of them are enough."""
    reconnect_grace: float = 10.0
    """Seconds that a round waits for a client whose connection is lost; then it closes without it."""
    accept_own_data: bool = False
    """Take clients with data of their own, and believe how many examples they have. Default: shares of the data set."""
    max_weight_share: float = 0.5
    """Most that a client with data of its own may count for of three or more; one that says more: as the next one."""
    max_offences: int = 3
    """Messages that break the rules after which a client is shut out."""


@dataclass(frozen=True)
class ServerConfig(Config):
    """A federation across a network: the settings of a job, and those of its server."""

    command: ClassVar[tuple[str, ...]] = ("server",)
    network: NetworkConfig = field(default_factory=NetworkConfig)


SERVER_DEFAULTS = ServerConfig(
    data=DataConfig(dataset="mnist"),
    clients=ClientsConfig(num_clients=2),
    local=LocalConfig(model="improved_cnn", batch_size=32, lr=0.05),
    exchange=ExchangeConfig(uplink="int8"),
    run=RunConfig(rounds=10),
)


@dataclass(frozen=True)
class ClientConfig:
    """A client's own settings; everything that the federation agrees on comes from the server."""

    connect: str = f"localhost:{DEFAULT_PORT}"
    """The server's host and port."""
    certs: Path | None = None
    """This client's folder of certificates: ca.pem, cert.pem and key.pem, as `fedq certs` makes it."""
    insecure: bool = False
    """No TLS and no certificates; the server must be on loopback, and --number says who this is."""
    number: int | None = None
    """This client's number, from 0. With certificates it is theirs."""
    server_name: str | None = None
    """Name in the server's certificate, if it is not the host that is connected to."""
    data_dir: Path = Path("data")
    """Where data sets lie on disk; or this client's folder of images, if the server's data set is one."""
    download: bool = False
    """Fetch a missing data set (never done without this flag)."""
    own_data: bool = False
    """All training images found are this client's own. Default: its disjoint share of them."""
    uplink: str | None = None
    """Codec of this client's updates. Default: the server's."""
    quantization: bool = False
    """Short for --uplink int8."""
    exchange: str = "step"
    """How several ranks of this client train together, step or round: see docs/network.md."""
    inner_uplink: str = "fp32"
    """Codec between this client's ranks, towards the average."""
    inner_downlink: str = "fp32"
    """Codec between this client's ranks, from the average."""
    out: Path | None = None
    """Where residuals and the model are kept. Default: clients/<number>."""
    give_up_after: float = 600.0
    """Seconds without a server after which the client ends."""
    max_model_mb: float = 1000.0
    """Largest model in float32, in MB, that the server may have this client build; training takes five times that."""
    device: str = "auto"
    """Where to train: auto, cpu or cuda."""
    threads: int | None = None
    """CPU threads a rank. Default: torch's choice."""


def resolved(config: ServerConfig) -> ServerConfig:
    """Return the settings with what follows from others: MNIST's own image size."""
    if config.data.dataset == "mnist" and config.data.image_size is None:
        config = replace(config, data=replace(config.data, image_size=MNIST_SIZE))
    return config


def check_server(config: ServerConfig) -> None:
    """Check everything that can be known before any work starts.

    Raises:
        FieldError: The first setting that cannot be used.
    """
    validate(config)
    network, exchange = config.network, config.exchange
    check_network(network)
    _, port = check_address("bind", network.bind)
    goes_back = config.run.on_divergence == "rollback"
    check_all(
        [
            ("bind", network.bind, port > 0 or not goes_back, "a port that stays, with --on-divergence rollback"),
            ("exchange", exchange.exchange, exchange.exchange == "round", "round, across a network"),
            ("aggregate", exchange.aggregate, exchange.aggregate == "rooted", "rooted, across a network"),
            ("uplink", exchange.uplink, exchange.uplink != "auto", "a codec, across a network"),
            ("algorithm", config.personal.algorithm, config.personal.algorithm == "fedavg", "fedavg, across a network"),
            ("chaos", config.run.chaos, not config.run.chaos, "left out, across a network"),
            ("side_by_side", config.local.side_by_side, config.local.side_by_side == 1, "1, across a network"),
            ("profile", config.run.profile, not config.run.profile, "left out, across a network"),
        ]
    )


def check_network(network: NetworkConfig) -> None:
    """Check where a server listens, whom it trusts, and how long it waits.

    Raises:
        FieldError: The first setting that cannot be used.
    """
    check_address("bind", network.bind)
    check_trust("bind", network.bind, network.certs, insecure=network.insecure)
    share = network.max_weight_share
    timeouts = [(name, getattr(network, name)) for name in ("round_timeout", "join_timeout", "reconnect_grace")]
    check_all(
        [
            *((name, value, 0 < value < math.inf, "above 0") for name, value in timeouts),
            ("quorum", network.quorum, 0 < network.quorum <= 1, "above 0, at most 1"),
            ("max_weight_share", share, 0 < share <= 1, "above 0, at most 1"),
            ("max_offences", network.max_offences, network.max_offences >= 1, "1 or more"),
        ]
    )


def check_client(config: ClientConfig) -> None:
    """Check a client's settings.

    Raises:
        FieldError: The first that cannot be used.
    """
    check_address("connect", config.connect)
    check_trust("connect", config.connect, config.certs, insecure=config.insecure)
    number, give_up = config.number, config.give_up_after
    check_all(
        [
            ("number", number, not config.insecure or number is not None, "this client's number, with --insecure"),
            ("number", number, number is None or number >= 0, "0 or more"),
            ("exchange", config.exchange, config.exchange in ("step", "round"), "step, round"),
            ("max_model_mb", config.max_model_mb, 0 < config.max_model_mb < math.inf, "above 0"),
            ("give_up_after", give_up, 0 < give_up < math.inf, "above 0"),
            ("device", config.device, config.device in ("auto", "cpu", "cuda"), "auto, cpu, cuda"),
            ("threads", config.threads, config.threads is None or config.threads >= 1, "1 or more"),
            ("uplink", config.uplink, not (config.uplink and config.quantization), "left out with --quantization"),
        ]
    )


def check_address(name: str, address: str) -> tuple[str, int]:
    """Return host and port.

    Raises:
        FieldError: Not ``host:port``.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 <= int(port) < 1 << 16:
        raise FieldError(name, address, "host:port, such as localhost:8470")
    return host.strip("[]"), int(port)


def check_trust(name: str, address: str, certs: Path | None, *, insecure: bool) -> None:
    """Refuse plaintext beyond this machine, and a connection without certificates that was not asked for.

    Raises:
        FieldError: Neither certificates nor ``--insecure``, both, or ``--insecure`` beyond loopback.
    """
    if insecure and certs is not None:
        raise FieldError("insecure", True, "left out with --certs")
    if not insecure and certs is None:
        raise FieldError("certs", None, "a folder that `fedq certs` made; or --insecure, on loopback only")
    if insecure and not is_loopback(check_address(name, address)[0]):
        raise FieldError("insecure", True, f"left out with --{name} {address}: only on loopback may TLS be left out")


def short_forms(argv: Sequence[str]) -> list[str]:
    """Return a server's arguments with ``--clients``, ``--quantization [BITS]`` and ``--no-quantization`` spelt out."""
    result: list[str] = []
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        if word == "--clients" or word.startswith("--clients="):
            result.append(word.replace("--clients", "--num-clients", 1))
        elif word == "--quantization":
            bits = rest.pop(0) if rest and rest[0].isdigit() else "8"
            result += ["--uplink", f"int{bits}"]
        elif word == "--no-quantization":
            result += ["--uplink", "fp32"]
        else:
            result.append(word)
    return result

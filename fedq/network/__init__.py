"""Clients across a network: a server and clients on gRPC with mutual TLS, around the same rounds as everywhere else.

`join` makes a client of a model and a training loop of one's own; `fedq server`, `fedq client` and `fedq certs` are the
commands.
"""

from fedq.network.client import join, run_client
from fedq.network.server import run_server
from fedq.network.settings import ClientConfig, NetworkConfig, ServerConfig

__all__ = ["ClientConfig", "NetworkConfig", "ServerConfig", "join", "run_client", "run_server"]

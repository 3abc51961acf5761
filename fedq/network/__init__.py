"""Clients across a network: a server and clients on gRPC with mutual TLS, around the same rounds as everywhere else.

`serve` serves a `fedq.Federation` of somebody's own model, `join` makes a client of a model and a training function;
`fedq server`, `fedq client` and `fedq certs` are the commands.
"""

from fedq.network.client import join, run_client
from fedq.network.serve import serve
from fedq.network.server import run_server
from fedq.network.settings import ClientConfig, NetworkConfig, ServerConfig

__all__ = ["ClientConfig", "NetworkConfig", "ServerConfig", "join", "run_client", "run_server", "serve"]

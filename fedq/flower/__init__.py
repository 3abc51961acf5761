"""Flower apps that send packed updates: a mod for the client, a wrapper for the server's strategy.

    app = ClientApp(mods=[fedq_mod()])
    strategy = compressed(FedAvg(), uplink="int4", downlink="int8")

``docs/flower.md`` says what travels when, and what is kept where. `arrays` turns Flower's records into flat buffers,
`client` is the mod and `state` what it keeps on disk, `versions` and `exchange` are the server's side, `strategy` and
`grid` the ways in, and `accounting` counts bytes.
"""

try:
    import flwr.app  # noqa: F401
except ImportError as error:
    raise ImportError("fedq.flower needs Flower 1.41 or newer: pip install 'fedq[flower]'") from error

from fedq.flower.client import fedq_mod
from fedq.flower.grid import CompressedGrid, RoundsFailed
from fedq.flower.strategy import Compressed, compressed

__all__ = ["Compressed", "CompressedGrid", "RoundsFailed", "compressed", "fedq_mod"]

"""What rounds need to go on as if they had never stopped, and the order in which it is written.

Random states are not among it: everything random is seeded by round and client, so a round's number is enough.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from fedq.checkpoint import Checkpoints, Loaded
from fedq.collectives import Transport
from fedq.errors import FieldError
from fedq.federated.rounds import Rounds
from fedq.federated.server_shards import ServerShards
from fedq.federated.versions import Versions
from fedq.layout import frozen_parameters
from fedq.ledger import Ledger


class RoundsState:
    """Saves and loads rounds: model, replica, server optimizer, what clients keep, what they have downloaded, ledger.

    Every rank saves the files of its own clients, only those that changed, and its part of the server where that is
    spread over the ranks; rank 0 writes the rest. Every rank loads what it needs from the run's folder, so nothing
    travels.

    Args:
        rounds: The rounds.
        model: The module, whose frozen parameters the replica lacks.
        transport: Transport between the ranks.
        ledger: Ledger of the bytes that were counted.
        path: The run's folder.
        files: Saved versions of what every rank has in files of its own, by name in a checkpoint.
    """

    def __init__(
        self,
        rounds: Rounds,
        model: nn.Module,
        transport: Transport,
        ledger: Ledger,
        path: Path,
        files: Mapping[str, Versions],
    ) -> None:
        self.rounds = rounds
        self.model = model
        self.transport = transport
        self.ledger = ledger
        self.files = files
        self.shards = ServerShards(path / "checkpoints" / "servers")

    def state_dict(self) -> dict[str, Any]:
        """Return everything, on rank 0; files are named by owner and version, a spread server by its parts."""
        rounds = self.rounds
        server: dict[str, Any] = {"parts": self.transport.world_size}
        if not rounds.delivery.is_spread:
            server = rounds.server.state_dict() if rounds.server is not None else {}
        frozen = {name: param.detach() for name, param in frozen_parameters(self.model).items()}
        return {
            "replica": rounds.replica,
            **({"frozen": frozen} if frozen else {}),
            "server": server,
            "root_ingress_bytes": self.transport.received,
            **rounds.delivery.state_dict(),
            "ledger": self.ledger.state_dict(),
            **{name: dict(files.named) for name, files in self.files.items()},
            "layouts": self._layouts(),
        }

    def load_state_dict(self, state: dict[str, Any], *, is_compared: bool = False) -> None:
        """Go on from what `state_dict` returned, on every rank.

        Args:
            state: What `state_dict` returned on rank 0.
            is_compared: Whether the state was found before to belong to this model and these codecs.

        Raises:
            FieldError: The state belongs to another model or other codecs.
        """
        rounds = self.rounds
        if not is_compared and state["layouts"] != self._layouts():
            raise FieldError("resume", state["layouts"], f"{self._layouts()}: the same model and codecs as before")
        rounds.replica.copy_(state["replica"])
        for name, param in frozen_parameters(self.model).items():
            param.data.copy_(state["frozen"][name])
        for name, files in self.files.items():
            files.attach(state.get(name, {}))
        if rounds.server is not None:
            rounds.server.load_state_dict(state["server"])
        if self.transport.rank == 0:
            self.transport.received = state.get("root_ingress_bytes", 0)
            rounds.delivery.load_state_dict(state)
            self.ledger.load_state_dict(state["ledger"])

    def save(self, number: int, checkpoints: Checkpoints, state_dict: Callable[[], dict[str, Any]]) -> None:
        """Write a checkpoint; every rank calls it.

        Args:
            number: Number of rounds so far.
            checkpoints: The run's checkpoints, which rank 0 writes.
            state_dict: Returns what the checkpoint holds, this object's `state_dict` included; called on rank 0.
        """
        rounds, rank = self.rounds, self.transport.rank
        for files in self.files.values():
            files.save(number)
        if rounds.server is not None and rounds.delivery.is_spread:
            self.shards.save(number, rank, self.transport.world_size, rounds.server)
        self.transport.barrier()  # all that a checkpoint names is on disk before it is written
        if rank != 0:
            return
        for files in self.files.values():
            files.advance(number)
        checkpoints.save(number, state_dict())
        self.shards.prune(checkpoints.numbers())
        for files in self.files.values():
            files.prune()

    def check(self, loaded: Loaded) -> None:
        """Read the files that a checkpoint names, and the parts of a spread server, which are put together.

        Raises:
            CheckpointError: A part of the server is damaged or missing.
            FieldError: A file that the checkpoint names is damaged or missing.
        """
        for name, files in self.files.items():
            files.check(loaded.state.get(name, {}))
        if "parts" in (server := loaded.state["server"]):
            loaded.state["server"] = self.shards.load(loaded.number, server["parts"], self.rounds.downlink)

    def _layouts(self) -> list[Any]:
        return [self.rounds.delivery.uplink.hash, self.rounds.downlink.hash]

"""The server's state on disk where it is spread over the ranks: every rank writes its own part, so nothing travels.

A rank's part of a round is a checkpoint of its own, in a folder named by rank and world size. Rank 0's checkpoint of
the round says how many there are, and is written once all are on disk. Whoever loads puts them together: the state of
the whole is that of a server on rank 0, and does not tell how many ranks wrote it.
"""

from __future__ import annotations

from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import Any

from fedq.checkpoint import KEPT, Checkpoints
from fedq.federated.server import Server, join_states
from fedq.layout import Layout


class ServerShards:
    """The servers' states of one run.

    Args:
        folder: Folder with a folder of checkpoints for each rank.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, number: int, rank: int, world_size: int, server: Server) -> None:
        """Write a rank's part after ``number`` rounds."""
        state = {"numbers": list(server.layout.numbers), **server.state_dict()}
        self._of(rank, world_size, kept=KEPT + 1).save(number, state)  # one more: rank 0 may not get to its own

    def load(self, number: int, world_size: int, layout: Layout) -> dict[str, Any]:
        """Return the state of the whole server.

        Args:
            number: Number of rounds after which the state was written.
            world_size: Number of ranks that wrote the state.
            layout: Layout of the whole model.

        Raises:
            CheckpointError: A part is damaged or missing.
        """
        parts = [self._of(rank, world_size).load(number).state for rank in range(world_size)]
        return join_states(layout, parts)

    def prune(self, keep: Collection[int]) -> None:
        """Delete the parts of rounds that no checkpoint names."""
        for folder in self.folder.glob("*-of-*"):
            checkpoints = Checkpoints(folder)
            for number in checkpoints.numbers():
                if number not in keep:
                    checkpoints.remove(number)
            if not checkpoints.numbers():
                with suppress(OSError):  # something else lies there
                    folder.rmdir()

    def _of(self, rank: int, world_size: int, kept: int = KEPT) -> Checkpoints:
        return Checkpoints(self.folder / f"{rank}-of-{world_size}", kept)

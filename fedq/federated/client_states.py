"""What clients keep between rounds, such as an optimizer's moments, on disk: one file a client and version."""

from __future__ import annotations

import io
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from fedq.errors import FieldError
from fedq.federated.client import Client
from fedq.files import make_folder, replace_file


class ClientStates:
    """The states of this process's clients, by number.

    They live in the clients' own objects; here is what was saved of them. A file is never changed: `save` writes what
    changed under a new number, so an older checkpoint stays whole until `prune`.

    Args:
        folder: Folder of the files; None: nothing is saved.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._clients: dict[int, Client] = {}
        self._waiting: dict[int, int] = {}
        self._changed: set[int] = set()
        self._readable: set[int] = set()

    def follow(self, client: Client) -> None:
        """Keep a client's state from now on, and bring it to the version that is gone on with."""
        if not client.keeps_state:
            return
        self._clients[client.number] = client
        if client.number in self._waiting:
            client.load_state_dict(self._read(client.number, self._waiting.pop(client.number)))

    def note(self, number: int) -> bool:
        """Note that a client's state is about to change; return whether it has any."""
        if number in self._clients:
            self._changed.add(number)
        return number in self._clients

    def save(self, number: int) -> list[int]:
        """Write the states that changed since the last `save` as version ``number``; return their owners.

        Raises:
            FieldError: A state could not be read again; checked when it is first written.
        """
        saved = sorted(self._changed)
        self._changed.clear()
        if self.folder is None:
            return []
        for owner in saved:
            data = io.BytesIO()
            torch.save(self._clients[owner].state_dict(), data)
            if owner not in self._readable:
                self._check_readable(owner, data)
            path = self.path(owner, number)
            make_folder(path.parent)
            replace_file(path, data.getbuffer())
        return saved

    def _check_readable(self, owner: int, data: io.BytesIO) -> None:
        try:
            torch.load(io.BytesIO(data.getbuffer()), map_location="cpu", weights_only=True)
        except Exception as error:
            kinds = ", ".join(sorted(self._clients[owner].states)) or "none"
            words = str(error).strip().splitlines()[0]
            allowed = f"states whose state_dict holds tensors and plain values alone ({words})"
            raise FieldError(f"state of client {owner}", kinds, allowed) from None
        self._readable.add(owner)

    def attach(self, versions: Mapping[int, int]) -> None:
        """Go on from saved versions; those of clients that are not followed yet are read when they are."""
        self._changed.clear()
        self._waiting = dict(versions)
        for client in list(self._clients.values()):
            self.follow(client)

    def path(self, owner: int, number: int) -> Path:
        """Return the file of a saved version."""
        assert self.folder is not None, "states are saved in a folder"
        return self.folder / f"client-{owner:06d}-{number:08d}.pt"

    def check(self, owner: int, number: int) -> None:
        """Read a saved version.

        Raises:
            FieldError: The saved version is missing or damaged.
        """
        self._read(owner, number)

    def prune(self, keep: Collection[Path]) -> None:
        """Delete saved versions that no checkpoint refers to any more."""
        for path in self.folder.glob("client-*-*.pt") if self.folder is not None else ():
            if path not in keep:
                path.unlink(missing_ok=True)

    def _read(self, owner: int, number: int) -> dict[str, Any]:
        path = self.path(owner, number)
        try:
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged file shows itself in many ways
            words = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise FieldError("client state", str(path), f"a whole file of plain values ({words})") from None
        return state

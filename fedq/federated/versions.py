"""Which saved version of each owner's file the checkpoints name: residuals, and clients' own models.

Every rank writes the files of its own clients under the number of rounds; rank 0 knows which of them changed and names
them in its checkpoint. A file that no kept checkpoint names is deleted.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Protocol

from fedq.checkpoint import KEPT


class OwnerStore(Protocol):
    """What keeps something for each of its owners, in files that are never changed: a version is a file of its own."""

    def save(self, number: int) -> list[int]:
        """Write what changed since the last time as version ``number``; return its owners."""

    def attach(self, versions: Mapping[int, int]) -> None:
        """Go on from saved versions, by owner."""

    def path(self, owner: int, number: int) -> Path:
        """Return the file of a saved version."""

    def check(self, owner: int, number: int) -> None:
        """Read a saved version; raise `FieldError` if it is missing or damaged."""

    def prune(self, keep: Collection[Path]) -> None:
        """Delete all saved versions but some."""


class Versions:
    """The versions of one store's files.

    Args:
        store: This rank's store; None: nothing is kept, and every method does nothing.
    """

    def __init__(self, store: OwnerStore | None) -> None:
        self.store = store
        self.named: dict[int, int] = {}
        """Newest saved version by owner, on rank 0 and after loading."""
        self._kept: deque[dict[int, int]] = deque(maxlen=KEPT)
        self._changed: set[int] = set()

    def note(self, owners: Iterable[int]) -> None:
        """Remember whose values changed, on rank 0: those of all ranks."""
        self._changed |= set(owners)

    def save(self, number: int) -> None:
        """Write what changed on this rank as version ``number``."""
        if self.store is not None:
            self.store.save(number)

    def advance(self, number: int) -> None:
        """Name what all ranks have written, on rank 0, before the checkpoint."""
        if self.store is not None:
            self.named |= dict.fromkeys(self._changed, number)
        self._changed.clear()

    def prune(self) -> None:
        """Delete what no kept checkpoint names, on rank 0, after the checkpoint."""
        self._kept.append(dict(self.named))
        if self.store is not None:
            self.store.prune({self.store.path(*pair) for versions in self._kept for pair in versions.items()})

    def attach(self, named: Mapping[int, int]) -> None:
        """Go on from the versions that a checkpoint names."""
        self.named = dict(named)
        self._kept.append(dict(named))
        if self.store is not None:
            self.store.attach(self.named)

    def check(self, named: Mapping[int, int]) -> None:
        """Read the files that a checkpoint names.

        Raises:
            FieldError: A file is missing or damaged.
        """
        if self.store is not None:
            for pair in named.items():
                self.store.check(*pair)

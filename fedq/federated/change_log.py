"""The changes that lead from one version of a model to the next, for those who have missed some of them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

C = TypeVar("C")


class ChangeLog(Generic[C]):
    """Keeps the newest changes while they weigh less together than the whole model: nobody would fetch more.

    Args:
        nbytes: Returns the size of a change in bytes.
        version: Version of the model at the beginning.
        fewest: Number of newest changes that are kept whatever they weigh.
    """

    def __init__(self, nbytes: Callable[[C], int], version: int = 0, *, fewest: int = 0) -> None:
        self.newest = version
        """Version of the model that the changes lead to."""
        self._nbytes = nbytes
        self._fewest = fewest
        self._changes: deque[C | None] = deque()
        self._sum = 0

    @property
    def oldest(self) -> int:
        """Oldest version from which the changes lead to the newest."""
        return self.newest - len(self._changes)

    @property
    def changes(self) -> list[C]:
        """The changes that are kept, oldest first."""
        return [change for change in self._changes if change is not None]

    def restart(self, version: int) -> None:
        """Begin with a version to which no change leads from an older one."""
        self.newest = version
        self._changes.clear()
        self._sum = 0

    def add(self, change: C | None, whole_nbytes: int) -> None:
        """Add the change to the next version, and forget those that nobody would fetch.

        Args:
            change: The change; None if the two versions are the same model.
            whole_nbytes: Bytes of the whole model.
        """
        self._changes.append(change)
        self._sum += self._weight(change)
        self.newest += 1
        while len(self._changes) > self._fewest and self._sum >= whole_nbytes:
            self._sum -= self._weight(self._changes.popleft())

    def since(self, version: int) -> list[C] | None:
        """Return the changes that lead from a version to the newest; None where only the whole model helps."""
        if not self.oldest <= version <= self.newest:
            return None
        return [change for change in list(self._changes)[version - self.oldest :] if change is not None]

    def _weight(self, change: C | None) -> int:
        return 0 if change is None else self._nbytes(change)

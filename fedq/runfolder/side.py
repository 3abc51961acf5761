"""What a run writes beside its results: if it cannot be written, that is said once, and costs nobody the job."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from fedq.text import clean

_log = logging.getLogger(__name__)


class SideOutput:
    """A table, TensorBoard's events, a tracker, a trace.

    Args:
        name: Name by which a user knows the output.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.has_failed = False

    @contextmanager
    def trying(self, errors: type[Exception] = Exception) -> Iterator[None]:
        """Let the body fail.

        Args:
            errors: Exceptions with which the body may fail.
        """
        try:
            yield
        except errors as error:
            if not self.has_failed:
                words = clean(f"{type(error).__name__}: {error}")
                _log.warning("%s cannot be written, and is left out: %s", self.name, words)
            self.has_failed = True

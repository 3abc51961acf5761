"""What ends a job in one line: a bad setting, a model that is lost, or ranks that did not meet."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path


class FieldError(ValueError):
    """A setting that cannot be used.

    Args:
        field: Name of the setting as the user writes it, for example ``uplink`` or ``int4:block``.
        value: The value that was given.
        allowed: The values that would have been accepted, in words.
    """

    def __init__(self, field: str, value: object, allowed: str) -> None:
        super().__init__(f"{field}={value!r} is not allowed; allowed: {allowed}")
        self.field = field
        self.value = value
        self.allowed = allowed


class RunStopped(RuntimeError):
    """A run that could not go on; the text is one line that says why, and how to go on with it."""


class DivergedError(RunStopped):
    """A run whose model has diverged.

    Args:
        words: Text on what happened, and on how to go on.
        path: The run's folder, with its last good checkpoint.
        rollbacks: Number of times that the run was rolled back before.
        is_final: Whether it is not rolled back now.
    """

    def __init__(self, words: str, *, path: Path, rollbacks: int, is_final: bool) -> None:
        super().__init__(words)
        self.path = path
        self.rollbacks = rollbacks
        self.is_final = is_final


class RendezvousError(RunStopped):
    """Ranks that did not find each other, though their settings may be good: it says which are missing, and where."""


Check = tuple[str, object, bool, str]
"""A setting's name, its value, whether that is allowed, and the values that are, in words."""


def check_all(checks: Iterable[Check]) -> None:
    """Raise for the first setting that is not allowed.

    Raises:
        FieldError: A setting is not allowed; the error names the first one.
    """
    for name, value, is_allowed, allowed in checks:
        if not is_allowed:
            raise FieldError(name, value, allowed)


def one_of(choices: Iterable[str], value: object = "") -> str:
    """Return the words "a, b, c", with a did-you-mean when ``value`` is close to a choice."""
    names = sorted(choices)
    close = difflib.get_close_matches(str(value), names, n=1)
    return ", ".join(names) + (f" (did you mean {close[0]!r}?)" if close else "")

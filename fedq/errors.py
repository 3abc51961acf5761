"""The one error class for bad settings: it names the field, the value and what is allowed."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FieldError(ValueError):
    """A setting that cannot be used.

    Args:
        field: Name of the setting as the user writes it, for example ``uplink`` or ``int4:block``.
        value: The value that was given.
        allowed: What would have been accepted, in words.
    """

    def __init__(self, field: str, value: object, allowed: str) -> None:
        super().__init__(f"{field}={value!r} is not allowed; allowed: {allowed}")
        self.field = field
        self.value = value
        self.allowed = allowed


class RunStopped(RuntimeError):
    """A run that could not go on, for a reason outside of it; the text is one line that says how to go on with it."""


Check = tuple[str, object, bool, str]
"""A setting's name and value, whether it is allowed, and what is."""


def check_all(checks: Iterable[Check]) -> None:
    """Raise for the first setting that is not allowed.

    Raises:
        FieldError: Of that one.
    """
    for name, value, is_allowed, allowed in checks:
        if not is_allowed:
            raise FieldError(name, value, allowed)


def one_of(choices: Iterable[str], value: object = "") -> str:
    """Return the words "a, b, c", with a did-you-mean when ``value`` is close to a choice."""
    names = sorted(choices)
    close = difflib.get_close_matches(str(value), names, n=1)
    return ", ".join(names) + (f" (did you mean {close[0]!r}?)" if close else "")

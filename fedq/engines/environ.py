"""Environment variables for the time of a call: some libraries can be told certain things in no other way."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager


@contextmanager
def defaults_in_environ(values: Mapping[str, str]) -> Iterator[None]:
    """Set the variables that are missing, for the body only."""
    missing = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(missing)
    try:
        yield
    finally:
        for name in missing:
            os.environ.pop(name, None)

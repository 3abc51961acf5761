"""How many examples the properties of the tests are tried on: all with ``--all``, a share of them otherwise."""

from __future__ import annotations

from hypothesis import settings

FEW = 15  # of a hundred


def tried(number: int) -> settings:
    """Return settings with so many examples, of which the profile takes its share: of 100, its own number."""
    share = settings.default.max_examples / 100
    return settings(max_examples=min(number, max(3, round(number * share))), deadline=None)

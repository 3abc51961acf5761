"""Who trains in a round, and on which rank."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedq.kernels import derive_seed


def sample_cohort(num_clients: int, size: int, *, seed: int, round: int) -> list[int]:
    """Return the round's clients, sorted: a uniform draw without replacement."""
    rng = np.random.default_rng(derive_seed(seed, "cohort", round))
    return sorted(rng.choice(num_clients, size=size, replace=False).tolist())


def assign(cohort: Sequence[int], world_size: int, *, sticky: bool) -> list[list[int]]:
    """Return each rank's clients.

    Sticky: a client always runs on rank ``client % world_size``, where its residual lives, so residuals never travel.
    Otherwise the cohort is dealt evenly.
    """
    if sticky:
        return [[c for c in cohort if c % world_size == rank] for rank in range(world_size)]
    return [list(cohort[rank::world_size]) for rank in range(world_size)]

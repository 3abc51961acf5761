"""Faults on purpose: kills, NaN updates, failing and slow clients, drawn from a seed. For tests and rehearsals.

A draw depends on the round and the client (or rank), so a resumed run meets the same NaN again; kills also depend on
how often the run was started, or it could never get past one.
"""

from __future__ import annotations

import math
import os
import signal
import time
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from fedq.errors import FieldError, one_of
from fedq.federated.client import Client
from fedq.federated.parts import Part
from fedq.federated.training import RoundContext
from fedq.kernels import derive_seed
from fedq.specs import split_spec


class ChaosError(RuntimeError):
    """A client's training that fails on purpose."""


@dataclass(frozen=True)
class Chaos(Part):
    """How often what goes wrong; each is a probability from 0 to 1.

    Args:
        kill: Probability that a rank kills itself (SIGKILL) in a round, before updates are exchanged.
        nan: Probability that a client's update has a NaN.
        fail: Probability that a client's training raises.
        slow: Probability that a client takes ``slow_s`` longer.
        slow_s: Delay of a slow client, in seconds.
        seed: Seed of all draws.
        start: How often the run was started before.
    """

    kill: float = 0.0
    nan: float = 0.0
    fail: float = 0.0
    slow: float = 0.0
    slow_s: float = 1.0
    seed: int = 0
    start: int = 0

    def before_training(self, context: RoundContext, client: Client) -> None:
        """Delay or fail a client's training."""
        self.strike_client(context.round, client.number)

    def before_encoding(self, context: RoundContext, client: Client, update: Tensor) -> None:
        """Put a NaN into an update if it is to have one."""
        self.spoil(update, context.round, client.number)

    def before_exchange(self, context: RoundContext, rank: int) -> None:
        """Kill this process if its time has come."""
        self.strike_rank(context.round, rank)

    def strike_rank(self, round: int, rank: int) -> None:
        """Kill this process if its time has come."""
        if self._hits(self.kill, "kill", round, rank, self.start):
            os.kill(os.getpid(), signal.SIGKILL)

    def strike_client(self, round: int, client: int) -> None:
        """Delay or fail a client's training.

        Raises:
            ChaosError: The client is to fail.
        """
        if self._hits(self.slow, "slow", round, client):
            time.sleep(self.slow_s)
        if self._hits(self.fail, "fail", round, client):
            raise ChaosError(f"client {client} fails on purpose in round {round} (--chaos)")

    def spoil(self, update: Tensor, round: int, client: int) -> None:
        """Put a NaN into an update if it is to have one."""
        if self._hits(self.nan, "nan", round, client):
            update[derive_seed(self.seed, "where", round, client) % update.numel()] = torch.nan

    def _hits(self, probability: float, *parts: int | str) -> bool:
        return probability > 0 and derive_seed(self.seed, "chaos", *parts) < probability * 2**32


def chaos(spec: str, *, start: int = 0) -> Chaos:
    """Parse ``kill=0.02,nan=0.01,slow=0.05,seed=1``; the empty text is no chaos.

    Raises:
        FieldError: An unknown fault, a probability outside 0 to 1, or seconds that cannot be slept.
    """
    allowed = [f.name for f in fields(Chaos) if f.name != "start"]
    values: dict[str, float] = {}
    for name, text in split_spec(f"chaos:{spec}")[1].items():
        if name not in allowed:
            raise FieldError("chaos", name, one_of(allowed, name))
        try:
            values[name] = int(text) if name == "seed" else float(text)
        except ValueError:
            raise FieldError(f"chaos:{name}", text, "a number") from None
        if name not in ("seed", "slow_s") and not 0 <= values[name] <= 1:
            raise FieldError(f"chaos:{name}", text, "a probability from 0 to 1")
        if name == "slow_s" and not 0 <= values[name] < math.inf:
            raise FieldError("chaos:slow_s", text, "seconds, 0 or more")
    return Chaos(**values, start=start)  # type: ignore[arg-type]

"""What a round, and a whole training, have come to, as somebody reads them who trains by `fedq.Federation`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from fedq.text import human_bytes


@dataclass(frozen=True)
class RoundResult:
    """A round; the same on every rank.

    Args:
        round: Number of the round, from 0.
        loss: Mean local loss, weighted by examples; NaN if clients tell none.
        metrics: Means of what clients have measured while training, as ``train_<name>``, and of what was evaluated
            afterwards, as ``val_<name>``.
        clients: Clients whose update was used.
        left_out: Clients whose update was not used, with the reason.
        clipped: How updates were scaled down, or weights cut, in words, by client.
        uplink_bytes: Payload bytes of the clients' messages.
        downlink_bytes: Payload bytes that clients were charged for.
        uplink_bytes_fp32: Bytes of the same messages in float32.
        downlink_bytes_fp32: Bytes of the same downloads in float32.
        seconds: Wall time, with the evaluation.
    """

    round: int
    loss: float
    metrics: Mapping[str, float] = field(default_factory=dict)
    clients: tuple[int, ...] = ()
    left_out: Mapping[int, str] = field(default_factory=dict)
    clipped: Mapping[int, str] = field(default_factory=dict)
    uplink_bytes: int = 0
    downlink_bytes: int = 0
    uplink_bytes_fp32: int = 0
    downlink_bytes_fp32: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        words = _words(self)
        if self.left_out:
            words.append("left out " + "; ".join(f"client {client}: {why}" for client, why in self.left_out.items()))
        return f"round {self.round}: {', '.join(words)}"

    def as_dict(self) -> dict[str, Any]:
        """Return its fields as plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RoundResult:
        """Return what `as_dict` has described, also by way of JSON."""
        numbered = {name: {int(c): why for c, why in values[name].items()} for name in ("left_out", "clipped")}
        return cls(**{**values, "clients": tuple(values["clients"]), **numbered})


def _words(result: RoundResult | Summary) -> list[str]:
    """Return what was measured and what it cost, in words."""
    words = [f"loss {result.loss:.4g}"] if not math.isnan(result.loss) else []
    words += [f"{name} {value:.4g}" for name, value in result.metrics.items() if name != "train_loss"]
    return [
        *words,
        f"up {_cost(result.uplink_bytes, result.uplink_bytes_fp32)}",
        f"down {_cost(result.downlink_bytes, result.downlink_bytes_fp32)}",
    ]


def _cost(nbytes: int, fp32: int) -> str:
    """Return bytes, and how many times less than float32 they are, where that is worth a word."""
    ratio = fp32 / nbytes if nbytes else 1.0
    return human_bytes(nbytes) + (f" ({ratio:.1f}x less)" if ratio >= 1.05 else "")


@dataclass(frozen=True)
class Summary:
    """A whole training; the same on every rank.

    Args:
        rounds: Rounds that were run, those before a resume included.
        loss: Mean local loss of the last round.
        best: Best value of the first metric over the rounds; None if it was never measured.
        metrics: Metrics of the last round, as in `RoundResult`.
        uplink_bytes: Payload bytes of all clients' messages.
        downlink_bytes: Payload bytes of all downloads.
        uplink_bytes_fp32: Bytes of the same messages in float32.
        downlink_bytes_fp32: Bytes of the same downloads in float32.
        seconds: Wall time in rounds.
    """

    rounds: int
    loss: float = math.nan
    best: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    uplink_bytes: int = 0
    downlink_bytes: int = 0
    uplink_bytes_fp32: int = 0
    downlink_bytes_fp32: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        return f"{self.rounds} round{'s' * (self.rounds != 1)}: {', '.join(_words(self))}"

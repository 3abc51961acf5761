"""What a single client may do to a round's mean: how large its update may be, and how much it may count for."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from fedq.errors import FieldError
from fedq.federated.aggregate import Updates
from fedq.federated.parts import Part
from fedq.federated.training import RoundContext


@dataclass(frozen=True)
class NormLimit(Part):
    """What happens to updates whose norm is far beyond the others'.

    Args:
        multiple: The limit, as a multiple of the median norm of the round's updates.
        rule: ``clip`` scales an update down to the limit, ``drop`` leaves it out.
    """

    multiple: float
    rule: Literal["clip", "drop"] = "clip"

    def before_mean(self, context: RoundContext, updates: Updates) -> None:
        """Scale down, or leave out, what is too large; with a median of zero there is no size to compare with."""
        norms = updates.norms()
        finite = {client: norm for client, norm in norms.items() if math.isfinite(norm)}
        highest = self.multiple * statistics.median(finite.values() or [0.0])
        if highest == 0:
            return
        for client, norm in finite.items():
            if norm > highest and self.rule == "clip":
                updates.scale(client, highest / norm, f"norm clipped to {highest / norm:.3g} of itself")
            elif norm > highest:
                updates.leave_out(client, f"norm {norm:.3g} is beyond {highest:.3g}")


def norm_limit(spec: str) -> NormLimit | None:
    """Return the limit that a spec names: ``clip:3`` or ``drop:3``, or None for ``none``.

    Raises:
        FieldError: The spec has another rule, or no multiple above 0; the error names ``norm_limit``.
    """
    rule, _, text = spec.strip().lower().partition(":")
    if rule == "none" and not text:
        return None
    try:
        multiple = float(text)
    except ValueError:
        multiple = math.nan
    if rule not in ("clip", "drop") or not 0 < multiple < math.inf:
        raise FieldError("norm_limit", spec, "none, clip:MULTIPLE or drop:MULTIPLE, above 0, such as clip:3")
    return NormLimit(multiple, "clip" if rule == "clip" else "drop")


@dataclass(frozen=True)
class WeightLimit(Part):
    """How much a client with a weight of its own may count for.

    Whoever says more is not believed: it counts as the heaviest of the others. At the limit itself one in two parts of
    a mean would be its own, and it could take back what all the others want.

    Args:
        share: Largest share of a mean of three updates or more that a client may have; of fewer no weight is cut.
        clients: Clients whose weight nobody else knows.
    """

    share: float
    clients: frozenset[int]

    def weights(self, context: RoundContext, weights: Mapping[int, float]) -> Mapping[int, float]:
        """Return the weights that are lower than said."""
        return self.cut(weights)

    def cut(self, weights: Mapping[int, float]) -> dict[int, float]:
        """Return the weights that are lower than said, by client.

        They are that of the heaviest client that is not cut, if no share is beyond the limit then, or just so low that
        none is. Where that cannot be (three updates, a limit below a third), those cut weigh as much as the lightest.

        Args:
            weights: Weights of the updates that are averaged, by client.
        """
        if len(weights) < 3:
            return {}
        rest, heavy = sum(weights.values()), list[int]()  # exact: whole numbers far below 2^53
        for client in sorted(self.clients & weights.keys(), key=lambda client: -weights[client]):
            left = 1 - self.share * len(heavy)
            if left > 0 and weights[client] <= self.share * rest / left:
                break
            heavy.append(client)
            rest -= weights[client]
        left = 1 - self.share * len(heavy)
        others = [weight for client, weight in weights.items() if client not in heavy]
        limit = min(self.share * rest / left, max(others)) if left > 0 and others else 0.0
        limit = max(limit, min(weights.values()))
        return {client: limit for client in heavy if weights[client] > limit}

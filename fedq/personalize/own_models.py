"""What clients keep between rounds and never send: their own models, and the centres of those that are quantized.

Each rank has the clients that train on it, in memory up to a limit and then in files, as residuals are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedq.federated.training import is_finite
from fedq.feedback import ResidualStore
from fedq.layout import Layout
from fedq.lowbit.centres import Centres

FLOAT_BITS = 32
"""Bits of a model that is not quantized."""


@dataclass(frozen=True)
class Network:
    """An architecture of clients' own models: one module on a rank, which holds one client's values at a time.

    Args:
        name: Name of the architecture, as `fedq.models` knows it.
        module: Module that holds the values of one client at a time.
        layout: Layout of the module.
        start: Values of a client's first model, flat float32; None: those that the client downloads first.
    """

    name: str
    module: nn.Module
    layout: Layout
    start: Tensor | None = None


@dataclass
class OwnModel:
    """One client's own model.

    Args:
        network: Architecture of the model.
        flat: The float model, flat float32.
        centres: Centres of the quantized model; None without one.
    """

    network: Network
    flat: Tensor
    centres: Centres | None = None

    def fill(self, *, quantized: bool) -> nn.Module:
        """Put the float or the quantized model into the network's module, and return that."""
        self.network.layout.unflatten_(self.flat, self.network.module)
        if quantized and self.centres is not None:
            self.centres.quantize_(self.network.module)
        return self.network.module


class OwnModels:
    """The own models of this rank's clients.

    Args:
        networks: Architecture of each client's own model.
        bits: Bits of each client's weights, 1 to 8, or 32 for a float model.
        store: Store that keeps the models between rounds.
        outer_at_one: Whether each client's outer centres start at -1 and +1; see `Centres.of`. Default: none do.
    """

    def __init__(
        self,
        networks: Sequence[Network],
        bits: Sequence[int],
        store: ResidualStore,
        outer_at_one: Sequence[bool] | None = None,
    ) -> None:
        self.networks = networks
        self.bits = bits
        self.store = store
        self.outer_at_one = outer_at_one or [False] * len(bits)

    def load(self, client: int, downloaded: Tensor) -> OwnModel:
        """Return a copy of the client's own model; the first time it is its network's start, or what it downloaded."""
        network = self.networks[client]
        if client not in self.store:
            return self._first(client, network, downloaded)
        own = OwnModel(network, torch.empty(network.layout.numel, device=downloaded.device), self._centres(client))
        numel = sum(part.numel() for part in _parts(own))
        kept = self.store.get(client, numel)
        for part, values in zip(_parts(own), kept.split([part.numel() for part in _parts(own)]), strict=True):
            part.copy_(values.view(part.shape))
        return own

    def save(self, client: int, own: OwnModel) -> None:
        """Keep the client's own model.

        Raises:
            ArithmeticError: The model has a value that is not finite; what was kept before stays.
        """
        if not is_finite(own.flat):
            raise ArithmeticError("the client's own model has values that are not finite")
        self.store.put(client, torch.cat([part.flatten().to(torch.float32) for part in _parts(own)]))

    def _first(self, client: int, network: Network, downloaded: Tensor) -> OwnModel:
        own = OwnModel(network, (downloaded if network.start is None else network.start).clone())
        own.fill(quantized=False)
        own.centres = self._centres(client)
        return own

    def _centres(self, client: int) -> Centres | None:
        """Return initial centres of what is in the client's module; None for a float model."""
        bits = self.bits[client]
        if bits == FLOAT_BITS:
            return None
        return Centres.of(self.networks[client].module, bits, outer_at_one=self.outer_at_one[client])


def _parts(own: OwnModel) -> list[Tensor]:
    """Return the tensors that a client keeps, always in the same order; counts are small enough for float32."""
    return [own.flat, *(_tensors(own.centres) if own.centres is not None else ())]


def _tensors(centres: Centres) -> Iterator[Tensor]:
    for part in centres.state_dict().values():
        yield from part.values()

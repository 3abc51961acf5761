"""Local training of FedBAT: first in full precision, then with a binary update whose step size is learned.

Li et al. 2024 (ICML). The update that remains is one of two values in each tensor, so any scaled-sign codec without
rotation carries it as it is: one bit a parameter.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from fedq.federated.image_training import LocalTraining, Passed
from fedq.lowbit.update import BinaryUpdate, binary_updates

FULL_PRECISION_SHARE = 0.5
"""Share of a round's steps before the update becomes binary."""


@dataclass(frozen=True)
class FedBatTraining(LocalTraining):
    """How a client of FedBAT trains; its model is one of `fedq.lowbit.update.use_binary_updates`."""

    @cached_property
    def _updates(self) -> list[tuple[nn.Module, BinaryUpdate]]:
        return binary_updates(self.model)

    def _train_round(self, indices: Tensor, generator: torch.Generator) -> Passed:
        """Train half of the steps in full precision and the others with a binary update, which is then drawn once."""
        index_batches = self.index_batches(len(indices), generator)
        num_plain = int(FULL_PRECISION_SHARE * len(index_batches))
        for layer, update in self._updates:
            update.begin(_weight(layer))
        before = self.train(indices, index_batches[:num_plain], generator)
        for layer, update in self._updates:
            update.binarize(_weight(layer))
        after = self.train(indices, index_batches[num_plain:], generator)
        for layer, update in self._updates:
            with torch.no_grad():
                _weight(layer).copy_(update(_weight(layer)))
            update.begin(_weight(layer))
        return before + after


def _weight(layer: nn.Module) -> Tensor:
    weight = layer.parametrizations["weight"].original  # type: ignore[index, union-attr]
    assert isinstance(weight, Tensor)
    return weight

"""FedBAT: an update that is binary while it is trained, with a learned step size.

Li et al. 2024 (ICML, "FedBAT: Communication-Efficient Federated Learning via Learnable Binarization"). Who trains with
it is decided in `fedq.federated.fedbat`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fedq.lowbit.which import FEW_BIT_LAYERS

_RHO = 6.0
_SMALLEST, _LARGEST = 5e-4, 5e-2


class BinaryUpdate(nn.Module):
    """The parametrization ``w_0 + B(w - w_0)`` of a weight; until `binarize` is called it is the weight itself.

    ``B(m) = a·(2b - 1)``, ``b = clip(floor((m/a + 1)/2 + U[0, 1)), 0, 1)``: plus or minus ``a``, and ``m`` on average
    where ``|m| <= a``. The step size ``a = a_0·exp(6·s)`` is learned, ``a_0`` is the mean ``|m|`` when binarization
    starts, and ``a`` stays within 5e-4 and 5e-2.

    Args:
        weight: The weight; the update starts from its values, ``w_0``.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.exponent = nn.Parameter(torch.zeros((), device=weight.device))
        self.exponent.stays_here = True  # type: ignore[attr-defined]  # no part of the model that clients share
        self.start = weight.detach().clone()  # not a buffer: buffers travel
        self.first_step: Tensor | None = None

    def begin(self, weight: Tensor) -> None:
        """Start a round in full precision from a weight."""
        self.first_step = None
        self.start = weight.detach().clone()
        with torch.no_grad():
            self.exponent.zero_()

    def binarize(self, weight: Tensor) -> None:
        """From now on the update is binary; its step size starts at the mean magnitude that it has reached."""
        self.first_step = (weight.detach() - self.start).abs().mean()

    @property
    def step(self) -> Tensor:
        """The step size ``a``."""
        assert self.first_step is not None, "binarize() comes first"
        return (self.first_step * torch.exp(_RHO * self.exponent)).clamp(_SMALLEST, _LARGEST)

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight with its update binarized."""
        if self.first_step is None:
            plain: Tensor = _Plain.apply(weight, self.exponent)  # type: ignore[no-untyped-call]
            return plain
        update: Tensor = _Binarize.apply(weight - self.start, self.step)  # type: ignore[no-untyped-call]
        return self.start + update


class _Plain(torch.autograd.Function):
    """The weight itself. The gradient of the exponent is zero, not None: fused optimizers want one in every step."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, exponent: Tensor) -> Tensor:
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        return grads[0], grads[0].new_zeros(())


class _Binarize(torch.autograd.Function):
    """Stochastic binarization, with the published gradients for ``m`` and ``a``."""

    @staticmethod
    def forward(ctx: Any, m: Tensor, step: Tensor) -> Tensor:
        ratio = m / step
        signs = 2.0 * ((ratio + 1.0) / 2.0 + torch.rand_like(m)).floor_().clamp_(0.0, 1.0) - 1.0
        ctx.save_for_backward(ratio, signs)
        return signs * step

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        ratio, signs = ctx.saved_tensors
        inside = ratio.abs() <= 1.0
        of_step = torch.where(inside, signs - ratio, ratio.sign())
        return grads[0] * inside, (grads[0] * of_step).sum()


def use_binary_updates(model: nn.Module) -> None:
    """Let the updates of all convolutions and linear layers of a model become binary, in place."""
    for layer in [m for m in model.modules() if isinstance(m, FEW_BIT_LAYERS)]:
        parametrize.register_parametrization(layer, "weight", BinaryUpdate(layer.weight), unsafe=True)


def binary_updates(model: nn.Module) -> list[tuple[nn.Module, BinaryUpdate]]:
    """Return the layers of such a model, each with its parametrization."""
    found = []
    for layer in [m for m in model.modules() if parametrize.is_parametrized(m, "weight")]:
        update = layer.parametrizations["weight"][0]  # type: ignore[index, union-attr]
        if isinstance(update, BinaryUpdate):
            found.append((layer, update))
    return found

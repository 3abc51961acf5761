"""What takes an optimizer step: plain PyTorch, or another library that users start their jobs with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fedq.hooks import StepExchange

MakeOptimizer = Callable[[list[nn.Parameter], float], torch.optim.Optimizer]


class Engine(Protocol):
    """Runs forward, backward and optimizer steps of one model on this rank.

    The model's own tensors are what is trained: whoever wants other weights writes them there before `start`.
    """

    name: str

    def start(self, lr: float) -> None:
        """Begin training with new optimizer state."""

    def finish(self) -> None:
        """Let go of the optimizer's state."""

    def set_lr(self, lr: float) -> None:
        """Change the learning rate and keep the optimizer's state."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the model's outputs, float32."""

    def backward(self, loss: Tensor) -> None:
        """Compute new gradients of a loss; unless they are scaled against underflow, they can be read afterwards."""

    def unscale(self) -> None:
        """Make the gradients readable whatever the precision."""

    def step(self) -> None:
        """Move the parameters."""

    def share_gradients(self, options: dict[str, Any]) -> StepExchange:
        """From now on average the gradients over all ranks between backward and step; the optimizer state is kept.

        Args:
            options: Options of `fedq.hooks.register`, by name.
        """

    def state_dict(self) -> dict[str, Any]:
        """Return the optimizer's state, and the gradient scaler's if there is one."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned, after `start`."""

"""The engine that needs nothing but PyTorch: autocast, a gradient scaler for float16, DDP to share gradients."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fedq import hooks
from fedq.engines.base import MakeOptimizer
from fedq.engines.precision import Precision


class TorchEngine:
    """Trains a module with a torch optimizer.

    Args:
        model: Module that is trained.
        make_optimizer: Returns an optimizer for parameters and a learning rate.
        precision: Arithmetic of forward and backward.
    """

    name = "torch"

    def __init__(self, model: nn.Module, make_optimizer: MakeOptimizer, precision: Precision) -> None:
        self.model = model
        self.make_optimizer = make_optimizer
        self.precision = precision
        self.optimizer: torch.optim.Optimizer | None = None
        self.scaler = precision.grad_scaler()
        self._forward = model

    def start(self, lr: float) -> None:
        """Begin training with new optimizer state."""
        self.optimizer = self.make_optimizer([p for p in self.model.parameters() if p.requires_grad], lr)
        self.scaler.load_state_dict(self.precision.grad_scaler().state_dict())

    def finish(self) -> None:
        """Let go of the optimizer's state."""
        self.optimizer = None

    def set_lr(self, lr: float) -> None:
        """Change the learning rate and keep the optimizer's state."""
        for group in self._started().param_groups:
            group["lr"] = lr

    def forward(self, x: Tensor) -> Tensor:
        """Return the model's outputs, float32."""
        with self.precision.autocast():
            outputs: Tensor = self._forward(x)
        return outputs.float()

    def backward(self, loss: Tensor) -> None:
        """Compute new gradients of a loss."""
        self._started().zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]

    def unscale(self) -> None:
        """Make the gradients readable whatever the precision."""
        self.scaler.unscale_(self._started())

    def step(self) -> None:
        """Move the parameters."""
        self.scaler.step(self._started())
        self.scaler.update()

    def share_gradients(self, options: dict[str, Any]) -> hooks.StepExchange:
        """Wrap the model in DDP with fedq's hook; a single rank has nothing to share."""
        if not dist.is_initialized():
            return hooks.step_state(self.model, **options)
        # What DDP would send without being asked, at the start and before every forward pass, the trainer shares, and
        # counts. An attribute, not an argument: the argument has another name in every second version of torch.
        wrapped = nn.parallel.DistributedDataParallel(self.model, init_sync=False)
        wrapped.broadcast_buffers = False
        self._forward = wrapped
        return hooks.register(wrapped, grad_scaler=self.scaler, **options)

    def state_dict(self) -> dict[str, Any]:
        """Return the states of optimizer and gradient scaler."""
        return {"optimizer": self._started().state_dict(), "scaler": self.scaler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        optimizer = self._started()
        optimizer.load_state_dict(state["optimizer"])
        for param, values in optimizer.state.items():
            for name, value in values.items():
                if torch.is_tensor(value) and value.shape == param.shape:
                    # Fused optimizers walk through memory, so state must lie as its parameter does.
                    values[name] = torch.empty_like(param).copy_(value)
        self.scaler.load_state_dict(state["scaler"])

    def _started(self) -> torch.optim.Optimizer:
        assert self.optimizer is not None, "start() comes first"
        return self.optimizer

"""Steps of a job that `accelerate launch` started.

In step mode Accelerate wraps model and optimizer, and carries fedq's hook. In round mode it must not wrap them: every
rank trains clients of its own, which DDP would average.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from torch import nn

from fedq import hooks
from fedq.engines.accelerator import make_accelerator
from fedq.engines.base import MakeOptimizer
from fedq.engines.environ import defaults_in_environ
from fedq.engines.precision import Precision
from fedq.engines.torch_engine import TorchEngine
from fedq.errors import FieldError

_UNUSABLE = {
    "ACCELERATE_USE_DEEPSPEED": "deepspeed train.py, or --deepspeed-config FILE with any launcher",
    "ACCELERATE_USE_FSDP": "distributed_type MULTI_GPU: each rank trains a whole model",
    "ACCELERATE_USE_MEGATRON_LM": "distributed_type MULTI_GPU: each rank trains a whole model",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "distributed_type MULTI_GPU: each rank trains a whole model",
}


def accelerate_settings(environ: Mapping[str, str]) -> dict[str, Any]:
    """Return what Accelerate's own configuration says about settings of ours, by the names of the flags.

    Args:
        environ: The environment that `accelerate launch` made.

    Raises:
        FieldError: The configuration asks for something that would be ignored.
    """
    for name, way_out in _UNUSABLE.items():
        if environ.get(name, "false").lower() == "true":
            raise FieldError(name, environ[name], f"left out; instead: {way_out}")
    dynamo = environ.get("ACCELERATE_DYNAMO_BACKEND", "no")
    if dynamo.lower() != "no":
        raise FieldError("dynamo_backend", dynamo, "no: models are not compiled here")
    precision = environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision not in ("no", "bf16", "fp16"):
        raise FieldError("mixed_precision", precision, "no (then --precision decides), bf16, fp16")
    return {} if precision == "no" else {"precision": precision}


class AccelerateEngine(TorchEngine):
    """Trains a module as `TorchEngine` does, with Accelerate's wrapping where gradients are shared.

    Args:
        model: Module that is trained.
        make_optimizer: Returns an optimizer for parameters and a learning rate.
        precision: Arithmetic of forward and backward; Accelerate is told of none, because autocast is the engine's.

    Raises:
        FieldError: Accelerate is not installed, or sees another number of ranks.
    """

    name = "accelerate"

    def __init__(self, model: nn.Module, make_optimizer: MakeOptimizer, precision: Precision) -> None:
        super().__init__(model, make_optimizer, precision)
        self.accelerator = make_accelerator(next(model.parameters()).device)
        self._shares = False

    def start(self, lr: float) -> None:
        """Begin training with new optimizer state."""
        super().start(lr)
        if self._shares:
            self.optimizer = self.accelerator.prepare_optimizer(self.optimizer)

    def share_gradients(self, options: dict[str, Any]) -> hooks.StepExchange:
        """Have Accelerate wrap the model in DDP, with fedq's hook."""
        if not dist.is_initialized():
            return super().share_gradients(options)
        # Ranks may share a GPU, so DDP goes by the model's device and not by the local rank.
        with defaults_in_environ({"ACCELERATE_BYPASS_DEVICE_MAP": "true"}):
            wrapped = self.accelerator.prepare_model(self.model)
        wrapped.broadcast_buffers = False  # the trainer shares them, and counts them
        self._forward, self._shares = wrapped, True
        return hooks.register(wrapped, grad_scaler=self.scaler, **options)

"""Steps of a job that `accelerate launch` started.

In step mode Accelerate wraps model and optimizer, and carries fedq's hook. In round mode it must not wrap them: every
rank trains clients of its own, which DDP would average.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from fedq import hooks
from fedq.engines.base import MakeOptimizer
from fedq.engines.environ import defaults_in_environ
from fedq.engines.precision import Precision
from fedq.engines.torch_engine import TorchEngine
from fedq.errors import FieldError, one_of

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
        FieldError: It asks for something that would be ignored.
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
    """Trains a module as `TorchEngine` does, with Accelerate's wrapping where gradients are shared, and its trackers.

    Args:
        model: What is trained.
        make_optimizer: From parameters and learning rate to an optimizer.
        precision: Arithmetic of forward and backward; Accelerate is told of none, because autocast is the engine's.
        trackers: Names of Accelerate's trackers, such as wandb.
        folder: Where trackers that write files do so.

    Raises:
        FieldError: Accelerate is not installed, does not know a tracker, or sees another number of ranks.
    """

    name = "accelerate"

    def __init__(
        self,
        model: nn.Module,
        make_optimizer: MakeOptimizer,
        precision: Precision,
        trackers: Sequence[str] = (),
        folder: Path | None = None,
    ) -> None:
        super().__init__(model, make_optimizer, precision)
        self.accelerator = _accelerator(next(model.parameters()).device, trackers, folder)
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


class Trackers:
    """Accelerate's trackers, fed on rank 0.

    Args:
        accelerator: An `Accelerator` with `log_with`.
        config: The run's settings, nested by group.
    """

    def __init__(self, accelerator: Any, config: Mapping[str, Mapping[str, Any]]) -> None:
        self.accelerator = accelerator
        flat = {f"{group}.{key}": value for group, values in config.items() for key, value in values.items()}
        plain = {key: value for key, value in flat.items() if isinstance(value, (bool, int, float, str))}
        accelerator.init_trackers("fedq", config=plain)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Pass a round's numbers on."""
        self.accelerator.log(dict(values), step=step)

    def close(self) -> None:
        """Finish the trackers; `Accelerator.end_training` would destroy the process group too."""
        for tracker in self.accelerator.trackers:
            tracker.finish()


def _accelerator(device: torch.device, trackers: Sequence[str], folder: Path | None) -> Any:
    """Return an `Accelerator` for this device that sees the process group as it is."""
    try:
        from accelerate import Accelerator, DistributedDataParallelKwargs
    except ImportError as error:
        allowed = f"an installed Accelerate: pip install 'fedq[accelerate]' ({error})"
        raise FieldError("accelerate", None, allowed) from None
    _check_trackers(trackers)
    ddp = DistributedDataParallelKwargs()
    # It knows no init_sync: the trainer shares the start, and counts it.
    ddp.to_kwargs = lambda: {"init_sync": False}
    # Without these it would choose threads and a device by itself.
    ours = {"OMP_NUM_THREADS": str(torch.get_num_threads()), "ACCELERATE_TORCH_DEVICE": str(device)}
    with defaults_in_environ(ours):
        accelerator = Accelerator(
            cpu=device.type == "cpu",
            mixed_precision="no",
            kwargs_handlers=[ddp],
            log_with=list(trackers) or None,
            project_dir=None if folder is None else str(folder),
        )
    num_ranks = dist.get_world_size() if dist.is_initialized() else 1
    if accelerator.num_processes != num_ranks:
        works = f"ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes {num_ranks} train.py"
        raise FieldError("num_processes", accelerator.num_processes, f"{num_ranks}, as WORLD_SIZE says; try: {works}")
    return accelerator


def _check_trackers(names: Sequence[str]) -> None:
    """Refuse trackers that are not installed, which Accelerate would leave out without a word."""
    if not names:
        return
    from accelerate.tracking import get_available_trackers

    available = [str(tracker) for tracker in get_available_trackers()]
    for name in names:
        if name not in available:
            raise FieldError("log_with", name, f"installed trackers: {one_of(available, name)}")

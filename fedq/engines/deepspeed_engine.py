"""Steps taken by a DeepSpeed engine at ZeRO stage 0, on each rank by itself.

DeepSpeed sees a data-parallel group of one rank, in both modes: clients of a round may take different numbers of steps,
and in step mode the mean over ranks is ours. So it starts no collective, and none of its bytes go uncounted.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fedq import hooks
from fedq.engines.base import MakeOptimizer
from fedq.engines.deepspeed_config import DeepSpeedFile
from fedq.engines.environ import defaults_in_environ
from fedq.engines.precision import Precision
from fedq.engines.torch_engine import TorchEngine
from fedq.errors import FieldError


class DeepSpeedEngine(TorchEngine):
    """Trains a module with `deepspeed.initialize`; weights stay float32, and so are the model's own tensors.

    Args:
        model: Module that is trained.
        make_optimizer: Returns an optimizer for parameters and a learning rate; not used if the file has an optimizer.
        precision: Arithmetic of forward and backward.
        file: DeepSpeed's configuration.
        settings: Batch size and hyperparameters, by the names of our flags; see `DeepSpeedFile.for_engine`.

    Raises:
        FieldError: DeepSpeed is not installed, or refuses the configuration.
    """

    name = "deepspeed"
    optimizer: torch.optim.Optimizer

    def __init__(
        self,
        model: nn.Module,
        make_optimizer: MakeOptimizer,
        precision: Precision,
        file: DeepSpeedFile,
        settings: Mapping[str, Any],
    ) -> None:
        super().__init__(model, make_optimizer, precision)
        params = [p for p in model.parameters() if p.requires_grad]
        config = file.for_engine(precision.name, settings)
        optimizer = None if "optimizer" in config else make_optimizer(params, settings["lr"])
        self.engine = _initialize(model, params, optimizer, config, file)
        # The hook and DeepSpeed must mean the same scaler.
        self.scaler = torch.amp.GradScaler(precision.device_type, enabled=precision.name == "fp16", **file.scaling)
        if self.scaler.is_enabled():
            self.engine.torch_autocast_z0_gradscaler = self.scaler
        self.engine.enable_backward_allreduce = False
        self.optimizer = self.engine.optimizer
        self._new = copy.deepcopy({"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()})
        self._shared: hooks.StepExchange | None = None

    def start(self, lr: float) -> None:
        """Begin training with new optimizer state."""
        self.engine.zero_grad()
        self.load_state_dict(self._new)
        self.set_lr(lr)

    def finish(self) -> None:
        """Let go of the optimizer's state."""
        self.load_state_dict(self._new)

    def forward(self, x: Tensor) -> Tensor:
        """Return the model's outputs, float32."""
        outputs: Tensor = self.engine(x)
        return outputs.float()

    def backward(self, loss: Tensor) -> None:
        """Compute new gradients of a loss, and average them over the ranks if they are shared."""
        self.engine.backward(loss)
        if self._shared is not None:
            self._shared.average_gradients()

    def unscale(self) -> None:
        """Make the gradients readable whatever the precision.

        Raises:
            FieldError: In float16 gradients are clipped: clipping unscales them too, and that can be done once only.
        """
        if self.scaler.is_enabled() and self.engine.gradient_clipping() > 0:
            raise FieldError("gradient_clipping", self.engine.gradient_clipping(), "0 with fp16 and --prox-mu")
        super().unscale()

    def step(self) -> None:
        """Move the parameters."""
        self.engine.step()

    def share_gradients(self, options: dict[str, Any]) -> hooks.StepExchange:
        """Average the gradients over all ranks with fedq's codecs, in the place of DeepSpeed's reduction."""
        self._shared = hooks.step_state(self.model, grad_scaler=self.scaler, **options)
        return self._shared


class _Alone:
    """What DeepSpeed calls a model parallelism unit: groups of this rank alone, for data and for model."""

    def __init__(self, group: Any) -> None:
        self.group = group

    def get_data_parallel_group(self) -> Any:
        return self.group

    def get_data_parallel_world_size(self) -> int:
        return 1

    def get_data_parallel_rank(self) -> int:
        return 0

    get_model_parallel_group = get_data_parallel_group
    get_model_parallel_world_size = get_data_parallel_world_size
    get_model_parallel_rank = get_data_parallel_rank


def _initialize(
    model: nn.Module,
    params: list[nn.Parameter],
    optimizer: torch.optim.Optimizer | None,
    config: dict[str, Any],
    file: DeepSpeedFile,
) -> Any:
    device = next(model.parameters()).device
    # DeepSpeed takes the machine's GPU whatever the model is on, and refuses to work without a launcher's LOCAL_RANK.
    wanted = {"LOCAL_RANK": "0"} | ({"DS_ACCELERATOR": "cpu"} if device.type == "cpu" else {})
    with defaults_in_environ(wanted), _contiguous(model):
        deepspeed = _import()
        try:
            return deepspeed.initialize(
                args=SimpleNamespace(device_rank=device.index or 0),
                model=model,
                model_parameters=params,
                optimizer=optimizer,
                config=config,
                mpu=_Alone(_own_group()),
            )[0]
        except (AssertionError, TypeError, ValueError) as error:
            words = " ".join(str(error).split())
            raise FieldError("deepspeed_config", str(file.path), f"what DeepSpeed accepts; it says: {words}") from error


def _import() -> ModuleType:
    """Import DeepSpeed, without its shared-memory collectives, which it would compile at the first start."""
    try:
        import deepspeed
    except ImportError as error:
        allowed = f"an installed DeepSpeed: pip install 'fedq[deepspeed]' ({error})"
        raise FieldError("deepspeed", None, allowed) from None
    deepspeed.ops.__compatible_ops__ = {}
    return deepspeed


@contextmanager
def _contiguous(model: nn.Module) -> Iterator[None]:
    """Have all parameters contiguous for the body: DeepSpeed's broadcast, here to nobody, fails on channels last."""
    before = [(param, param.data) for param in model.parameters()]
    for param, data in before:
        param.data = data.contiguous()
    try:
        yield
    finally:
        for param, data in before:
            param.data = data


def _own_group() -> Any:
    """Return a process group of this rank alone; a job of one rank, which has no group, gets one."""
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    if dist.get_world_size() == 1:
        return dist.group.WORLD
    return dist.new_group([dist.get_rank()], use_local_synchronization=True)

"""A DeepSpeed engine in somebody's own script: what it must leave to us."""

from __future__ import annotations

import sys

from torch import nn

from fedq.errors import FieldError
from fedq.hooks.grad_scale import GradScale


def without_deepspeed(module: nn.Module) -> tuple[nn.Module, GradScale | None]:
    """Return the module inside a DeepSpeed engine, and what tells the engine's loss scale; any other module as it is.

    The engine's own all-reduce is switched off: `average_gradients` takes its place between ``engine.backward`` and
    ``engine.step``.

    Raises:
        FieldError: ZeRO stage 1 to 3, which shard what is averaged; or a pipeline engine, which has its own loop.
    """
    engine_class = getattr(sys.modules.get("deepspeed"), "DeepSpeedEngine", ())
    if not isinstance(module, engine_class):
        return module, None
    engine, name = module, type(module).__name__
    if stage := engine.zero_optimization_stage():
        allowed = "ZeRO stage 0: the other stages shard what is averaged, and reduce it in backward"
        raise FieldError("module", f"a {name} at ZeRO stage {int(stage)}", allowed)
    if engine.pipeline_parallelism:
        raise FieldError("module", f"a {name}", "an engine without pipeline parallelism")
    engine.enable_backward_allreduce = False
    scaler = getattr(engine, "torch_autocast_z0_gradscaler", None)
    if scaler is None and hasattr(engine.optimizer, "loss_scale"):
        return engine.module, lambda: float(engine.optimizer.loss_scale)
    return engine.module, scaler

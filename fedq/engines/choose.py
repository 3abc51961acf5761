"""Which engine takes the steps: the one of the library that started the job, or that its settings name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from fedq.engines.base import Engine, MakeOptimizer
from fedq.engines.precision import Precision
from fedq.engines.torch_engine import TorchEngine
from fedq.errors import FieldError


def make_engine(
    launcher: str,
    model: nn.Module,
    make_optimizer: MakeOptimizer,
    precision: Precision,
    *,
    settings: Mapping[str, Any],
    deepspeed_config: Path | None = None,
) -> Engine:
    """Return DeepSpeed's engine if it started the job or a file of it is given, then Accelerate's, then torch's.

    Args:
        launcher: Launcher that started the job, as `fedq.runtime.detect` names it.
        model: Module that is trained, on its device.
        make_optimizer: Returns an optimizer for parameters and a learning rate.
        precision: Arithmetic of forward and backward.
        settings: Settings of local training, by the names of their flags.
        deepspeed_config: DeepSpeed's configuration file; None: no file is given.

    Raises:
        FieldError: The library is missing, or a setting does nothing with this engine.
    """
    if deepspeed_config is not None or launcher == "deepspeed":
        engine: Engine = _deepspeed(model, make_optimizer, precision, settings, deepspeed_config)
    elif launcher == "accelerate":
        from fedq.engines.accelerate_engine import AccelerateEngine

        engine = AccelerateEngine(model, make_optimizer, precision)
    else:
        engine = TorchEngine(model, make_optimizer, precision)
    return engine


def _deepspeed(
    model: nn.Module,
    make_optimizer: MakeOptimizer,
    precision: Precision,
    settings: Mapping[str, Any],
    path: Path | None,
) -> Engine:
    from fedq.engines.deepspeed_config import DeepSpeedFile
    from fedq.engines.deepspeed_engine import DeepSpeedEngine

    if settings["side_by_side"] > 1:
        raise FieldError("side_by_side", settings["side_by_side"], "1 with DeepSpeed, which steps one model at a time")
    file = DeepSpeedFile() if path is None else DeepSpeedFile.read(path)
    if "optimizer" in file.tree and settings["optimizer"] != "sgd":
        raise FieldError("optimizer", settings["optimizer"], f"left out, because {path} has an optimizer")
    return DeepSpeedEngine(model, make_optimizer, precision, file, settings)

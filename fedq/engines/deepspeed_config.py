"""A DeepSpeed configuration file: which of its keys are settings of ours, which are DeepSpeed's, which are refused.

DeepSpeed ignores keys that it does not know, and several that it knows do nothing where gradients are averaged by fedq;
here both are errors. What the settings mean lives in `fedq.config`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedq.errors import FieldError, one_of

BATCH_SIZE = "train_micro_batch_size_per_gpu"

_PASSED_ON = {
    "comet",
    "csv_monitor",
    "disable_python_gc",
    "dump_state",
    "flops_profiler",
    "gradient_clipping",
    "log_level",
    "memory_breakdown",
    "steps_per_print",
    "tensorboard",
    "timers",
    "wall_clock_breakdown",
    "wandb",
    "zero_optimization",
}
"""Keys that DeepSpeed is given as they stand."""

_READ_HERE = {BATCH_SIZE, "bf16", "fedq", "fp16", "gradient_accumulation_steps", "optimizer", "torch_autocast"}

_EXCHANGE = "left out, because fedq averages the gradients: --exchange, --uplink, --downlink"
_LEFT_OUT = {
    "communication_data_type": _EXCHANGE,
    "gradient_allreduce_op": _EXCHANGE,
    "gradient_compression": 'left out, DeepSpeed has no such key; "fedq": {"uplink": "int8"} compresses what travels',
    "gradient_predivide_factor": _EXCHANGE,
    "prescale_gradients": _EXCHANGE,
    "scheduler": "left out, because --lr-schedule is the schedule",
    "sparse_gradients": _EXCHANGE,
    "train_batch_size": f"left out; {BATCH_SIZE} is the batch of a step on one rank",
}
"""Keys that DeepSpeed knows and fedq replaces, with what to do instead."""

_OPTIMIZER_FLAGS = ("lr", "momentum", "weight_decay")
_DTYPES = {"bfloat16": "bf16", "bf16": "bf16", "float16": "fp16", "fp16": "fp16", "half": "fp16"}
# GradScaler halves at every overflow, without a floor; what is not of this value would be ignored.
_FP16_FIXED = {"loss_scale": 0, "hysteresis": 2, "consecutive_hysteresis": False, "min_loss_scale": 1}
_FP16_KEYS = {"enabled", "auto_cast", "initial_scale_power", "loss_scale_window", *_FP16_FIXED}


@dataclass(frozen=True)
class DeepSpeedFile:
    """What a DeepSpeed configuration says, checked.

    Args:
        path: The file, for messages; None: nothing but defaults.
        tree: The file's content, without keys whose value is "auto", unless these are hyperparameters with a flag.
    """

    path: Path | None = None
    tree: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> DeepSpeedFile:
        """Read and check a file.

        Raises:
            FieldError: The file cannot be read, or has a key or a value that DeepSpeed or fedq would not act on.
        """
        file = cls(path, _without_auto(_load(path)))
        file._check_keys()
        file._check_stage()
        steps = file.tree.get("gradient_accumulation_steps", 1)
        if steps != 1:
            raise file._error("gradient_accumulation_steps", steps, "1; a larger --batch-size does the same")
        file._check_precision()
        return file

    @property
    def fedq(self) -> Mapping[str, Any]:
        """The section of our own: settings by the names of their flags, with underscores."""
        return self._section("fedq")

    @property
    def implied(self) -> dict[str, tuple[str, Any]]:
        """What DeepSpeed's own keys say about settings of ours: key and value, by the setting's name."""
        found = {}
        if BATCH_SIZE in self.tree:
            found["batch_size"] = (BATCH_SIZE, self.tree[BATCH_SIZE])
        params = self._optimizer_params()
        found |= {name: (f"optimizer.params.{name}", params[name]) for name in _OPTIMIZER_FLAGS if name in params}
        for name, key in self._enabled().items():
            found["precision"] = (key, name)
        return {name: (key, value) for name, (key, value) in found.items() if value != "auto"}

    @property
    def scaling(self) -> dict[str, Any]:
        """Arguments of float16's gradient scaler."""
        section = self._section("fp16")
        found: dict[str, Any] = {}
        if "initial_scale_power" in section:
            found["init_scale"] = 2.0 ** section["initial_scale_power"]
        if "loss_scale_window" in section:
            found["growth_interval"] = section["loss_scale_window"]
        return found

    def for_engine(self, precision: str, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Return what `deepspeed.initialize` is given.

        Weights stay float32 whatever the precision: DeepSpeed's own `bf16` and `fp16` cast the parameters and not
        BatchNorm's statistics, which torch then refuses, so its `torch_autocast` is used for both.

        Args:
            precision: Name of the arithmetic: fp32, bf16 or fp16.
            settings: Batch size and, where the file has an optimizer, its hyperparameters, by the names of our flags.
        """
        # Left to itself DeepSpeed clips gradients at norm 1, which no other engine does.
        config = {"gradient_clipping": 0.0} | {key: value for key, value in self.tree.items() if key in _PASSED_ON}
        config[BATCH_SIZE] = settings["batch_size"]
        if "optimizer" in self.tree:
            params = self._optimizer_params()
            ours = {name: settings[name] for name in _OPTIMIZER_FLAGS if name in params}
            config["optimizer"] = {**self._section("optimizer"), "params": {**params, **ours}}
        if precision != "fp32":
            dtype = {"bf16": "bfloat16", "fp16": "float16"}[precision]
            config["torch_autocast"] = {"enabled": True, "dtype": dtype}
        return config

    def _check_keys(self) -> None:
        for key, value in self.tree.items():
            if key in _LEFT_OUT:
                raise self._error(key, value, _LEFT_OUT[key])
            if key not in _PASSED_ON | _READ_HERE:
                raise self._error(key, value, f"only the keys {one_of(_PASSED_ON | _READ_HERE, key)}")

    def _check_stage(self) -> None:
        stage = self._section("zero_optimization").get("stage", 0)
        if stage != 0:
            why = "higher stages shard one model over the ranks, but here each rank trains or averages a whole one"
            raise self._error("zero_optimization.stage", stage, f"0 ({why})")

    def _check_precision(self) -> None:
        if len(self._enabled()) > 1:
            raise self._error("fp16", self.tree.get("fp16"), "one precision: fp16, bf16 or torch_autocast")
        for key, known in (("fp16", _FP16_KEYS), ("bf16", {"enabled"}), ("torch_autocast", {"enabled", "dtype"})):
            for name, value in self._section(key).items():
                if name not in known:
                    raise self._error(f"{key}.{name}", value, f"only the keys {one_of(known, name)}")
        for name, only in _FP16_FIXED.items():
            value = self._section("fp16").get(name, only)
            if value != only:
                raise self._error(f"fp16.{name}", value, f"{json.dumps(only)}, as torch's GradScaler has it")

    def _enabled(self) -> dict[str, str]:
        """Return the precisions that are switched on, with the keys that say so."""
        found = {name: f"{name}.enabled" for name in ("bf16", "fp16") if self._section(name).get("enabled")}
        autocast = self._section("torch_autocast")
        if autocast.get("enabled"):
            dtype = str(autocast.get("dtype", "bfloat16")).removeprefix("torch.")
            if dtype not in _DTYPES:
                raise self._error("torch_autocast.dtype", dtype, one_of(_DTYPES, dtype))
            found[_DTYPES[dtype]] = "torch_autocast.dtype"
        return found

    def _optimizer_params(self) -> dict[str, Any]:
        params = self._section("optimizer").get("params", {})
        if not isinstance(params, Mapping):
            raise self._error("optimizer.params", params, "an object")
        return dict(params)

    def _section(self, key: str) -> Mapping[str, Any]:
        value = self.tree.get(key, {})
        if not isinstance(value, Mapping):
            raise self._error(key, value, "an object")
        return value

    def _error(self, key: str, value: object, allowed: str) -> FieldError:
        return FieldError(f"{self.path}: {key}", value, allowed)


def _load(path: Path) -> Mapping[str, Any]:
    try:
        tree = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_unique(path))
    except OSError as error:
        raise FieldError("deepspeed_config", str(path), f"a JSON file that can be read ({error.strerror})") from None
    except ValueError as error:
        if isinstance(error, FieldError):
            raise
        raise FieldError("deepspeed_config", str(path), f"a JSON file, without comments; {error}") from None
    if not isinstance(tree, dict):
        raise FieldError("deepspeed_config", str(path), "a JSON file that holds an object")
    return tree


def _unique(path: Path) -> Callable[[list[tuple[str, Any]]], dict[str, Any]]:
    """Return what builds an object of unique keys, where `json` would keep the last of two."""

    def build(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        built = dict(pairs)
        if len(built) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise FieldError(f"{path}: key", twice, "given once")
        return built

    return build


def _without_auto(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Drop what is "auto", DeepSpeed's default; of the optimizer's hyperparameters it means the flag's value."""
    return {
        key: _without_auto(value) if isinstance(value, Mapping) and key != "fedq" else value
        for key, value in tree.items()
        if value != "auto" or key in _OPTIMIZER_FLAGS
    }

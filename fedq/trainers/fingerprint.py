"""What makes a run the one that it is: settings, data, and the shapes of its model. Every checkpoint has it.

When a run is gone on with, it is compared with what is there now. What differs is refused, with both values, or taken
over where `--resume-changed` names it.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fedq.checkpoint import CheckpointError, Checkpoints
from fedq.config import Config, RunConfig
from fedq.configfile import config_dict, load_config
from fedq.data import Dataset
from fedq.errors import FieldError, one_of
from fedq.layout import uncompiled_name
from fedq.old_settings import modern
from fedq.text import clean

KEY = "fingerprint"
"""Key of the fingerprint in a checkpoint's state."""
DATA, MODEL = "data", "model"
"""Names that `resume_changed` may have beside settings. The model is a setting too: the name of its code."""
_VERSION = 1

_FREE = {"dataset", "data_dir", "download", "aggregate"} | {one.name for one in fields(RunConfig)} - {"seed"}
"""Settings that may differ without a word. Where the data lie is free because they are compared themselves."""
_FIXED = {
    *("exchange", "algorithm", "server", "num_clients", "weights", "activations", "sends", "server_sends"),
    *("client_bits", "client_models", "centres", "personal_test"),
}
"""Settings that decide what a checkpoint consists of; nothing takes their change over."""
_FIXED_BY_STEP = {"optimizer", "uplink", "downlink", "schedule", "feedback"}
"""Settings that are fixed too with --exchange step, whose optimizer and residuals are part of the checkpoint."""
_DECIDE_DATA = {"image_size", "train_examples", "val_fraction", "seed"}
"""Settings that decide what the data are, so that their change explains a change of the data."""
_LONGEST = 200

Changes = dict[str, tuple[Any, Any]]
"""Old and new value of what differs, by name."""


@dataclass(frozen=True)
class Fingerprint:
    """What a run is.

    Args:
        settings: Every setting by its name, but those of a network.
        data: Words on each split and on the classes, by name, that any other content would change; None: not known.
        model: Shapes of the model's tensors, by name; None: not known.
        changes: Changes that were taken over under way, each with its `round`, `name`, `before` and `now`.
    """

    settings: dict[str, Any]
    data: dict[str, str] | None = None
    model: dict[str, list[int]] | None = None
    changes: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def of(cls, config: Config, data: Dataset, model: nn.Module) -> Fingerprint:
        """Return that of a job."""
        shapes = {uncompiled_name(name): list(value.shape) for name, value in model.state_dict().items()}
        return cls(_settings(config), describe_data(data), shapes)

    @classmethod
    def kept(cls, path: Path, kind: type[Config]) -> Fingerprint:
        """Return that of the run in a folder: of its newest checkpoint that can be read.

        Before version 1 of fingerprints, and before the first checkpoint, only `config.yaml` says anything.

        Raises:
            FieldError: `config.yaml` cannot be used, or a later version has written the checkpoint.
        """
        by_file = cls(_settings(load_config(path / "config.yaml", kind())))
        checkpoints = Checkpoints(path / "checkpoints")
        for number in reversed(checkpoints.numbers()):
            try:
                found = checkpoints.load_part(number, KEY)
            except CheckpointError:
                continue
            return by_file if found is None else cls._of_state(found, path)
        return by_file

    @classmethod
    def _of_state(cls, state: dict[str, Any], path: Path) -> Fingerprint:
        if state["version"] > _VERSION:
            allowed = f"a run whose fingerprint has version {_VERSION} or less, not {state['version']}"
            raise FieldError("resume", str(path), allowed)
        kept = {one.name: state[one.name] for one in fields(cls)}
        return cls(**kept | {"settings": modern(kept["settings"])})

    def state_dict(self) -> dict[str, Any]:
        """Return it in plain values, for a checkpoint."""
        return {"version": _VERSION, **asdict(self)}

    def with_changes(self, changes: Changes, before: Sequence[dict[str, Any]], round: int) -> Fingerprint:
        """Return it with what was changed earlier, and now, after so many rounds."""
        new = [{"round": round, "name": name, "before": old, "now": now} for name, (old, now) in changes.items()]
        return replace(self, changes=[*before, *new])


def check_names(config: Config) -> None:
    """Refuse a name in `resume_changed` that nothing has, or whose change cannot be taken over.

    Raises:
        FieldError: There is such a name; the text has the first one, and those that are allowed.
    """
    allowed = (_settings(config).keys() - _FREE - _fixed(config)) | {DATA, MODEL}
    for name in _named(config):
        if name not in allowed:
            raise FieldError("resume_changed", name, one_of(allowed, name))


def changed_settings(kept: Fingerprint, config: Config, path: Path) -> Changes:
    """Return the settings that are not those of the run in a folder and may be taken over.

    A setting that the run does not know yet had its default.

    Raises:
        FieldError: A setting differs and is not to be taken over.
    """
    now, defaults = _settings(config), _settings(type(config)())
    free = _FREE if kept.data is not None else _FREE - {"dataset"}
    before = {name: kept.settings.get(name, defaults[name]) for name in now.keys() - free}
    changes = {name: (before[name], now[name]) for name in now if name in before and before[name] != now[name]}
    _check_taken(changes, config, path)
    return changes


def changed_content(kept: Fingerprint, own: Fingerprint, config: Config, path: Path, settings: Changes) -> Changes:
    """Return whether data are not those of the run in a folder, and may be taken over.

    Args:
        kept: Fingerprint of the run in the folder.
        own: Fingerprint of the job on this rank.
        config: The job's settings.
        path: The run's folder.
        settings: Changes of settings that `changed_settings` returned.

    Raises:
        FieldError: Data or model differ and are not to be taken over.
    """
    _check_shapes(kept, own, path)
    if kept.data is None or own.data is None or kept.data == own.data or _DECIDE_DATA & settings.keys():
        return {}
    changes: Changes = {DATA: _what_differs(kept.data, own.data)}
    _check_taken(changes, config, path)
    return changes


def check_alike(own: Fingerprint, first: dict[str, str] | None, rank: int) -> None:
    """Compare a rank's data with rank 0's: shares are dealt by number, so all must have the same.

    Raises:
        FieldError: The ranks' data differ.
    """
    if own.data is not None and first is not None and own.data != first:
        theirs, ours = _what_differs(first, own.data)
        raise FieldError(f"data of rank {rank}", ours, f"{theirs}, as on rank 0")


def _what_differs(before: Mapping[str, str], now: Mapping[str, str]) -> tuple[str, str]:
    """Return, of the parts of two data sets that differ, one's and the other's words."""
    parts = [part for part in now if before.get(part) != now[part]]
    both = ("; ".join(f"{part}: {one.get(part)}" for part in parts) for one in (before, now))
    first, second = (clean(text, _LONGEST * len(parts)) for text in both)
    return first, second


def describe_changes(changes: Changes) -> list[str]:
    """Return a line that says what is taken over; none for nothing."""
    if not changes:
        return []
    return ["taken over: " + "; ".join(f"{name} {before!r} -> {now!r}" for name, (before, now) in changes.items())]


def describe_data(data: Dataset) -> dict[str, str]:
    """Return data in words, wherever they lie: each split's size, shape and checksums, and the names of the classes."""
    words = {"classes": f"{data.num_classes}, {', '.join(data.class_names)}"}
    for name, split in (("train", data.train), ("val", data.val), ("test", data.test)):
        shape = "x".join(map(str, split.images.shape[1:]))
        sums = f"{_checksum(split.images)}, of labels {_checksum(split.labels)}"
        words[name] = f"{len(split)} images of {shape}, checksum {sums}"
    return words


def _checksum(values: Tensor) -> str:
    return f"{zlib.crc32(values.contiguous().numpy().data):08x}"  # C wherever fedq has no compiled kernels


def _check_shapes(kept: Fingerprint, own: Fingerprint, path: Path) -> None:
    """Refuse a model whose tensors are others; no flag makes their values fit."""
    if kept.model is None or own.model is None or kept.model == own.model:
        return
    names = [name for name in {**kept.model, **own.model} if kept.model.get(name) != own.model.get(name)]
    before, now = (
        f"{one.settings[MODEL]} with {names[0]} {_shape((one.model or {}).get(names[0]))}" for one in (kept, own)
    )
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    raise FieldError(MODEL, now + more, f"{before + more}, as when the run in {path} was started")


def _shape(shape: list[int] | None) -> str:
    return "left out" if shape is None else "x".join(map(str, shape)) or "scalar"


def _check_taken(changes: Changes, config: Config, path: Path) -> None:
    named, fixed = _named(config), _fixed(config)
    for name, (before, now) in changes.items():
        if name in fixed or name not in named:
            other = "" if name in fixed else f" (or --resume-changed {name})"
            raise FieldError(name, now, f"{before!r}, as when the run in {path} was started{other}")


def _settings(config: Config) -> dict[str, Any]:
    groups = config_dict(config)
    return {name: value for group, values in groups.items() if group != "network" for name, value in values.items()}


def _fixed(config: Config) -> set[str]:
    return _FIXED | (_FIXED_BY_STEP if config.exchange.exchange == "step" else set())


def _named(config: Config) -> Iterable[str]:
    return [name for text in config.run.resume_changed for name in text.replace("-", "_").split(",") if name]


def unknown_settings(kept: Fingerprint, config: Config) -> Mapping[str, Any]:
    """Return the settings of a run that this program does not have."""
    return {name: value for name, value in kept.settings.items() if name not in _settings(config)}

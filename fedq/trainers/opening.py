"""How a job comes by its run's folder: begins one, or goes on with one that is proved to be the same run."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from fedq.checkpoint import Checkpoints
from fedq.config import Config
from fedq.configfile import config_dict, load_config
from fedq.data import Dataset
from fedq.errors import FieldError
from fedq.report import print_header, print_summary
from fedq.runfolder import NullRunFolder, RunFolder
from fedq.runtime import Runtime, from_root, num_restarts, on_every_rank, on_root
from fedq.trainers.fingerprint import (
    Changes,
    Fingerprint,
    changed_content,
    changed_settings,
    check_alike,
    describe_changes,
    unknown_settings,
)
from fedq.trainers.starts import (
    Finished,
    Place,
    check_progress,
    count_start,
    finished_summary,
    note,
    note_repeated,
    note_start,
    wire_after_rounds,
)


@dataclass(frozen=True)
class Opened:
    """What every rank knows of a run's folder."""

    path: Path
    start: int
    """Number of times that the run was started before."""
    kept: Fingerprint | None = None
    """Fingerprint of the run that is gone on with; None: this start begins a run."""
    changed: Changes | None = None
    """Changes of settings that are taken over; None: this start begins a run."""


def stop_if_finished(config: Config, runtime: Runtime) -> None:
    """End a start, on every rank, that has nothing left to do.

    Raises:
        FieldError: The run to go on with has other settings.
        Finished: An earlier start has finished the run.
    """

    def look() -> dict[str, Any] | None:
        summary = finished_summary(config)
        if summary is not None and config.run.resume is not None:  # one that goes on is looked at when it is opened
            _resumable(config, config.run.resume)
        return summary

    summary = from_root(runtime, on_root(runtime, look))
    if summary is None:
        return
    if runtime.is_root and (path := config.run.resume) is not None:
        print_header([f"the run in {path} is finished: nothing is left to do (--on-existing new: begin another)"])
        print_summary(path)
    raise Finished(summary if runtime.is_root else {})


def open_folder(config: Config, runtime: Runtime, place: Place) -> tuple[RunFolder | NullRunFolder, Opened]:
    """Return the run's folder, which is this job's own from now on, and what is known of the run.

    Raises:
        FieldError: The folder cannot be used, another process works in it, or the run in it has other settings.
    """
    found = on_root(runtime, lambda: _open(config, place))
    folder, opened = found or (NullRunFolder(), None)
    told = from_root(runtime, opened)
    assert told is not None
    return folder, told


def identify(
    config: Config, opened: Opened, folder: RunFolder | NullRunFolder, data: Dataset, model: nn.Module, runtime: Runtime
) -> Fingerprint:
    """Compare data and model, on every rank, with rank 0's and with those of the run that is gone on with.

    Returns:
        The run's fingerprint now, as checkpoints have it.

    Raises:
        FieldError: Ranks have different data, or data or model are not the run's and not to be taken over.
    """
    own, kept, settings = Fingerprint.of(config, data, model), opened.kept, opened.changed or {}
    first = from_root(runtime, own.data)
    on_every_rank(runtime, lambda: check_alike(own, first, runtime.rank))
    if kept is not None:
        content = on_every_rank(runtime, lambda: changed_content(kept, own, config, opened.path, settings))
        own = _taken_over(config, opened, kept, own, settings | content, runtime)
    folder.write_config(_plain(config))
    return own


def begin_again(folder: RunFolder | NullRunFolder, path: Path, start: int) -> None:
    """Forget the rounds of a run that has no checkpoints."""
    before = wire_after_rounds(path)
    folder.rewind(0, {"metrics_bytes": 0})
    note_repeated(path, start, before, 0)


def _taken_over(
    config: Config, opened: Opened, kept: Fingerprint, own: Fingerprint, changes: Changes, runtime: Runtime
) -> Fingerprint:
    """Say what is taken over, on rank 0, and return the fingerprint that has it on record."""
    finished = max(Checkpoints(opened.path / "checkpoints").numbers(), default=0)
    if runtime.is_root:
        print_header([*describe_changes(changes), *_not_compared(kept, config, finished)])
        if changes:
            note(opened.path, opened.start, changed={name: list(both) for name, both in changes.items()})
    return own.with_changes(changes, kept.changes, finished)


def _not_compared(kept: Fingerprint, config: Config, finished: int) -> list[str]:
    lines = [
        f"{name}={value!r} of the run is no setting of this version, and is left out"
        for name, value in unknown_settings(kept, config).items()
    ]
    if kept.data is None and finished:
        lines.append("the run's checkpoints have no fingerprint: whether its data are the same cannot be told")
    return lines


def _open(config: Config, place: Place) -> tuple[RunFolder, Opened]:
    """Open the folder on rank 0, and count the start."""
    run, kept, changed = config.run, None, None
    if run.resume is None:
        folder = RunFolder.create(run.out, name=_name(config))
    else:
        kept, changed = _resumable(config, run.resume)
        if place.is_restart and place.is_new:
            check_progress(run.resume)
        folder = RunFolder.create(run.resume, name="", exist_ok=True)
    try:
        path = folder.path.resolve()
        if kept is None:
            folder.write_config(_plain(config))
        place.keep(path)
        start = count_start(path)
        note_start(path, start, num_restarts(os.environ))
        return folder, Opened(path, start, kept, changed)
    except OSError as error:
        folder.close()
        raise FieldError("out", str(folder.path), f"a folder that can be written ({error.strerror})") from error
    except BaseException:
        folder.close()
        raise


def _resumable(config: Config, path: Path) -> tuple[Fingerprint, Changes]:
    """Refuse settings that would make another run of it; return what the run is, and the changes to take over.

    Raises:
        FieldError: ``--out`` names another folder, or a setting has changed.
    """
    stored = load_config(path / "config.yaml", type(config)()).run.out
    out = config.run.out  # the stored one may be relative to another working directory, or the run was moved
    if out is not None and out != stored and out.resolve() != path.resolve():
        raise FieldError("out", str(out), f"left out, or {path}, the folder that is resumed")
    kept = Fingerprint.kept(path, type(config))
    return kept, changed_settings(kept, config, path)


def _plain(config: Config) -> dict[str, dict[str, Any]]:
    """Return the settings as a run's folder has them."""
    return config_dict(replace(config, run=replace(config.run, resume=None, resume_changed=())))


def _name(config: Config) -> str:
    name = f"{config.data.dataset}-{config.local.model}-{config.exchange.uplink}"
    return config.run.name or re.sub(r"[ :]", "-", name)

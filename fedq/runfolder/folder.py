"""A run's folder: every file that a job leaves behind, written so that a reader never sees half of one.

What the numbers mean is the caller's business; how they are shown afterwards lives in `fedq.report`, which reads these
files and nothing else.
"""

from __future__ import annotations

import json
import math
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from fedq.errors import FieldError, one_of
from fedq.files import replace_file, replacing
from fedq.runfolder.events import Events
from fedq.runfolder.lines import RoundLines
from fedq.runfolder.lock import FolderLock
from fedq.runfolder.side import SideOutput
from fedq.runfolder.tables import (
    SCHEMA_VERSION,
    ParquetRows,
    centre_schema,
    client_schema,
    histogram,
    histogram_schema,
    personal_schema,
    phase_schema,
)

if TYPE_CHECKING:
    from fedq.ledger import Ledger
    from fedq.lowbit import PackedModel

FLUSH_EVERY_ROUNDS = 10
STAGES = ("weight", "deployed", "update", "decoded", "codes")
SUMMARY_KEYS = (
    "dataset",
    "model",
    "num_params",
    "world_size",
    "launcher",
    "exchange",
    "uplink",
    "downlink",
    "server",
    "rounds",
    "test_accuracy",
    "best_val_accuracy",
    "uplink_bytes",
    "downlink_bytes",
    "uplink_bytes_fp32",
    "downlink_bytes_fp32",
    "wire_bytes",
    "seconds",
    "seconds_per_round",
    "seed",
    "git_commit",
    "versions",
)

_TAG_GROUPS = ("train", "val", "test", "bytes")


class Tracker(Protocol):
    """What wants a run's numbers as well, such as an experiment tracker's client."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Take a round's numbers."""

    def close(self) -> None:
        """Take no more."""


def holds_run(path: Path) -> bool:
    """Whether a folder holds a run, begun or finished."""
    return any((path / name).exists() for name in ("summary.json", "config.yaml", "checkpoints"))


class RunFolder:
    """Write one run's files. Use it as a context manager, or call `close`.

    Tables, TensorBoard's events and trackers are side outputs: one that cannot be written is said once and left out.

    Args:
        path: An existing folder that can be written; `RunFolder.create` finds or makes one.
        lock: The folder's lock, which keeps other processes out until `close`.
    """

    def __init__(self, path: Path, lock: FolderLock) -> None:
        self.path = path
        self._lock = lock
        self._metrics = RoundLines(path / "metrics.jsonl")
        self._clients = ParquetRows(path / "clients.parquet", client_schema())
        self._histograms = ParquetRows(path / "histograms.parquet", histogram_schema())
        self._centres = ParquetRows(path / "centres.parquet", centre_schema(), is_optional=True)
        self._phases = ParquetRows(path / "phases.parquet", phase_schema(), is_optional=True)
        self._tables = (self._clients, self._histograms, self._centres, self._phases)
        self._tensorboard: Events | None = None
        self._events_side = SideOutput("tensorboard/")
        self._flushed_round = 0
        self._purge_step: int | None = None
        self._trackers: list[tuple[Tracker, SideOutput]] = []

    @classmethod
    def create(cls, out: Path | None, *, name: str, exist_ok: bool = False) -> RunFolder:
        """Make the folder and prove that it can be written, before any work is done.

        Args:
            out: The folder; None: `runs/<YYYYmmdd-HHMMSS>-<name>` in the working directory, `-2`, `-3`... if taken.
            name: Name of the run, made safe as a file name.
            exist_ok: Go on in a folder that already holds a run: its metrics, client rows and histograms are kept and
                added to, its other files are replaced.

        Raises:
            FieldError: The folder cannot be written, another process works in it, or it holds a run and `exist_ok`
                is false.
        """
        target, field = (Path(out) if out is not None else Path("runs")), "resume" if exist_ok else "out"
        try:
            path = _new_folder(target, name) if out is None else target
            path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=path):
                pass
            lock = FolderLock.take(path, field)
        except OSError as error:
            allowed = f"a folder that can be written ({error.strerror})"
            raise FieldError(field, str(target), allowed) from error
        try:
            if not exist_ok and holds_run(path):
                raise FieldError("out", str(path), "a folder that does not hold a run already (see --on-existing)")
            return cls(path, lock)
        except BaseException:
            lock.release()
            raise

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Write `config.yaml`: `schema_version`, then the whole nested configuration in its own order."""
        import yaml

        plain = {"schema_version": SCHEMA_VERSION, **_plain(config)}
        self._write_text("config.yaml", yaml.safe_dump(plain, sort_keys=False, allow_unicode=True))

    def follow(self, tracker: Tracker) -> None:
        """Tell a tracker what goes to TensorBoard too, from now on until `close`."""
        self._trackers.append((tracker, SideOutput(f"what goes to {type(tracker).__name__}")))

    def log_metrics(self, round: int, **values: Any) -> None:
        """Append one line to `metrics.jsonl`, on disk when this returns, and its numbers to TensorBoard.

        `val_accuracy` becomes the tag `val/accuracy`, `uplink_bytes` becomes `bytes/uplink`. What is not finite is null
        in the file and left out of TensorBoard.

        Raises:
            OSError: The line cannot be written, or the folder is gone.
            FieldError: Another process has taken the folder over.
        """
        self._lock.check()
        plain = _plain(values)
        self._metrics.append({"round": round, **plain})
        numbers = {_tag(key): value for key, value in plain.items() if isinstance(value, (int, float))}
        if not self._events_side.has_failed:
            with self._events_side.trying():
                self._events().add(round, numbers)
        for tracker, side in self._trackers:
            with side.trying():
                tracker.log(numbers, round)
        if round - self._flushed_round >= FLUSH_EVERY_ROUNDS:
            self._flushed_round = round
            self._flush()

    def log_clients(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Add rows to `clients.parquet`, which is rewritten every `FLUSH_EVERY_ROUNDS` rounds and on `close`.

        Args:
            rows: One dict a client and round: `round`, `client`, `rank`, `num_examples`, `train_loss`,
                `train_accuracy`, `val_accuracy` (these three may be None or left out), `status` ("ok", or why the
                client was left out) and `label_counts` (examples a class).

        Raises:
            FieldError: A row has a column that does not exist, or lacks one.
        """
        self._clients.extend(rows)

    def log_histogram(self, round: int, client: int, tensor: str, stage: str, values: Tensor) -> None:
        """Add one row to `histograms.parquet`: 64 equal bins from min to max, or one bin a value for codes.

        Args:
            round: Number of the round.
            client: Number of the client; -1 for the server.
            tensor: Name of the tensor.
            stage: "weight", "update", "decoded" or "codes"; codes also get their Shannon entropy in bits a code.
            values: Any shape and dtype, on any device; values that are not finite are left out of `num` and the rest.
        """
        if stage not in STAGES:
            raise FieldError("stage", stage, one_of(STAGES, stage))
        row = {"round": round, "client": client, "tensor": tensor, "stage": stage}
        self._histograms.extend([row | histogram(values, codes=stage == "codes")])

    def log_centres(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Add rows to `centres.parquet`, which is there only where centres are learned.

        Args:
            rows: One dict a centre: `round`, `client`, `layer`, `index` (from the lowest centre), `value` and `members`
                (weights that it stands for).
        """
        self._centres.extend(rows)

    def log_phases(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Add rows to `phases.parquet`.

        Args:
            rows: One dict a rank and phase of a round: `round`, `rank`, `phase`, `seconds` (in it, or waiting for it),
                `hidden_seconds` (beside computation) and `calls`.
        """
        self._phases.extend(rows)

    def write_personal(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write `personal.parquet`: how each client's own model did.

        Args:
            rows: One dict a client: `client`, `bits` (32: float), `model`, `num_examples`, `classes`, `best_round` (the
                round whose model was best on validation data), and of it `val_accuracy` and `test_accuracy`;
                `last_test_accuracy` is that of the last model. Accuracies are on the client's own classes, and may be
                None.
        """
        path = self.path / "personal.parquet"
        if path.is_file():
            path.unlink()
        table = ParquetRows(path, personal_schema())
        table.extend(rows)
        table.flush()

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write `summary.json`, `schema_version` first, after all rows: a run with a summary is whole.

        Raises:
            KeyError: One of `SUMMARY_KEYS` is missing; the error names all that are.
        """
        missing = [key for key in SUMMARY_KEYS if key not in summary]
        if missing:
            raise KeyError(f"summary lacks {', '.join(missing)}")
        plain = {"schema_version": SCHEMA_VERSION, **_plain(summary)}
        self._flush()
        self._write_text("summary.json", json.dumps(plain, indent=2, allow_nan=False, ensure_ascii=False) + "\n")

    def save_model(self, tensors: Mapping[str, Tensor]) -> None:
        """Write `model.safetensors`; the same tensors give the same bytes, whatever their order and device."""
        write_model(self.path / "model.safetensors", tensors)

    def save_packed(self, model: PackedModel) -> int:
        """Write `model.fedq`; return its bytes."""
        from fedq.lowbit import save_packed

        return save_packed(model, self.path / "model.fedq")

    def write_ledger(self, ledger: Ledger) -> None:
        """Write `ledger.parquet`."""
        ledger.write(self.path / "ledger.parquet")

    def position(self) -> dict[str, int]:
        """Write what is still in memory and return where the growing files end, for `rewind`."""
        self._flush()
        return {"metrics_bytes": self._metrics.sync()}

    def rewind(self, round: int, position: Mapping[str, int]) -> None:
        """Forget what was written after `position`: rows of `round` and later ones."""
        self._metrics.keep_before(round, position["metrics_bytes"])
        for table in self._tables:
            table.keep_before(round)
        self._flushed_round = round
        self._purge_step = round

    def close(self) -> None:
        """Write what is still in memory, and let other processes in; calling it twice is harmless."""
        try:
            self._flush()
            self._metrics.close()
            if self._tensorboard is not None:
                with self._events_side.trying():
                    self._tensorboard.close()
                self._tensorboard = None
            while self._trackers:
                tracker, side = self._trackers.pop()
                with side.trying():
                    tracker.close()
        finally:
            self.unlock()

    def unlock(self) -> None:
        """Let other processes in, where this one is about to end; calling it twice is harmless."""
        self._lock.release()

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _flush(self) -> None:
        for table in self._tables:
            table.flush()

    def _events(self) -> Events:
        if self._tensorboard is None:
            self._tensorboard = Events(self.path / "tensorboard", self._purge_step)
        return self._tensorboard

    def _write_text(self, file: str, text: str) -> None:
        with replacing(self.path / file) as temporary:
            temporary.write_text(text, encoding="utf-8")


def write_model(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors as safetensors; the same tensors give the same bytes, whatever their order and device."""
    from safetensors.torch import save

    # A copy each: tensors that are views of one buffer, or tied, would be refused as shared memory.
    copies = {
        name: tensors[name].detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name in sorted(tensors)
    }
    replace_file(path, save(copies))  # whose errors say what the system says, unlike those of save_file


class NullRunFolder:
    """Do nothing, with a `RunFolder`'s methods: for the ranks that write no files, so that callers never branch."""

    path: Path | None = None

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Do nothing."""

    def follow(self, tracker: Tracker) -> None:
        """Do nothing."""

    def log_metrics(self, round: int, **values: Any) -> None:
        """Do nothing."""

    def log_clients(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Do nothing."""

    def log_histogram(self, round: int, client: int, tensor: str, stage: str, values: Tensor) -> None:
        """Do nothing."""

    def log_centres(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Do nothing."""

    def log_phases(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Do nothing."""

    def write_personal(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Do nothing."""

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Do nothing."""

    def save_model(self, tensors: Mapping[str, Tensor]) -> None:
        """Do nothing."""

    def save_packed(self, model: PackedModel) -> int:
        """Do nothing."""
        return 0

    def write_ledger(self, ledger: Ledger) -> None:
        """Do nothing."""

    def position(self) -> dict[str, int]:
        """Do nothing."""
        return {"metrics_bytes": 0}

    def rewind(self, round: int, position: Mapping[str, int]) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""

    def unlock(self) -> None:
        """Do nothing."""

    def __enter__(self) -> NullRunFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass


def _new_folder(parent: Path, name: str) -> Path:
    safe = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip(".-")[:100] or "run"
    stem = f"{datetime.now():%Y%m%d-%H%M%S}-{safe}"
    parent.mkdir(parents=True, exist_ok=True)
    number = 1
    while True:
        path = parent / (stem if number == 1 else f"{stem}-{number}")
        try:
            path.mkdir()
        except FileExistsError:
            number += 1
        else:
            return path


def _plain(value: Any) -> Any:
    """Return a value in the types that JSON and YAML share; numbers that are not finite become None."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, (Tensor, np.ndarray, np.generic)):
        return _plain(value.tolist())
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _tag(key: str) -> str:
    group, _, rest = key.partition("_")
    if rest and group in _TAG_GROUPS:
        return f"{group}/{rest}"
    return f"bytes/{key.removesuffix('_bytes')}" if key.endswith("_bytes") else f"run/{key}"

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
from fedq.files import replacing
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
    from torch.utils.tensorboard import SummaryWriter

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


class RunFolder:
    """Write one run's files. Use it as a context manager, or call `close`.

    Args:
        path: An existing folder that can be written; `RunFolder.create` finds or makes one.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._metrics = (path / "metrics.jsonl").open("a", encoding="utf-8")
        self._clients = ParquetRows(path / "clients.parquet", client_schema())
        self._histograms = ParquetRows(path / "histograms.parquet", histogram_schema())
        self._centres = ParquetRows(path / "centres.parquet", centre_schema(), is_optional=True)
        self._phases = ParquetRows(path / "phases.parquet", phase_schema(), is_optional=True)
        self._tables = (self._clients, self._histograms, self._centres, self._phases)
        self._tensorboard: SummaryWriter | None = None
        self._flushed_round = 0
        self._purge_step: int | None = None
        self._trackers: list[Tracker] = []

    @classmethod
    def create(cls, out: Path | None, *, name: str, exist_ok: bool = False) -> RunFolder:
        """Make the folder and prove that it can be written, before any work is done.

        Args:
            out: The folder; None: `runs/<YYYYmmdd-HHMMSS>-<name>` in the working directory, `-2`, `-3`... if taken.
            name: Name of the run, made safe as a file name.
            exist_ok: Go on in a folder that already holds a run: its metrics, client rows and histograms are kept and
                added to, its other files are replaced.

        Raises:
            FieldError: If the folder cannot be written, or holds a run and `exist_ok` is false.
        """
        target = Path(out) if out is not None else Path("runs")
        try:
            path = _new_folder(target, name) if out is None else target
            path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=path):
                pass
        except OSError as error:
            allowed = f"a folder that can be written ({error.strerror})"
            raise FieldError("out", str(target), allowed) from error
        if not exist_ok and any((path / file).exists() for file in ("summary.json", "config.yaml")):
            raise FieldError("out", str(path), "a folder that does not hold a run already (see --on-existing)")
        return cls(path)

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Write `config.yaml`: `schema_version`, then the whole nested configuration in its own order."""
        import yaml

        plain = {"schema_version": SCHEMA_VERSION, **_plain(config)}
        self._write_text("config.yaml", yaml.safe_dump(plain, sort_keys=False, allow_unicode=True))

    def follow(self, tracker: Tracker) -> None:
        """Tell a tracker what goes to TensorBoard too, from now on until `close`."""
        self._trackers.append(tracker)

    def log_metrics(self, round: int, **values: Any) -> None:
        """Append one line to `metrics.jsonl`, on disk when this returns, and its numbers to TensorBoard.

        `val_accuracy` becomes the tag `val/accuracy`, `uplink_bytes` becomes `bytes/uplink`. What is not finite is null
        in the file and left out of TensorBoard.
        """
        plain = _plain(values)
        self._metrics.write(json.dumps({"round": round, **plain}, allow_nan=False) + "\n")
        self._metrics.flush()
        numbers = {_tag(key): value for key, value in plain.items() if isinstance(value, (int, float))}
        for tag, value in numbers.items():
            self._events().add_scalar(tag, value, round)
        for tracker in self._trackers:
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
            FieldError: For a column that does not exist, or a missing one.
        """
        self._clients.extend(rows)

    def log_histogram(self, round: int, client: int, tensor: str, stage: str, values: Tensor) -> None:
        """Add one row to `histograms.parquet`: 64 equal bins from min to max, or one bin a value for codes.

        Args:
            round: Round.
            client: Client, or -1 for the server.
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
        path.unlink(missing_ok=True)
        table = ParquetRows(path, personal_schema())
        table.extend(rows)
        table.flush()

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write `summary.json`, `schema_version` first, after all rows: a run with a summary is whole.

        Raises:
            KeyError: If one of `SUMMARY_KEYS` is missing; names all that are.
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
        os.fsync(self._metrics.fileno())
        return {"metrics_bytes": self._metrics.tell()}

    def rewind(self, round: int, position: Mapping[str, int]) -> None:
        """Forget what was written after `position`: rows of `round` and later ones."""
        self._metrics.truncate(position["metrics_bytes"])
        self._metrics.seek(0, os.SEEK_END)
        for table in self._tables:
            table.keep_before(round)
        self._flushed_round = round
        self._purge_step = round

    def close(self) -> None:
        """Write what is still in memory; calling it twice is harmless."""
        self._flush()
        self._metrics.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
            self._tensorboard = None
        while self._trackers:
            self._trackers.pop().close()

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _flush(self) -> None:
        for table in self._tables:
            table.flush()

    def _events(self) -> SummaryWriter:
        if self._tensorboard is None:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(str(self.path / "tensorboard"), purge_step=self._purge_step)
        return self._tensorboard

    def _write_text(self, file: str, text: str) -> None:
        with replacing(self.path / file) as temporary:
            temporary.write_text(text, encoding="utf-8")


def write_model(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors as safetensors; the same tensors give the same bytes, whatever their order and device."""
    from safetensors.torch import save_file

    # A copy each: tensors that are views of one buffer, or tied, would be refused as shared memory.
    copies = {
        name: tensors[name].detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name in sorted(tensors)
    }
    with replacing(path) as temporary:
        save_file(copies, temporary)


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

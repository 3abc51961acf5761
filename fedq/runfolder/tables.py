"""The Parquet tables of a run that grow round by round: their columns, their rows, and how they are rewritten.

Which rows there are is decided in `folder`; the ledger brings its own table.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fedq.errors import FieldError, one_of
from fedq.files import replacing, set_aside
from fedq.runfolder.side import SideOutput
from fedq.text import clean

if TYPE_CHECKING:
    import pyarrow as pa

_log = logging.getLogger(__name__)
SCHEMA_VERSION = 1

_NO_VALUE = (ArithmeticError, TypeError, ValueError)  # of pyarrow: OverflowError, ArrowTypeError, ArrowInvalid, ...
_NUM_BINS = 64
_MAX_CODES = 1 << 16


class ParquetRows:
    """Rows of one Parquet file, kept as columns. A file that exists already is read and added to, or set aside if it is
    damaged; one that cannot be written is said once, and tried again with the next rows.

    A row with a value that its column cannot hold is left out, which is said once a file: it costs nobody the job.

    Args:
        path: Path of the file.
        schema: Columns of the file, with their types.
        is_optional: Whether there is no file where there are no rows.
    """

    def __init__(self, path: Path, schema: pa.Schema, *, is_optional: bool = False) -> None:
        self._path = path
        self._schema = schema
        self._tables: list[pa.Table] = []
        self._rows: list[dict[str, Any]] = []  # since the file was written
        self._is_missing = not path.exists() and not is_optional
        self._has_said = False
        self._side = SideOutput(path.name)
        if path.exists():
            self._tables = _read(path, schema)
        self._stale = not self._tables and not is_optional

    def extend(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Add rows; refuse an unknown column, or None where the column is not nullable, with a `FieldError`."""
        required = [field.name for field in self._schema if not field.nullable]
        for row in rows:
            for key in row:
                if key not in self._schema.names:
                    raise FieldError("column", key, one_of(self._schema.names, key))
            for key in required:
                if row.get(key) is None:
                    raise FieldError(key, None, f"a value in every row of {self._path.name}")
        self._rows += [dict(row) for row in rows]
        self._stale = True

    def keep_before(self, round: int) -> None:
        """Drop the rows of a round and of later ones."""
        import pyarrow.compute as pc

        if not self._tables and not self._stale:
            return
        if round and self._is_missing:
            _log.warning("%s is missing: what it said of rounds before round %d is lost", self._path, round)
        table = self._table()
        self._tables = [table.filter(pc.less(table["round"], round))]
        self._stale = True

    def flush(self) -> None:
        """Rewrite the file, whole and atomically, if there is anything new."""
        if not self._stale:
            return
        table = self._table().combine_chunks()
        self._tables = [table]
        with self._side.trying(OSError):
            self._write(table)
            self._stale = False

    def _write(self, table: pa.Table) -> None:
        import pyarrow.parquet as pq

        with replacing(self._path) as temporary:
            pq.write_table(table, temporary, compression="zstd")

    def _table(self) -> pa.Table:
        """Return all rows."""
        import pyarrow as pa

        rows, self._rows = self._rows, []
        try:
            self._tables.append(self._stored(rows))
        except _NO_VALUE:
            self._tables += self._one_by_one(rows)
        return pa.concat_tables(self._tables)

    def _stored(self, rows: list[dict[str, Any]]) -> pa.Table:
        import pyarrow as pa

        return pa.Table.from_pylist(rows, schema=self._schema)

    def _one_by_one(self, rows: Sequence[dict[str, Any]]) -> list[pa.Table]:
        """Return the rows that can be stored, and say the first that cannot."""
        tables = [self._stored([])]
        for row in rows:
            try:
                tables.append(self._stored([row]))
            except _NO_VALUE as error:
                if not self._has_said:
                    _log.warning("%s: a row is left out, as are others like it: %s", self._path.name, clean(str(error)))
                self._has_said = True
        return tables


def _read(path: Path, schema: pa.Schema) -> list[pa.Table]:
    """Return a file's rows; nothing if they cannot be used, and then it is set aside."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with path.open("rb") as file:  # a folder would be read as a data set
            if "round" not in pq.read_schema(file).names:
                raise KeyError("it has no rounds")
            file.seek(0)
            return [pq.read_table(file, schema=schema)]
    except (OSError, ArithmeticError, LookupError, TypeError, ValueError, pa.ArrowException) as error:
        set_aside(path, clean(str(error)))
        return []


def client_schema() -> pa.Schema:
    """Return the columns of `clients.parquet`."""
    import pyarrow as pa

    counts = {name: pa.int32() for name in ("round", "client", "rank")} | {"num_examples": pa.int64()}
    scores = {name: pa.float64() for name in ("train_loss", "train_accuracy", "val_accuracy")}
    fields = [pa.field(name, kind, nullable=False) for name, kind in counts.items()]
    fields += [pa.field(name, kind) for name, kind in scores.items()]
    fields.append(pa.field("status", pa.string(), nullable=False))
    fields.append(pa.field("label_counts", pa.list_(pa.int64()), nullable=False))
    return pa.schema(fields, metadata={"schema_version": str(SCHEMA_VERSION)})


def personal_schema() -> pa.Schema:
    """Return the columns of `personal.parquet`: one row a client, written at the end."""
    import pyarrow as pa

    kinds = {"client": pa.int32(), "bits": pa.int32(), "model": pa.string(), "num_examples": pa.int64()}
    kinds |= {"classes": pa.list_(pa.int32()), "best_round": pa.int32()}
    fields = [pa.field(name, kind, nullable=False) for name, kind in kinds.items()]
    fields += [pa.field(name, pa.float64()) for name in ("val_accuracy", "test_accuracy", "last_test_accuracy")]
    return pa.schema(fields, metadata={"schema_version": str(SCHEMA_VERSION)})


def centre_schema() -> pa.Schema:
    """Return the columns of `centres.parquet`: one row a centre, client, layer and evaluated round."""
    import pyarrow as pa

    kinds = {"round": pa.int32(), "client": pa.int32(), "layer": pa.string(), "index": pa.int32()}
    kinds |= {"value": pa.float64(), "members": pa.int64()}
    fields = [pa.field(name, kind, nullable=False) for name, kind in kinds.items()]
    return pa.schema(fields, metadata={"schema_version": str(SCHEMA_VERSION)})


def phase_schema() -> pa.Schema:
    """Return the columns of `phases.parquet`: one row a round, rank and phase; seconds are those waited for."""
    import pyarrow as pa

    kinds = {"round": pa.int32(), "rank": pa.int32(), "phase": pa.string()}
    kinds |= {"seconds": pa.float64(), "hidden_seconds": pa.float64(), "calls": pa.int64()}
    fields = [pa.field(name, kind, nullable=False) for name, kind in kinds.items()]
    return pa.schema(fields, metadata={"schema_version": str(SCHEMA_VERSION)})


def histogram_schema() -> pa.Schema:
    """Return the columns of `histograms.parquet`."""
    import pyarrow as pa

    kinds = {"round": pa.int32(), "client": pa.int32(), "tensor": pa.string(), "stage": pa.string()}
    kinds |= {"edges": pa.list_(pa.float64()), "counts": pa.list_(pa.int64()), "num": pa.int64()}
    fields = [pa.field(name, kind, nullable=False) for name, kind in kinds.items()]
    fields += [pa.field(name, pa.float64()) for name in ("mean", "std", "min", "max", "entropy_bits")]
    return pa.schema(fields, metadata={"schema_version": str(SCHEMA_VERSION)})


def histogram(values: Tensor, *, codes: bool) -> dict[str, Any]:
    """Return the columns from `edges` to `entropy_bits`; without a finite value the lists are empty, the rest None."""
    flat = values.detach().flatten().cpu()
    flat = flat[torch.isfinite(flat)]
    if not len(flat):
        return {"edges": [], "counts": [], "num": 0}
    x = flat.double().numpy()
    low, high = float(x.min()), float(x.max())
    row: dict[str, Any] = {"num": len(x), "mean": float(x.mean()), "std": float(x.std()), "min": low, "max": high}
    if not codes:
        # A constant, or nearly one, still needs bins of some width: 64 of them must differ in float64.
        narrow = high - low <= max(1e-300, 1e-12 * max(abs(low), abs(high)))
        spread = max(0.5, abs(low) * 1e-6) if narrow else 0.0
        counts, edges = np.histogram(x, bins=_NUM_BINS, range=(low - spread, high + spread))
        return row | {"edges": edges.tolist(), "counts": counts.tolist()}
    if high - low >= _MAX_CODES:
        raise FieldError("codes", high - low, f"codes that span fewer than {_MAX_CODES} values")
    counts = np.bincount((x - low).astype(np.int64))
    shares = counts[counts > 0] / len(x)
    entropy = float(-(shares * np.log2(shares)).sum()) + 0.0  # + 0.0: one single value gives 0, not -0
    edges = np.arange(len(counts) + 1) + low - 0.5
    return row | {"edges": edges.tolist(), "counts": counts.tolist(), "entropy_bits": entropy}

"""Counted bytes: which message of which round and client held how many bytes of what, and what crossed ranks.

The ledger counts what it is told; it never estimates. Who moves the bytes lives in the rounds and the collectives, what
a message is made of in the layout and the wire format.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedq.errors import FieldError, one_of
from fedq.files import replacing

if TYPE_CHECKING:
    import pyarrow as pa

SCHEMA_VERSION = 1
DIRECTIONS = ("uplink", "downlink", "peer")
PARTS = ("codes", "scales", "indices", "exempt", "stats", "framing")
NO_CLIENT = -1

_OVERHEAD_PARTS = ("scales", "indices", "framing")  # they describe values that another row's raw already counts
_BATCH_ROWS = 1 << 20  # rows expanded at once: bounds the memory of a write, whatever the run's length
_FIELDS = 6  # numbers a record: round, client, direction, template, payload_times, wire_times


@dataclass(frozen=True)
class Totals:
    """Sums of bytes: raw (float32), payload (the protocol's messages) and wire (what crossed ranks)."""

    raw: int = 0
    payload: int = 0
    wire: int = 0

    def __add__(self, other: Totals) -> Totals:
        return Totals(self.raw + other.raw, self.payload + other.payload, self.wire + other.wire)


@dataclass(frozen=True, eq=False)
class MessageParts:
    """Describe what one message is made of, one row a tensor and part.

    Args:
        tensors: Name of the tensor each row belongs to.
        parts: Content of each row, one of `PARTS`.
        raw: int64 [rows], bytes that the row's values cost in float32; 0 for scales, indices and framing.
        payload: int64 [rows], bytes in the message.

    Raises:
        FieldError: A part is unknown, columns differ in length, bytes are negative, or raw bytes are on a row whose
            values are counted elsewhere.
    """

    tensors: tuple[str, ...]
    parts: tuple[str, ...]
    raw: np.ndarray
    payload: np.ndarray

    def __post_init__(self) -> None:
        for name in ("raw", "payload"):
            column = np.array(getattr(self, name), dtype=np.int64)  # a copy: a recorded message never changes
            if column.shape != (len(self.tensors),):
                raise FieldError(name, column.shape, f"one number a tensor, shape ({len(self.tensors)},)")
            if (column < 0).any():
                raise FieldError(name, int(column.min()), "bytes, 0 or more")
            column.flags.writeable = False
            object.__setattr__(self, name, column)
        if len(self.parts) != len(self.tensors):
            raise FieldError("parts", len(self.parts), f"one part a tensor, {len(self.tensors)}")
        for part, raw in zip(self.parts, self.raw, strict=True):
            if part not in PARTS:
                raise FieldError("part", part, one_of(PARTS, part))
            if raw and part in _OVERHEAD_PARTS:
                raise FieldError("raw", int(raw), f"0 for {part}")

    @property
    def nbytes(self) -> int:
        """Bytes of the message."""
        return int(self.payload.sum())

    @property
    def raw_nbytes(self) -> int:
        """Bytes of the same values in float32."""
        return int(self.raw.sum())


class Ledger:
    """Keep every message's bytes, in a few numbers a message; rows are expanded only when they are read.

    Messages with the same make-up share one template, so 100 rounds of 100 clients cost kilobytes until written.
    """

    def __init__(self) -> None:
        # Keys in order of arrival are the ids. A layout is (tensors, parts, raw bytes); a template is (layout id,
        # payload bytes), because sparse codecs change the payload from message to message and nothing else.
        self._layouts: dict[tuple[tuple[str, ...], tuple[str, ...], bytes], int] = {}
        self._templates: dict[tuple[int, bytes], int] = {}
        self._records = array("q")
        self._totals: dict[str, Totals] = {}
        self._rounds: dict[int, dict[str, Totals]] = {}
        self._loaded = Totals()

    def record(
        self,
        *,
        round: int,
        client: int,
        direction: str,
        parts: MessageParts,
        payload_times: int = 1,
        wire_times: int = 0,
    ) -> None:
        """Book one message.

        Args:
            round: Round the message belongs to.
            client: Client that sends or receives it; -1 (`NO_CLIENT`) if it is no single client's.
            direction: One of `DIRECTIONS`.
            parts: The message's make-up.
            payload_times: Copies that the protocol counts; raw bytes are booked as often.
            wire_times: Copies that crossed ranks.

        Raises:
            FieldError: The direction is unknown, or times are negative.
        """
        if direction not in DIRECTIONS:
            raise FieldError("direction", direction, one_of(DIRECTIONS, direction))
        for name, times in (("payload_times", payload_times), ("wire_times", wire_times)):
            if times < 0:
                raise FieldError(name, times, "0 or more")
        layout = self._layouts.setdefault((parts.tensors, parts.parts, parts.raw.tobytes()), len(self._layouts))
        template = self._templates.setdefault((layout, parts.payload.tobytes()), len(self._templates))
        self._records.extend((round, client, DIRECTIONS.index(direction), template, payload_times, wire_times))
        booked = Totals(parts.raw_nbytes * payload_times, parts.nbytes * payload_times, parts.nbytes * wire_times)
        self._totals[direction] = self._totals.get(direction, Totals()) + booked
        of_round = self._rounds.setdefault(round, {})
        of_round[direction] = of_round.get(direction, Totals()) + booked

    def totals(self, direction: str | None = None) -> Totals:
        """Return the sums so far, of one direction or of all."""
        if direction is None:
            return sum(self._totals.values(), Totals())
        if direction not in DIRECTIONS:
            raise FieldError("direction", direction, one_of(DIRECTIONS, direction))
        return self._totals.get(direction, Totals())

    def since_start(self) -> Totals:
        """Return the sums of what was booked here, without what `load_state_dict` brought."""
        total = self.totals()
        return Totals(*(getattr(total, f.name) - getattr(self._loaded, f.name) for f in fields(Totals)))

    def by_round(self) -> list[dict[str, int]]:
        """Return one dict a round, in order: `round`, and `<direction>_<raw|payload|wire>` for every direction."""
        rows = []
        for number, of_round in sorted(self._rounds.items()):
            row = {"round": number}
            for direction in DIRECTIONS:
                row |= {f"{direction}_{kind}": n for kind, n in vars(of_round.get(direction, Totals())).items()}
            rows.append(row)
        return rows

    def table(self) -> pa.Table:
        """Return every row, in the order of recording: `round, client, direction, tensor, part, raw, payload, wire`."""
        import pyarrow as pa

        return pa.Table.from_batches(list(self._batches()), schema=_schema())

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write the table as Parquet; a reader sees the old file or the new one, never half of it."""
        import pyarrow.parquet as pq

        with (
            replacing(Path(path)) as temporary,
            pq.ParquetWriter(temporary, _schema(), compression="zstd") as writer,
        ):
            for batch in self._batches():
                writer.write_batch(batch)

    def state_dict(self) -> dict[str, Any]:
        """Return everything booked, as plain lists, strings and int64 arrays."""
        return {
            "layouts": [(list(t), list(p), np.frombuffer(raw, np.int64)) for t, p, raw in self._layouts],
            "templates": [(layout, np.frombuffer(payload, np.int64)) for layout, payload in self._templates],
            "records": self._record_array(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Replace everything booked with what `state_dict` returned."""
        messages = []
        for layout, payload in state["templates"]:
            tensors, parts, raw = state["layouts"][layout]
            messages.append(MessageParts(tuple(tensors), tuple(parts), raw, payload))
        fresh = Ledger()
        for number, client, direction, template, payload_times, wire_times in np.asarray(state["records"]).tolist():
            fresh.record(
                round=number,
                client=client,
                direction=DIRECTIONS[direction],
                parts=messages[template],
                payload_times=payload_times,
                wire_times=wire_times,
            )
        vars(self).update(vars(fresh))
        self._loaded = self.totals()

    def _record_array(self) -> np.ndarray:
        return np.array(self._records, dtype=np.int64).reshape(-1, _FIELDS)

    def _batches(self) -> Iterator[pa.RecordBatch]:
        if not self._records:
            return
        records = self._record_array()
        layouts = [(tensors, parts, np.frombuffer(raw, np.int64)) for tensors, parts, raw in self._layouts]
        names = list(dict.fromkeys(name for tensors, _, _ in layouts for name in tensors))
        ids = _ids([tensors for tensors, _, _ in layouts], names)
        part_ids = _ids([parts for _, parts, _ in layouts], PARTS)
        order = [layout for layout, _ in self._templates]
        templates = {
            "tensor": np.concatenate([ids[layout] for layout in order]),
            "part": np.concatenate([part_ids[layout] for layout in order]),
            "raw": np.concatenate([layouts[layout][2] for layout in order]),
            "payload": np.concatenate([np.frombuffer(payload, np.int64) for _, payload in self._templates]),
        }
        sizes = np.array([len(ids[layout]) for layout in order])
        starts = np.cumsum(sizes) - sizes
        last_rows = np.cumsum(sizes[records[:, 3]])
        cuts = np.flatnonzero(np.diff(last_rows // _BATCH_ROWS)) + 1
        for chunk in np.split(records, cuts):
            yield _expand(chunk, templates, starts, sizes, names)


def _ids(columns: Sequence[Sequence[str]], names: Sequence[str]) -> list[np.ndarray]:
    position = {name: index for index, name in enumerate(names)}
    return [np.array([position[name] for name in column], dtype=np.int32) for column in columns]


def _expand(
    records: np.ndarray, templates: dict[str, np.ndarray], starts: np.ndarray, sizes: np.ndarray, names: list[str]
) -> pa.RecordBatch:
    """Return the rows of some records: each record's template, times its copies."""
    import pyarrow as pa

    number, client, direction, template, payload_times, wire_times = records.T
    rows = sizes[template]
    ends = np.cumsum(rows)
    at = np.arange(ends[-1]) + np.repeat(starts[template] - (ends - rows), rows)
    payload, copies = templates["payload"][at], np.repeat(payload_times, rows)
    words = pa.DictionaryArray.from_arrays
    columns = [
        np.repeat(number, rows).astype(np.int32),
        np.repeat(client, rows).astype(np.int32),
        words(np.repeat(direction, rows).astype(np.int32), list(DIRECTIONS)),
        words(templates["tensor"][at], pa.array(names, pa.string())),
        words(templates["part"][at], list(PARTS)),
        templates["raw"][at] * copies,
        payload * copies,
        payload * np.repeat(wire_times, rows),
    ]
    return pa.RecordBatch.from_arrays([pa.array(column) for column in columns], schema=_schema())


def _schema() -> pa.Schema:
    import pyarrow as pa

    word = pa.dictionary(pa.int32(), pa.string())
    fields = {"round": pa.int32(), "client": pa.int32(), "direction": word, "tensor": word, "part": word}
    fields |= {"raw": pa.int64(), "payload": pa.int64(), "wire": pa.int64()}
    return pa.schema(list(fields.items()), metadata={"schema_version": str(SCHEMA_VERSION)})

"""Sums of one run's ledger, by direction and round, client, layer and part; codes beside their entropy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa

Rows = list[dict[str, Any]]

LEDGER_COLUMNS = ("round", "client", "direction", "tensor", "part", "raw", "payload", "wire")
_KINDS = ("raw", "payload", "wire")


@dataclass(frozen=True)
class ByteSums:
    """Sums of raw, payload and wire bytes, one row a group.

    Args:
        parts: One row for each `direction` and `part`.
        rounds: One row for each `direction` and `round`.
        clients: One row for each `direction` and `client`.
        layers: One row for each `direction`, `tensor` and `part`.
        messages: Number of messages of clients by `direction`: one for each client and round.
        codes: One row a tensor whose codes were logged: `num` codes in all messages logged, the `payload` bytes that
            they took, and `entropy_bits` in all.
    """

    parts: Rows
    rounds: Rows
    clients: Rows
    layers: Rows
    messages: dict[str, int]
    codes: Rows

    @property
    def is_empty(self) -> bool:
        """Whether the ledger has no row."""
        return not self.parts

    def total(self, direction: str, kind: str = "payload") -> int:
        """Return all bytes of a direction."""
        return sum(row[kind] for row in self.parts if row["direction"] == direction)


def sum_ledger(table: pa.Table, logged_codes: Rows) -> ByteSums:
    """Sum a ledger.

    Args:
        table: Table of `ledger.parquet`.
        logged_codes: Rows of `histograms.parquet` with stage "codes".
    """
    table = table.unify_dictionaries().combine_chunks()
    # Every other sum is of this one, which is small: a run's messages share their make-up.
    by_message = _sums(table, "direction", "round", "client")
    return ByteSums(
        _rows(_sums(table, "direction", "part")),
        _rows(_sums(by_message, "direction", "round")),
        _rows(_sums(by_message, "direction", "client")),
        _rows(_sums(table, "direction", "tensor", "part")),
        _messages(by_message),
        _codes(table, logged_codes),
    )


def _sums(table: pa.Table, *keys: str) -> pa.Table:
    import pyarrow as pa

    sums = table.group_by(list(keys), use_threads=False).aggregate([(kind, "sum") for kind in _KINDS])
    named = sums.select([*keys, *(f"{kind}_sum" for kind in _KINDS)]).rename_columns([*keys, *_KINDS])
    words = [i for i, field in enumerate(named.schema) if pa.types.is_dictionary(field.type)]
    for i in words:
        named = named.set_column(i, named.schema.names[i], named.column(i).cast(pa.string()))
    return named


def _rows(sums: pa.Table) -> Rows:
    """Return rows in the order of the ledger's directions, then of what was first booked or, of numbers, ascending."""
    rows = sums.to_pylist()
    order = {"uplink": 0, "downlink": 1, "peer": 2}
    number = next((key for key in ("round", "client") if key in sums.schema.names), None)
    return sorted(rows, key=lambda row: (order.get(row["direction"], 3), row[number] if number else 0))


def _messages(by_message: pa.Table) -> dict[str, int]:
    counts: dict[str, int] = {}
    for row in by_message.to_pylist():
        if row["client"] >= 0 and row["payload"]:
            counts[row["direction"]] = counts.get(row["direction"], 0) + 1
    return counts


def _codes(table: pa.Table, logged: Rows) -> Rows:
    """Match logged codes with the uplink messages that carried them."""
    import pyarrow as pa
    import pyarrow.compute as pc

    logged = [row for row in logged if row["entropy_bits"] is not None and row["num"]]
    if not logged:
        return []
    rounds = pa.array(sorted({row["round"] for row in logged}), pa.int32())
    is_uplink_code = pc.and_(pc.equal(table["direction"], "uplink"), pc.equal(table["part"], "codes"))
    sent = table.filter(pc.and_(is_uplink_code, pc.is_in(table["round"], rounds))).to_pylist()
    payloads = {(row["round"], row["client"], row["tensor"]): row["payload"] for row in sent}
    by_tensor: dict[str, dict[str, Any]] = {}
    for row in logged:
        payload = payloads.get((row["round"], row["client"], row["tensor"]))
        if payload is None:
            continue
        zero = {"tensor": row["tensor"], "num": 0, "payload": 0, "entropy_bits": 0.0}
        sums = by_tensor.setdefault(row["tensor"], zero)
        sums["num"] += row["num"]
        sums["payload"] += payload
        sums["entropy_bits"] += row["entropy_bits"] * row["num"]
    return list(by_tensor.values())

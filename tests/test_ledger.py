from __future__ import annotations

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from properties import tried

from fedq import ledger as ledger_module
from fedq.errors import FieldError
from fedq.ledger import DIRECTIONS, NO_CLIENT, PARTS, Ledger, MessageParts, Totals

COLUMNS = ["round", "client", "direction", "tensor", "part", "raw", "payload", "wire"]

part_rows = st.tuples(
    st.sampled_from(["conv.weight", "fc.weight", "fc.bias", ""]),
    st.sampled_from(PARTS),
    st.integers(0, 2**40),
    st.integers(0, 2**40),
)
messages = st.lists(part_rows, max_size=4)
records = st.tuples(
    st.integers(-1, 5), st.integers(-1, 3), st.sampled_from(DIRECTIONS), messages, st.integers(0, 3), st.integers(0, 3)
)


def message(rows: list[tuple[str, str, int, int]]) -> MessageParts:
    tensors, parts, raw, payload = zip(*rows, strict=True) if rows else ((), (), (), ())
    counted = [0 if part in ("scales", "indices", "framing") else n for part, n in zip(parts, raw, strict=True)]
    return MessageParts(tensors, parts, np.array(counted, np.int64), np.array(payload, np.int64))


def booked(drawn: list[tuple]) -> tuple[Ledger, list[dict]]:
    """Return a ledger and, as the oracle, the rows that its definition gives, one by one in Python integers."""
    ledger, expected = Ledger(), []
    for number, client, direction, rows, payload_times, wire_times in drawn:
        parts = message(rows)
        ledger.record(
            round=number,
            client=client,
            direction=direction,
            parts=parts,
            payload_times=payload_times,
            wire_times=wire_times,
        )
        for tensor, part, raw, payload in zip(
            parts.tensors, parts.parts, parts.raw.tolist(), parts.payload.tolist(), strict=True
        ):
            values = (number, client, direction, tensor, part)
            counts = (raw * payload_times, payload * payload_times, payload * wire_times)
            expected.append(dict(zip(COLUMNS, values + counts, strict=True)))
    return ledger, expected


def sums(rows: list[dict]) -> Totals:
    return Totals(*(sum(row[kind] for row in rows) for kind in ("raw", "payload", "wire")))


@given(st.lists(records, max_size=8))
@tried(60)
def test_table_and_sums_equal_rows_written_out_one_by_one(drawn):
    ledger, expected = booked(drawn)
    table = ledger.table()
    assert table.column_names == COLUMNS
    assert table.to_pylist() == expected
    assert ledger.totals() == sums(expected)
    for direction in DIRECTIONS:
        assert ledger.totals(direction) == sums([row for row in expected if row["direction"] == direction])
    assert [row["round"] for row in ledger.by_round()] == sorted({record[0] for record in drawn})
    for row in ledger.by_round():
        for direction in DIRECTIONS:
            of_both = [r for r in expected if (r["round"], r["direction"]) == (row["round"], direction)]
            assert Totals(*(row[f"{direction}_{kind}"] for kind in ("raw", "payload", "wire"))) == sums(of_both)


@given(st.lists(records, max_size=8))
@tried(30)
def test_state_goes_on_as_if_it_had_never_stopped(drawn):
    whole, _ = booked(drawn)
    first, _ = booked(drawn[: len(drawn) // 2])
    resumed, _ = booked([(9, 9, "peer", [("old", "codes", 1, 1)], 1, 1)])  # replaced, not added to
    resumed.load_state_dict(first.state_dict())
    for number, client, direction, rows, payload_times, wire_times in drawn[len(drawn) // 2 :]:
        resumed.record(
            round=number,
            client=client,
            direction=direction,
            parts=message(rows),
            payload_times=payload_times,
            wire_times=wire_times,
        )
    assert resumed.table().equals(whole.table())
    assert resumed.by_round() == whole.by_round()


def big_ledger(num_rounds: int, num_clients: int, num_rows: int) -> Ledger:
    names = tuple(f"layer{index // 2}.weight" for index in range(num_rows))
    parts = ("codes", "scales") * (num_rows // 2)
    raw = np.array([4000, 0] * (num_rows // 2))
    ledger = Ledger()
    for number in range(num_rounds):
        for client in range(num_clients):
            payload = np.arange(num_rows) + 1000
            ledger.record(
                round=number, client=client, direction="uplink", parts=MessageParts(names, parts, raw, payload)
            )
    return ledger


def test_written_file_has_the_columns_types_and_version(tmp_path):
    ledger, expected = booked([(0, NO_CLIENT, "downlink", [("w", "codes", 400, 50), ("w", "scales", 0, 4)], 3, 1)])
    ledger.write(tmp_path / "ledger.parquet")
    read = pq.read_table(tmp_path / "ledger.parquet")
    assert read.to_pylist() == expected
    assert read.schema.metadata[b"schema_version"] == b"1"
    kinds = [str(field.type) for field in read.schema]
    word = "dictionary<values=string, indices=int32, ordered=0>"
    assert kinds == ["int32", "int32", word, word, word, "int64", "int64", "int64"]
    assert [file.name for file in tmp_path.iterdir()] == ["ledger.parquet"]


def test_rows_are_expanded_in_batches_without_changing_them(tmp_path, monkeypatch):
    ledger = big_ledger(3, 4, 10)
    whole = ledger.table()
    monkeypatch.setattr(ledger_module, "_BATCH_ROWS", 25)  # a message's 10 rows do not divide it
    ledger.write(tmp_path / "ledger.parquet")
    assert pq.ParquetFile(tmp_path / "ledger.parquet").num_row_groups > 1
    assert pq.read_table(tmp_path / "ledger.parquet").to_pylist() == whole.to_pylist()


def test_repeated_messages_cost_next_to_nothing(tmp_path):
    ledger = big_ledger(10, 20, 200)
    assert len(ledger.state_dict()["templates"]) == 1
    ledger.write(tmp_path / "ledger.parquet")
    num_rows = pq.read_metadata(tmp_path / "ledger.parquet").num_rows
    assert num_rows == 40_000
    # Every column is constant, a run or a repetition; stored plainly a row would take 44 bytes.
    assert (tmp_path / "ledger.parquet").stat().st_size < num_rows


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "ledger.parquet"
    big_ledger(1, 1, 2).write(path)
    before = path.read_bytes()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(ledger_module, "_expand", fail)
    with pytest.raises(OSError, match="disk full"):
        big_ledger(2, 2, 2).write(path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["ledger.parquet"]


def test_a_message_is_not_changed_by_its_caller_later():
    payload = np.array([7])
    parts = MessageParts(("w",), ("codes",), np.array([28]), payload)
    payload[0] = 1000
    assert (parts.nbytes, parts.raw_nbytes) == (7, 28)
    with pytest.raises(ValueError, match="read-only"):
        parts.payload[0] = 1


@pytest.mark.parametrize(
    ("tensors", "parts", "raw", "payload", "says"),
    [
        (("w",), ("code",), [4], [1], "part='code' is not allowed.*did you mean 'codes'"),
        (("w",), ("scales",), [4], [1], "raw=4 is not allowed; allowed: 0 for scales"),
        (("w",), ("codes",), [4], [-1], "payload=-1"),
        (("w",), ("codes",), [4, 4], [1], "raw=.*one number a tensor"),
        (("w", "b"), ("codes",), [4, 4], [1, 1], "parts=1"),
    ],
)
def test_a_wrong_message_is_refused(tensors, parts, raw, payload, says):
    with pytest.raises(FieldError, match=says):
        MessageParts(tensors, parts, np.array(raw), np.array(payload))


def test_wrong_directions_and_times_are_refused_and_leave_no_trace():
    ledger, parts = Ledger(), message([("w", "codes", 4, 1)])
    with pytest.raises(FieldError, match=r"direction='uplnk' is not allowed.*did you mean 'uplink'"):
        ledger.record(round=0, client=0, direction="uplnk", parts=parts)
    with pytest.raises(FieldError, match="wire_times=-1"):
        ledger.record(round=0, client=0, direction="uplink", parts=parts, wire_times=-1)
    with pytest.raises(FieldError, match="direction='up'"):
        ledger.totals("up")
    assert ledger.totals() == Totals()
    assert ledger.table().num_rows == 0

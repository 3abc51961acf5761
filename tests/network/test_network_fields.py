"""What the fields of messages may be: every extreme is refused as an offence, or is used and stored without harm."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import fuzz_server
import pyarrow.parquet as pq
import pytest
import torch
from federation import Federation, Puppet, federation
from torch import nn

from fedq.errors import FieldError
from fedq.federated.aggregate import why_left_out
from fedq.federated.own_training import OwnTraining
from fedq.federated.training import RoundContext
from fedq.layout import Layout, LayoutSchedule
from fedq.network import client
from fedq.network.client import settings_of
from fedq.network.client_record import RateLimit, Task
from fedq.network.connection import NotWanted
from fedq.network.fields import MOST_EXAMPLES, NOTES, SETTINGS, check_answer, check_note
from fedq.network.hub import Hub, Refused
from fedq.network.hub import Terms as Job
from fedq.network.server import run_server, shared_settings
from fedq.network.settings import SERVER_DEFAULTS, ClientConfig, NetworkConfig
from fedq.runfolder.tables import ParquetRows, client_schema
from fedq.runtime import distributed
from fedq.wire import Frame, Kind, Message, note, unpack

EVIL = "\x1b[2J\x1b[1;31mPWNED\x1b[0m\nround 9/9  val accuracy 100 %\r\x9b31m\u202eevil\u2066\u200b\ufeff\x00 end"
HELLO = {"kind": "hello", "run": "a run", "uplink": "int8", "feedback": True, "num_examples": 5}
TASK = {"kind": "task", "round": 3, "lr": 0.1, "seed": 7, "version": 3, "checksum": 9, "timeout": 600.0}
FEDERATION = {"kind": "federation", "run": "r", "number": 0, "clients": 2, "settings": {"run": {"seed": 0}}}
FINISHED = {"kind": "finished", "rounds": 3, "test_accuracy": None, "version": 3, "checksum": 9}
GOOD: dict[str, dict[str, Any]] = {
    "hello": HELLO | {"own_data": True, "instance": "ab", "version": 2, "checksum": 2**32 - 1},
    "task": TASK,
    "federation": FEDERATION | {"frozen": {"a.weight": 5}},
    "welcome": {"kind": "welcome", "session": "ab" * 16},
    "finished": FINISHED | {"stopped": "the model has diverged"},
}
ODD = (
    *(None, True, -1, -(2**63), 2**63, 2**64, 10**19, 1.5, -0.5, 1e300, -1e300, math.inf, math.nan),
    *("", "x" * 5000, EVIL, "\ud800", [], [1], {}, {"a": None}, {"\x1b": {}}, {"a": {}}, {"a": -1}),
)


# ---- notes -----------------------------------------------------------------------------------------------------------


def test_there_is_a_good_note_of_every_kind() -> None:
    assert set(GOOD) == set(NOTES)
    for kind, good in GOOD.items():
        assert check_note(good | {"more": EVIL}, kind, "other") == good
        assert set(good) == {"kind", *NOTES[kind]}


@pytest.mark.parametrize("kind", sorted(NOTES))
def test_a_field_that_is_odd_is_refused_by_name(kind: str) -> None:
    """What passes is of the field's type, and of a size that every user of it can take."""
    for name in NOTES[kind]:
        kept: list[Any] = []
        refused: list[FieldError] = []
        for odd in ODD:
            try:
                kept.append(check_note(GOOD[kind] | {name: odd}, kind)[name])
            except FieldError as error:
                refused.append(error)
        assert {error.field for error in refused} == {name}
        assert all(len(str(error)) < 400 and str(error).isprintable() for error in refused)
        for value in kept:
            assert value is None or type(value) in (type(GOOD[kind][name]), int, float)
            assert not isinstance(value, str) or len(value) <= 256
            assert not isinstance(value, (int, float)) or 0 <= value < 2**64


@pytest.mark.parametrize("kind", sorted(NOTES))
def test_what_must_be_there_is_missed_by_name(kind: str) -> None:
    for name, field in NOTES[kind].items():
        left = {key: value for key, value in GOOD[kind].items() if key != name}
        if field.is_optional:
            assert name not in check_note(left, kind)
        else:
            with pytest.raises(FieldError, match=f"{name}=None"):
                check_note(left, kind)


def test_the_kind_is_one_that_is_awaited() -> None:
    for kind in (None, 5, [], "finished", "HELLO", EVIL):
        with pytest.raises(FieldError, match="note kind"):
            check_note(HELLO | {"kind": kind}, "hello", "task")


# ---- greetings and answers at the hub --------------------------------------------------------------------------------


MODEL = nn.Linear(4, 3)
LAYOUT = Layout.of(MODEL, "fp32")


def _hub() -> Hub:
    job = Job(
        run="a run",
        num_clients=2,
        cohort_size=2,
        min_cohort=1,
        shares={},
        shares_held=[5, 5],
        layout=LAYOUT,
        schedule=lambda spec, feedback: LayoutSchedule.of(MODEL, spec, feedback=feedback),
        network=NetworkConfig(max_offences=10**9, accept_own_data=True),
    )
    hub = Hub(job)
    hub.catch_up.publish(0, LAYOUT.flatten(MODEL))
    return hub


def test_a_greeting_that_breaks_the_rules_is_an_offence_and_changes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    hub = _hub()
    record = hub.admit(0, HELLO)
    before = (record.uplink, record.num_examples, record.session, hub.own_data)
    odd = [{name: value} for name in NOTES["hello"] for value in ODD]
    reasons = []
    for changed in odd:
        record.joins = RateLimit()
        try:
            hub.admit(0, {"own_data": True, **HELLO, **changed})
        except Refused as refusal:
            reasons.append(refusal.reason)
            assert (record.uplink, record.num_examples, record.session, hub.own_data) == before
        else:
            record = hub.admit(0, HELLO)
            before = (record.uplink, record.num_examples, record.session, hub.own_data)
    assert len(reasons) > len(odd) // 2
    assert all(map(str.isprintable, reasons))
    assert record.offences > len(odd) // 2
    assert all(record.getMessage().isprintable() for record in caplog.records)


def test_a_share_that_is_not_the_one_dealt_is_told_and_no_offence() -> None:
    hub = _hub()
    with pytest.raises(Refused, match="5, its share"):
        hub.admit(0, HELLO | {"num_examples": 6})
    assert hub.records[0].offences == 0
    with pytest.raises(Refused, match="num_examples"):
        hub.admit(0, HELLO | {"num_examples": MOST_EXAMPLES + 1, "own_data": True})
    assert hub.records[0].offences == 1


def _answer(kind: Kind = Kind.UPDATE, **changed: Any) -> Message:
    sequence = changed.pop("sequence", 1)
    bodies = {Kind.UPDATE: 4 * LAYOUT.numel, Kind.LEFT_OUT: 0, Kind.FAILED: 5}
    body = torch.zeros(bodies[kind], dtype=torch.uint8)
    frame = Frame(kind, 3, 0, LAYOUT.hash, 11, 5.0, 1.0, 0.5, body)
    return Message(replace(frame, **changed), LAYOUT if kind == Kind.UPDATE else None, sequence)


EXTREMES: dict[str, tuple[Any, ...]] = {
    "round": (0, 2, 2**31, 2**32 - 1),
    "client": (1, 2**31, 2**32 - 1),
    "weight": (0.0, 4.0, 5.5, 2.0**63, 1e300, 5e-324, 1.7e308),
    "loss": (math.inf, -math.inf),
    "accuracy": (-1e38, 1e38, -0.01, 1.01, math.inf, -math.inf),
    "sequence": (0, 2**63, 2**64 - 1),
}


@pytest.mark.parametrize("kind", [Kind.UPDATE, Kind.LEFT_OUT, Kind.FAILED])
@pytest.mark.parametrize("name", sorted(EXTREMES))
def test_an_answer_with_an_odd_field_is_refused_by_name(kind: Kind, name: str) -> None:
    hub = _hub()
    hub.admit(0, HELLO | {"uplink": "fp32", "feedback": False})
    record = hub.records[0]
    hub.context = RoundContext(3, 0.1, 0)
    for value in EXTREMES[name]:
        record.task = Task(3, 1)
        with pytest.raises(FieldError) as caught:
            hub.accept(record, unpack(_answer(kind, **{name: value}).pack()))
        assert name in caught.value.field
        assert record.task.answer is None
    assert hub.take_moved() == []
    hub.accept(record, unpack(_answer(kind).pack()))
    assert hub.received > 0


@pytest.mark.parametrize("kind", [Kind.UPDATE, Kind.LEFT_OUT, Kind.FAILED])
def test_what_may_be_unknown_is_nan(kind: Kind) -> None:
    for loss in (math.nan, 3e38, -3e38, 0.0):
        for accuracy in (math.nan, 0.0, 1.0):
            message = _answer(kind, loss=loss, accuracy=accuracy)
            check_answer(message, round=3, sequence=1, client=0, num_examples=5)


def test_other_kinds_and_exact_tensors_are_no_answer() -> None:
    wrong = [note({"kind": "hello"}, round=3, client=0, sequence=1), replace(_answer(), exact={"x": torch.zeros(1)})]
    for message in wrong:
        with pytest.raises(FieldError):
            check_answer(message, round=3, sequence=1, client=0, num_examples=5)


def test_a_task_takes_ten_tries() -> None:
    hub = _hub()
    record = hub.admit(0, HELLO)
    hub.context, record.task = RoundContext(3, 0.1, 0), Task(3, 1)
    for _ in range(10):
        hub.begins(record)
    with pytest.raises(Refused, match="10 times"):
        hub.begins(record)
    record.task = Task(3, 2)
    hub.begins(record)


def test_the_text_of_an_answer_is_cleaned() -> None:
    body = torch.frombuffer(bytearray(EVIL.encode()), dtype=torch.uint8)
    for kind in (Kind.FAILED, Kind.MISSING):
        words = why_left_out(Frame(kind, 0, 0, 0, 0, 5.0, math.nan, math.nan, body))
        assert words.isprintable()
        assert "PWNED" in words


def test_an_accuracy_of_ones_own_loop_is_a_share() -> None:
    training = OwnTraining(nn.Linear(2, 2), lambda model, lr: (0.5, 95.0))
    with pytest.raises(FieldError, match="accuracy=95"):
        training.run(torch.zeros(training.layout.numel), RoundContext(0, 0.1, 0), 0)


# ---- what cannot be stored -------------------------------------------------------------------------------------------


def test_a_row_that_cannot_be_stored_costs_the_row(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    good = {"round": 0, "client": 0, "rank": 0, "num_examples": 5, "status": "ok", "label_counts": [1]}
    odd = [
        {"num_examples": 2**63},
        {"client": 2**31},
        {"status": "\ud800"},
        {"train_loss": "much"},
        {"label_counts": 3},
    ]
    table = ParquetRows(tmp_path / "clients.parquet", client_schema())
    for number, changed in enumerate(odd):
        table.extend([good | {"round": number}, good | {"round": 100} | changed])
        table.flush()
    assert pq.read_table(tmp_path / "clients.parquet")["round"].to_pylist() == list(range(len(odd)))
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1
    assert said[0].startswith("clients.parquet: a row is left out, as are others like it: ")


# ---- a server --------------------------------------------------------------------------------------------------------


def _left_out(weight: float, accuracy: float = 0.5):
    def act(connection, state, message, text) -> None:
        empty = torch.empty(0, dtype=torch.uint8)
        frame = Frame(Kind.LEFT_OUT, text["round"], state.client.number, 0, 0, weight, 1.0, accuracy, empty)
        _send(connection, Message(frame, sequence=message.sequence))

    return act


def _fails(connection, state, message, text) -> None:
    body = torch.frombuffer(bytearray(EVIL.encode()), dtype=torch.uint8)
    frame = Frame(Kind.FAILED, text["round"], state.client.number, 0, 0, 50.0, math.nan, math.nan, body)
    _send(connection, Message(frame, sequence=message.sequence))


def _send(connection, message: Message) -> None:
    try:
        connection.send(message, 30)
    except NotWanted:
        return


@pytest.fixture
def fed(tmp_path: Path):
    with federation(tmp_path) as fed:
        yield fed


def test_a_server_outlives_extreme_answers_and_shows_clean_text(fed: Federation) -> None:
    server = fed.server("--clients", "5", "--rounds", "3", "--max-offences", "2", "--reconnect-grace", "0.2")
    server.until_it_says("listening")
    acts = [None, _left_out(2.0**63), _left_out(1e300), _left_out(50.0, -1e38), _fails]
    puppets = [Puppet(fed, number, act) for number, act in enumerate(acts)]
    said = server.ends_well()
    for puppet in puppets:
        puppet.join(30)
    statuses = fed.statuses()
    assert [statuses[round, 0] for round in range(3)] == ["ok"] * 3
    for number, word in ((1, "weight"), (2, "weight"), (3, "accuracy")):
        assert f"refused: {word}" in statuses[0, number]
        assert (2, number) not in statuses  # shut out
    assert "training failed" in statuses[2, 4]
    assert all(line.isprintable() for line in (*said.splitlines(), *statuses.values()))
    assert not any(line.startswith("round 9/9") for line in said.splitlines())


@pytest.mark.slow
def test_extreme_messages_end_no_server(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A few hundred; ``tests/stress/fuzz_server.py`` takes 100,000."""
    arguments = ["--messages", "200", "--seed", "3", "--clients", "4", "--out", str(tmp_path / "run")]
    assert fuzz_server.main(arguments) == 0
    assert "the server ended with 0" in capsys.readouterr().out


def test_random_messages_are_legal_on_the_wire() -> None:
    rng = random.Random(5)
    for _ in range(300):
        message = fuzz_server.random_answer(rng, LAYOUT, round=3, sequence=1, client=0, num_examples=5)
        assert unpack(message.pack()).frame.kind == message.frame.kind


# ---- settings --------------------------------------------------------------------------------------------------------

SENT = shared_settings(SERVER_DEFAULTS)
NAMES = [(group, name) for group, fields in SETTINGS.items() for name in fields]


def as_told(groups: dict[str, Any]) -> dict[str, Any]:
    return {"settings": groups, "number": 0}


def with_value(group: str, name: str, value: Any) -> dict[str, Any]:
    return {**SENT, group: SENT[group] | {name: value}}


def test_what_a_server_sends_is_what_a_client_takes() -> None:
    assert {group: set(values) for group, values in SENT.items()} == {g: set(f) for g, f in SETTINGS.items()}
    took, had = settings_of(as_told(SENT), ClientConfig()), SERVER_DEFAULTS
    for group, name in NAMES:
        assert getattr(getattr(took, group), name) == getattr(getattr(had, group), name), name


@pytest.mark.parametrize(("group", "name"), NAMES)
def test_a_setting_is_refused_by_name_or_is_within_bounds(group: str, name: str) -> None:
    for value in ODD:
        try:
            took = settings_of(as_told(with_value(group, name, value)), ClientConfig())
        except FieldError as error:
            refused = str(error)
            assert name in refused or "cohort" in refused
            assert len(refused) < 2000
        else:
            assert getattr(getattr(took, group), name) == value
            assert SETTINGS[group][name].holds(value) or value is None


@pytest.mark.parametrize(
    ("group", "name", "value"),
    [
        ("data", "dataset", "/home/somebody/private"),
        ("data", "dataset", "../photos"),
        ("data", "image_size", 20_000),
        ("clients", "num_clients", 10**9),
        ("local", "local_steps", 10**12),
        ("local", "local_epochs", 10**6),
        ("local", "batch_size", 10**9),
        ("local", "model", "os:getcwd"),
        ("local", "optimizer", "sgd:momentum=1.0"),
    ],
)
def test_what_would_use_a_client_is_refused(group: str, name: str, value: Any) -> None:
    with pytest.raises(FieldError) as caught:
        settings_of(as_told(with_value(group, name, value)), ClientConfig())
    assert caught.value.field.removeprefix("the server's ") == name
    assert caught.value.value == value


def test_what_a_server_of_an_earlier_version_sets_is_taken() -> None:
    old = SENT | {"local": SENT["local"] | {"momentum": 0.5, "weight_decay": 0.0}}
    old["exchange"] = SENT["exchange"] | {"residual_memory": 0.5}
    took = settings_of(as_told(old), ClientConfig())
    assert took.local.optimizer == "sgd:weight_decay=0.0,momentum=0.5"
    assert took.exchange.feedback == "auto:memory=0.5"
    with pytest.raises(FieldError, match=r"momentum=2\.0"):
        settings_of(as_told(SENT | {"local": SENT["local"] | {"momentum": 2.0}}), ClientConfig())


def test_what_is_not_in_the_list_is_the_clients_own(tmp_path: Path) -> None:
    evil = {
        "data": SENT["data"] | {"data_dir": "/etc", "download": True},
        "run": SENT["run"] | {"out": "elsewhere", "log_with": "wandb", "chaos": "kill=1", "resume": "x", "device": "x"},
        "exchange": SENT["exchange"] | {"link": "/etc/passwd"},
        "personal": {"warm_start": "/etc/passwd", "algorithm": "local"},
        "network": {"bind": "0.0.0.0:1"},
        "odd": {"a": 1},
    }
    own = ClientConfig(data_dir=tmp_path, device="cpu", threads=3, uplink="sign")
    took = settings_of(as_told(SENT | evil), own)
    assert took == settings_of(as_told(SENT), own)
    assert (took.data.data_dir, took.data.download, took.run.device, took.run.threads) == (tmp_path, False, "cpu", 3)
    assert took.exchange.uplink == "sign"


def test_a_clients_folder_is_its_own(tmp_path: Path) -> None:
    server = replace(SERVER_DEFAULTS, data=replace(SERVER_DEFAULTS.data, dataset="/srv/secret/photos"))
    sent = shared_settings(server)
    assert "secret" not in str(sent)
    assert settings_of(as_told(sent), ClientConfig(data_dir=tmp_path)).data.dataset == str(tmp_path)


def test_a_server_that_no_client_would_take_does_not_start() -> None:
    config = replace(SERVER_DEFAULTS, local=replace(SERVER_DEFAULTS.local, local_steps=10**6))
    with pytest.raises(FieldError, match="local_steps"):
        run_server(config)


def test_a_model_that_is_too_large_is_not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "make_model", lambda *given: pytest.fail("it was built"))
    data = {"dataset": "digits", "image_size": 64, "train_examples": 50}
    sent = SENT | {"data": SENT["data"] | data, "local": SENT["local"] | {"model": "cnn1m"}}
    own = ClientConfig(max_model_mb=10.0, device="cpu")
    with distributed("cpu", 1) as runtime, pytest.raises(FieldError, match=r"max_model_mb=10.0") as caught:
        client._prepare(own, settings_of(as_told(sent), own), runtime, as_told(sent))
    assert "cnn1m at 64x64" in caught.value.allowed

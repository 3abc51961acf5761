"""Clients that do not behave, against a server in a process of its own: each is named, and the rounds go on."""

from __future__ import annotations

import math
import re
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from federation import Federation, Puppet, answer_properly, federation
from launched import summary, until

from fedq.errors import FieldError
from fedq.layout import Layout
from fedq.models import build_model
from fedq.network.connection import Connection, Lost, NotWanted
from fedq.network.participant import Participant
from fedq.network.service import FOLLOW, NUMBER, SEND, SESSION
from fedq.wire import Frame, Kind, Message, join_payloads, note, read_note


@pytest.fixture
def fed(tmp_path: Path):
    with federation(tmp_path) as fed:
        yield fed


def _raw(connection: Connection, data: bytes, piece: int = 1 << 20) -> None:
    """Send bytes as an answer, whatever they are."""
    pieces = (data[at : at + piece] for at in range(0, len(data), piece))
    try:
        connection._send(pieces, metadata=(*connection._metadata, (SESSION, connection._session)), timeout=30)
    except grpc.RpcError as error:
        raise NotWanted(error.details()) from None


def _update(participant: Participant, text: dict[str, Any], message: Message, **changed: Any) -> Message:
    """Return the proper answer with some of its frame changed."""
    good = participant.answer(text, message.sequence)
    return replace(good, frame=replace(good.frame, **changed))


def _garbage(connection: Connection, participant: Participant, message: Message, text: dict[str, Any]) -> None:
    _raw(connection, b"\x80\x04\x95 this would be a pickle" * 100)


def _truncated(connection: Connection, participant: Participant, message: Message, text: dict[str, Any]) -> None:
    _raw(connection, participant.answer(text, message.sequence).pack()[:-100])


def _damaged(connection: Connection, participant: Participant, message: Message, text: dict[str, Any]) -> None:
    data = bytearray(participant.answer(text, message.sequence).pack())
    data[len(data) // 2] ^= 1
    _raw(connection, bytes(data))


def _oversized(connection: Connection, participant: Participant, message: Message, text: dict[str, Any]) -> None:
    model = build_model("cnn1m")
    layout = Layout.of(model, "fp32")
    flat = layout.flatten(model)
    body = join_payloads(layout, layout.encode(flat, seed=0))
    frame = Frame(Kind.UPDATE, int(text["round"]), participant.client.number, layout.hash, 0, 50.0, 1.0, 0.5, body)
    _raw(connection, Message(frame, layout, message.sequence).pack())


def _nan(connection: Connection, participant: Participant, message: Message, text: dict[str, Any]) -> None:
    body = participant.answer(text, message.sequence).frame.body.clone()
    body[:4].view(torch.float32)[0] = math.nan
    connection.send(_update(participant, text, message, body=body), 30)


def _says_nan(connection: Connection, participant: Participant, message: Message, text: dict[str, Any]) -> None:
    participant.client.training.training.step = math.nan  # type: ignore[attr-defined]
    connection.send(participant.answer(text, message.sequence), 30)


def _stale(connection: Connection, participant: Participant, message: Message, text: dict[str, Any]) -> None:
    connection.send(_update(participant, text, message, round=int(text["round"]) + 7), 30)


def _replayed(connection: Connection, participant: Participant, message: Message, text: dict[str, Any]) -> None:
    old = getattr(participant, "old", None)
    if old is None:
        participant.old = old = participant.answer(text, message.sequence)  # type: ignore[attr-defined]
    connection.send(old, 30)


def _as_another(connection: Connection, participant: Participant, message: Message, text: dict[str, Any]) -> None:
    connection.send(_update(participant, text, message, client=0), 30)


def _heavy(connection: Connection, participant: Participant, message: Message, text: dict[str, Any]) -> None:
    connection.send(_update(participant, text, message, weight=1e30), 30)


def _silent(connection: Connection, participant: Participant, message: Message, text: dict[str, Any]) -> None:
    """Say nothing."""


def _slow(connection: Connection, participant: Participant, message: Message, text: dict[str, Any]) -> None:
    """Send a byte at a time, so that it is not done when the round is over."""
    data = participant.answer(text, message.sequence).pack()

    def pieces():
        for at in range(len(data)):
            time.sleep(0.05)
            yield data[at : at + 1]

    try:
        connection._send(pieces(), metadata=(*connection._metadata, (SESSION, connection._session)), timeout=60)
    except grpc.RpcError:
        return


def _other_shapes(connection: Connection, participant: Participant, message: Message, text: dict[str, Any]) -> None:
    layout = Layout.of(torch.nn.Linear(10, 10), "fp32")
    body = torch.zeros(4 * layout.numel, dtype=torch.uint8)
    frame = Frame(Kind.UPDATE, int(text["round"]), participant.client.number, layout.hash, 0, 50.0, 1.0, 0.5, body)
    connection.send(Message(frame, layout, message.sequence), 30)


def _a_note(connection: Connection, participant: Participant, message: Message, text: dict[str, Any]) -> None:
    number = participant.client.number
    connection.send(note({"kind": "hello"}, round=int(text["round"]), client=number, sequence=message.sequence), 30)


_WHOLE_ROUND, _NOT_AWAITED = "no answer within 6 s", "no answer; since it was silent for a whole round"
FAULTS: dict[str, tuple[Callable[..., None], str]] = {
    "garbage": (_garbage, "refused: "),
    "truncated": (_truncated, "refused: "),
    "damaged": (_damaged, "checksum"),
    "oversized": (_oversized, "refused: message bytes"),
    "nan": (_nan, "not finite"),
    "says nan": (_says_nan, "update is not finite"),
    "stale": (_stale, "refused: round, sequence"),
    "replayed": (_replayed, "refused: round, sequence"),
    "as another": (_as_another, "refused: client=0"),
    "heavy": (_heavy, "refused: weight=1e+30"),
    "silent": (_silent, _WHOLE_ROUND),
    "slow": (_slow, _WHOLE_ROUND),
    "other shapes": (_other_shapes, "refused: "),
    "a note": (_a_note, "refused: "),
}


def _try(act: Callable[..., None]) -> Callable[..., None]:
    def tried(*args: Any) -> None:
        try:
            act(*args)
        except NotWanted:
            return

    return tried


@pytest.mark.slow
def test_whoever_breaks_the_rules_is_named_and_the_rounds_go_on(fed: Federation) -> None:
    number_of = {name: number for number, name in enumerate(FAULTS, start=2)}
    server = fed.server(
        *("--clients", str(len(FAULTS) + 2), "--rounds", "3", "--round-timeout", "6", "--min-cohort", "2"),
        *("--uplink", "fp32", "--downlink", "fp32", "--max-offences", "99"),
    )
    server.until_it_says("listening")
    good = [Puppet(fed, 0), Puppet(fed, 1)]
    bad = [Puppet(fed, number_of[name], _try(act)) for name, (act, _) in FAULTS.items()]
    said = server.ends_well()
    for puppet in good + bad:
        puppet.join(30)
    statuses = fed.statuses()
    for round in range(3):
        assert statuses[round, 0] == statuses[round, 1] == "ok"
        for name, (_, words) in FAULTS.items():
            if name == "replayed" and round == 0:  # nothing is old in the first round
                assert statuses[round, number_of[name]] == "ok"
                continue
            if round and words == _WHOLE_ROUND:  # that has cost one timeout, and no more
                words = _NOT_AWAITED
            assert words in statuses[round, number_of[name]], name
            assert f"round {round}: client {number_of[name]} is left out" in said
    assert len(summary(fed.run)["left_out"]) == 3 * len(FAULTS) - 1
    assert [puppet.outcome["kind"] for puppet in good] == ["finished"] * 2


class _SlowReader(threading.Thread):
    """Follows, and takes nothing of what it is told."""

    def __init__(self, fed: Federation, number: int) -> None:
        super().__init__(daemon=True)
        self.connection = Connection(fed.address, None, number)
        self.done = threading.Event()
        self.start()

    def run(self) -> None:
        hello = {"kind": "hello", "run": "", "uplink": "fp32", "feedback": False, "num_examples": 50, "own_data": True}
        call = self.connection._follow(bytes(note(hello).pack()), metadata=self.connection._metadata)
        next(call)  # the welcome; the model, of several megabytes, stays where it is
        self.done.wait(100)
        call.cancel()
        self.connection.close()


@pytest.mark.slow
def test_whoever_reads_nothing_holds_up_nobody(fed: Federation) -> None:
    flags = ("--clients", "2", "--rounds", "3", "--model", "cnn1m", "--round-timeout", "3")
    server = fed.server(*flags)
    server.until_it_says("listening")
    slow, good = _SlowReader(fed, 1), Puppet(fed, 0, model=build_model("cnn1m"))
    said = server.ends_well()
    slow.done.set()
    good.join(30)
    slow.join(30)
    statuses = fed.statuses()
    assert [statuses[round, 0] for round in range(3)] == ["ok"] * 3
    assert statuses[0, 1] == "no answer within 3 s"
    assert all(_NOT_AWAITED in statuses[round, 1] for round in (1, 2))
    assert "client 1 is left out" in said


@pytest.mark.slow
def test_a_client_is_shut_out_after_too_many_offences(fed: Federation) -> None:
    server = fed.server("--clients", "2", "--rounds", "5", "--max-offences", "2", "--reconnect-grace", "0.2")
    server.until_it_says("listening")
    good, bad = Puppet(fed, 0), Puppet(fed, 1, _try(_garbage))
    server.ends_well()
    bad.join(30)
    good.join(30)
    assert summary(fed.run)["offences"] == {"1": 2}
    assert [round for round, client in fed.statuses() if client == 1] == [0, 1]
    assert isinstance(bad.outcome, Exception)
    assert good.outcome["kind"] == "finished"


@pytest.mark.slow
def test_who_may_not_take_part_is_told_why(fed: Federation) -> None:
    server = fed.server("--clients", "2", "--rounds", "2", "--join-timeout", "600", "--max-offences", "99")
    server.until_it_says("listening")
    for number, words in ((2, "has no seat"), (99, "has no seat")):
        connection = Connection(fed.address, None, number)
        with pytest.raises(FieldError, match=words):
            connection.describe()
        connection.close()
    connection = Connection(fed.address, None, 0)
    described = connection.describe()
    for hello, words in (
        ({"uplink": "int99", "feedback": True, "num_examples": 5}, "int99"),
        ({"uplink": "int8:block=" + "9" * 300, "feedback": True, "num_examples": 5}, "uplink="),
        ({"uplink": "int8", "feedback": True, "num_examples": -5}, "num_examples=-5"),
        ({"uplink": "int8", "feedback": True, "num_examples": 10**30}, "not a greeting"),
        ({"uplink": "int8"}, "feedback=None"),
        ({"kind": "task", "uplink": "int8", "feedback": True, "num_examples": 5}, "note kind='task'"),
        ({"uplink": "int8", "feedback": True, "num_examples": 5}, "100, its share"),
    ):
        with pytest.raises(FieldError, match=words):
            next(iter(connection.follow({"kind": "hello", "run": described["run"], **hello})))
    channel = grpc.insecure_channel(fed.address)
    for metadata, method, code in (
        ((), FOLLOW, grpc.StatusCode.PERMISSION_DENIED),
        (((NUMBER, "-1"),), FOLLOW, grpc.StatusCode.PERMISSION_DENIED),
        (((NUMBER, "0"), (SESSION, "guess")), SEND, grpc.StatusCode.FAILED_PRECONDITION),
        (((NUMBER, "0"),), "/fedq.Federation/Other", grpc.StatusCode.UNIMPLEMENTED),
    ):
        call = channel.unary_stream(method)(note({}).pack(), metadata=metadata, timeout=20)
        with pytest.raises(grpc.RpcError) as caught:
            next(call)
        assert caught.value.code() == code, (method, caught.value)
    channel.close()
    # Whoever knocks all the time is asked to wait, and the others do not notice.
    patient = Connection(fed.address, None, 1)
    refusals = 0
    for _ in range(20):
        try:
            patient.describe()
        except Lost as error:
            refusals += "too often" in str(error)
    assert refusals > 5
    patient.close()
    connection.close()
    server.kill()


@pytest.mark.slow
def test_a_hundred_clients_for_ten_rounds(fed: Federation) -> None:
    server = fed.server("--clients", "100", "--rounds", "10", "--uplink", "int8", "--min-examples", "1")
    server.until_it_says("listening")
    puppets = [Puppet(fed, number, uplink="int8") for number in range(100)]
    memory = {}

    def resident(round: int) -> float:
        server.until_it_says(f"round {round}/10")
        lines = Path(f"/proc/{server.process.pid}/status").read_text().splitlines()
        return float(next(line.split()[1] for line in lines if line.startswith("VmRSS"))) / 1024

    if Path("/proc/self/status").exists():
        memory = {round: resident(round) for round in (3, 9)}
    server.ends_well()
    for puppet in puppets:
        puppet.join(30)
        assert puppet.outcome["kind"] == "finished"
    assert set(fed.statuses().values()) == {"ok"}
    assert len(fed.statuses()) == 1000
    if memory:  # a message is 62 kB: what 600 of them would take if they were kept
        assert memory[9] - memory[3] < 20, memory


def test_a_second_holder_of_a_certificate_locks_nobody_out(fed: Federation) -> None:
    server = fed.server("--clients", "2", "--rounds", "2")
    server.until_it_says("listening")
    first = Puppet(fed, 0)
    until(lambda: "client 0 is here" in server.said, "the first connection")
    second = Puppet(fed, 0)
    second.join(30)
    assert isinstance(second.outcome, Lost)
    assert re.search(r"client 0 is here already, from \S+:\d+; you come from \S+:\d+", str(second.outcome))
    other = Puppet(fed, 1)
    said = server.ends_well()
    for puppet in (first, other):
        puppet.join(30)
    assert first.outcome["kind"] == other.outcome["kind"] == "finished"
    assert set(fed.statuses().values()) == {"ok"}
    assert re.search(r"client 0 is here from \S+:\d+; from \S+:\d+ comes another with its certificate", said)


@pytest.mark.slow
def test_a_process_that_joins_again_takes_its_own_place_and_the_old_call_is_told(fed: Federation) -> None:
    server = fed.server("--clients", "2", "--rounds", "1", "--join-timeout", "600")
    server.until_it_says("listening")
    hello = {"kind": "hello", "run": "", "uplink": "fp32", "feedback": False, "num_examples": 50, "own_data": True}
    hello |= {"instance": "one process"}
    connections = [Connection(fed.address, None, 0) for _ in range(2)]
    calls = [connection.follow(hello) for connection in connections]
    assert read_note(next(calls[0]))["kind"] == "welcome"
    for _ in range(15):  # somebody knocks in its name
        with pytest.raises(Lost, match=r"here already|too often"):
            next(connections[1].follow(hello | {"instance": "another"}))
    assert read_note(next(calls[1]))["kind"] == "welcome"
    with pytest.raises(Lost, match="client 0 has joined again, from"):
        next(calls[0])
    for connection in connections:
        connection.close()
    server.kill()


def test_a_proper_answer_is_taken(fed: Federation) -> None:
    server = fed.server("--clients", "1", "--rounds", "1")
    server.until_it_says("listening")
    puppet = Puppet(fed, 0, answer_properly)
    server.ends_well()
    puppet.join(30)
    assert puppet.outcome["rounds"] == 1

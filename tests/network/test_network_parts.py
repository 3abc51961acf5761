"""The parts of a server and of a client, each alone: what is offered, who is admitted, what is remembered."""

from __future__ import annotations

import asyncio
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from clients import client_on
from torch import Tensor, nn

from fedq.codecs import codec
from fedq.errors import FieldError
from fedq.federated.aggregate import aggregate, apply_change
from fedq.federated.own_training import OwnTraining
from fedq.federated.server import Server
from fedq.federated.training import RoundContext, Trained
from fedq.feedback import ErrorFeedback, ResidualStore
from fedq.layout import Layout, LayoutSchedule
from fedq.network.catch_up import CatchUp, checksum, whole_model
from fedq.network.client_record import RateLimit
from fedq.network.hub import Hub, Refused, Terms
from fedq.network.participant import Diverged, Participant, VersionsOnDisk, check_same_model
from fedq.network.settings import (
    SERVER_DEFAULTS,
    ClientConfig,
    NetworkConfig,
    ServerConfig,
    check_client,
    check_server,
    is_loopback,
    resolved,
    short_forms,
)
from fedq.wire import Assembler, Kind, Message, read_note, unpack


def _model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(40, 30), nn.BatchNorm1d(30), nn.Linear(30, 10))


FP32 = Layout.of(_model(), "fp32")
INT8 = Layout.of(_model(), "int8")


# ---- what is offered -------------------------------------------------------------------------------------------------


def _served(rounds: int) -> tuple[CatchUp, list[Tensor]]:
    """Return what leads to the newest model after some rounds of a server, and the replica of every version."""
    model = _model()
    replica = FP32.flatten(model)
    server = Server(replica, INT8, lambda params: torch.optim.SGD(params, lr=1.0))
    catch_up, versions = CatchUp(FP32), [replica.clone()]
    catch_up.publish(0, replica)
    for number in range(rounds):
        server.step(0.1 * torch.randn(FP32.numel, generator=torch.Generator().manual_seed(number)))
        change = server.change(replica, RoundContext(number, 0.1, 0))
        apply_change(INT8, change, replica)
        versions.append(replica.clone())
        catch_up.publish(number + 1, replica, Message(change, INT8))
    return catch_up, versions


def _caught_up(held: Tensor | None, messages: list[Message]) -> Tensor:
    replica = torch.zeros(FP32.numel) if held is None else held.clone()
    for message in messages:
        message = unpack(message.pack())
        assert message.layout is not None
        if message.frame.kind == Kind.MODEL:
            replica.zero_()
        apply_change(message.layout, message.frame, replica)
    return replica


@pytest.mark.parametrize("held", [None, 0, 1, 2, 3, 4])
def test_whoever_held_any_version_holds_the_newest_after_what_is_offered(held: int | None) -> None:
    catch_up, versions = _served(4)
    messages = catch_up.lacking(held)
    assert torch.equal(_caught_up(None if held is None else versions[held], messages), versions[4])
    kinds = [message.frame.kind for message in messages]
    # Three changes of a byte an element are less than a model of four; one that everybody has cost nothing.
    wanted = {4: [], 3: [Kind.CHANGE], 2: [Kind.CHANGE] * 2}
    assert kinds == wanted.get(-1 if held is None else held, [Kind.MODEL] if held in (None, 0) else kinds)
    assert sum(message.nbytes for message in messages) <= catch_up.lacking(None)[0].nbytes


def test_a_version_counts_only_with_the_right_checksum() -> None:
    catch_up, versions = _served(2)
    assert catch_up.recognise(1, checksum(versions[1])) == 1
    assert catch_up.recognise(2, checksum(versions[1])) is None
    assert catch_up.recognise(9, checksum(versions[1])) is None
    for odd in (None, "2", True, [2], 2.0, {}):
        assert catch_up.recognise(odd, checksum(versions[2])) is None or odd == 2.0


def test_a_round_without_a_change_costs_nothing() -> None:
    catch_up, versions = _served(1)
    catch_up.publish(2, versions[1], None)
    assert catch_up.lacking(1) == []
    assert [message.frame.kind for message in catch_up.lacking(0)] == [Kind.CHANGE]


# ---- who is admitted, and what is taken ------------------------------------------------------------------------------


def _terms(**network: Any) -> Terms:
    return Terms(
        run="a run",
        num_clients=3,
        cohort_size=3,
        min_cohort=1,
        shares={},
        shares_held=[5, 5, 7],
        layout=FP32,
        schedule=lambda spec, feedback: LayoutSchedule.of(_model(), spec, feedback=feedback),
        network=NetworkConfig(
            **{"round_timeout": 0.5, "join_timeout": 0.2, "reconnect_grace": 0.1, "accept_own_data": True, **network}
        ),
    )


HELLO = {"kind": "hello", "run": "a run", "uplink": "int8", "feedback": True, "num_examples": 5}


def _hub(**network: Any) -> Hub:
    hub = Hub(_terms(**network))
    hub.catch_up.publish(0, FP32.flatten(_model()))
    return hub


def test_only_those_with_a_seat_are_admitted() -> None:
    hub = _hub()
    assert hub.admit(1, HELLO).num_examples == 5
    for number in (3, -1, 10**9):
        with pytest.raises(Refused, match="no seat"):
            hub.admit(number, HELLO)
    with pytest.raises(Refused, match="7, its share"):
        hub.admit(2, HELLO)
    assert hub.admit(2, {**HELLO, "own_data": True}).num_examples == 5
    assert hub.own_data == {2}
    with pytest.raises(Refused, match="--accept-own-data"):
        _hub(accept_own_data=False).admit(2, {**HELLO, "own_data": True})
    for odd in ({"uplink": "int99"}, {"uplink": 5}, {"feedback": "yes"}, {"num_examples": True}, {"num_examples": 0}):
        with pytest.raises(Refused):
            hub.admit(0, {**HELLO, **odd})


def test_whoever_connects_too_often_waits() -> None:
    hub = _hub()
    for _ in range(10):
        hub.admit(0, HELLO)
    with pytest.raises(Refused, match="too often") as caught:
        hub.admit(0, HELLO)
    assert not caught.value.is_final
    assert hub.admit(1, HELLO).number == 1  # the others do not notice


def test_a_rate_limit_gives_tokens_back(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    limit = RateLimit(burst=2, per_s=0.5)
    assert [limit.take() for _ in range(3)] == [True, True, False]
    now[0] = 2.0
    assert [limit.take() for _ in range(2)] == [True, False]


def test_a_session_is_not_guessed_and_not_another_ones() -> None:
    hub = _hub()
    record = hub.admit(0, HELLO)
    assert hub.record_in_session(0, record.session) is record
    for number, session in ((0, ""), (0, "guess"), (1, record.session)):
        with pytest.raises(Refused):
            hub.record_in_session(number, session)


def test_a_round_closes_with_those_who_answered() -> None:
    hub = _hub()

    async def play() -> list[Message]:
        records = [hub.admit(number, {**HELLO, "own_data": True}) for number in range(3)]
        for record in records:
            hub.arrived(record)
        running = asyncio.create_task(hub.run_round(RoundContext(0, 0.1, 0)))
        await asyncio.sleep(0.05)
        assignment = hub.assignment(records[0])
        assert assignment is not None
        text = read_note(unpack(assignment.note.pack()))
        assert [message.frame.kind for message in assignment.models] == [Kind.MODEL]
        participant = _participant(Path("unused"), _model(), number=0, feedback=False)
        for message in assignment.models:
            participant.take(message)
        participant.arrive(text)
        answer = participant.answer(text, assignment.note.sequence)
        hub.accept(records[0], answer)
        with pytest.raises(Refused, match="no answer"):  # once is enough
            hub.accept(records[0], answer)
        records[1].followers.clear()
        hub.left(records[1])
        return await running

    messages = asyncio.run(play())
    assert [message.frame.kind for message in messages] == [Kind.UPDATE, Kind.MISSING, Kind.MISSING]
    outcome = aggregate(
        INT8,
        [message.frame for message in messages],
        torch.device("cpu"),
        others={message.frame.layout_hash: message.layout for message in messages if message.layout},
    )
    assert outcome.mean is not None
    assert "connection was lost" in outcome.left_out[1]
    assert "no answer within 0.5 s" in outcome.left_out[2]
    rows = hub.take_moved()
    assert [(client, direction) for client, direction, _ in rows] == [(0, "uplink")]
    assert hub.take_moved() == []


def test_the_mean_of_mixed_codecs_is_that_of_what_each_decodes_to() -> None:
    frames, decoded, others = [], [], {}
    for number, spec in enumerate(["int8", "sign", "sign", "fp32", "int4"]):
        layout = Layout.of(_model(), codec(spec).resolved(feedback=False))
        others[layout.hash] = layout
        client = client_on(number, torch.arange(number + 1), None, LayoutSchedule.always(layout))  # type: ignore[arg-type]
        update = torch.randn(layout.numel, generator=torch.Generator().manual_seed(number))
        frames.append(client.message(update, Trained(update, 0.0, 0.0, 1), RoundContext(0, 0.1, 0)))
        out = torch.zeros(layout.numel)
        apply_change(layout, frames[-1], out)
        decoded.append((number + 1, out.double()))
    outcome = aggregate(INT8, frames, torch.device("cpu"), others=others)
    assert outcome.mean is not None
    total = sum(weight for weight, _ in decoded)
    exact = sum(weight / total * values for weight, values in decoded)
    torch.testing.assert_close(outcome.mean.double(), exact, rtol=1e-5, atol=1e-6)


# ---- a participant --------------------------------------------------------------------------------------------------


class _Noise:
    """Trains by adding noise of the seed."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.layout = Layout.of(model, "fp32")

    def run(self, start: Tensor, indices: Tensor, *, lr: float, seed: int) -> Trained:
        noise = torch.randn(start.numel(), generator=torch.Generator().manual_seed(seed % 2**63))
        return Trained(start + lr * noise, 1.0, 0.5, 1)


def _participant(
    folder: Path, model: nn.Module, *, number: int = 0, feedback: bool = True, run: str = "a run"
) -> Participant:
    on_disk = VersionsOnDisk(folder, number, has_feedback=feedback)
    schedule = LayoutSchedule.of(model, "sign" if feedback else "int8", feedback=feedback)
    client = client_on(number, torch.arange(5), _Noise(model), schedule, on_disk.feedback)
    if not feedback:
        on_disk.begin = lambda run, uplink: None  # type: ignore[method-assign]
    return Participant(client, on_disk, run=run, uplink="sign")


def _task(round: int, replica: Tensor) -> dict[str, Any]:
    return {"round": round, "lr": 0.1, "seed": 3, "version": round, "checksum": checksum(replica), "timeout": 5}


def _with_model(participant: Participant) -> Tensor:
    catch_up = CatchUp(FP32)
    replica = FP32.flatten(_model())
    catch_up.publish(0, replica)
    for message in catch_up.lacking(None):
        participant.take(message)
    return replica


def test_a_round_that_is_asked_again_is_answered_the_same(tmp_path: Path) -> None:
    participant = _participant(tmp_path, _model())
    replica = _with_model(participant)
    answers = []
    for sequence, round in enumerate((0, 1, 2)):
        participant.arrive(_task(round, replica))
        answers.append(participant.answer(_task(round, replica), sequence).pack())
    # A server that was restarted asks for round 1 again, then 2, under other numbers.
    for sequence, round in ((10, 1), (11, 2)):
        again = participant.answer(_task(round, replica), sequence)
        assert torch.equal(again.frame.body, unpack(answers[round]).frame.body)
    # So does a client that was restarted.
    other = _participant(tmp_path, _model())
    _with_model(other)
    again = other.answer(_task(2, replica), 12)
    assert torch.equal(again.frame.body, unpack(answers[2]).frame.body)
    assert len(list((tmp_path / "residuals").glob("*.f32"))) == 3


def test_an_answer_that_did_not_count_leaves_no_residual(tmp_path: Path) -> None:
    participant, untouched = _participant(tmp_path / "a", _model()), _participant(tmp_path / "b", _model())
    replica = _with_model(participant)
    _with_model(untouched)
    for one in (participant, untouched):
        one.answer(_task(0, replica), 0)
    participant.answer(_task(1, replica), 1)
    participant.undo()
    after = [one.answer(_task(2, replica), 2) for one in (participant, untouched)]
    assert torch.equal(after[0].frame.body, after[1].frame.body)


def test_the_residual_of_another_run_or_codec_is_forgotten(tmp_path: Path) -> None:
    first = _participant(tmp_path, _model())
    replica = _with_model(first)
    first.answer(_task(0, replica), 0)
    assert list((tmp_path / "residuals").glob("*.f32"))
    _participant(tmp_path, _model(), run="another run")
    assert not list((tmp_path / "residuals").glob("*.f32"))


def test_residuals_are_those_of_error_feedback(tmp_path: Path) -> None:
    participant = _participant(tmp_path, _model())
    replica = _with_model(participant)
    plain = ErrorFeedback(ResidualStore())
    for round in range(3):
        context = RoundContext(round, 0.1, 3)
        answer = participant.answer(_task(round, replica), round)
        trained = participant.client.train(replica, context)
        layout = participant.client.layouts.at(round)
        update = layout.to_sent_(trained.flat, replica)
        payloads = plain.encode(0, layout, update, seed=context.uplink_seed(0))
        assert torch.equal(answer.frame.body, torch.cat([payload.data for payload in payloads]))


def test_a_model_that_is_not_the_servers_is_noticed(tmp_path: Path) -> None:
    participant = _participant(tmp_path, _model())
    with pytest.raises(Diverged):
        participant.arrive(_task(0, torch.zeros(FP32.numel)))
    replica = _with_model(participant)
    participant.replica[3] += 1e-3  # type: ignore[index]
    with pytest.raises(Diverged):
        participant.arrive(_task(0, replica))
    assert participant.hello().get("version") is None
    catch_up, _ = _served(2)
    with pytest.raises(Diverged):
        participant.take(catch_up.lacking(1)[0])


def test_another_model_is_refused_by_name() -> None:
    other = Layout.of(nn.Sequential(nn.Linear(40, 31), nn.BatchNorm1d(31), nn.Linear(31, 10)), "int8")
    with pytest.raises(FieldError, match=r"0\.weight"):
        check_same_model(other, FP32)
    check_same_model(INT8, FP32)


def test_a_message_that_is_larger_than_the_model_is_refused_by_its_head(tmp_path: Path) -> None:
    limits = _participant(tmp_path, _model()).limits
    model = whole_model(FP32, FP32.flatten(_model()), 0)
    assert Assembler(limits).add(model.pack())[0].nbytes == model.nbytes
    other = nn.Linear(400, 100)
    layout = Layout.of(other, "fp32")
    large = whole_model(layout, layout.flatten(other), 0)
    assembler = Assembler(limits)
    with pytest.raises(FieldError, match="message bytes=16"):
        assembler.add(large.head())
    assert assembler.pending == 0


def test_training_that_fails_is_told(tmp_path: Path) -> None:
    participant = _participant(tmp_path, _model())
    replica = _with_model(participant)

    def fail(*args: object, **kwargs: object) -> Trained:
        raise OSError("the disk is full")

    participant.client.training.training.run = fail  # type: ignore
    answer = unpack(participant.answer(_task(0, replica), 0).pack())
    assert answer.frame.kind == Kind.FAILED
    assert b"the disk is full" in bytes(answer.frame.body.tolist())


def test_a_training_loop_of_ones_own() -> None:
    model = _model()
    with torch.no_grad():
        training = OwnTraining(model, lambda model, lr: [p.add_(lr) for p in model.parameters()] and (0.5, 0.9))
        start = torch.zeros(training.layout.numel)
        trained = training.run(start, RoundContext(0, 0.25, 1), 0)
    assert (trained.flat[: training.layout.num_params] == 0.25).all()
    assert (trained.loss, trained.accuracy) == (0.5, 0.9)
    silent = OwnTraining(model, lambda model, lr: None).run(start, RoundContext(0, 0.25, 1), 0)
    assert math.isnan(silent.loss)


# ---- settings --------------------------------------------------------------------------------------------------------


def test_short_forms() -> None:
    assert short_forms(["--clients", "5", "--quantization"]) == ["--num-clients", "5", "--uplink", "int8"]
    assert short_forms(["--quantization", "4", "--rounds", "2"]) == ["--uplink", "int4", "--rounds", "2"]
    assert short_forms(["--clients=7", "--no-quantization"]) == ["--num-clients=7", "--uplink", "fp32"]


def test_loopback_is_told_by_its_name_or_number() -> None:
    assert all(is_loopback(host) for host in ("localhost", "127.0.0.1", "127.8.9.1", "::1"))
    assert not any(is_loopback(host) for host in ("0.0.0.0", "10.0.0.1", "example.org", "localhost.example.org", "::"))


def _secure(**network: Any) -> ServerConfig:
    return replace(SERVER_DEFAULTS, network=NetworkConfig(certs=Path("certs"), **network))


def test_mnist_has_its_own_size_here() -> None:
    assert resolved(SERVER_DEFAULTS).data.image_size == 28
    other = replace(SERVER_DEFAULTS, data=replace(SERVER_DEFAULTS.data, dataset="cifar10"))
    assert resolved(other).data.image_size is None


def test_settings_of_a_server_are_checked() -> None:
    check_server(_secure())
    for network, words in (
        ({"bind": "8470"}, "bind"),
        ({"bind": "localhost:99999"}, "bind"),
        ({"round_timeout": 0.0}, "round_timeout"),
        ({"reconnect_grace": math.inf}, "reconnect_grace"),
        ({"max_offences": 0}, "max_offences"),
        ({"quorum": 0.0}, "quorum"),
        ({"max_weight_share": 0.0}, "max_weight_share"),
        ({"max_weight_share": math.nan}, "max_weight_share"),
        ({"quorum": 1.5}, "quorum"),
        ({"quorum": math.nan}, "quorum"),
        ({"insecure": True}, "insecure"),
    ):
        with pytest.raises(FieldError, match=words):
            check_server(_secure(**network))
    for section, values in (
        ("exchange", {"exchange": "none"}),
        ("exchange", {"aggregate": "two_phase"}),
        ("exchange", {"uplink": "auto"}),
        ("run", {"chaos": "nan=0.1"}),
        ("local", {"side_by_side": 2}),
        ("personal", {"algorithm": "fedbat"}),
    ):
        config = replace(_secure(), **{section: replace(getattr(_secure(), section), **values)})
        with pytest.raises(FieldError):
            check_server(config)


def test_settings_of_a_client_are_checked() -> None:
    good = ClientConfig(insecure=True, number=0)
    check_client(good)
    for changed, words in (
        ({"number": None}, "number"),
        ({"number": -1}, "number"),
        ({"connect": "10.0.0.1:5"}, "insecure"),
        ({"connect": "nowhere"}, "connect"),
        ({"exchange": "none"}, "exchange"),
        ({"give_up_after": 0.0}, "give_up_after"),
        ({"uplink": "int4", "quantization": True}, "uplink"),
        ({"certs": Path("x")}, "insecure"),
    ):
        with pytest.raises(FieldError, match=words):
            check_client(replace(good, **changed))

"""Clients that are here and say nothing cost one timeout; a quorum closes a round."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Mapping, Sequence

import pytest
import torch
from torch import nn

from fedq import waiting
from fedq.federated.aggregate import why_left_out
from fedq.federated.training import RoundContext
from fedq.layout import Layout, LayoutSchedule
from fedq.network.hub import Hub, Refused, Terms
from fedq.network.settings import NetworkConfig
from fedq.waiting import Pace
from fedq.wire import Frame, Kind, Message

MODEL = nn.Linear(4, 3)
LAYOUT = Layout.of(MODEL, "fp32")
HELLO = {"kind": "hello", "run": "a run", "uplink": "fp32", "feedback": False, "num_examples": 5}


def _hub(num_clients: int = 3, **network: float) -> Hub:
    federation = Terms(
        run="a run",
        num_clients=num_clients,
        cohort_size=num_clients,
        min_cohort=1,
        shares={},
        shares_held=[5] * num_clients,
        layout=LAYOUT,
        schedule=lambda spec, feedback: LayoutSchedule.of(MODEL, spec, feedback=feedback),
        network=NetworkConfig(**{"round_timeout": 0.4, "join_timeout": 0.2, **network}),  # type: ignore[arg-type]
    )
    hub = Hub(federation)
    hub.catch_up.publish(0, LAYOUT.flatten(MODEL))
    for number in range(num_clients):
        hub.arrived(hub.admit(number, HELLO))
    return hub


def _answer(hub: Hub, number: int) -> None:
    record = hub.records[number]
    if record.task is None:
        raise Refused("the round is over")
    body = torch.zeros(4 * LAYOUT.numel, dtype=torch.uint8)
    frame = Frame(Kind.UPDATE, record.task.round, number, LAYOUT.hash, 0, 5.0, 1.0, 0.5, body)
    hub.accept(record, Message(frame, LAYOUT, record.task.sequence))


async def _round(hub: Hub, number: int, answers: Sequence[int], breaks: Sequence[int] = ()) -> Mapping[int, str]:
    """Play a round in which some answer, one after another, and some break the rules first; return how all did."""
    running = asyncio.create_task(hub.run_round(RoundContext(number, 0.1, 0)))
    await asyncio.sleep(0.01)
    for one in breaks:
        hub.offend(hub.records[one], ValueError("odd"))
    for one in answers:
        try:
            _answer(hub, one)
        except Refused:
            continue
        await asyncio.sleep(0.01)
    messages = await running
    return {m.frame.client: "ok" if m.frame.kind == Kind.UPDATE else why_left_out(m.frame) for m in messages}


def test_a_silent_client_costs_one_timeout_until_it_answers() -> None:
    hub = _hub()

    async def play() -> list[Mapping[int, str]]:
        said = [[0, 1], [0, 1], [1, 0], [2, 0, 1], [0, 1], [0, 1]]
        return [await _round(hub, number, answers) for number, answers in enumerate(said)]

    ends = asyncio.run(play())
    assert all(end[0] == end[1] == "ok" for end in ends)
    whole, not_awaited = "no answer within 0.4 s", "no answer; since it was silent"
    assert [end[2][:22] if end[2] == whole else end[2][:30] for end in ends] == [
        *(whole, not_awaited, not_awaited, "ok"),
        *(whole, not_awaited),
    ]


def test_where_all_are_silent_all_are_awaited() -> None:
    hub = _hub(2)

    async def play() -> list[Mapping[int, str]]:
        return [await _round(hub, number, answers) for number, answers in enumerate([[], [], [0]])]

    ends = asyncio.run(play())
    assert [end[1] for end in ends] == ["no answer within 0.4 s"] * 3
    assert ends[2][0] == "ok"


def test_a_silent_client_that_answers_soon_after_the_others_is_taken() -> None:
    hub = _hub(2, round_timeout=1.0)

    async def play() -> Mapping[int, str]:
        await _round(hub, 0, [0])
        running = asyncio.create_task(hub.run_round(RoundContext(1, 0.1, 0)))
        await asyncio.sleep(0.3)
        _answer(hub, 0)  # the round waits for as long again
        await asyncio.sleep(0.01)
        _answer(hub, 1)
        return {message.frame.client: message.frame.kind.name for message in await running}

    assert asyncio.run(play()) == {0: "UPDATE", 1: "UPDATE"}
    assert not hub.records[1].is_silent


@pytest.mark.parametrize(("quorum", "needed"), [(0.5, 2), (0.75, 3), (0.2, 1)])
def test_a_quorum_closes_a_round(quorum: float, needed: int) -> None:
    hub = _hub(4, quorum=quorum, round_timeout=30)
    end = asyncio.run(_round(hub, 0, [3, 2, 1, 0]))
    words = f"no answer before the quorum of {needed} had answered"
    assert end == {number: "ok" if number > 3 - needed else words for number in range(4)}
    assert not any(record.is_silent for record in hub.records.values())
    assert needed == math.ceil(4 * quorum)


def test_whoever_breaks_the_rules_is_no_part_of_a_quorum() -> None:
    hub = _hub(4, quorum=0.5, round_timeout=30)
    end = asyncio.run(_round(hub, 0, [2, 3], breaks=[0, 1]))
    assert end == {0: "refused: odd", 1: "refused: odd", 2: "ok", 3: "ok"}


def test_a_server_says_for_whom_it_waits(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Of four clients two are here and one of these answers; 0.25 s of joining, then two are enough."""
    monkeypatch.setattr(waiting, "PACE", Pace(0.05, 60.0))
    monkeypatch.setattr("fedq.network.hub._TRAINING_S", 0.05)
    caplog.set_level(logging.INFO, "fedq.network.hub")
    hub = _hub(4, join_timeout=0.25, round_timeout=0.4)
    for number in (1, 3):
        hub.records[number].is_connected, hub.records[number].lost_at = False, -math.inf

    async def play() -> None:
        running = asyncio.create_task(hub.run_round(RoundContext(0, 0.1, 0)))
        while hub.context is None:
            await asyncio.sleep(0.01)
        _answer(hub, 0)
        await running

    asyncio.run(play())
    waits = [record.message for record in caplog.records if record.message.startswith("waiting for ")]
    assert waits[0].startswith("waiting for clients 1 and 3 (2 of 4 are here; 1 would do in 0 s): 0 s so far")
    assert waits[1].startswith("waiting for answers of client 2 in round 1: 0 s so far, for 0 s more")
    assert len(waits) == 2

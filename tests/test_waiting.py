"""Waits speak in time, say how long they last, and never more often than they should."""

from __future__ import annotations

import math
import threading

import pytest

from fedq.waiting import Pace, Wait, named, speaking


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_lines_come_after_5_s_and_then_each_minute() -> None:
    clock, said = Clock(), []
    names = iter("abcd")
    wait = Wait(lambda: next(names), 200.0, say=said.append, hints=("x=1 is set",), heading="rank 3: ", clock=clock)
    due = []
    for second in range(200):
        clock.now = 100.0 + second
        before = len(said)
        wait.look()
        due += [second] * (len(said) - before)
    assert due == [5, 65, 125, 185]
    assert said[0] == "rank 3: waiting for a: 5 s so far, for 195 s more; x=1 is set"
    assert said[1] == "rank 3: waiting for b: 65 s so far, for 135 s more; x=1 is set"


def test_a_wait_knows_what_is_left() -> None:
    clock = Clock()
    wait = Wait(lambda: "it", 10.0, clock=clock)
    assert (wait.left_s, wait.quiet_s) == (10.0, 5.0)
    clock.now += 12
    assert (wait.left_s, wait.quiet_s) == (0.0, 0.0)
    endless = Wait(lambda: "it", clock=clock)
    assert endless.left_s == math.inf
    assert endless.line() == "waiting for it: 0 s so far"


def test_a_thread_speaks_for_a_body_that_is_stuck_and_is_gone_afterwards() -> None:
    said, heard = [], threading.Event()

    def say(line: str) -> None:
        said.append(line)
        if len(said) == 2:
            heard.set()

    num_threads = threading.active_count()
    with speaking(Wait(lambda: "a lock", say=say, pace=Pace(0.0, 0.0))):
        assert heard.wait(60)
    assert said[0].startswith("waiting for a lock: ")
    assert threading.active_count() == num_threads


def test_a_short_wait_is_silent() -> None:
    said: list[str] = []
    with speaking(Wait(lambda: "it", say=said.append)) as wait:
        wait.look()
    assert said == []


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([], "ranks "),
        ([3], "rank 3"),
        ([1, 2], "ranks 1 and 2"),
        ([0, 1, 5], "ranks 0, 1 and 5"),
        (range(100), "ranks 0, 1, 2, 3, 4, 5, 6, 7 and 92 more"),
    ],
)
def test_numbers_in_words(given: list[int], words: str) -> None:
    assert named("rank", given) == words

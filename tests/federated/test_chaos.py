"""Faults on purpose: what the text means, and whom they hit."""

from __future__ import annotations

import math
import multiprocessing
import signal
import time

import pytest
import torch

from fedq.errors import FieldError
from fedq.federated.chaos import Chaos, ChaosError, chaos


def test_the_text_gives_every_field() -> None:
    assert chaos("kill=0.02,nan=0.01,fail=0.5,slow=0.05,slow_s=3,seed=7", start=2) == Chaos(
        kill=0.02, nan=0.01, fail=0.5, slow=0.05, slow_s=3.0, seed=7, start=2
    )
    assert chaos("") == Chaos()
    assert chaos("nan=1") == Chaos(nan=1.0)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("kil=0.1", r"chaos='kil'.*did you mean 'kill'"),
        ("start=1", "chaos='start'"),
        ("nan=2", "chaos:nan='2'.*probability from 0 to 1"),
        ("nan=-0.1", "chaos:nan='-0.1'.*probability"),
        ("fail=nan", "chaos:fail='nan'.*probability"),
        ("slow=often", "chaos:slow='often'.*number"),
        ("seed=1.5", "chaos:seed='1.5'.*number"),
        ("slow=1,slow_s=-1", "chaos:slow_s='-1'.*seconds"),
        ("slow=1,slow_s=nan", "chaos:slow_s='nan'.*seconds"),
        ("kill", "kill"),
    ],
)
def test_what_cannot_be_used_is_named(text: str, named: str) -> None:
    with pytest.raises(FieldError, match=named):
        chaos(text)


def hit_by(faults: Chaos, round: int, client: int) -> tuple[bool, bool]:
    """Whether a client fails, and whether its update has a NaN."""
    failed, update = False, torch.zeros(50)
    try:
        faults.strike_client(round, client)
    except ChaosError as error:
        failed = f"client {client} fails on purpose in round {round}" in str(error)
    faults.spoil(update, round, client)
    assert int(update.isnan().sum()) <= 1
    assert int((update == 0).sum()) >= 49
    return failed, bool(update.isnan().any())


def test_rates_are_what_was_asked_for() -> None:
    faults, num = chaos("nan=0.1,fail=0.3,seed=5"), 4000
    hits = [hit_by(faults, i // 40, i % 40) for i in range(num)]
    for share, rate in zip((sum(x) / num for x in zip(*hits, strict=True)), (0.3, 0.1), strict=True):
        assert abs(share - rate) < 4.5 * math.sqrt(rate * (1 - rate) / num)  # chance below 1e-5, and the seed is fixed
    both = sum(failed and spoilt for failed, spoilt in hits) / num
    assert abs(both - 0.03) < 4.5 * math.sqrt(0.03 * 0.97 / num), "faults are drawn apart"


@pytest.mark.parametrize(("rate", "hit"), [(0.0, False), (1.0, True)])
def test_never_and_always(rate: float, hit: bool) -> None:
    faults = Chaos(nan=rate, fail=rate)
    assert {hit_by(faults, r, c) for r in range(10) for c in range(10)} == {(hit, hit)}


def test_draws_follow_from_seed_round_and_client_alone() -> None:
    """Neither what was drawn before nor how often the run was started matters, so where a client runs cannot."""
    grid = [(r, c) for r in range(12) for c in range(12)]
    first = {at: hit_by(chaos("nan=0.3,fail=0.3,seed=1"), *at) for at in grid}
    again = {at: hit_by(chaos("nan=0.3,fail=0.3,seed=1", start=4), *at) for at in reversed(grid)}
    assert first == again
    assert first != {at: hit_by(chaos("nan=0.3,fail=0.3,seed=2"), *at) for at in grid}


def test_a_slow_client_sleeps_as_long_as_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    for client in range(200):
        chaos("slow=0.25,slow_s=7.5,seed=3").strike_client(0, client)
    assert set(slept) == {7.5}
    assert 20 <= len(slept) <= 80  # 50 expected, sigma 6


def struck(faults: Chaos) -> list[int]:
    """The rounds, of eight, in which rank 1 is killed."""
    killed: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.kill", lambda pid, number: killed.append(number))
        rounds = []
        for number in range(8):
            before = len(killed)
            faults.strike_rank(number, 1)
            rounds += [number] * (len(killed) - before)
    assert set(killed) <= {signal.SIGKILL}
    return rounds


def test_kills_depend_on_the_start() -> None:
    """Or a run could never get past one."""
    rounds = [tuple(struck(chaos("kill=0.3,seed=1", start=start))) for start in range(6)]
    assert rounds == [tuple(struck(chaos("kill=0.3,seed=1", start=start))) for start in range(6)]
    assert len(set(rounds)) > 3
    assert 3 <= sum(map(len, rounds)) <= 27  # 48 draws at 0.3: 14 expected, sigma 3
    assert struck(chaos("kill=0")) == []
    assert struck(chaos("kill=1")) == list(range(8))


def test_a_kill_is_a_kill() -> None:
    process = multiprocessing.get_context("forkserver").Process(target=Chaos(kill=1.0).strike_rank, args=(0, 0))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL

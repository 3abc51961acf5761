"""No client whose weight nobody else knows counts for more than its share of a mean."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from federation import Federation, Puppet, answer_properly, federation
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fedq.federated.aggregate import Aggregate, aggregate
from fedq.federated.limits import NormLimit, WeightLimit
from fedq.federated.parts import Parts
from fedq.layout import Layout
from fedq.wire import Frame, Kind, join_payloads

LAYOUT = Layout.of(nn.Linear(3, 2), "fp32")


def _lowered(weights: Mapping[int, float], own: frozenset[int], cap: float) -> dict[int, float]:
    return {client: min(weight, cap) if client in own else weight for client, weight in weights.items()}


def _by_bisection(weights: Mapping[int, float], own: frozenset[int], share: float) -> dict[int, float]:
    """Return the weights under the highest cap with which no share of one's own is too large."""
    low, high = min(weights.values()), max(weights.values())
    for _ in range(200):
        cap = (low + high) / 2
        lowered = _lowered(weights, own, cap)
        if max(lowered[client] for client in own) <= share * sum(lowered.values()):
            low = cap
        else:
            high = cap
    return _lowered(weights, own, low)


WEIGHTS = st.dictionaries(st.integers(0, 9), st.integers(1, 1 << 40).map(float), min_size=3)


@given(WEIGHTS, st.sets(st.integers(0, 9)), st.floats(0.05, 1.0))
def test_who_says_too_much_counts_as_the_heaviest_other(weights: dict[int, float], own: set[int], share: float) -> None:
    clients = frozenset(own)
    cut = WeightLimit(share, clients).cut(weights)
    assert set(cut) <= clients & set(weights)
    now = weights | cut
    assert all(min(weights.values()) <= now[client] <= weights[client] for client in weights)
    mine = clients & set(weights)
    if not mine or max(weights[client] for client in mine) <= share * sum(weights.values()):
        assert cut == {}
        return
    just_allowed = _by_bisection(weights, mine, share)
    disbelieved = {client for client in mine if just_allowed[client] < weights[client] * (1 - 1e-9)}
    heaviest = max((weight for client, weight in weights.items() if client not in disbelieved), default=0.0)
    for client in weights:
        limit = max(min(just_allowed[client], heaviest), min(weights.values()))
        assert now[client] == pytest.approx(limit if client in disbelieved else weights[client], rel=1e-6)


def test_of_two_nobody_is_cut() -> None:
    assert WeightLimit(0.5, frozenset({0, 1})).cut({0: 1.0, 1: 1e12}) == {}


def _frame(client: int, value: float, weight: float) -> Frame:
    body = join_payloads(LAYOUT, LAYOUT.encode(torch.full((LAYOUT.numel,), value), seed=0))
    return Frame(Kind.UPDATE, 0, client, LAYOUT.hash, 0, weight, 1.0, 0.5, body)


def _mean(*frames: Frame, share: float = 0.5, norm_limit: NormLimit | None = None) -> Aggregate:
    limit = WeightLimit(share, frozenset(range(10)))
    parts = Parts([limit] if norm_limit is None else [norm_limit, limit])
    return aggregate(LAYOUT, frames, torch.device("cpu"), parts=parts)


def test_the_mean_is_that_of_the_weights_that_count() -> None:
    outcome = _mean(_frame(0, 1.0, 10), _frame(1, 1.0, 20), _frame(2, 1.0, 30), _frame(3, -1.0, float(1 << 40)))
    assert outcome.mean is not None
    torch.testing.assert_close(outcome.mean, torch.full((LAYOUT.numel,), 1 / 3))
    assert outcome.cut == {3: 30.0}
    assert outcome.clipped == {3: "weight cut from 1.09951e+12 to 30"}


def test_an_update_that_is_left_out_lends_nobody_its_weight() -> None:
    partner = _frame(4, math.nan, float(1 << 40))
    outcome = _mean(_frame(0, 1.0, 10), _frame(1, 1.0, 10), _frame(2, -1.0, float(1 << 40)), partner)
    assert outcome.mean is not None
    torch.testing.assert_close(outcome.mean, torch.full((LAYOUT.numel,), 1 / 3))
    assert outcome.cut == {2: 10.0}
    assert set(outcome.left_out) == {4}


def test_both_limits_are_said() -> None:
    frames = [_frame(0, 1.0, 10), _frame(1, 1.0, 10), _frame(2, 100.0, 1000)]
    outcome = _mean(*frames, norm_limit=NormLimit(2.0))
    assert outcome.clipped == {2: "norm clipped to 0.02 of itself, weight cut from 1000 to 10"}


@pytest.fixture
def fed(tmp_path: Path):
    with federation(tmp_path) as fed:
        yield fed


@pytest.mark.slow
def test_the_model_moves_as_the_honest_want(fed: Federation) -> None:
    """Three add .001 to every parameter in each of three rounds, one of 2^20 examples takes as much away."""
    flags = ("--clients", "4", "--rounds", "3", "--uplink", "fp32", "--downlink", "fp32")
    server = fed.server(*flags)
    server.until_it_says("listening")
    steps = [(50, 0.001), (50, 0.001), (50, 0.001), (1 << 20, -0.001)]
    models: list[torch.Tensor] = []

    def act(connection, state, message, text) -> None:
        models.append(state.replica.clone())
        answer_properly(connection, state, message, text)

    puppets = [
        Puppet(fed, number, None if number else act, examples=num, step=step)
        for number, (num, step) in enumerate(steps)
    ]
    said = server.ends_well()
    for puppet in puppets:
        puppet.join(30)
    statuses = fed.statuses()
    assert {statuses[round, 3] for round in range(3)} == {"weight cut from 1.04858e+06 to 50"}
    assert [row["num_examples"] for row in fed.rows() if row["client"] == 3] == [50] * 3
    assert "round 0: client 3: weight cut" in said
    moved = models[2] - models[0]
    torch.testing.assert_close(moved, torch.full_like(moved, 2 * (3 * 0.001 - 0.001) / 4), rtol=0, atol=1e-6)


@pytest.mark.slow
def test_own_data_is_taken_only_where_the_server_says_so(fed: Federation) -> None:
    server = fed.server("--no-accept-own-data", "--clients", "1", "--rounds", "1", "--join-timeout", "600")
    server.until_it_says("listening")
    puppet = Puppet(fed, 0)
    puppet.join(60)
    assert "--accept-own-data" in str(puppet.outcome)
    server.kill()

"""Who trains where, and whole rounds in one process against the same steps done by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fedq.collectives import Transport
from fedq.data import Split
from fedq.engines.precision import Precision
from fedq.federated.client import Client, LocalTraining, RoundContext, Trained
from fedq.federated.downlink import DownlinkCost
from fedq.federated.optim import server_optimizer
from fedq.federated.rounds import FederatedRounds, RoundResult, assign, sample_cohort
from fedq.federated.server import Server
from fedq.feedback import NoFeedback
from fedq.layout import Layout, LayoutSchedule
from fedq.ledger import Ledger
from fedq.wire import HEADER_NBYTES, Frame, Kind

# ---- who ----


@given(st.integers(1, 30), st.data())
def test_a_cohort_is_drawn_without_replacement(num_clients: int, data: st.DataObject) -> None:
    size, seed = data.draw(st.integers(1, num_clients)), data.draw(st.integers(0, 99))
    cohort = sample_cohort(num_clients, size, seed=seed, round=3)
    assert cohort == sorted(set(cohort))
    assert len(cohort) == size
    assert set(cohort) <= set(range(num_clients))
    assert cohort == sample_cohort(num_clients, size, seed=seed, round=3)


def test_every_client_is_drawn_equally_often() -> None:
    draws = [tuple(sample_cohort(8, 3, seed=1, round=r)) for r in range(2000)]
    counts = np.bincount(np.concatenate(draws), minlength=8)
    sigma = np.sqrt(2000 * 3 / 8 * 5 / 8)
    assert np.abs(counts - 750).max() < 4.5 * sigma  # chance below 1e-4, and the seed is fixed
    assert draws != [tuple(sample_cohort(8, 3, seed=2, round=r)) for r in range(2000)]


@given(st.sets(st.integers(0, 40), min_size=1).map(sorted), st.integers(1, 5))
def test_shares_cover_the_cohort_once(cohort: list[int], world_size: int) -> None:
    for sticky in (True, False):
        shares = assign(cohort, world_size, sticky=sticky)
        assert len(shares) == world_size
        assert sorted(sum(shares, start=[])) == cohort  # noqa: RUF017
    sizes = [len(share) for share in assign(cohort, world_size, sticky=False)]
    assert max(sizes) - min(sizes) <= 1
    for rank, share in enumerate(assign(cohort, world_size, sticky=True)):
        assert all(client % world_size == rank for client in share)


def test_a_rounds_loss_is_a_mean_over_examples() -> None:
    def frame(weight: float, loss: float) -> Frame:
        return Frame(Kind.UPDATE, 0, 0, 0, 0, weight, loss, loss / 10, torch.empty(0, dtype=torch.uint8))

    result = RoundResult([(0, frame(30.0, 2.0)), (1, frame(10.0, 6.0))], {})
    assert result.train_loss == pytest.approx(3.0)
    assert result.train_accuracy == pytest.approx(0.3)
    assert np.isnan(RoundResult().train_loss)


# ---- rounds in one process ----

SIZES = (6, 20, 14)


class Scripted(Client):
    """A client whose update is a given constant."""

    def train(self, replica: Tensor, context: RoundContext) -> Trained:
        return Trained(replica + UPDATES[self.number], 1.0, 0.5, 1)


UPDATES = {0: 1.0, 1: -0.5, 2: 2.0}


def rounds_of(uplink: str = "fp32", downlink: str = "fp32", cohort: int = 3, observe=None) -> FederatedRounds:
    torch.manual_seed(0)
    model = nn.Linear(64, 8)
    up, down = Layout.of(model, uplink), Layout.of(model, downlink)
    replica, ledger = torch.zeros(up.numel), Ledger()
    split = Split(torch.empty(0, 1, 8, 8, dtype=torch.uint8), torch.empty(0, dtype=torch.int64))
    precision = Precision("fp32", "cpu", channels_last=False)
    local = LocalTraining(model, up, split, (0.0,), (1.0,), lambda p, lr: torch.optim.SGD(p, lr), precision)
    return FederatedRounds(
        transport=Transport(),
        clients={
            i: Scripted(i, torch.arange(n), local, LayoutSchedule.always(up), NoFeedback()) for i, n in enumerate(SIZES)
        },
        server=Server(replica, down, lambda params: server_optimizer("fedavg", params)),
        uplink=LayoutSchedule.always(up),
        downlink=down,
        replica=replica,
        ledger=ledger,
        downlink_cost=DownlinkCost(ledger, down, "cohort", len(SIZES)),
        cohort_size=cohort,
        sticky=False,
        observe=observe,
    )


def test_a_round_adds_the_weighted_mean_of_its_cohort() -> None:
    rounds, expected = rounds_of(cohort=2), 0.0
    for number in range(5):
        result = rounds.run(RoundContext(number, 0.1, 7))
        cohort = sample_cohort(3, 2, seed=7, round=number)
        expected += np.average([UPDATES[c] for c in cohort], weights=[SIZES[c] for c in cohort])
        assert [(rank, frame.client, frame.round) for rank, frame in result.frames] == [(0, c, number) for c in cohort]
        # one rounding in the mean and one in the sum, each round, of values below 16
        torch.testing.assert_close(rounds.replica, torch.full_like(rounds.replica, expected), rtol=0, atol=1e-5)
    assert rounds.ledger.totals().wire == 0, "nothing crosses ranks when there is one"


def test_bytes_up_and_down_follow_the_layout() -> None:
    rounds = rounds_of("int4", "int8")
    for number in range(3):
        rounds.run(RoundContext(number, 0.1, 7))
    up, down, raw = rounds.ledger.totals("uplink"), rounds.ledger.totals("downlink"), 4 * rounds.uplink.at(0).numel
    assert up.payload == 9 * (rounds.uplink.at(0).fixed_nbytes + HEADER_NBYTES)
    assert up.raw == 9 * raw
    # three newcomers take the whole model, then everyone misses one change a round
    assert down.payload == 3 * raw + 6 * (rounds.downlink.fixed_nbytes + HEADER_NBYTES)
    assert down.raw == 9 * raw


def test_a_client_that_is_not_finite_is_named_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(UPDATES, 1, float("nan"))
    rounds = rounds_of()
    result = rounds.run(RoundContext(0, 0.1, 7))
    assert result.left_out == {1: "update is not finite"}
    mean = (6 * 1.0 + 14 * 2.0) / 20
    torch.testing.assert_close(rounds.replica, torch.full_like(rounds.replica, mean), rtol=1e-6, atol=0)
    assert (
        rounds.ledger.totals("uplink").payload == 2 * (rounds.uplink.at(0).fixed_nbytes + HEADER_NBYTES) + HEADER_NBYTES
    )


def test_a_round_without_a_usable_update_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = rounds_of()
    rounds.run(RoundContext(0, 0.1, 7))
    replica, master = rounds.replica.clone(), rounds.server.master.clone()
    down = rounds.ledger.totals("downlink").payload
    for client in UPDATES:
        monkeypatch.setitem(UPDATES, client, float("inf"))
    assert sorted(rounds.run(RoundContext(1, 0.1, 7)).left_out) == [0, 1, 2]
    down_of_round_1 = rounds.ledger.totals("downlink").payload - down
    assert torch.equal(rounds.replica, replica)
    assert torch.equal(rounds.server.master, master)
    rounds.run(RoundContext(2, 0.1, 7))
    assert down_of_round_1 == 3 * min(4 * rounds.downlink.numel, rounds.downlink.fixed_nbytes + HEADER_NBYTES)
    assert rounds.ledger.totals("downlink").payload == down + down_of_round_1, "there was no change to download"


def test_the_observer_sees_every_update_with_its_frame() -> None:
    seen = []
    rounds = rounds_of("int8", observe=lambda *what: seen.append(what))
    context = RoundContext(0, 0.1, 7)
    frames = [frame for _, frame in rounds.run(context).frames]
    assert [(c, client) for c, client, _, _ in seen] == [(context, 0), (context, 1), (context, 2)]
    for (_, client, update, frame), received in zip(seen, frames, strict=True):
        assert bool((update == UPDATES[client]).all())
        assert torch.equal(frame.pack(), received.pack())


def test_a_frame_survives_the_trip() -> None:
    frame = replace(rounds_of("int4").run(RoundContext(2, 0.1, 7)).frames[1][1])
    again = Frame.unpack(frame.pack())
    assert torch.equal(again.body, frame.body)
    assert replace(again, body=frame.body) == frame


def test_a_scheduled_codec_serves_from_its_round_on() -> None:
    torch.manual_seed(0)
    model = nn.Linear(64, 8)
    schedule = LayoutSchedule.of(model, "fp32 int4@3", feedback=False)
    plain, coded = Layout.of(model, "fp32"), Layout.of(model, "int4")
    assert [schedule.at(number).hash for number in range(5)] == [plain.hash] * 2 + [coded.hash] * 3
    rounds = rounds_of()
    rounds.uplink = schedule
    rounds.clients = {i: replace(client, uplink=schedule) for i, client in rounds.clients.items()}
    sizes = []
    for number in range(4):
        before = rounds.ledger.totals("uplink").payload
        rounds.run(RoundContext(number, 0.1, 7))
        sizes.append((rounds.ledger.totals("uplink").payload - before) // 3 - HEADER_NBYTES)
    assert sizes == [plain.fixed_nbytes] * 2 + [coded.fixed_nbytes] * 2


def test_residuals_shrink_with_every_round_that_a_client_misses() -> None:
    rounds = rounds_of("sign", cohort=1)
    assert rounds._memory(0, RoundContext(9, 0.1, 7)) == 1.0
    rounds.residual_memory = 0.5
    cohorts = [sample_cohort(3, 1, seed=7, round=number) for number in range(12)]
    for number in range(1, 12):
        for client in range(3):
            seen = [r for r in range(number) if client in cohorts[r]]
            missed = number - 1 - seen[-1] if seen else number
            assert rounds._memory(client, RoundContext(number, 0.1, 7)) == 0.5**missed

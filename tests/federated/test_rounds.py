"""Who trains where, and whole rounds in one process against the same steps done by hand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fedq.codecs import Payload
from fedq.collectives import Transport
from fedq.data import Split
from fedq.engines.precision import Precision
from fedq.federated.aggregate import Updates
from fedq.federated.assembly import RoundSettings, Seats, make_rounds, over_ranks
from fedq.federated.client import Client
from fedq.federated.cohort import assign, sample_cohort
from fedq.federated.image_training import LocalTraining
from fedq.federated.parts import Part
from fedq.federated.rounds import Outcome, Rounds
from fedq.federated.training import OnExamples, RoundContext, Trained
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

    result = Outcome([(0, frame(30.0, 2.0)), (1, frame(10.0, 6.0))], {})
    assert result.train_loss == pytest.approx(3.0)
    assert result.train_accuracy == pytest.approx(0.3)
    assert np.isnan(Outcome().train_loss)


# ---- rounds in one process ----

SIZES = (6, 20, 14)


class Scripted(Client):
    """A client whose update is a given constant."""

    def train(self, replica: Tensor, context: RoundContext) -> Trained:
        return Trained(replica + UPDATES[self.number], 1.0, 0.5, 1)


UPDATES = {0: 1.0, 1: -0.5, 2: 2.0}


class Seen(Part):
    """Keeps what it is told of each update."""

    def __init__(self) -> None:
        self.updates: list[tuple[RoundContext, int, Tensor, Frame]] = []

    def after_encoding(self, context: RoundContext, client: Client, update: Tensor, frame: Frame) -> None:
        self.updates.append((context, client.number, update, frame))


def rounds_of(uplink: str = "fp32", downlink: str = "fp32", cohort: int = 3, **settings) -> Rounds:
    torch.manual_seed(0)
    model = nn.Linear(64, 8)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    split = Split(torch.empty(0, 1, 8, 8, dtype=torch.uint8), torch.empty(0, dtype=torch.int64))
    precision, layout = Precision("fp32", "cpu", channels_last=False), Layout.of(model, "fp32")
    local = LocalTraining(model, layout, split, (0.0,), (1.0,), lambda p, lr: torch.optim.SGD(p, lr), precision)
    parts, chosen = (
        settings.pop("parts", ()),
        RoundSettings(uplink, downlink, cohort=cohort, **({"feedback": "off"} | settings)),
    )

    def client(number: int) -> Scripted:
        return Scripted(OnExamples(local, torch.arange(SIZES[number])), num_examples=SIZES[number])

    transport, ledger = Transport(), Ledger()
    delivery = over_ranks(model, chosen, Seats(3, client, model, chosen, None), transport, ledger, sticky=False)
    return make_rounds(model, chosen, delivery, parts=parts, transport=transport)


def test_a_round_adds_the_weighted_mean_of_its_cohort() -> None:
    rounds, expected = rounds_of(cohort=2), 0.0
    for number in range(5):
        result = rounds.run(RoundContext(number, 0.1, 7))
        cohort = sample_cohort(3, 2, seed=7, round=number)
        expected += np.average([UPDATES[c] for c in cohort], weights=[SIZES[c] for c in cohort])
        assert [(rank, frame.client, frame.round) for rank, frame in result.frames] == [(0, c, number) for c in cohort]
        # one rounding in the mean and one in the sum, each round, of values below 16
        torch.testing.assert_close(rounds.replica, torch.full_like(rounds.replica, expected), rtol=0, atol=1e-5)
    assert rounds.delivery.ledger.totals().wire == 0, "nothing crosses ranks when there is one"


def test_bytes_up_and_down_follow_the_layout() -> None:
    rounds = rounds_of("int4", "int8")
    for number in range(3):
        rounds.run(RoundContext(number, 0.1, 7))
    up, down, raw = (
        rounds.delivery.ledger.totals("uplink"),
        rounds.delivery.ledger.totals("downlink"),
        4 * rounds.delivery.uplink.at(0).numel,
    )
    assert up.payload == 9 * (rounds.delivery.uplink.at(0).fixed_nbytes + HEADER_NBYTES)
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
    sent = rounds.delivery.uplink.at(0).fixed_nbytes + HEADER_NBYTES
    assert rounds.delivery.ledger.totals("uplink").payload == 2 * sent + HEADER_NBYTES


def test_a_round_without_a_usable_update_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = rounds_of()
    rounds.run(RoundContext(0, 0.1, 7))
    replica, master = rounds.replica.clone(), rounds.server.master.clone()
    down = rounds.delivery.ledger.totals("downlink").payload
    for client in UPDATES:
        monkeypatch.setitem(UPDATES, client, float("inf"))
    assert sorted(rounds.run(RoundContext(1, 0.1, 7)).left_out) == [0, 1, 2]
    down_of_round_1 = rounds.delivery.ledger.totals("downlink").payload - down
    assert torch.equal(rounds.replica, replica)
    assert torch.equal(rounds.server.master, master)
    rounds.run(RoundContext(2, 0.1, 7))
    assert down_of_round_1 == 3 * min(4 * rounds.downlink.numel, rounds.downlink.fixed_nbytes + HEADER_NBYTES)
    assert rounds.delivery.ledger.totals("downlink").payload == down + down_of_round_1, (
        "there was no change to download"
    )


def test_the_observer_sees_every_update_with_its_frame() -> None:
    seen = Seen()
    rounds = rounds_of("int8", parts=[seen])
    context = RoundContext(0, 0.1, 7)
    frames = [frame for _, frame in rounds.run(context).frames]
    assert [(c, client) for c, client, _, _ in seen.updates] == [(context, 0), (context, 1), (context, 2)]
    for (_, client, update, frame), received in zip(seen.updates, frames, strict=True):
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
    rounds = rounds_of("fp32 int4@3")
    sizes = []
    for number in range(4):
        before = rounds.delivery.ledger.totals("uplink").payload
        rounds.run(RoundContext(number, 0.1, 7))
        sizes.append((rounds.delivery.ledger.totals("uplink").payload - before) // 3 - HEADER_NBYTES)
    assert sizes == [plain.fixed_nbytes] * 2 + [coded.fixed_nbytes] * 2


def test_residuals_shrink_with_every_round_that_a_client_misses() -> None:
    """The share that counts is what the feedback is told when the client encodes."""
    told: list[tuple[int, int, float]] = []

    class Told:
        def encode(self, owner: int, layout: Layout, flat: Tensor, *, seed: int, memory: float = 1.0) -> list[Payload]:
            told.append((round_now, owner, memory))
            return layout.encode(flat, seed=seed)

    rounds = rounds_of("sign", cohort=1, feedback="auto:memory=0.5")
    for client in rounds.delivery.clients.values():
        client.feedback = Told()
    cohorts = [sample_cohort(3, 1, seed=7, round=number) for number in range(12)]
    for round_now in range(12):
        rounds.run(RoundContext(round_now, 0.1, 7))
    for number, client, memory in told:
        seen = [r for r in range(number) if client in cohorts[r]]
        missed = number - 1 - seen[-1] if seen else number
        assert memory == 0.5**missed
    assert len(told) == 12
    assert len({memory for _, _, memory in told}) > 2


class Median(Part):
    """A robust mean as a part: the coordinate-wise median."""

    def mean(self, context: RoundContext, updates: Updates, weights: Mapping[int, float]) -> Tensor:
        return torch.stack([updates.decoded(frame) for frame in updates.kept()]).median(dim=0).values


class Noted(Part):
    """Writes down the moments that it is told of."""

    def __init__(self) -> None:
        self.moments: list[str] = []

    def before_training(self, context: RoundContext, client: Client) -> None:
        self.moments.append(f"train {client.number}")

    def after_training(self, context: RoundContext, client: Client, trained: Trained) -> None:
        self.moments.append(f"trained {client.number} {trained.loss}")

    def before_encoding(self, context: RoundContext, client: Client, update: Tensor) -> None:
        self.moments.append(f"encode {client.number}")
        update *= 2

    def before_exchange(self, context: RoundContext, rank: int) -> None:
        self.moments.append(f"exchange {rank}")

    def before_mean(self, context: RoundContext, updates: Updates) -> None:
        self.moments.append(f"mean of {len(updates.kept())}")
        updates.leave_out(2, "it is two")
        updates.scale(0, 0.5, "halved")

    def weights(self, context: RoundContext, weights: Mapping[int, float]) -> Mapping[int, float]:
        return {1: 6.0}

    def after_mean(self, context: RoundContext, mean: Tensor) -> None:
        self.moments.append(f"averaged {float(mean[0])}")
        mean += 1


def test_a_part_is_told_at_every_moment_and_may_change_what_it_is_given() -> None:
    noted = Noted()
    rounds = rounds_of(parts=[noted])
    outcome = rounds.run(RoundContext(0, 0.1, 7))
    clients = [text for n in range(3) for text in (f"train {n}", f"trained {n} 1.0", f"encode {n}")]
    mean = (6 * 0.5 * 2 * UPDATES[0] + 6 * 2 * UPDATES[1]) / 12
    assert noted.moments == [*clients, "exchange 0", "mean of 3", f"averaged {mean}"]
    assert outcome.left_out == {2: "it is two"}
    assert outcome.clipped == {0: "halved", 1: "weight cut from 20 to 6"}
    torch.testing.assert_close(rounds.replica, torch.full_like(rounds.replica, mean + 1))


def test_a_part_may_put_something_in_the_place_of_the_mean() -> None:
    rounds = rounds_of(parts=[Median()])
    rounds.run(RoundContext(0, 0.1, 7))
    torch.testing.assert_close(rounds.replica, torch.full_like(rounds.replica, 1.0))


def test_a_part_that_raises_before_training_fails_that_client() -> None:
    class Refusing(Part):
        def before_training(self, context: RoundContext, client: Client) -> None:
            if client.number == 1:
                raise RuntimeError("no time for a step")

    outcome = rounds_of(parts=[Refusing()]).run(RoundContext(0, 0.1, 7))
    assert outcome.left_out == {1: "training failed: RuntimeError: no time for a step"}

"""Clients that fail, send nonsense or far too much: named everywhere, and the round is the others'."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from clients import client_on
from jobs import LazyJobs, file_hash, run_watched, small_config
from local_training import small_model, start_of, training
from properties import is_all
from safetensors.torch import load_file
from torch import Tensor, nn

from fedq.checkpoint import Checkpoints
from fedq.data import Split
from fedq.federated.aggregate import aggregate
from fedq.federated.chaos import ChaosError, chaos
from fedq.federated.cohort import sample_cohort
from fedq.federated.image_training import LocalTraining
from fedq.federated.limits import NormLimit
from fedq.federated.rounds import Outcome
from fedq.federated.training import RoundContext
from fedq.layout import Layout, LayoutSchedule
from fedq.wire import HEADER_NBYTES, Frame, Kind, join_payloads

CPU = torch.device("cpu")
WEIGHTS = {0: 30.0, 1: 7.0, 2: 63.0, 3: 20.0, 4: 11.0}
SCALES = {0: 1.0, 1: 0.5, 2: 40.0, 3: 1.5, 4: 4.0}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 30), nn.BatchNorm1d(30), nn.Linear(30, 4))


def update(layout: Layout, client: int) -> Tensor:
    return 0.1 * SCALES[client] * torch.randn(layout.numel, generator=torch.Generator().manual_seed(client))


def frame(layout: Layout, client: int, kind: Kind = Kind.UPDATE, text: bytes = b"") -> Frame:
    body = torch.frombuffer(bytearray(text), dtype=torch.uint8) if text else torch.empty(0, dtype=torch.uint8)
    if kind == Kind.UPDATE:
        body = join_payloads(layout, layout.encode(update(layout, client), seed=client))
    return Frame(kind, 0, client, layout.hash, client, WEIGHTS[client], 1.0, 0.5, body)


def decoded(layout: Layout, client: int) -> np.ndarray:
    parts = [payload.decode().flatten() for payload in layout.encode(update(layout, client), seed=client)]
    return torch.cat(parts).double().numpy()


# ---- norms ----


@pytest.mark.parametrize("multiple", [0.5, 2.0, 10.0, 100.0])
@pytest.mark.parametrize("rule", ["clip", "drop"])
@pytest.mark.parametrize("spec", ["fp32", "int4", "sign"])
def test_updates_beyond_the_limit(model: nn.Module, spec: str, rule: Any, multiple: float) -> None:
    layout = Layout.of(model, spec)
    frames = [frame(layout, client) for client in WEIGHTS]
    result = aggregate(layout, frames, CPU, parts=NormLimit(multiple, rule))

    values = {client: decoded(layout, client) for client in WEIGHTS}
    norms = {client: float(np.linalg.norm(x[: layout.num_params])) for client, x in values.items()}
    limit = multiple * float(np.median(list(norms.values())))
    beyond = {client for client, norm in norms.items() if norm > limit}
    assert set(result.left_out) | set(result.clipped) == beyond
    assert (result.clipped if rule == "drop" else result.left_out) == {}
    if multiple == 10.0:
        assert beyond == {2}
    factors = {c: limit / norms[c] if c in beyond else 1.0 for c in WEIGHTS}
    kept = [c for c in WEIGHTS if rule == "clip" or c not in beyond]
    expected = np.average([factors[c] * values[c] for c in kept], axis=0, weights=[WEIGHTS[c] for c in kept])
    # float32: norms of 760 elements to 1e-6, then five products and sums of values of at most 20
    np.testing.assert_allclose(result.mean.double().numpy(), expected, rtol=1e-5, atol=1e-5)


def test_the_words_say_what_was_done(model: nn.Module) -> None:
    layout = Layout.of(model, "fp32")
    frames = [frame(layout, client) for client in WEIGHTS]
    clipped = aggregate(layout, frames, CPU, parts=NormLimit(10.0)).clipped
    assert list(clipped) == [2]
    assert clipped[2].startswith("norm clipped to 0.")
    dropped = aggregate(layout, frames, CPU, parts=NormLimit(10.0, "drop")).left_out
    assert dropped[2].startswith("norm ")
    assert " is beyond " in dropped[2]


def test_one_client_far_beyond_the_others_cannot_move_the_limit(model: nn.Module, monkeypatch) -> None:
    layout = Layout.of(model, "fp32")
    without = aggregate(layout, [frame(layout, c) for c in WEIGHTS if c != 2], CPU).mean
    for scale in (1e3, 1e9, 1e18):
        monkeypatch.setitem(SCALES, 2, scale)
        frames = [frame(layout, client) for client in WEIGHTS]
        assert torch.equal(aggregate(layout, frames, CPU, parts=NormLimit(10.0, "drop")).mean, without)


@pytest.mark.parametrize("weight", [0.0, 1e308])
def test_a_round_whose_weights_have_no_sum_is_skipped(model: nn.Module, weight: float) -> None:
    layout = Layout.of(model, "int4")
    result = aggregate(layout, [replace(frame(layout, client), weight=weight) for client in WEIGHTS], CPU)
    assert result.mean is None
    assert set(result.left_out) == set(WEIGHTS)
    assert all("the round is skipped" in why for why in result.left_out.values())


def test_an_infinite_norm_is_left_out_and_the_others_are_limited(model: nn.Module, monkeypatch) -> None:
    layout = Layout.of(model, "fp32")
    monkeypatch.setitem(SCALES, 1, math.inf)
    result = aggregate(layout, [frame(layout, c) for c in WEIGHTS], CPU, parts=NormLimit(10.0))
    assert result.left_out == {1: "decoded update is not finite"}
    assert list(result.clipped) == [2]
    assert bool(torch.isfinite(result.mean).all())


# ---- who remains ----


def test_failures_are_named_with_their_words_and_the_mean_is_the_others(model: nn.Module) -> None:
    layout = Layout.of(model, "int4")
    text = "OSError: Platte voll, größer geht's nicht".encode()
    bad = [frame(layout, 1, Kind.FAILED, text), frame(layout, 3, Kind.LEFT_OUT), frame(layout, 4, Kind.FAILED, b"\xff")]
    result = aggregate(layout, [frame(layout, 0), *bad, frame(layout, 2)], CPU)
    assert result.left_out == {
        1: f"training failed: {text.decode()}",
        3: "update is not finite",
        4: "training failed: \ufffd",
    }
    assert torch.equal(result.mean, aggregate(layout, [frame(layout, 0), frame(layout, 2)], CPU).mean)


@pytest.mark.parametrize(("min_cohort", "is_closed"), [(1, True), (3, True), (4, False), (5, False)])
def test_a_round_needs_its_smallest_cohort(model: nn.Module, min_cohort: int, is_closed: bool) -> None:
    layout = Layout.of(model, "fp32")
    frames = [frame(layout, c, Kind.UPDATE if c in (0, 1, 2) else Kind.LEFT_OUT) for c in WEIGHTS]
    result = aggregate(layout, frames, CPU, min_cohort=min_cohort)
    assert (result.mean is not None) == is_closed
    named = {3: "update is not finite", 4: "update is not finite"}
    if not is_closed:
        reason = f"the round is skipped: 3 updates of 100 examples, min_cohort {min_cohort}"
        named |= dict.fromkeys((0, 1, 2), reason)
    assert result.left_out == named


def test_dropping_counts_against_the_smallest_cohort(model: nn.Module) -> None:
    layout = Layout.of(model, "fp32")
    frames = [frame(layout, c) for c in WEIGHTS]
    limit = NormLimit(10.0, "drop")
    assert aggregate(layout, frames, CPU, min_cohort=4, parts=limit).mean is not None
    assert aggregate(layout, frames, CPU, min_cohort=5, parts=limit).mean is None


def test_a_rounds_loss_is_that_of_the_clients_whose_update_was_used(model: nn.Module) -> None:
    layout = Layout.of(model, "fp32")
    frames = [(0, replace(frame(layout, c), loss=loss, accuracy=loss / 10)) for c, loss in ((0, 2.0), (1, 6.0))]
    failed = (1, replace(frame(layout, 2, Kind.FAILED, b"x"), loss=math.nan, accuracy=math.nan))
    result = Outcome([*frames, failed], {2: "training failed: x"})
    assert result.train_loss == pytest.approx((30 * 2 + 7 * 6) / 37)
    assert result.train_accuracy == pytest.approx((30 * 0.2 + 7 * 0.6) / 37)
    assert math.isnan(Outcome([failed], {2: "training failed: x"}).train_loss)


# ---- a client that fails half-way ----


@pytest.fixture(scope="module")
def split() -> Split:
    generator = torch.Generator().manual_seed(3)
    images = torch.randint(256, (60, 3, 8, 8), dtype=torch.uint8, generator=generator)
    return Split(images, torch.randint(4, (60,), generator=generator))


def test_a_training_that_fails_half_way_leaves_nothing_behind(split: Split) -> None:
    """Or what another client trains, and the counters of the saved model, would depend on who shares its rank."""
    model, indices = small_model(), torch.arange(24)
    local = training(split, model)
    start = start_of(local)
    expected = local.run(start, indices, lr=0.1, seed=7).flat
    counters = [buffer.clone() for buffer in model.buffers() if not buffer.is_floating_point()]
    assert counters

    steps = 0

    def fail() -> None:
        nonlocal steps
        steps += 1
        if steps == 2:
            raise RuntimeError("half-way")

    with pytest.raises(RuntimeError, match="half-way"):
        replace(local, beat=fail).run(start, indices, lr=0.1, seed=1)
    after = [buffer for buffer in model.buffers() if not buffer.is_floating_point()]
    assert all(torch.equal(a, b) for a, b in zip(after, counters, strict=True))
    assert torch.equal(local.run(start, indices, lr=0.1, seed=7).flat, expected)


def test_the_message_of_a_failure_is_short_and_travels(split: Split) -> None:
    local: LocalTraining = training(split)
    client = client_on(3, torch.arange(11), local, LayoutSchedule.always(local.layout))
    sent = client.failure(ValueError("ä" * 2000), RoundContext(4, 0.1, 0))
    received = Frame.unpack(sent.pack())
    assert (received.kind, received.client, received.round, received.weight) == (Kind.FAILED, 3, 4, 11.0)
    assert math.isnan(received.loss)
    assert received.nbytes <= HEADER_NBYTES + 500
    reason = aggregate(local.layout, [received], CPU).left_out[3]
    assert reason.startswith("training failed: ValueError: ää")


# ---- whole jobs ----

FAULTS = "nan=0.25,fail=0.2,seed=4"
CASES: dict[str, dict[str, Any]] = {
    "plain": {"uplink": "sign"},
    "faults": {"uplink": "sign", "chaos": FAULTS},
    "no quorum": {"uplink": "sign", "chaos": "nan=0.6,seed=8", "min_cohort": 4},
    "all fail": {"uplink": "int8", "chaos": "fail=1", "rounds": 1},
    "all fail otherwise": {"uplink": "int8", "chaos": "nan=1", "rounds": 1},
    "clip": {"uplink": "int4", "norm_limit": "clip:0.9"},
    "drop": {"uplink": "int4", "norm_limit": "drop:0.9"},
    "high limit": {"uplink": "sign", "norm_limit": "clip:1e6"},
}
ROUNDS, CLIENTS, COHORT = 3, 7, 5


def jobs_of(world_size: int, folder: Path) -> LazyJobs:
    return LazyJobs(world_size, folder, run_watched, lambda folder, case: (small_config(folder, **CASES[case]), None))


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[LazyJobs, LazyJobs]:
    """The jobs at one and at two ranks."""
    return tuple(jobs_of(world_size, tmp_path_factory.mktemp(f"ranks{world_size}")) for world_size in (1, 2))


@pytest.fixture(scope="module")
def jobs(both: tuple[LazyJobs, LazyJobs]) -> tuple[LazyJobs, ...]:
    """The jobs that are looked at: with one rank alone where not everything is tried, because ranks change nothing."""
    return both if is_all() else both[:1]


def client_rows(folder: Path) -> dict[tuple[int, int], dict]:
    return {(row["round"], row["client"]): row for row in pq.read_table(folder / "clients.parquet").to_pylist()}


def statuses(folder: Path) -> dict[tuple[int, int], str]:
    return {at: row["status"] for at, row in client_rows(folder).items()}


def left_out(folder: Path) -> dict[tuple[int, int], str]:
    rows = json.loads((folder / "summary.json").read_text())["left_out"]
    return {(row["round"], row["client"]): row["reason"] for row in rows}


def losses(folder: Path) -> list[float | None]:
    return [json.loads(line)["train_loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def drawn_faults() -> dict[tuple[int, int], str]:
    """Who must be left out in the job with faults, from the draws alone."""
    faults, expected = chaos(FAULTS), {}
    for number in range(ROUNDS):
        for client in sample_cohort(CLIENTS, COHORT, seed=0, round=number):
            values = torch.zeros(9)
            faults.spoil(values, number, client)
            if bool(values.isnan().any()):
                expected[number, client] = "update is not finite"
            try:
                faults.strike_client(number, client)
            except ChaosError as error:
                expected[number, client] = f"training failed: ChaosError: {error}"
    return expected


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=() if case == "faults" else pytest.mark.slow) for case in CASES]
)
def test_nothing_depends_on_the_ranks(both: tuple[LazyJobs, LazyJobs], case: str) -> None:
    one, two = (ran.folder(case) for ran in both)
    assert file_hash(one / "model.safetensors") == file_hash(two / "model.safetensors")
    assert both[0].ranks(case)[0].frames == both[1].ranks(case)[0].frames
    assert statuses(one) == statuses(two)
    assert left_out(one) == left_out(two)
    assert losses(one) == losses(two)


def test_faults_are_named_in_every_place(both: tuple[LazyJobs, LazyJobs]) -> None:
    expected = drawn_faults()
    assert {reason.split(":")[0] for reason in expected.values()} == {"update is not finite", "training failed"}
    for ran in both:
        folder = ran.folder("faults")
        assert left_out(folder) == expected
        found = statuses(folder)
        assert {at: status for at, status in found.items() if status != "ok"} == expected
        assert len(found) == ROUNDS * COHORT
        sizes = {at: nbytes for at, (_, nbytes) in ran.ranks("faults")[0].frames.items()}
        for at, reason in expected.items():
            text = reason.partition("training failed: ")[2]
            assert sizes[at] == HEADER_NBYTES + len(text.encode())
        model = load_file(folder / "model.safetensors")
        assert all(bool(torch.isfinite(tensor).all()) for tensor in model.values())


def test_a_jobs_loss_is_that_of_the_clients_whose_update_was_used(both: tuple[LazyJobs, LazyJobs]) -> None:
    for ran in both:
        rows = client_rows(ran.folder("faults"))
        for number, loss in enumerate(losses(ran.folder("faults"))):
            used = [row for (at, _), row in rows.items() if at == number and row["status"] == "ok"]
            weights = [row["num_examples"] for row in used]
            assert loss == pytest.approx(np.average([row["train_loss"] for row in used], weights=weights), rel=1e-12)
        failed = [row for row in rows.values() if row["status"].startswith("training failed")]
        assert failed
        assert all(row["train_loss"] is None and row["train_accuracy"] is None for row in failed)


def test_a_client_that_is_left_out_keeps_its_residual(both: tuple[LazyJobs, LazyJobs]) -> None:
    """A checkpoint names the round after which each client's residual is; one left out has an older one, or none."""
    expected = drawn_faults()
    for ran in both:
        state = Checkpoints(ran.folder("faults") / "checkpoints").load(ROUNDS).state
        versions: dict[int, int] = {}
        for number in range(ROUNDS):
            for client in sample_cohort(CLIENTS, COHORT, seed=0, round=number):
                if (number, client) not in expected:
                    versions[client] = number + 1
        assert state["residuals"] == versions


def test_a_round_without_enough_updates_is_named_and_changes_nothing(jobs: tuple[LazyJobs, ...]) -> None:
    for ran in jobs:
        folder = ran.folder("no quorum")
        found = statuses(folder)
        skipped = {at for at, _ in found if any("skipped" in found[key] for key in found if key[0] == at)}
        assert skipped
        for number in range(ROUNDS):
            mine = [status for (at, _), status in found.items() if at == number]
            usable = sum(status != "update is not finite" for status in mine)
            assert (number in skipped) == (0 < usable < 4)
            assert all(status != "ok" for status in mine) == (usable < 4)
        assert left_out(folder) == {at: status for at, status in found.items() if status != "ok"}
        assert [losses(folder)[number] for number in sorted(skipped)] == [None] * len(skipped)


def test_a_job_whose_clients_all_fail_ends_with_the_model_it_began_with(jobs: tuple[LazyJobs, ...]) -> None:
    for ran in jobs:
        assert len(left_out(ran.folder("all fail"))) == COHORT
        first, last = (
            Checkpoints(ran.folder(case) / "checkpoints").load(1).state for case in ("all fail", "all fail otherwise")
        )
        assert torch.equal(first["replica"], last["replica"])
        assert torch.equal(last["replica"], last["server"]["master"])
        assert ran.ranks("all fail")[0].summary["rounds"] == 1


def test_norm_limits_of_a_job(jobs: tuple[LazyJobs, ...]) -> None:
    for ran in jobs:
        clipped, dropped = statuses(ran.folder("clip")), statuses(ran.folder("drop"))
        assert left_out(ran.folder("clip")) == {}
        for number in range(ROUNDS):
            words = [status for (at, _), status in clipped.items() if at == number]
            # beyond 0.9 medians are at least the median of five and the two above it
            assert sum(word.startswith("norm clipped to ") for word in words) >= 3
            assert all(word == "ok" or word.startswith("norm clipped to ") for word in words)
        first_round = {c for (at, c), word in clipped.items() if at == 0 and word != "ok"}
        assert {c for at, c in left_out(ran.folder("drop")) if at == 0} == first_round, "the same start, the same norms"
        assert all(word == "ok" or " is beyond " in word for word in dropped.values())
        assert {at: word for at, word in dropped.items() if word != "ok"} == left_out(ran.folder("drop"))
        assert set(statuses(ran.folder("high limit")).values()) == {"ok"}
        models = {
            case: file_hash(ran.folder(case) / "model.safetensors") for case in ("plain", "high limit", "clip", "drop")
        }
        assert models["plain"] == models["high limit"]
        assert models["clip"] != models["drop"]

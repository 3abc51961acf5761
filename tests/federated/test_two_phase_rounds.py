"""Rounds whose server is spread over the ranks, against the same rounds with the server on rank 0: bit for bit."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from distributed import run_group
from hypothesis import given
from hypothesis import strategies as st
from jobs import Watched, file_hash, run_watched, small_config
from properties import few, is_all
from stopped_jobs import Stop, run_jobs, summary
from torch import Tensor, nn

from fedq.collectives import Transport
from fedq.config import Config
from fedq.errors import FieldError
from fedq.federated.assembly import RoundSettings, Seats, make_rounds, over_ranks
from fedq.federated.client import Client
from fedq.federated.cohort import sample_cohort
from fedq.federated.optim import SERVER_OPTIMIZERS, server_optimizer
from fedq.federated.server import Server, join_states
from fedq.federated.training import RoundContext, Trained
from fedq.federated.two_phase import deal
from fedq.layout import Layout
from fedq.ledger import Ledger
from fedq.models import build_model
from fedq.phases import PHASES
from fedq.wire import HEADER_NBYTES, Frame, join_payloads

NAN_AT = (1, sample_cohort(7, 5, seed=0, round=1)[2])
WAYS = ("rooted", "two_phase")

# Seven clients, five a round, three rounds.
CASES: dict[str, dict[str, Any]] = {
    "int4": {"uplink": "int4", "downlink": "int8", "feedback": "on"},
    "sign": {"uplink": "sign int4@2", "downlink": "int4", "server": "fedadam:lr=0.01", "feedback": "auto:memory=0.5"},
    "topk": {"uplink": "topk:density=0.05", "downlink": "bf16", "server": "adafactor:lr=0.01", "downlink_to": "all"},
    "variable": {"uplink": "threshold:value=0.001", "downlink": "threshold:value=0.0005", "feedback": "off"},
    "clip": {"uplink": "int4", "norm_limit": "clip:1.01", "chaos": "nan=0.1,fail=0.2,seed=3", "min_cohort": 3},
    "drop nan": {
        "uplink": "fp32",
        "downlink": "fp32",
        "norm_limit": "drop:1.01",
        "server": "adagrad",
    },
    "batchnorm": {"model": "resnet20", "rounds": 1, "local_steps": 1, "num_clients": 3, "cohort": None},
}
BY_WORLD = {1: ("int4",), 2: (*CASES,), 3: (*CASES,), 4: ("int4", "variable", "clip")}


@dataclass(frozen=True)
class Ran:
    """What a job left: what each rank saw, and its folder."""

    ranks: list[Watched]
    folder: Path

    @property
    def summary(self) -> dict[str, Any]:
        return self.ranks[0].summary

    @property
    def model(self) -> str:
        return file_hash(self.folder / "model.safetensors")

    def rows(self, name: str) -> list[dict[str, Any]]:
        return pq.read_table(self.folder / f"{name}.parquet").to_pylist()

    def client_rows(self) -> list[str]:
        """Return what is told of clients, as texts, because NaN is not equal to itself; but not where they ran."""
        return [repr({k: v for k, v in row.items() if k != "rank"}) for row in self.rows("clients")]

    def payload_rows(self) -> list[str]:
        """Return what the protocol's messages hold, as texts; what crosses ranks is another matter."""
        rows = [{k: v for k, v in row.items() if k != "wire"} for row in self.rows("ledger")]
        return sorted(repr(row) for row in rows if row["payload"] or row["raw"])


class Jobs:
    """Jobs by world size, way and case, each run when it is first asked for."""

    def __init__(self, factory: pytest.TempPathFactory) -> None:
        self._factory = factory
        self._ran: dict[tuple[int, str, str], Ran] = {}

    def __getitem__(self, key: tuple[int, str, str]) -> Ran:
        if key not in self._ran:
            world_size, way, case = key
            folder = self._factory.mktemp("job")
            config = small_config(folder, aggregate=way, **CASES[case])
            job = (config, NAN_AT if "nan" in case else None)
            self._ran[key] = Ran([seen for (seen,) in run_group(world_size, run_watched, [job])], folder)
        return self._ran[key]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    return Jobs(tmp_path_factory)


def _is_quick(world_size: int, case: str) -> bool:
    return world_size == 3 and case in ("int4", "variable", "clip", "drop nan")


JOBS = [
    pytest.param(world_size, case, marks=() if _is_quick(world_size, case) else pytest.mark.slow)
    for world_size, cases in BY_WORLD.items()
    for case in cases
]


@pytest.mark.parametrize(("world_size", "case"), JOBS)
def test_the_result_is_that_of_a_server_on_rank_0(ran: Jobs, world_size: int, case: str) -> None:
    rooted, spread = ran[2, "rooted", case], ran[world_size, "two_phase", case]
    assert spread.model == rooted.model
    assert {seen.replica for seen in spread.ranks} == {rooted.ranks[0].replica}
    same = ["test_accuracy", "best_val_accuracy", "uplink_bytes", "downlink_bytes", "uplink_bytes_fp32", "left_out"]
    assert {key: spread.summary[key] for key in same} == {key: rooted.summary[key] for key in same}
    told = [
        [{k: repr(v) for k, v in row.items() if k != "rank"} for row in r.rows("clients")] for r in (rooted, spread)
    ]
    assert told[0] == told[1]


@pytest.mark.parametrize(("world_size", "case"), JOBS)
def test_the_ledger_has_the_same_messages(ran: Jobs, world_size: int, case: str) -> None:
    assert ran[world_size, "two_phase", case].payload_rows() == ran[2, "rooted", case].payload_rows()


@pytest.mark.parametrize(("world_size", "case"), JOBS)
def test_wire_bytes_are_those_that_the_process_group_was_given(ran: Jobs, world_size: int, case: str) -> None:
    rooted = ran[2, "rooted", case]  # by one server on rank 0, whose result does not depend on the ranks (test_job)
    for job, num_ranks in ((ran[world_size, "two_phase", case], world_size), (rooted, 2)):
        wire = sum(row["wire"] for row in job.rows("ledger"))
        assert wire == job.summary["wire_bytes"]
        assert wire == sum(seen.sent for seen in job.ranks) == sum(seen.received for seen in job.ranks)
        assert job.summary["root_ingress_bytes"] == job.ranks[0].received
        assert (wire > 0) == (num_ranks > 1)


def test_the_cases_are_what_they_are_meant_to_be(ran: Jobs) -> None:
    def statuses(case: str) -> set[str]:
        return {" ".join(row["status"].split()[:2]) for row in ran[3, "two_phase", case].rows("clients")}

    assert statuses("clip") == {"ok", "norm clipped", "training failed:"}
    assert {"ok", "update is"} < statuses("drop nan")
    assert any(status.startswith("norm 0.") for status in statuses("drop nan"))
    sent = {row["payload"] for row in ran[3, "two_phase", "variable"].rows("ledger") if row["part"] == "indices"}
    assert len(sent) > 10, "sizes depend on the values"
    assert ran[3, "two_phase", "int4"].summary["aggregate"] == "two_phase"


# ---- rank 0's ingress ----


def owned_bytes(layout: Layout, numbers: list[int]) -> int:
    return sum(layout.spans[n].codec.payload_nbytes(layout.spans[n].shape) for n in numbers)


@pytest.mark.parametrize(
    "world_size", [pytest.param(2, marks=pytest.mark.slow), 3, pytest.param(4, marks=pytest.mark.slow)]
)
def test_what_comes_to_rank_0_follows_the_formula(ran: Jobs, world_size: int) -> None:
    """Rooted: every update of other ranks' clients; two_phase: rank 0's share of them, and of the changes the rest."""
    model = build_model("cnn62k", num_classes=10, in_channels=3, image_size=32, norm="batch")
    up = Layout.of(model, Config().exchange.uplink)
    down = Layout.of(model, Config().exchange.downlink)
    own = deal(up, world_size)[0]
    cohorts = [sample_cohort(7, 5, seed=0, round=number) for number in range(3)]
    away = sum(client % world_size != 0 for cohort in cohorts for client in cohort)
    rooted = away * (up.fixed_nbytes + HEADER_NBYTES)
    spread = away * (owned_bytes(up, own) + HEADER_NBYTES) + 3 * (down.fixed_nbytes - owned_bytes(down, own))
    told = (world_size - 1) * (3 * 3 * 8 * len(PHASES) + 8 + 512)  # where time went, and what the interfaces counted
    for way, expected in zip(WAYS, (rooted + told, spread + told), strict=True):
        # beside it sizes, flags and shared metrics: some hundred bytes
        assert ran[world_size, way, "int4"].summary["root_ingress_bytes"] == pytest.approx(expected, rel=0.01)


@pytest.mark.slow
def test_rank_0_receives_less_the_more_ranks_there_are(ran: Jobs) -> None:
    shares = []
    for world_size in (2, 3, 4):
        rooted, spread = (ran[world_size, way, "int4"].summary["root_ingress_bytes"] for way in WAYS)
        shares.append(spread / rooted)
    assert shares == sorted(shares, reverse=True)
    assert shares[-1] < 0.75


# ---- who owns what ----


@given(st.lists(st.integers(0, 5000), min_size=1, max_size=30), st.integers(1, 9), st.sampled_from(["int4", "sign"]))
def test_tensors_are_dealt_evenly(numels: list[int], world_size: int, spec: str) -> None:
    layout = Layout.of(nn.ParameterList([torch.empty(n, 1) for n in numels]), spec)
    owned = deal(layout, world_size)
    assert sorted(n for numbers in owned for n in numbers) == list(range(len(numels)))
    assert all(numbers == sorted(numbers) for numbers in owned)
    weights = [s.codec.payload_nbytes(s.shape) for s in layout.spans]
    loads = [sum(weights[n] for n in numbers) for numbers in owned]
    assert max(loads) * world_size <= sum(weights) + max(weights) * (world_size - 1)  # Graham's bound
    assert loads[0] == min(loads)


@given(st.sets(st.integers(0, 5)), st.sampled_from(["int4", "sign", "topk:density=0.1", "threshold:value=0.5"]))
def test_a_part_has_the_codes_of_the_whole(numbers: set[int], spec: str) -> None:
    layout = Layout.of(nn.Sequential(nn.Linear(20, 30), nn.BatchNorm1d(30), nn.Linear(30, 4)), spec)
    flat = torch.randn(layout.numel, generator=torch.Generator().manual_seed(3))
    part, whole = layout.part(sorted(numbers)), layout.encode(flat, seed=7)
    assert (part.hash, part.numbers) == (layout.hash, tuple(sorted(numbers)))
    assert part.numel == sum(layout.spans[n].numel for n in numbers)
    coded = part.encode(part.take(flat), seed=7)
    assert all(torch.equal(payload.data, whole[n].data) for payload, n in zip(coded, part.numbers, strict=True))
    out = torch.zeros(part.numel)
    part.decode_add([payload.data for payload in coded], out, seed=7)
    assert torch.equal(out, torch.cat([torch.empty(0), *(whole[n].decode().view(-1) for n in part.numbers)]))
    assert torch.equal(layout.take(flat), flat)


# ---- the server in parts ----

TORCH = ["SGD:lr=0.1,momentum=0.9", "Adam", "AdamW", "NAdam", "RAdam", "Adamax", "Adadelta", "Adagrad", "RMSprop"]
TORCH += ["Rprop", "ASGD", "Adafactor"]


@pytest.mark.parametrize("spec", [*SERVER_OPTIMIZERS, *TORCH])
@pytest.mark.parametrize("world_size", [3, 9])  # 9: more ranks than tensors
def test_parts_of_a_server_together_are_the_server(spec: str, world_size: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 4))
    layout = Layout.of(model, "int8")
    initial = layout.flatten(model)

    def server(part: Layout) -> Server:
        return Server(initial, part, lambda params: server_optimizer(spec, params))

    whole, parts = server(layout), [server(layout.part(numbers)) for numbers in deal(layout, world_size)]
    for number in range(4):
        if number == 2:  # parts of another world go on where these stopped
            state = join_states(layout, [{"numbers": p.layout.numbers, **p.state_dict()} for p in parts])
            parts = [server(layout.part(numbers)) for numbers in deal(layout, 2)]
            for part in parts:
                part.load_state_dict(state)
        mean = 0.01 * torch.randn(layout.numel, generator=torch.Generator().manual_seed(number))
        for one in (whole, *parts):
            one.step(one.layout.take(mean))
        context, replica = RoundContext(number, 0.1, 0), torch.zeros(layout.numel)
        body = whole.change(replica, context).body
        assert sum(p.change(replica, context).body.numel() for p in parts) == body.numel()
    joined = join_states(layout, [{"numbers": p.layout.numbers, **p.state_dict()} for p in parts])
    assert torch.equal(joined["master"], whole.master)
    state, expected = joined["optimizer"], whole.state_dict()["optimizer"]
    torch.testing.assert_close(state["state"], expected["state"], rtol=0, atol=0)
    assert state["param_groups"] == expected["param_groups"]


def test_an_optimizer_that_cannot_have_the_model_is_refused_on_every_rank() -> None:
    """Muon takes matrices alone: also an owner of nothing else must say no, or the others would wait for it."""
    layout = Layout.of(nn.Linear(20, 30), "int8")
    for numbers in ([0], [1], []):
        with pytest.raises(FieldError, match=r"server='muon'.*2D"):
            Server(torch.zeros(layout.numel), layout.part(numbers), lambda params: server_optimizer("muon", params))


# ---- what is known of whole updates ----


class Scripted(Client):
    """A client whose update follows from number and round; client 2's is large, and client 1 lies about a NaN."""

    def train(self, replica: Tensor, context: RoundContext) -> Trained:
        update = torch.randn(len(replica), generator=torch.Generator().manual_seed(self.number + 10 * context.round))
        return Trained(replica + 0.1 * (1 + 4 * (self.number == 2)) * update, 1.0, 0.5, 1)

    def message(self, update: Tensor, *given: Any, **more: Any) -> Frame:
        frame = super().message(update, *given, **more)
        if self.number != 1:
            return frame
        spoiled = update.clone()
        spoiled[-1] = torch.nan  # in one tensor, so that one owner alone sees it
        return replace(frame, body=join_payloads(UP, UP.encode(spoiled, seed=frame.seed)))


def scripted_model() -> nn.Module:
    model = nn.Sequential(nn.Linear(64, 8), nn.Linear(8, 2))
    for param in model.parameters():
        nn.init.zeros_(param)
    return model


UP = Layout.of(scripted_model(), "int4")


def scripted_client(number: int) -> Scripted:
    return Scripted(SimpleNamespace(run=None), num_examples=5 + number)


def scripted_rounds(rank: int, limits: dict[str, Any]) -> list[tuple]:
    """Return what rank 0 says of left out and clipped clients, the replica and rank 0's totals, by way."""
    results = []
    for aggregate in ("rooted", "two_phase"):
        ledger, transport, model = Ledger(), Transport(), scripted_model()
        settings = RoundSettings("int4", "int4", feedback="off", aggregate=aggregate, **limits)
        seats = Seats(5, scripted_client, model, settings, None)
        rounds = make_rounds(
            model, settings, over_ranks(model, settings, seats, transport, ledger, sticky=False), transport=transport
        )
        rounds.share_start()
        told = [rounds.run(RoundContext(number, 0.1, 7)) for number in range(3)]
        results.append(([(t.left_out, t.clipped) for t in told], rounds.replica.tolist(), ledger.totals()))
    return results


LIMITS: list[dict[str, Any]] = [
    {},
    {"norm_limit": "clip:2"},
    {"norm_limit": "drop:2"},
    {"min_cohort": 5},
]


def all_scripted_rounds(rank: int) -> list[list[tuple]]:
    return [scripted_rounds(rank, limits) for limits in LIMITS]


@pytest.mark.parametrize("world_size", few([2, 5], 1))  # 5: one rank owns nothing
def test_owners_decide_as_one_server_does(world_size: int) -> None:
    for limits, *by_rank in zip(LIMITS, *run_group(world_size, all_scripted_rounds), strict=True):
        (told, replica, totals), (spread_told, _, spread_totals) = by_rank[0]
        assert spread_told == told
        assert all(left_out[1] == "decoded update is not finite" for left_out, _ in told)
        others = {client for left_out, clipped in told for client in (*left_out, *clipped)} - {1}
        assert others == ({2} if "norm_limit" in limits else {0, 2, 3, 4} if limits else set())
        assert all(other == replica for results in by_rank for _, other, _ in results)
        assert any(replica) == ("min_cohort" not in limits)
        assert (spread_totals.payload, spread_totals.raw) == (totals.payload, totals.raw)


# ---- stopped and resumed ----

STOPPED = {"uplink": "sign", "downlink": "int4", "server": "fedadam:lr=0.01", "rounds": 4}
STOPS = {"begin": Stop(2, "begin"), "residuals": Stop(1, "residuals"), "rooted": Stop(2, "log")}


class StoppedJobs:
    """Jobs that stopped on three ranks, two with a spread server, and one that never did, each run when asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __truediv__(self, name: str) -> Path:
        folder, stop = self._folder / name, STOPS.get(name)
        if not folder.exists():
            way = "rooted" if name == "rooted" else "two_phase"
            for ((result, _),) in run_group(3, run_jobs, [(small_config(folder, aggregate=way, **STOPPED), stop)]):
                assert (result if isinstance(result, str) else "") == ("Stopped: " if stop else "")
        return folder


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> StoppedJobs:
    return StoppedJobs(tmp_path_factory.mktemp("stopped"))


def resumed(folder: Path, way: str) -> tuple[Config, None]:
    return small_config(folder, resume=folder, aggregate=way, **STOPPED), None


@pytest.mark.parametrize("world_size", few([2, 1, 3], 1))
def test_a_resumed_job_equals_one_that_never_stopped(stopped: StoppedJobs, tmp_path: Path, world_size: int) -> None:
    """With another number of owners, or with the server back on rank 0, or away from there."""
    keys = [(name, way) for name in STOPS for way in WAYS]
    if not is_all():  # residuals of another rank are test_resume's, too
        keys = [("begin", "two_phase"), ("begin", "rooted"), ("rooted", "two_phase")]
    folders = [Path(shutil.copytree(stopped / name, tmp_path / f"{name} {way}")) for name, way in keys]
    jobs = [resumed(folder, way) for folder, (_, way) in zip(folders, keys, strict=True)]
    results = run_group(world_size, run_jobs, jobs)[0]
    for (name, way), folder, (result, heard) in zip(keys, folders, results, strict=True):
        assert isinstance(result, dict), result
        assert file_hash(folder / "model.safetensors") == file_hash(stopped / "whole" / "model.safetensors")
        before = "rooted" if name == "rooted" else "two_phase"
        assert (f"aggregate {before} -> {way}" in heard) == (before != way)
        assert "refused" not in heard
        same = ["uplink_bytes", "downlink_bytes", "test_accuracy"]
        same += ["wire_bytes", "root_ingress_bytes"] * (world_size == 3 and way == before == "two_phase")
        assert {k: result[k] for k in same} == {k: summary(stopped / "whole")[k] for k in same}


def test_old_parts_are_deleted_and_damaged_ones_are_refused(stopped: StoppedJobs, tmp_path: Path) -> None:
    servers = stopped / "whole" / "checkpoints" / "servers"
    left = sorted(str(path.relative_to(servers)) for path in servers.glob("*/*"))
    assert left == [f"{rank}-of-3/{number:08d}" for rank in range(3) for number in (3, 4)]

    folder = Path(shutil.copytree(stopped / "begin", tmp_path / "begin"))
    part = folder / "checkpoints" / "servers" / "1-of-3" / "00000002" / "state.safetensors"
    part.write_bytes(part.read_bytes()[:-1] + b"?")
    ((result, heard),) = run_jobs(0, [resumed(folder, "two_phase")])
    assert isinstance(result, dict), result
    assert "resumed after round 1" in heard
    assert f"round 2 is refused: checkpoint {part}: its checksum does not match" in heard
    assert file_hash(folder / "model.safetensors") == file_hash(stopped / "whole" / "model.safetensors")
    assert not list((folder / "checkpoints" / "servers").iterdir()), "one rank has the whole server"

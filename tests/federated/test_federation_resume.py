"""What a federation leaves in its folder, and that it goes on from there as if it had never stopped."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from distributed import RankFailed, run_group
from own_federations import NUM_CLIENTS, client, clients, data_of, ended, examples, net, plain, steps
from properties import few, is_all
from safetensors.torch import load_file
from torch import nn
from torch.nn.functional import mse_loss

import fedq
from fedq.cli import main
from fedq.errors import FieldError
from fedq.report import find_runs
from fedq.wire import Frame

LINES = ("config.yaml", "metrics.jsonl", "clients.parquet", "ledger.parquet", "summary.json", "model.safetensors")
MSE = fedq.Metric("mse", "K^2")


def mse(model: nn.Module) -> float:
    x, y = examples(9)
    return mse_loss(model(x), y).item()


def keeping(model: nn.Module, number: int, *, fresh: bool = False) -> fedq.Client:
    """A client with AdamW's moments, a schedule and a count of steps kept over the rounds, all of one module."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)

    def train(model: nn.Module, lr: float, first_step: int) -> dict[str, float]:
        used = torch.optim.AdamW(model.parameters(), lr=0.02) if fresh else optimizer
        model[0].weight.data.add_(torch.randn(8, 6) * 0.001)
        loss = steps(model, used, number)
        if not fresh:
            scheduler.step()
        return {"loss": loss, "first": first_step}

    state = None if fresh else {"optimizer": optimizer, "scheduler": scheduler}
    return fedq.Client(train, num_examples=len(examples(number)[0]), state=state)


def federation(out: Path | None, *, resume: bool = False, fresh: bool = False, **options: Any) -> fedq.Federation:
    model = net()
    options = {"cohort": 3, "server": "fedadam:lr=0.01"} | options
    return fedq.Federation(
        model,
        lambda number: keeping(model, number, fresh=fresh),
        num_clients=NUM_CLIENTS,
        out=out,
        resume=resume,
        evaluate=mse,
        metrics=[MSE],
        **options,
    )


def run(rank: int, out: Path | None, rounds: Sequence[int], options: dict[str, Any]) -> tuple[bytes, list, list]:
    """Make a federation for each number of rounds, the later ones by resume; return the end, results and ledger."""
    results = []
    for number, num in enumerate(rounds):
        with federation(out, resume=number > 0, **options) as fed:
            results += plain(fed.rounds(num, 0.1))
            data = data_of(fed.model)
            rows = fed.ledger.table().to_pylist() if rank == 0 else []
    return data, results, rows


@pytest.fixture(scope="module")
def whole() -> tuple[bytes, list, list]:
    return run(0, None, [4], {})


@pytest.mark.parametrize(
    "rounds",
    [(1, 4), pytest.param((2, 4), marks=pytest.mark.slow), pytest.param((3, 4), marks=pytest.mark.slow), (1, 2, 3, 4)],
    ids=str,
)
def test_a_run_goes_on_as_if_it_had_never_stopped(tmp_path: Path, whole: Any, rounds: tuple[int, ...]) -> None:
    assert run(0, tmp_path / "run", rounds, {}) == whole


def test_a_run_goes_on_on_another_number_of_ranks(tmp_path: Path, whole: Any) -> None:
    out = tmp_path / "run"
    run_group(2, run, out, [2], {})
    assert run_group(1, run_on, out, 3)[0][0] != whole[0]
    ends = run_group(2, run_on, out, 4)
    assert [end[0] for end in ends] == [whole[0]] * 2
    assert ends[0][1] == ends[1][1] == whole[1][3:]


def run_on(rank: int, out: Path, rounds: int) -> tuple[bytes, list]:
    with federation(out, resume=True) as fed:
        results = plain(fed.rounds(rounds, 0.1))
        return data_of(fed.model), results


def test_moments_that_are_kept_matter_and_first_steps_are_counted(whole: Any) -> None:
    assert run(0, None, [4], {"fresh": True})[0] != whole[0]
    firsts = [result["metrics"]["train_first"] for result in whole[1]]
    assert firsts[0] == 0
    assert firsts[-1] > 3


@pytest.mark.parametrize(
    "options", few([{"uplink": "fp32"}, {"aggregate": "two_phase"}, {"feedback": "off"}], 2), ids=str
)
def test_every_exchange_goes_on(tmp_path: Path, options: dict[str, Any]) -> None:
    assert run(0, tmp_path / "run", [2, 4], options) == run(0, None, [4], options)


def test_two_phase_goes_on_on_ranks(tmp_path: Path) -> None:
    options = {"aggregate": "two_phase"}
    whole = run_group(2, run, None, [3], options)
    assert run_group(2, run, tmp_path / "run", [1, 3], options) == whole


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("options", [{}, {"aggregate": "two_phase"}, {"uplink": "sign"}], ids=str)
def test_a_run_goes_on_at_any_round_on_ranks(tmp_path: Path, ranks: int, options: dict[str, Any]) -> None:
    whole = run_group(ranks, run, None, [4], options)
    for first in (1, 2, 3):
        assert run_group(ranks, run, tmp_path / str(first), [first, 4], options) == whole


# ---- a process that dies ---------------------------------------------------------------------------------------------


class Dies(fedq.Part):
    """Kills its own process when one client of a round has trained."""

    def __init__(self, round: int, nth: int) -> None:
        self.round = round
        self.left = nth

    def after_training(self, context: Any, client: fedq.Client, trained: Any) -> None:
        self.left -= context.round == self.round
        if not self.left:
            os.kill(os.getpid(), signal.SIGKILL)


def dies(rank: int, out: Path, round: int, who: int) -> None:
    parts = [Dies(round, 2 if who == 0 else 1)] if rank == who else []
    federation(out, parts=parts).run(4, 0.1)


@pytest.mark.parametrize(("ranks", "round"), few([(2, 2), (1, 0), (1, 2)], 1))
def test_a_process_that_is_killed_in_a_round_goes_on(tmp_path: Path, whole: Any, ranks: int, round: int) -> None:
    out = tmp_path / "run"
    with pytest.raises(RankFailed, match="died"):
        run_group(ranks, dies, out, round, ranks - 1)
    data, results = run_group(ranks, run_on, out, 4)[0]
    assert data == whole[0]
    assert len(results) - (4 - round) in range(ranks), "rank 0 may have died before the last checkpoint"
    assert results == whole[1][4 - len(results) :]
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["round"] for line in lines] == [0, 1, 2, 3]


def test_a_run_that_ended_before_its_summary_gets_one(tmp_path: Path) -> None:
    out = tmp_path / "run"
    run(0, out, [2], {})
    before = {name: (out / name).read_bytes() for name in ("model.safetensors", "ledger.parquet")}
    for name in (*before, "summary.json"):
        (out / name).unlink()
    with federation(out, resume=True) as fed:
        assert fed.run(2, 0.1).rounds == 2
    assert {name: (out / name).read_bytes() for name in before} == before
    assert json.loads((out / "summary.json").read_text())["rounds"] == 2


@pytest.mark.parametrize("what", few(["checkpoints/00000003/state.safetensors", "residuals", "states"], 2))
def test_a_damaged_checkpoint_is_gone_back_from(tmp_path: Path, whole: Any, what: str) -> None:
    out = tmp_path / "run"
    run(0, out, [3], {})
    file = out / what if (out / what).is_file() else next((out / what).glob("*-00000003.*"))
    file.write_bytes(file.read_bytes()[:-9])
    with federation(out, resume=True) as fed:
        assert fed.summary().rounds == 2
        assert plain(fed.rounds(4, 0.1)) == whole[1][2:]
        assert data_of(fed.model) == whole[0]
    assert {"00000003", "00000003.damaged", "00000004"} <= {one.name for one in (out / "checkpoints").iterdir()}


# ---- another run than the one in the folder --------------------------------------------------------------------------


def test_a_folder_that_holds_a_run_is_not_written_over(tmp_path: Path) -> None:
    run(0, tmp_path / "run", [1], {})
    with pytest.raises(FieldError, match=r"out=.*run'.*a folder without a run, or resume=True"):
        federation(tmp_path / "run")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"uplink": "int8"}, r"^uplink='int8' .*'int4', as in the run that is resumed"),
        ({"downlink": "int4"}, r"^downlink='int4' .*'int8', as in the run"),
        ({"server": "fedavg"}, r"^server='fedavg' .*'fedadam:lr=0.01'"),
        ({"cohort": None}, r"^cohort=None .*3"),
        ({"seed": 5}, r"^seed=5 .*0, as in"),
    ],
    ids=str,
)
def test_another_setting_is_named(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    out = tmp_path / "run"
    run(0, out, [2], {})
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(FieldError, match=words):
        federation(out, resume=True, **options)
    after = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert {path.name for path in before.keys() ^ after.keys()} <= {"lock", ".lock"}
    assert all(after.get(path, data) == data for path, data in before.items() if "lock" not in path.name)


def test_other_clients_and_other_models_are_named(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with fedq.Federation(net(), clients(), out=out) as fed:
        fed.run(1, 0.1)
    with pytest.raises(FieldError, match=r"^num_clients=3 .*5, as in the run that is resumed"):
        fedq.Federation(net(), clients(3), out=out, resume=True)
    wider = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 1))
    with pytest.raises(FieldError, match=r"^0.weight='shape \[9, 6\]' .*shape \[8, 6\], as in"):
        fedq.Federation(wider, clients(), out=out, resume=True)


def test_other_states_than_those_saved_are_named(tmp_path: Path) -> None:
    out = tmp_path / "run"
    run(0, out, [1], {"cohort": None})
    members = [client(number, state=torch.optim.SGD(net().parameters())) for number in range(NUM_CLIENTS)]
    with (
        fedq.Federation(net(), members, out=out, resume=True, server="fedadam:lr=0.01") as fed,
        pytest.raises(FieldError, match=r"^state of client 0=\['state'\] .*\['optimizer', 'scheduler'\], as saved"),
    ):
        fed.run(2, 0.1)


class Dated:
    """A state that holds more than plain values."""

    def state_dict(self) -> dict[str, Any]:
        return {"since": Path("x")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise AssertionError


def test_a_state_that_could_not_be_read_again_is_named_in_the_first_round(tmp_path: Path) -> None:
    members = [client(0, state={"date": Dated()})]
    with (
        fedq.Federation(net(), members, out=tmp_path / "run") as fed,
        pytest.raises(FieldError, match=r"^state of client 0='date' .*tensors and plain values alone"),
    ):
        fed.run(1, 0.1)


def test_a_run_of_another_kind_is_not_gone_on_with(tmp_path: Path) -> None:
    from fedq.checkpoint import Checkpoints

    Checkpoints(tmp_path / "run" / "checkpoints").save(1, {"replica": torch.zeros(3)})
    with pytest.raises(FieldError, match=r"resume=.*run'.*a run of fedq.Federation"):
        fedq.Federation(net(), clients(), out=tmp_path / "run", resume=True)


# ---- what lies in the folder -----------------------------------------------------------------------------------------


class Counted(fedq.Part):
    """Counts the bytes of frames that were sent."""

    nbytes = 0

    def after_encoding(self, context: Any, client: fedq.Client, update: Any, frame: Frame) -> None:
        self.nbytes += frame.nbytes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out, counted = tmp_path_factory.mktemp("runs") / "mine", Counted()
    with federation(out, parts=[counted]) as fed:
        results = list(fed.rounds(3, lr=lambda number: 0.1 / (1 + number)))
        total = fed.summary()
        assert total.uplink_bytes == sum(result.uplink_bytes for result in results) == counted.nbytes
        assert total.downlink_bytes == sum(result.downlink_bytes for result in results)
        assert total.best == min(result.metrics["val_mse"] for result in results)
        assert total.metrics == results[-1].metrics
    return out


def test_the_folder_holds_what_a_run_leaves(folder: Path) -> None:
    assert all((folder / name).is_file() for name in LINES)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["exchange"]["uplink"] == "int4"
    assert config["run"]["rounds"] == 3
    assert config["metrics"] == [{"name": "mse", "unit": "K^2", "better": "lower"}]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["lr"] for line in lines] == [0.1, 0.05, 0.1 / 3]
    assert {"round", "train_loss", "train_first", "val_mse", "uplink_bytes", "wire_bytes"} <= lines[0].keys()
    rows = pq.read_table(folder / "clients.parquet").to_pylist()
    assert len(rows) == 9
    assert {row["status"] for row in rows} == {"ok"}
    assert all(row["num_examples"] == len(examples(row["client"])[0]) for row in rows)
    summary = json.loads((folder / "summary.json").read_text())
    ledger = pq.read_table(folder / "ledger.parquet").to_pylist()
    for direction in ("uplink", "downlink"):
        booked = sum(row["payload"] for row in ledger if row["direction"] == direction)
        assert booked == summary[f"{direction}_bytes"] > 0
    assert summary["best"] == min(line["val_mse"] for line in lines)
    assert load_file(folder / "model.safetensors").keys() == net().state_dict().keys()
    assert len(list((folder / "checkpoints").iterdir())) == 2


def test_the_folder_is_read_by_runs_and_report(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (status,) = find_runs([folder])
    assert (status.state, status.rounds, status.total_rounds) == ("finished", 3, 3)
    assert main(["runs", str(folder)]) in (0, None)
    if is_all():  # a report takes seconds to draw
        assert main(["report", str(folder), "--out", str(tmp_path / "page")]) in (0, None)
        assert any(path.suffix == ".html" for path in (tmp_path / "page").rglob("*"))
    said = capsys.readouterr().out
    assert "mse" in said
    assert "K^2" in said


def test_a_run_that_is_left_early_is_saved_by_hand(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with federation(out) as fed:
        for result in fed.rounds(10, 0.1):
            if result.round == 1:
                break
        fed.save()
        fed.save(tmp_path / "other.safetensors")
        ends = data_of(fed.model)
    assert json.loads((out / "summary.json").read_text())["rounds"] == 2
    assert (tmp_path / "other.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
    saved = load_file(out / "model.safetensors")
    assert b"".join(saved[name].numpy().tobytes() for name in net().state_dict()) == ends


def test_without_a_folder_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ended(rounds=1)
    assert list(tmp_path.iterdir()) == []


def test_clients_left_out_are_named_in_the_folder(tmp_path: Path) -> None:
    def train(model: nn.Module, lr: float) -> None:
        raise OSError("no disk")

    members = [client(0), fedq.Client(train, num_examples=0.5)]
    with fedq.Federation(net(), members, out=tmp_path / "run") as fed:
        fed.run(2, 0.1)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    reason = "training failed: OSError: no disk"
    assert summary["left_out"] == [{"round": r, "client": 1, "reason": reason} for r in range(2)]
    rows = pq.read_table(tmp_path / "run" / "clients.parquet").to_pylist()
    assert [row["status"] for row in rows] == ["ok", reason] * 2

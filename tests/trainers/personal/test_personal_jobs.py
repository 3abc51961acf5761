"""Personalised jobs as a whole: what travels, what a run leaves, any number of ranks, stops, and bad settings."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from distributed import run_group
from jobs import file_hash, small_config
from properties import few
from safetensors.torch import load_file

from fedq.cli import parse_args
from fedq.config import Config, validate
from fedq.errors import FieldError
from fedq.federated.rounds import Rounds
from fedq.federated.training import RoundContext
from fedq.personalize.__main__ import DEFAULTS
from fedq.personalize.methods import Local
from fedq.trainers.run import run_job

SMALL = {
    "train_examples": 120,
    "num_clients": 4,
    "cohort": None,
    "local_steps": 1,
    "rounds": 2,
    "partition": "shards:classes=3",
    "val_fraction": 0.05,
}
MIXED = SMALL | {
    "algorithm": "quped",
    "client_bits": "1,2,32",
    "client_models": "cnn62k,improved_cnn",
    "freeze_at": 0.5,
    "uplink": "int4",
}


def config(out: Path, **flags: Any) -> Config:
    return small_config(out, **SMALL | flags)


def run_jobs(rank: int, jobs: list[tuple[Config, int | None]]) -> list[dict[str, Any] | str]:
    """Run jobs one after another; one that has a round to stop in raises there, before it begins."""
    results: list[dict[str, Any] | str] = []
    for each, stop in jobs:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()), pytest.MonkeyPatch.context() as patch:
            patch.setattr(Rounds, "run", _stopping(Rounds.run, stop))
            try:
                results.append(run_job(each))
            except Stopped:
                results.append("stopped")
    return results


class Stopped(Exception):
    """What a job is stopped by."""


def _stopping(run: Callable, stop: int | None) -> Callable:
    def stopping(rounds: Rounds, context: RoundContext) -> Any:
        if context.round == stop:
            raise Stopped
        return run(rounds, context)

    return stopping


def run_here(out: Path, **flags: Any) -> dict[str, Any]:
    (summary,) = run_jobs(0, [(config(out, **flags), None)])
    assert isinstance(summary, dict)
    return summary


def rows(path: Path, leave_out: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    return pq.read_table(path).drop_columns(list(leave_out)).to_pylist()


def ledger(out: Path) -> list[dict[str, Any]]:
    return [row for row in rows(out / "ledger.parquet", ("wire",)) if row["payload"]]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clients of 1, 2 and 32 bits and of two networks, in one process."""
    out = tmp_path_factory.mktemp("mixed") / "run"
    run_here(out, **MIXED)
    return out


def test_the_fedavg_arm_is_the_plain_job_tested_by_client(tmp_path: Path) -> None:
    plain, own = run_here(tmp_path / "plain"), run_here(tmp_path / "own", personal_test=True)
    for file in ("model.safetensors", "ledger.parquet"):
        assert file_hash(tmp_path / "plain" / file) == file_hash(tmp_path / "own" / file)
    accuracies = own["client_test_accuracy"]
    assert own["test_accuracy"] == pytest.approx(sum(accuracies) / 4)
    assert 0 < own["test_balanced_accuracy"] < 1
    assert own["personal_test_accuracy"]["min"] == min(accuracies)
    assert own["personal_test_accuracy"]["max"] == max(accuracies)
    assert "client_test_accuracy" not in plain
    last = {c: load_file(tmp_path / "own" / "personal" / f"client-{c:06d}.safetensors") for c in range(4)}
    rounds = [row["best_round"] for row in rows(tmp_path / "own" / "personal.parquet")]
    model = load_file(tmp_path / "own" / "model.safetensors")
    assert all(torch.equal(last[c][n], model[n]) for c in range(4) if rounds[c] == 1 for n in model)


def test_only_the_global_model_travels(mixed: Path, tmp_path: Path) -> None:
    run_here(tmp_path / "fedavg", uplink="int4")
    assert [{**row} for row in ledger(mixed)] == ledger(tmp_path / "fedavg")


def test_every_client_has_a_row_a_model_and_centres(mixed: Path) -> None:
    table = rows(mixed / "personal.parquet")
    assert [row["bits"] for row in table] == [1, 2, 32, 1]
    assert [row["model"] for row in table] == ["cnn62k", "improved_cnn"] * 2
    summary = json.loads((mixed / "summary.json").read_text())
    assert summary["client_test_accuracy"] == [row["test_accuracy"] for row in table]
    assert summary["client_last_test_accuracy"] == [row["last_test_accuracy"] for row in table]
    for row, inner in zip(table, ["fc.0.weight", "fc1.weight"] * 2, strict=True):
        tensors = load_file(mixed / "personal" / f"client-{row['client']:06d}.safetensors")
        num_values = len(tensors[inner].unique())
        assert num_values <= 2 ** row["bits"] if row["bits"] != 32 else num_values > 100
    clients = rows(mixed / "clients.parquet")
    by_client = {c: [r["val_accuracy"] for r in clients if r["client"] == c] for c in range(4)}
    for row in table:
        assert row["val_accuracy"] == max(by_client[row["client"]])
        assert row["best_round"] == by_client[row["client"]].index(row["val_accuracy"])
        assert row["num_examples"] == sum(clients[row["client"]]["label_counts"])
        assert row["classes"] == [k for k, n in enumerate(clients[row["client"]]["label_counts"]) if n]
    centres = rows(mixed / "centres.parquet")
    assert {row["client"] for row in centres} == {0, 1, 3}
    assert {row["round"] for row in centres} == {0, 1}
    conv2 = [row for row in centres if (row["round"], row["client"], row["layer"]) == (1, 0, "conv2")]
    assert [row["index"] for row in conv2] == [0, 1]
    assert conv2[0]["value"] < conv2[1]["value"]
    assert sum(row["members"] for row in conv2) == 16 * 6 * 25


def assert_same_run(folder: Path, whole: Path, *, without: tuple[str, ...] = ("rank",)) -> None:
    assert file_hash(folder / "model.safetensors") == file_hash(whole / "model.safetensors")
    for client in range(4):
        name = f"personal/client-{client:06d}.safetensors"
        assert file_hash(folder / name) == file_hash(whole / name)
    assert rows(folder / "personal.parquet") == rows(whole / "personal.parquet")
    assert rows(folder / "centres.parquet") == rows(whole / "centres.parquet")
    assert rows(folder / "clients.parquet", without) == rows(whole / "clients.parquet", without)
    assert ledger(folder) == ledger(whole)


@pytest.mark.slow
def test_two_ranks_and_a_resumed_job_leave_the_same(mixed: Path, tmp_path: Path) -> None:
    stopped = config(tmp_path / "stopped", **MIXED)
    jobs = [(config(tmp_path / "two", **MIXED), None), (stopped, 1)]
    for summaries in run_group(2, run_jobs, jobs):
        assert summaries[1] == "stopped"
    assert_same_run(tmp_path / "two", mixed)
    again = config(tmp_path / "stopped", **MIXED, resume=tmp_path / "stopped")
    assert isinstance(run_jobs(0, [(again, None)])[0], dict)
    assert_same_run(tmp_path / "stopped", mixed)


@pytest.mark.parametrize("algorithm", few(["pfedme", "local", "perfedavg", "mutual", "qupel"], 2))
def test_a_method_leaves_the_same_wherever_it_runs(algorithm: str, tmp_path: Path) -> None:
    flags = {"algorithm": algorithm, "cohort": 3} | ({"client_bits": "2,32"} if algorithm == "qupel" else {})
    summary = run_here(tmp_path / "one", **flags)
    jobs = [(config(tmp_path / "two", **flags), None), (config(tmp_path / "stopped", **flags), 1)]
    run_group(2, run_jobs, jobs)
    run_jobs(0, [(config(tmp_path / "stopped", **flags, resume=tmp_path / "stopped"), None)])
    for folder in (tmp_path / "two", tmp_path / "stopped"):
        for file in ("model.safetensors", *(f"personal/client-{c:06d}.safetensors" for c in range(4))):
            assert file_hash(folder / file) == file_hash(tmp_path / "one" / file)
        assert rows(folder / "personal.parquet") == rows(tmp_path / "one" / "personal.parquet")
    assert summary["algorithm"] == algorithm
    assert (summary["uplink_bytes"] == 0) == (algorithm == "local")


def test_local_models_send_nothing_and_client_0_is_saved(tmp_path: Path) -> None:
    run_here(tmp_path / "run", algorithm="local")
    assert not ledger(tmp_path / "run")
    assert file_hash(tmp_path / "run/model.safetensors") == file_hash(
        tmp_path / "run/personal/client-000000.safetensors"
    )


def test_a_client_that_fails_is_named_and_keeps_its_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train, kept = Local.run, {}

    def broken(method: Local, client: int, start: torch.Tensor, *given: Any, **options: Any) -> Any:
        if client == 2:
            kept[method.round] = method.models.load(client, start).flat
        if (client, method.round) == (2, 1):
            raise ValueError("no luck")
        return train(method, client, start, *given, **options)

    monkeypatch.setattr(Local, "run", broken)
    summary = run_here(tmp_path / "run", algorithm="local", rounds=3)
    (row,) = summary["left_out"]
    assert (row["round"], row["client"]) == (1, 2)
    assert "no luck" in row["reason"]
    assert torch.equal(kept[1], kept[2])
    assert not torch.equal(kept[0], kept[1])


@pytest.mark.parametrize("algorithm", few(["perfedavg", "quped"], 1))
def test_clients_of_a_single_class(algorithm: str, tmp_path: Path) -> None:
    bits = {"client_bits": "1"} if algorithm == "quped" else {}
    # Ten labels in order, one group each: ten clients of one class.
    one_each = {"partition": "groups:" + "/".join(map(str, range(10))), "num_clients": 10, "min_examples": 5}
    summary = run_here(tmp_path / "run", algorithm=algorithm, **bits, **one_each)
    assert [row["classes"] for row in rows(tmp_path / "run" / "personal.parquet")] == [[k] for k in range(10)]
    assert all(0 <= accuracy <= 1 for accuracy in summary["client_test_accuracy"])


def test_without_validation_data_the_last_model_counts(tmp_path: Path) -> None:
    summary = run_here(tmp_path / "run", algorithm="local", val_fraction=0.0)
    table = rows(tmp_path / "run" / "personal.parquet")
    assert [row["best_round"] for row in table] == [1] * 4
    assert summary["client_test_accuracy"] == summary["client_last_test_accuracy"]


def test_a_warm_start_is_where_everybody_begins(tmp_path: Path) -> None:
    run_here(tmp_path / "first")
    start = tmp_path / "first" / "model.safetensors"
    cold = run_here(tmp_path / "cold", algorithm="local", rounds=1, lr=1e-30, optimizer="sgd:weight_decay=0")
    warm = run_here(
        tmp_path / "warm", algorithm="local", rounds=1, lr=1e-30, optimizer="sgd:weight_decay=0", warm_start=start
    )
    assert file_hash(tmp_path / "warm" / "model.safetensors") == file_hash(start)
    assert cold["client_test_accuracy"] != warm["client_test_accuracy"]
    with pytest.raises(FieldError, match=r"warm_start.*same network"):
        run_job(config(tmp_path / "other", algorithm="local", model="improved_cnn", warm_start=start))


# ---- settings ----


@pytest.mark.parametrize(
    ("flags", "field", "words"),
    [
        ({"algorithm": "quped", "client_bits": "1,9"}, "client_bits", "1 to 8, or 32"),
        ({"algorithm": "quped", "client_models": "cnn62k,resnet21"}, "client_models", "resnet20"),
        ({"algorithm": "quped", "side_by_side": 2}, "side_by_side", "one by one"),
        ({"algorithm": "mutual", "client_bits": "2"}, "client_bits", "of qupel, quped"),
        ({"algorithm": "qupel", "client_models": "resnet20"}, "client_models", "of quped, mutual, local"),
        ({"algorithm": "quped", "client_models": "cnn62k,my:net", "norm": "group"}, "norm", "batch with a model"),
        ({"algorithm": "pfedme", "attachment": 100.0}, "attachment", "1 / lr"),
        ({"algorithm": "pfedme", "personal_steps": 0}, "personal_steps", "1 or more"),
        ({"algorithm": "local", "personal_steps": 3}, "personal_steps", "of perfedavg, pfedme"),
        ({"algorithm": "perfedavg", "attachment": 3.0}, "attachment", "of pfedme"),
        ({"algorithm": "mutual", "distill_weight": 1.5}, "distill_weight", "0 to 1"),
        ({"algorithm": "mutual", "temperature": 0.0}, "temperature", "above 0"),
        ({"algorithm": "mutual", "global_loss": "distill"}, "global_loss", "of quped"),
        ({"algorithm": "mutual", "personal_lr": -1.0}, "personal_lr", "above 0"),
        ({"algorithm": "mutual", "prox_mu": 0.1}, "prox_mu", "0 with"),
        ({"algorithm": "mutual", "weights": "binary"}, "weights", "float"),
        ({"algorithm": "quped", "centres": "fixed", "client_bits": "2"}, "client_bits", "1 or 32"),
        ({"algorithm": "quped", "freeze_at": 0.0}, "freeze_at", "above 0"),
        ({"algorithm": "mutual", "exchange": "step", "cohort": None}, "exchange", "round"),
        ({"personal_test": True, "exchange": "none"}, "exchange", "--personal-test"),
        ({"distill_weight": 0.3}, "distill_weight", "--algorithm fedavg"),
        ({"algorithm": "local", "warm_start": Path("nowhere")}, "warm_start", "exists"),
        ({"warm_start": Path("nowhere")}, "warm_start", "models of their own"),
    ],
)
def test_settings_that_cannot_be_used_are_named(tmp_path: Path, flags: dict[str, Any], field: str, words: str) -> None:
    with pytest.raises(FieldError, match=words.replace("(", r"\(")) as caught:
        config(tmp_path / "run", **flags)
    assert caught.value.field == field


@pytest.mark.parametrize("algorithm", ["fedavg", "local", "perfedavg", "pfedme", "mutual", "qupel", "quped"])
def test_the_module_has_defaults_that_fit_every_algorithm(algorithm: str) -> None:
    given = parse_args(["--algorithm", algorithm, "--server", "fedadam:lr=0.01"], defaults=DEFAULTS)
    validate(given)
    assert (given.clients.num_clients, given.clients.partition) == (10, "shards:classes=3")
    assert given.personal.algorithm == algorithm

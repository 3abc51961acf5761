"""Figures from the folders of real runs: files, the numbers in the CSV against the runs' own, and errors."""

from __future__ import annotations

import csv
import json
import statistics
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from distributed import run_group
from jobs import small_config
from properties import is_all
from safetensors.torch import load_file
from stopped_jobs import run_jobs

from fedq.cli import main
from fedq.errors import FieldError
from fedq.report.arms import Run, group, read_runs
from fedq.report.deployed import deployed_models
from fedq.report.figures import KINDS, write_figures

ARMS: dict[str, dict[str, Any]] = {
    "float": {"uplink": "fp32"},
    "four": {"weights": "int4", "uplink": "int4"},
    "one": {"weights": "binary", "uplink": "sign"},
    "mixed": {"weights": "head=8,body=1,tail=8", "uplink": "sign"},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("runs")
    folders = {root / f"{name}-{seed}": flags | {"seed": seed} for name, flags in ARMS.items() for seed in (0, 1)}
    few = {"num_clients": 2, "cohort": None, "rounds": 2, "local_steps": 1}
    run_group(1, run_jobs, [(small_config(path, **few, **flags), None) for path, flags in folders.items()])
    return list(folders)


@pytest.fixture(scope="module")
def drawn(runs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    out = tmp_path_factory.mktemp("figures")
    centres = [
        {"round": r, "client": 1, "layer": layer, "index": i, "value": 0.1 * i + 0.01 * r, "members": 5}
        for r in range(3)
        for layer in ("a", "b", "c", "d")
        for i in range(4)
    ]
    pq.write_table(pa.Table.from_pylist(centres), runs[2] / "centres.parquet")
    summary = json.loads((runs[0] / "summary.json").read_text())
    (runs[0] / "summary.json").write_text(json.dumps(summary | {"client_test_accuracy": [0.25, 0.5]}))
    return out, write_figures(runs, out)


def rows(drawn: tuple[Path, list[str]], name: str) -> list[dict[str, str]]:
    with (drawn[0] / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def summaries(runs: list[Path], arm: str) -> list[dict[str, Any]]:
    return [json.loads((path / "summary.json").read_text()) for path in runs if path.name.startswith(arm)]


def test_every_figure_is_a_picture_a_drawing_and_a_table(drawn: tuple[Path, list[str]]) -> None:
    out, lines = drawn
    assert len(lines) == len(KINDS)
    for kind in KINDS:
        assert (out / f"{kind.name}.png").read_bytes().startswith(b"\x89PNG")
        assert ElementTree.parse(out / f"{kind.name}.svg").getroot().tag.endswith("svg")
        assert rows(drawn, kind.name)


def test_accuracy_by_bits_is_mean_and_sd_over_seeds(runs: list[Path], drawn: tuple[Path, list[str]]) -> None:
    by_bits = {float(row["bits"]): row for row in rows(drawn, "accuracy_by_bits")}
    assert sorted(by_bits) == [1, 4, 32]  # layers of different bits are no bit width
    for bits, arm in ((1, "one"), (4, "four"), (32, "float")):
        values = [100 * s["test_accuracy"] for s in summaries(runs, arm)]
        assert float(by_bits[bits]["test_accuracy_mean"]) == pytest.approx(statistics.fmean(values))
        assert float(by_bits[bits]["test_accuracy_sd"]) == pytest.approx(statistics.stdev(values))
        assert by_bits[bits]["num_seeds"] == "2"


def test_accuracy_by_megabytes_ends_where_the_runs_do(runs: list[Path], drawn: tuple[Path, list[str]]) -> None:
    last = {row["arm"]: row for row in rows(drawn, "accuracy_by_megabytes")}
    assert set(last) == set(ARMS)
    spent = [s["uplink_bytes"] + s["downlink_bytes"] for s in summaries(runs, "one")]
    assert float(last["one"]["megabytes"]) == pytest.approx(statistics.fmean(spent) / 1e6)
    assert last["one"]["round"] == "2"


def test_histograms_are_those_of_deployed_weights(drawn: tuple[Path, list[str]]) -> None:
    by_arm: dict[str, list[dict[str, str]]] = {}
    for row in rows(drawn, "weight_histograms"):
        by_arm.setdefault(row["arm"], []).append(row)
    assert len(by_arm) == 4
    for arm, bins in by_arm.items():
        assert sum(float(row["share"]) for row in bins) == pytest.approx(1)
        used = sum(float(row["share"]) > 0 for row in bins)
        assert used == 2 if arm in ("one", "mixed") else used > 2


@pytest.mark.slow
def test_clients_own_models_are_shown_as_they_are_deployed(tmp_path: Path) -> None:
    flags = {"num_clients": 4, "cohort": None, "local_steps": 1, "rounds": 2, "partition": "shards:classes=3"}
    personal = {"algorithm": "quped", "client_bits": "1,2,32", "freeze_at": 0.5, "val_fraction": 0.05}
    alone = {"algorithm": "quped", "exchange": "none", "client_bits": "1", "freeze_at": 0.5, "rounds": 2}
    paths = [tmp_path / "personal", tmp_path / "alone"]
    configs = [small_config(paths[0], **flags | personal), small_config(paths[1], num_clients=1, cohort=None, **alone)]
    run_group(1, run_jobs, [(config, None) for config in configs])
    write_figures(paths, tmp_path / "figures")
    by_arm: dict[str, list[dict[str, str]]] = {}
    for row in rows((tmp_path / "figures", []), "weight_histograms"):
        by_arm.setdefault(row["arm"], []).append(row)
    files = {
        "personal: client 0, 1 bit": paths[0] / "personal" / "client-000000.safetensors",
        "personal: client 1, 2 bits": paths[0] / "personal" / "client-000001.safetensors",
        "personal: client 2, float": paths[0] / "personal" / "client-000002.safetensors",
        "alone": paths[1] / "model.safetensors",
    }
    assert set(by_arm) == set(files)
    for arm, file in files.items():
        tensors = load_file(file)
        (tensor,) = {row["tensor"] for row in by_arm[arm]}
        assert tensor == [name for name in tensors if tensors[name].dim() == 4][1]
        values = tensors[tensor].unique().tolist()
        shown = [(float(row["from"]), float(row["to"])) for row in by_arm[arm] if float(row["share"]) > 0]
        assert all(any(low <= value <= high for low, high in shown) for value in values)
        assert len(shown) <= len(values)
        assert sum(float(row["share"]) for row in by_arm[arm]) == pytest.approx(1)
    assert len({row["from"] for row in by_arm["alone"] if float(row["share"]) > 0}) == 2
    (paths[1] / "model.safetensors").unlink()
    assert {model.path for path in paths for model in deployed_models(read_runs([path])[0])} == {
        file for arm, file in files.items() if arm != "alone"
    }
    files["personal: client 0, 1 bit"].write_bytes(b"cut short")
    with pytest.raises(FieldError, match="a model's file"):
        write_figures(paths, tmp_path / "figures")


def test_figures_without_data_are_left_out_and_say_why(runs: list[Path], tmp_path: Path) -> None:
    lines = write_figures(runs[-2:], tmp_path)
    assert [line for line in lines if "left out" in line] == [
        "accuracy_by_bits: left out, needs runs of at least two bit widths",
        "centres: left out, needs runs with learned centres (--algorithm quped)",
        "client_accuracy: left out, needs runs in which clients are tested one by one",
    ]
    assert not (tmp_path / "centres.png").exists()


def test_arms_are_named_by_their_folders_or_by_what_sets_them_apart(runs: list[Path], tmp_path: Path) -> None:
    chosen = [path for path in runs if path.name.startswith(("one", "four"))]
    assert [(arm.name, len(arm.runs)) for arm in group(read_runs(chosen))] == [("one", 2), ("four", 2)]
    # As folders are called by default, by time.
    moved = [
        Run(tmp_path / f"2026-{n}-{'abcd'[n]}", run.summary, run.config) for n, run in enumerate(read_runs(chosen))
    ]
    assert [(arm.name, len(arm.runs)) for arm in group(moved)] == [("binary, sign", 2), ("int4, int4", 2)]


def test_the_command(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["fedq"])
    shown = [runs[0].parent] if is_all() else runs[:1]  # of which fewer figures can be drawn
    assert main(["figures", *map(str, shown), "--out", str(tmp_path / "out")]) == 0
    assert "accuracy_by_bits" in capsys.readouterr().out
    assert main(["figures", str(tmp_path / "nowhere"), "--out", str(tmp_path / "out")]) == 2
    assert "a folder that exists" in capsys.readouterr().err


def test_a_folder_without_a_finished_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FieldError, match="at least one finished run"):
        read_runs([tmp_path])

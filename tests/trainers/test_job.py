"""Whole jobs on real digits: the same bytes at every world size, counted bytes, files, settings, and refusals."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from distributed import run_group
from jobs import SMALL, LazyJobs, file_hash, run_watched, small_config
from properties import few, slow_but_for
from safetensors.torch import load_file
from sklearn.metrics import balanced_accuracy_score

from fedq.checkpoint import Checkpoints
from fedq.cli import main
from fedq.codecs import codec
from fedq.config import Config
from fedq.configfile import load_config
from fedq.data import load_dataset, normalize
from fedq.federated.cohort import sample_cohort
from fedq.layout import Layout
from fedq.models import build_model
from fedq.runfolder import SUMMARY_KEYS
from fedq.wire import HEADER_NBYTES

NAN_AT = (1, sample_cohort(7, 5, seed=0, round=1)[2])

# The same jobs run at every world size. Feedback keeps clients on one rank; without it the cohort is dealt evenly.
CASES = {
    "int4": {"uplink": "int4", "downlink": "int8", "feedback": "on"},
    "sign": {"uplink": "sign", "downlink": "int4", "feedback": "off", "server": "fedadam:lr=0.01"},
    "threshold": {"uplink": "threshold:value=0.01", "downlink": "topk:density=0.1", "downlink_to": "all"},
    "nan": {"uplink": "int8", "downlink": "int8"},
    "batchnorm": {"model": "resnet20", "rounds": 1, "local_steps": 1, "num_clients": 3, "cohort": None},
    "alone": {"exchange": "none", "num_clients": 3, "cohort": None, "rounds": 2},
}


def jobs_of(world_size: int, folder: Path, cases: dict[str, dict]) -> LazyJobs:
    def job(folder: Path, case: str) -> tuple[Config, tuple[int, int] | None]:
        return small_config(folder, **cases[case]), NAN_AT if case == "nan" else None

    return LazyJobs(world_size, folder, run_watched, job)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[int, LazyJobs]:
    return {n: jobs_of(n, tmp_path_factory.mktemp(f"ranks{n}"), CASES) for n in (1, 2, 3)}


# ---- the same bytes wherever clients run ----


@pytest.mark.parametrize("world_size", few([2, 3], 1))
@pytest.mark.parametrize("case", slow_but_for(CASES, "int4", "threshold", "alone"))
def test_models_and_messages_do_not_depend_on_the_ranks(
    results: dict[int, LazyJobs], case: str, world_size: int
) -> None:
    one, other = results[1], results[world_size]
    (first,), others = one.ranks(case), other.ranks(case)
    assert (len(first.frames) > 0) == (case != "alone")
    assert other.model(case) == one.model(case)
    assert others[0].frames == first.frames
    assert {seen.replica for seen in others} == {first.replica}
    same = ["test_accuracy", "test_balanced_accuracy", "best_val_accuracy"]
    same += ["uplink_bytes", "downlink_bytes", "rounds"]
    assert all(others[0].summary[k] == first.summary[k] for k in same)


@pytest.mark.parametrize("world_size", few([2, 1, 3], 1))
@pytest.mark.parametrize("case", slow_but_for(CASES, "int4", "threshold", "alone"))
def test_the_ledger_is_what_the_process_group_was_given(
    results: dict[int, LazyJobs], case: str, world_size: int
) -> None:
    ranks, folder = results[world_size].ranks(case), results[world_size].folder(case)
    rows = pq.read_table(folder / "ledger.parquet").to_pylist()
    wire = sum(row["wire"] for row in rows)
    assert wire == ranks[0].summary["wire_bytes"]
    assert wire == sum(seen.sent for seen in ranks) == sum(seen.received for seen in ranks)
    assert (wire > 0) == (world_size > 1)
    payloads: Counter[tuple[int, int]] = Counter()
    for row in rows:
        if row["direction"] == "uplink":
            payloads[row["round"], row["client"]] += row["payload"]
    assert +payloads == {key: nbytes for key, (_, nbytes) in ranks[0].frames.items()}


@pytest.mark.parametrize("world_size", few([2, 1, 3], 1))
def test_an_update_that_is_not_finite_is_named_and_the_round_goes_on(
    results: dict[int, LazyJobs], world_size: int
) -> None:
    number, client = NAN_AT
    seen, folder = results[world_size].ranks("nan")[0], results[world_size].folder("nan")
    reason = "update is not finite"
    assert seen.summary["left_out"] == [{"round": number, "client": client, "reason": reason}]
    assert seen.summary["rounds"] == 3
    assert seen.frames[NAN_AT][1] == HEADER_NBYTES
    rows = pq.read_table(folder / "clients.parquet").to_pylist()
    statuses = {(row["round"], row["client"]): row["status"] for row in rows}
    assert statuses.pop(NAN_AT) == reason
    assert set(statuses.values()) == {"ok"}
    model = load_file(folder / "model.safetensors")
    assert all(bool(torch.isfinite(tensor).all()) for tensor in model.values())


# ---- one rank, many settings ----

SOLO = {
    "first": {"uplink": "int4", "downlink": "int8"},
    "again": {"uplink": "int4", "downlink": "int8"},
    "other seed": {"uplink": "int4", "downlink": "int8", "seed": 1},
    "one bit": {"uplink": "sign", "downlink": "fp32", "histogram_every": 1},
    "target": {"target_accuracy": 0.001, "rounds": 20},
    "to all": {"downlink_to": "all", "downlink": "int4"},
    "central": {"exchange": "none", "num_clients": 1, "cohort": None},
    "bf16": {"precision": "bf16", "rounds": 1},
    "fp16": {"precision": "fp16", "rounds": 1},
    "group": {"model": "resnet20", "norm": "group", "rounds": 1, "local_steps": 1, "num_clients": 2, "cohort": 1},
    "no validation": {"val_fraction": 0.0, "rounds": 1},
    "small": {"num_clients": 12, "partition": "dirichlet:alpha=0.3", "batch_size": 64, "local_steps": None},
    "adamw": {"optimizer": "adamw", "lr": 0.001, "prox_mu": 0.1, "lr_schedule": "steps:at=1,factor=0.1", "rounds": 2},
}


@pytest.fixture(scope="module")
def solo(tmp_path_factory: pytest.TempPathFactory) -> LazyJobs:
    return jobs_of(1, tmp_path_factory.mktemp("solo"), SOLO)


def summary(results: LazyJobs, case: str) -> dict:
    return json.loads((results.folder(case) / "summary.json").read_text())


def test_a_seed_decides_the_model(solo: LazyJobs) -> None:
    assert solo.model("first") == solo.model("again")
    assert solo.model("first") != solo.model("other seed")


def test_a_config_can_be_run_again(solo: LazyJobs, tmp_path: Path) -> None:
    written = solo.folder("first") / "config.yaml"
    assert yaml.safe_load(written.read_text())["schema_version"] == 1
    config = load_config(written, Config())
    assert config == small_config(solo.folder("first"), **SOLO["first"])
    moved = replace(config, run=replace(config.run, out=tmp_path / "again"))
    run_group(1, run_watched, [(moved, None)])
    assert file_hash(tmp_path / "again" / "model.safetensors") == solo.model("first")


@pytest.mark.parametrize("case", slow_but_for(SOLO, "first", "one bit", "target", "central", "small"))
def test_every_file_of_a_run_can_be_read(solo: LazyJobs, case: str) -> None:
    folder, told = solo.folder(case), summary(solo, case)
    assert not list(folder.glob("*.tmp"))
    assert list((folder / "tensorboard").glob("events.*"))
    assert set(SUMMARY_KEYS) | {"schema_version"} <= told.keys()
    assert {k: v for k, v in told.items() if k != "schema_version"} == json.loads(
        json.dumps(solo.ranks(case)[0].summary)
    )
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["round"] for line in lines] == list(range(told["rounds"]))
    ledger = pq.read_table(folder / "ledger.parquet").to_pylist()
    for direction in ("uplink", "downlink"):
        rows = [row for row in ledger if row["direction"] == direction]
        assert sum(row["payload"] for row in rows) == told[f"{direction}_bytes"]
        assert sum(row["raw"] for row in rows) == told[f"{direction}_bytes_fp32"]
    assert sum(row["wire"] for row in ledger) == told["wire_bytes"] == 0
    model = load_file(folder / "model.safetensors")
    assert sum(t.numel() for n, t in model.items() if "running_" not in n and "num_b" not in n) == told["num_params"]
    if "exchange" in SOLO[case]:
        return
    clients = pq.read_table(folder / "clients.parquet").to_pylist()
    assert {(row["round"], row["client"]) for row in clients} == set(solo.ranks(case)[0].frames)
    assert all(sum(row["label_counts"]) == row["num_examples"] for row in clients)
    histograms = pq.read_table(folder / "histograms.parquet").to_pylist()
    assert {row["stage"] for row in histograms} >= {"weight", "update", "decoded"}
    checkpoints = Checkpoints(folder / "checkpoints")
    assert checkpoints.numbers() == list(range(1, told["rounds"] + 1))[-2:]
    state = checkpoints.load(told["rounds"]).state
    flat = torch.cat([t.flatten() for t in model.values() if t.is_floating_point()])
    assert torch.equal(state["replica"].sort().values, flat.sort().values)
    assert state["server"]["master"].shape == state["replica"].shape
    assert ([path for path in (folder / "residuals").glob("*") if path.suffix != ".f32"]) == []


def layout_of(case: str, direction: str) -> Layout:
    """The layout, from the public pieces; every job's feedback is what its codec asks for."""
    flags = SMALL | {"uplink": "int4", "downlink": "int8", "norm": "batch"} | SOLO[case]
    model = build_model(flags["model"], norm=flags["norm"])
    chosen = codec(flags[direction])
    return Layout.of(model, chosen.resolved(feedback=direction == "downlink" or chosen.wants_feedback))


@pytest.mark.parametrize("case", slow_but_for(["first", "one bit", "to all", "group", "small"], "first", "one bit"))
def test_bytes_follow_the_layout(solo: LazyJobs, case: str) -> None:
    flags, told = SMALL | SOLO[case], summary(solo, case)
    up, down = layout_of(case, "uplink"), layout_of(case, "downlink")
    messages = flags["rounds"] * flags["cohort"]
    assert told["uplink_bytes"] == messages * (up.fixed_nbytes + HEADER_NBYTES)
    assert told["uplink_bytes_fp32"] == messages * 4 * up.numel
    if case == "to all":
        change = down.fixed_nbytes + HEADER_NBYTES
        assert told["downlink_bytes"] == flags["num_clients"] * (4 * down.numel + flags["rounds"] * change)


# Bytes of n coded elements: 4-bit codes in whole blocks of 256, each with a bfloat16 scale; packed signs, a scale for
# each 1,024.
FORMULAS = {
    "first": lambda n: math.ceil(n / 256) * (128 + 2),
    "one bit": lambda n: math.ceil(n / 8) + 2 * math.ceil(n / 1024),
}


@pytest.mark.parametrize("case", FORMULAS)
def test_uplink_bytes_follow_the_codecs_formula(solo: LazyJobs, case: str) -> None:
    shapes = [param.shape for param in build_model("cnn62k").parameters()]
    coded = sum(FORMULAS[case](shape.numel()) for shape in shapes if len(shape) > 1)
    exempt = sum(2 * shape.numel() for shape in shapes if len(shape) == 1)
    frames = solo.ranks(case)[0].frames
    assert len(frames) == 15
    assert {nbytes for _, nbytes in frames.values()} == {HEADER_NBYTES + coded + exempt}


def test_a_target_accuracy_ends_the_run_cleanly(solo: LazyJobs) -> None:
    told = summary(solo, "target")
    assert told["rounds"] == 1
    assert told["best_val_accuracy"] >= 0.001
    assert told["test_accuracy"] > 0


@pytest.mark.slow
def test_settings_are_used(solo: LazyJobs) -> None:
    assert summary(solo, "bf16")["precision"] == "bf16"
    assert summary(solo, "fp16")["precision"] == "fp16"
    assert solo.model("bf16") != solo.model("fp16")
    assert summary(solo, "no validation")["best_val_accuracy"] == 0
    assert summary(solo, "to all")["downlink_to"] == "all"
    lines = [json.loads(line) for line in (solo.folder("adamw") / "metrics.jsonl").read_text().splitlines()]
    assert [line["lr"] for line in lines] == pytest.approx([0.001, 0.0001])
    assert not [n for n in load_file(solo.folder("group") / "model.safetensors") if "running" in n]


def test_histograms_come_as_often_as_asked(solo: LazyJobs) -> None:
    def rounds(case: str) -> set[int]:
        return {row["round"] for row in pq.read_table(solo.folder(case) / "histograms.parquet").to_pylist()}

    assert rounds("one bit") == {0, 1, 2}
    assert rounds("first") == {0, 2}
    rows = pq.read_table(solo.folder("one bit") / "histograms.parquet").to_pylist()
    codes = [row for row in rows if row["stage"] == "codes"]
    assert codes
    assert all(0 <= row["entropy_bits"] <= 1 for row in codes), "a sign has at most one bit"
    sizes = {span.name: span.numel for span in layout_of("one bit", "uplink").spans}
    assert all(row["num"] == sizes[row["tensor"]] for row in rows if row["stage"] == "update")


def test_training_alone_sends_nothing(solo: LazyJobs) -> None:
    told = summary(solo, "central")
    assert told["exchange"] == "none"
    assert told["uplink_bytes"] == told["downlink_bytes"] == told["wire_bytes"] == 0
    assert told["test_accuracy"] > 0
    rows = pq.read_table(solo.folder("central") / "clients.parquet").to_pylist()
    assert [row["round"] for row in rows] == list(range(told["rounds"]))
    assert all(sum(row["label_counts"]) == row["num_examples"] for row in rows)
    assert max(row["val_accuracy"] for row in rows) == told["best_val_accuracy"]


@pytest.mark.parametrize("case", ["first", "central"])
def test_the_balanced_accuracy_is_scikit_learns_of_the_saved_model(solo: LazyJobs, case: str, tmp_path: Path) -> None:
    data = load_dataset("digits", data_dir=tmp_path, train_examples=280)
    model = build_model("cnn62k")
    model.load_state_dict(load_file(solo.folder(case) / "model.safetensors"))
    with torch.no_grad():
        said = model.eval()(normalize(data.test.images, data.mean, data.std)).argmax(1)
    told = summary(solo, case)
    assert told["test_accuracy"] == pytest.approx(float((said == data.test.labels).double().mean()))
    assert told["test_balanced_accuracy"] == pytest.approx(balanced_accuracy_score(data.test.labels, said))


def test_small_clients_are_told_of_once_and_every_client_is_counted(solo: LazyJobs) -> None:
    rows = pq.read_table(solo.folder("small") / "clients.parquet").to_pylist()
    held = {row["client"]: row["num_examples"] for row in rows}
    assert min(held.values()) < 64
    assert np.all([row["num_examples"] == held[row["client"]] for row in rows])


# ---- refusals ----

REFUSALS = {
    "unknown codec": (["--uplink", "nope"], "uplink='nope'", "int4"),
    "unknown option": (["--uplink", "int4:blok=3"], "uplink='int4:blok=3'", "block"),
    "bits": (["--uplink", "int9"], "uplink='int9'", "int8"),
    "density": (["--downlink", "topk:density=0"], "downlink='topk:density=0'", "density"),
    "cohort": (["--num-clients", "4", "--cohort", "9"], "cohort=9", "1 to 4"),
    "out": (["--out", "{tmp}/file/run"], "out='{tmp}/file/run'", "a folder that can be written"),
    "no data": (["--dataset", "cifar10", "--data-dir", "{tmp}/empty"], "cifar10", "--download"),
    "data layout": (["--dataset", "{tmp}/flat"], "flat", "folder"),
    "own model": (["--model", "own_net:fixed"], "model='own_net:fixed'", "of shape (2, 10); this one returns"),
    "own norm": (["--model", "own_net:fixed", "--norm", "group"], "norm='group'", "batch with a model of one's own"),
    "own model and auto": (["--model", "own_net:fixed", "--uplink", "auto"], "model='own_net:fixed'", "(2, 7)"),
}


@pytest.fixture
def ground(tmp_path: Path) -> Path:
    """A file where a folder is wanted, an empty folder, one whose files are no data set, and a model of one's own."""
    (tmp_path / "file").touch()
    (tmp_path / "own_net.py").write_text(
        "from torch import nn\ndef fixed(): return nn.Sequential(nn.Flatten(), nn.Linear(3072, 7))\n"
    )
    (tmp_path / "empty").mkdir()
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat" / "notes.txt").write_text("no images")
    return tmp_path


@pytest.mark.parametrize("case", REFUSALS)
def test_what_cannot_be_used_is_refused_in_one_line(
    case: str, ground: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, named, allowed = REFUSALS[case]
    monkeypatch.chdir(ground)
    arguments = [text.format(tmp=ground) for text in arguments]
    assert main(["--model", "cnn62k", "--device", "cpu", *arguments]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert named.format(tmp=ground) in lines[0]
    assert "allowed: " in lines[0]
    assert allowed in lines[0]


def test_data_that_cannot_be_used_are_refused_in_one_line(ground: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (ground / "empty" / "cat").symlink_to("nowhere")
    assert main(["--dataset", str(ground / "empty"), "--device", "cpu"]) == 2
    expected = f"error: {ground}/empty/cat: this link leads to nowhere, where nothing can be read\n"
    assert capsys.readouterr().err == expected


@pytest.mark.slow
def test_the_script_refuses_with_code_2_and_no_traceback(ground: Path) -> None:
    """Through the real script; one case seen before any work and one from the launcher's environment, side by side."""
    script = str(Path(__file__).parents[2] / "train.py")
    runs = [
        (["--uplink", "int9"], {}, "uplink='int9'"),
        ([], {"RANK": "3", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "RANK='3'"),
    ]
    started = [
        subprocess.Popen(
            [sys.executable, script, *arguments],
            cwd=ground,
            env=os.environ | environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for arguments, environ, _ in runs
    ]
    for process, (_, _, named) in zip(started, runs, strict=True):
        out, err = process.communicate(timeout=120)
        assert (process.returncode, out) == (2, "")
        assert err.startswith("error: ")
        assert named in err
        assert err.count("\n") == 1

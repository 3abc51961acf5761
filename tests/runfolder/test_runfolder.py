from __future__ import annotations

import inspect
import json
import math
import re
import subprocess
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from properties import tried
from safetensors.torch import load_file

from fedq.errors import FieldError
from fedq.ledger import Ledger, MessageParts
from fedq.runfolder import FLUSH_EVERY_ROUNDS, SUMMARY_KEYS, NullRunFolder, RunFolder, environment_info, git_commit
from fedq.runfolder.tables import histogram

torch.set_num_threads(1)

CLIENT = {"round": 1, "client": 3, "rank": 0, "num_examples": 30, "status": "ok", "label_counts": [10, 0, 20]}
SCORES = {"train_loss": 0.5, "train_accuracy": 0.75, "val_accuracy": None}


@pytest.fixture
def folder(tmp_path):
    with RunFolder.create(tmp_path / "run", name="test") as run:
        yield run


def summary(**changes):
    return dict.fromkeys(SUMMARY_KEYS, 0) | changes


def test_default_folder_is_named_by_time_and_a_safe_name_and_never_taken_twice(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fedq.runfolder.folder.datetime", FrozenClock)
    paths = []
    for _ in range(3):
        with RunFolder.create(None, name="digits int4:block=256/../x") as run:
            paths.append(str(run.path))
    stem = "runs/20240229-235958-digits-int4-block-256-..-x"
    assert paths == [stem, f"{stem}-2", f"{stem}-3"]


class FrozenClock:
    @staticmethod
    def now():
        import datetime

        return datetime.datetime(2024, 2, 29, 23, 59, 58)


@pytest.mark.parametrize("file", ["summary.json", "config.yaml"])
def test_a_folder_that_holds_a_run_is_refused(tmp_path, file):
    (tmp_path / file).write_text("{}")
    with pytest.raises(FieldError, match=r"out=.*does not hold a run already"):
        RunFolder.create(tmp_path, name="test")
    RunFolder.create(tmp_path, name="test", exist_ok=True).close()


def test_an_unwritable_folder_is_refused_with_the_reason(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FieldError, match=r"out=.*file/run.*a folder that can be written \(Not a directory\)"):
        RunFolder.create(tmp_path / "file" / "run", name="test")
    with pytest.raises(FieldError, match=r"a folder that can be written \(File exists\)"):
        RunFolder.create(tmp_path / "file", name="test")


def test_a_folder_without_write_permission_is_refused(tmp_path, monkeypatch):
    def refuse(**_):  # root may write anywhere, so the permission bits alone would not show it
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    with pytest.raises(FieldError, match=r"a folder that can be written \(Permission denied\)"):
        RunFolder.create(tmp_path, name="test")


def test_config_comes_back_complete_and_in_order(folder):
    folder.write_config({"run": {"rounds": 3, "out": Path("a/b"), "lrs": (0.1, 0.2)}, "data": {"size": None}})
    text = (folder.path / "config.yaml").read_text()
    assert text.startswith("schema_version: 1\n")
    read = yaml.safe_load(text)
    assert read == {
        "schema_version": 1,
        "run": {"rounds": 3, "out": "a/b", "lrs": [0.1, 0.2]},
        "data": {"size": None},
    }
    assert list(read) == ["schema_version", "run", "data"]


def test_metrics_are_lines_at_once_and_tensorboard_scalars(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder.log_metrics(1, val_accuracy=0.5, train_loss=torch.tensor(1.25), uplink_bytes=np.int64(1000), seconds=2.0)
    folder.log_metrics(2, val_accuracy=math.nan, note="stopped")
    lines = [json.loads(line) for line in (folder.path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [
        {"round": 1, "val_accuracy": 0.5, "train_loss": 1.25, "uplink_bytes": 1000, "seconds": 2.0},
        {"round": 2, "val_accuracy": None, "note": "stopped"},
    ]
    folder.close()
    events = EventAccumulator(str(folder.path / "tensorboard")).Reload()
    found = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert found == {
        "val/accuracy": [(1, 0.5)],
        "train/loss": [(1, 1.25)],
        "bytes/uplink": [(1, 1000.0)],
        "run/seconds": [(1, 2.0)],
    }


def test_client_rows_are_written_every_few_rounds_and_on_close(folder):
    path = folder.path / "clients.parquet"
    for number in range(1, FLUSH_EVERY_ROUNDS + 2):
        folder.log_clients([CLIENT | SCORES | {"round": number}])
        folder.log_metrics(number)
        assert path.exists() == (number >= FLUSH_EVERY_ROUNDS)
    assert pq.read_table(path).num_rows == FLUSH_EVERY_ROUNDS
    folder.close()
    table = pq.read_table(path)
    assert table.to_pylist()[0] == CLIENT | SCORES
    assert table["round"].to_pylist() == list(range(1, FLUSH_EVERY_ROUNDS + 2))
    assert table.schema.metadata[b"schema_version"] == b"1"
    assert str(table.schema.field("label_counts").type).startswith("list<")
    assert not list(folder.path.glob("*.tmp"))


def test_wrong_client_rows_are_refused(folder):
    with pytest.raises(FieldError, match=r"column='val_acuracy'.*did you mean 'val_accuracy'"):
        folder.log_clients([CLIENT | {"val_acuracy": 1.0}])
    with pytest.raises(FieldError, match="status=None is not allowed"):
        folder.log_clients([CLIENT | {"status": None}])


def test_going_on_in_a_folder_keeps_what_was_logged(tmp_path):
    for number in (1, 2):
        with RunFolder.create(tmp_path, name="test", exist_ok=True) as run:
            run.write_config({})
            run.log_clients([CLIENT | {"round": number}])
            run.log_metrics(number, seconds=1.0)
    assert pq.read_table(tmp_path / "clients.parquet")["round"].to_pylist() == [1, 2]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_histogram_rows_have_the_documented_columns(folder):
    values = torch.arange(64.0).reshape(8, 8)
    folder.log_histogram(2, -1, "fc.weight", "weight", values)
    folder.log_histogram(2, 0, "fc.weight", "codes", torch.tensor([-1, 1, 1, 0], dtype=torch.int8))
    folder.close()
    weight, codes = pq.read_table(folder.path / "histograms.parquet").to_pylist()
    assert (weight["round"], weight["client"], weight["tensor"], weight["stage"]) == (2, -1, "fc.weight", "weight")
    assert weight["counts"] == [1] * 64
    assert (weight["num"], weight["mean"], weight["min"], weight["max"]) == (64, 31.5, 0.0, 63.0)
    assert weight["entropy_bits"] is None
    assert (codes["edges"], codes["counts"]) == ([-1.5, -0.5, 0.5, 1.5], [1, 1, 2])
    assert codes["entropy_bits"] == 1.5  # shares 1/4, 1/4, 1/2: exact in binary
    with pytest.raises(FieldError, match=r"stage='weights'.*did you mean 'weight'"):
        folder.log_histogram(0, 0, "w", "weights", values)


@given(st.lists(st.floats(width=32), max_size=50))
@tried(100)
def test_histogram_counts_every_finite_value_in_its_bin(drawn):
    row = histogram(torch.tensor(drawn, dtype=torch.float32), codes=False)
    finite = [x for x in drawn if math.isfinite(x)]
    assert row["num"] == sum(row["counts"]) == len(finite)
    if not finite:
        assert row["edges"] == row["counts"] == []
        return
    edges = row["edges"]
    assert len(edges) == len(row["counts"]) + 1 == 65
    assert all(low < high for low, high in pairwise(edges))
    inside = [sum(low <= x < high for x in finite) for low, high in pairwise(edges)]
    inside[-1] += finite.count(edges[-1])  # the last bin is closed
    assert row["counts"] == inside
    assert (row["min"], row["max"]) == (min(finite), max(finite))


def test_histogram_moments_and_half_precision():
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0)).bfloat16()
    row = histogram(torch.cat([values, torch.tensor([math.nan, math.inf]).bfloat16()]), codes=False)
    exact = [float(x) for x in values]
    mean = math.fsum(exact) / 1000
    std = math.sqrt(math.fsum((x - mean) ** 2 for x in exact) / 1000)
    assert row["num"] == 1000
    # 1e-12: float64 sums of a thousand numbers near 1, in another order than fsum's exact one
    assert row["mean"] == pytest.approx(mean, abs=1e-12)
    assert row["std"] == pytest.approx(std, abs=1e-12)


@given(st.lists(st.integers(-128, 127), min_size=1, max_size=60))
@tried(100)
def test_code_entropy_is_shannons(drawn):
    row = histogram(torch.tensor(drawn, dtype=torch.int8), codes=True)
    counts = Counter(drawn)
    assert row["counts"] == [counts[value] for value in range(min(drawn), max(drawn) + 1)]
    entropy = math.fsum(n / len(drawn) * math.log2(len(drawn) / n) for n in counts.values())
    assert row["entropy_bits"] == pytest.approx(entropy, abs=1e-12)  # at most 60 float64 terms of size 1


def test_codes_of_absurd_span_are_refused():
    with pytest.raises(FieldError, match="codes=100000"):
        histogram(torch.tensor([0, 100_000]), codes=True)


def test_summary_is_pretty_strict_json_with_the_version_first(folder):
    folder.write_summary(summary(test_accuracy=math.nan, versions={"torch": "2"}, out=Path("x"), left_out=[]))
    text = (folder.path / "summary.json").read_text()
    assert text.startswith('{\n  "schema_version": 1,\n')

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    read = json.loads(text, parse_constant=refuse)
    assert read["test_accuracy"] is None
    assert read["out"] == "x"


def test_a_summary_that_lacks_keys_names_them_all_and_writes_nothing(folder):
    short = summary()
    del short["seed"], short["wire_bytes"]
    with pytest.raises(KeyError, match="wire_bytes, seed"):
        folder.write_summary(short)
    assert not (folder.path / "summary.json").exists()


def test_model_bytes_depend_on_the_tensors_alone(folder, tmp_path):
    flat = torch.randn(24, generator=torch.Generator().manual_seed(1))
    tensors = {
        "b.weight": flat[:12].view(3, 4).t(),  # not contiguous, and a view of the same buffer as the next
        "a.weight": flat[12:].view(2, 2, 3, 1).to(memory_format=torch.channels_last),
        "bn.num_batches_tracked": torch.tensor(7),
        "tied": flat[:12],
        "half": torch.ones(3, dtype=torch.bfloat16),
        "grad": torch.nn.Parameter(torch.ones(2)),
    }
    folder.save_model(tensors)
    read = load_file(folder.path / "model.safetensors")
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor.detach())
    with RunFolder.create(tmp_path / "again", name="test") as again:
        again.save_model({name: tensors[name].detach().contiguous() for name in reversed(tensors)})
        assert (again.path / "model.safetensors").read_bytes() == (folder.path / "model.safetensors").read_bytes()


def test_a_failed_save_leaves_the_old_model(folder, monkeypatch):
    def fail(_):
        raise OSError("disk full")

    folder.save_model({"x": torch.ones(2)})
    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        folder.save_model({"x": torch.zeros(2)})
    assert torch.equal(load_file(folder.path / "model.safetensors")["x"], torch.ones(2))
    assert not list(folder.path.glob("*.tmp"))


def test_ledger_is_written_into_the_folder(folder):
    ledger = Ledger()
    ledger.record(
        round=1,
        client=0,
        direction="uplink",
        parts=MessageParts(("w",), ("codes",), np.array([8]), np.array([1])),
    )
    folder.write_ledger(ledger)
    assert pq.read_table(folder.path / "ledger.parquet").num_rows == 1


def test_null_folder_has_the_same_methods_and_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    real = {n: f for n, f in inspect.getmembers(RunFolder, inspect.isfunction) if not n.startswith("_")}
    null = {n: f for n, f in inspect.getmembers(NullRunFolder, inspect.isfunction) if not n.startswith("_")}
    assert {n: inspect.signature(f) for n, f in null.items()} == {n: inspect.signature(f) for n, f in real.items()}
    with NullRunFolder() as run:
        run.write_config({})
        run.log_metrics(1, val_accuracy=0.5)
        run.log_clients([CLIENT])
        run.log_histogram(0, 0, "w", "weight", torch.ones(1))
        run.write_summary({})
        run.save_model({})
        run.write_ledger(Ledger())
    assert run.path is None
    assert not list(tmp_path.iterdir())


def test_environment_names_versions_and_hardware():
    info = environment_info()
    assert info["versions"]["torch"] == torch.__version__
    assert info["versions"].keys() == {"python", "torch", "numpy", "fedq", "cuda"}
    assert info["cpu"]
    assert info["cpu_count"] >= 1
    assert (info["gpu"] is None) == (not torch.cuda.is_available())
    json.dumps(info)


def git(path, *command):
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", "-C", str(path), *identity, *command], check=True, capture_output=True)


def test_git_commit_says_when_tracked_files_differ(tmp_path):
    assert git_commit(tmp_path / "missing") is None
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "a.py").write_text("1")
    git(tmp_path, "init")
    assert git_commit(tmp_path / "code") is None  # no commit yet
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "first")
    commit = git_commit(tmp_path / "code")
    assert commit is not None
    assert re.fullmatch("[0-9a-f]{40}", commit)
    (tmp_path / "code" / "a.py").write_text("2")
    assert git_commit(tmp_path / "code") == f"{commit}+dirty"
    (tmp_path / "venv").mkdir()
    assert git_commit(tmp_path / "venv") is None  # inside the repository, but not tracked by it

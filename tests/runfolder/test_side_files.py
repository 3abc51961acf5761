"""What lies beside the checkpoints may be damaged or missing: it is said once, and the run ends with the same bytes."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from jobs import file_hash, flags, small_config
from properties import few, is_all
from stopped_jobs import metrics, stopped_run, whole_run

from fedq.cli import main
from fedq.errors import FieldError
from fedq.feedback import ResidualStore
from fedq.network.server import run_name
from fedq.runfolder import RunFolder
from fedq.runfolder.lines import RoundLines
from fedq.trainers.auto_uplink import why_this_uplink
from fedq.trainers.run import run_job
from fedq.trainers.starts import count_start

TABLES = ("clients.parquet", "histograms.parquet", "phases.parquet")
FLAGS = {"uplink": "sign", "rounds": 4, "histogram_every": 1}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return whole_run(tmp_path_factory, **FLAGS)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stopped_run(tmp_path_factory, **FLAGS)


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def with_zeros(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20] + bytes(40))


def garbage(path: Path) -> None:
    path.write_bytes(b"\0\xff[[[{" * 500)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def missing(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def a_folder(path: Path) -> None:
    missing(path)
    path.mkdir()
    (path / "x").write_text("x")


def another_table(path: Path) -> None:
    pq.write_table(pa.table({"x": [1, 2]}), path)


def a_file(path: Path) -> None:
    shutil.rmtree(path)
    path.write_text("x")


DAMAGES = [
    *((name, damage) for name in TABLES for damage in (truncated, garbage, empty, missing, a_folder, another_table)),
    *(("metrics.jsonl", damage) for damage in (truncated, with_zeros, garbage, empty, missing, a_folder)),
    *(("starts", damage) for damage in (garbage, empty, missing, a_folder)),
    *(("starts.jsonl", damage) for damage in (truncated, garbage, empty, missing, a_folder)),
    *(("tensorboard", damage) for damage in (missing, a_file)),
]
SILENT = {("starts", "missing"), ("tensorboard", "missing"), ("phases.parquet", "missing")} | {
    ("starts.jsonl", damage) for damage in ("truncated", "garbage", "empty", "missing")
}
"""What nobody can know, or nobody needs."""


@pytest.mark.parametrize(
    ("name", "damage"), few(DAMAGES, 5), ids=[f"{name} {damage.__name__}" for name, damage in DAMAGES]
)
def test_a_damaged_side_file_is_told_once_and_ends_no_resume(
    whole: Path,
    stopped: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    name: str,
    damage: Callable[[Path], None],
) -> None:
    folder = shutil.copytree(stopped, tmp_path / "run")
    damage(folder / name)
    run_job(small_config(folder, resume=folder, **FLAGS))
    assert file_hash(folder / "model.safetensors") == file_hash(whole / "model.safetensors")
    assert file_hash(folder / "ledger.parquet") == file_hash(whole / "ledger.parquet")
    told = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    told = [text for text in told if str(folder / name) in text]
    assert 1 <= len(told) <= 2 or (not told and (name, damage.__name__) in SILENT), told
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["round"] for row in rows][-2:] == [2, 3]
    if name != "metrics.jsonl":
        assert metrics(folder) == metrics(whole)
    for table in set(TABLES) - {name}:
        assert pq.read_table(folder / table)["round"].to_pylist() == pq.read_table(whole / table)["round"].to_pylist()
    if name in TABLES:
        assert set(pq.read_table(folder / name)["round"].to_pylist()) == {2, 3}


def test_metrics_keep_every_whole_line_and_get_no_zeros(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = RoundLines(path)
    for number in range(4):
        lines.append({"round": number, "loss": 0.5})
    position = lines.sync()
    lines.append({"round": 4})
    data = path.read_bytes()
    lines.keep_before(4, position)
    assert path.read_bytes() == data[:position]
    assert not caplog.records
    rows = data[:position].splitlines(keepends=True)
    cut, holed = data[: position - 5], rows[0] + b"\0" * 871 + rows[1] + rows[2]
    for left, kept in ((cut, rows[:3]), (holed, [rows[0], rows[2]])):
        path.write_bytes(left)
        lines.keep_before(4, position)
        lines.append({"round": 4})
        assert path.read_bytes().splitlines(keepends=True) == [*kept, b'{"round": 4}\n']
    lines.close()
    assert sum("are lost; the run goes on" in record.getMessage() for record in caplog.records) == 2


def test_foreign_things_among_checkpoints_and_residuals_change_nothing(
    whole: Path, stopped: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = shutil.copytree(stopped, tmp_path / "run")
    checkpoints = folder / "checkpoints"
    for name in ("x", "000003.something", "7", "\u00b2", ".00000009.tmp", "servers"):
        (checkpoints / name).mkdir()
    (checkpoints / "servers" / "note").write_text("")
    (checkpoints / "00000050").write_text("no folder")
    (checkpoints / "00000060").mkdir()
    store = ResidualStore(folder=folder / "residuals")
    store.path(1, 77).write_bytes(b"damaged, and named by no checkpoint")
    store.path(2, 78).mkdir()
    run_job(small_config(folder, resume=folder, **FLAGS))
    assert file_hash(folder / "model.safetensors") == file_hash(whole / "model.safetensors")
    kept = {path.name for path in checkpoints.iterdir() if path.name.isascii() and len(path.name) == 8}
    assert kept == {"00000003", "00000004"}
    assert {path.name for path in checkpoints.glob("*.damaged")} == {"00000050.damaged", "00000060.damaged"}


def test_a_damaged_summary_is_no_finished_run(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damages = (truncated, a_folder, garbage, empty)
    for number, damage in enumerate(damages if is_all() else damages[:2]):
        folder = shutil.copytree(whole, tmp_path / str(number))
        (folder / "model.safetensors").unlink()
        damage(folder / "summary.json")
        assert main(flags(folder, **FLAGS)) == 0, capsys.readouterr().err
        assert file_hash(folder / "model.safetensors") == file_hash(whole / "model.safetensors")
        assert json.loads((folder / "summary.json").read_text())["rounds"] == 4


@pytest.mark.parametrize("name", ["residuals", "checkpoints"])
def test_a_file_where_a_folder_belongs_costs_its_content_alone(
    whole: Path, stopped: Path, tmp_path: Path, name: str
) -> None:
    """Without residuals no checkpoint is whole; without checkpoints the run begins again."""
    folder = shutil.copytree(stopped, tmp_path / "run")
    a_file(folder / name)
    if name == "residuals":
        with pytest.raises(FieldError, match=r"resume=.*a checkpoint that is whole; .*residual"):
            run_job(small_config(folder, resume=folder, **FLAGS))
        return
    run_job(small_config(folder, resume=folder, **FLAGS))
    assert file_hash(folder / "model.safetensors") == file_hash(whole / "model.safetensors")


def test_what_a_run_cannot_go_on_without_is_one_error(
    stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, damage in enumerate((garbage, a_folder, missing)):
        folder = shutil.copytree(stopped, tmp_path / str(number))
        damage(folder / "config.yaml")
        for given in (["--resume", str(folder)], ["--out", str(folder), "--dataset", "digits"]):
            assert main(given) == 2
            (line,) = capsys.readouterr().err.splitlines()
            assert str(folder) in line


def test_the_reason_for_an_uplink_and_a_federations_name_may_be_damaged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "auto_uplink.json"
    assert why_this_uplink(tmp_path) is None
    for text in ("{", "[]", "7", '{"uplink": "int4"}', "null"):
        file.write_text(text)
        assert why_this_uplink(tmp_path) is None
    file.write_text('{"because": "it is fast"}')
    assert why_this_uplink(tmp_path) == "it is fast"
    assert len(caplog.records) == 5
    name = run_name(tmp_path)
    assert run_name(tmp_path) == name
    for damage in (truncated, garbage, empty, a_folder):
        damage(tmp_path / "federation")
        assert len(run_name(tmp_path)) == 32
        assert run_name(tmp_path) != name


def test_a_damaged_count_of_starts_goes_on_after_the_last_that_was_noted(tmp_path: Path) -> None:
    assert [count_start(tmp_path) for _ in range(3)] == [0, 1, 2]
    (tmp_path / "starts.jsonl").write_text('{"start": 6}\n{"start": 5}\nx\n')
    for number, text in enumerate(("", "x", "-1", "1" * 20, "\u0661"), start=7):
        (tmp_path / "starts").write_text(text)
        assert count_start(tmp_path) == 7
        assert (tmp_path / f"starts.damaged{f'-{number - 6}' if number > 7 else ''}").exists()
    assert count_start(tmp_path) == 8


def test_side_outputs_that_fail_are_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Broken:
        def log(self, values: object, step: int) -> None:
            raise ConnectionError("no route")

        def close(self) -> None:
            raise ConnectionError("no route")

    with RunFolder.create(tmp_path / "run", name="") as folder:
        folder.follow(Broken())
        for number in range(3):
            folder.log_metrics(number, loss=1.0)
    assert [record.getMessage() for record in caplog.records] == [
        "what goes to Broken cannot be written, and is left out: ConnectionError: no route"
    ]
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 3

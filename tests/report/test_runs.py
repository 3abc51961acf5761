"""`fedq runs`: how far runs are, told from their folders alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedq.cli import main
from fedq.errors import FieldError
from fedq.report import find_runs


def make_run(path: Path, *, rows: int = 0, summary: dict | None = None, config: str = "run:\n  rounds: 7\n") -> Path:
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(config)
    lines = [{"round": r, "val_accuracy": 0.1 * r if r % 2 else None, "uplink_bytes": 1000 * r} for r in range(rows)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if summary is not None:
        (path / "summary.json").write_text(json.dumps(summary))
    return path


def test_a_finished_run_shows_its_test_accuracy(tmp_path: Path) -> None:
    make_run(tmp_path / "a", rows=3, summary={"rounds": 5, "test_accuracy": 0.875, "uplink_bytes": 42})
    (run,) = find_runs([tmp_path])
    assert (run.state, run.rounds, run.total_rounds, run.result, run.uplink_bytes) == ("finished", 5, 7, 0.875, 42)


def test_an_unfinished_run_shows_its_last_evaluation_and_how_to_go_on(tmp_path: Path) -> None:
    path = make_run(tmp_path / "a", rows=5)
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"round": 5, "val_acc')  # a kill cut this line off
    (run,) = find_runs([path])
    assert (run.state, run.rounds, run.uplink_bytes) == ("unfinished", 5, 4000)
    assert run.result == pytest.approx(0.3)  # round 4 was not evaluated, round 3 was
    assert run.note == f"go on with --resume {path}"


def test_a_run_without_checkpoints_cannot_be_gone_on_with(tmp_path: Path) -> None:
    make_run(tmp_path / "a", rows=2, config="run: {rounds: 7}\nexchange: {exchange: none}\n")
    (run,) = find_runs([tmp_path])
    assert run.note == "start it again: --exchange none has no checkpoints"


@pytest.mark.parametrize("config", ["run: nothing\n", "run: [\n", "- 1\n", ""])
def test_a_run_without_a_round_and_one_that_cannot_be_read(tmp_path: Path, config: str) -> None:
    make_run(tmp_path / "early")
    make_run(tmp_path / "broken", config=config, rows=2)
    (tmp_path / "no run").mkdir()
    early, broken = sorted(find_runs([tmp_path]), key=lambda run: run.path.name, reverse=True)
    assert (early.state, early.rounds) == ("not started", 0)
    assert broken.state == "unreadable"
    assert "Error" in broken.note


def test_folders_that_are_no_runs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FieldError, match="a folder that exists"):
        find_runs([tmp_path / "missing"])
    with pytest.raises(FieldError, match="a run's folder, or one that holds some"):
        find_runs([tmp_path])


def test_the_command_prints_a_line_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path / "a", rows=3)
    assert main(["runs", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert str(tmp_path / "a") in out.replace("\n", "")
    assert "3/7" in out
    assert main(["runs", str(tmp_path / "missing")]) == 2
    assert "runs=" in capsys.readouterr().err


def test_finished_runs_are_compared_and_the_others_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = {"rounds": 7, "test_accuracy": 0.87654, "uplink": "int4", "downlink": "int8", "seconds": 12.34}
    whole |= {"uplink_bytes": 1_000_000, "uplink_bytes_fp32": 7_900_000}
    whole |= {"downlink_bytes": 2_000_000, "downlink_bytes_fp32": 4_000_000}
    alone = whole | dict.fromkeys([key for key in whole if "bytes" in key], 0) | {"test_balanced_accuracy": 0.5}
    make_run(tmp_path / "a", rows=7, summary=whole)
    make_run(tmp_path / "b", rows=3)
    make_run(tmp_path / "c", rows=7, summary=alone)  # --exchange none
    assert main(["runs", "--compare", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len({len(line) for line in lines}) == 1  # aligned
    _, rule, a, b, c = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    assert set("".join(rule)) == {"-"}
    assert a == ["a", "int4", "int8", "7", "87.65", "-", "1 MB", "1/7.9", "2 MB", "1/2.0", "12.3"]
    assert b == ["b", "-", "-", "3/7", "unfinished", "-", "-", "-", "-", "-", "-"]
    assert c[5] == "50.00"
    assert c[7] == c[9] == "-"

"""What cannot be written ends a run in one line, with the command that goes on; then the run ends as if undisturbed."""

from __future__ import annotations

import errno
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from jobs import file_hash, flags, small_config
from launched import LIMIT_S, command, environ, files_of, free_ports
from properties import few, is_all
from stopped_jobs import metrics, whole_run

from fedq.checkpoint import Checkpoints
from fedq.cli import main
from fedq.errors import RunStopped
from fedq.files import replace_file
from fedq.trainers.run import run_job

FLAGS: dict[str, Any] = {"uplink": "sign", "rounds": 4}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return whole_run(tmp_path_factory, **FLAGS)


def fail_at(patch: pytest.MonkeyPatch, number: int, code: int, name: str = "os.fsync") -> None:
    """Let every call of a function of the system fail, from the `number`-th on."""
    module, _, function = name.partition(".")
    real, left = getattr(os, function), number

    def failing(*given: Any, **options: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(code, os.strerror(code))
        return real(*given, **options)

    patch.setattr(f"{module}.{function}", failing)


@pytest.mark.parametrize("code", few([errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS], 1))
@pytest.mark.parametrize("number", few([25, 40, 60], 2))
def test_an_error_of_the_disk_ends_in_one_line_and_the_resume_has_the_same_bytes(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], code: int, number: int
) -> None:
    folder = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        fail_at(patch, number, code)
        assert main(flags(folder, **FLAGS)) == 1
    heard = capsys.readouterr()
    lines = [line for line in heard.err.splitlines() if "is left out" not in line]
    assert len(lines) == 1, heard.err
    kept = Checkpoints(folder / "checkpoints").numbers()
    after = f"after round {kept[-1]}" if kept else "before the first round was finished"
    assert lines[0].startswith(f"error: stopped by what cannot be written ({os.strerror(code)}) {after}; go on with: ")
    assert lines[0].endswith(f"--resume {folder}")
    assert not list(folder.rglob("*.tmp"))
    assert not (folder / "lock").exists()
    assert main(["--resume", str(folder)]) == 0
    assert file_hash(folder / "model.safetensors") == file_hash(whole / "model.safetensors")
    assert file_hash(folder / "ledger.parquet") == file_hash(whole / "ledger.parquet")
    assert metrics(folder) == metrics(whole)


@pytest.mark.slow
def test_a_real_limit_on_files_ends_in_one_line(tmp_path: Path) -> None:
    """A few kilobytes a file: enough for settings and rows, too little for a checkpoint. Then the limit is gone."""
    folder, whole = tmp_path / "run", tmp_path / "whole"
    limited = f"ulimit -f 200; {shlex.join(command(folder))}"
    done = subprocess.run(["bash", "-c", limited], env=environ(), capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    match = re.fullmatch(r"error: stopped by what cannot be written \(File too large.*\).*; go on with: (.*)", line)
    assert match, line
    for words in (f"{shlex.join(command(whole))}", match[1]):
        subprocess.run(words, shell=True, env=environ(), check=True, capture_output=True, timeout=LIMIT_S)
    assert files_of(folder) - {"starts.jsonl"} == files_of(whole) - {"starts.jsonl"}
    assert file_hash(folder / "model.safetensors") == file_hash(whole / "model.safetensors")


def test_a_folder_that_is_deleted_under_way_ends_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    from fedq.trainers import rounds

    log = rounds.log_round

    def deleted(job: Any, round: int, *given: Any) -> None:
        if round == 2:
            shutil.rmtree(folder)
        log(job, round, *given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rounds, "log_round", deleted)
        assert main(flags(folder, **FLAGS)) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if "is left out" not in line]
    assert len(lines) == 1
    assert lines[0].startswith(f"error: stopped by what cannot be written (No such file or directory: {folder}")
    assert not folder.exists()


def test_a_start_on_a_full_disk_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(4) if is_all() else (0, 3):
        with pytest.MonkeyPatch.context() as patch:
            fail_at(patch, number, errno.ENOSPC)
            code = main(flags(tmp_path / str(number), **FLAGS))
        heard = capsys.readouterr().err
        if code == 2:
            assert "a folder that can be written (No space left on device)" in heard
        assert "Traceback" not in heard
        assert code in (1, 2)
        assert main(flags(tmp_path / str(number), **FLAGS)) == 0


def test_tables_and_events_that_cannot_be_written_are_told_once_and_the_job_goes_on(
    whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("pyarrow.parquet.write_table", full)
    monkeypatch.setattr("fedq.runfolder.events.Events._write", full)
    run_job(small_config(tmp_path / "run", **FLAGS))
    assert file_hash(tmp_path / "run" / "model.safetensors") == file_hash(whole / "model.safetensors")
    told = sorted(record.getMessage().partition(" ")[0] for record in caplog.records)
    assert told == ["clients.parquet", "histograms.parquet", "phases.parquet", "tensorboard/"]


def test_a_command_on_a_full_disk_ends_in_one_line(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        fail_at(patch, 0, errno.ENOSPC)
        assert main(["report", str(whole), "--out", str(tmp_path)]) == 1
    assert capsys.readouterr().err == "error: what report writes cannot be written (No space left on device)\n"


# ---- several ranks ----


ON_ONE_RANK = """
import errno, os, sys
from fedq.cli import main
victim, left, fsync = os.environ["VICTIM"], int(os.environ["NUMBER"]), os.fsync
def failing(descriptor):
    global left
    left -= os.environ["RANK"] == victim
    if left < 0:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return fsync(descriptor)
os.fsync = failing
sys.exit(main())
"""


def two_ranks(arguments: list[str], victim: int, number: int) -> list[tuple[int, str]]:
    """Run a job on two ranks; the disk of one is full from its `number`-th write on. Return codes and what was said."""
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_ports())}
    place |= {"VICTIM": str(victim), "NUMBER": str(number)}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", ON_ONE_RANK, *arguments],
            env=environ(RANK=str(rank), **place),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [rank.communicate(timeout=LIMIT_S)[1] for rank in ranks]
    return [(rank.returncode, text) for rank, text in zip(ranks, said, strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize(("victim", "number"), [(0, 40), (1, 3)])
def test_a_full_disk_of_one_rank_ends_all_and_the_run_goes_on_later(
    whole: Path, tmp_path: Path, victim: int, number: int
) -> None:
    folder = tmp_path / "run"
    told = two_ranks(flags(folder, **FLAGS), victim, number)
    assert [code for code, _ in told] == [1, 1]
    assert not any("Traceback" in text for _, text in told)
    heading = "error: " if victim == 0 else "error on rank 1: "
    last = told[victim][1].splitlines()[-1]
    assert last.startswith(f"{heading}stopped by what cannot be written (No space left on device")
    assert f"rank {1 - victim} of 2 failed: " in told[1 - victim][1]
    notes = [json.loads(line) for line in (folder / "starts.jsonl").read_text().splitlines()]
    assert [one["rank"] for one in notes if "error" in one] == [victim]
    assert [code for code, _ in two_ranks(["--resume", str(folder)], 2, 0)] == [0, 0]
    assert file_hash(folder / "model.safetensors") == file_hash(whole / "model.safetensors")


def test_other_errors_of_the_system_keep_their_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        Path("/nonexistent/of/a/user").read_text()

    monkeypatch.setattr("fedq.trainers.job.load_dataset", fail)
    with pytest.raises(FileNotFoundError):
        main(flags(tmp_path / "run", **FLAGS))


def test_a_failed_write_leaves_no_temporary_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace_file(tmp_path / "file", b"old")
    fail_at(monkeypatch, 0, errno.ENOSPC)
    with pytest.raises(OSError, match="No space"):
        replace_file(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"old"
    with pytest.raises(OSError, match="No space"):
        Checkpoints(tmp_path / "checkpoints").save(1, {})
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["checkpoints", "file"]
    assert issubclass(RunStopped, RuntimeError)

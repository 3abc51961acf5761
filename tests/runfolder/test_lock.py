"""One process in a run's folder: a second is refused at once by name, and what a dead one has left is taken over."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import warm
from distributed import run_group, run_ranks
from jobs import small_config
from properties import few

from fedq.cli import main
from fedq.errors import FieldError
from fedq.runfolder import Holder, RunFolder, holder_of, lock
from fedq.runfolder.lock import LOCK, FolderLock
from fedq.trainers.run import run_job


def hold(folder: Path, forks: bool, pipe: Connection) -> None:
    """Hold a folder for ever; say so with the number of a child that is there as long, 0 for none."""
    held = FolderLock.take(folder)
    child = os.fork() if forks else 0
    if child or not forks:
        pipe.send(child)
    threading.Event().wait()
    held.release()


@contextmanager
def held_elsewhere(folder: Path, *, forks: bool = False) -> Iterator[tuple[BaseProcess, int]]:
    """Let another process hold a folder, until it is killed; give it and its child."""
    ours, theirs = warm.context().Pipe()
    process = warm.context().Process(target=hold, args=(folder, forks, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        yield process, ours.recv()
    finally:
        process.kill()
        process.join()


def leave(folder: Path, holder: Holder) -> Path:
    """Leave the lock of a process that does not give it back."""
    (folder / LOCK).write_text(json.dumps(asdict(holder)))
    return folder / LOCK


def test_a_second_process_is_refused_and_a_dead_one_is_not_waited_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with held_elsewhere(tmp_path) as (other, _):
        pattern = rf"resume='{tmp_path}'.*no other process works: process {other.pid} on .*, since 20\d\d-"
        with pytest.raises(FieldError, match=pattern):
            FolderLock.take(tmp_path, "resume")
        assert (found := holder_of(tmp_path)) is not None
        assert found.pid == other.pid
        other.kill()
        other.join()
        assert holder_of(tmp_path) is None
        held = FolderLock.take(tmp_path)
    assert [record.message for record in caplog.records] == [
        f"{tmp_path / LOCK} was left by {found}, which is gone: it is taken over"
    ]
    held.release()
    held.release()
    assert not (tmp_path / LOCK).exists()
    FolderLock.take(tmp_path).release()


@pytest.mark.slow
def test_a_child_of_a_dead_process_does_not_hold_its_folder(tmp_path: Path) -> None:
    with held_elsewhere(tmp_path, forks=True) as (parent, child):
        parent.kill()
        parent.join()
        try:
            os.kill(child, 0)
            FolderLock.take(tmp_path).release()
        finally:
            os.kill(child, signal.SIGKILL)


def test_a_number_that_was_given_again_is_another_process(tmp_path: Path) -> None:
    leave(tmp_path, replace(Holder.this(), born="1"))
    FolderLock.take(tmp_path).release()
    leave(tmp_path, Holder.this())
    with pytest.raises(FieldError, match=f"process {os.getpid()} on"):
        FolderLock.take(tmp_path)


def test_a_process_holds_a_folder_once(tmp_path: Path) -> None:
    held = FolderLock.take(tmp_path)
    with pytest.raises(FieldError, match=f"process {os.getpid()} on"):
        FolderLock.take(tmp_path)
    with pytest.raises(FieldError):
        FolderLock.take(tmp_path)
    held.release()
    FolderLock.take(tmp_path).release()


@pytest.mark.parametrize("damage", [b"", b"\0" * 50, b"{}", b"[]", b'{"pid": 1}', b"\xff\xfe", None])
def test_a_lock_that_nobody_can_read_is_nobodys(tmp_path: Path, damage: bytes | None) -> None:
    if damage is None:
        (tmp_path / LOCK).mkdir()
    else:
        (tmp_path / LOCK).write_bytes(damage)
    FolderLock.take(tmp_path).release()


# ---- on another machine, or in another container ----


def stranger() -> Holder:
    return replace(Holder.this(), host="node7", space="another boot, another container")


def test_one_on_another_machine_that_gives_signs_of_life_is_refused(tmp_path: Path) -> None:
    file, is_over = leave(tmp_path, stranger()), threading.Event()

    def beat() -> None:
        while not is_over.wait(0.1):
            os.utime(file)

    beating = threading.Thread(target=beat)
    beating.start()
    with pytest.raises(FieldError, match=rf"process \d+ on node7, since .*delete {file}"):
        FolderLock.take(tmp_path)
    is_over.set()
    beating.join()


def test_one_on_another_machine_that_falls_silent_is_waited_for_and_then_dead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(lock, "SILENT_S", 0.5)
    leave(tmp_path, stranger())
    FolderLock.take(tmp_path).release()
    waited, taken = [record.message for record in caplog.records]
    assert "waiting for a sign of life" in waited
    assert "node7" in taken
    caplog.clear()
    file = leave(tmp_path, stranger())
    os.utime(file, (0, 0))  # long ago: nothing is waited for
    FolderLock.take(tmp_path).release()
    assert len(caplog.records) == 1


@pytest.mark.slow
def test_a_file_system_that_keeps_a_dead_machines_lock_is_outwitted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "SILENT_S", 0.5)
    monkeypatch.setattr(lock, "BEAT_S", 0.1)
    with held_elsewhere(tmp_path):  # its own signs of life are five seconds apart
        leave(tmp_path, stranger())
        held = FolderLock.take(tmp_path)
        held.check()
        held.release()


def test_a_holder_gives_signs_of_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "BEAT_S", 0.05)
    held = FolderLock.take(tmp_path)
    os.utime(tmp_path / LOCK, (0, 0))
    told = threading.Event()
    while (tmp_path / LOCK).stat().st_mtime == 0:
        told.wait(0.01)
    held.release()


def take_once(rank: int, folder: Path) -> str:
    try:
        held = FolderLock.take(folder)
    except FieldError as error:
        return str(error)
    threading.Event().wait(3)  # the others must see it
    held.release()
    return "taken"


@pytest.mark.slow
def test_of_many_that_find_a_dead_lock_one_takes_it(tmp_path: Path) -> None:
    leave(tmp_path, replace(Holder.this(), born="1"))
    told = run_ranks(take_once, *[(rank, tmp_path) for rank in range(6)])
    assert sorted(text.partition(":")[0] for text in told)[-1] == "taken"
    assert told.count("taken") == 1


def test_a_folder_that_was_taken_away_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "run"
    folder = RunFolder.create(path, name="")
    folder.log_metrics(0, loss=1.0)
    (path / LOCK).unlink()
    leave(path, stranger())
    with pytest.raises(FieldError, match=r"node7.* has taken it over"):
        folder.log_metrics(1, loss=1.0)
    shutil.rmtree(path)
    with pytest.raises(FileNotFoundError, match=str(path)):
        folder.log_metrics(1, loss=1.0)
    folder.close()
    assert not path.exists()


# ---- jobs ----


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(rank: int, folder: Path, resume: Path | None) -> str:
    with pytest.raises(FieldError) as caught:
        run_job(small_config(folder, resume=resume))
    return str(caught.value)


@pytest.mark.parametrize("resumes", few([True, False], 1))
@pytest.mark.parametrize("world_size", few([2, 1], 1))
def test_a_second_job_is_refused_on_every_rank_before_it_writes(tmp_path: Path, world_size: int, resumes: bool) -> None:
    folder = tmp_path / "run"
    if resumes:
        run_job(small_config(folder, rounds=2))
    folder.mkdir(exist_ok=True)
    with held_elsewhere(folder) as (other, _):
        before = files_of(folder)
        told = run_group(world_size, refused, folder, folder if resumes else None)
        assert len(set(told)) == 1
        assert f"process {other.pid} on" in told[0]
        assert files_of(folder) == before


def test_jobs_one_after_another_and_after_an_error_need_no_help(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr("fedq.trainers.job.load_dataset", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run_job(small_config(folder))
    assert not (folder / LOCK).exists()
    for _ in range(2):
        run_job(small_config(folder, resume=folder))
        assert not (folder / LOCK).exists()


@pytest.mark.slow
def test_a_server_is_refused_as_well_and_readers_are_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    run_job(small_config(folder, rounds=1))
    with held_elsewhere(folder) as (other, _):
        flags = ["--dataset", "digits", "--model", "cnn62k", "--out", str(tmp_path / "new"), "--insecure"]
        (tmp_path / "new").mkdir()
        shutil.copy(folder / LOCK, tmp_path / "new")
        assert main(["server", *flags]) == 2
        assert f"process {other.pid} on" in capsys.readouterr().err
        assert main(["runs", str(folder)]) == 0
        assert main(["report", str(folder), "--out", str(tmp_path / "report")]) == 0

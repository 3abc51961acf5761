"""Leaving in time: signals, writes that are finished first, and ranks that hang."""

from __future__ import annotations

import io
import os
import re
import shlex
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import redirect_stderr
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import warm
from jobs import SMALL
from launched import environ
from properties import few

from fedq.checkpoint import Checkpoints
from fedq.cli import main, parse_args
from fedq.config import Config
from fedq.federated.chaos import Chaos
from fedq.runtime.watch import Watch
from fedq.trainers.run import run_job

LIMIT_S = 120  # for what has no promise of its own, on a machine that may be busy
LEAVE_S = 10  # what is promised after a signal
SCRIPT = Path(__file__).parents[2] / "train.py"


def flags(folder: Path, **changes: object) -> list[str]:
    given = SMALL | {"rounds": 500, "out": folder} | changes
    return [text for name, value in given.items() for text in (f"--{name.replace('_', '-')}", str(value))]


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.01)


def has_checkpoint(folder: Path) -> Callable[[], bool]:
    return lambda: len(Checkpoints(folder / "checkpoints").numbers()) > 0


# ---- one rank, without a job ----


def forked(body: Callable, *given: object) -> BaseProcess:
    process = warm.context().Process(target=body, args=given, daemon=True)
    process.start()
    return process


def exit_code(process: BaseProcess, limit_s: float = LIMIT_S) -> int | None:
    """Return the exit code; None: it still ran, and was killed."""
    process.join(limit_s)
    code = process.exitcode
    process.kill()
    process.join()
    return code


def output_to(path: Path) -> None:
    """Send this process's own output to a file."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)


def write_while_signalled(folder: Path, number: int) -> None:
    output_to(folder / "said")
    with Watch(0, None, lambda cause: f"farewell after {cause}") as watch:
        with watch.writing():
            os.kill(os.getpid(), number)
            for part in range(20):
                with (folder / "file").open("a") as file:
                    file.write(f"{part}\n")
                time.sleep(0.02)
        threading.Event().wait()  # for ever, as in a collective


@pytest.mark.parametrize(("number", "code"), few([(signal.SIGTERM, 0), (signal.SIGINT, 130)], 1))
def test_a_signal_waits_for_a_write_in_progress(tmp_path: Path, number: signal.Signals, code: int) -> None:
    assert exit_code(forked(write_while_signalled, tmp_path, number)) == code
    assert (tmp_path / "file").read_text().split() == [str(part) for part in range(20)]
    assert (tmp_path / "said").read_text() == f"\nfarewell after {number.name}\n"


def stall(folder: Path) -> None:
    output_to(folder / "said")
    with Watch(3, 0.3, str) as watch:
        for _ in range(8):  # longer than the timeout in all, but never without a beat for as long
            watch.beat("working")
            time.sleep(0.1)
        watch.beat("hanging here")
        for_ever()


def for_ever() -> None:
    threading.Event().wait()


def test_a_rank_without_progress_ends_with_its_name_and_its_stack(tmp_path: Path) -> None:
    assert exit_code(forked(stall, tmp_path)) == 1
    said = (tmp_path / "said").read_text()
    assert "rank 3 made no progress for 0.3 s while hanging here:" in said
    assert "in for_ever" in said


def test_afterwards_everything_is_as_before() -> None:
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    num_threads = threading.active_count()
    for _ in range(3):
        with Watch(0, 60.0, str) as watch, watch.writing():
            assert threading.active_count() == num_threads + 1
    assert threading.active_count() == num_threads
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == handlers
    assert signal.set_wakeup_fd(-1) == -1


def test_other_signals_are_not_taken_for_a_reason_to_leave() -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: seen.append(number))
    try:
        with Watch(0, 60.0, str):
            os.kill(os.getpid(), signal.SIGUSR1)
            wait_until(lambda: bool(seen))
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert seen == [signal.SIGUSR1]


# ---- off the main thread, as in a notebook or in a program's own worker ----


def handling() -> list[object]:
    """Return all that a program has set for signals."""
    fd = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(fd)
    return [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] + [fd]


def in_a_thread(body: Callable[[], object]) -> object:
    results: list[object] = []

    def run() -> None:
        try:
            results.append(body())
        except BaseException as error:
            results.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(LIMIT_S)
    return results[0]


def stall_in_a_thread(folder: Path) -> None:
    output_to(folder / "said")

    def work() -> None:
        with Watch(2, 0.3, str) as watch:
            watch.beat("hanging in a thread")
            for_ever()

    in_a_thread(work)


def test_a_rank_that_stalls_in_a_thread_ends_with_the_stack_of_that_thread(tmp_path: Path) -> None:
    assert exit_code(forked(stall_in_a_thread, tmp_path)) == 1
    said = (tmp_path / "said").read_text()
    assert "rank 2 made no progress for 0.3 s while hanging in a thread:" in said
    assert "in for_ever" in said
    assert "in join" not in said  # where the main thread is


def test_a_watch_in_a_thread_leaves_signals_to_the_program() -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    ours, entered, over = handling(), threading.Event(), threading.Event()

    def work() -> None:
        with Watch(0, 60.0, str):
            entered.set()
            over.wait(LIMIT_S)

    thread = threading.Thread(target=work)
    try:
        thread.start()
        assert entered.wait(LIMIT_S)
        assert handling() == ours
        os.kill(os.getpid(), signal.SIGTERM)
        wait_until(lambda: bool(seen))
        over.set()
        thread.join(LIMIT_S)
        assert handling() == ours
    finally:
        signal.signal(signal.SIGTERM, before)
    assert seen == [signal.SIGTERM]


def test_jobs_in_threads_one_after_the_other_are_those_of_the_main_thread(tmp_path: Path) -> None:
    before = handling()

    def job(name: str) -> object:
        config = parse_args(flags(tmp_path / name, rounds=2, cohort=2), defaults=Config())
        summary = run_job(config)
        return summary["test_accuracy"], summary["wire_bytes"]

    results = [in_a_thread(lambda: job("first")), in_a_thread(lambda: job("second")), job("main")]
    assert handling() == before
    assert results[0] == results[1] == results[2]
    models = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("first", "second", "main")]
    assert models[0] == models[1] == models[2]


# ---- real jobs ----


def test_sigterm_ends_a_job_with_0_and_the_command_that_resumes_it(tmp_path: Path) -> None:
    """The real script on one rank; the command is then followed to the letter."""
    folder = tmp_path / "run"
    command = [str(SCRIPT), *flags(folder, uplink="sign")]
    job = warm.Command(command, output=tmp_path / "said", env=environ(), cwd=tmp_path)
    try:
        wait_until(has_checkpoint(folder))
        job.send_signal(signal.SIGTERM)
        assert job.wait(LEAVE_S) == 0
    finally:
        job.kill()
    last = (tmp_path / "said").read_text().rstrip().splitlines()[-1]
    match = re.fullmatch(r"stopped by SIGTERM after round (\d+); go on with: python (.*)", last)
    assert match, last
    assert Checkpoints(folder / "checkpoints").numbers()[-1] == int(match[1])
    script, *arguments = shlex.split(match[2])
    assert (Path(script), arguments) == (SCRIPT, ["--resume", str(folder)])
    more = str(int(match[1]) + 1)
    with redirect_stderr(io.StringIO()):
        assert main([*arguments, "--rounds", more]) == 0
    assert (folder / "summary.json").exists()


def rank_of(world_size: int, rank: int, port: str, arguments: list[str], said: Path) -> None:
    """Be one rank of a job that nothing but the environment has started."""
    output_to(said)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    sys.argv = [str(SCRIPT), *arguments]
    sys.exit(main(arguments))


def two_ranks(tmp_path: Path, arguments: list[str]) -> list[BaseProcess]:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = str(sock.getsockname()[1])
    return [forked(rank_of, 2, rank, port, arguments, tmp_path / f"said{rank}") for rank in range(2)]


@pytest.mark.parametrize("order", [(0, 1), pytest.param((1, 0), marks=pytest.mark.slow)])
def test_sigint_ends_every_rank_with_130(tmp_path: Path, order: tuple[int, int]) -> None:
    folder = tmp_path / "run"
    ranks = two_ranks(tmp_path, flags(folder, uplink="int8", feedback="on"))
    wait_until(has_checkpoint(folder))
    for rank in order:
        os.kill(ranks[rank].pid or 0, signal.SIGINT)
    end = time.monotonic() + LEAVE_S
    assert [exit_code(rank, max(0.0, end - time.monotonic())) for rank in ranks] == [130, 130]
    said = [(tmp_path / f"said{rank}").read_text() for rank in range(2)]
    command = f"go on with: torchrun --nproc-per-node 2 {SCRIPT} --resume {folder}"
    assert [command in text for text in said] == [True, False]
    assert not any("Traceback" in text for text in said)


@pytest.mark.slow
def test_a_rank_that_hangs_ends_the_job_with_its_name_and_stack(tmp_path: Path) -> None:
    """Client 1, on rank 1 because it has a residual, sleeps for ever in round 1, and nobody else does."""
    seed = next(s for s in range(10_000) if sleepers(s) == [(1, 1)])
    arguments = flags(tmp_path / "run", uplink="sign", num_clients=2, cohort=2, rounds=2, timeout=4)
    arguments += ["--chaos", f"slow=0.25,slow_s=600,seed={seed}"]
    ranks = two_ranks(tmp_path, arguments)
    codes = [exit_code(rank) for rank in ranks]
    assert codes[1] == 1
    assert codes[0] not in (None, 0)
    said = (tmp_path / "said1").read_text()
    assert "rank 1 made no progress for 4 s while training client 1 in round 1:" in said
    assert "in strike_client" in said
    assert "rank 0" in (tmp_path / "said0").read_text()
    assert Checkpoints(tmp_path / "run" / "checkpoints").numbers() == [1]


def sleepers(seed: int) -> list[tuple[int, int]]:
    """Who would sleep in two rounds of two clients."""
    slept: list[tuple[int, int]] = []
    with pytest.MonkeyPatch.context() as patch:
        for at in [(r, c) for r in range(2) for c in range(2)]:
            patch.setattr(time, "sleep", lambda _, at=at: slept.append(at))
            Chaos(slow=0.25, seed=seed).strike_client(*at)
    return slept


def test_training_alone_says_that_it_cannot_be_resumed(tmp_path: Path) -> None:
    arguments = flags(tmp_path / "run", exchange="none")
    ranks = [forked(rank_of, 1, 0, "1", arguments, tmp_path / "said")]
    wait_until((tmp_path / "run" / "metrics.jsonl").exists)
    wait_until(lambda: "\n" in (tmp_path / "run" / "metrics.jsonl").read_text())
    os.kill(ranks[0].pid or 0, signal.SIGTERM)
    assert exit_code(ranks[0], LEAVE_S) == 0
    assert "--exchange none has no checkpoints" in (tmp_path / "said").read_text()

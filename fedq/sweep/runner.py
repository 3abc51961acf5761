"""Runs the tasks of a sweep as processes of their own; what is finished is not run again, what was begun goes on."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from fedq.errors import FieldError
from fedq.report import read_summary
from fedq.runfolder import holder_of
from fedq.sweep.plan import Plan, Task

TRAIN = ("-m", "fedq")
"""Arguments with which Python runs a job."""
_LAST_LINES = 3  # of a failed run's log that are shown


class _Processes:
    """The processes that run now; all end when this one is told to."""

    def __init__(self) -> None:
        self._running: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()
        self.stopped = False

    def call(self, command: Sequence[str], log: Path) -> int:
        """Run a command to its end and return its exit code; -1 if nothing may be started any more."""
        with self._lock:
            if self.stopped:
                return -1
            with log.open("ab") as file:
                process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT)
            self._running.add(process)
        code = process.wait()
        with self._lock:
            self._running.discard(process)
        return code

    def stop(self) -> None:
        """End what runs, which saves where it is, and start nothing more."""
        self.stopped = True
        for process in list(self._running):
            process.send_signal(signal.SIGTERM)


def run_tasks(
    plan: Plan,
    out: Path,
    *,
    extra: Sequence[str] = (),
    workers: int = 1,
    train: Sequence[str] = TRAIN,
    say: Callable[[str], None] = print,
) -> list[Task]:
    """Run every task that is not finished.

    Args:
        plan: The sweep.
        out: Folder of the runs' folders, and of ``<run>.log`` with what each has printed.
        extra: Flags of this machine for every run, such as ``--data-dir DIR``.
        workers: Number of runs side by side.
        train: Arguments with which Python runs a job: a script, or ``-m`` and a module.
        say: Function that is given a line for each run that ends.

    Returns:
        The tasks that failed, or were stopped by a signal.
    """
    out.mkdir(parents=True, exist_ok=True)
    tasks, processes = plan.tasks, _Processes()

    def run(numbered: tuple[int, Task]) -> bool:
        number, task = numbered
        heading = f"{number}/{len(tasks)}  {task.arm}, seed {task.seed}"
        if _is_finished(out, task):
            say(f"{heading}: was finished")
            return True
        begin = time.monotonic()
        code = processes.call(_command(plan, task, out, extra, train), out / f"{task.folder}.log")
        say(f"{heading}: {_outcome(code, out, task, time.monotonic() - begin)}")
        return _is_finished(out, task)

    with _stopped_by_signals(processes), ThreadPoolExecutor(workers) as pool:
        done = list(pool.map(run, enumerate(tasks, start=1)))
    return [task for task, is_done in zip(tasks, done, strict=True) if not is_done]


def _command(plan: Plan, task: Task, out: Path, extra: Sequence[str], train: Sequence[str]) -> list[str]:
    launcher = [sys.executable]
    if plan.ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(plan.ranks)]
    folder = out / task.folder
    flags = [*task.flags, *extra, "--out", str(folder)]
    if (folder / "config.yaml").exists():  # begun before, and interrupted
        if (folder / "checkpoints").exists():
            flags = ["--resume", str(folder), *extra]
        elif holder_of(folder) is None:  # stopped before the first checkpoint, or of a kind that has none
            shutil.rmtree(folder)
    return [*launcher, *train, *flags]


def _is_finished(out: Path, task: Task) -> bool:
    return _summary(out, task) is not None


def _summary(out: Path, task: Task) -> dict[str, Any] | None:
    """Return the summary of a finished run; a damaged one is none, and is written again."""
    try:
        return read_summary(out / task.folder)
    except FieldError:
        return None


def _outcome(code: int, out: Path, task: Task, seconds: float) -> str:
    if (summary := _summary(out, task)) is not None:
        return f"{100 * summary['test_accuracy']:.2f} %, {seconds:.0f} s"
    if code <= 0:
        return "stopped; the same command goes on"
    log = out / f"{task.folder}.log"
    lines = log.read_text(errors="backslashreplace").strip().splitlines()[-_LAST_LINES:]
    return "\n    ".join([f"FAILED (exit code {code}), see {log}", *lines])


@contextmanager
def _stopped_by_signals(processes: _Processes) -> Iterator[None]:
    """Hand SIGTERM, SIGINT and SIGHUP on for the body; under nohup not the last."""

    def stop(number: int, frame: FrameType | None) -> None:
        processes.stop()

    is_main = threading.current_thread() is threading.main_thread()
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP) if is_main else ()
    is_nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    wanted = [number for number in numbers if number != signal.SIGHUP or not is_nohup]
    before = {number: signal.signal(number, stop) for number in wanted}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

"""The starts of a run: whether this one begins a run or goes on with one, and what became of those before.

A supervisor (torchrun, SLURM, Kubernetes) gives the same command again after a failure. Where the run lies is then told
by `--out`, or was left in the store of torchrun's agent.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from fedq.checkpoint import Checkpoints
from fedq.config import Config, RunConfig
from fedq.configfile import load_config
from fedq.errors import FieldError, RendezvousError
from fedq.files import read_or_nothing, replace_file, set_aside
from fedq.report import read_summary
from fedq.runfolder import SideOutput, holds_run
from fedq.runtime import Runtime, agent_store, from_root, num_restarts, on_root

C = TypeVar("C", bound=Config)

_log = logging.getLogger(__name__)

_FILE = "starts.jsonl"
_FUTILE = 2
"""Starts in a row without a finished round, each ended by an error of its own, after which a run is refused."""
_BACKOFF_S = (1, 2, 4)
"""Seconds to wait before a start, after one, two, and more starts without a finished round."""
_ERROR_LENGTH = 500
_LONGEST_COUNT = 10
"""Number of digits from which on a count of starts is taken for damaged."""
_OF_LOST_RANKS = ("gloo/", "NCCL", "Connection closed by peer", "Connection reset by peer")
"""Words by which a RuntimeError of torch says that a rank was lost; torch has no class for that."""

# Numbers this process's jobs: a script may run several, and does so in the same order when it is started again.
_job_numbers = itertools.count()
_last_job = 0


class Finished(Exception):
    """The run that the command describes was finished by an earlier start.

    Args:
        summary: The run's summary on rank 0; empty on the others.
    """

    def __init__(self, summary: dict[str, Any]) -> None:
        super().__init__("the run is finished")
        self.summary = summary


class Place:
    """Where this job's run lies, if an earlier start has begun it; rank 0 knows, and tells the others.

    Args:
        runtime: This rank's place among the ranks.
        environ: Environment that the launcher has set; default: `os.environ`.
        is_new: Whether this is a new job of the process; False: the job before, which was rolled back, goes on.
    """

    def __init__(self, runtime: Runtime, environ: Mapping[str, str] | None = None, *, is_new: bool = True) -> None:
        environ = os.environ if environ is None else environ
        self.is_new = is_new
        self.runtime = runtime
        argv = hashlib.sha256("\0".join(sys.argv).encode(errors="surrogateescape")).hexdigest()
        self._key = f"fedq/run/{argv}/{_job_number(is_new)}"
        self._store = agent_store(runtime, environ) if runtime.is_root else None
        self._known = self._look_up()
        self.is_restart = self._known is not None or num_restarts(environ) > 0
        """Whether a supervisor has given the command again, as far as this rank knows."""

    def found(self, config: C) -> C:
        """Return the settings, the same on every rank, with the run that is gone on with as `resume`.

        Raises:
            FieldError: `resume` was given with --exchange none, which has no checkpoints.
        """
        run = from_root(self.runtime, on_root(self.runtime, lambda: self._choose(config)))
        assert run is not None
        return replace(config, run=run)

    def keep(self, path: Path) -> None:
        """Leave the run's folder where the next start of the same command finds it, on rank 0."""
        if self._store is not None:
            self._store.set(self._key, str(path.resolve()))

    def _choose(self, config: Config) -> RunConfig:
        run = config.run
        if run.resume is not None:
            if config.exchange.exchange == "none":
                raise FieldError("resume", str(run.resume), "a run with --exchange round or step")
            return run
        path = self._known or run.out
        if path is None or not holds_run(path):
            return run
        doing = run.on_existing
        if doing == "new" and self._known is not None:  # an earlier start of this command has made it
            doing = "resume"
        if doing == "auto":
            doing = "refuse" if _summary(path) and not self.is_restart else "resume"
        if doing == "new":
            return replace(run, out=_beside(path))
        return replace(run, resume=path) if doing == "resume" else replace(run, out=path)

    def _look_up(self) -> Path | None:
        if self._store is None or not self._store.check([self._key]):
            return None
        return Path(self._store.get(self._key).decode())


def _job_number(is_new: bool) -> int:
    """Return the number of this process's job."""
    global _last_job
    if is_new:
        _last_job = next(_job_numbers)
    return _last_job


def finished_summary(config: Config) -> dict[str, Any] | None:
    """Return the summary of the run to go on with, if there is nothing left to do; None if there is."""
    path = config.run.resume
    if path is None:
        return None
    summary = _summary(path)
    if summary is None:
        return None
    before = load_config(path / "config.yaml", type(config)()).run
    is_same_end = (before.rounds, before.target_accuracy) == (config.run.rounds, config.run.target_accuracy)
    return summary if is_same_end else None


def _summary(path: Path) -> dict[str, Any] | None:
    """Return a finished run's summary; None where it is missing, or damaged, and then written anew."""
    try:
        return read_summary(path)
    except FieldError:
        return None


def _beside(path: Path) -> Path:
    """Return the first of `path-2`, `path-3`... that holds no run."""
    return next(
        beside for number in itertools.count(2) if not holds_run(beside := path.with_name(f"{path.name}-{number}"))
    )


# ---- what became of earlier starts: one line each in starts.jsonl, and one for each rank's error ----


def note(path: Path, start: int, **what: Any) -> None:
    """Add a line about a start to the run's `starts.jsonl`; who cannot write it says so and goes on."""
    with SideOutput(str(path / _FILE)).trying(OSError):
        _append(path, start, what)


def count_start(path: Path) -> int:
    """Return how often the run was started before, and count this start.

    A count that is damaged or missing is begun anew after the last start that was noted.
    """
    file, noted = path / "starts", max((one["start"] + 1 for one in _notes(path)), default=0)
    text = read_or_nothing(file)
    is_count = text.isascii() and text.isdigit() and len(text) < _LONGEST_COUNT
    if os.path.lexists(file) and not is_count:
        set_aside(file, "it holds no number")
    before = int(text) if is_count else noted
    replace_file(file, str(before + 1).encode())
    return before


def _append(path: Path, start: int, what: Mapping[str, Any]) -> None:
    """Add a line, whatever an earlier process was about to write when it was killed."""
    file, now = path / _FILE, datetime.now(timezone.utc).isoformat(timespec="seconds")
    line = json.dumps({"start": start, "time": now, **what})
    if file.is_dir():
        set_aside(file, "it is a folder")
    is_cut = file.exists() and not (file.read_bytes() or b"\n").endswith(b"\n")
    with file.open("a", encoding="utf-8") as opened:
        opened.write("\n" * is_cut + line + "\n")


def note_start(path: Path, start: int, restart: int) -> None:
    """Note that a start begins, with the supervisor's number for it and the rounds that are finished."""
    note(path, start, restart=restart, round=_num_finished(path))


@contextmanager
def noting_errors(path: Path, start: int, rank: int) -> Iterator[None]:
    """Note what the body raises, unless it is only that another rank has gone."""
    try:
        yield
    except Exception as error:
        if not is_of_lost_rank(error):
            with suppress(OSError):  # the error itself is what a user must read
                _append(path, start, {"rank": rank, "error": f"{type(error).__name__}: {error}"[:_ERROR_LENGTH]})
        raise


def check_progress(path: Path) -> None:
    """Wait a little after a start that finished no round, and refuse another after two that ended by their own errors.

    What ends by a signal may be tried as often as the supervisor likes.

    Raises:
        FieldError: The last two starts ended by errors of their own, and no round was finished since.
    """
    now, notes = _num_finished(path), _notes(path)
    rounds = {one["start"]: one["round"] for one in notes if "round" in one}
    errors = {one["start"]: f"rank {one.get('rank')}: {one['error']}" for one in notes if "error" in one}
    in_vain = list(itertools.takewhile(lambda start: rounds[start] == now, sorted(rounds, reverse=True)))
    if len(in_vain) >= _FUTILE and all(start in errors for start in in_vain[:_FUTILE]):
        allowed = (
            f"a run that gets on: its last {_FUTILE} starts ended by errors of their own, with {now} rounds finished "
            f"before and after ({errors[in_vain[0]]}); mend the cause, then give the command anew"
        )
        raise FieldError("resume", str(path), allowed)
    if in_vain:
        time.sleep(_BACKOFF_S[min(len(in_vain), len(_BACKOFF_S)) - 1])


def wire_after_rounds(path: Path) -> dict[int, int]:
    """Return the wire bytes so far as they were after each round in a run's `metrics.jsonl`."""
    return {_whole(row, "round"): _whole(row, "wire_bytes") for row in _rows(path / "metrics.jsonl")}


def note_repeated(path: Path, start: int, before: Mapping[int, int], kept: int) -> None:
    """Note what a start does again.

    Args:
        path: The run's folder.
        start: Number of the start, from 0.
        before: Wire bytes by round, which `wire_after_rounds` returned before the start forgot anything.
        kept: Number of finished rounds that the start goes on after.
    """
    repeated = [round for round in before if round >= kept]
    if repeated:
        wire = before[max(repeated)] - before.get(kept - 1, 0)
        note(path, start, repeated_rounds=len(repeated), repeated_wire_bytes=wire)


def repeated(path: Path) -> dict[str, int]:
    """Return, for the summary, the rounds and wire bytes of a run that its ledger has forgotten.

    They are lower bounds: of a round that was not finished nobody knows how far it came.
    """
    notes = _notes(path)
    return {name: sum(_whole(one, name) for one in notes) for name in ("repeated_rounds", "repeated_wire_bytes")}


def _whole(row: Mapping[str, Any], name: str) -> int:
    """Return a whole number; 0 where it is missing or damaged."""
    value = row.get(name, 0)
    return value if isinstance(value, int) else 0


def _num_finished(path: Path) -> int:
    return max(Checkpoints(path / "checkpoints").numbers(), default=0)


def _notes(path: Path) -> Sequence[dict[str, Any]]:
    return [one for one in _rows(path / _FILE) if isinstance(one.get("start"), int)]


def _rows(file: Path) -> list[dict[str, Any]]:
    """Return the objects of a file of JSON lines, without lines that are damaged; nothing without the file."""
    rows = []
    with suppress(OSError):
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
            with suppress(ValueError, RecursionError):
                rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict)]


def is_of_lost_rank(error: BaseException | None) -> bool:
    """Whether an error, or what caused it, says that another rank or the store has gone."""
    while error is not None:
        text = str(error)
        if isinstance(error, dist.DistError | RendezvousError) or (
            isinstance(error, RuntimeError) and any(words in text for words in _OF_LOST_RANKS)
        ):
            return True
        error = error.__cause__ or error.__context__
    return False

"""Who works in a run's folder: one process at a time, which the file `lock` in it names. Readers need none.

A holder on this machine is asked for by its process number and start time. Of one on another machine nobody here can
know whether it lives, and file systems keep locks of dead machines for minutes or for ever; so a holder touches its
file every few seconds, and one that has not done so for some time is dead.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import platform
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

from fedq.errors import FieldError
from fedq.files import set_aside

_log = logging.getLogger(__name__)

LOCK = "lock"
"""Name of the lock's file."""
BEAT_S = 5.0
"""Seconds between signs of life."""
SILENT_S = 120.0
"""Seconds without a sign of life after which a holder on another machine counts as dead."""
_LOOK_S = 0.2
_SETTLE_S = 2.0
"""Seconds that a process which has just got the file may take to write its name into it."""
_LONGEST = 4096


@dataclass(frozen=True)
class Holder:
    """A process.

    Args:
        host: Name of the process's machine.
        space: Text that differs between machines, boots and containers; pids can be compared where it is the same.
        pid: Number of the process there.
        born: Time at which the process was started, in the machine's own count: pids are given again.
        since: Time at which the process took the folder, for people.
    """

    host: str
    space: str
    pid: int
    born: str
    since: str

    @classmethod
    def this(cls) -> Holder:
        """Return this process."""
        now = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
        return cls(platform.node(), _space(), os.getpid(), _born(os.getpid()) or "", now)

    @property
    def is_here(self) -> bool:
        """Whether this process can see whether that one lives."""
        return self.space == _space()

    @property
    def is_dead(self) -> bool:
        """Whether it was here and is gone."""
        return self.is_here and _born(self.pid) != self.born

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"


class FolderLock:
    """Holds a run's folder until `release`, or until the process is gone. Made by `take`."""

    def __init__(self, file: Path, descriptor: int) -> None:
        self._file = file
        self._descriptor = descriptor
        self._is_over = threading.Event()
        self._beating = threading.Thread(target=self._beat, name="fedq-lock", daemon=True)
        self._beating.start()

    @classmethod
    def take(cls, folder: Path, field: str = "out") -> FolderLock:
        """Take a folder; what a dead process has left there is said in a line, and taken over.

        Args:
            folder: An existing folder.
            field: The setting that an error names.

        Raises:
            FieldError: Another process works there.
            OSError: The lock cannot be written.
        """
        file = folder / LOCK
        while True:
            descriptor = _opened(file)
            try:
                if _is_taken_over(file, descriptor, field):
                    _write(file, descriptor)
                    return cls(file, descriptor)
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)

    def check(self) -> None:
        """Make sure that the folder is still there, and this process's own.

        Raises:
            OSError: The folder, or the lock in it, is gone.
            FieldError: Another process has taken it over.
        """
        if not _is_at(self._file, self._descriptor):
            self._file.stat()
            allowed = f"the folder of this process alone; {_read_file(self._file)} has taken it over"
            raise FieldError("out", str(self._file.parent), allowed)

    def release(self) -> None:
        """Give the folder back; calling it twice is harmless."""
        if self._is_over.is_set():
            return
        self._is_over.set()
        self._beating.join()
        with suppress(OSError):
            if _is_at(self._file, self._descriptor):
                self._file.unlink()
        os.close(self._descriptor)

    def _beat(self) -> None:
        while not self._is_over.wait(BEAT_S):
            with suppress(OSError):  # `check` tells
                os.utime(self._descriptor)


def holder_of(folder: Path) -> Holder | None:
    """Return who works in a folder, as far as this process can see; None if it is nobody."""
    holder = _read_file(folder / LOCK)
    return None if holder is None or holder.is_dead else holder


def _opened(file: Path) -> int:
    if file.is_dir():
        set_aside(file, "it is a folder")
    return os.open(file, os.O_RDWR | os.O_CREAT, 0o666)


def _is_taken_over(file: Path, descriptor: int, field: str) -> bool:
    """Whether a lock's file is this process's to write now; if not, it is to be opened anew.

    Raises:
        FieldError: Another process holds the lock.
    """
    is_free = _try(descriptor)
    holder = _settled(descriptor, is_free)
    if not _is_at(file, descriptor):  # it was given back just now
        return False
    if holder is None:
        if not is_free:
            raise FieldError(field, str(file.parent), f"a folder in which no other process works (see {file})")
        return True
    _check_gone(holder, file, field)
    if _read(descriptor) != holder:  # somebody else was quicker
        return False
    _log.warning("%s was left by %s, which is gone: it is taken over", file, holder)
    if not _try(descriptor):  # the file system keeps it for a machine that is gone
        file.unlink(missing_ok=True)
    return _is_at(file, descriptor)


def _check_gone(holder: Holder, file: Path, field: str) -> None:
    """Return if whoever has left a lock is dead.

    Raises:
        FieldError: The holder lives, or cannot be known to be dead.
    """
    if holder.is_dead or (not holder.is_here and _falls_silent(holder, file)):
        return
    allowed = f"a folder in which no other process works: {holder}, works there"
    if not holder.is_here:
        allowed += f" (it was heard of just now; if it cannot be, delete {file})"
    raise FieldError(field, str(file.parent), allowed)


def _falls_silent(holder: Holder, file: Path) -> bool:
    """Whether a holder on another machine gives no sign of life until the time is over.

    Only the file system's own clock is asked, because those of two machines may differ.
    """
    last = _touched(file)
    wait_s = SILENT_S - (_clock_of(file.parent) - last)
    if wait_s > 0:
        _log.warning("%s names %s: waiting for a sign of life, at most %.0f s", file, holder, wait_s)
    end = time.monotonic() + wait_s
    while time.monotonic() < end:
        if _touched(file) != last:
            return False
        time.sleep(_LOOK_S)
    return True


def _touched(file: Path) -> float:
    """Return when a lock was last touched; opening it makes a network file system look anew."""
    try:
        with file.open("rb") as opened:
            return os.fstat(opened.fileno()).st_mtime
    except FileNotFoundError:  # given back: that is a sign of life
        return 0.0


def _clock_of(folder: Path) -> float:
    with tempfile.TemporaryFile(dir=folder) as file:
        return os.fstat(file.fileno()).st_mtime


def _settled(descriptor: int, is_free: bool) -> Holder | None:
    """Return who has written into a lock; whoever has just got it may still be about to."""
    end = time.monotonic() + _SETTLE_S
    holder = _read(descriptor)
    while not is_free and (holder is None or holder.is_dead) and time.monotonic() < end:
        time.sleep(_LOOK_S)
        holder = _read(descriptor)
    return holder


def _try(descriptor: int) -> bool:
    """Lock a file, if nobody has; True also where a file system has no locks. No child process inherits it."""
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        return True
    return True


def _is_at(file: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(file.stat(), os.fstat(descriptor))
    except OSError:
        return False


def _write(file: Path, descriptor: int) -> None:
    """Name this process in a lock that is its own; or leave none behind, where that cannot be written."""
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(asdict(Holder.this())).encode(), 0)
        os.fsync(descriptor)
    except OSError:
        file.unlink(missing_ok=True)
        raise


def _read_file(file: Path) -> Holder | None:
    try:
        descriptor = os.open(file, os.O_RDONLY)
    except OSError:
        return None
    try:
        return _read(descriptor)
    finally:
        os.close(descriptor)


def _read(descriptor: int) -> Holder | None:
    """Return who is named; None: nobody, or in words that nobody can read."""
    try:
        holder = Holder(**json.loads(os.pread(descriptor, _LONGEST, 0)))
    except (ValueError, TypeError, OSError):
        return None
    return holder if isinstance(holder.pid, int) else None


def _born(pid: int) -> str | None:
    """Return when a process was started; empty where the system does not tell, None if it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except FileNotFoundError:
        return None if Path("/proc/self/stat").exists() else _born_anyhow(pid)
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


def _born_anyhow(pid: int) -> str | None:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except OSError:  # somebody else's
        return ""
    return ""


def _space() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return platform.node()

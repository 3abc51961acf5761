"""Python commands in processes that are forked from one that has imported everything, for tests.

Importing PyTorch takes two seconds of processor time, and a test of a server with two clients starts three processes.
A command runs here as ``python FILE ...``, ``python -m MODULE ...`` and ``python -c TEXT ...`` do: with arguments, an
environment, a folder, output and an exit code of its own. What a test says of the interpreter's start (imports,
launchers, closed streams) needs `subprocess`.
"""

from __future__ import annotations

import atexit
import gc
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# Imported once, in the server that processes are forked from: one then starts in a tenth of a second.
_PRELOAD = [
    "torch._dynamo",  # every optimizer imports it when it is made
    "fedq.cli",
    "fedq.trainers.run",
    "fedq.network.serve",
    "sklearn.datasets",
    "pyarrow.parquet",
    "tensorboard.summary.writer.record_writer",
    "safetensors.torch",
]


def context() -> Any:
    """Return the context of `multiprocessing` whose processes are forked from the one that has imported everything."""
    warm = multiprocessing.get_context("forkserver")
    warm.set_forkserver_preload(_PRELOAD)
    return warm


class Command:
    """A Python command that runs, with what tests need of `subprocess.Popen`.

    Args:
        arguments: After ``python``: a file, ``-m`` and a module, or ``-c`` and a text, then the command's arguments.
        output: File of its standard output.
        errors: File of its standard error; default: that of its output.
        env: Its environment, the whole of it.
        cwd: Its folder.
    """

    def __init__(
        self, arguments: Sequence[str], *, output: Path, errors: Path | None = None, env: Mapping[str, str], cwd: Path
    ) -> None:
        files = (str(output), str(errors or output))
        given = ([str(argument) for argument in arguments], files, dict(env), str(cwd))
        self._process = context().Process(target=_run, args=given, daemon=True)
        self._process.start()
        self.pid = self._process.pid

    def poll(self) -> int | None:
        """Return its exit code, the negative number of a signal that ended it, or None as long as it runs."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("python", timeout or 0.0)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def run(
    arguments: Sequence[str], *, env: Mapping[str, str], cwd: Path, limit_s: float
) -> subprocess.CompletedProcess[str]:
    """Run a Python command to its end and return what it said; a command that takes too long is killed."""
    with tempfile.TemporaryDirectory() as folder:
        output, errors = Path(folder, "output"), Path(folder, "errors")
        command = Command(arguments, output=output, errors=errors, env=env, cwd=cwd)
        try:
            code = command.wait(limit_s)
        except BaseException:
            command.kill()
            raise
        said = [file.read_text(errors="replace") for file in (output, errors)]
        return subprocess.CompletedProcess([sys.executable, *arguments], code, *said)


def _run(arguments: list[str], files: tuple[str, str], env: dict[str, str], cwd: str) -> None:
    """Become the command, and end as an interpreter does: threads are awaited, then what was registered is called."""
    multiprocessing.current_process()._config["daemon"] = False  # it may start processes of its own
    gc.freeze()  # what was imported is not looked through again
    atexit._clear()  # what the process it came from is to do at its own end
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    for number, name in zip((1, 2), files, strict=True):
        file = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", closefd=False, buffering=1)  # noqa: SIM115
    if extra := env.get("PYTHONPATH"):
        sys.path[:0] = extra.split(os.pathsep)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    code = _call(arguments)
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.exit(code)


def _call(arguments: list[str]) -> object:
    first, *others = arguments
    try:
        if first == "-m":
            sys.argv = [*others]
            sys.path.insert(0, os.getcwd())
            runpy.run_module(others[0], run_name="__main__", alter_sys=True)
        elif first == "-c":
            sys.argv = ["-c", *others[1:]]
            sys.path.insert(0, "")
            exec(compile(others[0], "<string>", "exec"), {"__name__": "__main__"})
        else:
            sys.argv = [first, *others]
            sys.path.insert(0, str(Path(first).resolve().parent))
            runpy.run_path(first, run_name="__main__")
    except SystemExit as end:
        return end.code
    except BaseException:
        sys.excepthook(*sys.exc_info())
        return 1
    return 0

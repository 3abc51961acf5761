"""How a job ends before its end: in one line, with the command that goes on with it."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from fedq.checkpoint import Checkpoints
from fedq.config import Config
from fedq.errors import RunStopped
from fedq.files import describe, is_of_disk
from fedq.runtime import Runtime


def farewell(config: Config, runtime: Runtime, path: Path, cause: str) -> str:
    """Return what stopped a run, how far it is, and how to go on with it."""
    if config.exchange.exchange == "none":
        return f"stopped by {cause}; a run with --exchange none has no checkpoints, so start it again"
    finished = Checkpoints(path / "checkpoints").numbers()
    after = f"after round {finished[-1]}" if finished else "before the first round was finished"
    program = shlex.join([*_launcher(runtime), *_program(), *config.command])
    return f"stopped by {cause} {after}; go on with: {program} --resume {path}"


def command(runtime: Runtime) -> str:
    """Return the command that does what this process was started for, on one machine."""
    return shlex.join([*_launcher(runtime), *_program(), *sys.argv[1:]])


@contextmanager
def stopped_by_disk(path: Path, say: Callable[[str], str]) -> Iterator[None]:
    """Tell an error of writing to a run's folder in the words of `farewell`.

    Args:
        path: The run's folder.
        say: Returns the words of `farewell` for a cause.

    Raises:
        RunStopped: The disk is full or broken, or the folder is gone.
    """
    try:
        yield
    except OSError as error:
        if not _is_of_folder(error, path):
            raise
        raise RunStopped(say(f"what cannot be written ({describe(error)})")) from error


def _is_of_folder(error: OSError, path: Path) -> bool:
    if is_of_disk(error):
        return True
    name = error.filename
    is_name = isinstance(name, str | bytes | os.PathLike)
    return is_name and Path(os.fsdecode(name)).absolute().is_relative_to(path)


def _program() -> list[str]:
    """Return what Python or a launcher was told to run: a script, or ``-m`` and a module."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return [sys.argv[0]] if spec is None else ["-m", spec.name.removesuffix(".__main__")]


def _launcher(runtime: Runtime) -> list[str]:
    local = str(runtime.local_world_size)
    by_name = {
        "python": ["python"],
        "srun": ["srun", "python"],
        "deepspeed": ["deepspeed", "--num_accelerators", local],
    }
    torchrun = ["torchrun", "--nproc-per-node", local]  # works whatever the job was started by
    return by_name.get(runtime.launcher, torchrun)

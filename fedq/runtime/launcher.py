"""What the launcher says: this process's ranks, where they meet, and whether more of them were asked for.

Nothing is read at import, and nothing here needs torch. The process group lives in `fedq.runtime.group`.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import socket
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedq.errors import FieldError

# Step ids from here on are SLURM's own (batch script, interactive shell), not started by srun; see slurm.h.
_FIRST_RESERVED_STEP = 0xFFFFFFFA
_SCONTROL_TIMEOUT_S = 30
# mpirun's variables for the number of processes: Open MPI; MPICH, Intel MPI; MVAPICH2.
_MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
_PLACE = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_SLURM_PLACE = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS")


@dataclass(frozen=True)
class Ranks:
    """This process's place among the job's processes."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    launcher: str
    """Launcher: python (none), torchrun, deepspeed, accelerate, srun, or env (another one sets RANK and WORLD_SIZE)."""


def detect(environ: Mapping[str, str]) -> Ranks:
    """Read this process's ranks: RANK and WORLD_SIZE first, SLURM's variables only inside an srun step.

    Args:
        environ: The environment, normally `os.environ`.

    Returns:
        The process's ranks; rank 0 of 1 when there is no launcher.

    Raises:
        FieldError: A variable is missing from its set, is no whole number, or is out of range; it is named. Or mpirun
            started several processes, which do not know of each other.
    """
    if "RANK" in environ or "WORLD_SIZE" in environ:
        return _from_env(environ)
    if _in_srun_step(environ):
        return _from_slurm(environ)
    for name in _MPI_SIZES:
        if environ.get(name, "1") != "1":
            raise FieldError(name, environ[name], "another launcher (torchrun, srun), or RANK and WORLD_SIZE beside it")
    return Ranks(0, 1, 0, 1, "accelerate" if _is_accelerate(environ) else "python")


def without_local_rank(argv: Sequence[str], environ: Mapping[str, str]) -> list[str]:
    """Return the arguments without the `--local_rank=N` that the deepspeed launcher puts before a script's own.

    It stays, and is then refused as an unknown flag, where it did not come from the launcher.
    """
    appended = f"--local_rank={environ.get('LOCAL_RANK')}"
    is_appended = bool(argv) and argv[0] == appended and _is_deepspeed(environ)
    return list(argv[1:] if is_appended else argv)


def check_lone_process(ranks: Ranks, environ: Mapping[str, str], command: Sequence[str] | None = None) -> None:
    """Refuse the one process that `accelerate launch --cpu --num_processes 2` starts without a word.

    Accelerate leaves no trace of the number in the environment, so the launcher's own command line is read.

    Args:
        ranks: This process's ranks.
        environ: The environment, which says where Accelerate's own config file lies.
        command: The launcher's command line. Default: that of the parent process, where /proc shows it.

    Raises:
        FieldError: More processes were asked for than the one that there is.
    """
    if ranks.launcher != "accelerate" or ranks.world_size > 1:
        return
    number = _num_processes(_parent_command() if command is None else command, environ)
    if number > 1:
        allowed = (
            f"1, all that this command starts; for {number} on the CPU: accelerate launch --config_file "
            f"examples/accelerate_config/cpu.yaml, or ACCELERATE_USE_CPU=true accelerate launch --multi_gpu, with "
            f"--num_processes {number}"
        )
        raise FieldError("num_processes", number, allowed)


def num_restarts(environ: Mapping[str, str]) -> int:
    """Return how often torchrun has restarted this process, and SLURM its job, as far as each of them knows."""
    counts = (environ.get(name, "") for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))
    return sum(int(count) for count in counts if count.isascii() and count.isdecimal())


def rendezvous(ranks: Ranks, environ: Mapping[str, str]) -> tuple[str, int]:
    """Return the address and port at which the ranks meet: MASTER_ADDR and MASTER_PORT, or under srun derived.

    Raises:
        FieldError: The address or the port is not set and cannot be derived.
    """
    is_srun = ranks.launcher == "srun"
    if "MASTER_ADDR" in environ or not is_srun:
        address = _text(environ, "MASTER_ADDR", "the address of the machine that runs rank 0")
    else:
        address = _first_host(environ)
    if "MASTER_PORT" in environ or not is_srun:
        return address, _count(environ, "MASTER_PORT", 1, 65535)
    return address, _step_port(environ)


def misleading(ranks: Ranks, environ: Mapping[str, str]) -> tuple[str, ...]:
    """Return, for a rank that waits for others, what in its environment may be wrong about there being any."""
    names = _SLURM_PLACE if ranks.launcher == "srun" else _PLACE
    given = ", ".join(f"{name}={environ[name]}" for name in names if name in environ)
    if ranks.launcher == "srun":
        alone = "`srun --pty` leaves a shell on task 0 alone: RANK=0 WORLD_SIZE=1 before the command trains on one rank"
        return (f"srun says {given}; {alone}, srun before it on all",)
    return (f"{given} are set: unset them if no launcher has started the other ranks",)


def _from_env(environ: Mapping[str, str]) -> Ranks:
    world_size = _count(environ, "WORLD_SIZE", 1)
    rank = _count(environ, "RANK", 0, world_size - 1)
    # DeepSpeed says LOCAL_SIZE; a launcher that says neither is taken to run on one machine.
    size_name = next((name for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE") if name in environ), "WORLD_SIZE")
    local_world_size = _count(environ, size_name, 1, world_size)
    has_local_rank = "LOCAL_RANK" in environ or size_name != "WORLD_SIZE"
    local_rank = _count(environ, "LOCAL_RANK", 0, local_world_size - 1) if has_local_rank else rank
    return Ranks(rank, world_size, local_rank, local_world_size, _launcher(environ))


def _launcher(environ: Mapping[str, str]) -> str:
    """Name the launcher that has set RANK and WORLD_SIZE."""
    if "TORCHELASTIC_RUN_ID" in environ:
        return "accelerate" if _is_accelerate(environ) else "torchrun"
    return "deepspeed" if _is_deepspeed(environ) else "env"


def _is_accelerate(environ: Mapping[str, str]) -> bool:
    # `accelerate launch` sets both on all its paths; a user's own environment rarely has the second.
    return "ACCELERATE_MIXED_PRECISION" in environ and "ACCELERATE_DYNAMO_BACKEND" in environ


def _is_deepspeed(environ: Mapping[str, str]) -> bool:
    return all(name in environ for name in ("LOCAL_RANK", "LOCAL_SIZE", "CROSS_RANK", "CROSS_SIZE"))


def _parent_command() -> list[str]:
    try:
        return Path(f"/proc/{os.getppid()}/cmdline").read_text(encoding="utf-8", errors="replace").split("\0")
    except OSError:  # no /proc, or not to be read
        return []


def _num_processes(command: Sequence[str], environ: Mapping[str, str]) -> int:
    """Return the processes that an `accelerate launch` command line asks for, 1 if nothing says how many."""
    if not any("accelerate" in word for word in command):
        return 1
    flags = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    flags.add_argument("--num_processes", "--num-processes", default="")
    flags.add_argument("--config_file", "--config-file", type=Path)
    flags.add_argument("--cpu", action="store_true")
    given = flags.parse_known_args(command)[0]
    number = given.num_processes
    if not number and not (given.cpu and given.config_file is None):  # with --cpu the user's own file is not read
        number = _num_processes_in(given.config_file or _accelerate_config(environ))
    return int(number) if number.isdecimal() else 1


def _num_processes_in(path: Path) -> str:
    """Return what an Accelerate config says; it is one key of a flat file, so no YAML parser is needed."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    found = re.search(r"""^\s*["']?num_processes["']?\s*:\s*(\d+)""", text, re.MULTILINE)
    return found[1] if found else ""


def _accelerate_config(environ: Mapping[str, str]) -> Path:
    """Return where `accelerate config` leaves the user's own file."""
    caches = environ.get("XDG_CACHE_HOME") or Path(environ.get("HOME", "/"), ".cache")
    return Path(environ.get("HF_HOME") or Path(caches, "huggingface"), "accelerate", "default_config.yaml")


def _in_srun_step(environ: Mapping[str, str]) -> bool:
    # A batch script sees SLURM_NTASKS and SLURM_PROCID=0 too, but only srun has started the tasks that they count.
    step = environ.get("SLURM_STEP_ID", "")
    return "SLURM_PROCID" in environ and step.isdecimal() and int(step) < _FIRST_RESERVED_STEP


def _from_slurm(environ: Mapping[str, str]) -> Ranks:
    world_size = _count(environ, _first_set(environ, "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"), 1)
    rank = _count(environ, "SLURM_PROCID", 0, world_size - 1)
    local_world_size = _slurm_local_size(environ, world_size)
    local_rank = _count(environ, "SLURM_LOCALID", 0, local_world_size - 1)
    return Ranks(rank, world_size, local_rank, local_world_size, "srun")


def _slurm_local_size(environ: Mapping[str, str], world_size: int) -> int:
    """Return the tasks on this node, from tasks a node such as `2(x3),1`; without them there is one node."""
    name = _first_set(environ, "SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE", "SLURM_NTASKS_PER_NODE")
    text = environ.get(name, str(world_size))
    if not re.fullmatch(r"\d+(\(x\d+\))?(,\d+(\(x\d+\))?)*", text):
        raise FieldError(name, text, "tasks a node, such as 2 or 2(x3),1")
    sizes = [int(size) for size, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text) for _ in range(int(times or 1))]
    return sizes[0] if len(set(sizes)) == 1 else sizes[_count(environ, "SLURM_NODEID", 0, len(sizes) - 1)]


def _first_set(environ: Mapping[str, str], *names: str) -> str:
    return next((name for name in names if name in environ), names[-1])


def _text(environ: Mapping[str, str], name: str, allowed: str) -> str:
    if not environ.get(name):
        raise FieldError(name, environ.get(name), f"{allowed}; the launcher sets it")
    return environ[name]


def _count(environ: Mapping[str, str], name: str, low: int, high: int | None = None) -> int:
    allowed = f"a whole number of {low} or more" if high is None else f"a whole number from {low} to {high}"
    text = _text(environ, name, allowed)
    # isascii: isdecimal alone takes other scripts' digits
    if not (text.isascii() and text.isdecimal()) or int(text) < low or (high is not None and int(text) > high):
        raise FieldError(name, text, allowed)
    return int(text)


def _first_host(environ: Mapping[str, str]) -> str:
    """Return an address of the step's first host, which runs rank 0."""
    name = _first_set(environ, "SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST")
    hosts = _scontrol(environ, "show", "hostnames", _text(environ, name, "the step's hosts")).split()
    if not hosts:
        raise FieldError(name, environ[name], "at least one host")
    try:
        socket.getaddrinfo(hosts[0], None)
    except OSError:  # a node's name need not resolve; SLURM itself goes by its address
        match = re.search(r"\bNodeAddr=(\S+)", _scontrol(environ, "-o", "show", "node", hosts[0]))
        return match[1] if match else hosts[0]
    return hosts[0]


def _scontrol(environ: Mapping[str, str], *arguments: str) -> str:
    command = ["scontrol", *arguments]
    try:
        done = subprocess.run(
            command, env=dict(environ), capture_output=True, text=True, check=True, timeout=_SCONTROL_TIMEOUT_S
        )
    except (OSError, subprocess.SubprocessError) as error:
        allowed = f"the address of the first node; it could not be derived, because `{' '.join(command)}` failed"
        raise FieldError("MASTER_ADDR", None, f"{allowed} ({error})") from None
    return done.stdout


def _step_port(environ: Mapping[str, str]) -> int:
    """Return a port that all ranks of a step agree on and that other steps on the machine are unlikely to use."""
    job = _text(environ, _first_set(environ, "SLURM_JOB_ID", "SLURM_JOBID"), "the job's number")
    digest = hashlib.sha256(f"{job}.{environ['SLURM_STEP_ID']}".encode()).digest()
    return 20000 + int.from_bytes(digest[:8], "big") % 40000

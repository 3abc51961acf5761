"""The launcher's environment, and real Gloo ranks that meet, disagree, wait for each other and fail."""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from distributed import LIMIT_S, run_ranks
from hypothesis import given
from hypothesis import strategies as st
from properties import few, is_all

from fedq import waiting
from fedq.cli import main
from fedq.errors import FieldError, RendezvousError
from fedq.runtime import (
    Ranks,
    Runtime,
    check_lone_process,
    detect,
    distributed,
    local_root_first,
    on_root,
    rendezvous,
    without_local_rank,
)
from fedq.runtime.group import _runtime
from fedq.waiting import Pace

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "none"}
SRUN = {
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "2",
    "SLURM_NTASKS": "3",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "2,1",
}
DEEPSPEED = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_SIZE": "2",
    "CROSS_RANK": "1",
    "CROSS_SIZE": "2",
}
ACCELERATE = {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "NO"}


# ---- what the environment says ----


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, Ranks(0, 1, 0, 1, "python")),
        (TORCHRUN, Ranks(3, 4, 1, 2, "torchrun")),
        ({"RANK": "1", "WORLD_SIZE": "2"}, Ranks(1, 2, 1, 2, "env")),
        ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_SIZE": "2"}, Ranks(3, 4, 1, 2, "env")),
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, Ranks(1, 2, 0, 2, "env")),
        (DEEPSPEED, Ranks(3, 4, 1, 2, "deepspeed")),
        (DEEPSPEED | TORCHRUN, Ranks(3, 4, 1, 2, "torchrun")),
        (ACCELERATE | TORCHRUN, Ranks(3, 4, 1, 2, "accelerate")),
        (ACCELERATE, Ranks(0, 1, 0, 1, "accelerate")),
        (SRUN | ACCELERATE, Ranks(2, 3, 0, 1, "srun")),
        ({"ACCELERATE_MIXED_PRECISION": "no"}, Ranks(0, 1, 0, 1, "python")),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, Ranks(0, 1, 0, 1, "python")),
        ({"OMPI_COMM_WORLD_SIZE": "2", "RANK": "1", "WORLD_SIZE": "2"}, Ranks(1, 2, 1, 2, "env")),
        (SRUN, Ranks(2, 3, 0, 1, "srun")),
        (SRUN | TORCHRUN, Ranks(3, 4, 1, 2, "torchrun")),
        (SRUN | {"SLURM_STEP_NUM_TASKS": "3", "SLURM_NTASKS": "8"}, Ranks(2, 3, 0, 1, "srun")),
        (SRUN | {"SLURM_STEP_ID": "4294967291"}, Ranks(0, 1, 0, 1, "python")),  # the batch script
        (SRUN | {"SLURM_STEP_ID": "4294967290"}, Ranks(0, 1, 0, 1, "python")),  # salloc's interactive shell
        (SRUN | {"SLURM_STEP_ID": "batch"}, Ranks(0, 1, 0, 1, "python")),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, Ranks(0, 1, 0, 1, "python")),
    ],
)
def test_ranks_of_each_launcher(environ: dict[str, str], expected: Ranks) -> None:
    assert detect(environ) == expected


@pytest.mark.parametrize(
    ("environ", "field", "value"),
    [
        ({"RANK": "0"}, "WORLD_SIZE", None),
        ({"WORLD_SIZE": "2"}, "RANK", None),
        ({"RANK": "0", "WORLD_SIZE": ""}, "WORLD_SIZE", ""),
        ({"RANK": "0", "WORLD_SIZE": "two"}, "WORLD_SIZE", "two"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "WORLD_SIZE", "0"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK", "-1"),
        ({"RANK": "٣", "WORLD_SIZE": "4"}, "RANK", "٣"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK", "2"),
        (TORCHRUN | {"LOCAL_RANK": "2"}, "LOCAL_RANK", "2"),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "5"}, "LOCAL_WORLD_SIZE", "5"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}, "LOCAL_RANK", None),
        (SRUN | {"SLURM_PROCID": "3"}, "SLURM_PROCID", "3"),
        (SRUN | {"SLURM_STEP_TASKS_PER_NODE": "2(x"}, "SLURM_STEP_TASKS_PER_NODE", "2(x"),
        (SRUN | {"SLURM_NODEID": "2"}, "SLURM_NODEID", "2"),
        ({"SLURM_STEP_ID": "0", "SLURM_PROCID": "0"}, "SLURM_NTASKS", None),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_SIZE", "2"),  # they would train two models
    ],
)
def test_a_broken_environment_names_variable_and_value(environ: dict[str, str], field: str, value: str | None) -> None:
    with pytest.raises(FieldError) as caught:
        detect(environ)
    assert (caught.value.field, caught.value.value) == (field, value)
    assert field in str(caught.value)
    assert repr(value) in str(caught.value)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.data())
def test_srun_tasks_a_node_are_expanded(sizes: list[int], data: st.DataObject) -> None:
    runs = [(size, len(list(run))) for size, run in itertools.groupby(sizes)]
    text = ",".join(f"{size}(x{times})" if times > 1 else str(size) for size, times in runs)
    node = data.draw(st.integers(0, len(sizes) - 1))
    environ = {
        "SLURM_STEP_ID": "1",
        "SLURM_NTASKS": str(sum(sizes)),
        "SLURM_PROCID": str(sum(sizes[:node])),
        "SLURM_LOCALID": "0",
        "SLURM_NODEID": str(node),
        "SLURM_STEP_TASKS_PER_NODE": text,
    }
    assert detect(environ) == Ranks(sum(sizes[:node]), sum(sizes), 0, sizes[node], "srun")


@pytest.mark.parametrize(
    ("argv", "environ", "left"),
    [
        (["--local_rank=1", "--rounds", "2"], DEEPSPEED, ["--rounds", "2"]),
        (["--local_rank=0", "--rounds", "2"], DEEPSPEED, ["--local_rank=0", "--rounds", "2"]),  # another rank's
        (["--rounds", "2", "--local_rank=1"], DEEPSPEED, ["--rounds", "2", "--local_rank=1"]),  # the user's own
        (["--local_rank=1"], TORCHRUN, ["--local_rank=1"]),
        ([], DEEPSPEED, []),
    ],
)
def test_only_deepspeeds_own_local_rank_is_dropped(argv: list[str], environ: dict[str, str], left: list[str]) -> None:
    assert without_local_rank(argv, environ) == left


LAUNCH = ["/usr/bin/python3", "/usr/bin/accelerate", "launch"]


@pytest.mark.parametrize(
    ("command", "number"),
    [
        ([*LAUNCH, "--cpu", "--num_processes", "2", "train.py"], 2),
        ([*LAUNCH, "--cpu", "--num-processes=3", "train.py"], 3),
        ([*LAUNCH, "--cpu", "--num_processes", "1", "train.py"], 1),
        ([*LAUNCH, "--cpu", "train.py"], 1),
        ([*LAUNCH, "train.py"], 4),  # the user's own config
        ([*LAUNCH, "--num_processes", "1", "train.py"], 1),  # the flag goes over it
        ([*LAUNCH, "--config_file", "six.json", "train.py"], 6),
        ([*LAUNCH, "--cpu", "--config_file", "six.json", "train.py"], 6),
        ([*LAUNCH, "--config_file", "missing.yaml", "train.py"], 1),
        (["/usr/bin/mpirun", "--num_processes", "2", "train.py"], 1),
        ([], 1),
    ],
)
def test_a_lone_process_of_accelerate_knows_how_many_were_wanted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str], number: int
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "accelerate").mkdir()
    (tmp_path / "accelerate/default_config.yaml").write_text("num_machines: 1\nnum_processes: 4\n")
    (tmp_path / "six.json").write_text('{\n  "num_machines": 1,\n  "num_processes": 6\n}')
    environ = ACCELERATE | {"HF_HOME": str(tmp_path)}
    check_lone_process(detect(ACCELERATE | TORCHRUN), environ, command)  # not alone
    check_lone_process(detect({}), environ, command)  # by another launcher
    if number == 1:
        check_lone_process(detect(ACCELERATE), environ, command)
    else:
        with pytest.raises(FieldError, match=f"num_processes={number} is not allowed"):
            check_lone_process(detect(ACCELERATE), environ, command)


# ---- where the ranks meet ----


def fake_scontrol(folder: Path, host: str) -> dict[str, str]:
    """An environment whose scontrol knows the one node `host`, at 10.1.2.3."""
    script = folder / "scontrol"
    script.write_text(
        "#!/bin/sh\n"
        f'[ "$*" = "show hostnames {host},other" ] && echo {host} && echo other && exit 0\n'
        f'[ "$*" = "-o show node {host}" ] && echo "NodeName={host} NodeAddr=10.1.2.3 NodeHostName=x" && exit 0\n'
        "exit 1\n"
    )
    script.chmod(0o755)
    return SRUN | {"PATH": str(folder), "SLURM_STEP_NODELIST": f"{host},other", "SLURM_JOB_ID": "71"}


@pytest.mark.parametrize(("host", "address"), [("localhost", "localhost"), ("no-such-node.invalid", "10.1.2.3")])
def test_srun_meets_at_the_first_host(tmp_path: Path, host: str, address: str) -> None:
    environ = fake_scontrol(tmp_path, host)
    where = rendezvous(detect(environ), environ)
    assert where[0] == address
    assert 20000 <= where[1] <= 59999
    other_rank = environ | {"SLURM_PROCID": "0", "SLURM_NODEID": "0"}
    assert rendezvous(detect(other_rank), other_rank) == where
    other_step = environ | {"SLURM_STEP_ID": "1"}
    assert rendezvous(detect(other_step), other_step)[1] != where[1]


def test_a_given_address_goes_before_a_derived_one(tmp_path: Path) -> None:
    environ = fake_scontrol(tmp_path, "localhost") | {"MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "1234"}
    assert rendezvous(detect(environ), environ) == ("10.0.0.7", 1234)


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "1"}, "MASTER_ADDR=None"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "h", "MASTER_PORT": "70000"}, "MASTER_PORT='70000'"),
        (SRUN | {"PATH": "/nowhere", "SLURM_JOB_NODELIST": "n[1-2]"}, r"MASTER_ADDR=None.*scontrol show hostnames"),
        (SRUN, "SLURM_JOB_NODELIST=None"),
    ],
)
def test_no_place_to_meet(environ: dict[str, str], words: str) -> None:
    with pytest.raises(FieldError, match=words):
        rendezvous(detect(environ), environ)


# ---- device and back end ----


@pytest.mark.parametrize(
    ("local_rank", "local_size", "num_gpus", "device", "backend", "index"),
    [
        (1, 2, 0, "auto", "gloo", None),
        (1, 2, 1, "auto", "gloo", 0),
        (1, 2, 1, "cpu", "gloo", None),
        (1, 2, 2, "cuda", "nccl", 1),
        (3, 4, 2, "auto", "gloo", 1),
        (0, 1, 1, "auto", None, 0),
    ],
)
def test_nccl_only_when_every_local_rank_has_a_gpu(
    monkeypatch: pytest.MonkeyPatch,
    local_rank: int,
    local_size: int,
    num_gpus: int,
    device: str,
    backend: str | None,
    index: int | None,
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    runtime = _runtime(Ranks(local_rank, local_size, local_rank, local_size, "env"), device, None)
    assert (runtime.backend, runtime.device.index) == (backend, index)
    assert runtime.device.type == ("cpu" if index is None else "cuda")
    assert ("staged through the host" in runtime.note) == (backend == "gloo" and index is not None)


def test_two_ranks_on_one_gpu_are_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    note = _runtime(Ranks(0, 2, 0, 2, "torchrun"), "auto", None).note
    assert note == "2 ranks on 1 GPU: Gloo, payloads staged through the host"


@pytest.mark.parametrize("device", ["cuda", "tpu"])
def test_a_device_that_is_not_there(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(FieldError, match=f"device='{device}'"), distributed(device, environ={}):
        raise AssertionError("the body must not run")


def test_one_rank_needs_no_group() -> None:
    with distributed("cpu", environ={}) as runtime, local_root_first(runtime):
        assert runtime == Runtime(0, 1, 0, 1, "python", torch.device("cpu"), None, "1 rank on the CPU")
        assert runtime.is_root
        assert not dist.is_initialized()
        assert on_root(runtime, lambda: 7) == 7


# ---- real ranks ----


def free_port() -> str:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return str(sock.getsockname()[1])


def environ_of(rank: int, world_size: int, port: str) -> dict[str, str]:
    return {"RANK": str(rank), "WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}


def _meet(environ: dict[str, str], folder: Path) -> dict:
    """Everything two ranks do with a runtime, in one go, because each spawn costs a second."""
    seen: dict = {}
    with distributed("cpu", environ=environ, timeout_s=60) as runtime:
        total = torch.tensor([runtime.rank + 1])
        dist.all_reduce(total)
        seen |= {"sum": int(total), "note": runtime.note, "launcher": runtime.launcher}
        seen |= {"backend": dist.get_backend(), "threads": torch.get_num_threads()}
        with local_root_first(runtime):
            seen["cached"] = (folder / "cache").exists()
            (folder / "cache").touch()
        try:
            with local_root_first(runtime):
                raise FieldError("file", runtime.rank, "a good one")
        except FieldError as error:
            seen["both told"] = error.value
        seen["root's"] = on_root(runtime, lambda: runtime.rank + 5)
        try:
            on_root(runtime, lambda: _refuse(runtime.rank))
        except FieldError as error:
            seen["refused"] = str(error)
    seen["ended"] = not dist.is_initialized()
    return seen


def _refuse(rank: int) -> None:
    raise FieldError("out", "/x", f"a folder that rank {rank} can write to")


@pytest.mark.parametrize("launcher", few(["srun", "env"], 1))
def test_two_ranks_meet_and_take_turns(tmp_path: Path, launcher: str) -> None:
    port = free_port()
    environs = [environ_of(rank, 2, port) for rank in range(2)]
    if launcher == "srun":
        # one node with two tasks; the port is a free one, because a derived one may be taken on a test machine
        base = fake_scontrol(tmp_path, "localhost") | {"MASTER_PORT": port, "SLURM_NTASKS": "2"}
        base |= {"SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_NODEID": "0"}
        environs = [base | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)} for rank in range(2)]
    first, second = run_ranks(_meet, *[(environ, tmp_path) for environ in environs])
    refused = "out='/x' is not allowed; allowed: a folder that rank 0 can write to"
    same = {"sum": 3, "note": "2 ranks on the CPU: Gloo", "launcher": launcher, "backend": "gloo", "threads": 1}
    same |= {"refused": refused, "ended": True}
    assert first == same | {"cached": False, "both told": 0, "root's": 5}
    assert second == same | {"cached": True, "both told": 1, "root's": None}


def _meet_at_a_store_with_a_past(environ: dict[str, str], delay_s: float) -> float:
    time.sleep(delay_s)
    with distributed("cpu", environ=environ, timeout_s=30):
        total = torch.tensor([1.0])
        dist.all_reduce(total)
        return float(total)


@pytest.mark.parametrize("late", few([1, 0], 1))
def test_ranks_meet_whatever_their_agents_have_counted(late: int) -> None:
    """Two agents, whose counts differ after one of them alone was restarted; their store knows all earlier starts."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    store.set("fedq/generation", "old")  # what a start leaves that was killed when all had met
    for key, value in {"world_size": "2", "complete": "", "rank0": "1", "rank1": "1", "num_ranks": "2"}.items():
        store.set(f"fedq/old/{key}", value)
    store.add("fedq/old/beat", 7)
    served = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RUN_ID": "none"}
    for counts in ((0, 3), (1, 1), (1, 0))[: 3 if is_all() else 1]:
        environs = [
            environ_of(rank, 2, str(store.port)) | served | {"TORCHELASTIC_RESTART_COUNT": str(count)}
            for rank, count in enumerate(counts)
        ]
        delays = [0.5 * (rank == late) for rank in range(2)]
        assert run_ranks(_meet_at_a_store_with_a_past, *zip(environs, delays, strict=True)) == [2.0, 2.0]


def test_a_rank_0_that_does_not_come_is_told() -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    store.set("fedq/generation", "old")
    served = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RUN_ID": "none"}
    (text,) = run_ranks(_enter, (environ_of(1, 2, str(store.port)) | served, 1))
    assert text.startswith("RendezvousError: WORLD_SIZE=2, but after 1 s rank 0 has not come to rank 1; RANK=1, ")


def _fail_inside(environ: dict[str, str]) -> bool:
    try:
        with distributed("cpu", environ=environ, timeout_s=60):
            raise KeyError("body")
    except KeyError:
        return not dist.is_initialized()


def test_the_group_ends_when_the_body_fails() -> None:
    port = free_port()
    assert run_ranks(_fail_inside, *[(environ_of(rank, 2, port),) for rank in range(2)]) == [True, True]


def _enter(environ: dict[str, str], timeout_s: float) -> str:
    with distributed("cpu", environ=environ, timeout_s=timeout_s):
        return "entered"


@pytest.mark.slow
def test_world_sizes_that_disagree_are_told() -> None:
    port = free_port()
    # Rank 0 waits its 2 s for the second of its two ranks, which has gone away.
    texts = run_ranks(_enter, (environ_of(0, 2, port), 2), (environ_of(1, 3, port), 2))
    named = ("WORLD_SIZE=3 on rank 1, but 2 on another", "WORLD_SIZE=2 on rank 0, but 3 on another")
    assert any(text.startswith(f"RendezvousError: {start}") for text in texts for start in named), texts
    assert "entered" not in texts


def test_too_few_ranks_are_told() -> None:
    (text,) = run_ranks(_enter, (environ_of(0, 2, port := free_port()), 1))
    missing = f"the real number of ranks is 1: rank 1 did not come to 127.0.0.1:{port}"
    assert text.startswith(f"RendezvousError: WORLD_SIZE=2, but after 1 s {missing}; RANK=0, WORLD_SIZE=2, ")


def _enter_and_listen(environ: dict[str, str], timeout_s: float) -> list[str]:
    """Wait without patience, and return the lines that were said and the error."""
    waiting.PACE = Pace(0.3, 0.6)
    heard = io.StringIO()
    with contextlib.redirect_stderr(heard):
        error = None
        try:
            _enter(environ, timeout_s)
        except RendezvousError as raised:
            error = raised
    return [*heard.getvalue().splitlines(), str(error)]


def test_a_rank_says_who_is_missing_while_it_waits() -> None:
    port = free_port()
    given = [(environ_of(rank, 4, port), 2) for rank in (0, 2)]
    for rank, (*lines, error) in zip((0, 2), run_ranks(_enter_and_listen, *given), strict=True):
        told = [line for line in lines if line.startswith(f"rank {rank}: waiting for ")]
        assert 2 <= len(told) <= 4, lines  # at 0.3, 0.9, 1.5 s of 2, and perhaps for rank 0
        last = f"rank {rank}: waiting for ranks 1 and 3 of 4 at 127.0.0.1:{port}: "
        assert told[-1].startswith(last), lines
        assert "s more; RANK=" in told[-1]
        assert "unset them if no launcher has started the other ranks" in error


def test_a_rank_without_rank_0_says_so_and_ends(tmp_path: Path) -> None:
    """Nobody listens, and somebody listens who never answers: torch itself would wait for ever for the latter."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        ports = [free_port(), str(silent.getsockname()[1])]
        refused, unheard = run_ranks(_enter_and_listen, *[(environ_of(1, 2, port), 1) for port in ports])
    assert f"rank 1: waiting for rank 0 at 127.0.0.1:{ports[0]} (connection refused): " in refused[0]
    assert f"but after 1 s rank 0 has not answered at 127.0.0.1:{ports[0]} (connection refused); RANK=1" in refused[-1]
    assert f"rank 1: waiting for rank 0 at 127.0.0.1:{ports[1]} " in unheard[0]
    assert f"but after 1 s there is no store of a rank 0 at 127.0.0.1:{ports[1]}; RANK=1" in unheard[-1]


def test_a_port_that_is_taken_is_told_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        (text,) = run_ranks(_enter, (environ_of(0, 2, port := str(taken.getsockname()[1])), 60))
    assert text.startswith(f"RendezvousError: rank 0 of 2 could not meet the others at 127.0.0.1:{port}: ")
    assert "address already in use" in text


@pytest.mark.parametrize("launcher", ["env", "srun"])
def test_left_over_variables_are_told_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, launcher: str
) -> None:
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    if launcher == "env":
        place |= {"RANK": "0", "WORLD_SIZE": "4"}
    else:  # what the shell of `srun -n4 --pty bash` has
        place |= {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_STEP_ID": "0", "SLURM_JOB_ID": "7"}
        place |= {"SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "4"}
    for name, text in place.items():
        monkeypatch.setenv(name, text)
    monkeypatch.setattr(waiting, "PACE", Pace(0.2, 60.0))
    assert main(["--dataset", "digits", "--device", "cpu", "--timeout", "1", "--out", str(tmp_path / "run")]) == 1
    line, error = capsys.readouterr().err.splitlines()
    assert line.startswith("rank 0: waiting for ranks 1, 2 and 3 of 4 at 127.0.0.1:")
    assert error.startswith("error: WORLD_SIZE=4, but after 1 s the real number of ranks is 1: ranks 1, 2 and 3 did")
    for text in (line, error):
        assert ("RANK=0, WORLD_SIZE=4" if launcher == "env" else "SLURM_NTASKS=4; `srun --pty`") in text


@pytest.mark.slow
def test_a_rank_that_comes_twice_is_told() -> None:
    port = free_port()
    texts = run_ranks(_enter, *[(environ_of(rank, 3, port), 2) for rank in (0, 1, 1)])
    assert "RendezvousError: RANK=1 came twice to a job of WORLD_SIZE=3" in texts[1:]
    assert "entered" not in texts


def test_a_group_of_another_size_is_refused_and_left_alone() -> None:
    """Such as two processes that were each given a group of their own although WORLD_SIZE says 2."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with (
            pytest.raises(
                RendezvousError, match="WORLD_SIZE=2, but the real number of ranks in the process group is 1"
            ),
            distributed("cpu", threads=torch.get_num_threads(), environ=environ_of(0, 2, "1")),
        ):
            raise AssertionError("the body must not run")
        with distributed("cpu", environ={}) as runtime:
            assert runtime.backend == "gloo"
        assert dist.is_initialized()
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_torchrun_serves_the_store_for_two_groups_in_turn(tmp_path: Path) -> None:
    script = tmp_path / "twice.py"
    script.write_text(
        "from fedq.runtime import distributed\n"
        "for turn in range(2):\n"
        "    with distributed('cpu', timeout_s=60) as runtime:\n"
        "        open(f'{runtime.launcher}-{runtime.rank}-{turn}', 'x').close()\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    here = str(Path(__file__).parents[2])
    subprocess.run(
        command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": here}, check=True, capture_output=True, timeout=LIMIT_S
    )
    expected = {f"torchrun-{rank}-{turn}" for rank in range(2) for turn in range(2)}
    assert {path.name for path in tmp_path.glob("torchrun-*")} == expected

"""The same command starts a run, goes on with it, or says that it is finished; what it must not touch is refused."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist
from jobs import file_hash, flags
from properties import few, is_all

from fedq.cli import main, parse_args
from fedq.config import Config
from fedq.errors import RendezvousError
from fedq.federated.rounds import Rounds
from fedq.trainers import starts
from fedq.trainers.run import run_job


class Stopped(Exception):
    """What a job is stopped by."""


def stop(*given: object) -> None:
    raise Stopped


def stop_in_round(patch: pytest.MonkeyPatch, number: int) -> None:
    run = Rounds.run

    def stopped(rounds: Rounds, context):
        if context.round == number:
            raise Stopped(f"in round {number}")
        return run(rounds, context)

    patch.setattr(Rounds, "run", stopped)


def begin(out: Path | None, **changes: object) -> None:
    """Begin a run that is stopped in its last round."""
    with pytest.MonkeyPatch.context() as patch:
        stop_in_round(patch, 2)
        with pytest.raises(Stopped):
            main(flags(out, **changes))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert main(flags(folder)) == 0
    return folder


@pytest.fixture
def agent(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """The environment that torchrun gives to its one rank, and the store that it keeps while it starts it again."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for name, value in {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_RUN_ID": "none",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_MAX_RESTARTS": "3",
    }.items():
        monkeypatch.setenv(name, value)
    start_anew(monkeypatch)
    yield monkeypatch
    del store


def start_anew(patch: pytest.MonkeyPatch) -> None:
    """Count this process's jobs as a new process does."""
    patch.setattr(starts, "_job_numbers", itertools.count())


def test_the_same_command_goes_on_with_an_unfinished_run(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    begin(tmp_path / "run")
    assert main(flags(tmp_path / "run")) == 0
    assert "resumed after round 2" in capsys.readouterr().out
    assert file_hash(tmp_path / "run" / "model.safetensors") == file_hash(whole / "model.safetensors")
    assert main(flags(tmp_path / "run")) == 2, "it is finished, and nobody was restarted"
    assert "does not hold a run already" in capsys.readouterr().err


OTHER = [("lr", "0.5"), ("uplink", "sign"), ("seed", "3"), ("num_clients", "8")]


@pytest.mark.parametrize(("name", "value"), few(OTHER, 2))
@pytest.mark.parametrize("restarts", few(["0", "1"], 1))
def test_other_settings_are_refused_and_leave_the_run_alone(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    value: str,
    restarts: str,
) -> None:
    begin(tmp_path / "run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    monkeypatch.setenv("SLURM_RESTART_COUNT", restarts)
    assert main(flags(tmp_path / "run", **{name: value})) == 2
    assert f"error: {name}=" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    "environ",
    [{"TORCHELASTIC_RESTART_COUNT": "1"}, {"SLURM_RESTART_COUNT": "2"}, {}],
    ids=["torchrun", "SLURM", "--on-existing resume"],
)
def test_a_finished_run_is_told_after_a_restart(
    whole: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], environ: dict[str, str]
) -> None:
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    config = [] if environ else ["--on-existing", "resume"]
    assert main([*flags(whole), *config]) == 0
    heard = capsys.readouterr().out
    assert "is finished: nothing is left to do" in heard
    assert "test accuracy" in heard
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*")} == before


def test_refuse_and_new(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begin(tmp_path / "run")
    left = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    assert main([*flags(tmp_path / "run"), "--on-existing", "refuse"]) == 2
    assert "does not hold a run already" in capsys.readouterr().err
    for number in (2, 3) if is_all() else (2,):
        assert main([*flags(tmp_path / "run"), "--on-existing", "new"]) == 0
        model = tmp_path / f"run-{number}" / "model.safetensors"
        assert file_hash(model) == file_hash(whole / "model.safetensors")
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == left


def test_more_rounds_go_on_with_a_finished_run(whole: Path, tmp_path: Path) -> None:
    assert main(flags(tmp_path / "run", cohort=2, rounds=2)) == 0
    assert main([*flags(tmp_path / "run", cohort=2), "--on-existing", "resume"]) == 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["rounds"] == 3


def test_a_run_without_checkpoints_begins_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    alone = {"exchange": "none", "rounds": 2, "num_clients": 2, "cohort": 2}
    assert main(flags(tmp_path / "whole", **alone)) == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedq.trainers.alone._test", stop)
        with pytest.raises(Stopped):
            main(flags(tmp_path / "run", **alone))
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2
    assert main(flags(tmp_path / "run", **alone)) == 0
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2
    models = [file_hash(tmp_path / name / "model.safetensors") for name in ("run", "whole")]
    assert models[0] == models[1]


def test_without_out_the_agents_store_tells_the_folder(
    whole: Path, tmp_path: Path, agent: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    agent.chdir(tmp_path)
    agent.setattr("sys.argv", ["train.py", "--some", "flags"])
    begin(None)
    for words in ("resumed after round 2", "is finished: nothing is left to do"):
        start_anew(agent)  # the count of this agent stays at 0, as that of one whose own ranks were healthy
        assert main(flags(None)) == 0
        assert words in capsys.readouterr().out
    (folder,) = (tmp_path / "runs").iterdir()
    assert file_hash(folder / "model.safetensors") == file_hash(whole / "model.safetensors")


def test_jobs_of_one_process_and_other_commands_have_runs_of_their_own(
    tmp_path: Path, agent: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    agent.chdir(tmp_path)
    agent.setattr("sys.argv", ["train.py", "--some", "flags"])
    for argv in (["train.py"], ["train.py", "--other"]):
        agent.setattr("sys.argv", argv)
        start_anew(agent)
        for _ in range(2):
            assert main(flags(None, rounds=1, cohort=1)) == 0
    assert len(list((tmp_path / "runs").iterdir())) == 4
    assert "finished" not in capsys.readouterr().out


def test_run_job_returns_the_summary_of_a_finished_run(whole: Path) -> None:
    config = parse_args([*flags(whole), "--on-existing", "resume"], defaults=Config())
    assert run_job(config) == json.loads((whole / "summary.json").read_text())


# ---- what became of earlier starts ----


def starts_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "starts.jsonl").read_text().splitlines()]


@pytest.fixture
def waited(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that starts wait, which they only say here."""
    seconds: list[float] = []
    monkeypatch.setattr(starts.time, "sleep", seconds.append)
    return seconds


def start_again(patch: pytest.MonkeyPatch, folder: Path, restart: int) -> int | None:
    """Give the command again, as a supervisor does; return its exit code, None where it was stopped in round 1."""
    patch.setenv("TORCHELASTIC_RESTART_COUNT", str(restart))
    with pytest.MonkeyPatch.context() as stopping:
        stop_in_round(stopping, 1)
        try:
            return main(flags(folder))
        except Stopped:
            return None


def forget_errors(folder: Path) -> None:
    """Leave what a start leaves that SIGKILL has ended."""
    kept = [line for line in (folder / "starts.jsonl").read_text().splitlines() if "error" not in json.loads(line)]
    (folder / "starts.jsonl").write_text("".join(f"{line}\n" for line in kept))


def test_an_error_that_comes_again_is_not_tried_a_third_time(
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    waited: list[float],
) -> None:
    folder = tmp_path / "run"
    assert [start_again(monkeypatch, folder, restart) for restart in range(2)] == [None, None]
    assert waited == [], "the first start has finished a round"
    assert start_again(monkeypatch, folder, 2) is None
    assert waited == [1]
    for restart in (3, 4):
        assert start_again(monkeypatch, folder, restart) == 2
        heard = capsys.readouterr().err
        assert "its last 2 starts ended by errors of their own, with 1 rounds finished" in heard
        assert "(rank 0: Stopped: in round 1); mend the cause" in heard
    begun = [line for line in starts_of(folder) if "round" in line]
    assert [(line["start"], line["restart"], line["round"]) for line in begun] == [(0, 0, 0), (1, 1, 1), (2, 2, 1)]
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT")
    assert main(flags(folder)) == 0, "whoever gives the command by hand has mended it"
    assert file_hash(folder / "model.safetensors") == file_hash(whole / "model.safetensors")


def test_signals_may_come_as_often_as_they_like(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, waited: list[float]
) -> None:
    folder, num_starts = tmp_path / "run", 6 if is_all() else 4
    for restart in range(num_starts):
        assert start_again(monkeypatch, folder, restart) is None
        forget_errors(folder)
    assert waited == [1, 2, 4, 4][: num_starts - 2]


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [::1]:5"),
        dist.DistNetworkError("Connection reset by peer"),
        RendezvousError("WORLD_SIZE=2, but after 1 s rank 0 has not come"),
    ],
)
def test_that_another_rank_has_gone_is_no_error_of_ones_own(tmp_path: Path, error: Exception) -> None:
    for outer in (error, RuntimeError("the round failed")):
        outer.__cause__ = None if outer is error else error
        with pytest.raises(RuntimeError), starts.noting_errors(tmp_path, 0, 1):
            raise outer
    assert not (tmp_path / "starts.jsonl").exists()


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(b"", marks=pytest.mark.slow),
        pytest.param(b"\x00\xff{", marks=pytest.mark.slow),
        pytest.param(b'[]\n{"start": "x", "round": []}\n7\n{"start": 0}\n', marks=pytest.mark.slow),
        b'{"start": 1, "repeated_rounds": {}, "round": "x", "error": 7}\n{"start": 2, "round": nu',
        None,
    ],
)
def test_a_damaged_list_of_starts_ends_nothing(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: bytes | None
) -> None:
    folder = tmp_path / "run"
    begin(folder)
    (folder / "starts.jsonl").unlink()
    if damage is None:
        (folder / "starts.jsonl").mkdir()
    else:
        (folder / "starts.jsonl").write_bytes(damage)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert main(flags(folder)) == 0
    assert file_hash(folder / "model.safetensors") == file_hash(whole / "model.safetensors")


def test_what_was_done_twice_is_told_beside_the_ledger(whole: Path, tmp_path: Path) -> None:
    """Two rounds are thrown away, then one again; the undisturbed run says what they cost."""
    folder, rare = tmp_path / "run", {"checkpoint_every": 3, "rounds": 6, "cohort": 2}
    assert main(flags(tmp_path / "whole", **rare)) == 0
    for number in (2, 4):
        with pytest.MonkeyPatch.context() as patch:
            stop_in_round(patch, number)
            with pytest.raises(Stopped):
                main(flags(folder, **rare))
    assert main(flags(folder, **rare)) == 0
    rows = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    wire = [row["wire_bytes"] for row in rows]
    told = json.loads((folder / "summary.json").read_text())
    assert (told["restarts"], told["repeated_rounds"]) == (2, 3)
    assert told["repeated_wire_bytes"] == wire[1] + wire[3] - wire[2]
    assert told["wire_bytes"] == json.loads((tmp_path / "whole" / "summary.json").read_text())["wire_bytes"]
    told = json.loads((whole / "summary.json").read_text())
    assert [told[name] for name in ("restarts", "repeated_rounds", "repeated_wire_bytes")] == [0, 0, 0]

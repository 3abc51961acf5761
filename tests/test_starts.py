"""The same command starts a run, goes on with it, or says that it is finished; what it must not touch is refused."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist
from jobs import SMALL, file_hash

from fedq.cli import main, parse_args
from fedq.config import Config
from fedq.federated.rounds import FederatedRounds
from fedq.trainers import starts
from fedq.trainers.federated import run_job


class Stopped(Exception):
    """What a job is stopped by."""


def flags(out: Path | None, **changes: object) -> list[str]:
    given = SMALL | ({"out": out} if out else {}) | changes
    return [text for name, value in given.items() for text in (f"--{name.replace('_', '-')}", str(value))]


def stop(*given: object) -> None:
    raise Stopped


def stop_in_round(patch: pytest.MonkeyPatch, number: int) -> None:
    run = FederatedRounds.run

    def stopped(rounds: FederatedRounds, context):
        if context.round == number:
            raise Stopped(f"in round {number}")
        return run(rounds, context)

    patch.setattr(FederatedRounds, "run", stopped)


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


@pytest.mark.parametrize(("name", "value"), [("lr", "0.5"), ("uplink", "sign"), ("seed", "3"), ("num_clients", "8")])
@pytest.mark.parametrize("restarts", ["0", "1"])
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
    for number in (2, 3):
        assert main([*flags(tmp_path / "run"), "--on-existing", "new"]) == 0
        model = tmp_path / f"run-{number}" / "model.safetensors"
        assert file_hash(model) == file_hash(whole / "model.safetensors")
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == left


def test_more_rounds_go_on_with_a_finished_run(whole: Path, tmp_path: Path) -> None:
    assert main(flags(tmp_path / "run", rounds=2)) == 0
    assert main([*flags(tmp_path / "run"), "--on-existing", "resume"]) == 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["rounds"] == 3


def test_a_run_without_checkpoints_begins_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    alone = {"exchange": "none", "rounds": 2}
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
            assert main(flags(None, rounds=1)) == 0
    assert len(list((tmp_path / "runs").iterdir())) == 4
    assert "finished" not in capsys.readouterr().out


def test_run_job_returns_the_summary_of_a_finished_run(whole: Path) -> None:
    config = parse_args([*flags(whole), "--on-existing", "resume"], defaults=Config())
    assert run_job(config) == json.loads((whole / "summary.json").read_text())

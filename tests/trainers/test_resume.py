"""Jobs that are stopped and resumed end with the bytes of one that never stopped, at any world size."""

from __future__ import annotations

import io
import os
import random
import shutil
import signal
from collections.abc import Iterable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from distributed import RankFailed, run_group
from jobs import file_hash, small_config
from properties import few, is_all, slow_but_for
from stopped_jobs import Stop, metrics, run_jobs, summary

from fedq.checkpoint import Checkpoints
from fedq.cli import main
from fedq.config import Config
from fedq.errors import FieldError
from fedq.feedback import ResidualStore
from fedq.runtime.watch import Watch
from fedq.trainers.run import run_job

# Seven clients, five a round, four rounds; each case with the moment at which it is stopped.
CASES: dict[str, tuple[dict[str, Any], Stop]] = {
    "int4": ({"uplink": "int4", "downlink": "int8", "server": "fedadam:lr=0.01"}, Stop(2, "begin")),
    "sign": (
        {
            "uplink": "sign",
            "downlink": "int4",
            "server": "fedavgm:lr=0.3",
            "histogram_every": 1,
            "target_accuracy": 0.128,
        },
        Stop(1, "residuals"),
    ),
    "two": (
        {"uplink": "blocktopk:k=1,block=64", "downlink": "topk:density=0.1", "checkpoint_every": 2},
        Stop(3, "log"),
    ),
    "no feedback": (
        {
            "uplink": "threshold:value=0.01",
            "feedback": "off",
            "server": "adamw:lr=0.003",
            "downlink_to": "all",
            "optimizer": "adamw",
            "lr": 0.001,
            "checkpoint_every": 2,
        },
        Stop(2, "log"),
    ),
    "fp32": ({"uplink": "fp32", "downlink": "fp32", "cohort": None}, Stop(1, "log")),
    "faults": ({"uplink": "sign", "chaos": "nan=0.3,fail=0.2,seed=3", "memory_limit_gib": 0.0003}, Stop(2, "begin")),
}
ROUNDS = 4
SAME = (
    "test_accuracy",
    "best_val_accuracy",
    "uplink_bytes",
    "downlink_bytes",
    "uplink_bytes_fp32",
    "left_out",
    "rounds",
)


def resumed(folder: Path, **changes: Any) -> Config:
    """Return the settings of a folder's run, to resume it."""
    flags = next(flags for name, (flags, _) in CASES.items() if name == folder.name)
    return small_config(**{"out": folder, "rounds": ROUNDS, "resume": folder} | flags | changes)


class Started:
    """Jobs that never stopped, at two ranks, and the same jobs after they stopped, each run when first asked for."""

    def __init__(self, make: pytest.TempPathFactory) -> None:
        self._whole, self._stopped = make.mktemp("whole"), make.mktemp("stopped")

    def whole(self, case: str) -> Path:
        return self._folder(self._whole / case, None)

    def stopped(self, case: str) -> Path:
        return self._folder(self._stopped / case, CASES[case][1])

    def copy(self, case: str, to: Path) -> Path:
        """Copy a stopped job, to be resumed there."""
        return Path(shutil.copytree(self.stopped(case), to / case))

    def _folder(self, folder: Path, stop: Stop | None) -> Path:
        if not folder.exists():
            job = small_config(folder, rounds=ROUNDS, **CASES[folder.name][0]), stop
            for ((result, _),) in run_group(2, run_jobs, [job]):
                assert (result if isinstance(result, str) else "") == ("Stopped: " if stop else "")
        return folder


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Started:
    return Started(tmp_path_factory)


class Finished:
    """Stopped jobs, each resumed by so many ranks when first asked for: the folder, and what rank 0 saw."""

    def __init__(self, world_size: int, started: Started, folder: Path) -> None:
        self.world_size, self._started, self._folder = world_size, started, folder
        self._seen: dict[str, tuple[Any, str]] = {}

    def __getitem__(self, case: str) -> tuple[Any, str]:
        if case not in self._seen:
            job = resumed(self._started.copy(case, self._folder)), None
            ((self._seen[case],), *_) = run_group(self.world_size, run_jobs, [job])
        return self._seen[case]

    def folder(self, case: str) -> Path:
        assert self[case]
        return self._folder / case


@pytest.fixture(scope="module", params=few([1, 2, 3], 1))
def finished(request: pytest.FixtureRequest, started: Started, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    return Finished(request.param, started, tmp_path_factory.mktemp(f"resumed{request.param}"))


def rows(path: Path, leave_out: Iterable[str] = ()) -> list[tuple]:
    """Return a table's rows, sorted, as texts, because NaN is not equal to itself."""
    table = pq.read_table(path).drop_columns(list(leave_out))
    return sorted(repr(row) for row in table.to_pylist())


def payload_rows(folder: Path) -> list[str]:
    table = pq.read_table(folder / "ledger.parquet").drop_columns(["wire"]).to_pylist()
    return sorted(repr(row) for row in table if row["payload"])


def histograms(folder: Path) -> dict[tuple[int, int], list[str]]:
    found: dict[tuple[int, int], list[str]] = {}
    for row in pq.read_table(folder / "histograms.parquet").to_pylist():
        found.setdefault((row["round"], row["client"]), []).append(repr(row))
    return found


def assert_equal(folder: Path, whole: Path, *, same_ranks: bool) -> None:
    """Compare everything that a run leaves; what crosses ranks only where there were as many all the time."""
    assert file_hash(folder / "model.safetensors") == file_hash(whole / "model.safetensors")
    assert payload_rows(folder) == payload_rows(whole)
    assert {key: summary(folder)[key] for key in SAME} == {key: summary(whole)[key] for key in SAME}
    if same_ranks:
        assert metrics(folder) == metrics(whole)
        for name in ("ledger", "clients", "histograms"):
            assert rows(folder / f"{name}.parquet") == rows(whole / f"{name}.parquet")
        assert summary(folder)["wire_bytes"] == summary(whole)["wire_bytes"]
        return
    crossed = ("wire_bytes", "root_ingress_bytes")
    assert metrics(folder, *crossed) == metrics(whole, *crossed)
    assert rows(folder / "clients.parquet", ["rank"]) == rows(whole / "clients.parquet", ["rank"])
    mine, theirs = histograms(folder), histograms(whole)  # each of one of rank 0's clients
    assert {at: mine[at] for at in mine.keys() & theirs} == {at: theirs[at] for at in mine.keys() & theirs}


@pytest.mark.parametrize("case", slow_but_for(CASES, "int4", "sign"))
def test_a_resumed_job_equals_one_that_never_stopped(started: Started, finished: Finished, case: str) -> None:
    folder, world_size = finished.folder(case), finished.world_size
    result, heard = finished[case]
    assert isinstance(result, dict), result
    assert_equal(folder, started.whole(case), same_ranks=world_size == 2)
    _, stop = CASES[case]
    every = CASES[case][0].get("checkpoint_every", 1)
    assert f"resumed after round {stop.round // every * every}" in heard
    assert (f"world_size 2 -> {world_size}" in heard) == (world_size != 2)
    assert ("launcher env -> python" in heard) == (world_size == 1)
    assert "refused" not in heard
    assert not [path for path in folder.rglob("*") if path.name.endswith(".tmp")]


def test_the_case_with_a_target_is_what_it_is_meant_to_be(started: Started) -> None:
    assert summary(started.whole("sign"))["rounds"] == 3, "the target was reached early, and after the stop"
    versions = {path.name[-7:] for path in (started.stopped("sign") / "residuals").iterdir()}
    assert versions == {"001.f32", "002.f32"}, "the last ones are not named by a checkpoint"


@pytest.mark.slow
def test_the_case_with_faults_is_what_it_is_meant_to_be(started: Started) -> None:
    reasons = [row["reason"] for row in summary(started.whole("faults"))["left_out"]]
    assert {reason.split(":")[0] for reason in reasons} == {"update is not finite", "training failed"}
    assert list((started.whole("faults") / "residuals").glob("*.spill.f32"))


@pytest.mark.parametrize("case", slow_but_for(["int4", "sign", "two"], "int4", "sign"))
def test_residuals_that_no_checkpoint_names_are_deleted(finished: Finished, case: str) -> None:
    folder = finished.folder(case)
    checkpoints = Checkpoints(folder / "checkpoints")
    named = {pair for number in checkpoints.numbers() for pair in checkpoints.load(number).state["residuals"].items()}
    store = ResidualStore(folder=folder / "residuals")
    found = {path.name for path in (folder / "residuals").iterdir()}
    assert found == {store.path(*pair).name for pair in named}


# ---- damage ----


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def damage(folder: Path, what: str) -> None:
    """Damage the newest checkpoint of the stopped int4 job, which is number 2; or all; or a residual that it names."""
    checkpoints = Checkpoints(folder / "checkpoints")
    assert checkpoints.numbers() == [1, 2]
    if what == "residual":
        versions = checkpoints.load(2).state["residuals"]
        owner = next(owner for owner, number in versions.items() if number == 2)
        return flip(ResidualStore(folder=folder / "residuals").path(owner, 2))
    for number in (1, 2) if what == "all" else (2,):
        flip(checkpoints.folder / f"{number:08d}" / ("state.safetensors" if what == "tensors" else "state.json"))


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(started: Started, tmp_path: Path) -> None:
    kinds, jobs = ("json", "tensors", "residual", "all") if is_all() else ("residual", "all"), []
    for kind in kinds:
        folder = started.copy("int4", tmp_path / kind)
        damage(folder, kind)
        jobs.append((resumed(folder), None))
    before = (tmp_path / "all" / "int4" / "metrics.jsonl").read_bytes()
    ranks = run_group(2, run_jobs, jobs)
    for kind, (result, heard) in zip(kinds[:-1], ranks[0][:-1], strict=True):
        assert isinstance(result, dict), result
        assert "resumed after round 1; " in heard.replace("\n", " ")
        named = {"json": "state.json", "tensors": "state.safetensors", "residual": "00000002.f32"}[kind]
        assert "round 2 is refused: " in heard.replace("\n", " ")
        assert named in heard.replace("\n", "")
        assert_equal(tmp_path / kind / "int4", started.whole("int4"), same_ranks=True)
    for seen in ranks:
        text = seen[-1][0]
        assert isinstance(text, str)
        folder = tmp_path / "all" / "int4" / "checkpoints"
        assert text.startswith(f"FieldError: resume='{folder}' is not allowed; allowed: a checkpoint that is whole; ")
        assert "round 2 is refused" in text
        assert "round 1 is refused" in text
    assert (tmp_path / "all" / "int4" / "metrics.jsonl").read_bytes() == before


# ---- what else may be resumed, and what may not ----


def test_a_finished_run_may_be_resumed_and_gets_more_rounds(started: Started, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(started.whole("int4"), tmp_path / "int4"))
    long = tmp_path / "long"
    flags = CASES["int4"][0] | {"lr_schedule": "constant", "histogram_every": 1}
    constant = [small_config(long / str(n), rounds=n, **flags) for n in (2, 3)]
    more = replace(constant[1], run=replace(constant[1].run, out=None, resume=long / "2"))
    results = run_group(2, run_jobs, [(resumed(folder), None), *((config, None) for config in (*constant, more))])[0]
    assert all(isinstance(result, dict) for result, _ in results)
    assert_equal(folder, started.whole("int4"), same_ranks=True)
    assert_equal(long / "2", long / "3", same_ranks=True)


def test_a_run_that_was_stopped_before_its_first_checkpoint_starts_again(started: Started, tmp_path: Path) -> None:
    folder = tmp_path / "two"
    stopped = small_config(folder, rounds=ROUNDS, **CASES["two"][0])
    seen = run_group(
        2, run_jobs, [(stopped, Stop(0, "log")), (resumed(folder), Stop(1, "log")), (resumed(folder), None)]
    )
    _, (second, heard), (last, _) = seen[0]
    assert second == "Stopped: "
    assert "no round was finished before" in heard
    assert isinstance(last, dict)
    assert_equal(folder, started.whole("two"), same_ranks=True)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"uplink": "int2"}, "uplink='int2' .*'int4', as when the run in"),
        ({"seed": 1}, "seed=1 .*0, as when"),
        ({"num_clients": 8}, "num_clients=8 .*7, as when"),
        ({"lr": 0.1}, "lr=0.1 .*0.03, as when"),
        ({"server": "fedavg"}, "server='fedavg' .*fedadam"),
        ({"out": Path("elsewhere")}, "out='elsewhere' .*the folder that is resumed"),
        ({"exchange": "none"}, "resume=.*a run with --exchange round"),
    ],
)
def test_what_would_be_another_run_is_refused(started: Started, changes: dict, named: str) -> None:
    config = started.stopped("int4") / "config.yaml"
    before = config.read_bytes()
    with pytest.raises(FieldError, match=named), redirect_stdout(io.StringIO()):
        run_job(resumed(started.stopped("int4"), **changes))
    assert config.read_bytes() == before


def test_what_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in (tmp_path, tmp_path / "missing"):
        assert main(["--resume", str(folder)]) == 2
        assert str(folder) in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_run_may_be_moved_and_resumed_by_its_folder_alone(
    started: Started, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started.copy("int4", tmp_path)
    monkeypatch.chdir(tmp_path)
    assert main(["--resume", "int4"]) == 0
    assert "resumed after round 2" in capsys.readouterr().out
    assert_equal(tmp_path / "int4", started.whole("int4"), same_ranks=False)


# ---- real kills ----


def run_until_killed(rank: int, config: Config, victim: int, at: int) -> None:
    """Run a job; one rank kills itself, with SIGKILL, at its ``at``-th sign of life or write to disk."""
    left, beat, fsync, rename = at, Watch.beat, os.fsync, os.replace

    def count() -> None:
        nonlocal left
        left -= 1
        if left == 0 and rank == victim:
            os.kill(os.getpid(), signal.SIGKILL)

    def counted(real: Any) -> Any:
        def call(*given: Any, **options: Any) -> Any:
            count()
            return real(*given, **options)

        return call

    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        patch.setattr(Watch, "beat", counted(beat))
        patch.setattr(os, "fsync", counted(fsync))
        patch.setattr(os, "replace", counted(rename))
        run_job(config)


@pytest.mark.parametrize("case", few(["int4", "two", "sign"], 1))
def test_kills_at_random_moments_change_nothing(started: Started, tmp_path: Path, case: str) -> None:
    """Two kills each, or one, at places that a seed draws: in training, exchanging, or half-way through a write."""
    rng, folder = random.Random(f"{case} 1"), tmp_path / case
    for _ in range(2 if is_all() else 1):
        world_size = rng.randint(1, 3)
        is_begun = (folder / "config.yaml").exists()
        config = resumed(folder) if is_begun else small_config(folder, rounds=ROUNDS, **CASES[case][0])
        with pytest.raises(RankFailed):
            run_group(world_size, run_until_killed, config, rng.randrange(world_size), rng.randint(1, 50))
    assert isinstance(run_group(rng.randint(1, 3), run_jobs, [(resumed(folder), None)])[0][0][0], dict)
    assert_equal(folder, started.whole(case), same_ranks=False)

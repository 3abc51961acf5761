"""The batch scripts of slurm/, on a private cluster of two nodes whose names do not resolve."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from launched import LIMIT_S, ROOT, SMALL, execute, require, results, slurm_cluster, summary, torchrun, train, until
from properties import few


@pytest.fixture(scope="module")
def cluster() -> Iterator[dict[str, str]]:
    with slurm_cluster() as environ:
        yield environ


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("torchrun") / "run", torchrun(2))


class Job:
    """A submitted job; use as a context manager, so that none is left behind."""

    def __init__(self, env: Mapping[str, str], out: Path, script: str, *flags: str, options: tuple[str, ...] = ()):
        self.env, self.out = dict(env) | {"OUT": str(out)}, out
        self.logs = out.parent / f"{out.name}-logs"
        self.logs.mkdir()
        common = ("--parsable", "--cpus-per-task=1", f"--output={self.logs}/%j")
        done = execute("sbatch", *common, *options, str(ROOT / "slurm" / script), *SMALL, *flags, env=self.env)
        assert done.returncode == 0, done.stderr
        self.number = done.stdout.strip()

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_: object) -> None:
        execute("scancel", self.number, env=self.env)
        until(lambda: not self.states() & {"RUNNING", "COMPLETING"}, "the job's end")

    @property
    def log(self) -> str:
        return "\n".join(path.read_text() for path in sorted(self.logs.iterdir()))

    def states(self) -> set[str]:
        """Return the states of all its tasks."""
        shown = execute("scontrol", "show", "job", self.number, env=self.env).stdout
        return set(re.findall(r"JobState=(\w+)", shown))

    def end(self) -> set[str]:
        """Wait for the job's end and return how it ended."""
        until(lambda: self.states() <= {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT"}, f"job {self.number}", LIMIT_S)
        return self.states()

    def finish(self) -> Path:
        """Wait for the job's good end and return the run's folder."""
        assert self.end() == {"COMPLETED"}, self.log
        return self.out


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "accelerate", "srun", "deepspeed"])
def test_each_script_gives_on_two_nodes_what_torchrun_gives(
    cluster: dict[str, str], two_ranks: Path, tmp_path: Path, launcher: str
) -> None:
    require(*{"torchrun", "srun", launcher})
    if launcher == "deepspeed" and "--deepspeed-config" not in execute("python", "train.py", "--help").stdout:
        pytest.skip("train.py has no --deepspeed-config yet")
    with Job(cluster, tmp_path / "run", f"train_{launcher}.sbatch", "--rounds", "2") as job:
        run = job.finish()
    assert summary(run)["world_size"] == 2
    assert summary(run)["launcher"] == ("torchrun" if launcher == "deepspeed" else launcher)
    assert results(run) == results(two_ranks)


@pytest.mark.slow
def test_two_jobs_on_one_node_do_not_meet(cluster: dict[str, str], two_ranks: Path, tmp_path: Path) -> None:
    env = cluster | {"RANKS_PER_NODE": "2"}
    options = ("--nodes=1", "--nodelist=node1")
    with (
        Job(env, tmp_path / "int4", "train_torchrun.sbatch", "--rounds", "2", options=options) as first,
        Job(env, tmp_path / "sign", "train_srun.sbatch", "--rounds", "2", "--uplink", "sign", options=options) as other,
    ):
        until(lambda: first.states() == other.states() == {"RUNNING"}, "both to run at once")
        assert results(first.finish()) == results(two_ranks)
        assert results(other.finish())[0] != results(two_ranks)[0]
    ports = [re.search(r"meeting at \S+:(\d+)", job.log) for job in (first, other)]
    assert all(ports)
    assert len({port[1] for port in ports if port}) == 2


@pytest.fixture(scope="module")
def twenty_rounds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("whole") / "run", torchrun(2), "--rounds", "20")


@pytest.mark.slow
@pytest.mark.parametrize(("cause", "script"), [("time", "train_torchrun"), ("preempted", "train_srun")])
def test_a_job_that_goes_back_into_the_queue_resumes_by_itself(
    cluster: dict[str, str], twenty_rounds: Path, tmp_path: Path, cause: str, script: str
) -> None:
    with Job(cluster, tmp_path / "run", f"{script}.sbatch", "--rounds", "20") as job:
        until(lambda: list((job.out / "checkpoints").glob("*")), "a checkpoint")
        if cause == "time":  # what SLURM sends a minute before the end
            execute("scancel", "--batch", "--signal=USR1", job.number, env=cluster)
        else:
            done = execute("srun", "--partition=high", "--nodes=2", "--exclusive", "true", env=cluster)
            assert done.returncode == 0, done.stderr
        run = job.finish()
    assert f"job {job.number}, start 2" in job.log
    assert "resumed after round" in job.log
    assert results(run) == results(twenty_rounds)


@pytest.mark.slow
def test_a_sweep_ends_in_one_table(cluster: dict[str, str], tmp_path: Path) -> None:
    env = cluster | {"CODECS": "fp32 blocktopk:k=1,block=64"}
    with Job(env, tmp_path / "sweep", "sweep.sbatch", "--rounds", "2", options=("--array=0-1",)) as job:
        folder = job.finish()
    header, _, *rows = (
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in (folder / "comparison.md").read_text().splitlines()
    )
    assert header[:2] == ["run", "uplink"]
    assert [row[1] for row in rows] == ["fp32", "blocktopk:k=1,block=64"]
    shares = [float(row[7].removeprefix("1/")) for row in rows]
    assert shares[0] == 1.0
    assert shares[1] > 20
    for row in rows:
        assert float(row[4]) == pytest.approx(100 * summary(folder / row[0])["test_accuracy"], abs=0.005)


@pytest.mark.slow
def test_a_plan_is_an_array_of_its_runs(cluster: dict[str, str], tmp_path: Path) -> None:
    plan = tmp_path / "plan.yaml"
    plan.write_text('title: T\ncommon: "--rounds 2"\narms: {float32: "--uplink fp32", 1 bit: "--uplink sign"}\n')
    env = cluster | {"PLAN": str(plan)}
    with Job(env, tmp_path / "sweep", "sweep.sbatch", options=("--array=0-1",)) as job:
        folder = job.finish()
    assert [summary(folder / f"{arm}-seed0")["uplink"] for arm in ("float32", "1-bit")] == ["fp32", "sign"]
    assert "| 1 bit |" in (folder / "comparison.md").read_text()
    assert (folder / "report" / "report.html").exists()


@pytest.mark.parametrize(
    ("script", "flags", "options", "words"),
    few(
        [
            ("train_torchrun.sbatch", ("--out", "here"), (), "OUT=DIR sbatch"),
            ("sweep.sbatch", (), ("--array=0-2",), "sbatch --array=0-5"),
        ],
        1,
    ),
)
def test_what_a_script_cannot_do_is_told(
    cluster: dict[str, str], tmp_path: Path, script: str, flags: tuple[str, ...], options: tuple[str, ...], words: str
) -> None:
    with Job(cluster, tmp_path / "run", script, *flags, options=options) as job:
        assert job.end() == {"FAILED"}
    assert words in job.log
    assert not job.out.exists()

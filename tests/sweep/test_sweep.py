"""Sweeps: arms x seeds from YAML, run, resumed, compared; a fake job stands in where training is not the point."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import pytest
import yaml
from launched import environ
from warm import Command

from fedq.cli import main
from fedq.errors import FieldError
from fedq.sweep import Plan, finished_runs, markdown, read_plan, run_tasks

TREE = {
    "title": "Two codecs",
    "common": "--dataset digits --train-examples 280 --model cnn62k --num-clients 2 --local-steps 2 --rounds 2",
    "arms": {"float32": "--uplink fp32", "4 bits": "--uplink int4"},
    "seeds": [0, 1],
}

JOB = """
import json, pathlib, sys, time
flags = sys.argv[1:]
out = pathlib.Path(flags[flags.index("--out") + 1] if "--out" in flags else flags[flags.index("--resume") + 1])
out.mkdir(parents=True, exist_ok=True)
with (out / "calls").open("a") as file:
    file.write(json.dumps(flags) + "\\n")
(out / "config.yaml").write_text("{}")
(out / "checkpoints").mkdir(exist_ok=True)
print("hello from a job")
if (out.parent / "hang").exists():
    time.sleep(60)
if (out.parent / "fail").exists() and "int4" in flags:
    sys.exit("no luck")
(out / "metrics.jsonl").write_text("")
(out / "summary.json").write_text(json.dumps({"test_accuracy": 0.5, "seed": 0}))
"""


def write(folder: Path, **changes: object) -> Path:
    path = folder / "plan.yaml"
    path.write_text(yaml.safe_dump({**TREE, **changes}, sort_keys=False))
    return path


@pytest.fixture
def job(tmp_path: Path) -> list[str]:
    (tmp_path / "job.py").write_text(JOB)
    return [str(tmp_path / "job.py")]


def calls(out: Path, folder: str) -> list[list[str]]:
    return [json.loads(line) for line in (out / folder / "calls").read_text().splitlines()]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"arms": {}}, r"arms=\{\} is not allowed; allowed: at least one"),
        ({"arms": {"a": 3}}, "both text"),
        ({"arms": {"a b": "", "a-b": ""}}, r"arms='a-b'.*differ from those of 'a b'"),
        ({"arms": {"a": "--seed 3"}}, "without --seed"),
        ({"arms": {"a": "--out=here"}}, "without --seed, --out"),
        ({"seeds": [1, 1]}, "seeds=.*different whole numbers"),
        ({"seeds": 3}, "seeds=3"),
        ({"ranks": 0}, "ranks=0"),
        ({"comon": "--rounds 2"}, "plan='comon'.*did you mean 'common'"),
    ],
)
def test_a_plan_that_cannot_run_is_refused_by_its_field(tmp_path: Path, changes: dict, said: str) -> None:
    with pytest.raises(FieldError, match=said):
        read_plan(write(tmp_path, **changes))


def test_flags_of_every_arm_are_checked_before_anything_runs(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = write(tmp_path, arms={"good": "--uplink int4", "bad": "--uplink int99"})
    assert main(["sweep", str(path), "--out", str(tmp_path / "out")]) == 2
    assert "arm 'bad': uplink" in capsys.readouterr().err
    path = write(tmp_path, arms={"bad": "--uplonk int4"})
    assert main(["sweep", str(path), "--out", str(tmp_path / "out")]) == 2
    assert "arm='bad'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main(["sweep", str(tmp_path / "none.yaml")]) == 2


def test_runs_are_started_once_resumed_and_named(tmp_path: Path, job: list[str]) -> None:
    plan, out, said = read_plan(write(tmp_path)), tmp_path / "out", []
    assert [task.folder for task in plan.tasks] == ["float32-seed0", "4-bits-seed0", "float32-seed1", "4-bits-seed1"]
    (out / "4-bits-seed0/checkpoints").mkdir(parents=True)  # begun before
    (out / "4-bits-seed0/config.yaml").write_text("{}")
    (out / "float32-seed1").mkdir()  # begun, and stopped before its first checkpoint
    (out / "float32-seed1/config.yaml").write_text("{}")
    assert run_tasks(plan, out, extra=["--data-dir", "D"], train=job, say=said.append) == []
    assert calls(out, "4-bits-seed0") == [["--resume", str(out / "4-bits-seed0"), "--data-dir", "D"]]
    expected = [*TREE["common"].split(), "--uplink", "fp32", "--seed", "1", "--data-dir", "D", "--out"]
    assert calls(out, "float32-seed1") == [[*expected, str(out / "float32-seed1")]]
    assert "hello from a job" in (out / "float32-seed0.log").read_text()
    assert len(said) == 4
    assert said[0].startswith("1/4  float32, seed 0: 50.00 %, ")
    said.clear()
    assert run_tasks(plan, out, train=job, say=said.append) == []
    assert said[3] == "4/4  4 bits, seed 1: was finished"
    assert len(calls(out, "4-bits-seed1")) == 1


def test_a_run_that_fails_is_told_and_the_others_go_on(tmp_path: Path, job: list[str]) -> None:
    plan, out, said = read_plan(write(tmp_path)), tmp_path / "out", []
    out.mkdir()
    (out / "fail").touch()
    failed = run_tasks(plan, out, train=job, say=said.append, workers=2)
    assert [(task.arm, task.seed) for task in failed] == [("4 bits", 0), ("4 bits", 1)]
    assert sum("FAILED (exit code 1)" in line and "no luck" in line for line in said) == 2
    (out / "fail").unlink()
    assert run_tasks(plan, out, train=job, say=said.append) == []


def test_a_signal_stops_what_runs(tmp_path: Path, job: list[str]) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "hang").touch()
    call = f"run_tasks(read_plan(Path({str(write(tmp_path))!r})), Path({str(out)!r}), train={job!r})"
    code = f"from pathlib import Path; from fedq.sweep import read_plan, run_tasks; print(len({call}))"
    sweep = Command(["-c", code], output=tmp_path / "said", env=environ(), cwd=tmp_path)
    end = time.monotonic() + 60
    while not (out / "float32-seed0/calls").exists() and time.monotonic() < end:
        time.sleep(0.05)
    sweep.send_signal(signal.SIGTERM)
    assert sweep.wait(60) == 0
    told = (tmp_path / "said").read_text()
    assert told.splitlines()[-1] == "4"
    assert "1/4  float32, seed 0: stopped; the same command goes on" in told
    assert not (out / "4-bits-seed0").exists(), "nothing was started after it"


def test_a_comparison_says_what_is_missing() -> None:
    plan = Plan("Two", {"float32": "--uplink fp32", "int4": "--uplink int4"}, seeds=[0, 1])
    base = {
        "dataset": "digits from /somewhere: 3 images",
        "model": "m",
        "num_params": 3,
        "world_size": 1,
        "cpu": "C",
        "versions": {"torch": "2"},
        "git_commit": None,
        "exchange": "step",
        "rounds": 2,
        "precision": "fp32",
        "seconds": 60.0,
        "uplink_bytes": 1e6,
        "downlink_bytes": 1e6,
        "uplink_bytes_fp32": 4e6,
        "metrics": [],
    }
    results = {"int4": [base | {"seed": 1, "test_accuracy": 0.5}]}
    text = markdown(plan, results, command="c")
    assert "Only 1 of 4 runs are finished." in text
    assert "| int4 | 50.00 |  | 1.0 | 4.0x | 1.0 | 60 |" in text, "no difference without the first arm"
    assert "/somewhere" not in text


def test_the_task_of_an_array_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = str(write(tmp_path, arms={"sparse": "--uplink 'topk:density=0.01'"}))
    assert main(["sweep", path, "--task", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "sparse-seed1"
    assert lines[-4:] == ["--uplink", "topk:density=0.01", "--seed", "1"]
    assert main(["sweep", path, "--count"]) == 0
    assert capsys.readouterr().out == "2\n"
    assert main(["sweep", path, "--task", "2"]) == 2
    assert "task=2 is not allowed; allowed: 0 to 1" in capsys.readouterr().err


@pytest.mark.usefixtures("few_figures")
def test_a_real_sweep_ends_with_a_table_and_a_report(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path, out = write(tmp_path, seeds=[3]), tmp_path / "out"
    assert main(["sweep", str(path), "--out", str(out), "--", "--threads", "1"]) == 0
    told = capsys.readouterr().out
    assert "## Two codecs" in told
    assert "| 4 bits |" in (out / "comparison.md").read_text()
    assert (out / "report/report.html").stat().st_size > 1000
    results = finished_runs(read_plan(path), out)
    assert [summary["seed"] for runs in results.values() for summary in runs] == [3, 3]
    assert results["4 bits"][0]["uplink_bytes"] < results["float32"][0]["uplink_bytes"] / 7
    before = (out / "4-bits-seed3/summary.json").stat().st_mtime
    assert main(["sweep", str(path), "--out", str(out), "--compare"]) == 0
    assert (out / "4-bits-seed3/summary.json").stat().st_mtime == before

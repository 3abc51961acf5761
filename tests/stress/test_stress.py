"""Scripts of `tests/stress`: their jobs are jobs, and what they compare would be seen."""

from __future__ import annotations

import importlib.util
import shlex
import sys
from pathlib import Path
from types import ModuleType

import pytest

from fedq.cli import parse_args
from fedq.config import Config, validate
from fedq.trainers.run import run_job


def _script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parent / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


same_as_before = _script("same_as_before")
coverage_by_package = _script("coverage_by_package")


@pytest.mark.parametrize("job", same_as_before.JOBS, ids=lambda job: job.name)
def test_the_flags_of_every_job_are_good(job) -> None:
    flags = shlex.split(f"{same_as_before.SMALL} {job.flags} {job.then}")
    validate(parse_args(flags, defaults=Config()))


def test_a_difference_is_seen(tmp_path: Path) -> None:
    for name, seed in (("one", 0), ("same", 0), ("other", 1)):
        flags = ["--seed", str(seed), "--rounds", "1", "--out", str(tmp_path / name)]
        run_job(parse_args([*shlex.split(same_as_before.SMALL), *flags], defaults=Config()))
    assert same_as_before.compare(tmp_path / "one", tmp_path / "same") == ([], [])
    wrong, told = same_as_before.compare(tmp_path / "one", tmp_path / "other")
    assert told == []
    assert {text.split(":")[0] for text in wrong} >= {"model.safetensors", "val_loss of round 0"}


def _covered(**reached: int) -> dict[str, dict]:
    names = {"codecs_a": "fedq/codecs/a.py", "codecs_b": "fedq/codecs/more/b.py", "layout": "fedq/layout.py"}
    return {
        file: {"summary": {"num_statements": 100, "covered_lines": reached.get(name, 100)}}
        for name, file in names.items()
    }


def test_coverage_is_added_up_by_package_and_a_gap_is_seen() -> None:
    few = coverage_by_package.by_package(_covered(codecs_a=90))
    everything = coverage_by_package.by_package(_covered(layout=99))
    assert everything["codecs"] == {"lines": 200, "reached": 200}
    assert coverage_by_package.table(few, everything, (200.4, 1000.0))[2:] == [
        "| codecs | 200 | 95.0 | 100.0 | 5.0 |",
        "| layout | 100 | 100.0 | 99.0 | -1.0 |",
        "| **fedq** | 300 | 96.7 | 99.7 | 3.0 |",
        "| seconds | | 200 | 1000 | |",
    ]
    assert coverage_by_package.behind(few, everything) == ["codecs"]
    assert coverage_by_package.behind(everything, everything) == []

"""The jobs of `tests/stress/same_as_before.py` are jobs, and what it compares would be seen."""

from __future__ import annotations

import importlib.util
import shlex
import sys
from pathlib import Path
from types import ModuleType

import pytest

from fedq.cli import parse_args
from fedq.config import Config, validate
from fedq.trainers.federated import run_job

FILE = Path(__file__).parent / "stress" / "same_as_before.py"


def _script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("same_as_before", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["same_as_before"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


same_as_before = _script()


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

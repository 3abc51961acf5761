"""Which tests run, by which workers and on how many examples: what ``conftest.py`` decides."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import conftest
import pytest
from properties import few

TESTS = """
import pytest
from hypothesis import given
from hypothesis import strategies as st
from properties import tried

numbers = []

def test_quick():
    pass

@pytest.mark.slow
@pytest.mark.parametrize("number", [1, 2])
def test_slow(number):
    pass

@tried(40)
@given(st.integers())
def test_property(number):
    numbers.append(number)

def test_so_many_examples():
    assert len(numbers) == {few}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tests = Path(__file__).parents[1]
    for name in ("conftest.py", "helpers/properties.py"):
        shutil.copy(tests / name, tmp_path)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = slow: takes long\naddopts = -q -p no:cacheprovider\n")
    return tmp_path


def said(folder: Path, *given: str, num_examples: int = 6, xdist: str = "no:xdist") -> str:
    (folder / "test_it.py").write_text(TESTS.replace("{few}", str(num_examples)))
    command = [sys.executable, "-m", "pytest", "-p", xdist, "--hypothesis-seed", "1", *given]
    environ = {name: text for name, text in os.environ.items() if not name.startswith(("PYTEST_", "COV_CORE"))}
    done = subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_slow_tests_are_left_out_and_counted(folder: Path) -> None:
    told = said(folder)
    assert "2 slow tests were left out: pytest --all runs them, too" in told
    assert "3 passed, 2 deselected" in told


@pytest.mark.slow
def test_all_runs_everything_on_all_examples(folder: Path) -> None:
    told = said(folder, "--all", num_examples=40)
    assert "left out" not in told
    assert "5 passed" in told


@pytest.mark.parametrize(
    ("given", "passed"),
    few(
        [
            (["test_it.py::test_slow[2]"], "1 passed"),
            (["test_it.py::test_slow"], "2 passed"),
            (["-m", "slow"], "2 passed, 3 deselected"),
        ],
        1,
    ),
)
def test_a_slow_test_that_is_asked_for_runs(folder: Path, given: list[str], passed: str) -> None:
    told = said(folder, *given)
    assert passed in told
    assert "left out" not in told


@pytest.mark.slow
def test_workers_tell_what_they_left_out(folder: Path) -> None:
    pytest.importorskip("xdist")
    assert "2 slow tests were left out" in said(folder, "-n", "2", "-k", "quick or slow", xdist="xdist")


def config(*args: str, has_xdist: bool = True, **given: Any) -> Any:
    options = {"numprocesses": None, "tx": [], "dist": "no", "usepdb": False, "trace": False, "collectonly": False}
    option = SimpleNamespace(**options | {"capture": "fd"} | given)
    plugins = SimpleNamespace(hasplugin=lambda name: has_xdist)
    return SimpleNamespace(option=option, args=[*args], pluginmanager=plugins)


@pytest.fixture
def _four_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)


@pytest.mark.usefixtures("_four_cores")
def test_there_is_a_worker_for_each_core() -> None:
    for chosen in (config("tests"), config("tests/test_a.py", "tests/test_b.py")):
        conftest.pytest_cmdline_main(chosen)
        assert (chosen.option.numprocesses, chosen.option.dist) == (4, "worksteal")


@pytest.mark.usefixtures("_four_cores")
@pytest.mark.parametrize(
    "chosen",
    [
        config("tests", has_xdist=False),
        config("tests/test_a.py::test_b"),
        config("tests", usepdb=True),
        config("tests", collectonly=True),
        config("tests", capture="no"),
        config("tests", tx=["popen"]),
    ],
    ids=["no xdist", "named", "pdb", "collect", "-s", "tx"],
)
def test_one_process_runs_what_is_watched_or_small(chosen: Any) -> None:
    conftest.pytest_cmdline_main(chosen)
    assert (chosen.option.numprocesses, chosen.option.dist) == (None, "no")


@pytest.mark.usefixtures("_four_cores")
def test_a_number_of_workers_that_is_given_stays_and_workers_start_none() -> None:
    given, worker = config("tests", numprocesses=2), config("tests")
    worker.workerinput = {}
    conftest.pytest_cmdline_main(given)
    conftest.pytest_cmdline_main(worker)
    assert given.option.numprocesses == 2
    assert worker.option.numprocesses is None

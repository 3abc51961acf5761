"""What all tests share, and which of them run: all but the slow ones, on every core, unless asked otherwise."""

from __future__ import annotations

import os
import sys
from typing import Any

import pytest
from hypothesis import settings
from properties import FEW, is_all

os.environ.setdefault("OMP_NUM_THREADS", "1")  # of a worker and of what it starts: together they fill the cores

_left_out = pytest.StashKey[int]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="run the slow tests, too, and try every example of properties")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Start a worker for each core where pytest-xdist is installed and files or folders are to be run."""
    option = config.option
    is_worker = hasattr(config, "workerinput")  # which must not start workers of its own
    if is_worker or not config.pluginmanager.hasplugin("xdist") or option.numprocesses is not None or option.tx:
        return
    in_this_process = option.usepdb or option.trace or option.collectonly or option.capture == "no"
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if num_cores > 1 and not in_this_process and not _named(config):
        option.numprocesses = num_cores
    if option.dist == "no" and option.numprocesses:
        option.dist = "worksteal"  # neighbours stay together, so that what they share is made once


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_left_out] = 0
    if not config.option.all and not config.getoption("hypothesis_profile", None):
        settings.register_profile("few", settings(max_examples=FEW))
        settings.load_profile("few")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the slow tests, but for those that are chosen by name or by ``-m``."""
    if config.option.all or "slow" in config.option.markexpr:
        return
    named = _named(config)
    left_out = [item for item in items if item.get_closest_marker("slow") and not _is_named(item, named)]
    config.stash[_left_out] = len(left_out)
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in set(left_out)]


def _named(config: pytest.Config) -> list[str]:
    """Return the tests that the command line names one by one, without their files."""
    return [argument.split("::", 1)[1] for argument in config.args if "::" in argument]


def _is_named(item: pytest.Item, named: list[str]) -> bool:
    name = item.nodeid.split("::", 1)[1]
    return any(name == given or name.startswith((f"{given}[", f"{given}::")) for given in named)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left_out"] = session.config.stash[_left_out]


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist: a worker has ended
def pytest_testnodedown(node: Any) -> None:
    node.config.stash[_left_out] = getattr(node, "workeroutput", {}).get("left_out", 0)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if number := config.stash[_left_out]:
        terminalreporter.write_line(f"{number:,} slow tests were left out: pytest --all runs them, too")


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory):
    """Keep decoded images out of the user's cache; processes that tests start inherit it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Small tensors gain nothing from more threads, and test processes share the cores."""
    if torch := sys.modules.get("torch"):  # which takes seconds to import
        torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _no_ranks_left():
    """End the ranks that the tests of a process share."""
    yield
    if distributed := sys.modules.get("distributed"):
        distributed.end_ranks()


@pytest.fixture
def few_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let reports draw one chart, and all of them with ``--all``: they take seconds, and have tests of their own."""
    if is_all():
        return
    write = pytest.importorskip("fedq.report.page.write")
    draw = write.write_figures
    monkeypatch.setattr(write, "write_figures", lambda charts, folder: draw(charts[:1], folder))

"""The examples, run as anybody would: by python and on two ranks, with the same model at the end."""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from launched import ROOT, execute, results, torchrun

from fedq.cli import main

LAUNCHERS = {"python": (sys.executable,), "torchrun": torchrun(2)}
MARK = "# What makes "


def run(name: str, launcher: str, out: Path) -> tuple[list[str], dict]:
    """Return what an example has printed, and its summary."""
    done = execute(*LAUNCHERS[launcher], f"examples/{name}.py", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines(), json.loads((out / "summary.json").read_text())


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[list[str], dict, Path]]:
    """Return what an example in one process has printed, its summary and its folder; it runs once."""

    @cache
    def once(name: str) -> tuple[list[str], dict, Path]:
        out = tmp_path_factory.mktemp(name) / "alone"
        return *run(name, "python", out), out

    return once


@pytest.mark.parametrize(
    ("name", "rounds", "metric", "best"),
    [
        ("regression", 15, "mse", 3300),
        pytest.param("characters", 8, "bits per character", 2.5, marks=pytest.mark.slow),
    ],
)
def test_an_example_learns(
    alone: Callable, capsys: pytest.CaptureFixture[str], name: str, rounds: int, metric: str, best: float
) -> None:
    said, summary, out = alone(name)
    assert [line.split(":")[0] for line in said] == [f"round {number}" for number in range(rounds)]
    assert f"{metric} " in said[-1]
    assert summary["best"] == summary["last"][metric] < best, "5,930 by guessing the mean; 4.4 by counting characters"
    assert summary["uplink_bytes_fp32"] > 4 * summary["uplink_bytes"]
    assert main(["runs", str(out)]) == 0
    assert metric in " ".join(capsys.readouterr().out.split())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["regression", pytest.param("characters", marks=pytest.mark.slow)])
def test_an_example_ends_alike_on_two_ranks(alone: Callable, tmp_path: Path, name: str) -> None:
    said, _, out = alone(name)
    both, _ = run(name, "torchrun", tmp_path / "two")
    assert both == said, "rank 0 alone prints"
    assert results(tmp_path / "two")[0] == results(out)[0]


@pytest.mark.parametrize(("name", "most"), [("regression", 22), ("characters", 23)])
def test_what_fedq_takes_of_an_example_is_short(name: str, most: int) -> None:
    text = (ROOT / "examples" / f"{name}.py").read_text()
    start = text[: text.index(MARK)].count("\n") + 1
    statements = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.stmt) and node.lineno > start]
    lines = {node.lineno for node in statements if not _is_docstring(node)}
    assert len(lines) <= most, "the training loop and the evaluation, which any script has, among them"
    assert sum("fed" in text.splitlines()[line - 1] for line in lines) <= 8


def _is_docstring(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)

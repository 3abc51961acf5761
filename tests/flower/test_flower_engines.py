"""fedq in Flower's own engines: real processes, a small app, and beside it the same rounds in this process."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("flwr", reason="needs Flower: pip install 'fedq[flower]'")

import flower_runs
from flower_fleet import fleet
from flwr.app import Array, ArrayRecord
from flwr.serverapp.strategy import FedAvg

from fedq.flower import compressed, fedq_mod

ROOT = Path(__file__).resolve().parents[2]
ROUNDS = 3

PROJECT = """
[project]
name = "small-app"
version = "1.0.0"
description = "A test's app."
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "test"

[tool.flwr.app.components]
serverapp = "small_app:server"
clientapp = "small_app:client"

[tool.flwr.app.config]
report = ""
rounds = 0
"""

APP = """
import json
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg

from fedq.flower import compressed, fedq_mod

client = ClientApp(mods=[fedq_mod()])
server = ServerApp()


def first():
    return {"w": np.linspace(-1, 1, 20_000, dtype=np.float32).reshape(100, 200), "steps": np.array(0)}


def step(model, number, server_round):
    rng = np.random.default_rng([number, server_round])
    change = 0.1 * rng.standard_normal(model["w"].shape).astype(np.float32)
    return {"w": model["w"] + change, "steps": model["steps"]}


@client.train()
def train(message, context):
    model = {name: array.numpy() for name, array in message.content["arrays"].items()}
    server_round = message.content["config"]["server-round"]
    trained = step(model, int(context.node_config["partition-id"]), server_round)
    arrays = ArrayRecord({name: Array(np.asarray(value)) for name, value in trained.items()})
    return Message(RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": 1})}), reply_to=message)


@server.main()
def main(grid, context):
    strategy = compressed(FedAvg(fraction_evaluate=0.0), "sign", "int8")
    start = ArrayRecord({name: Array(value) for name, value in first().items()})
    result = strategy.start(grid, start, int(context.run_config["rounds"]), timeout=120)
    path = Path(context.run_config["report"])
    np.savez(path.with_suffix(".npz"), **{name: array.numpy() for name, array in result.arrays.items()})
    path.write_text(json.dumps(strategy.totals()))
"""


@pytest.fixture
def app(tmp_path: Path) -> Path:
    folder = tmp_path / "app"
    folder.mkdir()
    (folder / "pyproject.toml").write_text(PROJECT)
    (folder / "small_app.py").write_text(APP)
    return folder


def environ(tmp_path: Path) -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(tmp_path / "cache")}


def rounds_here(state: Path) -> tuple[ArrayRecord, dict[str, int]]:
    """Do the app's rounds in this process; return the model and what was counted."""
    scope: dict = {}
    exec(APP, scope)
    grid = fleet([0, 1], lambda node: [fedq_mod(folder=state)], scope["step"])
    for number, node in grid.nodes.items():
        node.context.node_config["partition-id"] = number
    strategy = compressed(FedAvg(fraction_evaluate=0.0, weighted_by_key="loss"), "sign", "int8")
    start = ArrayRecord({name: Array(value) for name, value in scope["first"]().items()})
    return strategy.start(grid, start, num_rounds=ROUNDS).arrays, strategy.totals()


def check(report: Path, state: Path) -> None:
    """Compare a run's model and bytes with those of the same rounds in this process."""
    model, expected = rounds_here(state)
    with np.load(report.with_suffix(".npz")) as found:
        assert set(found) == set(model)
        for name in found:
            # Two terms, each half of a float32: their sum is the same in either order.
            np.testing.assert_array_equal(found[name], model[name].numpy())
    totals = json.loads(report.read_text())
    for key in ("up_float32_bytes", "down_float32_bytes"):
        assert totals[key] == expected[key]
    for key in ("up_bytes", "down_bytes"):
        # Numbers of runs and nodes are longer there, and metrics have another name.
        assert abs(totals[key] - expected[key]) < 200 * 2 * ROUNDS
    assert totals["up_bytes"] < totals["up_float32_bytes"] / 15
    assert list(state.parent.glob("cache/fedq/flower/*/*/node.json")), "state is in fedq's own files"


def test_the_rounds_that_engines_are_compared_with(tmp_path: Path) -> None:
    (model, totals), (again, _) = (rounds_here(tmp_path / name) for name in ("first", "second"))
    assert set(model) == {"w", "steps"}
    for name in model:
        np.testing.assert_array_equal(again[name].numpy(), model[name].numpy())
    assert 0 < totals["up_bytes"] < totals["up_float32_bytes"] / 15


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs Ray: pip install 'flwr[simulation]'")
def test_a_simulation(app: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    with flower_runs.simulation(tmp_path / "engine", environ(tmp_path)) as engine:
        engine.run(app, {"report": report, "rounds": ROUNDS}, 200)
    check(report, tmp_path / "here")


@pytest.mark.slow
def test_a_deployment(app: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    with flower_runs.deployment(tmp_path / "engine", environ(tmp_path), 2) as engine:
        engine.run(app, {"report": report, "rounds": ROUNDS}, 200)
    check(report, tmp_path / "here")

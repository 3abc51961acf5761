"""fedq in Flower apps: real strategies and client apps, every message taken through Flower's own bytes."""

from __future__ import annotations

import gc
import json
import logging
import math
import multiprocessing
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from properties import few

pytest.importorskip("flwr", reason="needs Flower: pip install 'fedq[flower]'")

from flower_fleet import RUN, WIRE, Fleet, fleet
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import (
    DifferentialPrivacyServerSideFixedClipping,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedMedian,
    FedProx,
    QFedAvg,
    Strategy,
)

from fedq.errors import FieldError
from fedq.flower import Compressed, RoundsFailed, compressed, fedq_mod
from fedq.flower.state import NodeFolder
from fedq.flower.weighing import Weighing
from fedq.layout import Layout
from fedq.wire import Assembler, Frame, Kind, unpack
from fedq.wire import Message as WireMessage

NODES = (11, 12, 13)
LIMIT = {"min_train_nodes": 3, "min_evaluate_nodes": 3, "min_available_nodes": 3}


@pytest.fixture(autouse=True)
def _quiet_deprecations() -> None:
    logging.getLogger("flwr").setLevel(logging.INFO)


@pytest.fixture(autouse=True)
def _no_collecting(monkeypatch: pytest.MonkeyPatch) -> None:
    """QFedAvg collects garbage for every answer, which takes a second in a process that has imported as much."""
    monkeypatch.setattr(gc, "collect", lambda *_: 0)


def arrays(seed: int = 0) -> dict[str, np.ndarray]:
    """Return a model with everything that may be in one."""
    rng = np.random.default_rng(seed)
    return {
        "conv.weight": rng.standard_normal((8, 4, 3, 3)).astype(np.float32),
        "norm.weight": np.ones(8, np.float32),
        "norm.running_mean": np.zeros(8, np.float32),
        "norm.running_var": np.full(8, 1e-3, np.float32),
        "norm.num_batches_tracked": np.array(0, np.int64),
        "head.weight": rng.standard_normal((10, 300)).astype(np.float32),
        "head.bias": np.zeros(10, np.float32),
        "temperature": np.array(0.07, np.float32),
        "steps": np.array([1.0, 2.0], np.float64),
        "mask": np.array([True, False]),
        "empty": np.zeros((0, 3), np.float32),
    }


def record(values: dict[str, np.ndarray]) -> ArrayRecord:
    return ArrayRecord({name: Array(value) for name, value in values.items()})


def packed(data: bytes) -> ArrayRecord:
    return ArrayRecord({WIRE: Array("uint8", (len(data),), WIRE, data)})


def values(found: ArrayRecord) -> dict[str, np.ndarray]:
    return {name: array.numpy() for name, array in found.items()}


def train(model: dict[str, np.ndarray], node: int, number: int) -> dict[str, np.ndarray]:
    """Return a model after a step that depends on node and round, with awkward values here and there."""
    rng = np.random.default_rng([node, number])
    trained = {}
    for name, value in model.items():
        value = value.astype(arrays()[name].dtype)  # as a module does with what some strategies average to float64
        if name == "norm.num_batches_tracked":
            trained[name] = value + 5
        elif name in ("mask", "empty", "steps"):
            trained[name] = value
        elif name == "norm.running_var":
            trained[name] = np.abs(value * np.float32(0.5))
        else:
            step = 0.01 * rng.standard_normal(value.shape)
            trained[name] = np.asarray(value + step, np.float32)
    return trained


def mods(folder: Path, **options: Any) -> Callable[[int], list]:
    return lambda node: [fedq_mod(folder=folder, **options)]


def run(strategy: Any, grid: Fleet, rounds: int = 3, start: dict[str, np.ndarray] | None = None, **options: Any) -> Any:
    random.seed(0)  # Flower draws the order of nodes from it, and so of the sums
    return strategy.start(grid, record(arrays() if start is None else start), num_rounds=rounds, **options)


STRATEGIES: dict[str, Callable[[], Strategy]] = {
    "fedavg": lambda: FedAvg(**LIMIT),
    "fedavg without evaluation": lambda: FedAvg(fraction_evaluate=0.0, min_train_nodes=3, min_available_nodes=3),
    "fedprox": lambda: FedProx(proximal_mu=0.1, **LIMIT),
    "fedadam": lambda: FedAdam(**LIMIT),
    "fedavgm": lambda: FedAvgM(server_momentum=0.9, **LIMIT),
    "fedmedian": lambda: FedMedian(**LIMIT),
    "qfedavg": lambda: QFedAvg(client_learning_rate=0.1, train_loss_key="loss", **LIMIT),
}


@pytest.mark.parametrize("name", few(STRATEGIES, 3))
def test_float32_both_ways_gives_the_plain_apps_model(name: str, tmp_path: Path) -> None:
    # With fp32 values travel and not changes, so nothing is rounded, and nothing may differ. (Some strategies average
    # to float64, which plain Flower sends to clients that load float32; ours get float32.)
    plain_grid, grid = fleet(NODES, lambda node: [], train), fleet(NODES, mods(tmp_path), train)
    # QFedAvg subtracts in place, which takes floats.
    rounds = 2 if name == "qfedavg" else 3
    start = {n: v for n, v in arrays().items() if v.dtype == np.float32 or name != "qfedavg"}
    with np.errstate(all="ignore"):
        plain = run(STRATEGIES[name](), plain_grid, rounds, start)
        ours = run(compressed(STRATEGIES[name](), "fp32", "fp32"), grid, rounds, start)
    assert list(ours.arrays) == list(plain.arrays)
    for key, value in values(plain.arrays).items():
        np.testing.assert_array_equal(values(ours.arrays)[key], value, err_msg=key)
        assert values(ours.arrays)[key].dtype == value.dtype
    assert ours.train_metrics_clientapp == plain.train_metrics_clientapp
    assert ours.evaluate_metrics_clientapp == plain.evaluate_metrics_clientapp


@pytest.mark.parametrize("uplink", few(["int8", "int4", "sign", "topk:density=0.05", "fp16"], 2))
def test_the_aggregate_is_the_mean_of_separately_decoded_payloads(uplink: str, tmp_path: Path) -> None:
    grid = fleet(NODES, mods(tmp_path), train)
    results: list[dict[str, np.ndarray]] = []
    starts: list[dict[str, np.ndarray]] = []

    def see(number: int, model: ArrayRecord) -> None:
        results.append(values(model))

    def spying(model: dict[str, np.ndarray], node: int, number: int) -> dict[str, np.ndarray]:
        starts.append(model)
        return train(model, node, number)

    for node in grid.nodes.values():
        node.app = fleet([1], mods(tmp_path), spying).nodes[1].app
    run(compressed(STRATEGIES["fedavg without evaluation"](), uplink, "int8"), grid, evaluate_fn=see)
    up = grid.of("up")
    assert len(up) == 9
    for number in range(3):
        begin = starts[3 * number]
        for other in starts[3 * number : 3 * number + 3]:
            for name, value in begin.items():
                np.testing.assert_array_equal(other[name], value)  # one replica for everybody
        messages = up[3 * number : 3 * number + 3]
        weights = {t.node: t.node % 100 for t in messages}
        for name, value in results[number + 1].items():
            wanted = 0
            for t in messages:
                assert t.packed is not None
                decoded = t.packed.tensors()[name].double().numpy()
                is_coded = name in {span.name for span in t.packed.layout.spans}
                wanted = wanted + weights[t.node] * (decoded + (begin[name] if is_coded else 0))
            # Float32 rounds replica + update once and FedAvg each of its sums, of values up to about 4.
            np.testing.assert_allclose(value, wanted / sum(weights.values()), rtol=1e-6, atol=2e-6, err_msg=name)


def test_records_that_a_strategy_shares_between_messages_are_not_changed(tmp_path: Path) -> None:
    seen: list[tuple[RecordDict, dict[str, bytes], list[str]]] = []

    class Spying(FedAvg):
        def configure_train(self, *args: Any, **kwargs: Any) -> list[Message]:
            messages = list(super().configure_train(*args, **kwargs))
            content = messages[0].content
            assert all(m.content is content for m in messages), "FedAvg shares one record; else this proves nothing"
            seen.append((content, {n: a.data for n, a in content["arrays"].items()}, list(content)))
            return messages

    run(compressed(Spying(**LIMIT), "int4", "int8"), fleet(NODES, mods(tmp_path), train))
    assert len(seen) == 3
    for content, data, keys in seen:
        assert list(content) == keys == ["arrays", "config"]
        assert {name: array.data for name, array in content["arrays"].items()} == data


def test_what_travels_when(tmp_path: Path) -> None:
    grid = fleet(NODES, mods(tmp_path), train)
    strategy = compressed(FedAvg(**LIMIT), "int4", "int8")
    run(strategy, grid)
    down = grid.of("down", 11)  # train, evaluate, and again
    kinds = [t.packed.frame.kind.name if t.packed else "whole" for t in down]
    assert kinds == ["whole", "CHANGE", "NOTE", "CHANGE", "NOTE", "CHANGE"]
    assert [t.packed.frame.kind.name if t.packed else "mark" for t in grid.of("up", 11)] == ["UPDATE", "mark"] * 3
    for t in grid.travelled:
        if t.is_packed:
            (found,) = [r for r in t.message.content.array_records.values() if WIRE in r]
            assert list(found) == [WIRE]
            assert found[WIRE].dtype == "uint8"


def test_counted_bytes_are_those_that_flower_serializes(tmp_path: Path) -> None:
    grid = fleet(NODES, mods(tmp_path / "state"), train)
    path = tmp_path / "out" / "bytes.json"
    strategy = compressed(FedAvg(**LIMIT), "sign", "int8", ledger=path)
    model = {name: value for name, value in arrays().items() if value.dtype == np.float32}  # means keep that type
    run(strategy, grid, rounds=4, start=model)
    totals = json.loads(path.read_text())
    assert totals == strategy.totals()
    for way in ("down", "up"):
        assert totals[f"{way}_bytes"] == sum(t.nbytes for t in grid.of(way))
        assert sum(row[f"{way}_bytes"] for row in totals["rounds"]) == totals[f"{way}_bytes"]
    nbytes = sum(v.nbytes for v in model.values())
    assert totals["down_float32_bytes"] == 4 * 2 * 3 * nbytes  # to train and to evaluate, for three nodes
    assert totals["up_float32_bytes"] == 4 * 3 * nbytes
    assert [row["round"] for row in totals["rounds"]] == [1, 2, 3, 4]
    # And the clients' own count, which nobody but they can see.
    facts = [NodeFolder(tmp_path / "state", RUN, node).load().facts for node in NODES]
    assert sum(f.sent_bytes for f in facts) == totals["up_bytes"]
    assert sum(f.received_bytes for f in facts) == totals["down_bytes"]


def test_the_ledger_knows_tensors_and_parts(tmp_path: Path) -> None:
    strategy = compressed(STRATEGIES["fedavg without evaluation"](), "int4", "int8")
    grid = fleet(NODES, mods(tmp_path), train)
    run(strategy, grid)
    rows = strategy.ledger.table().to_pylist()
    up = [r for r in rows if r["direction"] == "uplink" and r["tensor"] == "head.weight" and r["part"] == "codes"]
    assert len(up) == 9
    # 3,000 values in 4 bits, in whole blocks of 256 (the last one padded).
    assert {r["payload"] for r in up} == {12 * 256 // 2}
    assert {r["raw"] for r in up} == {12_000}


def test_awkward_arrays_travel_exactly_and_in_order(tmp_path: Path) -> None:
    start = arrays() | {
        "text": np.array(["a", "bc"]),
        "half": np.array([1.5, np.nan], np.float16),
        "big endian": np.array([1.0], ">f4"),
        "unsigned": np.array([2**63], np.uint64),
        "complex": np.array([1 + 2j], np.complex64),
        "fortran": np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3)),
    }
    seen: list[dict[str, np.ndarray]] = []

    def echo(model: dict[str, np.ndarray], node: int, number: int) -> dict[str, np.ndarray]:
        seen.append(model)
        return model

    class First(FedAvg):
        """Takes the first answer instead of a mean, which texts do not have."""

        def aggregate_train(self, server_round: int, replies: Any) -> Any:
            valid, _ = self._check_and_log_replies(replies, is_train=True)
            return valid[0].content["arrays"], MetricRecord()

    grid = fleet(NODES, mods(tmp_path), echo)
    result = run(compressed(First(**LIMIT), "int4", "int8"), grid, start=start)
    lossy = {"conv.weight", "head.weight", "fortran"}
    for found in (*seen, values(result.arrays)):
        assert list(found) == list(start)
        for name, value in start.items():
            assert found[name].dtype == value.dtype or value.dtype.byteorder == ">"
            if name in lossy:
                np.testing.assert_allclose(found[name], value, atol=0.2)
            else:
                np.testing.assert_array_equal(found[name], value, err_msg=name)


@pytest.mark.parametrize("start", few([{}, {"counter": np.array(3)}, {"bias": np.zeros(4, np.float32)}], 2), ids=str)
def test_models_with_little_or_nothing_in_them(start: dict[str, np.ndarray], tmp_path: Path) -> None:
    grid = fleet(NODES, mods(tmp_path), lambda model, node, number: model)
    result = run(compressed(FedAvg(**LIMIT), "int4", "int8"), grid, start=start)
    assert list(result.arrays) == list(start)
    assert not any(t.message.has_error() for t in grid.travelled)


def test_variances_stay_above_zero_where_rounding_overshoots(tmp_path: Path) -> None:
    seen: list[float] = []

    def shrink(model: dict[str, np.ndarray], node: int, number: int) -> dict[str, np.ndarray]:
        seen.append(float(model["bn.running_var"].min()))
        return {"bn.running_var": model["bn.running_var"] * np.float32(1e-6)}

    start = {"bn.running_var": np.linspace(0.1, 3.0, 50, dtype=np.float32)}
    run(compressed(FedAvg(**LIMIT), "int4", "int8"), fleet(NODES, mods(tmp_path), shrink), rounds=4, start=start)
    assert min(seen) >= 0


# ---- who speaks what -----------------------------------------------------------------------------------------------


def test_nodes_without_fedq_take_part(tmp_path: Path) -> None:
    grid = fleet(NODES, lambda node: [] if node == 12 else [fedq_mod(folder=tmp_path)], train)
    strategy = compressed(FedAvg(**LIMIT), "int8", "int8")
    result = run(strategy, grid, rounds=4)
    assert not any(t.is_packed for t in grid.travelled if t.node == 12)
    assert sum(t.is_packed for t in grid.of("up", 11)) == 4
    plain = run(FedAvg(**LIMIT), fleet(NODES, lambda node: [], train), rounds=4)
    for name, value in values(plain.arrays).items():
        np.testing.assert_allclose(values(result.arrays)[name], value, atol=0.03)  # int8 steps of changes of 0.05
    assert strategy.totals()["up_bytes"] == sum(t.nbytes for t in grid.of("up"))


def test_a_federation_without_fedq_is_a_plain_one(tmp_path: Path) -> None:
    grid = fleet(NODES, lambda node: [], train)
    ours = run(compressed(FedAvg(**LIMIT), "sign", "sign"), grid)
    plain = run(FedAvg(**LIMIT), fleet(NODES, lambda node: [], train))
    for name, value in values(plain.arrays).items():
        np.testing.assert_array_equal(values(ours.arrays)[name], value)


def test_a_server_without_fedq_is_answered_plainly(tmp_path: Path) -> None:
    grid = fleet(NODES, mods(tmp_path), train)
    ours = run(FedAvg(**LIMIT), grid)
    plain = run(FedAvg(**LIMIT), fleet(NODES, lambda node: [], train))
    assert not list(tmp_path.iterdir())
    for name, value in values(plain.arrays).items():
        np.testing.assert_array_equal(values(ours.arrays)[name], value)


def test_clients_may_choose_their_codec(tmp_path: Path) -> None:
    grid = fleet(NODES, lambda node: [fedq_mod({11: "sign", 12: "fp16"}.get(node), folder=tmp_path)], train)
    run(compressed(FedAvg(**LIMIT), "int4 sign@3", "int8"), grid)
    specs = {
        node: [t.packed.layout["head.weight"].codec.spec for t in grid.of("up", node) if t.packed] for node in NODES
    }
    assert [spec.partition(":")[0] for spec in specs[11]] == ["sign"] * 3
    assert specs[12] == ["fp16"] * 3
    assert [spec.partition(":")[0] for spec in specs[13]] == ["int4", "int4", "sign"]


def test_a_newcomer_gets_the_whole_model_and_one_that_missed_rounds_the_changes(tmp_path: Path) -> None:
    cohorts = {1: (11, 12), 2: (11, 12), 3: (11, 13), 4: (12, 13)}

    class Chosen(FedAvg):
        def configure_train(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Any) -> Any:
            config["server-round"] = server_round
            content = RecordDict({"arrays": arrays, "config": config})
            return self._construct_messages(content, list(cohorts[server_round]), "train")

    starts: dict[tuple[int, int], dict[str, np.ndarray]] = {}

    def spying(model: dict[str, np.ndarray], node: int, number: int) -> dict[str, np.ndarray]:
        starts[number, node] = model
        return train(model, node, number)

    grid = fleet(NODES, mods(tmp_path), spying)
    run(compressed(Chosen(fraction_evaluate=0.0), "int4", "sign"), grid, rounds=4)
    down = {(t.message.content["config"]["server-round"], t.node): t for t in grid.of("down")}
    assert not down[3, 13].is_packed
    missed = Assembler().add(down[4, 12].message.content["arrays"][WIRE].data)
    assert [(m.frame.kind, m.sequence) for m in missed] == [(Kind.CHANGE, 3), (Kind.CHANGE, 4)]
    for number in (1, 2, 3, 4):
        one, other = (starts[number, node] for node in cohorts[number])
        for name in one:
            np.testing.assert_array_equal(one[name], other[name], err_msg=f"round {number}")


# ---- state -----------------------------------------------------------------------------------------------------------


def test_a_client_that_lost_its_state_gets_the_whole_model_in_the_same_round(tmp_path: Path) -> None:
    grid = fleet(NODES, mods(tmp_path), train)

    def lose(message: Message) -> None:
        if message.content.get("config", {}).get("server-round") == 2 and message.metadata.message_type == "train":
            for file in NodeFolder(tmp_path, RUN, 12).path.glob("*"):
                file.unlink()

    grid.nodes[12].wrong = lose
    strategy = compressed(STRATEGIES["fedavg without evaluation"](), "int4", "int8")
    run(strategy, grid)
    assert [t.is_packed for t in grid.of("down", 12)] == [False, True, False, True]
    assert [t.is_packed for t in grid.of("up", 12)] == [True, False, True, True]
    assert sum(t.is_packed for t in grid.of("up")) == 9, "no round was lost"
    assert strategy.totals()["up_bytes"] == sum(t.nbytes for t in grid.of("up"))


def _one_message(folder: Path, message: Message, pipe: Any) -> None:
    """Handle a message in a new process, and send the update's bytes."""
    one = fleet([11], mods(folder), train).nodes[11]
    reply = one.app(message, one.context)
    pipe.send(reply.content["arrays"][WIRE].data)


def test_state_outlives_the_process(tmp_path: Path) -> None:
    # Every message in a new process, as in Flower's deployment: the payloads of one process, feedback and all.
    sent: dict[str, list[bytes]] = {}
    for how in ("one process", "many"):
        grid = fleet(NODES, mods(tmp_path / how), train)

        def anew(message: Message, how: str = how) -> Message | None:
            if how == "one process":
                return None
            context = multiprocessing.get_context("fork")
            ours, theirs = context.Pipe()
            worker = context.Process(target=_one_message, args=(tmp_path / how, message, theirs))
            worker.start()
            assert ours.poll(60)
            data = ours.recv()
            worker.join(60)
            metrics = MetricRecord({"num-examples": 11, "loss": 0.5})
            return Message(RecordDict({"arrays": packed(data), "metrics": metrics}), reply_to=message)

        grid.nodes[11].wrong = anew
        run(compressed(STRATEGIES["fedavg without evaluation"](), "sign", "int8"), grid)
        sent[how] = [t.message.content["arrays"][WIRE].data for t in grid.of("up", 11)]
    assert sent["one process"] == sent["many"]
    assert len(sent["many"]) == 3


def test_residuals_make_up_for_what_codes_lose(tmp_path: Path) -> None:
    # A constant pull of one node: with feedback the sum of what arrives follows the sum of what was meant.
    pull = np.linspace(-1, 1, 512, dtype=np.float32).reshape(2, 256)
    meant, arrived = np.zeros_like(pull), np.zeros_like(pull)
    grid = fleet([11], mods(tmp_path), lambda model, node, number: {"w": model["w"] + pull})
    strategy = FedAvg(fraction_evaluate=0.0, min_train_nodes=1, min_available_nodes=1)
    run(compressed(strategy, "sign:rotate=false", "fp32"), grid, rounds=12, start={"w": np.zeros_like(pull)})
    errors = []
    for t in grid.of("up"):
        meant += pull
        arrived += t.packed.tensors()["w"].numpy()
        errors.append(np.abs(meant - arrived).max())
    assert errors[-1] < 3, "bounded, where 12 rounds without feedback lose 12 times the error of one"
    residual = NodeFolder(tmp_path, RUN, 11).load().residuals.get(0, 512).numpy().reshape(2, 256)
    np.testing.assert_allclose(residual, meant - arrived, atol=1e-4)  # 12 sums of float32 values up to 12


def test_a_new_session_in_the_same_run_starts_without_old_residuals(tmp_path: Path) -> None:
    sent = []
    for _ in range(2):
        grid = fleet(NODES, mods(tmp_path), train)
        run(compressed(FedAvg(**LIMIT), "sign", "int8"), grid)
        sent.append([t.message.content["arrays"][WIRE].data for t in grid.of("up", 11) if t.is_packed])
    assert sent[0] == sent[1]


def test_old_runs_are_removed_by_new_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(compressed(FedAvg(**LIMIT)), fleet(NODES, mods(tmp_path), train), rounds=1)
    assert len(list(tmp_path.iterdir())) == 1
    with NodeFolder(tmp_path, 8, 1).locked():
        assert len(list(tmp_path.iterdir())) == 2, "what is young stays"
    monkeypatch.setattr("fedq.flower.state.KEEP_S", -1)
    with NodeFolder(tmp_path, 9, 1).locked():
        assert [path.name for path in tmp_path.iterdir() if list(path.glob("*/node.json"))] == []


# ---- what goes wrong -------------------------------------------------------------------------------------------------


def test_errors_and_silence_cost_a_round_of_that_node_and_nothing_else(tmp_path: Path) -> None:
    grid = fleet(NODES, mods(tmp_path), train)

    def fail(message: Message) -> None:
        if message.content["config"]["server-round"] == 2:
            raise ValueError("no more memory")

    def sleep(message: Message) -> None:
        if message.content["config"]["server-round"] == 2:
            raise TimeoutError

    grid.nodes[11].wrong, grid.nodes[12].wrong = fail, sleep
    strategy = compressed(STRATEGIES["fedavg without evaluation"](), "int4", "int8")
    result = run(strategy, grid)
    assert len(grid.of("up")) == 3 + 1 + 3
    assert [t.is_packed for t in grid.of("down", 11)] == [False, True, True]
    # What it did not get in round 2 comes with round 3.
    data = grid.of("down", 11)[-1].message.content["arrays"][WIRE].data
    assert [message.sequence for message in Assembler().add(data)] == [2, 3]
    assert all(np.isfinite(v).all() for v in values(result.arrays).values())


def test_training_that_fails_keeps_the_replica(tmp_path: Path) -> None:
    starts: list[np.ndarray] = []

    def failing(model: dict[str, np.ndarray], node: int, number: int) -> dict[str, np.ndarray]:
        if node == 11 and number == 2:
            raise ValueError("no more memory")
        starts.append(model["head.weight"])
        return train(model, node, number)

    run(compressed(STRATEGIES["fedavg without evaluation"](), "int4", "int8"), fleet(NODES, mods(tmp_path), failing))
    assert len(starts) == 8
    for one, other in ((0, 1), (3, 4), (5, 6), (5, 7)):
        np.testing.assert_array_equal(starts[one], starts[other])


def test_a_round_in_which_all_fail_is_said_and_several_end_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("flwr"), "propagate", True)
    grid = fleet(NODES, mods(tmp_path), lambda *_: {}["no such array"])
    with pytest.raises(RoundsFailed, match=r"all 3 nodes failed, 2 rounds in a row.*no such array"):
        run(compressed(FedAvg(**LIMIT), max_failed_rounds=2, ledger=tmp_path / "bytes.json"), grid, rounds=9)
    errors = [r for r in caplog.records if r.levelno == logging.ERROR]
    assert [r.getMessage().count("node 1") for r in errors] == [3, 3]
    assert (tmp_path / "bytes.json").exists()


def test_updates_that_are_not_finite_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def poisoned(model: dict[str, np.ndarray], node: int, number: int) -> dict[str, np.ndarray]:
        trained = train(model, node, number)
        if node == 11 and number == 2:
            trained["head.weight"] = trained["head.weight"] * np.float32(np.nan)
        return trained

    grid = fleet(NODES, mods(tmp_path), poisoned)
    result = run(compressed(STRATEGIES["fedavg without evaluation"](), "int4", "int8"), grid)
    assert [t.packed.frame.kind for t in grid.of("up", 11)] == [Kind.UPDATE, Kind.LEFT_OUT, Kind.UPDATE]
    assert all(np.isfinite(v).all() for v in values(result.arrays).values())


def test_a_servers_model_that_is_not_finite_travels_whole_and_poisons_no_replica(tmp_path: Path) -> None:
    class Overflowing(FedAvg):
        def aggregate_train(self, server_round: int, replies: Any) -> Any:
            found, metrics = super().aggregate_train(server_round, replies)
            if server_round == 1:
                bad = values(found)
                bad["head.bias"] = bad["head.bias"] + np.float32(np.inf)
                found = record(bad)
            return found, metrics

    def repairing(model: dict[str, np.ndarray], node: int, number: int) -> dict[str, np.ndarray]:
        assert np.isinf(model["head.bias"]).all() == (number == 2)
        return train(model | {"head.bias": np.zeros(10, np.float32)}, node, number)

    grid = fleet(NODES, mods(tmp_path), repairing)
    with np.errstate(all="ignore"), pytest.raises(RoundsFailed):
        run(compressed(Overflowing(fraction_evaluate=0.0, **LIMIT), max_failed_rounds=1), grid)
    assert [t.is_packed for t in grid.of("down", 11)] == [False, False]


def _damaged(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


def _stale(data: bytes) -> bytes:
    old = unpack(data)
    return WireMessage(old.frame, old.layout, 1000, old.exact).pack()


def _other_model(data: bytes) -> bytes:
    old = unpack(data)
    layout = Layout.of_shapes({"head.weight": (3, 5)}, "int4")
    frame = Frame(Kind.UPDATE, 0, 0, layout.hash, 0, 0.0, 0.0, 0.0, torch.zeros(layout.fixed_nbytes, dtype=torch.uint8))
    return WireMessage(frame, layout, old.sequence).pack()


@pytest.mark.parametrize(
    "spoil", few([_damaged, _stale, lambda d: d[:100], lambda d: d + d, lambda d: b"", _other_model], 3)
)
def test_garbage_from_a_node_leaves_that_node_out(spoil: Callable[[bytes], bytes], tmp_path: Path) -> None:
    grid = fleet(NODES, mods(tmp_path), train)
    app = grid.nodes[11].app

    def spoiled(message: Message) -> Message:
        reply = app(message, grid.nodes[11].context)
        data = spoil(reply.content["arrays"][WIRE].data)
        reply.content["arrays"] = packed(data)
        return reply

    grid.nodes[11].wrong = spoiled
    result = run(compressed(STRATEGIES["fedavg without evaluation"](), "int4", "int8"), grid, rounds=2)
    assert result.train_metrics_clientapp[2]["loss"] == pytest.approx(0.5)
    assert all(np.isfinite(v).all() for v in values(result.arrays).values())


def test_garbage_from_the_server_makes_a_node_ask_for_the_model(tmp_path: Path) -> None:
    grid = fleet(NODES, mods(tmp_path), train)
    times = iter(range(99))

    def spoil(message: Message) -> None:
        found = message.content["arrays"]
        if WIRE in found and next(times) == 0:
            data = _damaged(found[WIRE].data)
            message.content["arrays"] = packed(data)

    grid.nodes[11].wrong = spoil
    run(compressed(STRATEGIES["fedavg without evaluation"](), "int4", "int8"), grid)
    assert [t.is_packed for t in grid.of("up", 11)] == [True, False, True, True]


def test_a_damaged_file_is_state_that_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedq.flower.state.CACHE_BYTES", 0)
    grid = fleet(NODES, mods(tmp_path), train)

    def damage(message: Message) -> None:
        if message.content["config"]["server-round"] == 2:
            for file in NodeFolder(tmp_path, RUN, 11).path.glob("replica-*"):
                file.write_bytes(_damaged(file.read_bytes()))

    grid.nodes[11].wrong = damage
    # The node served last stays in memory; this one must not be it.
    grid.nodes = dict(sorted(grid.nodes.items()))
    run(compressed(STRATEGIES["fedavg without evaluation"](), "int4", "int8"), grid)
    assert len([t for t in grid.of("up", 11) if t.is_packed]) == 3


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: fedq_mod("int9"), "codec"),
        (lambda: compressed(FedAvg(), "int4:blok=1"), "int4:option"),
        (lambda: compressed(FedAvg(), downlink="nothing"), "codec"),
        (lambda: compressed(FedAvg(), max_failed_rounds=0), "max_failed_rounds"),
    ],
)
def test_bad_settings_are_named(make: Callable[[], Any], field: str) -> None:
    with pytest.raises(FieldError) as caught:
        make()
    assert caught.value.field == field


# ---- other ways in ---------------------------------------------------------------------------------------------------


def test_a_loop_of_ones_own_by_halves_or_through_the_grid(tmp_path: Path) -> None:
    results = []
    for how in ("start", "halves"):
        random.seed(0)
        grid = fleet(NODES, mods(tmp_path / how), train)
        strategy = compressed(FedAvg(**LIMIT), "int4", "int8")
        model = record(arrays())
        if how == "start":
            model = strategy.start(grid, model, num_rounds=3).arrays
        else:
            for number in (1, 2, 3):
                messages = strategy.configure_train(number, model, ConfigRecord(), grid)
                model, _ = strategy.aggregate_train(number, grid.send_and_receive(messages, timeout=9))
                messages = strategy.configure_evaluate(number, model, ConfigRecord(), grid)
                assert strategy.aggregate_evaluate(number, grid.send_and_receive(messages, timeout=9))
        results.append(values(model))
    for name, value in results[0].items():
        np.testing.assert_array_equal(results[1][name], value)


def test_messages_may_be_pushed_now_and_pulled_later(tmp_path: Path) -> None:
    fleet_of = fleet(NODES, mods(tmp_path), train)
    grid = compressed(FedAvg()).grid(fleet_of)
    content = RecordDict({"arrays": record(arrays()), "config": ConfigRecord({"server-round": 1})})
    for expected in (False, True):
        ids = grid.push_messages([Message(content, node, "train") for node in grid.get_node_ids()])
        replies = grid.pull_messages(ids)
        assert [list(r.content["arrays"]) for r in replies] == [list(arrays())] * 3
        assert all(t.is_packed == expected for t in fleet_of.of("down")[-3:])


def test_a_strategy_with_a_start_of_its_own_keeps_it(tmp_path: Path) -> None:
    class Own(FedAvg):
        def start(self, grid: Any, initial_arrays: ArrayRecord, *, greeting: str) -> Any:
            assert greeting == "hello"
            return super().start(grid, initial_arrays, num_rounds=2, timeout=99)

    grid = fleet(NODES, mods(tmp_path), train)
    compressed(Own(**LIMIT)).start(grid, record(arrays()), greeting="hello")
    assert sum(t.is_packed for t in grid.of("up")) == 6


def test_messages_without_a_model_and_models_of_single_nodes_stay_as_they_are(tmp_path: Path) -> None:
    fleet_of = fleet(NODES, mods(tmp_path), train)
    for node in fleet_of.nodes.values():
        node.app.query()(lambda message, context: Message(message.content, reply_to=message))
    grid = compressed(FedAvg()).grid(fleet_of)
    queries = [Message(RecordDict({"c": ConfigRecord({"a": 1})}), node, "query") for node in NODES]
    replies = grid.send_and_receive(queries, timeout=9)
    assert [dict(r.content["c"]) for r in replies] == [{"a": 1}] * 3
    own = [
        Message(RecordDict({"arrays": record(arrays(n)), "config": ConfigRecord({"server-round": 1})}), n, "train")
        for n in NODES
    ]
    replies = grid.send_and_receive(own, timeout=9)
    for node, reply in zip(NODES, replies, strict=True):
        wanted = train(arrays(node), node, 1)["head.weight"]
        np.testing.assert_allclose(reply.content["arrays"]["head.weight"].numpy(), wanted, atol=0.02)


def test_answers_with_some_of_the_models_arrays(tmp_path: Path) -> None:
    def part(model: dict[str, np.ndarray], node: int, number: int) -> dict[str, np.ndarray]:
        trained = train(model, node, number)
        return {"head.weight": trained["head.weight"], "head.bias": trained["head.bias"], "extra": np.arange(3)}

    class Merging(FedAvg):
        def aggregate_train(self, server_round: int, replies: Any) -> Any:
            found, metrics = super().aggregate_train(server_round, replies)
            assert list(found) == ["head.weight", "head.bias", "extra"]
            return record(arrays() | {n: v for n, v in values(found).items() if n != "extra"}), metrics

    grid = fleet(NODES, mods(tmp_path), part)
    result = run(compressed(Merging(**LIMIT), "int8", "int8"), grid)
    assert list(result.arrays) == list(arrays())


def test_replicas_that_nobody_will_refer_to_are_forgotten(tmp_path: Path) -> None:
    def hang(message: Message) -> None:
        raise TimeoutError

    grid = fleet(NODES, mods(tmp_path), train)
    grid.nodes[12].wrong = hang
    strategy = compressed(STRATEGIES["fedavg without evaluation"]())
    run(strategy, grid, rounds=5)
    assert len(strategy._exchange._versions._models) == 1
    for number in range(1, 15):  # pushed, and never waited for
        content = RecordDict({"arrays": record(arrays(number)), "config": ConfigRecord({"server-round": number})})
        strategy.grid(grid).push_messages([Message(content, 11 + number % 2, "train")])
    assert len(strategy._exchange._versions._models) <= 8


def test_equal_arrays_which_flower_sends_once_are_counted_once(tmp_path: Path) -> None:
    start = {f"norm{i}.weight": np.ones(5000, np.float32) for i in range(20)}
    grid = fleet(NODES, mods(tmp_path), lambda model, node, number: model)
    strategy = compressed(FedAvg(**LIMIT))
    run(strategy, grid, start=start)
    assert grid.of("down", 11)[0].nbytes < 20 * 20_000 / 10
    for way in ("down", "up"):
        assert strategy.totals()[f"{way}_bytes"] == sum(t.nbytes for t in grid.of(way))


@pytest.mark.parametrize("data", few([b"", b"PK\x03\x04", b"\x93NUMPY\x01\x00" + b"v" * 99], 2))
def test_arrays_of_a_plain_node_that_are_none_leave_it_out(data: bytes, tmp_path: Path) -> None:
    grid = fleet(NODES, lambda node: [] if node == 11 else [fedq_mod(folder=tmp_path)], train)

    def garbage(message: Message) -> Message:
        found = ArrayRecord({"w": Array("float32", (2**40,), "numpy.ndarray", data)})
        return Message(RecordDict({"arrays": found, "metrics": MetricRecord({"num-examples": 1})}), reply_to=message)

    grid.nodes[11].wrong = garbage
    result = run(compressed(STRATEGIES["fedavg without evaluation"]()), grid)
    assert list(result.arrays) == list(arrays())


# ---- by how many examples answers are weighed ---------------------------------------------------------------------


def reporting(grid: Fleet, weight: Callable[[int, Message], Any]) -> Fleet:
    """Have the nodes report another number of examples: what a function of node and message gives; None: none."""
    for number, node in grid.nodes.items():

        def answer(message: Message, app: Any = node.app, context: Any = node.context, number: int = number) -> Message:
            reply = app(message, context)
            metrics = {"loss": 0.5, "num-examples": weight(number, message)}
            reply.content["metrics"] = MetricRecord({k: v for k, v in metrics.items() if v is not None})
            return reply

        node.wrong = answer
    return grid


def is_first_round(message: Message) -> bool:
    return message.content["config"]["server-round"] == 1


@pytest.mark.parametrize("weight", few([0, 0.0, -3, math.nan, math.inf, 1e308, [5, 5], None], 1))
@pytest.mark.parametrize("name", few(STRATEGIES, 2))
def test_a_round_without_examples_has_failed_and_the_run_goes_on(
    name: str, weight: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("flwr"), "propagate", True)
    odd = reporting(fleet(NODES, mods(tmp_path), train), lambda node, m: weight if is_first_round(m) else node % 100)
    starts: list[np.ndarray] = []
    result = run(
        compressed(STRATEGIES[name](), "fp32", "fp32", max_failed_rounds=2),
        odd,
        start={name: arrays()[name] for name in ("conv.weight", "head.weight")},  # QFedAvg takes floats alone
        evaluate_fn=lambda number, found: starts.append(found["head.weight"].numpy()),
    )
    np.testing.assert_array_equal(starts[0], starts[1])  # the model as it was
    assert not np.array_equal(starts[1], starts[2])
    assert set(result.train_metrics_clientapp) == {2, 3}
    assert "all 3 nodes failed, 1 rounds in a row" in caplog.text
    assert "num-examples" in caplog.text


@pytest.mark.parametrize("weight", few([0, -3, math.nan, math.inf, [5, 5], None], 3))
def test_a_node_with_an_odd_number_of_examples_is_left_out_alone(weight: Any, tmp_path: Path) -> None:
    grid = reporting(fleet(NODES, mods(tmp_path), train), lambda node, m: weight if node == 11 else node % 100)
    others = fleet([node for node in NODES if node != 11], mods(tmp_path / "others"), train)
    found = values(run(compressed(FedAvg(**LIMIT), "fp32", "fp32"), grid, rounds=1).arrays)
    options = LIMIT | {"min_train_nodes": 2, "min_available_nodes": 2, "min_evaluate_nodes": 2}
    expected = values(run(compressed(FedAvg(**options), "fp32", "fp32"), others, rounds=1).arrays)
    for name, value in expected.items():
        # A weight of 0 keeps the node in Flower's sum, in another order of it.
        np.testing.assert_allclose(found[name], value, rtol=1e-6 * (weight == 0), atol=1e-7 * (weight == 0))


def test_rounds_without_examples_in_a_row_end_the_run(tmp_path: Path) -> None:
    grid = reporting(fleet(NODES, mods(tmp_path), train), lambda *_: 0)
    with pytest.raises(RoundsFailed, match=r"2 rounds in a row.*num-examples of all 3 answers sum to 0"):
        run(compressed(FedAvg(**LIMIT), max_failed_rounds=2), grid, rounds=9)


def test_wrapped_strategies_weigh_by_what_they_wrap(tmp_path: Path) -> None:
    inner = FedAvg(weighted_by_key="n", **LIMIT)
    private = DifferentialPrivacyServerSideFixedClipping(inner, 0.1, 1.0, num_sampled_clients=3)
    assert Weighing.of(private) == Weighing("n", is_needed=True)
    assert Weighing.of(Compressed(inner, "int4", "int8", 0, None, 3)).key is None  # it has checked them itself


class PlainMean(FedAvg):
    """A strategy that does not weigh answers at all."""

    def aggregate_train(self, server_round: int, replies: Any) -> Any:
        found = [values(reply.content["arrays"]) for reply in replies if reply.has_content()]
        mean = {name: np.mean([one[name] for one in found], axis=0).astype(np.float32) for name in found[0]}
        return record(mean), None


def test_a_strategy_of_ones_own_may_do_without_weights(tmp_path: Path) -> None:
    start = {"head.weight": arrays()["head.weight"]}
    silent = reporting(fleet(NODES, mods(tmp_path), train), lambda *_: None)
    strategy = PlainMean(fraction_evaluate=0.0, min_train_nodes=3, min_available_nodes=3)
    result = run(compressed(strategy, "fp32", "fp32"), silent, start=start)
    assert not np.array_equal(result.arrays["head.weight"].numpy(), start["head.weight"])


def test_a_loop_of_ones_own_weighs_as_it_likes(tmp_path: Path) -> None:
    grid = reporting(fleet(NODES, mods(tmp_path), train), lambda *_: 0)
    strategy = compressed(FedAvg(**LIMIT))
    messages = list(strategy.inner.configure_train(1, record(arrays()), ConfigRecord(), grid))
    assert not any(reply.has_error() for reply in strategy.grid(grid).send_and_receive(messages, timeout=9))
    asked = strategy.configure_train(1, record(arrays()), ConfigRecord(), grid)
    assert strategy.aggregate_train(1, grid.send_and_receive(asked, timeout=9)) == (None, None)
    evaluated = strategy.configure_evaluate(1, record(arrays()), ConfigRecord(), grid)
    assert strategy.aggregate_evaluate(1, grid.send_and_receive(evaluated, timeout=9)) is None

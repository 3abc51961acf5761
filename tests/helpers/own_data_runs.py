"""Folders of runs on data of one's own as a run writes them, but without training: for tests of what shows them."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from fedq.ledger import Ledger, MessageParts
from fedq.metrics import Metric
from fedq.runfolder import RunFolder

NUM_CLIENTS, COHORT, NUM_VALUES = 3, 2, 1000
_BITS = {"fp32": 32, "int8": 8, "int4": 4, "sign": 1}


@dataclass(frozen=True)
class OwnRun:
    """What a run on data of one's own says.

    Args:
        metrics: The first decides.
        values: By metric, the value of each round; None: not evaluated in that round.
        model: Name of the module's class.
        uplink: Codec.
        seed: Of the run.
        train: What training reports beside its loss, by name.
        is_finished: Whether there is a summary.
        seconds: Of a round.
    """

    metrics: Sequence[Metric]
    values: Mapping[str, Sequence[float | None]]
    model: str = "MLP"
    uplink: str = "fp32"
    seed: int = 0
    train: Mapping[str, Sequence[float]] | None = None
    is_finished: bool = True
    rounds: int = 4
    seconds: float = 0.5


MSE, MAE = Metric("mse", "K^2"), Metric("mae", "K")
BITS = Metric("bits per byte", "bit/B")
F1 = Metric("f1", better="higher")

RUNS: dict[str, OwnRun] = {
    "heat-fp32-seed0": OwnRun((MSE, MAE), {"mse": (4.0, 2.0, 1.0, 1.25), "mae": (2.0, 1.0, 0.75, 0.5)}),
    "heat-fp32-seed1": OwnRun((MSE, MAE), {"mse": (4.0, 2.0, 1.5, 1.75), "mae": (2.0, 1.0, 0.75, 1.0)}, seed=1),
    "heat-int4-seed0": OwnRun(
        (MSE, MAE), {"mse": (4.0, None, 2.0, 1.5125), "mae": (2.0, None, 1.0, 0.5)}, uplink="int4"
    ),
    "heat-sign-seed0": OwnRun((MSE, MAE), {"mse": (4.0, 3.0, 3.0, 2.5), "mae": (2.0, 1.0, 1.0, 1.0)}, uplink="sign"),
    "text-fp32-seed0": OwnRun((BITS,), {"bits per byte": (8.0, 2.5, 1.9, 1.8)}, model="CharGPT"),
    "tags-fp32-seed0": OwnRun((F1,), {"f1": (0.25, 0.5, 0.75, 0.625)}, "Tagger", train={"f1": (0.5, 0.5, 0.75, 0.75)}),
    "tags-int4-seed0": OwnRun((F1,), {"f1": (0.25, 0.5, 0.5, 0.5)}, "Tagger", "int4", train={"f1": (0.5,) * 4}),
    "cut-fp32-seed0": OwnRun((MSE,), {"mse": (4.0, 2.0, None)}, is_finished=False, rounds=3),
    "blind-fp32-seed0": OwnRun((Metric("loss"),), {}, model="Blind"),
}


def make_own_runs(root: Path, runs: Mapping[str, OwnRun] = RUNS) -> dict[str, Path]:
    """Write the folders; return them by name."""
    for name, run in runs.items():
        with RunFolder.create(root / name, name=name) as folder:
            _write(folder, run, name)
        if name.startswith("heat"):  # files that such a run need not have
            (root / name / "histograms.parquet").unlink()
            shutil.rmtree(root / name / "tensorboard")
    return {name: root / name for name in runs}


def _write(folder: RunFolder, run: OwnRun, name: str) -> None:
    metrics = [asdict(metric) for metric in run.metrics]
    folder.write_config(_config(run, folder.path, name) | {"metrics": metrics})
    ledger, sent = Ledger(), {"uplink": 0, "downlink": 0}
    for round in range(run.rounds):
        _book(ledger, run, round)
        sent = {way: ledger.totals(way).payload for way in sent}
        folder.log_clients([_client(round, client) for client in range(COHORT)])
        folder.log_metrics(round, **_row(run, round, sent))
    folder.save_model({"0.weight": torch.ones(10, 90), "0.bias": torch.zeros(100)})
    if run.is_finished:
        folder.write_ledger(ledger)
        folder.write_summary(_summary(run, ledger, sent) | {"metrics": metrics, **_reached(run)})


def _config(run: OwnRun, out: Path, name: str) -> dict[str, Any]:
    clients = {"num_clients": NUM_CLIENTS, "cohort": COHORT, "min_cohort": 1, "norm_limit": "none"}
    exchange = {"exchange": "round", "uplink": run.uplink, "downlink": "fp32", "server": "fedavg"}
    exchange |= {"feedback": True, "aggregate": "gather"}
    return {
        "clients": clients,
        "exchange": exchange,
        "run": {"rounds": 4, "seed": run.seed, "out": str(out), "name": name},
    }


def _row(run: OwnRun, round: int, sent: Mapping[str, int]) -> dict[str, Any]:
    train = {f"train_{name}": values[round] for name, values in (run.train or {}).items()}
    val = {f"val_{name}": values[round] for name, values in run.values.items() if values[round] is not None}
    traffic = {f"{way}_bytes": nbytes for way, nbytes in sent.items()} | {"wire_bytes": 0, "root_ingress_bytes": 0}
    return {"train_loss": 1.0 / (round + 1), **train, **val, "lr": 0.1, "seconds": run.seconds, **traffic}


def _client(round: int, client: int) -> dict[str, Any]:
    row = {"round": round, "client": client, "rank": 0, "num_examples": 10 * (client + 1), "train_loss": 0.5}
    return row | {"train_accuracy": None, "val_accuracy": None, "status": "ok", "label_counts": []}


def _book(ledger: Ledger, run: OwnRun, round: int) -> None:
    raw = [4 * NUM_VALUES]
    for way, bits in (("uplink", _BITS[run.uplink]), ("downlink", 32)):
        parts = MessageParts(("0.weight",), ("codes",), raw, [NUM_VALUES * bits // 8])
        for client in range(COHORT):
            ledger.record(round=round, client=client, direction=way, parts=parts)


def _reached(run: OwnRun) -> dict[str, Any]:
    known = {name: [value for value in values if value is not None] for name, values in run.values.items()}
    first = run.metrics[0]
    return {
        "best": first.best(run.values.get(first.name, ())),
        "last": {name: values[-1] for name, values in known.items()},
    }


def _summary(run: OwnRun, ledger: Ledger, sent: Mapping[str, int]) -> dict[str, Any]:
    seconds = run.rounds * run.seconds
    return {
        "dataset": "own data",
        "model": run.model,
        "num_params": NUM_VALUES,
        "num_clients": NUM_CLIENTS,
        "cohort": COHORT,
        "world_size": 1,
        "launcher": "python",
        "device": "cpu",
        "backend": "gloo",
        "exchange": "round",
        "uplink": run.uplink,
        "downlink": "fp32",
        "server": "fedavg",
        "feedback": True,
        "aggregate": "gather",
        "rounds": run.rounds,
        "test_accuracy": None,
        "best_val_accuracy": None,
        **{f"{way}_bytes": nbytes for way, nbytes in sent.items()},
        **{f"{way}_bytes_fp32": ledger.totals(way).raw for way in sent},
        "wire_bytes": 0,
        "seconds": seconds,
        "seconds_per_round": run.seconds,
        "seed": run.seed,
        "git_commit": None,
        "versions": {"torch": torch.__version__},
    }

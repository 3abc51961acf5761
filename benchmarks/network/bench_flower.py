"""A plain Flower app and the same app with fedq's four lines, in Flower's own engines: bytes, seconds, accuracy.

    python benchmarks/network/bench_flower.py --data-dir DIR --work DIR --table docs/flower.md  # all of it, as root
    python benchmarks/network/bench_flower.py --data-dir DIR --work DIR --engines simulation    # without namespaces

The app is ``examples/flower_mnist``: MNIST, improved_cnn, FedAvg. All arms of a seed have the same shares, first
weights and batches. In the simulation they give accuracies and the bytes of Flower's messages; in the deployment each
party is a process in a network namespace of its own, and the kernel counts what crosses the server's interface, with
HTTP, TCP and Flower's polling. DIR of ``--work`` keeps what was measured, and what is there is not measured again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # of what the benchmarks share

from flower_runs import Engine, Prefix, deployment, simulation
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from links import ROOT, UNLIMITED, LinksUnavailable, about_run, links, report

from fedq.flower.accounting import message_nbytes
from fedq.models import build_model
from fedq.report.encoding import make_readable
from fedq.sweep import table

APP = ROOT / "examples" / "flower_mnist"
TITLE = "A plain Flower app and the same with fedq"
PLAIN = "plain"


@dataclass(frozen=True)
class Setting:
    """What all runs of an engine have in common.

    Args:
        engine: ``simulation`` or ``deployment``.
        data_dir: With MNIST.
        num_clients: Nodes; all of them train in every round.
        rounds: Rounds.
        train_examples: Training images of all clients.
        seeds: Paired.
        data_note: What a reader must know of the images.
    """

    engine: str
    data_dir: Path
    num_clients: int
    rounds: int
    train_examples: int
    seeds: Sequence[int]
    data_note: str

    def config(self, arm: str, seed: int, report: Path, ledger: Path) -> dict[str, object]:
        """Return the app's settings."""
        config: dict[str, object] = {
            "data-dir": self.data_dir.resolve(),
            "num-clients": self.num_clients,
            "rounds": self.rounds,
            "train-examples": self.train_examples,
            "seed": seed,
            "report": report,
            "compress": arm != PLAIN,
        }
        if arm != PLAIN:
            uplink, downlink = arm.split("/")
            config |= {"uplink": uplink, "downlink": downlink, "ledger": ledger}
        return config


def main() -> None:
    make_readable()
    args = arguments()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what was started is ended then, too
    args.work.mkdir(parents=True, exist_ok=True)
    settings = {
        "simulation": Setting(
            "simulation", args.data_dir, args.clients, args.rounds, args.examples, range(args.seeds), args.data_note
        ),
        "deployment": Setting("deployment", args.data_dir, 2, 4, 400, [0], args.data_note),
    }
    rows: list[dict[str, Any]] = []
    for name in args.engines:
        setting, path = settings[name], args.work / f"{name}.json"
        if not path.exists():
            path.write_text(json.dumps(measured(setting, args.arms, args.links), indent=1))
        rows += json.loads(path.read_text())
    text = section(rows, settings, args.engines)
    report(rows, TITLE, text, args)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--data-note", default="MNIST-10k", help="what a reader must know of these files")
    parser.add_argument("--work", type=Path, required=True, help="keeps what was measured")
    parser.add_argument("--engines", nargs="+", default=["simulation", "deployment"])
    parser.add_argument("--arms", nargs="+", default=[PLAIN, "int8/int8", "int4/int8", "sign/int8"])
    parser.add_argument("--links", default=UNLIMITED, help="a rate that `tc` reads, unlimited, or none")
    parser.add_argument("--clients", type=int, default=2, help="of the simulation")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--examples", type=int, default=2000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="takes the rows as JSON")
    parser.add_argument("--table", type=Path, help="Markdown file whose section is replaced; default: print")
    return parser.parse_args()


# ---- measuring -----------------------------------------------------------------------------------------------------


def measured(setting: Setting, arms: Sequence[str], rate: str) -> list[dict[str, Any]]:
    """Return a row for every arm and seed; the arms of a seed follow one another."""
    rows = []
    with tempfile.TemporaryDirectory() as folder, started(setting, Path(folder), rate) as (engine, count):
        for seed in setting.seeds:
            for arm in arms:
                rows.append(one(setting, arm, seed, engine, count, Path(folder)))
                print(json.dumps({k: v for k, v in rows[-1].items() if k != "rounds"}), flush=True)
    return rows


def one(
    setting: Setting, arm: str, seed: int, engine: Engine, count: Callable[[], tuple[int, int]], folder: Path
) -> dict[str, Any]:
    """Run the app once."""
    report, ledger = folder / "report.json", folder / "bytes.json"
    nodes = f"num-supernodes={setting.num_clients} client-resources-num-cpus=1"
    options = ["--federation-config", nodes] if setting.engine == "simulation" else []
    before, begin = count(), time.monotonic()
    engine.run(APP, setting.config(arm, seed, report, ledger), 900, options)
    seconds, after = time.monotonic() - begin, count()
    said = json.loads(report.read_text())
    ends = [row["time"] for row in said["rounds"]]
    row = {
        "engine": setting.engine,
        "arm": arm,
        "seed": seed,
        "accuracy": said["rounds"][-1]["accuracy"],
        "rounds": said["rounds"],
        "round_s": statistics.median(b - a for a, b in itertools.pairwise(ends)),
        "all_s": seconds,
        "wire_down": after[0] - before[0],
        "wire_up": after[1] - before[1],
        "data": said["data"],
        **about_run(),
    }
    if arm == PLAIN:
        down, up = plain_nbytes()
        num = setting.rounds * setting.num_clients
        return row | {"down": num * down, "up": num * up}
    totals = json.loads(ledger.read_text())
    later = totals["rounds"][1:]
    return row | {
        "down": totals["down_bytes"],
        "up": totals["up_bytes"],
        "later_down": sum(r["down_bytes"] for r in later) / max(1, len(later)) / setting.num_clients,
    }


def plain_nbytes() -> tuple[int, int]:
    """Return the bytes of the plain app's messages, down and up: their size does not depend on the values."""
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 2**63, 1, 2**63  # as long as Flower's own
    torch.manual_seed(0)
    arrays = ArrayRecord(build_model("improved_cnn").state_dict())
    content = RecordDict({"arrays": arrays, "config": ConfigRecord({"server-round": 1})})
    request = Message(content, 2**63, "train")
    metrics = MetricRecord({"num-examples": 1000, "loss": 1.0})
    reply = Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=request)
    return message_nbytes(request), message_nbytes(reply)


@contextmanager
def started(setting: Setting, folder: Path, rate: str) -> Iterator[tuple[Engine, Callable[[], tuple[int, int]]]]:
    """Start the engine; yield it, and what returns the bytes that the server's interface has sent and received."""
    environ = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(folder / "cache")}
    if setting.engine == "simulation":
        with simulation(folder / "engine", environ) as engine:
            yield engine, lambda: (0, 0)
        return
    try:
        with links(setting.num_clients + 1, rate) as prefixes:
            host = "10.77.0.1" if prefixes[0] else "127.0.0.1"
            with deployment(folder / "engine", environ, setting.num_clients, prefixes, host) as engine:
                yield engine, lambda: interface_nbytes(prefixes[0])
    except LinksUnavailable as error:
        raise SystemExit(str(error)) from None


def interface_nbytes(prefix: Prefix) -> tuple[int, int]:
    """Return bytes sent and received on the interface of a namespace; zeros on plain loopback."""
    if not prefix:
        return 0, 0
    paths = [f"/sys/class/net/veth0/statistics/{way}_bytes" for way in ("tx", "rx")]
    sent, received = subprocess.run([*prefix, "cat", *paths], capture_output=True, text=True, check=True).stdout.split()
    return int(sent), int(received)


# ---- the table -----------------------------------------------------------------------------------------------------


def section(rows: Sequence[dict[str, Any]], settings: dict[str, Setting], engines: Sequence[str]) -> str:
    """Return the section of the Markdown page."""
    text = [f"## {TITLE}\n"]
    for name in engines:
        found = [row for row in rows if row["engine"] == name]
        text += [simulated(found, settings[name])] if name == "simulation" else [deployed(found, settings[name])]
    text.append(
        "Re-made by `python benchmarks/network/bench_flower.py --data-dir DIR --work DIR --table docs/flower.md`.\n"
    )
    return "\n".join(text)


def simulated(rows: Sequence[dict[str, Any]], setting: Setting) -> str:
    plain = {row["seed"]: row for row in rows if row["arm"] == PLAIN}
    lines = [
        f"In Flower's simulation: {setting.num_clients} clients, {setting.rounds} rounds of one epoch, "
        f"{len(setting.seeds)} paired seeds, {setting.data_note}: {rows[0]['data'].partition(': ')[2]}; "
        f"{rows[0]['hardware']}, {rows[0]['date']}. Bytes are "
        "those of Flower's serialized messages, the first round's whole model in float32 among them.\n",
        "| up/down | test accuracy, % | difference to plain | MB up | MB down | of plain: up | down | s a round |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for arm in dict.fromkeys(row["arm"] for row in rows):
        found = [row for row in rows if row["arm"] == arm]
        accuracy = [100 * row["accuracy"] for row in found]
        pairs = np.array([100 * (row["accuracy"] - plain[row["seed"]]["accuracy"]) for row in found])
        spread = f" ± {statistics.stdev(accuracy):.2f}" if len(accuracy) > 1 else ""
        difference = "" if arm == PLAIN else table.interval(pairs)
        shares = [statistics.mean(row[k] / plain[row["seed"]][k] for row in found) for k in ("up", "down")]
        lines.append(
            f"| {arm} | {statistics.mean(accuracy):.2f}{spread} | {difference} | {found[0]['up'] / 1e6:.2f} | "
            f"{found[0]['down'] / 1e6:.2f} | {shares[0]:.3f} | {shares[1]:.3f} | "
            f"{statistics.median(row['round_s'] for row in found):.1f} |"
        )
    return "\n".join(lines) + "\n"


def deployed(rows: Sequence[dict[str, Any]], setting: Setting) -> str:
    lines = [
        f"In Flower's deployment, each party in a network namespace of its own: {setting.num_clients} clients, "
        f"{setting.rounds} rounds, {setting.train_examples} images in all, one seed. On the wire is what the kernel "
        "counted at the server, with HTTP, TCP, the app's own bundle and polling.\n",
        "| up/down | Flower's messages, MB up | down | on the wire, MB up | down | of plain: up | down | s a round |",
        "|---|---|---|---|---|---|---|---|",
    ]
    plain = next((row for row in rows if row["arm"] == PLAIN), None)
    for row in rows:
        mb = {key: row[key] / 1e6 for key in ("up", "down", "wire_up", "wire_down")}
        shares = [row[key] / plain[key] if plain and plain[key] else math.nan for key in ("wire_up", "wire_down")]
        lines.append(
            f"| {row['arm']} | {mb['up']:.2f} | {mb['down']:.2f} | {mb['wire_up']:.2f} | {mb['wire_down']:.2f} | "
            f"{shares[0]:.3f} | {shares[1]:.3f} | {row['round_s']:.1f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()

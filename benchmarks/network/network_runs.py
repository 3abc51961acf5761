"""Federations of processes on links, started, timed and weighed: `fedq server` and its clients, a rival, an exchange.

Every process is a party with an end of its own (see `links.star`), the server's the first. What a run has left is a
JSON file; nothing here makes tables.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import resource
import shutil
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from links import LOOPBACK, ROOT, End, run_together, star

from fedq.data import load_dataset
from fedq.federated.partition import partition
from fedq.kernels import derive_seed
from fedq.models import build_model
from fedq.network.certs import make_certs

SCRIPT = Path(__file__).resolve().parent / "bench_network.py"
RIVALS = ROOT / "benchmarks" / "rivals"
MODEL, IMAGE_SIZE = "improved_cnn", 28
MOMENTUM, WEIGHT_DECAY = 0.9, 5e-4
PORT = 8470
LIMIT_S = 1800
OURS, SOCKET, FLOWER = "fedq", "socket", "flower"
SYSTEMS = {OURS: "fedq", SOCKET: "R2's way", FLOWER: "Flower"}
WHOLE, PIECES = "bare-0", f"bare-{1 << 20}"
"""Bare exchanges, with the bytes of a piece; 0: messages travel whole."""


@dataclass(frozen=True)
class Federation:
    """One federation of a server and its clients on MNIST.

    Args:
        data_dir: Where MNIST is.
        rounds: At most.
        batch_size: Images a step.
        lr: Local learning rate of the first round; a cosine over the rounds.
        system: fedq, socket (what R2 does) or flower.
        uplink: Codec of the updates.
        downlink: Codec of the change.
        clients: How many.
        seed: Of split, shares, weights and orders.
        link: Of every party; see `links.star`.
        train_examples: Training images, all by default.
        target: Validation accuracy at which training ends.
    """

    data_dir: str
    rounds: int
    batch_size: int
    lr: float
    system: str = OURS
    uplink: str = "fp32"
    downlink: str = "fp32"
    clients: int = 2
    seed: int = 0
    link: str = "unlimited"
    train_examples: int | None = None
    target: float | None = None

    @property
    def name(self) -> str:
        """Name of its file and folder."""
        codecs = f"-{self.uplink}-{self.downlink}" if self.system == OURS else ""
        text = f"{self.system}{codecs}-{self.clients}clients-seed{self.seed}-{self.link}"
        return text.replace(":", "_").replace("=", "_").replace(",", "_")

    def server_flags(self) -> list[str]:
        """Return the flags of `fedq server`, but for where it listens and writes."""
        values: dict[str, Any] = {
            "--dataset": "mnist",
            "--data-dir": self.data_dir,
            "--model": MODEL,
            "--clients": self.clients,
            "--rounds": self.rounds,
            "--batch-size": self.batch_size,
            "--lr": self.lr,
            "--lr-schedule": "cosine",
            "--optimizer": f"sgd:momentum={MOMENTUM},weight_decay={WEIGHT_DECAY}",
            "--uplink": self.uplink,
            "--downlink": self.downlink,
            "--seed": self.seed,
            "--train-examples": self.train_examples,
            "--target-accuracy": self.target,
            "--join-timeout": LIMIT_S,
            "--checkpoint-every": self.rounds,
            "--precision": "fp32",
            "--device": "cpu",
            "--threads": 1,
        }
        return ["--no-augment", *(str(part) for pair in values.items() if pair[1] is not None for part in pair)]

    def lrs(self) -> list[float]:
        """Return the learning rate of each round."""
        return [self.lr * 0.5 * (1 + math.cos(math.pi * r / self.rounds)) for r in range(self.rounds)]


def run_federation(federation: Federation, work: Path, flower_python: str | None = None) -> dict[str, Any]:
    """Run it, or return what was kept of it.

    Args:
        federation: What is to run.
        work: Where JSON and the run's folder are kept.
        flower_python: The interpreter that has Flower.

    Raises:
        LinksUnavailable: See `links.star`.
        RuntimeError: A process failed.
        SystemExit: What is kept was made with other settings.
    """
    start = {
        OURS: lambda folder: _run_ours(federation, folder),
        SOCKET: lambda folder: _run_socket(federation, folder),
        FLOWER: lambda folder: _run_flower(federation, folder, flower_python or sys.executable),
    }[federation.system]
    return kept(work / f"{federation.name}.json", asdict(federation), start)


def kept(path: Path, settings: Mapping[str, Any], run: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """Return what a run has left, run now if it is not there.

    Args:
        path: JSON; the run gets a new folder beside it.
        settings: Of the run.
        run: Runs it in a folder, and returns its facts.

    Raises:
        SystemExit: What is there was made with other settings.
    """
    if not path.exists():
        folder = path.with_suffix("")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        begin, cpu = time.monotonic(), cpu_seconds()
        facts = run(folder)
        facts |= {"wall_s": time.monotonic() - begin, "cpu_s": cpu_seconds() - cpu}
        path.write_text(json.dumps({"settings": dict(settings), **facts}, indent=1) + "\n")
        print(f"{path.stem}: {facts['wall_s']:.0f} s, {facts['cpu_s']:.0f} s of CPU", file=sys.stderr, flush=True)
    found: dict[str, Any] = json.loads(path.read_text())
    differing = sorted(k for k, v in json.loads(json.dumps(dict(settings))).items() if found["settings"].get(k) != v)
    if differing:
        raise SystemExit(
            f"{path} was made with other settings ({', '.join(differing)}); delete it or give another --out"
        )
    return found


def cpu_seconds() -> float:
    """Return the processor time of all processes that were waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


# ---- a federation of ours --------------------------------------------------------------------------------------------


def _run_ours(federation: Federation, folder: Path) -> dict[str, Any]:
    out = folder / "server"
    with _parties(federation, folder, tls=True) as (ends, address):
        before = ends[0].traffic()
        trust = ["--certs", str(folder / "certs" / "server")]
        server = [*_fedq("server"), *federation.server_flags(), *trust, "--bind", address, "--out", str(out)]
        clients = [_our_client(federation, folder, address, number) for number in range(federation.clients)]
        logs = _logs(folder, federation.clients)
        here = FirstSeen(logs[1:], f"server {address}")
        _run([server, *clients], ends, logs, here.look)
        crossed = _crossed(ends[0], before)
    shutil.rmtree(folder / "certs")
    return facts_of_run(out, begin=here.moment, crossed=crossed)


def _our_client(federation: Federation, folder: Path, address: str, number: int) -> list[str]:
    options = ["--connect", address, "--certs", str(folder / "certs" / f"client-{number}"), "--threads", "1"]
    place = ["--data-dir", federation.data_dir, "--out", str(folder / f"client-{number}"), "--device", "cpu"]
    return [*_fedq("client"), *options, *place]


def facts_of_run(out: Path, *, begin: float, crossed: dict[str, int] | None) -> dict[str, Any]:
    """Return what a server's folder says of its run.

    Args:
        out: The run's folder.
        begin: When all clients were there, in seconds since the epoch.
        crossed: Bytes on the server's interface.
    """
    summary = json.loads((out / "summary.json").read_text())
    rounds = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {
        "test_accuracy": summary["test_accuracy"],
        "val_accuracies": [row["val_accuracy"] for row in rounds],
        "ends_s": [end - begin for end in _round_ends(out)],
        "messages": messages(out / "ledger.parquet"),
        "crossed": crossed,
        "left_out": summary["left_out"],
        "data": summary["dataset"].partition(": ")[2],
        "num_params": summary["num_params"],
        "commit": summary["git_commit"],
    }


def _round_ends(out: Path) -> list[float]:
    """Return when each round's scalars were written, in seconds since the epoch."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    return [event.wall_time for event in events.Scalars("run/seconds")]


def messages(ledger: Path) -> dict[str, dict[str, int]]:
    """Return for each direction how many messages had payloads, their payload bytes, and all bytes of all messages."""
    table = pq.read_table(ledger, columns=["direction", "tensor", "part", "wire"]).to_pylist()
    found = {}
    for direction in ("uplink", "downlink"):
        rows = [row for row in table if row["direction"] == direction]
        payloads = [row for row in rows if row["part"] != "framing"]
        found[direction] = {
            "count": max(Counter((row["tensor"], row["part"]) for row in payloads).values(), default=0),
            "payload": sum(row["wire"] for row in payloads),
            "all": sum(row["wire"] for row in rows),
        }
    return found


class FirstSeen:
    """Notes when a text was first seen in each of some files.

    Args:
        paths: The files, which may not be there yet.
        text: What is looked for.
    """

    def __init__(self, paths: Sequence[Path], text: str) -> None:
        self._waiting = set(paths)
        self._text = text
        self.moment = 0.0
        """When it was in all of them, in seconds since the epoch."""

    def look(self) -> None:
        """Look once more."""
        for path in list(self._waiting):
            if path.exists() and self._text in path.read_text(errors="replace"):
                self._waiting.discard(path)
                self.moment = time.time()


# ---- the same work in other systems ----------------------------------------------------------------------------------


def _run_socket(federation: Federation, folder: Path) -> dict[str, Any]:
    task, report = write_task(federation, folder), folder / "report.json"
    command = [sys.executable, str(RIVALS / "socket_pickle.py"), "--task", str(task)]
    with _parties(federation, folder, tls=False) as (ends, address):
        before = ends[0].traffic()
        server = [*command, "--report", str(report), "--bind", address, "--clients", str(federation.clients)]
        clients = [[*command, "--connect", address, "--number", str(n)] for n in range(federation.clients)]
        _run([server, *clients], ends, _logs(folder, federation.clients))
        crossed = _crossed(ends[0], before)
    return facts_of_report(report, crossed)


def facts_of_report(report: Path, crossed: dict[str, int] | None) -> dict[str, Any]:
    """Return what a rival's server says of its run, as `facts_of_run` does for ours.

    Raises:
        RuntimeError: It says nothing; names the folder of the logs.
    """
    if not report.exists():
        raise RuntimeError(f"no report; see {report.parent}")
    told = json.loads(report.read_text())
    begin = told.pop("begin")
    return told | {"ends_s": [end - begin for end in told.pop("ends")], "crossed": crossed}


def write_task(federation: Federation, folder: Path) -> Path:
    """Write the task's files as `rivals/network_task.py` reads them; return their folder."""
    images, task = folder / "images", folder / "task"
    for path in (images, task):
        path.mkdir(parents=True, exist_ok=True)
    data = load_dataset(
        "mnist",
        data_dir=Path(federation.data_dir),
        image_size=IMAGE_SIZE,
        train_examples=federation.train_examples,
        seed=federation.seed,
    )
    for name, split in (("train", data.train), ("val", data.val), ("test", data.test)):
        np.save(images / f"{name}_images.npy", split.images.numpy())
        np.save(images / f"{name}_labels.npy", split.labels.numpy())
    shares = partition(data.train.labels, federation.clients, "iid", seed=federation.seed)
    np.savez(task / "shares.npz", **{str(i): share.numpy() for i, share in enumerate(shares)})  # type: ignore[arg-type]
    torch.manual_seed(derive_seed(federation.seed, "weights"))
    torch.save(build_model(MODEL, image_size=IMAGE_SIZE).state_dict(), task / f"{MODEL}.pt")
    document = {
        "model": MODEL,
        "num_rounds": federation.rounds,
        "cohorts": [],
        "seeds": [],
        "lr": federation.lr,
        "lrs": federation.lrs(),
        "momentum": MOMENTUM,
        "weight_decay": WEIGHT_DECAY,
        "batch_size": federation.batch_size,
        "image_size": IMAGE_SIZE,
        "target": federation.target if federation.target is not None else 2.0,
        "mean": data.mean,
        "std": data.std,
    }
    (task / "task.json").write_text(json.dumps(document))
    return task


def _run_flower(federation: Federation, folder: Path, python: str) -> dict[str, Any]:
    task, report, work = write_task(federation, folder), folder / "report.json", folder / "flower"
    script = [python, str(RIVALS / "flower_deployment.py"), "--task", str(task), "--report", str(report)]
    with _parties(federation, folder, tls=False) as (ends, _):
        told = {"address": ends[0].address, "prefixes": [end.prefix for end in ends]}
        (folder / "ends.json").write_text(json.dumps(told))
        before = ends[0].traffic()
        options = ["--ends", str(folder / "ends.json"), "--work", str(work)]
        _run([[*script, *options]], [End("")], [folder / "flower.log"])
        crossed = _crossed(ends[0], before)
    return facts_of_report(report, crossed)


# ---- an exchange without training ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Exchange:
    """Rounds in which nothing is trained.

    Args:
        model: A network; its parameters and statistics travel in float32 both ways.
        clients: How many.
        rounds: Of which the first is not counted.
        turn: Which repetition this is.
    """

    model: str
    clients: int
    rounds: int
    turn: int

    @property
    def name(self) -> str:
        """Name of its files, without the system."""
        return f"{self.model}-{self.clients}clients-turn{self.turn}"

    @property
    def nbytes(self) -> int:
        """Bytes of the payloads of a message."""
        return 4 * sum(t.numel() for t in build_model(self.model).state_dict().values() if t.is_floating_point())


def run_exchange(exchange: Exchange, system: str, work: Path) -> dict[str, Any]:
    """Run an exchange in a system (``fedq``, or ``bare`` and the bytes of a piece), or return what was kept of it."""

    def run(folder: Path) -> dict[str, Any]:
        kind, _, piece = system.partition("-")
        make_certs(folder / "certs", exchange.clients, hosts=["localhost"], days=2)
        address = f"localhost:{free_port()}"
        return _exchange_ours(exchange, folder, address) if kind == OURS else _bare(exchange, folder, address, piece)

    return kept(work / f"exchange-{system}-{exchange.name}.json", asdict(exchange), run)


def _exchange_ours(exchange: Exchange, folder: Path, address: str) -> dict[str, Any]:
    out, ends = folder / "server", [End("localhost")] * (1 + exchange.clients)
    values: dict[str, Any] = {
        "--dataset": "digits",
        "--model": exchange.model,
        "--clients": exchange.clients,
        "--rounds": exchange.rounds,
        "--eval-every": exchange.rounds,
        "--checkpoint-every": exchange.rounds,
        "--uplink": "fp32",
        "--downlink": "fp32",
        "--precision": "fp32",
        "--device": "cpu",
        "--threads": 1,
        "--certs": folder / "certs" / "server",
        "--bind": address,
        "--out": out,
    }
    server = [*_fedq("server"), "--accept-own-data", *(str(part) for pair in values.items() for part in pair)]
    clients = []
    for number in range(exchange.clients):
        told = {"model": exchange.model, "connect": address, "certs": str(folder / "certs" / f"client-{number}")}
        file = folder / f"client-{number}.json"
        file.write_text(json.dumps(told | {"out": str(folder / f"client-{number}")}))
        clients.append([sys.executable, str(SCRIPT), "--as-client", str(file)])
    _run([server, *clients], ends, _logs(folder, exchange.clients))
    found = [json.loads((folder / f"client-{n}" / "tasks.json").read_text()) for n in range(exchange.clients)]
    works = [max(works) for works in zip(*(one["work"] for one in found), strict=True)]
    return {"seconds": np.diff(found[0]["tasks"]).tolist(), "parts": parts_of_rounds(out / "phases.parquet", works)[1:]}


def parts_of_rounds(phases: Path, works: Sequence[float]) -> list[dict[str, float]]:
    """Return for each round the seconds in which bytes moved, in which the client worked, and the server.

    Args:
        phases: The server's.
        works: Seconds that a client worked, the slowest of each round; the server waits for it in its exchange.
    """
    rounds: list[dict[str, float]] = [{} for _ in works]
    for row in pq.read_table(phases, columns=["round", "phase", "seconds"]).to_pylist():
        rounds[row["round"]][row["phase"]] = row["seconds"]
    return [
        {
            "moving": found["exchange"] - work,
            "client": work,
            "server": sum(found[name] for name in ("decode", "server", "encode")),
        }
        for found, work in zip(rounds, works, strict=True)
    ]


def idle_client(file: Path) -> None:
    """Take part in an exchange with a training that returns at once; note when each task came, and what it cost here.

    The client's own work is what `Participant` does: decode and apply, compare models, write it into the module and
    read it, encode. Bytes and their checksums are not in it.
    """
    from fedq.network import join
    from fedq.network.participant import Participant

    told = json.loads(file.read_text())
    tasks: list[float] = []
    work = [0.0]
    torch.set_num_threads(1)

    def train(lr: float) -> None:
        tasks.append(time.perf_counter())

    def timed(method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def call(*args: Any) -> Any:
            begin = time.perf_counter()
            try:
                return method(*args)
            finally:
                work[-1] += time.perf_counter() - begin
                if method.__name__ == "answer":  # the last that a round asks
                    work.append(0.0)

        return call

    for name in ("take", "arrive", "answer"):
        setattr(Participant, name, timed(getattr(Participant, name)))
    out = Path(told["out"])
    join(told["connect"], model=build_model(told["model"]), train=train, num_examples=100, certs=told["certs"], out=out)
    (out / "tasks.json").write_text(json.dumps({"tasks": tasks, "work": work[: len(tasks)]}))


def _bare(exchange: Exchange, folder: Path, address: str, piece: str) -> dict[str, Any]:
    report, certs = folder / "report.json", folder / "certs"
    command = [sys.executable, str(RIVALS / "bare_grpc.py"), "--nbytes", str(exchange.nbytes), "--piece", piece]
    numbers = ["--clients", str(exchange.clients), "--rounds", str(exchange.rounds), "--report", str(report)]
    server = [*command, "--certs", str(certs / "server"), "--bind", address, *numbers]
    clients = [[*command, "--certs", str(certs / f"client-{n}"), "--connect", address] for n in range(exchange.clients)]
    _run([server, *clients], [End("localhost")] * (1 + exchange.clients), _logs(folder, exchange.clients))
    return {"seconds": json.loads(report.read_text())[1:]}


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])


# ---- processes -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _parties(federation: Federation, folder: Path, *, tls: bool) -> Iterator[tuple[list[End], str]]:
    """Make the ends, and certificates; yield the ends and the server's address."""
    with star(1 + federation.clients, federation.link, counts_frames=True) as ends:
        if tls:
            make_certs(folder / "certs", federation.clients, hosts=[ends[0].address], days=2)
        yield ends, f"{ends[0].address}:{free_port() if federation.link == LOOPBACK else PORT}"


def _run(
    commands: Sequence[Sequence[str]],
    ends: Sequence[End],
    logs: Sequence[Path],
    beat: Callable[[], None] = lambda: None,
) -> None:
    """Run the parties' commands to their end.

    Raises:
        RuntimeError: One failed; names the logs.
    """
    paths = [str(ROOT), str(RIVALS), os.environ.get("PYTHONPATH", "")]
    environ = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "PYTHONPATH": os.pathsep.join(paths)}
    prefixed = [[*end.prefix, *command] for end, command in zip(ends, commands, strict=True)]
    try:
        run_together(prefixed, [environ] * len(prefixed), LIMIT_S, logs, beat)
    except RuntimeError as error:
        raise RuntimeError(f"{error}; see {logs[0].parent}") from None


def _fedq(command: str) -> list[str]:
    return [sys.executable, "-m", "fedq", command]


def _logs(folder: Path, clients: int) -> list[Path]:
    return [folder / "server.log", *(folder / f"client-{n}.log" for n in range(clients))]


def _crossed(server: End, before: Any) -> dict[str, int] | None:
    now = server.traffic()
    return asdict(now - before) if now is not None else None

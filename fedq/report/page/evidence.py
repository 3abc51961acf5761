"""What a run's files say, however many of them there are: read here, nowhere else on the page.

A file that is missing, broken or of a schema that this version does not read becomes a `Problem`; the rest of the run
is still shown.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from fedq.errors import FieldError
from fedq.report.arms import Run
from fedq.report.metric import metrics_of, values_so_far, with_own_data
from fedq.report.page.bytesums import LEDGER_COLUMNS, ByteSums, sum_ledger
from fedq.report.runs import find_runs

if TYPE_CHECKING:
    import pyarrow as pa

Rows = list[dict[str, Any]]
_Content = TypeVar("_Content")

READABLE_SCHEMAS = (1,)
"""Schema versions of a run's files that this module reads."""

_COLUMNS = {
    "ledger": LEDGER_COLUMNS,
    "clients": ("round", "client", "num_examples", "train_accuracy", "val_accuracy", "status", "label_counts"),
    "personal": ("client", "bits", "num_examples", "val_accuracy", "test_accuracy"),
    "phases": ("round", "rank", "phase", "seconds", "hidden_seconds", "calls"),
    "histograms": ("round", "client", "tensor", "stage", "edges", "counts", "num", "entropy_bits"),
}
_OPTIONAL = ("personal", "phases")
_OPTIONAL_OF_OWN_DATA = (*_OPTIONAL, "histograms")


@dataclass(frozen=True)
class Problem:
    """A file that cannot be used, and why."""

    file: str
    text: str
    is_schema: bool = False


@dataclass(frozen=True)
class Evidence:
    """Everything that the page shows of one run.

    Args:
        run: Folder, configuration and summary. Of a run without `summary.json` the summary holds what configuration
            and metrics say.
        state: ``finished``, ``unfinished``, or ``not started`` where no round is finished.
        total_rounds: Number of rounds asked for; None if the configuration cannot be read.
        metrics: Rows of `metrics.jsonl`.
        bytes: Sums of the ledger; None without one.
        last_clients: The last row of every client in `clients.parquet`.
        left_out: Rows of clients that were left out of a round.
        personal: Rows of `personal.parquet`.
        phases: Rows of `phases.parquet`.
        shapes: Histograms of the last round logged.
        codes: Histograms of codes of every round, without their bins.
        problems: Files that are missing, broken, or of another schema.
    """

    run: Run
    state: str
    total_rounds: int | None
    metrics: Rows
    bytes: ByteSums | None = None
    last_clients: Rows = field(default_factory=list)
    left_out: Rows = field(default_factory=list)
    personal: Rows = field(default_factory=list)
    phases: Rows = field(default_factory=list)
    shapes: Rows = field(default_factory=list)
    codes: Rows = field(default_factory=list)
    problems: tuple[Problem, ...] = ()

    @property
    def name(self) -> str:
        """Name of the run's folder."""
        return self.run.path.resolve().name

    @property
    def is_finished(self) -> bool:
        """Whether the run came to its end and its summary can be read."""
        return self.state == "finished"

    @property
    def rounds(self) -> int:
        """Rounds that are finished."""
        return len({row["round"] for row in self.metrics}) or int(self.run.summary.get("rounds") or 0)

    @property
    def exchange(self) -> str:
        """When messages travel: ``round``, ``step``, or ``none`` where nothing is exchanged."""
        if self.run.algorithm == "local":
            return "none"
        return str(self.run.summary.get("exchange", "round"))


def read_evidence(paths: Sequence[Path]) -> list[Evidence]:
    """Read runs, and the runs directly inside folders that are none.

    Raises:
        FieldError: A folder does not exist or holds no run, or no run has a file that can be read.
    """
    folders = list(dict.fromkeys(status.path.resolve() for status in find_runs(paths)))
    found = [_read_run(folder) for folder in folders]
    if not any(one.metrics or one.is_finished for one in found):
        reasons = [f"{one.name}: {problem.file} {problem.text}" for one in found for problem in one.problems]
        raise FieldError("runs", ", ".join(map(str, paths)), f"a run with a round to show ({'; '.join(reasons[:5])})")
    return found


def _read_run(folder: Path) -> Evidence:
    problems: list[Problem] = []
    read = _Reader(folder, problems)
    tree = read.file("config.yaml", _yaml) or {}
    told = read.file("summary.json", _json)
    is_finished, told = told is not None, told or {}
    judged = read.metrics({"config.yaml": tree, "summary.json": told})
    told = {key: value for key, value in told.items() if key != "metrics"} | judged
    config = {name: part for name, part in with_own_data(tree, told).items() if isinstance(part, dict)}
    metrics = read.file("metrics.jsonl", _json_lines) or []
    total = config.get("run", {}).get("rounds")
    state = "finished" if is_finished else "unfinished" if metrics else "not started"
    summary = {**_summary_so_far(config, metrics), **values_so_far(metrics_of(judged), metrics), **told}
    read.optional = _OPTIONAL_OF_OWN_DATA if judged else _OPTIONAL
    ledger, clients, histograms = (read.table(name) for name in ("ledger", "clients", "histograms"))
    personal, phases = (_rows(read.table(name)) for name in _OPTIONAL)
    last_clients, left_out = _clients(clients)
    shapes, codes = _histograms(histograms)
    return Evidence(
        Run(folder, summary, config),
        state,
        total,
        metrics,
        sum_ledger(ledger, codes) if ledger is not None else None,
        last_clients,
        left_out,
        personal,
        phases,
        shapes,
        codes,
        tuple(problems),
    )


def _rows(table: pa.Table | None) -> Rows:
    return [] if table is None else table.to_pylist()


class _Reader:
    """Reads a folder's files and notes the problems."""

    def __init__(self, folder: Path, problems: list[Problem]) -> None:
        self._folder = folder
        self._problems = problems
        self.optional: tuple[str, ...] = _OPTIONAL

    def metrics(self, trees: dict[str, dict[str, Any]]) -> dict[str, Any]:
        """Return the list of metrics of the last file that has one, under its name; of image runs nothing."""
        found: dict[str, Any] = {}
        for name, tree in trees.items():
            try:
                if metrics_of(tree):
                    found = {"metrics": tree["metrics"]}
            except FieldError as error:
                self._note(name, f"cannot be read: {error}", is_schema=True)
        return found

    def file(self, name: str, parse: Callable[[str], _Content]) -> _Content | None:
        """Return a text file's content; None if it cannot be used."""
        path = self._folder / name
        if not path.exists():
            self._note(name, "is missing")
            return None
        try:
            content = parse(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            self._note(name, f"cannot be read: {error}")
            return None
        version = content.get("schema_version", READABLE_SCHEMAS[0]) if isinstance(content, dict) else None
        return content if version is None or self._is_readable(name, version) else None

    def table(self, name: str) -> pa.Table | None:
        """Return a Parquet table's columns that are used here; None if there is none."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        file = f"{name}.parquet"
        path = self._folder / file
        if not path.exists():
            if name not in self.optional:
                self._note(file, "is missing")
            return None
        try:
            schema = pq.read_schema(path)
            version = (schema.metadata or {}).get(b"schema_version", str(READABLE_SCHEMAS[0]).encode()).decode()
            if not self._is_readable(file, int(version) if version.isdigit() else version):
                return None
            if lacking := [column for column in _COLUMNS[name] if column not in schema.names]:
                self._note(file, f"lacks {', '.join(lacking)}", is_schema=True)
                return None
            return pq.read_table(path, columns=list(_COLUMNS[name]))
        except (OSError, pa.ArrowException) as error:
            self._note(file, f"cannot be read: {error}")
            return None

    def _is_readable(self, file: str, version: Any) -> bool:
        if version in READABLE_SCHEMAS:
            return True
        readable = ", ".join(map(str, READABLE_SCHEMAS))
        self._note(file, f"has schema version {version}; this fedq reads {readable}", is_schema=True)
        return False

    def _note(self, file: str, text: str, *, is_schema: bool = False) -> None:
        self._problems.append(Problem(file, text, is_schema))


def _yaml(text: str) -> dict[str, Any]:
    import yaml

    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None
    return _object(content)


def _json(text: str) -> dict[str, Any]:
    return _object(json.loads(text))


def _object(content: Any) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise ValueError("it holds no names and values")
    return content


def _json_lines(text: str) -> Rows:
    """Return the rows; a last line that was cut off by a kill is left out."""
    return [_object(json.loads(line)) for line in text.split("\n")[:-1]]


def _summary_so_far(config: dict[str, Any], metrics: Rows) -> dict[str, Any]:
    """Return what a summary would say of a run that has none."""
    data, local, clients, exchange, run = (
        config.get(part, {}) for part in ("data", "local", "clients", "exchange", "run")
    )
    last = metrics[-1] if metrics else {}
    accuracies = [row["val_accuracy"] for row in metrics if row.get("val_accuracy") is not None]
    keys = ("uplink", "downlink", "server", "exchange")
    return {
        "dataset": data.get("dataset"),
        "model": local.get("model"),
        "num_clients": clients.get("num_clients"),
        "cohort": clients.get("cohort"),
        "seed": run.get("seed", 0),
        "weights": config.get("lowbit", {}).get("weights", "float"),
        "algorithm": config.get("personal", {}).get("algorithm", "fedavg"),
        "rounds": len(metrics),
        "best_val_accuracy": max(accuracies, default=None),
        "seconds": sum(row.get("seconds") or 0.0 for row in metrics),
        **{key: exchange.get(key) for key in keys if exchange.get(key) is not None},
        **{key: last.get(key) for key in ("uplink_bytes", "downlink_bytes", "wire_bytes")},
    }


def _clients(table: pa.Table | None) -> tuple[Rows, Rows]:
    """Return each client's last row, and the rows of clients left out."""
    if table is None or not table.num_rows:
        return [], []
    import pyarrow.compute as pc

    clients, rounds = (table[name].to_numpy() for name in ("client", "round"))
    order = np.lexsort((rounds, clients))
    last = order[np.flatnonzero(np.append(np.diff(clients[order]) != 0, True))]
    left_out = table.select(["round", "client", "status"]).filter(pc.not_equal(table["status"], "ok"))
    return table.take(last).to_pylist(), left_out.to_pylist()


def _histograms(table: pa.Table | None) -> tuple[Rows, Rows]:
    """Return the histograms of the last round logged, and those of codes of every round without their bins."""
    if table is None or not table.num_rows:
        return [], []
    import pyarrow.compute as pc

    last = table.filter(pc.equal(table["round"], pc.max(table["round"])))
    columns = ["round", "client", "tensor", "num", "entropy_bits"]
    codes = table.filter(pc.equal(table["stage"], "codes")).select(columns)
    return last.to_pylist(), codes.to_pylist()

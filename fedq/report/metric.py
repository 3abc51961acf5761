"""What a run is judged by, and where its files hold it: accuracy of image runs, of all others their first metric.

Whatever shows a run asks here for the number, its name, its unit and its direction. "Values" are those of the files,
"shown" numbers those that people read: an accuracy of 0.5 is shown as 50.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from fedq.errors import FieldError
from fedq.metrics import Metric, digits

Tree = Mapping[str, Any]
Rows = Sequence[Mapping[str, Any]]

OWN_DATA_KEYS = ("model", "num_params", "metric")
"""Keys of a summary that set a run on data of one's own apart from others, beside its settings."""

_NO_METRIC = Metric("loss")
"""The metric of a run whose list of metrics is empty: it was never evaluated."""


class Series(NamedTuple):
    """A column of `metrics.jsonl` as a curve.

    Args:
        column: Name of the column.
        key: The beginning of the names of the curve's charts.
        title: Title of the charts, such as "Validation accuracy".
        label: Label of the y axis, with the unit.
        better: Whether "lower" or "higher" values are better.
        scale: Factor by which values are multiplied to be shown.
    """

    column: str
    key: str
    title: str
    label: str
    better: str
    scale: float = 1.0


@dataclass(frozen=True)
class Measure:
    """The first metric of a run on data of one's own, as its files hold it.

    Args:
        metric: Name, unit and direction of the numbers that are shown.
    """

    metric: Metric

    scale: ClassVar[float] = 1.0
    has_test_set: ClassVar[bool] = False
    learning: ClassVar[str] = "Metrics and loss"
    tradeoff: ClassVar[str] = "What it costs"
    near: ClassVar[str] = "1 %"
    advice: ClassVar[str] = (
        "An arm that was chosen by these numbers looks better by them than it is: judge it by other data."
    )

    @property
    def words(self) -> dict[str, str]:
        """What the result, the best value, what stands beside the result, and a choice are called."""
        best = dict.fromkeys(("best", "beside", "best in full"), f"best {self.metric.name}")
        return {"result": f"last {self.metric.name}", **best, "chosen by": f"arm with the best {self.metric.name}"}

    def heading(self, kind: str) -> str:
        """Return the words and the unit: "last mse, K^2"."""
        return f"{self.words[kind]}, {self.metric.unit}" if self.metric.unit else self.words[kind]

    def named(self, words: str) -> str:
        """Return words that name the metric, for where there are several."""
        return words if self.metric.name in words else f"{words} ({self.metric.name})"

    def to_go_on(self, path: Path | None = None) -> str:
        """Return how to go on with a run that is not finished."""
        return "go on with it in the program that began it"

    def to_repeat(self, name: str) -> str:
        """Return how to run a run again whose command was not recorded; empty where only its program could."""
        return ""

    # ---- values ----------------------------------------------------------------------------------------------------

    def last(self, summary: Tree) -> float | None:
        """Return the value of the last model."""
        return (summary.get("last") or {}).get(self.metric.name)

    def best(self, summary: Tree) -> float | None:
        """Return the best value of any round."""
        return summary.get("best")

    def beside(self, summary: Tree) -> float | None:
        """Return the value that stands beside the last one."""
        return self.best(summary)

    def last_row(self, rows: Rows) -> float | None:
        """Return the value of the last evaluation."""
        return last_of(rows, f"val_{self.metric.name}")

    # ---- numbers as shown ------------------------------------------------------------------------------------------

    def digits(self, shown: float) -> str:
        """Return a number that is shown, without its unit."""
        return digits(shown)

    def number(self, shown: float | None, sd: float | None = None) -> str:
        """Return mean ± sd, without the unit; "-" for none."""
        if shown is None:
            return "-"
        return self.digits(shown) + ("" if sd is None else f" ± {self.digits(sd)}")

    def text(self, shown: float | None, sd: float | None = None) -> str:
        """Return mean ± sd and the unit; "-" for none."""
        return "-" if shown is None else f"{self.number(shown, sd)} {self.metric.unit}".rstrip()

    def shown(self, value: float | None) -> float | None:
        """Return the number that is shown of a value."""
        return None if value is None else self.scale * value

    def gain(self, shown: float) -> float:
        """Return a number of which more is better."""
        return shown if self.metric.better == "higher" else -shown

    def is_near(self, shown: float, base: float) -> bool:
        """Whether a result is at most `near` worse than another: of other metrics than accuracy, 1 % of its size."""
        return self.gain(shown) >= self.gain(base) - 0.01 * abs(base)

    # ---- columns ---------------------------------------------------------------------------------------------------

    def series(self, runs: Iterable[tuple[Tree, Rows]]) -> list[Series]:
        """Return what to draw of runs, summaries and rows: each metric (of training if not evaluated), and loss."""
        found: dict[str, Series] = {}
        for summary, rows in runs:
            columns = {column for row in rows for column in row}
            for metric in [*metrics_of(summary), _NO_METRIC]:
                for prefix, noun in (("val", "validation"), ("train", "training")):
                    column = f"{prefix}_{metric.name}"
                    if column in columns and metric.name not in found:
                        title, label = f"{first_upper(noun)} {metric.name}", f"{noun} {metric.label}"
                        found[metric.name] = Series(column, file_name(metric.name), title, label, metric.better)
        if self.metric.name in found:  # the first metric first, whatever runs have
            found = {self.metric.name: found[self.metric.name], **found}
        return list(found.values())

    def arm_columns(self) -> dict[str, str]:
        """Return the names of the result and of the best value in tables of arms."""
        return {"result": f"last_{self.metric.name}", "best": f"best_{self.metric.name}"}

    def run_columns(self, summary: Tree) -> dict[str, Any]:
        """Return what tables of runs hold of a run's values."""
        last = {f"last_{name}": value for name, value in (summary.get("last") or {}).items()}
        return {**last, f"best_{self.metric.name}": self.best(summary)}

    def round_columns(self, rows: Rows) -> list[str]:
        """Return the columns of `metrics.jsonl` that tables of rounds hold."""
        columns = dict.fromkeys(column for row in rows for column in row)
        return [*(column for column in columns if column.startswith(("train_", "val_"))), "lr"]


class _Accuracy(Measure):
    """Accuracy: a share in the files, shown as percent; on a test set, and in validation."""

    scale = 100
    has_test_set = True
    learning = "Accuracy and loss"
    tradeoff = "What accuracy costs"
    advice = "Choose an arm by its validation accuracy; the test accuracy is for the one that was chosen."
    near = "1 point"

    @property
    def words(self) -> dict[str, str]:
        words = {"result": "test accuracy", "best": "best validation", "beside": "balanced accuracy"}
        return words | {"best in full": "best validation accuracy", "chosen by": "best by validation"}

    def to_go_on(self, path: Path | None = None) -> str:
        return "go on with --resume" if path is None else f"go on with --resume {path}"

    def to_repeat(self, name: str) -> str:
        return f"python train.py --config {name}/config.yaml --out NEW"

    def last(self, summary: Tree) -> float | None:
        return summary.get("test_accuracy")

    def best(self, summary: Tree) -> float | None:
        return summary.get("best_val_accuracy")

    def beside(self, summary: Tree) -> float | None:
        return summary.get("test_balanced_accuracy")  # a run of an earlier version has none

    def digits(self, shown: float) -> str:
        return f"{shown:.2f}"

    def is_near(self, shown: float, base: float) -> bool:
        return shown >= base - 1.0

    def series(self, runs: Iterable[tuple[Tree, Rows]]) -> list[Series]:
        data = "val" if any("val_accuracy" in row for _, rows in runs for row in rows) else "train"
        noun = {"val": "validation", "train": "training"}[data]
        title = noun.capitalize()
        return [
            Series(f"{data}_accuracy", "accuracy", f"{title} accuracy", f"{noun} accuracy, %", "higher", self.scale),
            Series(f"{data}_loss", "loss", f"{title} loss", f"{noun} loss", "lower"),
        ]

    def arm_columns(self) -> dict[str, str]:
        return {"result": "test_accuracy_percent", "best": "best_val_accuracy_percent"}

    def run_columns(self, summary: Tree) -> dict[str, Any]:
        keys = ("test_accuracy", "test_balanced_accuracy", "test_loss", "best_val_accuracy")
        return {key: summary.get(key) for key in keys}

    def round_columns(self, rows: Rows) -> list[str]:
        return ["train_loss", "train_accuracy", "val_loss", "val_accuracy", "lr"]


ACCURACY: Measure = _Accuracy(Metric("accuracy", "%", "higher"))
"""The measure by which image runs are judged."""


# ---- reading -------------------------------------------------------------------------------------------------------


def metrics_of(tree: Tree) -> tuple[Metric, ...]:
    """Return the metrics that a summary or a configuration names, the first of which decides; none of an image run.

    Raises:
        FieldError: The metrics cannot be read.
    """
    told = tree.get("metrics")
    if told is None:
        return ()
    if not isinstance(told, list) or not all(isinstance(one, dict) for one in told):
        raise FieldError("metrics", told, "a list of {name, unit, better}")
    found = []
    for one in told:
        try:
            found.append(Metric(**one))
        except TypeError:
            raise FieldError("metrics", one, "name, unit and better") from None
    return tuple(found) or (_NO_METRIC,)


def measure_of(tree: Tree) -> Measure:
    """Return what a run is judged by, from its summary or configuration.

    Raises:
        FieldError: The metrics cannot be read, see `metrics_of`.
    """
    metrics = metrics_of(tree)
    return Measure(metrics[0]) if metrics else ACCURACY


def with_own_data(config: Tree, summary: Tree) -> dict[str, Any]:
    """Return a configuration in which a run on data of one's own has what else sets it apart: its model and metric."""
    metrics = metrics_of(summary)
    if not metrics:
        return dict(config)
    model = {key: summary[key] for key in OWN_DATA_KEYS[:2] if summary.get(key) is not None}
    model["metric"] = metrics[0].label + (", higher is better" if metrics[0].better == "higher" else "")
    return {**config, "data": {"dataset": "own data"}, "local": model}


def values_so_far(metrics: Sequence[Metric], rows: Rows) -> dict[str, Any]:
    """Return what a summary says of metrics, from a run's rows."""
    if not metrics:
        return {}
    last = {metric.name: last_of(rows, f"val_{metric.name}") for metric in metrics}
    return {
        "best": metrics[0].best(row.get(f"val_{metrics[0].name}") for row in rows),
        "last": {name: value for name, value in last.items() if value is not None},
    }


def last_of(rows: Rows, column: str) -> float | None:
    """Return a column's last value that is known."""
    return next((row[column] for row in reversed(rows) if row.get(column) is not None), None)


# ---- tables --------------------------------------------------------------------------------------------------------


class Columns:
    """Columns of a table of runs: their measure's, or, where runs differ in it, ones whose cells name it.

    Args:
        measures: Measures of the runs in the table.
        kinds: Kinds of the columns, in order: "result", "best", "beside".
    """

    _ANY: ClassVar[dict[str, str]] = {"result": "result", "best": "best in validation", "beside": "beside it"}

    def __init__(self, measures: Iterable[Measure], *kinds: str) -> None:
        found = list(dict.fromkeys(measures)) or [ACCURACY]
        self.is_mixed = len(found) > 1
        self.headings = tuple(self._ANY[kind] if self.is_mixed else found[0].heading(kind) for kind in kinds)

    def cell(self, measure: Measure, kind: str, shown: float | None, sd: float | None = None) -> str:
        """Return a cell's text; "-" for no number."""
        if shown is None or not self.is_mixed:
            return measure.number(shown, sd)
        return f"{measure.words[kind]} {measure.text(shown, sd)}"


# ---- words ---------------------------------------------------------------------------------------------------------


def first_upper(words: str) -> str:
    """Return words with a capital letter, the rest as it is: "BLEU of dev" stays so."""
    return words[:1].upper() + words[1:]


def file_name(name: str) -> str:
    """Return a metric's name as the beginning of a file's name."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_") or "metric"


def distinct(keys: Iterable[str]) -> Iterator[str]:
    """Yield names of files, with a number where one was there before."""
    seen: set[str] = set()
    for key in keys:
        number, own = 2, key
        while own in seen:
            number, own = number + 1, f"{key}_{number}"
        seen.add(own)
        yield own

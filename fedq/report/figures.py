"""Figures of few-bit models from runs' folders: PNG, SVG, and the numbers as CSV.

Each figure is a function from arms to rows (what the CSV holds) and one that draws them. Nothing is computed that the
runs' files do not say.
"""

from __future__ import annotations

import csv
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedq.errors import FieldError
from fedq.report.arms import FLOAT_BITS, Arm, Run, group, read_runs
from fedq.report.deployed import deployed_models
from fedq.report.metric import ACCURACY, Measure, distinct, file_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Rows = list[dict[str, Any]]

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7F7F7F")
"""Okabe and Ito's palette, which colour-blind readers can tell apart."""


@dataclass(frozen=True)
class _Kind:
    """A figure: its file's name, its rows, how they are drawn, and what runs need to have for it."""

    name: str
    rows: Callable[[Sequence[Arm]], Rows]
    draw: Callable[[Rows], Figure]
    needs: str


def write_figures(paths: Sequence[Path], out: Path) -> list[str]:
    """Write every figure that the runs have data for.

    Args:
        paths: Folders of runs.
        out: Folder of ``<figure>.png``, ``.svg`` and ``.csv``; made if it does not exist.

    Returns:
        A line for each figure: that it was written, or why not.

    Raises:
        FieldError: No run is finished, matplotlib is missing, or the folder cannot be written.
    """
    arms = group(read_runs(paths))
    check_matplotlib()
    make_folder(out)
    lines = []
    for kind in _kinds(arms):
        rows = kind.rows(arms)
        if not rows:
            lines.append(f"{kind.name}: left out, needs {kind.needs}")
            continue
        _write_csv(out / f"{kind.name}.csv", rows)
        with figure_style():
            figure = kind.draw(rows)
            for suffix in ("png", "svg"):
                figure.savefig(out / f"{kind.name}.{suffix}", metadata={"Date": None} if suffix == "svg" else None)
        lines.append(f"{kind.name}: {out / kind.name}.png, .svg, .csv")
    return lines


def check_matplotlib() -> None:
    """Raise a `FieldError` if matplotlib is missing."""
    try:
        import matplotlib as mpl  # noqa: F401
    except ImportError:
        raise FieldError("figures", "matplotlib", "installed: pip install matplotlib") from None


def make_folder(out: Path) -> None:
    """Make the folder that files go to, with a `FieldError` if that cannot be done."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FieldError("out", str(out), f"a folder that can be written ({error.strerror})") from None


def _write_csv(path: Path, rows: Rows) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


@contextmanager
def figure_style() -> Iterator[None]:
    """Draw in the project's style inside a with statement."""
    from cycler import cycler
    from matplotlib import rc_context

    own: dict[Any, Any] = {
        "axes.prop_cycle": cycler(color=COLOURS),
        "axes.grid": True,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "figure.constrained_layout.use": True,
        "font.size": 10,
        "grid.alpha": 0.3,
        "legend.frameon": False,
        "savefig.dpi": 160,
        "svg.fonttype": "none",
        "svg.hashsalt": "fedq",
    }
    with rc_context(own):
        yield


def _grid(height: int, width: int, size: tuple[float, float]) -> tuple[Figure, Any]:
    """Return a figure and its axes, [height, width]; without pyplot, which would look for a screen."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size)
    return figure, figure.subplots(height, width, sharex=True, squeeze=False)


def figure_axes(size: tuple[float, float] = (6.4, 4.0)) -> tuple[Figure, Axes]:
    """Return a figure and its only axes; size in inches."""
    figure, grid = _grid(1, 1, size)
    return figure, grid[0, 0]


def without_formulas(words: str) -> str:
    """Return words that matplotlib shows as they are."""
    return words.replace("\\", "\\\\").replace("$", r"\$")


def _mean_sd(values: Sequence[float]) -> tuple[float, float]:
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


# ---- accuracy against bits -----------------------------------------------------------------------------------------


def _bits_rows(arms: Sequence[Arm]) -> Rows:
    """Return one row an image arm of one bit width; arms of a series differ in their bits alone."""
    rows = []
    for arm in arms:
        if arm.first.bits is None or arm.first.measure != ACCURACY:
            continue
        mean, sd = _mean_sd([100 * run.summary["test_accuracy"] for run in arm.runs])
        ways = [sum(run.summary[f"{way}_bytes"] for way in ("uplink", "downlink")) / 1e6 for run in arm.runs]
        rows.append(
            {
                "series": arm.first.algorithm,
                "arm": arm.name,
                "bits": arm.first.bits,
                "weights": arm.first.spec,
                "test_accuracy_mean": mean,
                "test_accuracy_sd": sd,
                "num_seeds": len(arm.runs),
                "megabytes_mean": statistics.fmean(ways),
            }
        )
    return rows if len({row["bits"] for row in rows}) > 1 else []


def _draw_bits(rows: Rows) -> Figure:
    figure, axes = figure_axes()
    for number, series in enumerate(sorted({row["series"] for row in rows})):
        own = [row for row in rows if row["series"] == series]
        colour = COLOURS[number % len(COLOURS)]
        few = [row for row in own if row["bits"] != FLOAT_BITS]
        if few:
            num = max(row["num_seeds"] for row in own)
            axes.errorbar(
                [row["bits"] for row in few],
                [row["test_accuracy_mean"] for row in few],
                yerr=[row["test_accuracy_sd"] for row in few],
                fmt="o",
                capsize=3,
                color=colour,
                label=f"{series}: mean and sd of {num} seeds" if num > 1 else f"{series}, one seed",
            )
        for row in (row for row in own if row["bits"] == FLOAT_BITS):
            mean, sd = row["test_accuracy_mean"], row["test_accuracy_sd"]
            axes.axhline(mean, color=colour, linestyle="--", label=f"{series}, float32: {mean:.1f}")
            axes.axhspan(mean - sd, mean + sd, color=colour, alpha=0.12, linewidth=0)
    bits = sorted({row["bits"] for row in rows if row["bits"] != FLOAT_BITS})
    axes.set_xscale("log", base=2)
    axes.set_xticks(bits, [f"{b:g}" for b in bits])
    axes.minorticks_off()
    axes.set(xlabel="bits of a weight", ylabel="test accuracy, %")
    axes.legend()
    return figure


# ---- accuracy or another metric against megabytes ------------------------------------------------------------------


def _bytes_rows(arms: Sequence[Arm], measure: Measure = ACCURACY) -> Rows:
    """Return one row an arm and evaluated round: means of what it is judged by and of bytes both ways."""
    rows, column = [], f"val_{measure.metric.name}"
    for arm in (arm for arm in arms if arm.first.measure == measure):
        by_round: dict[int, list[tuple[float, float]]] = {}
        for run in arm.runs:
            for row in run.metrics():
                if row.get(column) is not None and row.get("uplink_bytes") is not None:
                    megabytes = (row["uplink_bytes"] + row["downlink_bytes"]) / 1e6
                    by_round.setdefault(row["round"], []).append((megabytes, measure.scale * row[column]))
        for round, points in sorted(by_round.items()):
            if len(points) < len(arm.runs):  # a seed that stopped earlier: no mean of all
                continue
            mean, sd = _mean_sd([shown for _, shown in points])
            rows.append(
                {
                    "arm": arm.name,
                    "round": round + 1,
                    "megabytes": statistics.fmean(megabytes for megabytes, _ in points),
                    f"{column}_mean": mean,
                    f"{column}_sd": sd,
                    "num_seeds": len(points),
                }
            )
    return rows if any(row["megabytes"] for row in rows) else []


def _draw_bytes(rows: Rows, measure: Measure = ACCURACY) -> Figure:
    from matplotlib.ticker import LogLocator

    mean_sd = [f"val_{measure.metric.name}_{end}" for end in ("mean", "sd")]
    figure, axes = figure_axes()
    for number, arm in enumerate(dict.fromkeys(row["arm"] for row in rows)):
        own = [row for row in rows if row["arm"] == arm and row["megabytes"] > 0]
        x, mean, sd = ([row[key] for row in own] for key in ("megabytes", *mean_sd))
        colour = COLOURS[number % len(COLOURS)]
        line = "-" if number < len(COLOURS) else "--"
        axes.plot(x, mean, color=colour, linestyle=line, marker=".", label=arm)
        low, high = ([m + sign * s for m, s in zip(mean, sd, strict=True)] for sign in (-1, 1))
        axes.fill_between(x, low, high, color=colour, alpha=0.12, linewidth=0)
    axes.set_xscale("log", subs=[])
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set(xlabel="megabytes up and down, all clients", ylabel=f"validation {without_formulas(measure.metric.label)}")
    axes.legend(fontsize=8)
    return figure


# ---- histograms of weights -----------------------------------------------------------------------------------------


def _histogram_rows(arms: Sequence[Arm]) -> Rows:
    """Return the bins of one convolution's weights as they are deployed, of each arm's first seed.

    From the histograms that were logged last, or from the models that a run has left: clients' own, and those of runs
    that log no histograms.
    """
    tables = [[] if arm.first.table("personal") else arm.first.table("histograms") for arm in arms]
    tensor = _one_tensor(tables)
    rows = []
    for arm, table in zip(arms, tables, strict=True):
        logged = [row for row in table if row["tensor"] == tensor]
        stages = {row["stage"]: row for row in sorted(logged, key=lambda row: row["round"])}
        chosen = stages.get("deployed") or stages.get("weight")
        if chosen is not None:
            shares = [count / chosen["num"] for count in chosen["counts"]]
            bins = list(zip(chosen["edges"], chosen["edges"][1:], shares, strict=False))
            rows += _bin_rows(arm.name, arm.first.bits, tensor, chosen["round"], bins)
            continue
        for model in deployed_models(arm.first):
            name, bins = model.histogram()
            title = ": ".join(filter(None, (arm.name, model.words)))
            rows += _bin_rows(title, model.bits, name, model.round, bins)
    return rows


def _bin_rows(
    arm: str, bits: float | None, tensor: str, round: int, bins: Sequence[tuple[float, float, float]]
) -> Rows:
    place = {"arm": arm, "bits": bits, "tensor": tensor, "round": round + 1}
    return [place | {"from": low, "to": high, "share": share} for low, high, share in bins]


def _one_tensor(tables: Sequence[Rows]) -> str:
    """Return the first tensor that has few bits in as many arms as possible, or else the second that was logged."""
    counts: Counter[str] = Counter()
    names: list[str] = []
    for rows in tables:
        counts.update(dict.fromkeys((row["tensor"] for row in rows if row["stage"] == "deployed"), 1))
        names = names or list(dict.fromkeys(row["tensor"] for row in rows))
    if counts:
        return counts.most_common(1)[0][0]
    return names[min(1, len(names) - 1)] if names else ""


def _draw_histograms(rows: Rows) -> Figure:
    names = list(dict.fromkeys(row["arm"] for row in rows))
    width = min(4, len(names))
    height = -(-len(names) // width)
    figure, grid = _grid(height, width, (3 * width, 2.4 * height))
    for axes, name in zip(grid.flat, names, strict=False):
        own = [row for row in rows if row["arm"] == name]
        edges = [row["from"] for row in own]
        axes.bar(edges, [row["share"] for row in own], width=[row["to"] - row["from"] for row in own], align="edge")
        axes.set_title(name, fontsize=9)
    for number, axes in enumerate(grid.flat):
        axes.set_visible(number < len(names))
        axes.tick_params(labelbottom=number + width >= len(names))  # of the last one shown in each column
    figure.supxlabel(f"weights of {', '.join(dict.fromkeys(row['tensor'] for row in rows))}, as deployed")
    figure.supylabel("share")
    return figure


# ---- centres -------------------------------------------------------------------------------------------------------


def _centre_rows(arms: Sequence[Arm]) -> Rows:
    """Return learned centres by round, of the first client that has some, of each arm's first seed."""
    rows = []
    for arm in arms:
        logged = arm.first.table("centres")
        clients = {row["client"] for row in logged}
        for row in logged:
            if row["client"] == min(clients):
                rows.append({"arm": arm.name, **row, "round": row["round"] + 1})
    return rows


def _draw_centres(rows: Rows) -> Figure:
    pairs = list(dict.fromkeys((row["arm"], row["layer"]) for row in rows))
    arms = list(dict.fromkeys(arm for arm, _ in pairs))
    layers = list(dict.fromkeys(layer for _, layer in pairs))
    shown = [layers[i] for i in sorted({0, len(layers) // 2, len(layers) - 1})]
    figure, grid = _grid(len(arms), len(shown), (3 * len(shown), 2.2 * len(arms)))
    for line, arm in zip(grid, arms, strict=True):
        for axes, layer in zip(line, shown, strict=True):
            own = [row for row in rows if (row["arm"], row["layer"]) == (arm, layer)]
            for index in sorted({row["index"] for row in own}):
                points = sorted((row["round"], row["value"]) for row in own if row["index"] == index)
                axes.plot(*zip(*points, strict=True), color=COLOURS[index % len(COLOURS)], linewidth=1.2)
            axes.set_title(f"{arm}: {layer}", fontsize=8)
    figure.supxlabel("epoch")
    figure.supylabel("centres")
    return figure


# ---- clients -------------------------------------------------------------------------------------------------------


def _client_rows(arms: Sequence[Arm]) -> Rows:
    """Return every client's test accuracy with its own model, an arm and seed each."""
    rows = []
    for arm in arms:
        for run in arm.runs:
            for client, accuracy in _client_accuracies(run):
                rows.append(
                    {"arm": arm.name, "seed": run.summary["seed"], "client": client, "test_accuracy": 100 * accuracy}
                )
    return rows


def _client_accuracies(run: Run) -> list[tuple[int, float]]:
    if rows := run.table("personal"):
        return [(row["client"], row["test_accuracy"]) for row in rows]
    return list(enumerate(run.summary.get("client_test_accuracy", [])))


def _draw_clients(rows: Rows) -> Figure:
    names = list(dict.fromkeys(row["arm"] for row in rows))
    figure, axes = figure_axes((6.4 + 0.04 * max(map(len, names)), 1.2 + 0.35 * len(names)))
    for place, name in enumerate(names):
        own = [row["test_accuracy"] for row in rows if row["arm"] == name]
        axes.plot(own, [place] * len(own), "o", color=COLOURS[0], alpha=0.35, markersize=5)
        axes.plot([statistics.fmean(own)], [place], "|", color=COLOURS[1], markersize=16, markeredgewidth=2.5)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.invert_yaxis()
    axes.set(xlabel="test accuracy of each client, % (bar: mean)")
    return figure


KINDS = (
    _Kind("accuracy_by_bits", _bits_rows, _draw_bits, "runs of at least two bit widths"),
    _Kind("accuracy_by_megabytes", _bytes_rows, _draw_bytes, "runs that exchange something"),
    _Kind("weight_histograms", _histogram_rows, _draw_histograms, "runs with histograms of weights, or their models"),
    _Kind("centres", _centre_rows, _draw_centres, "runs with learned centres (--algorithm quped)"),
    _Kind("client_accuracy", _client_rows, _draw_clients, "runs in which clients are tested one by one"),
)
"""All figures of image runs."""


def _kinds(arms: Sequence[Arm]) -> list[_Kind]:
    """Return all figures; what is drawn against megabytes is what arms are judged by, a figure each."""
    bits, by_megabytes, *others = KINDS
    measures = sorted({arm.first.measure: None for arm in arms}, key=lambda measure: measure != ACCURACY)
    names = distinct(f"{file_name(measure.metric.name)}_by_megabytes" for measure in measures)
    found = [
        replace(by_megabytes, name=name, rows=partial(_bytes_rows, measure=m), draw=partial(_draw_bytes, measure=m))
        for m, name in zip(measures, names, strict=True)
    ]
    return [bits, *found, *others]

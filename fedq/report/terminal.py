"""What a person sees in the terminal: the first lines, the progress of the rounds, the summary of a finished run.

The summary is read from the run's files and from nothing else, so it can be printed again later. Only one rank prints:
the caller decides which.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedq.errors import FieldError
from fedq.report.encoding import make_readable
from fedq.report.metric import Measure, metrics_of
from fedq.text import human_bytes

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

NETWORK_SERVER = "fedq server"
"""Name of the launcher in the summary of a run whose clients came over a network."""
_DOWNLINK_RULES = {
    "cohort": "charged to each round's cohort",
    "all": "charged to every client",
    NETWORK_SERVER: "as sent, the final model included",
}
_LABEL_WIDTH = len("balanced accuracy")
_MAX_LEFT_OUT = 5  # lines; the rest is counted


def human_seconds(seconds: float) -> str:
    """Return a duration: "0.42 s", "95.3 s", "2 min 35 s", "3 h 05 min"."""
    if seconds < 119.95:
        return f"{seconds:.2g} s" if seconds < 1 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def read_summary(folder: Path) -> dict[str, Any]:
    """Return a run's `summary.json`.

    Raises:
        FieldError: The folder holds no summary, or one that cannot be read.
    """
    try:
        summary = json.loads((Path(folder) / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FieldError("folder", str(folder), "the folder of a finished run, with a summary.json") from error
    if not isinstance(summary, dict):
        raise FieldError("folder", str(folder), "the folder of a finished run, whose summary.json is an object")
    return summary


def print_summary(folder: Path, console: Console | None = None) -> None:
    """Print what a run learned and what it cost; a figure that the summary lacks is "-".

    Args:
        folder: A run's folder.
        console: Console to print on. Default: standard output. One that is no terminal gets plain lines of any length.

    Raises:
        FieldError: The folder is no run.
    """
    from rich.table import Table
    from rich.text import Text

    summary = read_summary(folder)
    console = console or _stdout()
    rows = _rows(summary)
    if console.is_terminal:
        table = Table(show_header=False, title="fedq run", title_justify="left", title_style="bold", pad_edge=False)
        table.add_column(style="cyan", no_wrap=True)
        table.add_column(overflow="fold")
        for label, value in rows:
            table.add_row(Text(label), Text(value))
        console.print(table)
    else:
        print_header([f"{label:<{_LABEL_WIDTH}} {value}" for label, value in rows], console)
    print_header(
        [f"{'run':<{_LABEL_WIDTH}} {folder}"], console
    )  # never inside the table, where a long path would be cut


def print_header(lines: Sequence[str], console: Console | None = None) -> None:
    """Print lines as they are: no wrapping, no markup."""
    console = console or _stdout()
    for line in lines:
        console.print(line, soft_wrap=True, markup=False, highlight=False, emoji=False)


class RoundProgress:
    """Show how far the rounds are: a live bar in a terminal, one plain line a round elsewhere."""

    def __init__(self, total_rounds: int, console: Console, bar: tuple[Progress, TaskID] | None, noun: str) -> None:
        self._total_rounds = total_rounds
        self._console = console
        self._bar = bar
        self._noun = noun
        self._started = time.monotonic()

    def update(self, round: int, text: str) -> None:
        """Say that a round is finished.

        Args:
            round: Number of rounds finished so far: 1 after the first.
            text: Words to show beside it, for example the validation accuracy and the bytes so far.
        """
        if self._bar is not None:
            progress, task = self._bar
            progress.update(task, completed=round, text=text)
        else:
            elapsed = human_seconds(time.monotonic() - self._started)
            print_header([f"{self._noun} {round}/{self._total_rounds}  {text}  ({elapsed})"], self._console)


@contextmanager
def round_progress(
    total_rounds: int, enabled: bool, console: Console | None = None, noun: str = "round"
) -> Iterator[RoundProgress]:
    """Give a `RoundProgress` while the rounds run.

    Args:
        total_rounds: Rounds of the whole job.
        enabled: False on the ranks that print nothing.
        console: Console to print on. Default: standard output.
        noun: Word for a round.
    """
    console = (console or _stdout()) if enabled else _nowhere()
    if not console.is_terminal or console.quiet:
        yield RoundProgress(total_rounds, console, None, noun)
        return
    with _bar(console) as progress:
        task = progress.add_task(noun, total=total_rounds, text="")
        yield RoundProgress(total_rounds, console, (progress, task), noun)


def _bar(console: Console) -> Progress:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.table import Column

    return Progress(
        TextColumn("{task.description}"),
        MofNCompleteColumn(),
        BarColumn(bar_width=16),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[text]}", markup=False, table_column=Column(no_wrap=True)),
        console=console,
        refresh_per_second=2,  # the bar shares the CPU with training
        speed_estimate_period=24 * 3600,  # a round may take minutes: keep them all in the estimate
    )


def _stdout() -> Console:
    from rich.console import Console

    make_readable()
    return Console()


def _nowhere() -> Console:
    from rich.console import Console

    return Console(quiet=True)


def _rows(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    def get(key: str) -> str:
        return "-" if summary.get(key) is None else str(summary[key])

    per = "an epoch" if summary.get("exchange") == "step" else "a round"
    where = ", ".join(_present(summary, "launcher", "backend", "device"))
    is_server = summary.get("launcher") == NETWORK_SERVER
    ranks = where if is_server else f"{_count(summary, 'world_size', 'rank')} ({where})"
    return [
        ("data", get("dataset")),
        ("model", f"{get('model')}, {_count(summary, 'num_params', 'parameter')}"),
        ("job", f"{_work(summary, get('server'))}, {ranks}"),
        *_reached(summary),
        *_exchange(summary, get("uplink"), get("downlink")),
        *_packed(summary),
        _crossed(summary),
        ("time", f"{_seconds(summary.get('seconds'))}, {_seconds(summary.get('seconds_per_round'))} {per}"),
        *_left_out(summary.get("left_out") or []),
    ]


def _reached(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return what the run is judged by: accuracies, or of data of one's own every metric, the first at its best too."""
    metrics = metrics_of(summary)
    if not metrics:
        return [
            ("test accuracy", f"{_percent(summary.get('test_accuracy'))}{_spread(summary)}"),
            ("balanced accuracy", _percent(summary.get("test_balanced_accuracy"))),
            ("best validation", _percent(summary.get("best_val_accuracy"))),
        ]
    first, *others = [(metric, Measure(metric).last(summary)) for metric in metrics]
    metric, last = first
    best = Measure(metric).best(summary)
    words = f"{metric.text(last)}, best {metric.text(best)} ({metric.better} is better)"
    rows = [(metric.name, "- (never evaluated)" if last is None and best is None else words)]
    return rows + [(metric.name, metric.text(last)) for metric, last in others]


def _exchange(summary: Mapping[str, Any], uplink: str, downlink: str) -> list[tuple[str, str]]:
    if summary.get("exchange") == "none" or summary.get("algorithm") == "local":
        return [("exchange", "none: clients trained alone, nothing was sent")]
    up = _cost(summary.get("uplink_bytes"), summary.get("uplink_bytes_fp32"))
    down = _cost(summary.get("downlink_bytes"), summary.get("downlink_bytes_fp32"))
    if summary.get("exchange") == "step":
        second = f"{downlink}: {down}" if summary.get("downlink_bytes") else "none: one leg reaches everyone"
        return [("first leg", f"{uplink}: {up}"), ("second leg", second)]
    rule = summary.get("downlink_to")
    if summary.get("launcher") == NETWORK_SERVER:
        rule = NETWORK_SERVER
    charged = f", {_DOWNLINK_RULES.get(rule, rule)}" if rule else ""
    return [("uplink", f"{uplink}: {up}"), ("downlink", f"{downlink}: {down}{charged}")]


def _packed(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the size of the few-bit model's file, if there is one."""
    if summary.get("packed_bytes") is None:
        return []
    cost = _cost(summary["packed_bytes"], summary.get("packed_bytes_fp32"))
    return [("packed model", f"{summary.get('weights', '-')}: {cost}")]


def _spread(summary: Mapping[str, Any]) -> str:
    """Return how clients' accuracies differ, where each is tested on its own classes."""
    spread = summary.get("personal_test_accuracy")
    if not spread or spread["mean"] is None:
        return ""
    low, high = (_percent(spread[key]) for key in ("min", "max"))
    return f", mean of the clients on their own classes (sd {100 * spread['sd']:.2f}, {low} to {high})"


def _crossed(summary: Mapping[str, Any]) -> tuple[str, str]:
    """Return what crossed between ranks, or between a server and its clients."""
    crossed = f"{_bytes(summary.get('wire_bytes'))} in all"
    if summary.get("launcher") == NETWORK_SERVER:
        return "on the network", f"{crossed}, {_bytes(summary.get('root_ingress_bytes'))} of it to the server"
    return "between ranks", crossed + _root_ingress(summary)


def _root_ingress(summary: Mapping[str, Any]) -> str:
    """Return what came to rank 0, and whether that is where all updates went."""
    if not summary.get("root_ingress_bytes"):
        return ""
    return f", {_bytes(summary['root_ingress_bytes'])} of it to rank 0 (aggregate {summary.get('aggregate', '-')})"


def _work(summary: Mapping[str, Any], server: str) -> str:
    if summary.get("exchange") == "step":
        return f"{_count(summary, 'rounds', 'epoch')}, gradients averaged in every step"
    return f"{_clients(summary)}{_count(summary, 'rounds', 'round')}, server {server}"


def _clients(summary: Mapping[str, Any]) -> str:
    if summary.get("num_clients") is None:
        return ""
    cohort = summary.get("cohort")
    return f"{_count(summary, 'num_clients', 'client')}, {'-' if cohort is None else cohort} a round, "


def _left_out(left_out: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    lines = [
        f"client {one.get('client', '-')} in round {one.get('round', '-')}: {one.get('reason', '-')}"
        for one in left_out[:_MAX_LEFT_OUT]
    ]
    if len(left_out) > _MAX_LEFT_OUT:
        lines.append(f"and {len(left_out) - _MAX_LEFT_OUT} more, see clients.parquet")
    return [("left out" if number == 0 else "", line) for number, line in enumerate(lines)]


def _present(summary: Mapping[str, Any], *keys: str) -> list[str]:
    return [str(summary[key]) for key in keys if summary.get(key) is not None] or ["-"]


def _count(summary: Mapping[str, Any], key: str, noun: str) -> str:
    value = summary.get(key)
    return f"- {noun}s" if value is None else f"{value:,} {noun}{'' if value == 1 else 's'}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.2f} %"


def _bytes(n: float | None) -> str:
    return "-" if n is None else human_bytes(n)


def _seconds(seconds: float | None) -> str:
    return "-" if seconds is None else human_seconds(seconds)


def _cost(sent: float | None, fp32: float | None) -> str:
    """Return the bytes beside what float32 would have cost: "5.72 MB, float32 44.8 MB, 12.8 %, 7.8x less"."""
    words = f"{_bytes(sent)}, float32 {_bytes(fp32)}"
    if not sent or not fp32:
        return words
    ratio = fp32 / sent
    if math.isclose(ratio, 1, rel_tol=0.05):
        comparison = "about the same"
    else:
        comparison = f"{_digits(ratio)}x less" if ratio > 1 else f"{_digits(1 / ratio)}x more"
    return f"{words}, {_digits(100 / ratio)} %, {comparison}"


def _digits(x: float) -> str:
    return f"{x:.0f}" if x >= 100 else f"{x:.1f}" if x >= 1 else f"{x:.2g}"

"""Several runs side by side, as one Markdown table, from their summaries alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from fedq.report.metric import Columns, measure_of
from fedq.report.runs import RunStatus
from fedq.text import human_bytes

_BEFORE = ("run", "uplink", "downlink", "rounds")
_AFTER = ("up", "of float32", "down", "of float32", "seconds")


def comparison(runs: Sequence[RunStatus]) -> str:
    """Return a Markdown table with one line a run: accuracy, bytes both ways and what float32 would cost, seconds.

    A run on data of one's own has its first metric, of the last model and at best, in place of the accuracies. A run
    that is not finished has a line too, with its state in place of the accuracy, so that none is missed.
    """
    columns = Columns((run.measure for run in runs if run.state == "finished"), "result", "beside")
    rows = [(*_BEFORE, *columns.headings, *_AFTER), *(_row(run, columns) for run in runs)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rule = ["-" * width for width in widths]
    lines = [rows[0], rule, *rows[1:]]
    padded = ([cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in padded)


def _row(run: RunStatus, columns: Columns) -> tuple[str, ...]:
    if run.state != "finished":
        rounds = f"{run.rounds}/{run.total_rounds or '-'}"
        return (run.path.name, "-", "-", rounds, run.state, *("-",) * 6)
    summary = json.loads((run.path / "summary.json").read_text(encoding="utf-8"))
    measure = measure_of(summary)
    results = {"result": measure.last(summary), "beside": measure.beside(summary)}
    return (
        run.path.name,
        summary["uplink"],
        summary["downlink"],
        str(run.rounds),
        *(_escaped(columns.cell(measure, kind, measure.shown(value))) for kind, value in results.items()),
        *_bytes(summary, "uplink"),
        *_bytes(summary, "downlink"),
        f"{summary['seconds']:.1f}",
    )


def _escaped(cell: str) -> str:
    return cell.replace("|", "\\|")


def _bytes(summary: dict[str, Any], direction: str) -> tuple[str, str]:
    """Return the payload bytes of a direction and their share of float32's."""
    payload, raw = summary[f"{direction}_bytes"], summary[f"{direction}_bytes_fp32"]
    return human_bytes(payload), f"1/{raw / payload:.1f}" if payload and raw else "-"

"""Several runs side by side, as one Markdown table, from their summaries alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from fedq.report.runs import RunStatus
from fedq.report.terminal import human_bytes

_HEADINGS = (
    "run",
    "uplink",
    "downlink",
    "rounds",
    "test accuracy, %",
    "balanced accuracy, %",
    "up",
    "of float32",
    "down",
    "of float32",
    "seconds",
)


def comparison(runs: Sequence[RunStatus]) -> str:
    """Return a Markdown table with one line a run: accuracy, bytes both ways and what float32 would cost, seconds.

    A run that is not finished has a line too, with its state in place of the accuracy, so that none is missed.
    """
    rows = [_HEADINGS, *map(_row, runs)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rule = ["-" * width for width in widths]
    lines = [rows[0], rule, *rows[1:]]
    padded = ([cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in padded)


def _row(run: RunStatus) -> tuple[str, ...]:
    if run.state != "finished":
        rounds = f"{run.rounds}/{run.total_rounds or '-'}"
        return (run.path.name, "-", "-", rounds, run.state, *("-",) * 6)
    summary = json.loads((run.path / "summary.json").read_text(encoding="utf-8"))
    balanced = summary.get("test_balanced_accuracy")  # a run of an earlier version has none
    return (
        run.path.name,
        summary["uplink"],
        summary["downlink"],
        str(run.rounds),
        f"{100 * summary['test_accuracy']:.2f}",
        "-" if balanced is None else f"{100 * balanced:.2f}",
        *_bytes(summary, "uplink"),
        *_bytes(summary, "downlink"),
        f"{summary['seconds']:.1f}",
    )


def _bytes(summary: dict[str, Any], direction: str) -> tuple[str, str]:
    """Return the payload bytes of a direction and their share of float32's."""
    payload, raw = summary[f"{direction}_bytes"], summary[f"{direction}_bytes_fp32"]
    return human_bytes(payload), f"1/{raw / payload:.1f}" if payload and raw else "-"

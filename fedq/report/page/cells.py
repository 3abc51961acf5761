"""Tables as the page and the terminal show them: rounded, with units, beside the exact numbers of the CSV."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from fedq.report.metric import Columns, Measure
from fedq.report.page.cautions import human_bandwidth
from fedq.report.page.diagram import arrow_words
from fedq.report.page.study import ArmEvidence, Figure, Payoff, Study, settings
from fedq.report.page.tables import entropy_rows, interface_rows, phase_rows
from fedq.report.terminal import human_seconds
from fedq.text import human_bytes


class Cell(NamedTuple):
    """A table's cell: what is shown, and what it is sorted by (None: its text)."""

    text: str
    sort: float | None = None


@dataclass(frozen=True)
class Shown:
    """A table.

    Args:
        headers: Headers of the columns, with their units.
        rows: Cells of each row.
        csv: Name of the file with the exact numbers; empty: there is none.
    """

    headers: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    csv: str = ""

    def is_number(self, column: int) -> bool:
        """Whether a column holds numbers, but for cells without a value."""
        cells = [row[column] for row in self.rows]
        return any(cell.sort is not None for cell in cells) and all(c.sort is not None or c.text == "-" for c in cells)


def number(value: float | None, digits: int = 2, sort: float | None = None) -> Cell:
    """Return a number with so many digits after the point, or "-"."""
    return Cell("-") if value is None else Cell(f"{value:,.{digits}f}", value if sort is None else sort)


def judged_cell(columns: Columns, measure: Measure, kind: str, figure: Figure | None) -> Cell:
    """Return mean ± sd; sorted by its number only where all are of one measure."""
    if figure is None:
        return Cell("-")
    return Cell(columns.cell(measure, kind, figure.mean, figure.sd), None if columns.is_mixed else figure.mean)


def bytes_cell(nbytes: float | None) -> Cell:
    """Return bytes in the unit a person would choose."""
    return Cell("-") if nbytes is None else Cell(human_bytes(nbytes), nbytes)


def seconds_cell(figure: Figure | None) -> Cell:
    """Return a mean duration with its sd."""
    if figure is None:
        return Cell("-")
    spread = "" if figure.sd is None else f" ± {human_seconds(figure.sd)}"
    return Cell(human_seconds(figure.mean) + spread, figure.mean)


def pays_words(arm: ArmEvidence, payoff: Payoff | None) -> str:
    """Return whether an arm pays in time against the float32 arm."""
    if arm.is_float32:
        return "is float32"
    if payoff is None:
        return "nothing is sent" if arm.exchange == "none" else "no float32 run beside it"
    if payoff.break_even == 0:
        return "on no link: sends no less"
    if payoff.break_even is None:
        return "on any link: computes as long"
    if payoff.break_even == float("inf"):
        return "on any link: computes less"
    return f"below {human_bandwidth(payoff.break_even)}"


def results_table(study: Study) -> Shown:
    """Return one row an arm: its result, bytes both ways, seconds, whether it pays."""
    columns = Columns(study.measures, "result", "best")
    headers = ("arm", *columns.headings, "up (beside float32)", "down (beside float32)")
    headers += ("measured time", "pays in time", "seeds")
    rows = []
    for arm in study.arms:
        payoff = study.payoff(arm)
        done = sum(one.is_finished for one in arm.all_runs)
        seeds = f"{done}" if done == len(arm.all_runs) else f"{done} of {len(arm.all_runs)}"
        limit = payoff.break_even if payoff else None
        rows.append(
            [
                Cell(arm.name),
                judged_cell(columns, arm.measure, "result", arm.result) if arm.is_finished else Cell(arm.first.state),
                judged_cell(columns, arm.measure, "best", arm.best),
                *(_sent(arm, way) for way in ("uplink", "downlink")),
                seconds_cell(arm.seconds),
                Cell(pays_words(arm, payoff), limit if limit != float("inf") else 1e30),
                Cell(seeds, done),
            ]
        )
    return Shown(headers, rows, "arms")


def _sent(arm: ArmEvidence, way: str) -> Cell:
    sent, less = arm.mean(f"{way}_bytes"), arm.times_less(way)
    if less is None:
        return bytes_cell(sent)
    return Cell(
        f"{human_bytes(sent)} ({less:.3g}x less)" if less > 1.02 else f"{human_bytes(sent)} ({less:.3g}x)", sent
    )


def same_settings(study: Study) -> Shown:
    """Return the settings that all runs share."""
    own = [settings(one) for one in study.runs]
    keys = dict.fromkeys(key for one in own for key in one)
    shared = [key for key in keys if len({repr(one.get(key)) for one in own}) == 1]
    return Shown(("setting", "value"), [[Cell(key), Cell(_value(own[0].get(key)))] for key in shared], "runs")


def other_settings(study: Study) -> Shown:
    """Return the settings in which arms differ, of each arm's first run."""
    own = [settings(arm.first) for arm in study.arms]
    keys = dict.fromkeys(key for one in own for key in one)
    differing = [key for key in keys if len({repr(one.get(key)) for one in own}) > 1 and key != "run.out"]
    rows = [
        [Cell(arm.name), *(Cell(_value(one.get(key))) for key in differing)]
        for arm, one in zip(study.arms, own, strict=True)
    ]
    return Shown(("arm", *(key.partition(".")[2].replace("_", " ") for key in differing)), rows if differing else [])


def _value(value: Any) -> str:
    return "-" if value is None or value == "" else str(value)


def places(study: Study) -> Shown:
    """Return the machines, versions and commits that runs were made with, and how many runs by each."""
    counts: dict[tuple[str, ...], int] = {}
    for one in study.runs:
        summary = one.run.summary
        versions = summary.get("versions") or {}
        ranks = f"{summary.get('world_size') or '-'} ({summary.get('launcher') or '-'})"
        cores = f", {summary['cpu_count']} cores" if summary.get("cpu_count") else ""
        place = (
            f"{summary.get('cpu') or 'unknown'}{cores}",
            str(summary.get("gpu") or "none"),
            ranks,
            str(summary.get("precision") or "-"),
            ", ".join(f"{name} {version}" for name, version in versions.items() if version) or "-",
            str(summary.get("platform") or "-"),
            str(summary.get("git_commit") or "unknown"),
        )
        counts[place] = counts.get(place, 0) + 1
    headers = ("runs", "CPU", "GPU", "ranks", "precision", "versions", "platform", "commit")
    return Shown(headers, [[Cell(str(n), n), *map(Cell, place)] for place, n in counts.items()], "runs")


def bytes_table(study: Study) -> Shown:
    """Return each arm's first run: what each direction carried, a message and in all."""
    headers = ("arm", "direction", "codec", "messages", "a message", "in all", "float32", "bfloat16", "bits a value")
    rows = []
    for arm in study.arms:
        one = arm.first
        for way in ("uplink", "downlink"):
            sent, raw = (one.run.summary.get(f"{way}_bytes{end}") or 0 for end in ("", "_fp32"))
            if not sent:
                continue
            messages = one.bytes.messages.get(way, 0) if one.bytes else 0
            bits = Cell(f"{32 * sent / raw:.3g}", 32 * sent / raw) if raw else Cell("-")
            a_message = bytes_cell(sent / messages if messages else None)
            counts = [number(messages, 0), a_message, bytes_cell(sent), bytes_cell(raw), bytes_cell(raw / 2), bits]
            rows.append([Cell(arm.name), Cell(way), Cell(arrow_words(one, way)[0]), *counts])
    return Shown(headers, rows, "bytes_by_part")


def entropy_table(study: Study) -> Shown:
    """Return bits sent a code beside their entropy, each arm's first run."""
    first = {arm.first.name for arm in study.arms}
    headers = ("arm", "layer", "codes logged", "bits a code", "entropy, bits", "an entropy coder would save, %")
    rows = [
        [
            Cell(row["arm"]),
            Cell(row["tensor"]),
            number(row["codes"], 0),
            number(row["bits_a_code"], 3),
            number(row["entropy_bits_a_code"], 3),
            number(100 * (1 - row["entropy_bits_a_code"] / row["bits_a_code"]), 1) if row["bits_a_code"] else Cell("-"),
        ]
        for row in entropy_rows(study)
        if row["run"] in first
    ]
    return Shown(headers, rows, "entropy_of_codes")


def phase_table(study: Study) -> Shown:
    """Return seconds by phase, each arm's first run: exposed, hidden, and the share of all."""
    first = {arm.first.name for arm in study.arms}
    found = [row for row in phase_rows(study) if row["run"] in first]
    totals: dict[str, float] = {}
    for row in found:
        totals[row["run"]] = totals.get(row["run"], 0.0) + row["seconds"]
    rows = [
        [
            Cell(row["arm"]),
            Cell(row["phase"]),
            number(row["seconds"], 3),
            number(row["hidden_seconds"], 3),
            number(100 * row["seconds"] / totals[row["run"]] if totals[row["run"]] else None, 1),
            number(row["calls_a_rank"], 0),
        ]
        for row in found
    ]
    return Shown(("arm", "phase", "exposed, s", "hidden, s", "of the rounds, %", "calls a rank"), rows, "phases")


def interface_table(study: Study) -> Shown:
    """Return interface counters beside counted bytes."""
    rows = [
        [
            Cell(row["run"]),
            Cell(str(row["host"])),
            Cell(str(row["interface"])),
            bytes_cell(row["sent"]),
            bytes_cell(row["received"]),
            bytes_cell(row.get("counted")),
            number(row.get("ratio"), 4),
        ]
        for row in interface_rows(study)
    ]
    return Shown(("run", "host", "interface", "sent", "received", "counted", "sent / counted"), rows, "interfaces")


def runs_table(study: Study) -> Shown:
    """Return one row a run."""
    columns = Columns(study.measures, "result", "beside")
    headers = ("run", "arm", "state", "seed", "rounds", *columns.headings, "up", "down", "seconds")
    rows = []
    for arm, one in study.pairs:
        summary = one.run.summary
        measure = arm.measure
        values = {"result": measure.last(summary), "beside": measure.beside(summary)} if one.is_finished else {}
        shown = {kind: Figure.of([measure.shown(values.get(kind))]) for kind in ("result", "beside")}
        rounds = f"{one.rounds}" if one.is_finished else f"{one.rounds} of {one.total_rounds or '-'}"
        rows.append(
            [
                Cell(one.name),
                Cell(arm.name),
                Cell(one.state),
                Cell(str(summary.get("seed", "-"))),
                Cell(rounds, one.rounds),
                *(judged_cell(columns, measure, kind, figure) for kind, figure in shown.items()),
                bytes_cell(summary.get("uplink_bytes")),
                bytes_cell(summary.get("downlink_bytes")),
                Cell(human_seconds(summary.get("seconds") or 0), summary.get("seconds")),
            ]
        )
    return Shown(headers, rows, "runs")

"""Charts of what arms reached: metrics and loss by rounds, megabytes and seconds, and the Pareto fronts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from fedq.report.metric import Measure, Series, distinct, file_name, first_upper
from fedq.report.page.evidence import Evidence
from fedq.report.page.pareto import FORMULA, pareto_front, seconds_on_link
from fedq.report.page.spec import Curve, Front, Heading, Lines
from fedq.report.page.study import ArmEvidence, Figure, Study, computation_seconds, links

MOST_POINTS = 3000
"""Most points of all curves of a chart together; curves are thinned evenly, their ends kept."""

START_BITS_PER_S = 1e8
"""Bandwidth at which the slider stands when the page opens."""


def learning_charts(study: Study) -> list[Lines]:
    """Return accuracy or other metrics, and loss, each by rounds, by megabytes and by seconds."""
    axes = (
        ("rounds", "round", "", False),
        ("megabytes", "megabytes up and down, all clients", " Log scale: a tenth of the bytes is one step left.", True),
        ("seconds", "seconds of training as measured here", "", False),
    )
    charts = []
    found = [(measure, series) for measure in study.measures for series in _series(study, measure)]
    keys = distinct(_key(study, measure, series) for measure, series in found)
    for (measure, series), key in zip(found, keys, strict=True):
        title = measure.named(series.title) if len(study.measures) > 1 else series.title
        for axis, x_label, hint, x_log in axes:
            curves = _curves(study, measure, axis, series.column, series.scale)
            caption = f"{first_upper(series.better)} is better; bands are one standard deviation over seeds.{hint}"
            heading = Heading(f"{key}_by_{axis}", f"{title} by {axis}", caption, x_label, series.label)
            if curves:
                charts.append(Lines(heading, curves, x_log=x_log))
    return charts


def _key(study: Study, measure: Measure, series: Series) -> str:
    """Return a series' name; what other measures than the first have beside them is named after the measure."""
    own = file_name(measure.metric.name)
    return series.key if measure == study.measures[0] or series.key == own else f"{own}_{series.key}"


def _series(study: Study, measure: Measure) -> list[Series]:
    runs = [one for arm, one in study.pairs if arm.measure == measure]
    return measure.series([(one.run.summary, one.metrics) for one in runs])


def tradeoff_charts(study: Study) -> list[Front | Lines]:
    """Return what results cost, by measure: against bytes, against seconds on a link, and curves on such a link.

    The first measure's fronts have plain names; those of others end in their metric.
    """
    charts: list[Front | Lines] = []
    names = list(distinct(file_name(measure.metric.name) for measure in study.measures))
    for measure, name in zip(study.measures, names, strict=True):
        for front in _fronts(study, measure):
            key = front.heading.key + (f"_{name}" if name != names[0] else "")
            charts.append(replace(front, heading=replace(front.heading, key=key)))
        if chart := link_chart(study, measure, f"{name}_on_link"):
            charts.append(chart)
    return charts


def _fronts(study: Study, measure: Measure) -> list[Front]:
    """Return results against bytes, and against seconds on a link; none without two arms that have one."""
    arms = study.judged_by(measure)
    if len(arms) < 2:
        return []
    charts = []
    name, label = first_upper(measure.metric.name), measure.heading("result")
    corner = "Up and left" if measure.metric.better == "higher" else "Down and left"
    sent = [arm for arm in arms if arm.link_bytes]
    if sent:
        megabytes = [(arm.mean("uplink_bytes") + arm.mean("downlink_bytes")) / 1e6 for arm in sent]
        caption = f"{corner} is better. The line is the Pareto front: no arm is better in both. Log scale."
        x_label = "megabytes up and down, all clients"
        heading = Heading("front_bytes", f"{name} against bytes", caption, x_label, label)
        charts.append(_front(study, heading, sent, megabytes))
    up, down = ({arm.mean(f"{way}_bytes") for arm in sent} for way in ("uplink", "downlink"))
    if len(up) > 1 and len(down - {0.0}) == 1:  # one downlink for all hides what differs
        megabytes = [arm.mean("uplink_bytes") / 1e6 for arm in sent]
        caption = "The same without the downlink, which costs the same in all arms. Log scale."
        heading = Heading("front_uplink", f"{name} against uplink bytes", caption, "megabytes up", label)
        charts.append(_front(study, heading, sent, megabytes))
    timed = [arm for arm in arms if arm.computation]
    if timed:
        fixed = [arm.computation.mean for arm in timed if arm.computation]
        nbytes = [arm.link_bytes for arm in timed]
        seconds = [seconds_on_link(f, b, START_BITS_PER_S) for f, b in zip(fixed, nbytes, strict=True)]
        caption = f"{FORMULA}. {link_words(timed)} Latency is not counted, and nothing overlaps."
        x_label = "seconds on a link of the chosen bandwidth"
        heading = Heading("front_seconds", f"{name} against seconds", caption, x_label, label)
        charts.append(_front(study, heading, timed, seconds, fixed, [8 * b for b in nbytes]))
    return charts


def link_chart(study: Study, measure: Measure, key: str) -> Lines | None:
    """Return the measure by seconds on a link of the chosen bandwidth."""
    metric = measure.metric
    columns = (f"{prefix}_{metric.name}" for prefix in ("val", "train"))
    found = (_curves(study, measure, "link", column, measure.scale) for column in columns)
    curves = next((own for own in found if own), [])
    caption = "Each curve's seconds are its computation so far and its bytes so far on the chosen link."
    title = f"{first_upper(metric.name)} by seconds on such a link"
    heading = Heading(key, title, caption, "seconds", metric.label)
    return Lines(heading, curves) if curves else None


def link_words(arms: Sequence[ArmEvidence]) -> str:
    """Return which bytes pass the link, by how arms exchange."""
    words = []
    if any(arm.exchange == "round" for arm in arms):
        words.append("Rounds: all updates and models, up and down, pass one link, the server's.")
    if any(arm.exchange == "step" for arm in arms):
        words.append("Steps: every rank has a link of its own and sends its share of the bytes.")
    return " ".join(words)


def _front(
    study: Study,
    heading: Heading,
    arms: Sequence[ArmEvidence],
    costs: Sequence[float],
    fixed: Sequence[float] = (),
    bits: Sequence[float] = (),
) -> Front:
    results = [arm.result or Figure(0.0) for arm in arms]
    gains = [arm.measure.gain(result.mean) for arm, result in zip(arms, results, strict=True)]
    return Front(
        heading,
        [arm.name for arm in arms],
        [study.arms.index(arm) for arm in arms],
        costs,
        [result.mean for result in results],
        [result.sd or 0.0 for result in results],
        pareto_front(costs, gains),
        fixed,
        bits,
    )


# ---- curves --------------------------------------------------------------------------------------------------------


def _curves(study: Study, measure: Measure, axis: str, column: str, scale: float) -> list[Curve]:
    arms = [(number, arm) for number, arm in enumerate(study.arms) if arm.runs and arm.measure == measure]
    most = max(20, MOST_POINTS // max(1, len(arms)))
    curves = [_curve(arm, number, axis, (column, scale), most) for number, arm in arms]
    return [curve for curve in curves if curve.x and (axis != "megabytes" or curve.x[-1])]


def _curve(arm: ArmEvidence, number: int, axis: str, scaled: tuple[str, float], most: int) -> Curve:
    """Return an arm's curve over the rounds that every seed has: means of x and of y, a column and its scale."""
    column, scale = scaled
    by_round: dict[int, list[dict[str, float]]] = {}
    for one in arm.runs:
        for point in _points(one, column):
            by_round.setdefault(int(point["rounds"]), []).append(point)
    shared = [points for _, points in sorted(by_round.items()) if len(points) == len(arm.runs)]
    if axis == "megabytes":
        shared = [points for points in shared if all(point["megabytes"] for point in points)]
    shared = thinned(shared, most)
    figures = [Figure.of(scale * point["y"] for point in points) or Figure(0.0) for points in shared]
    fixed, bits = ([_mean(points, key) for points in shared] for key in ("fixed", "bits"))
    on_link = axis == "link"
    x = [f + b / START_BITS_PER_S for f, b in zip(fixed, bits, strict=True)] if on_link else None
    return Curve(
        arm.name,
        number,
        x if x is not None else [_mean(points, axis) for points in shared],
        [figure.mean for figure in figures],
        [figure.sd or 0.0 for figure in figures] if len(arm.runs) > 1 else [],
        [int(points[0]["rounds"]) for points in shared],
        fixed if on_link else (),
        bits if on_link else (),
    )


def _points(one: Evidence, column: str) -> list[dict[str, float]]:
    """Return a run's rounds with the column: rounds, megabytes and seconds from the start, and what a link adds."""
    total = sum(row.get("seconds") or 0.0 for row in one.metrics)
    share = computation_seconds(one) / total if total else 1.0
    points, seconds = [], 0.0
    for row in one.metrics:
        seconds += row.get("seconds") or 0.0
        if row.get(column) is None:
            continue
        nbytes = float((row.get("uplink_bytes") or 0) + (row.get("downlink_bytes") or 0))
        points.append(
            {"rounds": row["round"] + 1, "megabytes": nbytes / 1e6, "seconds": seconds, "y": row[column]}
            | {"fixed": share * seconds, "bits": 8 * nbytes / links(one)}
        )
    return points


def _mean(points: Sequence[dict[str, float]], key: str) -> float:
    return sum(point[key] for point in points) / len(points)


def thinned(items: Sequence[Any], most: int) -> list[Any]:
    """Return at most so many items, two or more, evenly spread, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    step = (len(items) - 1) / (most - 1)
    return [items[round(i * step)] for i in range(most)]


def bytes_by_round(study: Study) -> Lines | None:
    """Return each arm's megabytes a round, up and down; None if nothing was sent."""
    curves = []
    for number, arm in enumerate(study.arms):
        rows: dict[int, list[float]] = {}
        for one in arm.runs:
            before = 0.0
            for row in one.metrics:
                now = float((row.get("uplink_bytes") or 0) + (row.get("downlink_bytes") or 0))
                rows.setdefault(row["round"] + 1, []).append((now - before) / 1e6)
                before = now
        shared = [(r, sum(v) / len(v)) for r, v in sorted(rows.items()) if len(v) == len(arm.runs)]
        shared = thinned([(r, y) for r, y in shared if y > 0], max(20, MOST_POINTS // len(study.arms)))
        if shared:
            rounds = [r for r, _ in shared]
            curves.append(Curve(arm.name, number, [float(r) for r in rounds], [y for _, y in shared], [], rounds))
    caption = (
        "Up and down, all clients. Rounds in which clients take part for the first time send them the whole model."
    )
    heading = Heading("bytes_by_round", "Bytes by round", caption, "round", "megabytes a round")
    return Lines(heading, curves, y_log=len(curves) > 1) if curves else None

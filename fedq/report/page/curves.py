"""Charts of what arms reached: accuracy and loss by rounds, megabytes and seconds, and the Pareto fronts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fedq.report.page.evidence import Evidence
from fedq.report.page.pareto import FORMULA, pareto_front, seconds_on_link
from fedq.report.page.spec import Curve, Front, Heading, Lines
from fedq.report.page.study import ArmEvidence, Figure, Study, computation_seconds, links

MOST_POINTS = 3000
"""Points of all curves of a chart together; curves are thinned evenly, their ends kept."""

START_BITS_PER_S = 1e8
"""Where the slider stands when the page opens."""

_MEASURES = {"accuracy": "accuracy, %", "loss": "loss"}


def learning_charts(study: Study) -> list[Lines]:
    """Return accuracy and loss, each by rounds, by megabytes and by seconds."""
    data = "val" if any("val_accuracy" in row for one in study.runs for row in one.metrics) else "train"
    noun = {"val": "validation", "train": "training"}[data]
    axes = (
        ("rounds", "round", "", False),
        ("megabytes", "megabytes up and down, all clients", " Log scale: a tenth of the bytes is one step left.", True),
        ("seconds", "seconds of training as measured here", "", False),
    )
    charts = []
    for measure, label in _MEASURES.items():
        for axis, x_label, hint, x_log in axes:
            curves = _curves(study, axis, f"{data}_{measure}")
            better = "Higher is better" if measure == "accuracy" else "Lower is better"
            caption = f"{better}; bands are one standard deviation over seeds.{hint}"
            title = f"{noun.capitalize()} {measure} by {axis}"
            heading = Heading(f"{measure}_by_{axis}", title, caption, x_label, f"{noun} {label}")
            if curves:
                charts.append(Lines(heading, curves, x_log=x_log))
    return charts


def front_charts(study: Study) -> list[Front]:
    """Return accuracy against bytes, and against seconds on a link; none without two arms that were tested."""
    arms = [arm for arm in study.finished if arm.accuracy]
    if len(arms) < 2:
        return []
    charts = []
    sent = [arm for arm in arms if arm.link_bytes]
    if sent:
        megabytes = [(arm.mean("uplink_bytes") + arm.mean("downlink_bytes")) / 1e6 for arm in sent]
        caption = "Up and left is better. The line is the Pareto front: no arm is better in both. Log scale."
        x_label = "megabytes up and down, all clients"
        heading = Heading("front_bytes", "Accuracy against bytes", caption, x_label, "test accuracy, %")
        charts.append(_front(study, heading, sent, megabytes))
    up, down = ({arm.mean(f"{way}_bytes") for arm in sent} for way in ("uplink", "downlink"))
    if len(up) > 1 and len(down - {0.0}) == 1:  # one downlink for all hides what differs
        megabytes = [arm.mean("uplink_bytes") / 1e6 for arm in sent]
        caption = "The same without the downlink, which costs the same in all arms. Log scale."
        heading = Heading("front_uplink", "Accuracy against uplink bytes", caption, "megabytes up", "test accuracy, %")
        charts.append(_front(study, heading, sent, megabytes))
    timed = [arm for arm in arms if arm.computation]
    if timed:
        fixed = [arm.computation.mean for arm in timed if arm.computation]
        nbytes = [arm.link_bytes for arm in timed]
        seconds = [seconds_on_link(f, b, START_BITS_PER_S) for f, b in zip(fixed, nbytes, strict=True)]
        caption = f"{FORMULA}. {link_words(timed)} Latency is not counted, and nothing overlaps."
        x_label = "seconds on a link of the chosen bandwidth"
        heading = Heading("front_seconds", "Accuracy against seconds", caption, x_label, "test accuracy, %")
        charts.append(_front(study, heading, timed, seconds, fixed, [8 * b for b in nbytes]))
    return charts


def link_chart(study: Study) -> Lines | None:
    """Return accuracy by seconds on a link of the chosen bandwidth."""
    curves = _curves(study, "link", "val_accuracy") or _curves(study, "link", "train_accuracy")
    caption = "Each curve's seconds are its computation so far and its bytes so far on the chosen link."
    heading = Heading("accuracy_on_link", "Accuracy by seconds on such a link", caption, "seconds", "accuracy, %")
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
    accuracies = [arm.accuracy or Figure(0.0) for arm in arms]
    gains = [accuracy.mean for accuracy in accuracies]
    return Front(
        heading,
        [arm.name for arm in arms],
        [study.arms.index(arm) for arm in arms],
        costs,
        gains,
        [accuracy.sd or 0.0 for accuracy in accuracies],
        pareto_front(costs, gains),
        fixed,
        bits,
    )


# ---- curves --------------------------------------------------------------------------------------------------------


def _curves(study: Study, axis: str, measure: str) -> list[Curve]:
    arms = [(number, arm) for number, arm in enumerate(study.arms) if arm.runs]
    most = max(20, MOST_POINTS // max(1, len(arms)))
    curves = [_curve(arm, number, axis, measure, most) for number, arm in arms]
    return [curve for curve in curves if curve.x and (axis != "megabytes" or curve.x[-1])]


def _curve(arm: ArmEvidence, number: int, axis: str, measure: str, most: int) -> Curve:
    """Return an arm's curve over the rounds that every seed has: means of x and of y."""
    by_round: dict[int, list[dict[str, float]]] = {}
    for one in arm.runs:
        for point in _points(one, measure):
            by_round.setdefault(int(point["rounds"]), []).append(point)
    shared = [points for _, points in sorted(by_round.items()) if len(points) == len(arm.runs)]
    if axis == "megabytes":
        shared = [points for points in shared if all(point["megabytes"] for point in points)]
    shared = thinned(shared, most)
    scale = 100 if measure.endswith("accuracy") else 1
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


def _points(one: Evidence, measure: str) -> list[dict[str, float]]:
    """Return a run's rounds with the measure: rounds, megabytes and seconds from the start, and what a link adds."""
    total = sum(row.get("seconds") or 0.0 for row in one.metrics)
    share = computation_seconds(one) / total if total else 1.0
    points, seconds = [], 0.0
    for row in one.metrics:
        seconds += row.get("seconds") or 0.0
        if row.get(measure) is None:
            continue
        nbytes = float((row.get("uplink_bytes") or 0) + (row.get("downlink_bytes") or 0))
        points.append(
            {"rounds": row["round"] + 1, "megabytes": nbytes / 1e6, "seconds": seconds, "y": row[measure]}
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

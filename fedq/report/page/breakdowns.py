"""Charts of what runs are made of: bytes by part, layer and client, time by phase, clients, histograms."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from fedq import phases
from fedq.ledger import PARTS
from fedq.report.page.curves import thinned
from fedq.report.page.evidence import Evidence, Rows
from fedq.report.page.spec import Bins, Choice, Dots, Heading, Heat, Stack
from fedq.report.page.study import ArmEvidence, Study
from fedq.report.page.tables import client_accuracies, labelled, phase_rows

MOST_BARS = 32
MOST_CLIENTS = 40
MOST_VARIANTS = 16
MOST_HISTOGRAMS = 36
MOST_BINS = 128

PHASES = (*phases.PHASES, "other")
_STAGES = {
    "weight": ("Weights", "the float weights before the round's exchange"),
    "deployed": ("Weights as deployed", "the few-bit values that the model computes with"),
    "update": ("Update before coding", "what a client wanted to send"),
    "decoded": ("Update after coding", "what the receiver got, on the same x axis"),
    "codes": ("Codes", "the integers that travelled"),
}


# ---- bytes ---------------------------------------------------------------------------------------------------------


def totals_chart(study: Study) -> Dots | None:
    """Return every arm's megabytes by direction beside float32, bfloat16 and the entropy of its codes."""
    arms = [arm for arm in study.arms if arm.link_bytes]
    series: dict[str, list[tuple[str, float]]] = {}

    def add(name: str, arm: ArmEvidence, nbytes: float | None) -> None:
        if nbytes:
            series.setdefault(name, []).append((arm.name, nbytes / 1e6))

    for arm in arms:
        add("float32, up", arm, arm.mean("uplink_bytes_fp32"))
        add("bfloat16, up", arm, arm.mean("uplink_bytes_fp32") / 2)
        add("down", arm, arm.mean("downlink_bytes"))
        add("up, codes at their entropy", arm, bytes_at_entropy(study, arm))
        add("up", arm, arm.mean("uplink_bytes"))
    caption = (
        "What was sent, counted, beside the same values in float32 and bfloat16. At their entropy: what an ideal "
        "entropy coder would leave of the uplink, from the codes logged. Log scale."
    )
    heading = Heading("bytes_by_direction", "Bytes by direction", caption, "megabytes, whole run, all clients")
    return Dots(heading, [arm.name for arm in arms], dict(series), x_log=True) if arms else None


def bytes_at_entropy(study: Study, arm: ArmEvidence) -> float | None:
    """Return the uplink bytes if codes took their entropy as logged; None where no codes were logged."""
    codes = [row for one in arm.runs if one.bytes for row in one.bytes.codes]
    payload = sum(8 * row["payload"] for row in codes)
    if not payload:
        return None
    saved = 1 - sum(row["entropy_bits"] for row in codes) / payload
    all_codes = statistics.fmean(
        sum(row["payload"] for row in one.bytes.parts if (row["direction"], row["part"]) == ("uplink", "codes"))
        for one in arm.runs
        if one.bytes
    )
    return arm.mean("uplink_bytes") - saved * all_codes


def make_up_charts(study: Study) -> list[Stack]:
    """Return what the bytes of each direction are, % by part."""
    charts = []
    for way, title in (("uplink", "What uplink bytes are"), ("downlink", "What downlink bytes are")):
        shares = {arm.name: _shares(arm, way) for arm in study.arms}
        shares = {name: own for name, own in shares.items() if own}
        caption = "Codes are the values; scales, indices and framing are what coding adds; exempt values travel exact."
        heading = Heading(f"parts_{way}", title, caption, "% of the bytes")
        parts = {part: [own.get(part, 0.0) for own in shares.values()] for part in PARTS}
        parts = {part: values for part, values in parts.items() if any(values)}
        is_worth = len(shares) == 1 or any(own != next(iter(shares.values())) for own in shares.values())
        if shares and is_worth:  # the same bar a dozen times says nothing
            charts.append(Stack(heading, list(shares), parts))
    return charts


def _shares(arm: ArmEvidence, way: str) -> dict[str, float]:
    sums: dict[str, float] = {}
    for one in arm.runs:
        for row in one.bytes.parts if one.bytes else []:
            if row["direction"] == way:
                sums[row["part"]] = sums.get(row["part"], 0.0) + row["payload"]
    total = sum(sums.values())
    return {part: 100 * value / total for part, value in sums.items()} if total else {}


def layer_choice(study: Study) -> Choice:
    """Return bytes by layer and part, for each arm's first run."""
    variants: dict[str, Sequence[Stack | Heat | Bins]] = {}
    for arm in _chosen(study):
        rows = arm.first.bytes.layers if arm.first.bytes else []
        stacks = [_layers([row for row in rows if row["direction"] == way], way) for way in ("uplink", "downlink")]
        if any(stack.categories for stack in stacks):
            variants[arm.name] = stacks
    return Choice("layers", "arm", variants, _note(study))


def _layers(rows: Rows, way: str) -> Stack:
    sums: dict[str, dict[str, float]] = {}
    for row in rows:
        of_layer = sums.setdefault(row["tensor"] or "(message)", dict.fromkeys(PARTS, 0.0))
        of_layer[row["part"]] += row["payload"] / 1e6
    caption = "Whole run, all clients, first seed; the largest layers, in the model's order."
    heading = Heading(f"layers_{way}", f"{way.capitalize()} by layer", caption, "megabytes")
    return _stack(heading, _largest(sums))


def _largest(sums: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """Return the largest groups in their order, the rest as one."""
    if len(sums) <= MOST_BARS:
        return sums
    kept = set(sorted(sums, key=lambda name: -sum(sums[name].values()))[: MOST_BARS - 1])
    rest = [own for name, own in sums.items() if name not in kept]
    summed = {part: sum(own[part] for own in rest) for part in rest[0]}
    return {name: own for name, own in sums.items() if name in kept} | {f"{len(rest)} others": summed}


def client_choice(study: Study) -> Choice:
    """Return bytes by client and direction, for each arm's first run; many clients as means of neighbours."""
    variants: dict[str, Sequence[Stack | Heat | Bins]] = {}
    for arm in _chosen(study):
        sums: dict[int, dict[str, float]] = {}
        for row in arm.first.bytes.clients if arm.first.bytes else []:
            if row["client"] >= 0:
                own = sums.setdefault(row["client"], {"uplink": 0.0, "downlink": 0.0})
                own[row["direction"]] = own.get(row["direction"], 0.0) + row["payload"] / 1e6
        if sums:
            noun = "Rank" if arm.exchange == "step" else "Client"
            caption = f"Whole run, first seed. {noun}s that took part in more rounds sent and received more."
            heading = Heading("bytes_by_client", f"Bytes by {noun.lower()}", caption, "megabytes")
            variants[arm.name] = [_stack(heading, _neighbours(sums, noun.lower()))]
    return Choice("clients_bytes", "arm", variants, _note(study))


def _neighbours(sums: dict[int, dict[str, float]], noun: str) -> dict[str, dict[str, float]]:
    clients = sorted(sums)
    size = -(-len(clients) // MOST_CLIENTS)
    groups = [clients[i : i + size] for i in range(0, len(clients), size)]
    return {
        f"{noun} {group[0]}" if size == 1 else f"{noun}s {group[0]} to {group[-1]}, mean": {
            way: statistics.fmean(sums[client].get(way, 0.0) for client in group) for way in ("uplink", "downlink")
        }
        for group in groups
    }


def _stack(heading: Heading, sums: dict[str, dict[str, float]]) -> Stack:
    parts = list(dict.fromkeys(part for own in sums.values() for part in own))
    return Stack(heading, list(sums), {part: [own.get(part, 0.0) for own in sums.values()] for part in parts})


# ---- time ----------------------------------------------------------------------------------------------------------


def phase_chart(study: Study) -> Stack | None:
    """Return seconds a round by phase; what ran hidden beside computation has bars of its own."""
    rows = phase_rows(study)
    bars: dict[str, dict[str, float]] = {}
    for arm in study.arms:
        rounds = sum(one.rounds for one in arm.runs)
        names = {one.name for one in arm.runs}
        own = [row for row in rows if row["arm"] == arm.name and row["run"] in names]
        if own:
            for key, name in (("seconds", arm.name), ("hidden_seconds", f"{arm.name}, hidden")):
                sums = {phase: sum(row[key] for row in own if row["phase"] == phase) / rounds for phase in PHASES}
                if any(sums.values()):
                    bars[name] = sums
        elif arm.seconds and rounds:
            bars[arm.name] = {"not split": arm.seconds.mean * len(arm.runs) / rounds}
    caption = (
        "Seconds a round, means over ranks and seeds: what a rank spent in a phase or waited for it. "
        "Hidden bars ran beside computation and are not in the sum."
    )
    if not rows:
        caption = "Seconds a round. These runs have no phases.parquet, so their time is not split."
    heading = Heading("time_by_phase", "Time by phase", caption, "seconds a round")
    return _stack(heading, bars) if bars else None


# ---- clients -------------------------------------------------------------------------------------------------------


def label_choice(study: Study) -> Choice:
    """Return the label distributions that differ: clients by classes."""
    found: dict[str, Heat] = {}
    seen: dict[str, str] = {}
    for arm, one in study.pairs:
        if not labelled(one):
            continue
        heat = _heat(one)
        data = repr((heat.rows, heat.values))
        if data not in seen and len(found) < MOST_VARIANTS:
            name = f"seed {one.run.summary.get('seed')}"
            seen[data] = name if name not in found else f"{arm.name}, {name}"
            found[seen[data]] = heat
    return Choice("labels", "clients of", {name: [heat] for name, heat in found.items()})


def _heat(one: Evidence) -> Heat:
    found = labelled(one)
    clients = thinned(found, MOST_CLIENTS)
    shown = "" if len(clients) == len(found) else f" {len(clients)} of {len(found)} clients."
    classes = max(len(row["label_counts"]) for row in clients)
    values = [[*row["label_counts"], *[0] * (classes - len(row["label_counts"]))] for row in clients]
    caption = f"Training examples of each class a client has; darker is more.{shown}"
    heading = Heading("labels", "Label distribution of clients", caption, "class", "client")
    return Heat(heading, [str(row["client"]) for row in clients], [str(c) for c in range(classes)], values, "examples")


def accuracy_by_client(study: Study) -> Dots | None:
    """Return each arm's clients by accuracy, and their mean; many clients as evenly spread quantiles."""
    points: dict[str, list[tuple[str, float]]] = {}
    names, measures = [], set()
    for arm in study.arms:
        accuracies = []
        for one in arm.runs:
            found = client_accuracies(one)
            measures |= {measure for _, measure, _ in found}
            accuracies += [100 * accuracy for _, _, accuracy in found]
        if accuracies:
            names.append(arm.name)
            shown = thinned(sorted(accuracies), max(10, 1200 // len(study.arms)))
            points.setdefault("client", []).extend((arm.name, accuracy) for accuracy in shown)
            points.setdefault("mean", []).append((arm.name, statistics.fmean(accuracies)))
    what = " or ".join(sorted(measures))
    caption = (
        f"One dot a client of each seed: its {what} accuracy, the best measure that each run has; see "
        "tables/client_accuracy.csv."
    )
    heading = Heading("client_accuracy", "Accuracy by client", caption, f"{what} accuracy, %")
    return Dots(heading, names, dict(points)) if names else None


# ---- histograms ----------------------------------------------------------------------------------------------------


def histogram_choice(study: Study) -> Choice:
    """Return histograms of a few layers of each arm's first run, before and after coding, of the last round logged."""
    arms = [arm for arm in coded_first(study) if arm.first.shapes][:MOST_HISTOGRAMS]
    variants: dict[str, Sequence[Stack | Heat | Bins]] = {}
    for arm in arms:
        for tensor in _layers_shown(arm.first.shapes, MOST_HISTOGRAMS // len(arms)):
            variants[f"{arm.name}: {tensor}"] = _stages(row for row in arm.first.shapes if row["tensor"] == tensor)
    note = "All of them are in tables/histograms.csv." if variants else ""
    return Choice("histograms", "arm and layer", variants, note)


def _layers_shown(shapes: Rows, most: int) -> list[str]:
    """Return at most three layers in the model's order: the largest, the first and the last."""
    sizes = {row["tensor"]: row["num"] for row in shapes}
    names = list(sizes)
    wanted = list(dict.fromkeys([max(names, key=lambda name: sizes[name]), names[0], names[-1]]))[: max(1, most)]
    return [name for name in names if name in wanted]


def _stages(rows: Iterable[dict[str, Any]]) -> list[Bins]:
    by_stage = {row["stage"]: row for row in rows}
    sides = _limits(by_stage, "weight", "deployed") | _limits(by_stage, "update", "decoded")
    charts = []
    for stage, (title, words) in _STAGES.items():
        row = by_stage.get(stage)
        edges, shares = _bins(row) if row else ([], [])
        entropy = row.get("entropy_bits") if row else None
        extra = "" if entropy is None else f"; entropy {entropy:.3f} bits a code"
        who = "" if row is None else f", client {row['client']}, round {row['round'] + 1}"
        heading = Heading(f"histogram_{stage}", title, f"{words.capitalize()}{who}{extra}.", "value", "% of values")
        charts.append(Bins(heading, edges, shares, sides.get(stage)))
    return charts


def _limits(by_stage: dict[str, Any], *stages: str) -> dict[str, tuple[float, float]]:
    edges = [edge for stage in stages if stage in by_stage for edge in by_stage[stage]["edges"]]
    return dict.fromkeys(stages, (min(edges), max(edges))) if edges else {}


def _bins(row: dict[str, Any]) -> tuple[list[float], list[float]]:
    """Return edges and shares, %; neighbours are joined where there are too many."""
    edges, counts = row["edges"], row["counts"]
    size = -(-len(counts) // MOST_BINS) if counts else 1
    joined = [sum(counts[i : i + size]) for i in range(0, len(counts), size)]
    return [*edges[:-1:size], *edges[-1:]], [100 * count / row["num"] for count in joined]


# ---- shared --------------------------------------------------------------------------------------------------------


def coded_first(study: Study) -> list[ArmEvidence]:
    """Return the arms with a round in the order in which a reader chooses: float32 and bfloat16 after the others."""
    return sorted((arm for arm in study.arms if arm.runs), key=lambda arm: arm.is_float32 or arm.is_bf16)


def _chosen(study: Study) -> list[ArmEvidence]:
    return coded_first(study)[:MOST_VARIANTS]


def _note(study: Study) -> str:
    left = len([arm for arm in study.arms if arm.runs]) - MOST_VARIANTS
    return f"{left} more arms are in the CSV." if left > 0 else ""

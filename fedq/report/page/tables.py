"""The page's tables: one list of rows each, which is what its CSV holds. Every number is the files' own or their mean.

Tables about runs have all runs and every round, client and layer, whatever the page shows of them.
"""

from __future__ import annotations

import csv
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fedq.report.page.cautions import Caution
from fedq.report.page.evidence import Evidence
from fedq.report.page.pareto import BANDWIDTHS, pareto_front, seconds_on_link
from fedq.report.page.study import Figure, Study, computation_seconds, data_name, exchange_seconds, links

Rows = list[dict[str, Any]]


def all_tables(study: Study, cautions: Sequence[Caution]) -> dict[str, Rows]:
    """Return every table by the name of its CSV; one without rows is left out."""
    makers: dict[str, Callable[[Study], Rows]] = {
        "arms": arm_rows,
        "runs": run_rows,
        "rounds": round_rows,
        "seconds_on_links": link_rows,
        "bytes_by_part": lambda s: _bytes(s, "parts"),
        "bytes_by_round": lambda s: _bytes(s, "rounds"),
        "bytes_by_client": lambda s: _bytes(s, "clients"),
        "bytes_by_layer": lambda s: _bytes(s, "layers"),
        "entropy_of_codes": entropy_rows,
        "phases": phase_rows,
        "labels": label_rows,
        "client_accuracy": client_rows,
        "histograms": histogram_rows,
        "interfaces": interface_rows,
    }
    tables = {name: make(study) for name, make in makers.items()}
    tables["warnings"] = [
        {"level": one.level, "kind": one.kind, "sections": " ".join(one.sections), "text": one.text} for one in cautions
    ]
    return {name: rows for name, rows in tables.items() if rows}


def write_tables(tables: dict[str, Rows], folder: Path) -> list[Path]:
    """Write `<name>.csv` of every table; return the files."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for name, rows in tables.items():
        files.append(folder / f"{name}.csv")
        columns = list(dict.fromkeys(key for row in rows for key in row))
        with files[-1].open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)
    return files


def arm_rows(study: Study) -> Rows:
    """Return one row an arm: what it reached and what it cost, means and sds over seeds."""
    rows = []
    for arm in study.arms:
        payoff = study.payoff(arm)
        summary = arm.first.run.summary
        row: dict[str, Any] = {
            "arm": arm.name,
            "num_runs": len(arm.all_runs),
            "num_finished": sum(one.is_finished for one in arm.all_runs),
            "exchange": arm.exchange,
            "uplink": summary.get("uplink"),
            "downlink": summary.get("downlink"),
            "weights": summary.get("weights", "float"),
            "algorithm": summary.get("algorithm", "fedavg"),
            "rounds": arm.first.rounds,
            **_mean_sd(arm.measure.arm_columns()["result"], arm.result),
            **_mean_sd(arm.measure.arm_columns()["best"], arm.best),
            **_mean_sd("test_loss", arm.test_loss),
        }
        for way in ("uplink", "downlink"):
            row[f"{way}_bytes"] = arm.mean(f"{way}_bytes")
            row[f"{way}_bytes_fp32"] = arm.mean(f"{way}_bytes_fp32")
            row[f"{way}_times_less_than_fp32"] = arm.times_less(way)
        row |= {"wire_bytes": arm.mean("wire_bytes"), "link_bytes": arm.link_bytes}
        row |= {**_mean_sd("seconds", arm.seconds), **_mean_sd("computation_seconds", arm.computation)}
        row |= {
            "extra_seconds": payoff.extra_seconds if payoff else None,
            "saved_link_bytes": payoff.saved_bytes if payoff else None,
            "break_even_bits_per_s": payoff.break_even if payoff else None,
        }
        rows.append(row)
    return rows


def _mean_sd(name: str, figure: Figure | None) -> dict[str, float | None]:
    return {f"{name}_mean": figure.mean if figure else None, f"{name}_sd": figure.sd if figure else None}


def run_rows(study: Study) -> Rows:
    """Return one row a run: what ran, where, and what came of it."""
    keys = ("model", "num_params", "num_clients", "cohort", "partition", "exchange", "aggregate", "server")
    codecs = ("uplink", "downlink", "feedback", "weights", "algorithm")
    costs = (
        "uplink_bytes",
        "downlink_bytes",
        "uplink_bytes_fp32",
        "downlink_bytes_fp32",
        "wire_bytes",
        "seconds",
        "seconds_setup",
    )
    places = ("world_size", "launcher", "backend", "device", "precision", "threads", "cpu", "cpu_count", "gpu")
    rows = []
    for arm, one in study.pairs:
        summary = one.run.summary
        row = {"arm": arm.name, "run": one.name, "state": one.state, "seed": summary.get("seed")}
        row |= {"rounds": one.rounds, "total_rounds": one.total_rounds, "data": data_name(one)}
        row |= {key: summary.get(key) for key in (*keys, *codecs)} | arm.measure.run_columns(summary)
        row |= {key: summary.get(key) for key in costs}
        row |= {"computation_seconds": computation_seconds(one), "exchange_seconds": exchange_seconds(one)}
        row |= {key: summary.get(key) for key in (*places, "platform", "git_commit")}
        row |= {f"version_{name}": version for name, version in (summary.get("versions") or {}).items()}
        rows.append(row | {"command": command(one)})
    return rows


def command(one: Evidence) -> str:
    """Return the exact command of a run, or, where it was not recorded, one that does the same."""
    recorded = one.run.summary.get("command")
    return str(recorded) if recorded else one.run.measure.to_repeat(one.name)


def round_rows(study: Study) -> Rows:
    """Return one row a run and round: losses and metrics, and seconds and bytes from the start to its end."""
    rows = []
    for arm, one in study.pairs:
        seconds, columns = 0.0, arm.measure.round_columns(one.metrics)
        for metric in one.metrics:
            seconds += metric.get("seconds") or 0.0
            row = {"arm": arm.name, "run": one.name, "seed": one.run.summary.get("seed"), "round": metric["round"] + 1}
            row |= {"seconds": seconds}
            row |= {key: metric.get(key) for key in ("uplink_bytes", "downlink_bytes", "wire_bytes")}
            rows.append(row | {key: metric.get(key) for key in columns})
    return rows


def link_rows(study: Study) -> Rows:
    """Return one row a finished arm and bandwidth: seconds on such a link, and whether it is on the front."""
    rows = []
    for measure, bandwidth in itertools.product(study.measures, BANDWIDTHS):
        arms = [arm for arm in study.judged_by(measure) if arm.computation]
        costs = [seconds_on_link(_mean(arm.computation), arm.link_bytes, bandwidth) for arm in arms]
        front = pareto_front(costs, [measure.gain(_mean(arm.result)) for arm in arms])
        for arm, seconds, is_on_front in zip(arms, costs, front, strict=True):
            row = {"arm": arm.name, "bits_per_s": bandwidth, "seconds": seconds, "on_front": is_on_front}
            rows.append(row | {measure.arm_columns()["result"]: _mean(arm.result), "links": links(arm.first)})
    return rows


def _mean(figure: Figure | None) -> float:
    return figure.mean if figure else 0.0


def _bytes(study: Study, groups: str) -> Rows:
    """Return the ledger's sums of all runs; bfloat16 is half of raw, which is float32."""
    rows = []
    for arm, one in study.pairs:
        for row in getattr(one.bytes, groups, []):
            own = {key: value + 1 if key == "round" else value for key, value in row.items()}
            rows.append({"arm": arm.name, "run": one.name, **own, "raw_bf16": row["raw"] / 2})
    return rows


def entropy_rows(study: Study) -> Rows:
    """Return one row a run and layer whose codes were logged: bits sent a code beside their entropy."""
    rows = []
    for arm, one in study.pairs:
        for row in one.bytes.codes if one.bytes else []:
            sent, entropy = 8 * row["payload"] / row["num"], row["entropy_bits"] / row["num"]
            own = {"arm": arm.name, "run": one.name, "tensor": row["tensor"], "codes": row["num"]}
            rows.append(own | {"code_bytes": row["payload"], "bits_a_code": sent, "entropy_bits_a_code": entropy})
    return rows


def phase_rows(study: Study) -> Rows:
    """Return one row a run and phase: seconds of the whole run, means over ranks; "other" is the rest of the rounds."""
    rows = []
    for arm, one in study.pairs:
        ranks = len({row["rank"] for row in one.phases})
        sums: dict[str, list[float]] = {}
        for row in one.phases:
            total = sums.setdefault(row["phase"], [0.0, 0.0, 0.0])
            for place, key in enumerate(("seconds", "hidden_seconds", "calls")):
                total[place] += row[key] / ranks
        if ranks:
            spent = sum(row.get("seconds") or 0.0 for row in one.metrics)
            sums["other"] = [max(0.0, spent - sum(total[0] for total in sums.values())), 0.0, 0.0]
        for phase, (seconds, hidden, calls) in sums.items():
            row = {"arm": arm.name, "run": one.name, "phase": phase, "seconds": seconds, "hidden_seconds": hidden}
            rows.append(row | {"calls_a_rank": calls})
    return rows


def label_rows(study: Study) -> Rows:
    """Return one row a run and client: examples of each class, where classes were counted."""
    rows = []
    for arm, one in study.pairs:
        for client in labelled(one):
            row = {"arm": arm.name, "run": one.name, "client": client["client"], "examples": client["num_examples"]}
            rows.append(row | {f"class_{label}": count for label, count in enumerate(client["label_counts"])})
    return rows


def labelled(one: Evidence) -> Rows:
    """Return the last rows of a run's clients whose classes were counted."""
    return [row for row in one.last_clients if row["label_counts"]]


def client_rows(study: Study) -> Rows:
    """Return one row a run and client: the best measure of its accuracy that there is."""
    return [
        {"arm": arm.name, "run": one.name, "client": client, "measure": measure, "accuracy_percent": 100 * accuracy}
        for arm, one in study.pairs
        for client, measure, accuracy in client_accuracies(one)
    ]


def client_accuracies(one: Evidence) -> list[tuple[int, str, float]]:
    """Return (client, measure, accuracy) of each client.

    The best measure that there is: of its own model on test data, else on validation data, or, where clients are not
    tested one by one, of the last round on the examples that it trained on.
    """
    if one.personal:
        tested = [(row["client"], "test", row["test_accuracy"]) for row in one.personal]
    elif listed := one.run.summary.get("client_test_accuracy"):
        tested = [(client, "test", accuracy) for client, accuracy in enumerate(listed)]
    else:
        tested = []
    if known := [row for row in tested if row[2] is not None]:
        return known
    for measure, key in (("validation", "val_accuracy"), ("training", "train_accuracy")):
        rows = [(row["client"], measure, row[key]) for row in one.last_clients if row[key] is not None]
        if rows:
            return rows
    return []


def histogram_rows(study: Study) -> Rows:
    """Return the bins of every histogram of the last round logged, of each arm's first run."""
    rows = []
    for arm in study.arms:
        for shape in arm.first.shapes:
            own = {"arm": arm.name, "run": arm.first.name, "round": shape["round"] + 1, "client": shape["client"]}
            own |= {"tensor": shape["tensor"], "stage": shape["stage"]}
            bins = zip(shape["edges"], shape["edges"][1:], shape["counts"], strict=False)
            rows += [own | {"from": low, "to": high, "count": count} for low, high, count in bins]
    return rows


def _ratio(interface: dict[str, Any]) -> float | None:
    return interface["sent"] / interface["counted"] if interface.get("counted") else None


def interface_rows(study: Study) -> Rows:
    """Return one row a run, host and interface, and of each run one of all that counts (`host` "all")."""
    rows = []
    for arm, one in study.pairs:
        found = one.run.summary.get("interface")
        if not found:
            continue
        own = {"arm": arm.name, "run": one.name}
        for host in found.get("hosts", []):
            for name, counts in host.get("interfaces", {}).items():
                row = {"host": host.get("host"), "interface": name}
                rows.append(own | row | {key: counts.get(key) for key in ("sent", "received")})
        sums = {"host": "all", "interface": "counted beside", "sent": found.get("sent"), "received": None}
        rows.append(own | sums | {"counted": found.get("counted"), "ratio": _ratio(found)})
    return rows

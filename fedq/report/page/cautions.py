"""What a reader must know before believing a comparison: each caution with the sections of the page where it stands.

How each is decided is written in docs/report.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from fedq.planning.units import bandwidth_text
from fedq.report.page.evidence import Evidence
from fedq.report.page.study import SAME_TIME, Payoff, Study, settings
from fedq.report.terminal import human_seconds
from fedq.text import human_bytes

LEVELS = ("error", "warning", "note")

NOISY = 0.2
"""Standard deviation of an arm's seconds, as a share of their mean, from which on they are called noisy."""

INTERFACE_TOLERANCE = 0.01
ETHERNET_OVERHEAD = (14 + 20 + 32) / 1448
"""Share that headers (Ethernet, IPv4, TCP with timestamps) add to a full segment of 1,448 bytes."""
LOOPBACK_OVERHEAD = (14 + 20 + 32) / 65483
"""Share that such headers add to a full segment on loopback, whose packets hold 65,535 bytes."""
MESSAGE_OVERHEAD = 600
"""Most bytes beside a message of any size: headers, acknowledgements, what Gloo announces (370 to 570 seen)."""
_MESSAGES = {"fp32": 4, "fp16": 4, "bf16": 4, "powersgd": 12}
"""Messages to a peer in one exchange: those of an all-reduce (PowerSGD has three); one for other codecs."""

_COMPARED = ("results", "learning", "tradeoff")

_DATA: tuple[str, ...] = ("data.dataset", "data.train_examples", "data.image_size", "data.val_fraction", "data.augment")
_DATA += ("clients.num_clients", "clients.partition")
_MODEL = ("local.model", "local.norm", "personal.client_models")
_BUDGET: tuple[str, ...] = (
    "run.rounds",
    "local.local_epochs",
    "local.local_steps",
    "local.batch_size",
    "clients.cohort",
)
_BUDGET += ("exchange.exchange",)
_TUNED: tuple[str, ...] = ("local.optimizer", "local.lr", "local.lr_schedule", "local.momentum", "local.weight_decay")
_TUNED += ("local.prox_mu", "exchange.server", "personal.personal_lr", "personal.regularizer_weight")
_PLACE = ("cpu", "gpu", "world_size", "threads", "device", "precision")


@dataclass(frozen=True)
class Caution:
    """One thing to know.

    Args:
        level: One of `LEVELS`: "error": numbers are wrong or missing; "warning": a conclusion would be wrong; "note".
        kind: One word for the caution.
        sections: Names of the parts of the page that it concerns.
        text: One or two sentences.
    """

    level: str
    kind: str
    sections: tuple[str, ...]
    text: str


def find_cautions(study: Study) -> list[Caution]:
    """Return all cautions, the gravest first."""
    finders: tuple[Callable[[Study], Iterator[Caution]], ...] = (
        _problems,
        _unfinished,
        _ledgers,
        _interfaces,
        _not_evaluated,
        _not_comparable,
        _seeds,
        _pays_in_bytes,
        _noisy,
        _pays_in_time,
        _slower_than_bf16,
        _left_out,
        _test_set,
    )
    found = [caution for find in finders for caution in find(study)]
    return sorted(found, key=lambda caution: LEVELS.index(caution.level))


# ---- files ---------------------------------------------------------------------------------------------------------


def _problems(study: Study) -> Iterator[Caution]:
    by_text: dict[tuple[str, str, str, str], list[str]] = {}
    for one in study.runs:
        for problem in one.problems:
            if problem.file == "summary.json" and problem.text == "is missing":
                continue  # said by `_unfinished`
            kind = "schema" if problem.is_schema else "missing file"
            level = "error" if one.is_finished or problem.is_schema else "note"
            by_text.setdefault((level, kind, problem.file, problem.text), []).append(one.name)
    for (level, kind, file, text), names in by_text.items():
        yield Caution(level, kind, ("runs",), f"{file} {text} ({_listed(names)}): what it would show is left out.")


def _unfinished(study: Study) -> Iterator[Caution]:
    for arm, one in study.pairs:
        if one.is_finished:
            continue
        rounds = f"{one.rounds} of {one.total_rounds or 'an unknown number of'} rounds"
        counts = "is left out of the arm's means" if arm.is_finished else "is shown as far as it went"
        text = f"{one.name} is {one.state} ({rounds}) and {counts}; {arm.measure.to_go_on()}."
        yield Caution("warning", "incomplete", ("runs", "results"), text)


def _ledgers(study: Study) -> Iterator[Caution]:
    empty = [one.name for one in study.runs if one.bytes and one.bytes.is_empty and one.exchange != "none"]
    if empty:
        yield Caution("error", "empty ledger", ("bytes",), f"ledger.parquet has no row ({_listed(empty)}).")
    alone = [one.name for one in study.runs if one.exchange == "none" and one.is_finished]
    if alone:
        text = f"Nothing was exchanged in {_listed(alone)}: clients trained alone, so there are no bytes to show."
        yield Caution("note", "no exchange", ("bytes",), text)
    for one in study.runs:
        if one.bytes is None or one.bytes.is_empty or not one.is_finished:
            continue
        for way in ("uplink", "downlink"):
            booked, told = one.bytes.total(way), one.run.summary.get(f"{way}_bytes")
            if told is not None and told != booked:
                text = f"{one.name}: the ledger's {way} rows sum to {booked:,} bytes, summary.json says {told:,}."
                yield Caution("error", "counts disagree", ("bytes", "results"), text)


def _interfaces(study: Study) -> Iterator[Caution]:
    off = []
    for one in study.runs:
        found = one.run.summary.get("interface")
        if not found or not found.get("counted"):
            continue
        ratio, (low, high) = found["sent"] / found["counted"], interface_limits(found, num_messages(one))
        if not low <= ratio <= high:
            off.append(
                f"{one.name}: {ratio:.4f} times the counted bytes, packet headers explain {low:.3f} to {high:.3f}"
            )
    if off:
        text = f"Interfaces sent something else, or bytes were not counted. {'; '.join(off)}."
        yield Caution("warning", "interface", ("interface",), text)


def num_messages(one: Evidence) -> int:
    """Return how many messages a run's ranks exchanged, at most; 0 where its phases are not known."""
    calls = sum(row["calls"] for row in one.phases if row["phase"] == "exchange")
    codec = str(one.run.summary.get("uplink")).split(":")[0]
    each = _MESSAGES.get(codec, 1) if one.exchange == "step" else 1
    return int(calls * each * max(0, int(one.run.summary.get("world_size") or 1) - 1))


def interface_limits(interface: dict[str, Any], messages: int = 0) -> tuple[float, float]:
    """Return between which ratios of sent to counted bytes headers explain the difference, to 1 %.

    At least nothing, at most a header beside every full segment, on Ethernet as many acknowledgements again, and
    `MESSAGE_OVERHEAD` for each message.
    """
    names = {name for host in interface.get("hosts", []) for name in host.get("interfaces", {})}
    overhead = LOOPBACK_OVERHEAD if names <= {"lo"} else 2 * ETHERNET_OVERHEAD
    if messages:
        overhead += MESSAGE_OVERHEAD * messages / interface["counted"]
    return 1 - INTERFACE_TOLERANCE, 1 + overhead + INTERFACE_TOLERANCE


def _not_evaluated(study: Study) -> Iterator[Caution]:
    """Say which runs of data of one's own show the training's own numbers alone."""
    names = [arm.name for arm in study.finished if not (arm.measure.has_test_set or arm.result or arm.best)]
    if names:
        text = f"No evaluation returned a metric in {_listed(names)}: only what training reports is shown."
        yield Caution("note", "no evaluation", ("results", "learning"), text)


# ---- comparisons ---------------------------------------------------------------------------------------------------


def _not_comparable(study: Study) -> Iterator[Caution]:
    arms = [arm for arm in study.arms if arm.runs]
    if len(arms) < 2:
        return
    own = {arm.name: settings(arm.first) for arm in arms}
    for noun, keys in (("data", _DATA), ("model", _MODEL), ("budget", _BUDGET)):
        for key in keys:
            values = {name: of_arm[key] for name, of_arm in own.items() if key in of_arm}
            if len({repr(value) for value in values.values()}) > 1:
                name = key.partition(".")[2].replace("_", " ")
                text = f"These arms are not comparable: they differ in {noun}, {name}: {_by_value(values)}."
                yield Caution("warning", f"other {noun}", _COMPARED, text)
    judged = {arm.name: arm.measure.metric.label for arm in arms}
    if len({arm.measure for arm in arms}) > 1:
        text = f"These arms are not comparable: they are judged by different metrics: {_by_value(judged)}."
        yield Caution("warning", "other metric", _COMPARED, text)
    measures = {arm.name: _measure(arm.first) for arm in arms if arm.measure.has_test_set}
    if len(set(measures.values())) > 1:
        text = f"Test accuracy is not measured alike: {_by_value(measures)}."
        yield Caution("warning", "other measure", _COMPARED, text)
    yield from _other_machines(study)


def _measure(one: Evidence) -> str:
    if one.run.summary.get("personal_test_accuracy"):
        return "mean of the clients, each on its own classes"
    return "one model on the whole test set"


def _other_machines(study: Study) -> Iterator[Caution]:
    runs = [one for one in study.runs if one.is_finished]
    for key in _PLACE:
        values = {one.name: one.run.summary[key] for one in runs if key in one.run.summary}
        if len({repr(value) for value in values.values()}) > 1:
            text = f"Seconds are not comparable: runs differ in {key.replace('_', ' ')}: {_by_value(values)}."
            yield Caution("warning", "other hardware", _COMPARED, text)
    commits = {one.name: str(one.run.summary.get("git_commit") or "unknown")[:10] for one in runs}
    torch = {one.name: (one.run.summary.get("versions") or {}).get("torch") for one in runs}
    for noun, values in (("commit", commits), ("version of PyTorch", torch)):
        if len(set(values.values())) > 1:
            text = f"Runs were made by more than one {noun}: {_by_value(values)}."
            yield Caution("note", f"other {noun}", _COMPARED, text)


def _seeds(study: Study) -> Iterator[Caution]:
    seeds = {arm.name: sorted(int(one.run.summary.get("seed") or 0) for one in arm.runs) for arm in study.finished}
    if len({repr(own) for own in seeds.values()}) > 1:
        text = f"Arms are means over other seeds, so their differences are not paired: seeds {_by_value(seeds)}."
        yield Caution("note", "seeds", _COMPARED, text)


def _by_value(values: dict[str, Any]) -> str:
    names: dict[str, list[str]] = {}
    for name, value in values.items():
        names.setdefault(str(value), []).append(name)
    return "; ".join(f"{value} ({_listed(own)})" for value, own in names.items())


def _listed(names: Sequence[str], most: int = 4) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


# ---- compression ---------------------------------------------------------------------------------------------------


def _pays_in_bytes(study: Study) -> Iterator[Caution]:
    for arm in study.arms:
        if arm.is_float32:
            continue
        for way in ("uplink", "downlink"):
            less = arm.times_less(way)
            codec = str(arm.first.run.summary.get(way))
            if less is not None and less < 1 and codec not in ("fp32", "float32"):
                sent, raw = (human_bytes(arm.mean(f"{way}_bytes{end}")) for end in ("", "_fp32"))
                text = f"Compression did not pay in bytes: {arm.name} sent {sent} {way}, float32 would be {raw}."
                yield Caution("warning", "did not pay", ("results", "bytes"), text)


def _pays_in_time(study: Study) -> Iterator[Caution]:
    slower: list[str] = []
    for arm in study.finished:
        payoff, base = study.payoff(arm), study.reference(arm, lambda other: other.is_float32)
        if payoff is None or base is None or base.seconds is None or arm.seconds is None:
            continue
        more = arm.seconds.mean / base.seconds.mean - 1
        if more > SAME_TIME:
            slower.append(f"{arm.name} took {100 * more:.0f} % longer than {base.name}{_where(payoff)}")
    if slower:
        text = f"Compression did not pay in time where these runs were made: {'; '.join(slower)}."
        yield Caution("warning", "did not pay", ("results", "tradeoff"), text)


def _where(payoff: Payoff) -> str:
    """Return where an arm that lost time pays nevertheless."""
    if payoff.break_even == 0:
        return " and pays on no link"
    if payoff.break_even is None or payoff.break_even == float("inf"):
        return ", not by computing but in the exchange"
    return f" and pays below {human_bandwidth(payoff.break_even)}"


def _noisy(study: Study) -> Iterator[Caution]:
    """Say which arms took so different times with different seeds that their seconds mean little."""
    noisy = [
        f"{arm.name} ({human_seconds(arm.seconds.mean)} ± {human_seconds(arm.seconds.sd)})"
        for arm in study.finished
        if arm.seconds and arm.seconds.sd and arm.seconds.sd > NOISY * arm.seconds.mean
    ]
    if noisy:
        text = f"Seconds vary much between seeds, as they do where other programs run: {', '.join(noisy)}."
        yield Caution("warning", "noisy time", ("results", "tradeoff", "time"), text)


def _slower_than_bf16(study: Study) -> Iterator[Caution]:
    """Say which codecs cost more time than bfloat16, and from which bandwidth on that is more than they save."""
    limits, beaten = [], []
    for arm in study.finished:
        bf16 = study.reference(arm, lambda other: other.is_bf16)
        if bf16 is None or bf16 is arm or arm.is_float32 or arm.computation is None or bf16.computation is None:
            continue
        extra, saved = arm.computation.mean - bf16.computation.mean, bf16.link_bytes - arm.link_bytes
        if extra <= SAME_TIME * bf16.computation.mean:
            continue
        if saved <= 0:
            beaten.append(f"{arm.name} (by {human_seconds(extra)})")
        else:
            limits.append(f"{human_bandwidth(8 * saved / extra)} ({arm.name})")
    if beaten:
        text = f"Slower than bfloat16 and no smaller, so bfloat16 is better on any link: {', '.join(beaten)}."
        yield Caution("warning", "slower than bf16", ("results", "tradeoff"), text)
    if limits:
        text = f"bfloat16 computes less, and takes less time in all on links faster than {', '.join(limits)}."
        yield Caution("note", "slower than bf16", ("tradeoff",), text)


def human_bandwidth(bits_per_s: float | None) -> str:
    """Return bits a second in words: "40 Mbit/s", "2.5 Gbit/s"."""
    if bits_per_s is None or bits_per_s == float("inf"):
        return "any bandwidth"
    return bandwidth_text(bits_per_s / 8)


# ---- clients, test set ---------------------------------------------------------------------------------------------


def _left_out(study: Study) -> Iterator[Caution]:
    for one in study.runs:
        rows = one.left_out or [
            {"client": row.get("client"), "round": row.get("round"), "status": row.get("reason")}
            for row in one.run.summary.get("left_out") or []
        ]
        if rows:
            reasons = _by_value({f"client {row['client']} in round {row['round'] + 1}": row["status"] for row in rows})
            text = f"{one.name}: clients were left out of {len(rows)} updates: {reasons}."
            yield Caution("warning", "left-out clients", ("clients", "results"), text)
    for one in study.runs:
        if lost := [row["round"] + 1 for row in one.metrics if _lost(row)]:
            text = f"{one.name}: the loss is no number from round {lost[0]} on."
            yield Caution("error", "diverged", ("results", "learning"), text)


def _lost(row: dict[str, Any]) -> bool:
    """Whether a loss that was computed is not finite, which metrics.jsonl keeps as null."""
    return any(key in row and row[key] is None for key in ("train_loss", "val_loss"))


def _test_set(study: Study) -> Iterator[Caution]:
    arms = [arm for arm in study.finished if arm.measure.has_test_set]
    unvalidated = [arm.name for arm in arms if _has_no_validation(arm.first)]
    if unvalidated and len(arms) > 1:
        text = (
            f"No validation data in {_listed(unvalidated)}: whoever chooses among these arms chooses by the test set, "
            "and the accuracy of the chosen one is too good."
        )
        yield Caution("warning", "test set", _COMPARED, text)
    own = [settings(arm.first) for arm in arms]
    tuned = [key for key in _TUNED if len({repr(one[key]) for one in own if key in one}) > 1]
    if tuned and not unvalidated:
        names = ", ".join(key.partition(".")[2].replace("_", " ") for key in tuned)
        text = (
            f"Arms differ in what is tuned ({names}). Choose by the validation column: the test accuracy of an arm "
            "that was chosen by its test accuracy is too good."
        )
        yield Caution("warning", "test set", _COMPARED, text)


def _has_no_validation(one: Evidence) -> bool:
    return settings(one).get("data.val_fraction") == 0 or one.run.summary.get("best_val_accuracy") is None


def in_section(cautions: Sequence[Caution], section: str) -> list[Caution]:
    """Return the cautions that concern a section."""
    return [caution for caution in cautions if section in caution.sections]

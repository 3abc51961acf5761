"""The headline: a few numbers that answer what came out, what it cost, and whether compression paid."""

from __future__ import annotations

from typing import NamedTuple

from fedq.report.metric import Measure, first_upper
from fedq.report.page.cautions import human_bandwidth
from fedq.report.page.cells import pays_words
from fedq.report.page.curves import START_BITS_PER_S
from fedq.report.page.pareto import seconds_on_link
from fedq.report.page.study import ArmEvidence, Figure, Study
from fedq.report.terminal import human_seconds
from fedq.text import human_bytes


class Card(NamedTuple):
    """A label, a number, and a sentence."""

    label: str
    value: str
    detail: str


def make_cards(study: Study) -> list[Card]:
    """Return the headline of one arm, or of several."""
    return _of_one(study, study.arms[0]) if len(study.arms) == 1 else _of_several(study)


def _of_one(study: Study, arm: ArmEvidence) -> list[Card]:
    words = arm.measure.words
    if arm.result:
        top = Card(first_upper(words["result"]), _text(arm, arm.result), _seeds(len(arm.runs)))
    else:
        state = f"{arm.first.state}: {arm.first.rounds} of {arm.first.total_rounds or '-'} rounds"
        top = Card(first_upper(words["best in full"]), _text(arm, arm.best), state)
    time = arm.seconds.mean if arm.seconds else 0.0
    rounds = f"{arm.first.rounds} {'epochs' if arm.exchange == 'step' else 'rounds'}"
    pays = pays_words(arm, study.payoff(arm))
    return [
        top,
        _sent(arm, "uplink", "Sent up" if arm.exchange != "step" else "First leg"),
        _sent(arm, "downlink", "Sent down" if arm.exchange != "step" else "Second leg"),
        Card("Time", human_seconds(time), rounds),
        Card("Does it pay in time?", *_pays(pays)),
    ]


def _text(arm: ArmEvidence, figure: Figure | None) -> str:
    return arm.measure.text(figure.mean, figure.sd) if figure else f"- {arm.measure.metric.unit}".rstrip()


def _seeds(num: int) -> str:
    return "one seed: no spread is known" if num == 1 else f"mean ± sd of {num} seeds"


def _pays(words: str) -> tuple[str, str]:
    if words.startswith("below"):
        return "It depends", f"{words} it is faster than float32"
    if words.startswith("on any"):
        return "Yes", words
    if words.startswith("on no"):
        return "No", words
    return "Unknown" if words.startswith("no float32") else "-", words


def _sent(arm: ArmEvidence, way: str, label: str) -> Card:
    less = arm.times_less(way)
    if less is None:
        return Card(label, "0 B", "nothing was sent")
    codec = str(arm.first.run.summary.get(way))
    words = (
        f"{less:.3g}x less than float32"
        if less > 1.02
        else "as much as float32"
        if less > 0.98
        else "more than float32"
    )
    return Card(label, human_bytes(arm.mean(f"{way}_bytes")), f"{codec}: {words}")


def _of_several(study: Study) -> list[Card]:
    tested = [arm for arm in study.finished if arm.result]
    is_coded = any(not arm.is_float32 and arm.link_bytes for arm in study.arms)
    cards: list[Card | None] = []
    for measure in study.measures:
        own = study.judged_by(measure)
        found = [_base(own), _chosen(own, measure), _small(own, measure)] if is_coded else [_chosen(own, measure)]
        if len(study.measures) > 1:
            found = [card and card._replace(label=measure.named(card.label)) for card in found]
        cards += found
    cards += [_fast(tested), _payoffs(study)] if is_coded else [_fast(tested)]
    return [*(card for card in cards if card), _runs(study)]


def _base(tested: list[ArmEvidence]) -> Card | None:
    base = next((arm for arm in tested if arm.is_float32), None)
    if base is None:
        return None
    both = human_bytes(base.mean("uplink_bytes") + base.mean("downlink_bytes"))
    return Card("Float32", _text(base, base.result), f"{base.name}: {both} up and down")


def _chosen(tested: list[ArmEvidence], measure: Measure) -> Card | None:
    validated = [(measure.gain(arm.best.mean), arm) for arm in tested if arm.best]
    if not validated:
        return None
    _, arm = max(validated, key=lambda pair: pair[0])
    words = measure.words
    return Card(first_upper(words["chosen by"]), _text(arm, arm.result), f"{arm.name}: its {words['result']}")


def _small(tested: list[ArmEvidence], measure: Measure) -> Card | None:
    base = next((arm for arm in tested if arm.is_float32), None)
    if base is None or base.result is None:
        return None
    label = f"Fewest bytes within {measure.near} of float32"
    coded = [arm for arm in tested if not arm.is_float32 and arm.link_bytes]
    close = [arm for arm in coded if arm.result and measure.is_near(arm.result.mean, base.result.mean)]
    if not close:
        return Card(label, "none", "no compressed arm is that close")
    arm = min(close, key=lambda arm: arm.link_bytes)
    sent, raw = (sum(arm.mean(f"{way}_bytes{end}") for way in ("uplink", "downlink")) for end in ("", "_fp32"))
    less = arm.times_less("uplink")
    up = f", {less:.3g}x less up" if less and arm.mean("downlink_bytes") else ""
    return Card(label, f"{raw / sent:.3g}x less", f"{arm.name}: {_text(arm, arm.result)}{up}")


def _fast(tested: list[ArmEvidence]) -> Card | None:
    timed = [
        (seconds_on_link(arm.computation.mean, arm.link_bytes, START_BITS_PER_S), arm)
        for arm in tested
        if arm.computation and arm.link_bytes
    ]
    if not timed:
        return None
    seconds, arm = min(timed, key=lambda pair: pair[0])
    label = f"Fewest seconds at {human_bandwidth(START_BITS_PER_S)}"
    return Card(label, human_seconds(seconds), f"{arm.name}, for as many rounds")


def _payoffs(study: Study) -> Card | None:
    payoffs = [payoff for arm in study.arms if (payoff := study.payoff(arm))]
    if not payoffs:
        return Card("Does compression pay?", "Unknown", "no float32 run beside it to compare with")
    anywhere = sum(payoff.break_even in (None, float("inf")) for payoff in payoffs)
    limits = [payoff.break_even for payoff in payoffs if payoff.break_even and payoff.break_even != float("inf")]
    words = f"{anywhere} of {len(payoffs)} arms compute no longer than float32"
    if limits:
        ends = dict.fromkeys(map(human_bandwidth, (min(limits), max(limits))))
        words += f"; the others pay below {' to '.join(ends)}"
    value = "Yes" if anywhere == len(payoffs) else "It depends" if anywhere or limits else "No"
    return Card("Does compression pay in time?", value, words)


def _runs(study: Study) -> Card:
    finished = sum(one.is_finished for one in study.runs)
    words = f"{len(study.arms)} arms"
    return Card("Runs", f"{finished} of {len(study.runs)}" if finished < len(study.runs) else f"{finished}", words)

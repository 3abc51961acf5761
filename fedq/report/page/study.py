"""Runs as arms, and what each arm reached and cost: the numbers that tables, charts, cautions and text share.

An arm's numbers are means over the seeds that finished; where none did, over what there is, and the arm says so.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from fedq.report.arms import group
from fedq.report.metric import Measure
from fedq.report.page.evidence import Evidence

SAME_TIME = 0.05
"""Largest relative difference of times that are called equal: medians of repeats vary so on a quiet machine."""

_FLOAT32 = ("fp32", "float32")
_CODED_SETTINGS = ("uplink", "downlink", "feedback", "residual_memory", "start", "out", "name")


@dataclass(frozen=True)
class Figure:
    """Mean and sample standard deviation over seeds; sd is None of a single one."""

    mean: float
    sd: float | None = None

    @staticmethod
    def of(values: Iterable[float | None]) -> Figure | None:
        """Return mean and sd of the values that are known, None without any."""
        known = [float(value) for value in values if value is not None]
        if not known:
            return None
        return Figure(statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else None)


@dataclass(frozen=True)
class ArmEvidence:
    """An arm with all that its runs' files say.

    Args:
        name: Words that set the arm apart from the others.
        all_runs: The arm's runs, by seed.
    """

    name: str
    all_runs: tuple[Evidence, ...]

    @cached_property
    def runs(self) -> tuple[Evidence, ...]:
        """The runs that count: those that finished, or else those that have a round."""
        finished = tuple(one for one in self.all_runs if one.is_finished)
        return finished or tuple(one for one in self.all_runs if one.metrics)

    @property
    def is_finished(self) -> bool:
        """Whether at least one seed came to its end."""
        return any(one.is_finished for one in self.all_runs)

    @property
    def first(self) -> Evidence:
        """The first run that counts, else the first."""
        return (self.runs or self.all_runs)[0]

    @property
    def exchange(self) -> str:
        """When messages travel: round, step or none."""
        return self.first.exchange

    @property
    def measure(self) -> Measure:
        """What the arm is judged by."""
        return self.first.run.measure

    @cached_property
    def result(self) -> Figure | None:
        """What the last models reached, as it is shown (test accuracy, %); None if no seed finished."""
        return self._shown(self.measure.last) if self.is_finished else None

    @cached_property
    def best(self) -> Figure | None:
        """The best of any round, as it is shown (best validation accuracy, %)."""
        return self._shown(self.measure.best)

    @cached_property
    def test_loss(self) -> Figure | None:
        """Loss on the test set."""
        return self.figure("test_loss")

    def figure(self, key: str) -> Figure | None:
        """Return a summary's number."""
        return Figure.of(one.run.summary.get(key) for one in self.runs)

    def mean(self, key: str) -> float:
        """Return a summary's mean number, 0 where it is not known."""
        found = self.figure(key)
        return found.mean if found else 0.0

    @cached_property
    def seconds(self) -> Figure | None:
        """Seconds of all rounds as measured."""
        return Figure.of(sum(r.get("seconds") or 0.0 for r in one.metrics) for one in self.runs if one.metrics)

    @cached_property
    def computation(self) -> Figure | None:
        """Seconds of all rounds without what ranks waited for the exchange, where that was measured."""
        return Figure.of(computation_seconds(one) for one in self.runs if one.metrics)

    @cached_property
    def link_bytes(self) -> float:
        """Bytes that one link carries, see `link_bytes`."""
        return statistics.fmean(link_bytes(one) for one in self.runs) if self.runs else 0.0

    def times_less(self, direction: str) -> float | None:
        """Return float32's bytes over the bytes sent in a direction; None where nothing was."""
        sent, raw = (self.mean(f"{direction}_bytes{suffix}") for suffix in ("", "_fp32"))
        return raw / sent if sent and raw else None

    @property
    def is_float32(self) -> bool:
        """Whether everything travels in float32."""
        return self.exchange != "none" and self._sends(_FLOAT32)

    @property
    def is_bf16(self) -> bool:
        """Whether updates travel in bfloat16."""
        return str(self.first.run.summary.get("uplink")) in ("bf16", "bfloat16")

    def _sends(self, codecs: Sequence[str]) -> bool:
        summary = self.first.run.summary
        second_leg = summary.get("downlink_bytes") or self.exchange != "step"
        return str(summary.get("uplink")) in codecs and (not second_leg or str(summary.get("downlink")) in codecs)

    def _shown(self, value: Callable[[dict[str, Any]], float | None]) -> Figure | None:
        found, scale = Figure.of(value(one.run.summary) for one in self.runs), self.measure.scale
        return found and Figure(scale * found.mean, None if found.sd is None else scale * found.sd)


def exchange_seconds(one: Evidence) -> float:
    """Return the seconds that ranks waited for the exchange, their mean; 0 where it was not measured."""
    ranks = {row["rank"] for row in one.phases}
    return sum(row["seconds"] for row in one.phases if row["phase"] == "exchange") / len(ranks) if ranks else 0.0


def computation_seconds(one: Evidence) -> float:
    """Return the seconds of all rounds less what was waited for the exchange."""
    return sum(row.get("seconds") or 0.0 for row in one.metrics) - exchange_seconds(one)


def links(one: Evidence) -> int:
    """Return how many links carry a run's bytes side by side: one (the server's), or in step mode one a rank."""
    return int(one.run.summary.get("world_size") or 1) if one.exchange == "step" else 1


def link_bytes(one: Evidence) -> float:
    """Return the bytes that one link carries: all up and down on the server's, or in step mode what a rank sends."""
    summary = one.run.summary
    return sum(summary.get(f"{way}_bytes") or 0 for way in ("uplink", "downlink")) / links(one)


@dataclass(frozen=True)
class Payoff:
    """Whether an arm is faster than the float32 arm, and up to which bandwidth.

    Args:
        saved_bytes: Bytes less that one link carries; negative if more was sent.
        extra_seconds: Seconds more of computation; negative if it was faster.
        break_even: Bandwidth of a link, bits a second, below which the arm is faster. `inf`: on any link; 0: on none;
            where it is None, computation is equal within `SAME_TIME`, so any link that is waited for pays.
    """

    saved_bytes: float
    extra_seconds: float
    break_even: float | None


@dataclass(frozen=True)
class Study:
    """All arms of a page.

    Args:
        title: Title of the page.
        arms: All arms: float32 first, then from many bytes to few.
    """

    title: str
    arms: tuple[ArmEvidence, ...]

    @property
    def runs(self) -> list[Evidence]:
        """All runs, arm by arm."""
        return [one for arm in self.arms for one in arm.all_runs]

    @property
    def pairs(self) -> list[tuple[ArmEvidence, Evidence]]:
        """Each run with its arm."""
        return [(arm, one) for arm in self.arms for one in arm.all_runs]

    @property
    def finished(self) -> list[ArmEvidence]:
        """Arms with a run that finished."""
        return [arm for arm in self.arms if arm.is_finished]

    @property
    def measures(self) -> list[Measure]:
        """What arms are judged by."""
        return list(dict.fromkeys(arm.measure for arm in self.arms))

    def judged_by(self, measure: Measure) -> list[ArmEvidence]:
        """Return the finished arms of a measure that have a result."""
        return [arm for arm in self.finished if arm.measure == measure and arm.result]

    def reference(self, arm: ArmEvidence, kind: Callable[[ArmEvidence], bool]) -> ArmEvidence | None:
        """Return the finished arm of a kind (float32, bf16) that is most like an arm in everything but its codecs."""
        alike = [other for other in self.finished if (other.exchange, other.measure) == (arm.exchange, arm.measure)]
        others = [other for other in alike if kind(other)]
        own = settings(arm.first)
        return min(others, key=lambda other: _distance(own, settings(other.first)), default=None)

    def payoff(self, arm: ArmEvidence) -> Payoff | None:
        """Compare an arm's time with that of the float32 arm; None where there is none, or it is that arm."""
        base = self.reference(arm, lambda other: other.is_float32)
        if base is None or base is arm or not arm.is_finished or arm.exchange == "none":
            return None
        if base.computation is None or arm.computation is None:
            return None
        saved, extra = base.link_bytes - arm.link_bytes, arm.computation.mean - base.computation.mean
        return Payoff(saved, extra, _break_even(saved, extra, base.computation.mean))


def _break_even(saved: float, extra: float, base_seconds: float) -> float | None:
    if saved <= 0:
        return 0.0
    if abs(extra) <= SAME_TIME * base_seconds:
        return None
    return 8 * saved / extra if extra > 0 else float("inf")


def settings(one: Evidence) -> dict[str, Any]:
    """Return a run's settings as `section.name`."""
    return {
        f"{section}.{name}": value
        for section, values in one.run.config.items()
        if isinstance(values, dict)
        for name, value in values.items()
    }


def _distance(a: dict[str, Any], b: dict[str, Any]) -> int:
    keys = {key for key in a.keys() | b.keys() if key.partition(".")[2] not in (*_CODED_SETTINGS, "seed")}
    return sum(a.get(key) != b.get(key) for key in keys)


def make_study(runs: Sequence[Evidence], title: str | None = None) -> Study:
    """Group runs into arms, float32 first, then from many bytes to few."""
    by_path = {one.run.path: one for one in runs}
    found = [ArmEvidence(arm.name, tuple(by_path[run.path] for run in arm.runs)) for arm in group([*_runs(runs)])]
    arms = sorted(found, key=lambda arm: (not arm.is_float32, not arm.is_bf16, -arm.link_bytes, arm.name))
    return Study(title or _title(arms), tuple(arms))


def _runs(runs: Sequence[Evidence]) -> Iterable[Any]:
    return (one.run for one in runs)


def _title(arms: Sequence[ArmEvidence]) -> str:
    models = dict.fromkeys(model_name(arm.first) for arm in arms)
    data = dict.fromkeys(data_name(arm.first) for arm in arms)
    what = arms[0].name if len(arms) == 1 else f"{len(arms)} arms"
    return f"{', '.join(data)}, {', '.join(models)}: {what}"


def model_name(one: Evidence) -> str:
    """Return the model's name."""
    return str(one.run.summary.get("model") or "unknown model")


def data_name(one: Evidence) -> str:
    """Return the data set's name, without where it lies."""
    return str(one.run.summary.get("dataset") or "unknown data").split(" from ")[0].split(":")[0]

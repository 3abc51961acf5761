"""Which way to exchange, and why: one recommendation in plain words, which may be to compress nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedq.planning.step import BASELINES, Prediction
from fedq.planning.units import bandwidth_text, duration_text

TRUSTED = ("fp32", "bf16", "int8", "int4")
"""Codecs that end within noise of float32 in docs/results.md, the finest first."""
MARGIN = 0.10
"""Least gain that counts: one below it is within the error of the model, and compression is not worth it."""
_ALIKE = 0.05
"""Codecs whose seconds are within this share of the fastest count as equally fast; the finest of them is taken."""


@dataclass(frozen=True)
class Advice:
    """What to use.

    Args:
        codec: Spec of the recommended codec; ``fp32`` or ``bf16`` where compression does not pay.
        schedule: Schedule of the exchange (in rounds: who averages).
        because: The reason, in words.
        note: Codecs that were considered, and what a faster one that was not would bring, in words.
    """

    codec: str
    schedule: str
    because: str
    note: str

    @property
    def compresses(self) -> bool:
        """Whether it is more than a cast."""
        return self.codec not in BASELINES


@dataclass(frozen=True)
class Option:
    """What advice needs to know of a way: a step's or a round's; ``nbytes`` is what the busiest link carries."""

    codec: str
    schedule: str
    seconds: float
    nbytes: float
    coding_s: float
    break_even: Mapping[str, float]

    @property
    def words(self) -> str:
        """The option in words."""
        return self.codec if self.codec in BASELINES else f"{self.codec} by {self.schedule}"


def step_options(rows: Sequence[Prediction]) -> list[Option]:
    """Return predictions of steps as options."""
    return [Option(r.codec, r.schedule, r.seconds, r.link_bytes, r.coding_s, r.break_even) for r in rows]


def advise(options: Sequence[Option], unit: str, bandwidth: float, ranks_per_link: int = 1) -> Advice:
    """Recommend one of the options.

    Args:
        options: Options to choose from, the baselines among them.
        unit: Word for what the options' seconds are of: ``step`` or ``round``.
        bandwidth: Bytes a second of each rank on the links that decide.
        ranks_per_link: Number of ranks that share one of these links.
    """
    casts = sorted((o for o in options if o.codec in BASELINES), key=lambda o: o.seconds)
    plain = _finest(casts)
    known = [o for o in options if o.codec in TRUSTED and o.codec not in BASELINES]
    fastest = min(known, key=lambda o: o.seconds, default=None)
    pays = [o for o in known if o.seconds * (1 + MARGIN) < casts[0].seconds]
    chosen = _finest(pays) if pays else plain
    note = _note(options, chosen, unit)
    if not pays:
        return Advice(plain.codec, plain.schedule, _why_not(plain, fastest, unit, ranks_per_link), note)
    where = bandwidth_text(bandwidth * ranks_per_link)
    because = (
        f"a {unit} takes {duration_text(chosen.seconds)} where the faster of fp32 and bf16, {casts[0].codec}, takes "
        f"{duration_text(casts[0].seconds)} ({casts[0].seconds / chosen.seconds:.1f} times as long): on links of "
        f"{where} each carries {_mb(chosen.nbytes)} a {unit} in place of {_mb(casts[0].nbytes)}, and coding "
        f"costs {duration_text(chosen.coding_s)}"
    )
    return Advice(chosen.codec, chosen.schedule, because, note)


def _finest(options: Sequence[Option]) -> Option:
    """Return the finest of the options that are about as fast as the fastest."""
    limit = min(o.seconds for o in options) * (1 + _ALIKE)
    alike = [o for o in options if o.seconds <= limit]
    return min(alike, key=lambda o: (TRUSTED.index(o.codec), o.seconds))


def _why_not(plain: Option, fastest: Option | None, unit: str, ranks_per_link: int) -> str:
    takes = f"compression does not pay here: with {plain.codec} a {unit} takes {duration_text(plain.seconds)}"
    if fastest is None or plain.nbytes == 0:
        return takes if fastest is None else f"{takes}, and nothing travels"
    at = min((b for name, b in fastest.break_even.items() if name in BASELINES), default=0.0) * ranks_per_link
    below = f"; below {bandwidth_text(at)} it would" if 0 < at < math.inf else ""
    if at == 0 and fastest.nbytes > plain.nbytes:
        below = f"; nor would it on slower links: the busiest would carry {_mb(fastest.nbytes)} for {_mb(plain.nbytes)}"
    gain = fastest.seconds - plain.seconds
    compared = f"{duration_text(abs(gain))} {'more' if gain > 0 else 'less'}"
    return (
        f"{takes}, with {fastest.words} {duration_text(fastest.seconds)}, {compared}, of which coding is "
        f"{duration_text(fastest.coding_s)} (a gain below {MARGIN:.0%} counts as none){below}"
    )


def _note(options: Sequence[Option], chosen: Option, unit: str) -> str:
    """Name what is faster but may cost accuracy."""
    others = [o for o in options if o.codec not in TRUSTED and o.seconds * (1 + _ALIKE) < chosen.seconds]
    text = f"considered: {', '.join(TRUSTED)}, which end where float32 does in docs/results.md"
    if others:
        best = min(others, key=lambda o: o.seconds)
        text += f"; {best.words} would take {duration_text(best.seconds)} a {unit}, at some cost in accuracy"
    return text


def _mb(nbytes: float) -> str:
    return f"{nbytes / 1e6:.3g} MB" if nbytes < 999.5e6 else f"{nbytes / 1e9:.3g} GB"

"""What a chart shows, without how: drawn by `draw_bokeh` for the page and by `draw_matplotlib` for PNG and SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F")
"""Okabe and Ito's palette without black and yellow, which either a dark or a white page would hide, and a grey."""

PART_COLOURS = {
    "codes": "#0072B2",
    "scales": "#E69F00",
    "indices": "#009E73",
    "exempt": "#CC79A7",
    "stats": "#56B4E9",
    "framing": "#7F7F7F",
    "uplink": "#0072B2",
    "downlink": "#E69F00",
    "peer": "#7F7F7F",
    "compute": "#0072B2",
    "encode": "#E69F00",
    "exchange": "#D55E00",
    "decode": "#CC79A7",
    "server": "#009E73",
    "evaluation": "#56B4E9",
    "other": "#7F7F7F",
    "not split": "#7F7F7F",
    "client": "#56B4E9",
    "mean": "#D55E00",
    "up": "#0072B2",
    "down": "#E69F00",
    "up, codes at their entropy": "#009E73",
    "float32, up": "#7F7F7F",
    "bfloat16, up": "#CC79A7",
}
"""Colours of what is no arm, the same in every chart."""

BAR_SERIES = ("float32, up", "bfloat16, up", "mean")
"""Series of dots that others are compared with."""

DASHES = ("solid", "dashed", "dotted", "dashdot")


def style_of(number: int) -> tuple[str, str]:
    """Return the colour and the dash of the n-th arm; 28 differ."""
    return COLOURS[number % len(COLOURS)], DASHES[number // len(COLOURS) % len(DASHES)]


@dataclass(frozen=True)
class Heading:
    """What stands around a chart.

    Args:
        key: Name of its files, and of its figure on the page.
        title: A few words.
        caption: How to read it, with the unit.
        x: The x axis with its unit.
        y: The y axis with its unit.
    """

    key: str
    title: str
    caption: str
    x: str
    y: str = ""


@dataclass(frozen=True)
class Curve:
    """One arm's line.

    Args:
        name: The arm.
        number: Its place among all arms, which gives its style.
        x: Values on the x axis, ascending.
        y: Values on the y axis.
        sd: Standard deviation over seeds at each point; empty of a single seed.
        rounds: The round of each point.
        fixed: Where x depends on the bandwidth: the part that does not, and `bits` that travel on the link.
        bits: See `fixed`.
    """

    name: str
    number: int
    x: Sequence[float]
    y: Sequence[float]
    sd: Sequence[float]
    rounds: Sequence[int]
    fixed: Sequence[float] = ()
    bits: Sequence[float] = ()


@dataclass(frozen=True)
class Lines:
    """Curves of arms, with bands of one sd."""

    heading: Heading
    curves: Sequence[Curve]
    x_log: bool = False
    y_log: bool = False


@dataclass(frozen=True)
class Front:
    """Arms as points, with the Pareto front among them: low x, high y, or low where less is better.

    Args:
        heading: Around it.
        names: Of the arms.
        numbers: Their places among all arms.
        x: Costs.
        y: Results, in the unit of the axis.
        sd: Of the results, 0 of a single seed.
        on_front: Whether no arm beats this one.
        fixed: See `Curve.fixed`.
        bits: See `Curve.fixed`.
    """

    heading: Heading
    names: Sequence[str]
    numbers: Sequence[int]
    x: Sequence[float]
    y: Sequence[float]
    sd: Sequence[float]
    on_front: Sequence[bool]
    fixed: Sequence[float] = ()
    bits: Sequence[float] = ()


@dataclass(frozen=True)
class Dots:
    """Points in lines of their own, one line a category; several series, each with a colour.

    Args:
        heading: Around it.
        categories: From the top.
        series: By name, (category, x) of its points.
        x_log: Whether the x axis is logarithmic.
    """

    heading: Heading
    categories: Sequence[str]
    series: Mapping[str, Sequence[tuple[str, float]]]
    x_log: bool = False


@dataclass(frozen=True)
class Stack:
    """Horizontal bars made of parts.

    Args:
        heading: Around it.
        categories: From the top.
        parts: By name, the length in each category.
    """

    heading: Heading
    categories: Sequence[str]
    parts: Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class Heat:
    """A table in shades.

    Args:
        heading: Around it.
        rows: From the top.
        columns: From the left.
        values: [rows][columns], 0 or more.
        noun: What a value counts.
    """

    heading: Heading
    rows: Sequence[str]
    columns: Sequence[str]
    values: Sequence[Sequence[float]]
    noun: str


@dataclass(frozen=True)
class Bins:
    """A histogram.

    Args:
        heading: Around it.
        edges: One more than shares.
        shares: % of all values.
        limits: Ends of the x axis, where two histograms share it.
    """

    heading: Heading
    edges: Sequence[float]
    shares: Sequence[float]
    limits: tuple[float, float] | None = None


Chart = Lines | Front | Dots | Stack | Heat | Bins


@dataclass(frozen=True)
class Choice:
    """The same charts for one of several runs, which the reader chooses.

    Args:
        key: Name of the choice on the page.
        label: What is chosen.
        variants: By the choice's name, its charts, as many and of the same kinds in each.
        note: What was left out of the choice, if anything.
    """

    key: str
    label: str
    variants: Mapping[str, Sequence[Stack | Heat | Bins]] = field(default_factory=dict)
    note: str = ""

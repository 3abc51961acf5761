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
"""Colours of everything but arms (parts, directions, phases), the same in every chart."""

BAR_SERIES = ("float32, up", "bfloat16, up", "mean")
"""Series of dots with which the others are compared."""

DASHES = ("solid", "dashed", "dotted", "dashdot")


def style_of(number: int) -> tuple[str, str]:
    """Return the colour and the dash of the n-th arm; 28 differ."""
    return COLOURS[number % len(COLOURS)], DASHES[number // len(COLOURS) % len(DASHES)]


@dataclass(frozen=True)
class Heading:
    """What stands around a chart.

    Args:
        key: Name of the chart's files, and of its figure on the page.
        title: Title of the chart, a few words.
        caption: Text below the chart: how to read it, with the unit.
        x: Label of the x axis with its unit.
        y: Label of the y axis with its unit; empty: there is none.
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
        name: Name of the arm.
        number: Index of the arm among all arms, which gives its style.
        x: Values on the x axis, ascending.
        y: Values on the y axis.
        sd: Standard deviation over seeds at each point; empty if there is a single seed.
        rounds: The round of each point.
        fixed: Part of each x that does not depend on the bandwidth: x is this plus `bits` over it. Empty: none does.
        bits: Bits of each point that travel on the link, see `fixed`.
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
        heading: Texts around the chart.
        names: Names of the arms.
        numbers: Indices of these arms among all arms, which give their styles.
        x: Costs of the arms.
        y: Results of the arms, in the unit of the axis.
        sd: Standard deviations of the results, 0 where there is a single seed.
        on_front: For each arm, whether no other beats it.
        fixed: Part of each cost that does not depend on the bandwidth, see `Curve.fixed`.
        bits: Bits of each arm that travel on the link, see `Curve.fixed`.
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
        heading: Texts around the chart.
        categories: Names of the lines, from the top.
        series: Points of each series, as (category, x), by its name.
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
        heading: Texts around the chart.
        categories: Names of the bars, from the top.
        parts: Lengths of each part in all bars, by its name.
    """

    heading: Heading
    categories: Sequence[str]
    parts: Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class Heat:
    """A table in shades.

    Args:
        heading: Texts around the chart.
        rows: Names of the rows, from the top.
        columns: Names of the columns, from the left.
        values: Values [rows][columns], 0 or more.
        noun: Word for the things that a value counts.
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
        heading: Texts around the chart.
        edges: Edges of the bins, one more than shares.
        shares: Share of all values in each bin, in %.
        limits: Ends of the x axis, where two histograms share it; None: the edges.
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
        label: Words for what is chosen.
        variants: Charts by the choice's name, as many and of the same kinds for each.
        note: Words on what the choice leaves out; empty if nothing is.
    """

    key: str
    label: str
    variants: Mapping[str, Sequence[Stack | Heat | Bins]] = field(default_factory=dict)
    note: str = ""

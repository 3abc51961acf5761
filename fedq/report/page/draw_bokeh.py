"""Charts as Bokeh figures: transparent, without colours of text, which the page's script sets for its theme.

A figure's name is the chart's key. Each layer is one renderer, whatever the number of arms, so pages of many arms stay
small; a column `number` says whose a row is, and the page's script leaves out the rows of arms that are hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from fedq.errors import FieldError
from fedq.report.page.spec import (
    BAR_SERIES,
    COLOURS,
    PART_COLOURS,
    Bins,
    Chart,
    Choice,
    Curve,
    Dots,
    Front,
    Heading,
    Heat,
    Lines,
    Stack,
    style_of,
)

CHART_HEIGHT = 320
_LABEL_WIDTH = 15
_MARKERS = ("circle", "square", "diamond", "triangle")
_MOST_MARKED = 40
_GREY = COLOURS[-1]

Columns = dict[str, list[Any]]


def check_bokeh() -> None:
    """Raise a `FieldError` if Bokeh is missing."""
    try:
        import bokeh  # noqa: F401
    except ImportError:
        raise FieldError("report", "bokeh", "installed: pip install 'bokeh>=3.8'") from None


def draw(chart: Chart) -> Any:
    """Return the figure of a chart."""
    drawers: dict[type, Callable[[Any], Any]] = {
        Lines: _lines,
        Front: _front,
        Dots: _dots,
        Stack: _stack,
        Heat: _heat,
        Bins: _bins,
    }
    return drawers[type(chart)](chart)


def choice_columns(choice: Choice) -> dict[str, list[dict[str, Any]]]:
    """Return what every variant of a choice puts into its figures: columns, categories, ends of an axis, height."""
    return {name: [_switchable(chart) for chart in charts] for name, charts in choice.variants.items()}


def _switchable(chart: Stack | Heat | Bins) -> dict[str, Any]:
    if isinstance(chart, Stack):
        labels = category_labels(chart.categories)
        return {"columns": _stack_columns(chart), "y_factors": labels, "height": _row_height(labels)}
    if isinstance(chart, Heat):
        sides = {"y_factors": list(chart.rows)[::-1], "x_factors": list(chart.columns)}
        return {"columns": _heat_columns(chart), **sides, "height": _heat_height(chart), "high": _highest(chart)}
    return {"columns": _bin_columns(chart), "caption": chart.heading.caption, "limits": _limits(chart)}


def _figure(
    heading: Heading, *, tooltips: Sequence[tuple[str, str]], height: int = CHART_HEIGHT, **options: Any
) -> Any:
    from bokeh.models import NoOverlap
    from bokeh.plotting import figure

    plot = figure(
        name=heading.key,
        height=height,
        sizing_mode="stretch_width",
        tools="hover,box_zoom,reset,save",
        active_drag=None,  # on a phone a finger scrolls the page
        toolbar_location="above",
        tooltips=list(tooltips),
        background_fill_color=None,
        border_fill_color=None,
        outline_line_color=None,
        x_axis_label=heading.x or None,
        y_axis_label=heading.y or None,
        min_border_right=22,  # half of the last tick's number
        **options,
    )
    plot.toolbar.autohide = True
    plot.toolbar.logo = None
    for axis in plot.axis:
        axis.axis_label_text_font_style = "normal"
        axis.axis_label_text_font_size = axis.major_label_text_font_size = "12px"
        axis.axis_label_text_font = axis.major_label_text_font = "system-ui, sans-serif"
        axis.minor_tick_line_color = None
    plot.xaxis.major_label_policy = NoOverlap(min_distance=6)
    return plot


def _layer(plot: Any, columns: Columns, glyph: str, name: str, *, is_hovered: bool = False, **style: Any) -> None:
    """Add a layer; where a glyph's property is a column's name, Bokeh takes the column's values."""
    from bokeh import models

    source = models.ColumnDataSource(columns)
    renderer = plot.add_glyph(source, getattr(models, glyph)(**style), name=name)
    if is_hovered:
        plot.hover.renderers = [renderer]


def _plain_log(axis: Any) -> None:
    """Label a logarithmic axis with plain numbers, as 0.5 or 20, not powers."""
    from bokeh.models import LogTicker

    axis.ticker = LogTicker(desired_num_ticks=5, mantissas=[1, 2, 5])
    _plain_numbers(axis)


def _plain_numbers(axis: Any) -> None:
    from bokeh.models import CustomJSTickFormatter

    axis.formatter = CustomJSTickFormatter(code="return String(Number(tick.toPrecision(3)))")


def _round(value: float) -> float:
    """Return five significant digits: more than a chart shows, and fewer bytes."""
    return float(f"{value:.5g}")


def _rounded(values: Sequence[float]) -> list[float]:
    return [_round(value) for value in values]


def _short(label: str) -> str:
    """Return the first words of an axis' label, for a tooltip on a phone."""
    return label.split(" up and down")[0].split(" as measured")[0].split(" on a link")[0].split(", whole run")[0]


# ---- arms ----------------------------------------------------------------------------------------------------------


def _lines(chart: Lines) -> Any:
    kinds: dict[str, Any] = {
        "x_axis_type": "log" if chart.x_log else "linear",
        "y_axis_type": "log" if chart.y_log else "linear",
    }
    x, y = _short(chart.heading.x), _short(chart.heading.y)
    tips = [("arm", "@arm"), (x, "$snap_x{0,0.[000]}"), (y, "$snap_y{0,0.[000]}")]
    plot = _figure(chart.heading, tooltips=tips, **kinds)
    banded = [curve for curve in chart.curves if curve.sd]
    if banded:
        style: dict[str, Any] = {"fill_color": "colour", "fill_alpha": 0.13, "line_color": None}
        _layer(plot, _bands(banded), "Patches", "bands", xs="xs", ys="ys", **style)
    lines = _curve_columns(chart.curves)
    style = {"line_color": "colour", "line_dash": "dash", "line_width": 2}
    _layer(plot, lines, "MultiLine", "lines", is_hovered=True, xs="xs", ys="ys", **style)
    if not any(curve.bits for curve in chart.curves):
        marks = _marks(chart.curves)
        _layer(plot, marks, "Scatter", "marks", x="x", y="y", size=5, fill_color="colour", line_color="colour")
    for axis, is_log in ((plot.xaxis, chart.x_log), (plot.yaxis, chart.y_log)):
        if is_log:
            _plain_log(axis)
    return plot


def _curve_columns(curves: Sequence[Curve]) -> Columns:
    columns: Columns = {
        "number": [curve.number for curve in curves],
        "arm": [curve.name for curve in curves],
        "xs": [_rounded(curve.x) for curve in curves],
        "ys": [_rounded(curve.y) for curve in curves],
        "colour": [style_of(curve.number)[0] for curve in curves],
        "dash": [style_of(curve.number)[1] for curve in curves],
    }
    if any(curve.bits for curve in curves):
        columns["fixed"] = [_rounded(curve.fixed) for curve in curves]
        columns["bits"] = [_rounded(curve.bits) for curve in curves]
    return columns


def _bands(curves: Sequence[Curve]) -> Columns:
    """Return polygons of one sd around curves: there along the lower side, back along the upper."""
    columns: Columns = {"number": [], "colour": [], "xs": [], "ys": []}
    moves = any(curve.bits for curve in curves)
    for curve in curves:
        pairs = list(zip(curve.y, curve.sd, strict=True))
        low, high = _rounded([y - sd for y, sd in pairs]), _rounded([y + sd for y, sd in pairs])
        columns["number"].append(curve.number)
        columns["colour"].append(style_of(curve.number)[0])
        columns["xs"].append(_there_and_back(curve.x))
        columns["ys"].append([*low, *high[::-1]])
        if moves:
            columns.setdefault("fixed", []).append(_there_and_back(curve.fixed))
            columns.setdefault("bits", []).append(_there_and_back(curve.bits))
    return columns


def _there_and_back(values: Sequence[float]) -> list[float]:
    return [*_rounded(values), *_rounded(values)[::-1]]


def _marks(curves: Sequence[Curve]) -> Columns:
    """Return the points of curves that have few, which a line alone would not show."""
    few = [curve for curve in curves if len(curve.x) < _MOST_MARKED]
    points = [(curve.number, x, y) for curve in few for x, y in zip(curve.x, curve.y, strict=True)]
    return {
        "number": [number for number, _, _ in points],
        "x": _rounded([x for _, x, _ in points]),
        "y": _rounded([y for _, _, y in points]),
        "colour": [style_of(number)[0] for number, _, _ in points],
    }


def _front(chart: Front) -> Any:
    x = _short(chart.heading.x)
    places = "{0.00}" if chart.heading.y.endswith("%") else ""  # without: as many digits as the number needs
    tips = [("arm", "@arm"), (x, "@x{0,0.[000]}"), (chart.heading.y, f"@y{places}"), ("sd", f"@sd{places}")]
    plot = _figure(chart.heading, tooltips=tips, x_axis_type="log")
    front = sorted((x, y) for x, y, is_on in zip(chart.x, chart.y, chart.on_front, strict=True) if is_on)
    line: Columns = {"x": [x for x, _ in front], "y": [y for _, y in front]}
    style: dict[str, Any] = {"line_color": _GREY, "line_dash": "dashed", "line_width": 1.5}
    _layer(plot, line, "Step", "front", x="x", y="y", mode="after", **style)
    points: Columns = {
        "number": list(chart.numbers),
        "arm": list(chart.names),
        "x": _rounded(chart.x),
        "y": _rounded(chart.y),
        "sd": _rounded(chart.sd),
        "low": _rounded([y - sd for y, sd in zip(chart.y, chart.sd, strict=True)]),
        "high": _rounded([y + sd for y, sd in zip(chart.y, chart.sd, strict=True)]),
        "colour": [style_of(number)[0] for number in chart.numbers],
        "marker": [_MARKERS[number // len(COLOURS) % len(_MARKERS)] for number in chart.numbers],
    }
    if chart.bits:
        points |= {"fixed": _rounded(chart.fixed), "bits": _rounded(chart.bits)}
    _layer(plot, points, "Segment", "spread", x0="x", x1="x", y0="low", y1="high", line_color="colour", line_width=1.5)
    marker: dict[str, Any] = {"marker": "marker", "size": 11, "fill_color": "colour", "line_color": "colour"}
    _layer(plot, points, "Scatter", "arms", is_hovered=True, x="x", y="y", **marker)
    _plain_log(plot.xaxis)
    return plot


# ---- categories ----------------------------------------------------------------------------------------------------


def category_labels(names: Sequence[str]) -> list[str]:
    """Return names as categories of an axis, which must differ, from the bottom; in lines that fit on a phone."""
    labels = [_wrapped(name) for name in names]
    return [label if labels.count(label) == 1 else f"{label} #{i}" for i, label in enumerate(labels)][::-1]


def _wrapped(name: str) -> str:
    lines, rest = [], name
    while len(rest) > _LABEL_WIDTH:
        at = max(rest.rfind(mark, 3, _LABEL_WIDTH) for mark in "- ._,:")
        cut = at + 1 if at > 0 else _LABEL_WIDTH
        lines.append(rest[:cut].rstrip())
        rest = rest[cut:].lstrip()
    return "\n".join([*lines, rest])


def _row_height(labels: Sequence[str]) -> int:
    lines = max((label.count("\n") + 1 for label in labels), default=1)
    return 80 + max(2, len(labels)) * max(24, 15 * lines + 4)


def _dots(chart: Dots) -> Any:
    labels = category_labels(chart.categories)
    label_of = dict(zip(chart.categories, labels[::-1], strict=True))
    tips = [("", "@series"), ("arm", "@category"), (_short(chart.heading.x), "@x{0,0.[000]}")]
    kind = "log" if chart.x_log else "linear"
    plot = _figure(chart.heading, tooltips=tips, height=_row_height(labels), y_range=labels, x_axis_type=kind)
    names = ("x", "y", "category", "series", "colour", "marker", "size", "alpha")
    columns: Columns = {name: [] for name in names}
    for series, points in chart.series.items():
        look = ("square", 10, 1.0) if series in BAR_SERIES else ("circle", 9, 0.45 if series == "client" else 1.0)
        for category, x in points:
            row = (_round(x), label_of[category], category, series, PART_COLOURS.get(series, COLOURS[0]), *look)
            for name, value in zip(names, row, strict=True):
                columns[name].append(value)
    style: dict[str, Any] = {
        "fill_color": "colour",
        "line_color": "colour",
        "fill_alpha": "alpha",
        "line_alpha": "alpha",
    }
    _layer(plot, columns, "Scatter", "dots", is_hovered=True, x="x", y="y", marker="marker", size="size", **style)
    if chart.x_log:
        _plain_log(plot.xaxis)
    return plot


def _stack(chart: Stack) -> Any:
    labels = category_labels(chart.categories)
    tips = [("", "@part"), ("", "@category"), (_short(chart.heading.x), "@value{0,0.[000]}")]
    plot = _figure(chart.heading, tooltips=tips, height=_row_height(labels), y_range=labels)
    style: dict[str, Any] = {"height": 0.72, "fill_color": "colour", "line_color": None}
    columns = _stack_columns(chart)
    _layer(plot, columns, "HBar", "bars", is_hovered=True, y="label", left="left", right="right", **style)
    plot.x_range.start = 0
    plot.ygrid.visible = False
    return plot


def _stack_columns(chart: Stack) -> Columns:
    names = ("label", "category", "part", "value", "left", "right", "colour")
    columns: Columns = {name: [] for name in names}
    left = [0.0] * len(chart.categories)
    labels = category_labels(chart.categories)[::-1]
    for part, values in chart.parts.items():
        for i, value in enumerate(values):
            if not value:
                continue
            row = (labels[i], chart.categories[i], part, _round(value), _round(left[i]), _round(left[i] + value))
            for name, cell in zip(names, (*row, PART_COLOURS.get(part, _GREY)), strict=True):
                columns[name].append(cell)
            left[i] += value
    return columns


# ---- heat and bins -------------------------------------------------------------------------------------------------


def _heat_height(chart: Heat) -> int:
    return 90 + (18 if len(chart.rows) <= 20 else 12) * max(len(chart.rows), 4)


def _highest(chart: Heat) -> float:
    return float(max((max(row) for row in chart.values), default=1) or 1)


def _heat(chart: Heat) -> Any:
    from bokeh.models import LinearColorMapper

    tips = [("client", "@y"), ("class", "@x"), (chart.noun, "@value{0,0}")]
    sides = {"y_range": list(chart.rows)[::-1], "x_range": list(chart.columns)}
    plot = _figure(chart.heading, tooltips=tips, height=_heat_height(chart), **sides)
    mapper = LinearColorMapper(palette=_blues(), low=0, high=_highest(chart), name="shade")
    style: dict[str, Any] = {"fill_color": {"field": "value", "transform": mapper}, "line_color": None}
    columns = _heat_columns(chart)
    _layer(plot, columns, "Rect", "heat", is_hovered=True, x="x", y="y", width=0.96, height=0.92, **style)
    plot.grid.visible = False
    if len(chart.rows) > 20:
        plot.yaxis.major_label_text_font_size = "10px"
    return plot


def _blues() -> list[str]:
    """Return shades from a light to a dark blue."""
    light, dark, num = (222, 235, 247), (0, 63, 115), 32
    mixed = ([a + (b - a) * i / (num - 1) for a, b in zip(light, dark, strict=True)] for i in range(num))
    return [f"#{round(r):02x}{round(g):02x}{round(b):02x}" for r, g, b in mixed]


def _heat_columns(chart: Heat) -> Columns:
    rows = zip(chart.rows, chart.values, strict=True)
    cells = [(row, column, v) for row, values in rows for column, v in zip(chart.columns, values, strict=True)]
    return {name: [cell[i] for cell in cells] for i, name in enumerate(("y", "x", "value"))}


def _bins(chart: Bins) -> Any:
    from bokeh.models import Range1d

    low, high = _limits(chart)
    tips = [("from", "@left{0.0000}"), ("to", "@right{0.0000}"), ("share, %", "@share{0.000}")]
    plot = _figure(chart.heading, tooltips=tips, height=210, x_range=Range1d(start=low, end=high))
    style: dict[str, Any] = {"fill_color": COLOURS[0], "line_color": None}
    sides: dict[str, Any] = {"left": "left", "right": "right", "bottom": 0, "top": "share"}
    _layer(plot, _bin_columns(chart), "Quad", "bins", is_hovered=True, **sides, **style)
    plot.y_range.start = 0
    plot.xaxis.ticker.desired_num_ticks = 4
    _plain_numbers(plot.xaxis)
    plot.yaxis.ticker.desired_num_ticks = 4
    return plot


def _bin_columns(chart: Bins) -> Columns:
    edges = _rounded(chart.edges)
    return {"left": edges[:-1], "right": edges[1:], "share": _rounded(chart.shares)}


def _limits(chart: Bins) -> tuple[float, float]:
    low, high = chart.limits or ((chart.edges[0], chart.edges[-1]) if chart.edges else (0.0, 1.0))
    margin = 0.02 * (high - low)
    return _round(low - margin), _round(high + margin)

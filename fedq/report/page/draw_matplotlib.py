"""The page's charts by matplotlib, for PNG and SVG, in the style of `fedq.report.figures`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from fedq.report.figures import figure_axes, figure_style, without_formulas
from fedq.report.page.spec import (
    BAR_SERIES,
    COLOURS,
    PART_COLOURS,
    Bins,
    Chart,
    Dots,
    Front,
    Heading,
    Heat,
    Lines,
    Stack,
    style_of,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_DASHES = {"solid": "-", "dashed": "--", "dotted": ":", "dashdot": "-."}
_MOST_LABEL = 40


def write_figures(charts: Sequence[Chart], folder: Path) -> list[Path]:
    """Write every chart as `<key>.png` and `<key>.svg`; return the files."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for chart in charts:
        with figure_style():
            figure = _draw(chart)
            for suffix in ("png", "svg"):
                files.append(folder / f"{chart.heading.key}.{suffix}")
                figure.savefig(files[-1], metadata={"Date": None} if suffix == "svg" else None)
                figure.set_layout_engine("none")  # laid out, once for both files
    return files


def _draw(chart: Chart) -> Figure:
    drawers: dict[type, Callable[[Any], Figure]] = {
        Lines: _lines,
        Front: _front,
        Dots: _dots,
        Stack: _stack,
        Heat: _heat,
        Bins: _bins,
    }
    return drawers[type(chart)](chart)


def plain(name: str) -> str:
    """Return a name that matplotlib shows as it is (no formulas), cut where it is very long."""
    short = name if len(name) <= _MOST_LABEL else f"{name[: _MOST_LABEL - 1]}…"
    return without_formulas(short)


def _label(axes: Axes, heading: Heading) -> None:
    axes.set_title(plain(heading.title), fontsize=11, loc="left")
    axes.set(xlabel=without_formulas(heading.x), ylabel=without_formulas(heading.y))


def _log(axes: Axes, axis: Literal["x", "y"]) -> None:
    getattr(axes, f"set_{axis}scale")("log")
    own = getattr(axes, f"{axis}axis")
    own.set_major_formatter("{x:g}")
    own.set_minor_formatter("{x:g}")
    low, high = getattr(axes, f"get_{axis}lim")()
    if high > 20 * low:  # labels between powers of ten would overlap
        axes.minorticks_off()
    axes.tick_params(axis=axis, which="minor", labelsize=7)


def _legend(figure: Figure, num: int) -> None:
    figure.legend(loc="outside lower center", ncols=min(3, num), fontsize=8)


def _lines(chart: Lines) -> Figure:
    figure, axes = figure_axes((6.4, 4.0 + 0.09 * len(chart.curves)))
    for curve in chart.curves:
        colour, dash = style_of(curve.number)
        marker = "." if len(curve.x) < 40 else None
        axes.plot(curve.x, curve.y, color=colour, linestyle=_DASHES[dash], marker=marker, label=plain(curve.name))
        if curve.sd:
            low, high = np.subtract(curve.y, curve.sd), np.add(curve.y, curve.sd)
            axes.fill_between(curve.x, low, high, color=colour, alpha=0.12, linewidth=0)
    if chart.x_log:
        _log(axes, "x")
    if chart.y_log:
        _log(axes, "y")
    _label(axes, chart.heading)
    _legend(figure, len(chart.curves))
    return figure


def _front(chart: Front) -> Figure:
    figure, axes = figure_axes((6.4, 4.0 + 0.09 * len(chart.names)))
    for i, number in enumerate(chart.numbers):
        colour, _ = style_of(number)
        marker = "osD^"[number // len(COLOURS) % 4]
        style: dict[str, Any] = {"fmt": marker, "capsize": 3, "color": colour, "markersize": 7}
        axes.errorbar([chart.x[i]], [chart.y[i]], yerr=[chart.sd[i]], label=plain(chart.names[i]), **style)
    front = sorted((x, y) for x, y, is_on in zip(chart.x, chart.y, chart.on_front, strict=True) if is_on)
    axes.step([x for x, _ in front], [y for _, y in front], where="post", color=COLOURS[-1], linestyle="--", zorder=0)
    _log(axes, "x")
    _label(axes, chart.heading)
    _legend(figure, len(chart.names))
    return figure


def _rows(num: int, most_characters: int) -> tuple[Figure, Axes]:
    return figure_axes((6.0 + 0.05 * min(most_characters, _MOST_LABEL), 1.3 + 0.3 * max(2, num)))


def _categories(axes: Axes, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), [plain(name) for name in names], fontsize=8)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(visible=False, axis="y")


def _dots(chart: Dots) -> Figure:
    figure, axes = _rows(len(chart.categories), max(map(len, chart.categories)))
    place = {name: i for i, name in enumerate(chart.categories)}
    for name, points in chart.series.items():
        bar = name in BAR_SERIES
        style: dict[str, Any] = {"color": PART_COLOURS.get(name, COLOURS[0]), "linestyle": "", "label": name}
        style |= {"marker": "|", "markersize": 14, "markeredgewidth": 2.5} if bar else {"marker": "o", "markersize": 5}
        x, y = [x for _, x in points], [place[category] for category, _ in points]
        axes.plot(x, y, alpha=0.35 if name == "client" else 1.0, **style)
    if chart.x_log:
        _log(axes, "x")
    _categories(axes, chart.categories)
    _label(axes, chart.heading)
    _legend(figure, len(chart.series))
    return figure


def _stack(chart: Stack) -> Figure:
    figure, axes = _rows(len(chart.categories), max(map(len, chart.categories), default=1))
    left = np.zeros(len(chart.categories))
    for i, (part, values) in enumerate(chart.parts.items()):
        if not any(values):
            continue
        colour = PART_COLOURS.get(part, COLOURS[i % len(COLOURS)])
        axes.barh(range(len(values)), values, left=left, height=0.72, color=colour, label=part)
        left = left + np.asarray(values)
    _categories(axes, chart.categories)
    _label(axes, chart.heading)
    _legend(figure, len(chart.parts))
    return figure


def _heat(chart: Heat) -> Figure:
    figure, axes = figure_axes((2.4 + 0.4 * len(chart.columns), 1.6 + 0.2 * len(chart.rows)))
    image = axes.imshow(np.asarray(chart.values, dtype=float), cmap="Blues", aspect="auto", vmin=0)
    axes.set_xticks(range(len(chart.columns)), chart.columns, fontsize=8)
    axes.set_yticks(range(len(chart.rows)), chart.rows, fontsize=7)
    axes.grid(visible=False)
    figure.colorbar(image, ax=axes, label=chart.noun)
    _label(axes, chart.heading)
    return figure


def _bins(chart: Bins) -> Figure:
    figure, axes = figure_axes((5.2, 2.8))
    widths = np.diff(chart.edges)
    axes.bar(chart.edges[:-1], chart.shares, width=widths, align="edge", color=COLOURS[0])
    if chart.limits:
        axes.set_xlim(*chart.limits)
    _label(axes, chart.heading)
    return figure

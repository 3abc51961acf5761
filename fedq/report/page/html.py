"""The page: what it shows in which order, filled into the template, with all that it needs inside."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from fedq.report.metric import Measure
from fedq.report.page import breakdowns, cells
from fedq.report.page.cards import make_cards
from fedq.report.page.cautions import Caution, human_bandwidth
from fedq.report.page.charts import PageCharts, parts_of
from fedq.report.page.curves import link_words
from fedq.report.page.diagram import diagram
from fedq.report.page.draw_bokeh import choice_columns, draw
from fedq.report.page.pareto import BANDWIDTHS, FORMULA
from fedq.report.page.spec import PART_COLOURS, Chart, Dots, Stack, style_of
from fedq.report.page.study import Study, data_name, model_name
from fedq.report.page.tables import command, link_rows

_TITLES = {
    "warnings": "Read this first",
    "results": "Results",
    "learning": "",
    "tradeoff": "",
    "bytes": "Bytes",
    "time": "Time by phase",
    "clients": "Clients",
    "histograms": "Weights and updates",
    "interface": "Counted and sent",
    "runs": "What ran",
}


def render(study: Study, charts: PageCharts, cautions: Sequence[Caution]) -> str:
    """Return the page as HTML that needs no other file."""
    from bokeh.resources import Resources
    from jinja2 import Environment

    view = _view(study, charts, cautions)
    template = Environment(autoescape=True, trim_blocks=True).from_string(_asset("page.html"))
    return template.render(
        view=view,
        css=_asset("page.css"),
        js=_asset("page.js").replace("LINK_CHARTS", json.dumps(_link_charts(charts))),
        bokeh=Resources(mode="inline", components=["bokeh"], minified=True).js_raw[0],
        data=in_script({"items": _items(charts), "choices": _choices(charts)}),
    )


def in_script(value: Any) -> str:
    """Return JSON that may stand inside a script element, whatever names hold."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _asset(name: str) -> str:
    return files("fedq.report.page").joinpath("assets").joinpath(name).read_text(encoding="utf-8")


def _link_charts(charts: PageCharts) -> list[str]:
    """Return the names of the charts that follow the bandwidth of a link."""
    keys = [chart.heading.key for chart in charts.tradeoff]
    found = [key for key in keys if key.startswith("front_seconds") or key.endswith("_on_link")]
    return list(dict.fromkeys(["front_seconds", "accuracy_on_link", *found]))


def _items(charts: PageCharts) -> list[Any]:
    from bokeh.core.types import ID
    from bokeh.embed import json_item

    return [json_item(draw(chart), ID(chart.heading.key)) for chart in charts.on_page()]


def _choices(charts: PageCharts) -> dict[str, Any]:
    return {
        choice.key: {
            "keys": [chart.heading.key for chart in next(iter(choice.variants.values()))],
            "variants": list(choice_columns(choice).values()),
        }
        for choice in charts.choices
    }


def _view(study: Study, charts: PageCharts, cautions: Sequence[Caution]) -> dict[str, Any]:
    tables = {
        "results": cells.results_table(study),
        "links": _links(study),
        "bytes": cells.bytes_table(study),
        "entropy": cells.entropy_table(study),
        "phases": cells.phase_table(study),
        "interface": cells.interface_table(study),
        "runs": cells.runs_table(study),
        "places": cells.places(study),
        "other_settings": cells.other_settings(study),
        "same_settings": cells.same_settings(study),
    }
    shown = {chart.heading.key: _chart(chart) for chart in charts.on_page()}
    for choice in charts.choices:
        for chart, parts in zip(next(iter(choice.variants.values())), parts_of(choice), strict=True):
            shown[chart.heading.key]["parts"] = _coloured(parts)
    choices = {choice.key: _choice(choice) for choice in charts.choices}
    has_clients = "labels" in choices or "client_accuracy" in shown
    absent = {
        "warnings": not cautions,
        "clients": not has_clients,
        "histograms": "histograms" not in choices,
        "interface": not tables["interface"].rows,
    }
    titles, commands = _TITLES | _titles(study), [(one, command(one)) for one in study.runs]
    return {
        "title": study.title,
        "lead": _lead(study),
        "cards": make_cards(study),
        "contents": [(key, title) for key, title in titles.items() if not absent.get(key)],
        "cautions": cautions,
        "tables": tables,
        "charts": shown,
        "choices": choices,
        "titles": titles,
        "advice": " ".join(dict.fromkeys(measure.advice for measure in study.measures)),
        "learning": [chart.heading.key for chart in charts.learning],
        "tradeoff": [chart.heading.key for chart in charts.tradeoff],
        "arms": [(arm.name, *style_of(number)) for number, arm in enumerate(study.arms)],
        "has_link": any(key in shown for key in _link_charts(charts)),
        "has_clients": has_clients,
        "presets": [(human_bandwidth(bits), f"{bits:.0f}") for bits in BANDWIDTHS],
        "formula": f"{FORMULA}. {link_words(study.finished)}",
        "diagrams": [(arm.name, diagram(arm.first)) for arm in breakdowns.coded_first(study)][
            : breakdowns.MOST_VARIANTS
        ],
        "commands": [(one.name, words, bool(one.run.summary.get("command"))) for one, words in commands if words],
    }


def _titles(study: Study) -> dict[str, str]:
    """Return titles that depend on what arms are judged by."""
    measures = study.measures
    words = measures[0] if len(measures) == 1 else Measure
    return {"learning": words.learning, "tradeoff": words.tradeoff}


def _lead(study: Study) -> str:
    models = ", ".join(
        dict.fromkeys(
            f"{model_name(one)} ({one.run.summary.get('num_params') or 0:,} parameters)"
            if one.run.summary.get("num_params")
            else model_name(one)
            for one in study.runs
        )
    )
    data = ", ".join(dict.fromkeys(data_name(one) for one in study.runs))
    finished = sum(one.is_finished for one in study.runs)
    runs = f"{len(study.runs)} run{'s' * (len(study.runs) != 1)}, {finished} finished"
    arms = f"{len(study.arms)} arm{'s' * (len(study.arms) != 1)} (settings that differ in more than the seed)"
    return f"{models} on {data}. {runs}, {arms}."


def _links(study: Study) -> cells.Shown:
    by_arm: dict[str, list[cells.Cell]] = {}
    for row in link_rows(study):
        mark = "● " if row["on_front"] else ""
        by_arm.setdefault(row["arm"], [cells.Cell(row["arm"])]).append(
            cells.Cell(f"{mark}{row['seconds']:,.1f}", row["seconds"])
        )
    headers = ("arm", *(f"s at {human_bandwidth(bits)}" for bits in BANDWIDTHS))
    return cells.Shown(headers, list(by_arm.values()), "seconds_on_links")


def _chart(chart: Chart) -> dict[str, Any]:
    named = list(chart.series) if isinstance(chart, Dots) else []
    if isinstance(chart, Stack):
        named = [part for part, values in chart.parts.items() if any(values)]
    heading = chart.heading
    return {"title": heading.title, "caption": heading.caption, "parts": _coloured(named), "height": 200}


def _coloured(names: Sequence[str]) -> list[tuple[str, str]]:
    return [(name, PART_COLOURS.get(name, PART_COLOURS["other"])) for name in names]


def _choice(choice: Any) -> dict[str, Any]:
    keys = [chart.heading.key for chart in next(iter(choice.variants.values()))]
    return {"label": choice.label, "names": list(choice.variants), "figures": keys, "note": choice.note}

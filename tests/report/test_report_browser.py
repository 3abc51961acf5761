"""The report in a real browser, at a desktop's and a phone's width, light and dark."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from browser import look_at, needs_chromium
from properties import few, is_all
from report_runs import copied, make_runs, with_config, with_phases, with_summary

from fedq.report.page.cautions import find_cautions
from fedq.report.page.charts import make_charts
from fedq.report.page.evidence import read_evidence
from fedq.report.page.html import render
from fedq.report.page.study import make_study

pytestmark = needs_chromium

LIGHT, DARK = "rgb(255, 255, 255)", "rgb(20, 23, 27)"

# Presses every control and says what came of it.
_ACTIONS = """
const { charts: figures } = fedqReport;
const sources = (key) => figures[key].renderers.map((renderer) => renderer.data_source);
const rows = (key) => sources(key).find((source) => source.data.number).data.number.length;
const last = () => Math.max(...figures.accuracy_on_link.renderers[0].data_source.data.xs.flat());
result.arms = [rows("accuracy_by_rounds")];
document.querySelector("[data-arm]").click();
result.arms.push(rows("accuracy_by_rounds"), document.querySelectorAll('[data-arm="0"][aria-pressed="false"]').length);
document.querySelector("[data-arm]").click();
result.arms.push(rows("accuracy_by_rounds"));
result.seconds = [];
for (const button of document.querySelectorAll("[data-bandwidth]")) { button.click(); result.seconds.push(last()); }
result.layers = [];
const select = document.querySelector('[data-choice="layers"] select');
for (const option of select.options) {
  select.value = option.value;
  select.dispatchEvent(new Event("change"));
  const { part, value } = figures.layers_uplink.renderers[0].data_source.data;
  result.layers.push([option.text, value.reduce((a, b) => a + b, 0), part.includes("scales")]);
}
const heading = document.querySelectorAll("#results thead button")[3];
heading.click();
result.sorted = [...document.querySelectorAll("#results tbody tr")].map((row) => Number(row.children[3].dataset.sort));
dispatchEvent(new Event("beforeprint"));
result.pictures = [...document.querySelectorAll(".plot img")].map((image) => image.src.length);
result.printed = getComputedStyle(document.body).backgroundColor;
dispatchEvent(new Event("afterprint"));
"""


def write_page(paths: list[Path], page: Path) -> Path:
    study = make_study(read_evidence(paths))
    page.write_text(render(study, make_charts(study), find_cautions(study)), encoding="utf-8")
    return page


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    runs = make_runs(root, (0, 1) if is_all() else (0,))
    for run in runs:
        with_phases(run, exchange_s=0.002)
    host = {"host": "a-host-with-a-long-name", "ranks": [0], "interfaces": {"lo": {"sent": 123456, "received": 1}}}
    with_summary(runs[0], interface={"hosts": [host], "sent": 123456, "counted": 100000, "ratio": 1.23456})
    name = "an-arm-whose-name-is-longer-than-a-phone-is-wide-without_any_place_to_break-seed0"
    long_name = with_config(copied(root / "int4-seed0", root / name), "local", lr=0.5)
    return write_page([*runs, long_name], root / "report.html")


def check(found: dict[str, Any], width: int) -> None:
    assert found["errors"] == []
    assert found["width"] == width
    for theme in ("first", "second"):
        own = found[theme]
        assert own["cut"] == []
        assert own["scroll"] <= width
        assert len(own["charts"]) > 15
        for key, chart in own["charts"].items():
            assert chart["marks"] > 30, key
            assert chart["edge"] == 0, key
            assert chart["width"] <= width, key


@pytest.mark.parametrize("width", few([390, 1280], 1))
@pytest.mark.parametrize("dark", few([False, True], 1))
def test_the_page_is_whole_at_every_width_and_in_both_themes(page: Path, width: int, dark: bool) -> None:
    found = look_at(page, width, dark=dark)
    check(found, width)
    grounds = [found[theme]["colours"][0] for theme in ("first", "second")]
    assert grounds == ([DARK, LIGHT] if dark else [LIGHT, DARK])
    texts = [{chart["text"] for chart in found[theme]["charts"].values()} for theme in ("first", "second")]
    assert texts[0] != texts[1]
    assert all(len(of_theme) == 1 for of_theme in texts)


@pytest.mark.slow
def test_the_controls_change_what_is_shown(page: Path) -> None:
    found = look_at(page, 1280, actions=_ACTIONS)
    assert found["errors"] == []
    all_arms, fewer, pressed, again = found["arms"]
    assert (fewer, again) == (all_arms - 1, all_arms)
    assert pressed >= 2
    assert found["seconds"] == sorted(found["seconds"], reverse=True)
    assert found["seconds"][0] > found["seconds"][-1]
    totals = {name: (total, has_scales) for name, total, has_scales in found["layers"]}
    assert totals["fp32"][0] > totals["int4"][0] > totals["sign"][0]
    assert [totals[name][1] for name in ("fp32", "int4", "sign")] == [False, True, True]
    assert found["sorted"] == sorted(found["sorted"], reverse=True)
    assert min(found["pictures"]) > 1000
    assert len(found["pictures"]) > 15
    assert found["printed"] == LIGHT


@pytest.mark.slow
def test_the_check_itself_finds_what_is_wrong(page: Path, tmp_path: Path) -> None:
    bad = '<p style="white-space:nowrap">' + "too wide " * 90 + '</p><script>console.error("told")</script><main>'
    text = page.read_text(encoding="utf-8").replace("<main>", bad, 1)
    (tmp_path / "bad.html").write_text(text, encoding="utf-8")
    found = look_at(
        tmp_path / "bad.html",
        390,
        actions="fedqReport.charts.labels.renderers[0].data_source.data = "
        "{ x: [], y: [], value: [] }; await pause(100); result.empty = (await charts()).labels.marks;",
    )
    assert found["errors"] == ["told"]
    assert any("too wide" in line for line in found["first"]["cut"])
    assert found["empty"] == 0

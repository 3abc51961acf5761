"""Runs on data of one's own in everything that shows runs: by their first metric, alone and beside image runs."""

from __future__ import annotations

import csv
import io
import json
import shutil
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from browser import look_at, needs_chromium
from own_data_runs import F1, MSE, RUNS, OwnRun, make_own_runs
from properties import is_all
from report_runs import with_summary
from rich.console import Console

from fedq.cli import main
from fedq.errors import FieldError
from fedq.metrics import Metric
from fedq.report import find_runs, print_summary
from fedq.report.deployed import Deployed
from fedq.report.figures import write_figures
from fedq.report.metric import ACCURACY, Columns, Measure, distinct, file_name, metrics_of
from fedq.report.page import write_report
from fedq.report.page.cards import make_cards
from fedq.report.page.cautions import find_cautions
from fedq.report.page.charts import make_charts
from fedq.report.page.draw_matplotlib import write_figures as draw
from fedq.report.page.evidence import read_evidence
from fedq.report.page.html import render
from fedq.report.page.spec import Front, Lines
from fedq.report.page.study import Study, make_study
from fedq.report.page.tables import all_tables
from fedq.report.page.text import as_text
from fedq.runfolder import write_model

HEAT = [name for name in RUNS if name.startswith("heat")]
TAGS = [name for name in RUNS if name.startswith("tags")]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_own_runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture
def image_run(runs: dict[str, Path], tmp_path: Path) -> Path:
    """A finished image run, as far as its files of text say."""
    path = shutil.copytree(runs["text-fp32-seed0"], tmp_path / "images-seed0")
    summary = json.loads((path / "summary.json").read_text())
    for key in ("metrics", "best", "last"):
        del summary[key]
    summary |= {"dataset": "digits", "model": "cnn62k", "test_accuracy": 0.875, "test_balanced_accuracy": 0.5}
    (path / "summary.json").write_text(json.dumps(summary | {"best_val_accuracy": 0.75}))
    config = yaml.safe_load((path / "config.yaml").read_text())
    del config["metrics"]
    config |= {"data": {"dataset": "digits"}, "local": {"model": "cnn62k"}}
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    lines = (path / "metrics.jsonl").read_text().replace("val_bits per byte", "val_loss").splitlines()
    rows = [json.loads(line) | {"val_accuracy": 0.25 + 0.1 * i} for i, line in enumerate(lines)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def study_of(*paths: Path) -> Study:
    return make_study(read_evidence(paths))


def cards_of(*paths: Path) -> dict[str, tuple[str, str]]:
    return {card.label: (card.value, card.detail) for card in make_cards(study_of(*paths))}


def charts_of(*paths: Path) -> dict[str, Any]:
    return {chart.heading.key: chart for chart in make_charts(study_of(*paths)).on_page()}


def plain_summary(folder: Path) -> list[str]:
    stream = io.StringIO()
    print_summary(folder, Console(file=stream, width=200))
    return stream.getvalue().splitlines()


# ---- terminal ------------------------------------------------------------------------------------------------------


def test_the_summary_says_the_last_and_the_best_value_of_the_first_metric(runs: dict[str, Path]) -> None:
    lines = plain_summary(runs["heat-fp32-seed0"])

    assert "data              own data" in lines
    assert "mse               1.250 K^2, best 1.000 K^2 (lower is better)" in lines
    assert "mae               0.5000 K" in lines
    assert not [line for line in lines if "accuracy" in line or "validation" in line]
    assert "f1                0.6250, best 0.7500 (higher is better)" in plain_summary(runs["tags-fp32-seed0"])


def test_the_summary_of_a_run_that_was_never_evaluated_says_so(runs: dict[str, Path], tmp_path: Path) -> None:
    path = shutil.copytree(runs["blind-fp32-seed0"], tmp_path / "blind")

    assert "loss              - (never evaluated)" in plain_summary(path)
    with_summary(path, metrics=[])
    assert "loss              - (never evaluated)" in plain_summary(path)


def test_a_run_that_ended_without_a_finite_value_was_evaluated(runs: dict[str, Path], tmp_path: Path) -> None:
    path = with_summary(shutil.copytree(runs["text-fp32-seed0"], tmp_path / "text"), last={"bits per byte": None})

    assert "bits per byte     -, best 1.800 bit/B (lower is better)" in plain_summary(path)
    assert find_cautions(study_of(path)) == []
    assert cards_of(path)["Best bits per byte"] == ("1.800 bit/B", "finished: 4 of 4 rounds")


def test_names_with_brackets_are_shown_as_they_are(tmp_path: Path) -> None:
    run = OwnRun((Metric("[bold]mse", "[red]"),), {"[bold]mse": (1.0, 1.0, 1.0, 2.0)})
    path = make_own_runs(tmp_path, {"a": run})["a"]
    stream = io.StringIO()

    print_summary(path, Console(file=stream, width=100, force_terminal=True, color_system=None))

    assert "[bold]mse" in stream.getvalue()
    assert "2.000 [red]" in stream.getvalue()


def test_a_list_of_runs_names_the_metric(
    runs: dict[str, Path], image_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["runs", *(str(runs[name]) for name in HEAT)])
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == ["run", "state", "rounds", "mse", "uplink"]
    assert "1.250 K^2" in lines[0]
    assert "mse" not in lines[0]

    main(["runs", str(runs["heat-fp32-seed0"].parent), str(image_run)])
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == ["run", "state", "rounds", "result", "uplink"]
    by_name = {line.split()[0].rpartition("/")[2]: line for line in lines}
    assert "mse 1.250 K^2" in by_name["heat-fp32-seed0"]
    assert "f1 0.6250" in by_name["tags-fp32-seed0"]
    assert "bits per byte 1.800 bit/B" in by_name["text-fp32-seed0"]
    assert "accuracy 87.50 %" in by_name["images-seed0"]
    assert by_name["blind-fp32-seed0"].split()[3] == "-"


def test_an_unfinished_run_shows_its_last_evaluation(runs: dict[str, Path]) -> None:
    (run,) = find_runs([runs["cut-fp32-seed0"]])

    assert (run.state, run.rounds, run.total_rounds, run.result) == ("unfinished", 3, 4, 2.0)
    assert run.measure == Measure(MSE)
    assert run.note == "go on with it in the program that began it"


def compared(capsys: pytest.CaptureFixture[str], *paths: Path) -> list[list[str]]:
    main(["runs", "--compare", *map(str, paths)])
    lines = capsys.readouterr().out.splitlines()
    assert len({len(line) for line in lines}) == 1  # aligned
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def test_a_comparison_of_one_metric_has_it_in_its_heading(
    runs: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    head, _, first, *_ = compared(capsys, *(runs[name] for name in HEAT), runs["cut-fp32-seed0"])

    assert head[4:6] == ["last mse, K^2", "best mse, K^2"]
    assert first[:6] == ["heat-fp32-seed0", "fp32", "fp32", "4", "1.250", "1.000"]


def test_a_comparison_of_several_metrics_names_them_in_its_cells(
    runs: dict[str, Path], image_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    head, _, heat, tags, images = compared(capsys, runs["heat-fp32-seed0"], runs["tags-fp32-seed0"], image_run)

    assert head[4:6] == ["result", "beside it"]
    assert heat[4:6] == ["last mse 1.250 K^2", "best mse 1.000 K^2"]
    assert tags[4:6] == ["last f1 0.6250", "best f1 0.7500"]
    assert images[4:6] == ["test accuracy 87.50 %", "balanced accuracy 50.00 %"]


def test_a_comparison_of_image_runs_is_as_ever(image_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    head, _, images = compared(capsys, image_run)

    assert head[4:6] == ["test accuracy, %", "balanced accuracy, %"]
    assert images[4:6] == ["87.50", "50.00"]


# ---- report: numbers -----------------------------------------------------------------------------------------------


def test_arms_have_means_of_their_metric(runs: dict[str, Path]) -> None:
    rows = {row["arm"]: row for row in all_tables(study_of(*(runs[name] for name in HEAT)), [])["arms"]}

    assert list(rows) == ["heat-fp32", "heat-int4", "heat-sign"]
    assert rows["heat-fp32"]["last_mse_mean"] == 1.5
    assert rows["heat-fp32"]["last_mse_sd"] == pytest.approx(0.125**0.5)
    assert rows["heat-fp32"]["best_mse_mean"] == 1.25
    assert not [column for column in rows["heat-fp32"] if "accuracy" in column]


def test_tables_of_runs_and_rounds_have_every_metric(runs: dict[str, Path]) -> None:
    tables = all_tables(study_of(runs["heat-int4-seed0"], runs["tags-fp32-seed0"]), [])
    heat, tags = sorted(tables["runs"], key=lambda row: row["run"])

    assert (heat["last_mse"], heat["best_mse"], heat["last_mae"]) == (1.5125, 1.5125, 0.5)
    assert (tags["last_f1"], tags["best_f1"]) == (0.625, 0.75)
    assert [row["val_mse"] for row in tables["rounds"] if row["run"] == "heat-int4-seed0"] == [4, None, 2, 1.5125]
    assert [row["train_f1"] for row in tables["rounds"] if row["run"] == "tags-fp32-seed0"] == [0.5, 0.5, 0.75, 0.75]
    assert "labels" not in tables
    assert "client_accuracy" not in tables


def test_runs_of_other_models_and_metrics_are_no_seeds_of_one_arm(tmp_path: Path) -> None:
    run = OwnRun((MSE,), {"mse": (1.0,) * 4})
    others = {"b": replace(run, model="Other"), "c": replace(run, metrics=(Metric("mse", "K"),))}
    folders = make_own_runs(tmp_path, {"a": run, **others, "d": replace(run, seed=1)})
    study = study_of(*folders.values())

    assert sorted(tuple(one.name for one in arm.all_runs) for arm in study.arms) == [("a", "d"), ("b",), ("c",)]
    assert len(study.measures) == 2


# ---- report: headline and table ------------------------------------------------------------------------------------


def test_cards_of_one_run(runs: dict[str, Path]) -> None:
    assert cards_of(runs["heat-fp32-seed0"])["Last mse"] == ("1.250 K^2", "one seed: no spread is known")
    assert cards_of(runs["cut-fp32-seed0"])["Best mse"] == ("2.000 K^2", "unfinished: 3 of 4 rounds")
    assert cards_of(runs["blind-fp32-seed0"])["Best loss"] == ("-", "finished: 4 of 4 rounds")


def test_cards_of_several_arms_where_less_is_better(runs: dict[str, Path]) -> None:
    cards = cards_of(*(runs[name] for name in HEAT))

    assert cards["Float32"][0] == "1.500 ± 0.3536 K^2"
    assert cards["Arm with the best mse"] == ("1.500 ± 0.3536 K^2", "heat-fp32: its last mse")
    label = "Fewest bytes within 1 % of float32"  # 1.5125 is 0.83 % more than 1.5, and 2.5 is no 1 %
    assert cards[label] == ("1.78x less", "heat-int4: 1.512 K^2, 8x less up")


def test_cards_of_several_arms_where_more_is_better(runs: dict[str, Path]) -> None:
    cards = cards_of(*(runs[name] for name in TAGS))

    assert cards["Arm with the best f1"] == ("0.6250", "tags-fp32: its last f1")
    assert cards["Fewest bytes within 1 % of float32"][0] == "none"


def test_cards_of_several_metrics_name_them(runs: dict[str, Path], image_run: Path) -> None:
    cards = cards_of(*(runs[name] for name in (*HEAT, *TAGS)), image_run)

    assert {"Float32 (mse)", "Float32 (f1)", "Float32 (accuracy)"} <= cards.keys()
    assert "Fewest bytes within 1 point of float32 (accuracy)" in cards
    assert "Fewest bytes within 1 % of float32 (mse)" in cards


@pytest.mark.parametrize(
    ("metric", "base", "near", "far"),
    [(MSE, 2.0, 2.0199, 2.021), (F1, 0.5, 0.4951, 0.494), (MSE, -2.0, -1.981, -1.979), (MSE, 0.0, 0.0, 1e-9)],
)
def test_near_is_one_percent_of_the_metric(metric: Metric, base: float, near: float, far: float) -> None:
    measure = Measure(metric)

    assert measure.is_near(near, base)
    assert not measure.is_near(far, base)
    assert ACCURACY.is_near(89.0, 90.0)
    assert not ACCURACY.is_near(88.9, 90.0)


def test_the_table_of_arms(runs: dict[str, Path], image_run: Path) -> None:
    text = as_text(study_of(*(runs[name] for name in HEAT)), [])
    assert "last mse, K^2   best mse, K^2" in text
    assert "accuracy" not in text

    text = as_text(study_of(runs["heat-fp32-seed0"], image_run), [])
    assert "last mse 1.250 K^2" in text
    assert "test accuracy 87.50 %" in text


# ---- report: charts ------------------------------------------------------------------------------------------------


def test_curves_are_those_of_every_metric_and_of_the_loss(runs: dict[str, Path]) -> None:
    charts = charts_of(*(runs[name] for name in HEAT))

    learning = {key: charts[f"{key}_by_rounds"].heading for key in ("mse", "mae", "loss")}
    assert [heading.title for heading in learning.values()] == [
        "Validation mse by rounds",
        "Validation mae by rounds",
        "Training loss by rounds",
    ]
    assert learning["mse"].y == "validation mse, K^2"
    assert learning["mse"].caption.startswith("Lower is better")
    curve = next(curve for curve in charts["mse_by_rounds"].curves if curve.name == "heat-int4")
    assert (list(curve.rounds), list(curve.y)) == ([1, 3, 4], [4.0, 2.0, 1.5125])
    assert charts["mse_on_link"].heading.y == "mse, K^2"
    assert not [key for key in charts if "accuracy" in key or key in ("labels", "client_accuracy")]
    assert charts_of(runs["tags-fp32-seed0"])["f1_by_rounds"].heading.caption.startswith("Higher is better")


def test_a_run_that_was_never_evaluated_has_the_curve_of_its_training(runs: dict[str, Path]) -> None:
    charts = charts_of(runs["blind-fp32-seed0"])

    assert charts["loss_by_rounds"].heading.title == "Training loss by rounds"
    assert list(charts["loss_on_link"].curves[0].y) == [1, 1 / 2, 1 / 3, 1 / 4]
    cautions = find_cautions(study_of(runs["blind-fp32-seed0"]))
    assert [caution.kind for caution in cautions] == ["no evaluation"]


def front(charts: dict[str, Any], key: str) -> Front:
    chart = charts[key]
    assert isinstance(chart, Front)
    return chart


def test_the_pareto_front_goes_down_where_less_is_better(runs: dict[str, Path]) -> None:
    chart = front(charts_of(*(runs[name] for name in HEAT)), "front_bytes")

    assert chart.heading.title == "Mse against bytes"
    assert chart.heading.y == "last mse, K^2"
    assert chart.heading.caption.startswith("Down and left is better")
    assert dict(zip(chart.names, chart.y, strict=True)) == {"heat-fp32": 1.5, "heat-int4": 1.5125, "heat-sign": 2.5}
    assert list(chart.on_front) == [True, True, True]


def test_the_pareto_front_goes_up_where_more_is_better(tmp_path: Path) -> None:
    fewer = OwnRun((F1,), {"f1": (0.75,) * 4}, uplink="int4")
    more = replace(fewer, values={"f1": (0.5,) * 4}, uplink="fp32")
    chart = front(charts_of(*make_own_runs(tmp_path, {"few": fewer, "many": more}).values()), "front_bytes")

    assert chart.heading.caption.startswith("Up and left is better")
    assert dict(zip(chart.names, chart.on_front, strict=True)) == {"few": True, "many": False}


def test_metrics_are_not_drawn_into_one_chart(runs: dict[str, Path], image_run: Path) -> None:
    study = study_of(*(runs[name] for name in (*HEAT, *TAGS)), image_run)
    charts = make_charts(study)
    keys = [chart.heading.key for chart in charts.on_page()]

    assert len(keys) == len(set(keys))
    of_metric: dict[str, set[str]] = {"mse": set(), "f1": set(), "accuracy": set()}
    for chart in charts.on_page():
        for name, arms in of_metric.items():
            if chart.heading.key in (f"{name}_by_rounds", f"{name}_on_link") and isinstance(chart, Lines):
                arms |= {curve.name for curve in chart.curves}
    measures = {arm.name: arm.measure.metric.name for arm in study.arms}
    for name, arms in of_metric.items():
        assert arms == {arm for arm, own in measures.items() if own == name}
    assert {"loss_by_rounds"} < {key for key in keys if key.endswith("loss_by_rounds")}


def test_float32_of_another_metric_is_no_reference(runs: dict[str, Path]) -> None:
    study = study_of(runs["tags-int4-seed0"], runs["heat-fp32-seed0"])
    arm = next(arm for arm in study.arms if arm.name.startswith("tags"))

    assert study.payoff(arm) is None


# ---- report: cautions and files ------------------------------------------------------------------------------------


def kinds(*paths: Path) -> set[str]:
    return {caution.kind for caution in find_cautions(study_of(*paths))}


def test_a_whole_run_has_no_cautions(runs: dict[str, Path]) -> None:
    assert kinds(runs["heat-fp32-seed0"], runs["heat-fp32-seed1"]) == set()
    assert kinds(runs["text-fp32-seed0"]) == set()


def test_other_metrics_and_models_are_not_comparable(runs: dict[str, Path], image_run: Path) -> None:
    assert {"other metric", "other model"} <= kinds(runs["heat-fp32-seed0"], runs["tags-fp32-seed0"])
    assert {"other metric", "other data"} <= kinds(runs["heat-fp32-seed0"], image_run)


def test_metrics_that_cannot_be_read_are_a_caution_and_cost_no_page(runs: dict[str, Path], tmp_path: Path) -> None:
    path = with_summary(shutil.copytree(runs["heat-fp32-seed0"], tmp_path / "a"), metrics="mse")
    assert "schema" in kinds(path)
    assert study_of(path).measures == [Measure(MSE)]  # as the configuration says

    config = yaml.safe_load((path / "config.yaml").read_text()) | {"metrics": [{"nome": "mse"}]}
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    assert study_of(path).measures == [ACCURACY]
    (run,) = find_runs([path])
    assert run.state == "unreadable"
    with pytest.raises(FieldError, match="a list of"):
        print_summary(path)


@pytest.mark.parametrize("told", ["mse", ["mse"], [{"nome": "mse"}], [{"name": "mse", "better": "less"}], {}])
def test_bad_lists_of_metrics_are_refused(told: Any) -> None:
    with pytest.raises(FieldError, match="metric"):
        metrics_of({"metrics": told})


@pytest.mark.slow
def test_the_report_is_written(runs: dict[str, Path], image_run: Path, tmp_path: Path) -> None:
    files = write_report([runs["heat-fp32-seed0"].parent, image_run], tmp_path / "report")

    page = files.page.read_text()
    assert "LINK_CHARTS" not in page
    assert "<h2>Metrics and loss</h2>" in page
    assert "<h2>What it costs</h2>" in page
    names = {file.name for file in files.figures}
    assert {"mse_by_rounds.png", "f1_by_rounds.svg", "mse_on_link.png", "bits_per_byte_by_megabytes.png"} <= names


def test_a_name_with_formulas_and_tags_is_shown_as_it_is(tmp_path: Path) -> None:
    run = OwnRun((Metric("<b>$x_1$ & |y|", "$"),), {"<b>$x_1$ & |y|": (1.0, 2.0, 3.0, 4.0)})
    paths = list(make_own_runs(tmp_path / "runs", {"a": run, "b": replace(run, uplink="int4")}).values())

    study = study_of(*paths)
    charts = make_charts(study)
    assert "<b>$x_1$" not in render(study, charts, find_cautions(study)).partition("<script")[0]
    draw(charts.learning[:1], tmp_path / "figures")
    drawn = (tmp_path / "figures" / "b_x_1_y_by_rounds.svg").read_text()
    assert "$x_1$" in "".join(ElementTree.fromstring(drawn).itertext())
    if is_all():  # a whole report takes seconds to draw
        files = write_report(paths, tmp_path / "report")
        assert "<b>$x_1$" not in files.page.read_text().partition("<script")[0]
        assert "$x_1$" in "".join(
            ElementTree.parse(next(f for f in files.figures if f.name == "b_x_1_y_by_rounds.svg")).getroot().itertext()
        )


@needs_chromium
@pytest.mark.slow
@pytest.mark.parametrize("choose", [lambda name: name.startswith("heat"), lambda name: True], ids=["one", "several"])
def test_the_page_works_in_a_browser(runs: dict[str, Path], choose: Callable[[str], bool], tmp_path: Path) -> None:
    study = study_of(*(path for name, path in runs.items() if choose(name)))
    page = tmp_path / "page.html"
    page.write_text(render(study, make_charts(study), find_cautions(study)), encoding="utf-8")
    actions = """
    const { charts: figures } = fedqReport;
    const ends = () => Object.keys(figures).filter((key) => key.endsWith("_on_link")).map((key) =>
      [key, Math.max(...figures[key].renderers[0].data_source.data.xs.flat())]);
    result.ends = [];
    for (const button of document.querySelectorAll("[data-bandwidth]")) { button.click(); result.ends.push(ends()); }
    """
    result = look_at(page, 1280, actions=actions)
    assert result["errors"] == []
    moved = [dict(ends) for ends in result["ends"]]
    assert "mse_on_link" in moved[0]
    for key in moved[0]:
        assert moved[0][key] > moved[-1][key]  # the first bandwidth is the lowest


# ---- figures -------------------------------------------------------------------------------------------------------


def test_figures_are_of_the_first_metric(runs: dict[str, Path], tmp_path: Path) -> None:
    lines = write_figures([runs[name] for name in HEAT], tmp_path)

    assert [line.partition(":")[0] for line in lines if "left out" not in line] == [
        "mse_by_megabytes",
        "weight_histograms",
    ]
    with (tmp_path / "mse_by_megabytes.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["arm"] == "heat-fp32"]
    assert [float(row["val_mse_mean"]) for row in rows] == [4.0, 2.0, 1.25, 1.5]
    drawn = ElementTree.parse(tmp_path / "mse_by_megabytes.svg").getroot()
    assert "validation mse, K^2" in "".join(drawn.itertext())


def test_figures_of_several_metrics_are_one_each(runs: dict[str, Path], tmp_path: Path) -> None:
    lines = write_figures([runs[name] for name in ("heat-fp32-seed0", "tags-fp32-seed0")], tmp_path)

    assert {"mse_by_megabytes", "f1_by_megabytes"} <= {line.partition(":")[0] for line in lines}


@pytest.mark.parametrize(
    ("tensors", "name"),
    [
        ({"mask": torch.ones(9, 9, dtype=torch.bool), "a": torch.ones(2, 3), "b": torch.ones(4, 3).bfloat16()}, "b"),
        ({"a": torch.ones(3), "b": torch.ones(2, 3, 4)}, "b"),
    ],
)
def test_weights_of_any_model_have_a_histogram(tensors: dict[str, torch.Tensor], name: str, tmp_path: Path) -> None:
    write_model(tmp_path / "model.safetensors", tensors)
    found, bins = Deployed(tmp_path / "model.safetensors", "", 32.0, 0).histogram()

    assert found == name
    assert sum(share for _, _, share in bins) == pytest.approx(1)


# ---- words ---------------------------------------------------------------------------------------------------------


def test_columns_name_the_measure_where_there_are_several() -> None:
    one, both = Columns([ACCURACY, ACCURACY], "result", "best"), Columns([ACCURACY, Measure(F1)], "result", "best")

    assert one.headings == ("test accuracy, %", "best validation, %")
    assert one.cell(ACCURACY, "result", 87.5, 0.25) == "87.50 ± 0.25"
    assert both.headings == ("result", "best in validation")
    assert both.cell(ACCURACY, "result", 87.5, 0.25) == "test accuracy 87.50 ± 0.25 %"
    assert both.cell(Measure(F1), "best", 0.5) == "best f1 0.5000"
    assert both.cell(Measure(F1), "best", None) == "-"
    assert Columns([], "result").headings == ("test accuracy, %",)


def test_names_of_files_are_plain_and_distinct() -> None:
    assert [file_name(name) for name in ("mse", "bits per byte", "mAP@0.5", "é")] == [
        "mse",
        "bits_per_byte",
        "map_0_5",
        "metric",
    ]
    assert list(distinct(["a", "b", "a", "a_2", "a"])) == ["a", "b", "a_2", "a_2_2", "a_3"]


def test_an_own_metric_that_is_called_accuracy_is_no_accuracy_of_images() -> None:
    assert Measure(Metric("accuracy", "%", "higher")) != ACCURACY
    assert Measure(MSE) == Measure(Metric("mse", "K^2"))

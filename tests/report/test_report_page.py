"""The report of real runs: its tables against the runs' own files, its warnings on runs made bad on purpose."""

from __future__ import annotations

import csv
import html
import itertools
import json
import re
import statistics
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from properties import few, is_all
from report_runs import ARMS, copied, make_runs, with_config, with_phases, with_summary, with_table

from fedq.cli import main
from fedq.errors import FieldError
from fedq.report.page import ReportFiles, write_report
from fedq.report.page.cautions import Caution, find_cautions, interface_limits
from fedq.report.page.charts import make_charts
from fedq.report.page.curves import MOST_POINTS, thinned
from fedq.report.page.draw_bokeh import category_labels
from fedq.report.page.draw_matplotlib import write_figures
from fedq.report.page.evidence import read_evidence
from fedq.report.page.html import in_script, render
from fedq.report.page.pareto import pareto_front, seconds_on_link
from fedq.report.page.study import Study, make_study
from fedq.report.page.tables import all_tables, write_tables
from fedq.report.page.text import as_text


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return make_runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def report(runs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> ReportFiles:
    """The report of all runs; of two arms and with a figure of each kind without ``--all``: to draw takes seconds."""
    out = tmp_path_factory.mktemp("report")
    if is_all():
        return write_report([runs[0].parent], out)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedq.report.page.write.write_figures", write_few_figures)
        return write_report([runs[0], runs[2]], out)


def write_few_figures(charts: Sequence[Any], out: Path) -> list[Path]:
    return write_figures([chart for chart in charts if chart.heading.key in FIGURES], out)


FIGURES = {"accuracy_by_megabytes", "front_seconds", "bytes_by_direction", "layers_uplink", "labels", "histogram_codes"}


@pytest.fixture(scope="module")
def tables(runs: list[Path], request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tables of all runs: those of the report where it has all of them."""
    if is_all():
        return request.getfixturevalue("report").page.parent / "tables"
    study = study_of(runs[0].parent)
    folder = tmp_path_factory.mktemp("tables")
    write_tables(all_tables(study, find_cautions(study)), folder)
    return folder


def shown(*paths: Path) -> dict[str, list[dict[str, Any]]]:
    """Return the tables of runs whose page and text can be made; the figures take long and have tests of their own.

    A page takes a second to draw: with ``--all``.
    """
    study = study_of(*paths)
    cautions, charts = find_cautions(study), make_charts(study)
    assert as_text(study, cautions)
    if is_all():
        assert render(study, charts, cautions)
    return all_tables(study, cautions)


def table(tables: Path, name: str) -> list[dict[str, str]]:
    with (tables / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def summary_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "summary.json").read_text())


def study_of(*paths: Path) -> Study:
    return make_study(read_evidence(paths))


def warnings_of(*paths: Path) -> list[Caution]:
    return find_cautions(study_of(*paths))


def texts(cautions: list[Caution], kind: str) -> str:
    return " ".join(one.text for one in cautions if one.kind == kind)


# ---- tables against the runs' files --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bytes_by_part", "bytes_by_round", "bytes_by_client", "bytes_by_layer"])
def test_bytes_of_every_table_are_the_ledgers(runs: list[Path], tables: Path, name: str) -> None:
    rows = table(tables, name)
    for run in runs:
        ledger, summary = pq.read_table(run / "ledger.parquet").to_pylist(), summary_of(run)
        for way in ("uplink", "downlink"):
            own = [row for row in rows if (row["run"], row["direction"]) == (run.name, way)]
            for kind in ("raw", "payload", "wire"):
                assert sum(int(row[kind]) for row in own) == sum(r[kind] for r in ledger if r["direction"] == way)
            assert sum(int(row["payload"]) for row in own) == summary[f"{way}_bytes"]
            assert sum(int(row["raw"]) for row in own) == summary[f"{way}_bytes_fp32"]
            assert sum(float(row["raw_bf16"]) for row in own) == summary[f"{way}_bytes_fp32"] / 2


def test_bytes_by_layer_and_part_are_those_of_single_rows(runs: list[Path], tables: Path) -> None:
    ledger = pq.read_table(runs[2] / "ledger.parquet").to_pylist()
    rows = [row for row in table(tables, "bytes_by_layer") if row["run"] == runs[2].name]
    expected: dict[tuple[str, ...], int] = {}
    for row in ledger:
        key = (row["direction"], row["tensor"], row["part"])
        expected[key] = expected.get(key, 0) + row["payload"]
    assert {(row["direction"], row["tensor"], row["part"]): int(row["payload"]) for row in rows} == expected


def test_rounds_are_those_of_the_metrics(runs: list[Path], tables: Path) -> None:
    for run in runs:
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        rows = [row for row in table(tables, "rounds") if row["run"] == run.name]
        assert [int(row["round"]) for row in rows] == [line["round"] + 1 for line in lines]
        assert [int(row["uplink_bytes"]) for row in rows] == [line["uplink_bytes"] for line in lines]
        assert [float(row["val_accuracy"]) for row in rows] == [line["val_accuracy"] for line in lines]
        seconds = itertools.accumulate(line["seconds"] for line in lines)
        assert [float(row["seconds"]) for row in rows] == pytest.approx(list(seconds))


def test_curves_by_megabytes_are_means_of_the_metrics(runs: list[Path]) -> None:
    charts = {chart.heading.key: chart for chart in make_charts(study_of(*runs)).learning}
    assert sorted(charts) == sorted(
        f"{y}_by_{x}" for y in ("accuracy", "loss") for x in ("rounds", "megabytes", "seconds")
    )
    (curve,) = [c for c in charts["accuracy_by_megabytes"].curves if c.name == "int4"]
    lines = [
        [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        for run in runs
        if run.name.startswith("int4")
    ]
    for i, both in enumerate(zip(*lines, strict=True)):
        bytes_ = [line["uplink_bytes"] + line["downlink_bytes"] for line in both]
        accuracies = [100 * line["val_accuracy"] for line in both]
        assert curve.x[i] == pytest.approx(statistics.fmean(bytes_) / 1e6)
        assert curve.y[i] == pytest.approx(statistics.fmean(accuracies))
        assert curve.sd[i] == pytest.approx(statistics.stdev(accuracies))


def test_arms_are_means_over_seeds(runs: list[Path], tables: Path) -> None:
    rows = {row["arm"]: row for row in table(tables, "arms")}
    assert set(rows) == set(ARMS)
    for name, row in rows.items():
        own = [summary_of(run) for run in runs if run.name.startswith(name)]
        accuracies = [100 * summary["test_accuracy"] for summary in own]
        assert float(row["test_accuracy_percent_mean"]) == pytest.approx(statistics.fmean(accuracies))
        assert float(row["test_accuracy_percent_sd"]) == pytest.approx(statistics.stdev(accuracies))
        assert float(row["uplink_bytes"]) == statistics.fmean(summary["uplink_bytes"] for summary in own)
        assert row["num_finished"] == "2"
    assert next(iter(rows)) == "fp32"


def test_entropy_is_that_of_the_logged_codes(runs: list[Path], tables: Path) -> None:
    rows = {row["tensor"]: row for row in table(tables, "entropy_of_codes") if row["run"] == runs[2].name}
    logged = [r for r in pq.read_table(runs[2] / "histograms.parquet").to_pylist() if r["stage"] == "codes"]
    assert rows
    for tensor, row in rows.items():
        own = [r for r in logged if r["tensor"] == tensor]
        bits = sum(r["entropy_bits"] * r["num"] for r in own) / sum(r["num"] for r in own)
        assert float(row["entropy_bits_a_code"]) == pytest.approx(bits)
        assert float(row["bits_a_code"]) == 4
        assert int(row["codes"]) == sum(r["num"] for r in own)


def test_phases_are_means_over_ranks_and_leave_the_rest(runs: list[Path], tmp_path: Path) -> None:
    run = with_phases(copied(runs[2], tmp_path / "int4-seed0"), exchange_s=0.001)
    rows = {row["phase"]: row for row in shown(run)["phases"]}
    seconds = sum(json.loads(line)["seconds"] for line in (run / "metrics.jsonl").read_text().splitlines())
    assert float(rows["compute"]["seconds"]) == pytest.approx(seconds / 2)
    assert float(rows["exchange"]["seconds"]) == pytest.approx(3 * 0.001)
    assert float(rows["exchange"]["hidden_seconds"]) == pytest.approx(0.75)
    assert sum(float(row["seconds"]) for row in rows.values()) == pytest.approx(seconds)
    arm = study_of(run).arms[0]
    assert arm.computation is not None
    assert arm.computation.mean == pytest.approx(seconds - 0.003)


def test_labels_and_clients_are_those_of_the_run(runs: list[Path], tables: Path) -> None:
    clients = pq.read_table(runs[0] / "clients.parquet").to_pylist()
    for row in [row for row in table(tables, "labels") if row["run"] == runs[0].name]:
        counts = [int(row[f"class_{label}"]) for label in range(10)]
        assert counts == next(c["label_counts"] for c in clients if c["client"] == int(row["client"]))
    alone = study_of(runs[0].parent / "others")
    personal = pq.read_table(runs[0].parent / "others" / "alone" / "personal.parquet").to_pylist()
    (chart,) = [c for c in make_charts(alone).others if c.heading.key == "client_accuracy"]
    shown = sorted(x for _, x in chart.series["client"])  # type: ignore[union-attr]
    assert shown == pytest.approx(sorted(100 * row["test_accuracy"] for row in personal))


# ---- fronts and links ----------------------------------------------------------------------------------------------

_COORDINATES = st.integers(0, 6).map(float)


@given(st.lists(st.tuples(_COORDINATES, _COORDINATES), max_size=12))
def test_the_pareto_front_is_that_of_brute_force(points: list[tuple[float, float]]) -> None:
    def is_beaten(cost: float, gain: float) -> bool:
        return any(c <= cost and g >= gain and (c < cost or g > gain) for c, g in points)

    front = pareto_front([cost for cost, _ in points], [gain for _, gain in points])
    assert front == [not is_beaten(*point) for point in points]


def test_seconds_on_a_link_follow_the_formula(runs: list[Path], tables: Path) -> None:
    study = study_of(*runs)
    for row in table(tables, "seconds_on_links"):
        arm = next(arm for arm in study.arms if arm.name == row["arm"])
        assert arm.computation is not None
        expected = arm.computation.mean + arm.link_bytes * 8 / float(row["bits_per_s"])
        assert float(row["seconds"]) == pytest.approx(expected)


def with_seconds(run: Path, seconds: float) -> Path:
    """Make each round of a run take so long."""
    lines = [json.loads(line) | {"seconds": seconds} for line in (run / "metrics.jsonl").read_text().splitlines()]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


@pytest.fixture
def timed(runs: list[Path], tmp_path: Path) -> dict[str, Path]:
    """One run an arm, float32's rounds of one second."""
    return {run.name[:4]: with_seconds(copied(run, tmp_path / run.name), 1.0) for run in runs if run.name.endswith("0")}


def test_at_the_break_even_bandwidth_both_arms_take_as_long(timed: dict[str, Path]) -> None:
    with_seconds(timed["int4"], 1.5)
    study = study_of(*timed.values())
    fp32, int4 = (next(arm for arm in study.arms if arm.name == name) for name in ("fp32", "int4"))
    payoff = study.payoff(int4)
    assert payoff is not None
    assert payoff.break_even
    both = [
        seconds_on_link(arm.computation.mean, arm.link_bytes, payoff.break_even)  # type: ignore[union-attr]
        for arm in (fp32, int4)
    ]
    assert both[0] == pytest.approx(both[1])
    text = texts(find_cautions(study), "did not pay")
    assert "int4 took 50 % longer than fp32" in text
    assert "sign" not in text


def test_an_arm_that_computes_as_long_pays_on_any_link(timed: dict[str, Path]) -> None:
    with_seconds(timed["int4"], 1.02)
    with_seconds(timed["sign"], 0.5)
    study = study_of(*timed.values())
    limits = {arm.name: payoff.break_even for arm in study.arms if (payoff := study.payoff(arm))}
    assert limits == {"int4": None, "sign": float("inf")}


# ---- warnings ------------------------------------------------------------------------------------------------------


def test_good_runs_have_no_warning(timed: dict[str, Path]) -> None:
    assert [one for one in warnings_of(*timed.values()) if one.level != "note"] == []


def test_compression_that_sends_more_than_float32(runs: list[Path], tmp_path: Path) -> None:
    run = copied(runs[2], tmp_path / "int4-seed0")
    with_summary(run, uplink_bytes_fp32=summary_of(run)["uplink_bytes"] // 2)
    assert "int4-seed0" not in texts(warnings_of(run), "did not pay")
    assert re.search(r"sent .* uplink, float32 would be", texts(warnings_of(run), "did not pay"))


def test_a_codec_slower_than_bf16(timed: dict[str, Path]) -> None:
    with_config(timed["fp32"], "exchange", uplink="bf16")
    with_summary(with_seconds(timed["fp32"], 1.0), uplink="bf16", uplink_bytes=10, downlink_bytes=10)
    with_seconds(timed["int4"], 2.0)
    found = texts(warnings_of(timed["fp32"], timed["int4"]), "slower than bf16")
    assert "bfloat16 is better on any link: int4" in found
    with_summary(timed["fp32"], uplink_bytes=10**9)
    assert "takes less time in all on links faster than" in texts(
        warnings_of(timed["fp32"], timed["int4"]), "slower than bf16"
    )


@pytest.mark.parametrize(
    ("section", "change", "kind"),
    few(
        [
            ("data", {"train_examples": 100}, "other data"),
            ("clients", {"partition": "shards:classes=2"}, "other data"),
            ("local", {"model": "cnn1m"}, "other model"),
            ("run", {"rounds": 30}, "other budget"),
            ("local", {"local_steps": 9}, "other budget"),
            ("local", {"lr": 0.5}, "test set"),
        ],
        2,
    ),
)
def test_runs_that_are_not_comparable(timed: dict[str, Path], section: str, change: dict[str, Any], kind: str) -> None:
    with_config(timed["int4"], section, **change)
    (found,) = [one for one in warnings_of(timed["fp32"], timed["int4"]) if one.kind == kind]
    assert found.level == "warning"
    assert set(found.sections) >= {"results", "learning", "tradeoff"}
    if is_all():
        assert render_of(timed["fp32"], timed["int4"]).count(kind) >= 3


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"cpu": "another"}, "other hardware"),
        ({"git_commit": "0" * 40}, "other commit"),
        ({"world_size": 7}, "other hardware"),
    ],
)
def test_runs_of_other_machines_and_commits(timed: dict[str, Path], changes: dict[str, Any], kind: str) -> None:
    with_summary(timed["int4"], **changes)
    assert "int4-seed0" in texts(warnings_of(timed["fp32"], timed["int4"]), kind)


def test_no_validation_data(timed: dict[str, Path]) -> None:
    for run in timed.values():
        with_config(run, "data", val_fraction=0.0)
        with_summary(run, best_val_accuracy=None)
    assert "chooses by the test set" in texts(warnings_of(*timed.values()), "test set")


def test_clients_that_were_left_out_and_losses_that_are_no_number(timed: dict[str, Path]) -> None:
    def lose(table: Any) -> Any:
        rows = table.to_pylist()
        rows[1]["status"] = "NaN in fc.0.weight"
        return table.from_pylist(rows, schema=table.schema)

    with_table(timed["int4"], "clients", lose)
    lines = (timed["sign"] / "metrics.jsonl").read_text().splitlines()
    broken = json.loads(lines[1]) | {"train_loss": None}
    (timed["sign"] / "metrics.jsonl").write_text("\n".join([lines[0], json.dumps(broken), lines[2]]) + "\n")
    found = warnings_of(*timed.values())
    assert "NaN in fc.0.weight" in texts(found, "left-out clients")
    assert "sign-seed0: the loss is no number from round 2 on" in texts(found, "diverged")


def test_an_unfinished_run_is_shown_as_far_as_it_went(timed: dict[str, Path], tmp_path: Path) -> None:
    run = timed["int4"]
    for name in ("summary.json", "ledger.parquet", "clients.parquet"):
        (run / name).unlink()
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join(lines[:2]) + "\n" + lines[2][:10])
    tables = shown(*timed.values())
    found = warnings_of(*timed.values())
    assert "int4-seed0 is unfinished (2 of 3 rounds)" in texts(found, "incomplete")
    assert "ledger.parquet is missing (int4-seed0)" in texts(found, "missing file")
    assert "clients.parquet is missing (int4-seed0)" in texts(found, "missing file")
    assert len([row for row in tables["rounds"] if row["run"] == run.name]) == 2
    (arm,) = [row for row in tables["arms"] if row["arm"] == "int4"]
    assert arm["test_accuracy_percent_mean"] is None
    assert arm["uplink_bytes"] == json.loads(lines[1])["uplink_bytes"]


def test_a_seed_that_did_not_finish_is_left_out_of_the_mean(runs: list[Path], tmp_path: Path) -> None:
    both = [copied(run, tmp_path / run.name) for run in runs if run.name.startswith("int4")]
    (both[1] / "summary.json").unlink()
    (arm,) = study_of(*both).arms
    assert arm.result is not None
    assert (arm.result.mean, arm.result.sd) == (100 * summary_of(both[0])["test_accuracy"], None)
    assert "is left out of the arm's means" in texts(warnings_of(*both), "incomplete")


@pytest.mark.slow
def test_an_empty_ledger(timed: dict[str, Path], tmp_path: Path) -> None:
    with_table(timed["int4"], "ledger", lambda table: table.slice(0, 0))
    assert "no row (int4-seed0)" in texts(warnings_of(*timed.values()), "empty ledger")
    shown(*timed.values())
    assert "bytes_by_part" not in shown(timed["int4"])
    write_report([timed["int4"]], tmp_path / "out")


def test_a_ledger_that_disagrees_with_the_summary(timed: dict[str, Path]) -> None:
    with_table(timed["int4"], "ledger", lambda table: table.slice(1))
    assert "summary.json says" in texts(warnings_of(timed["int4"]), "counts disagree")


def test_other_schemas_are_named_and_left_out(timed: dict[str, Path], tmp_path: Path) -> None:
    with_table(timed["int4"], "ledger", lambda table: table.replace_schema_metadata({"schema_version": "7"}))
    with_table(timed["int4"], "clients", lambda table: table.drop_columns(["label_counts"]))
    found = texts(warnings_of(*timed.values()), "schema")
    assert "ledger.parquet has schema version 7; this fedq reads 1 (int4-seed0)" in found
    assert "clients.parquet lacks label_counts (int4-seed0)" in found
    shown(*timed.values())
    with_summary(timed["sign"], schema_version=2)
    assert "summary.json has schema version 2; this fedq reads 1" in texts(warnings_of(*timed.values()), "schema")


def test_runs_of_which_nothing_can_be_read_are_refused(timed: dict[str, Path], tmp_path: Path) -> None:
    run = timed["int4"]
    with_summary(run, schema_version=2)
    (run / "metrics.jsonl").unlink()
    with pytest.raises(FieldError, match=r"summary.json has schema version 2; this fedq reads 1"):
        write_report([run], tmp_path / "out")
    (tmp_path / "none").mkdir()
    with pytest.raises(FieldError, match="a run's folder, or one that holds some"):
        write_report([tmp_path / "none"], tmp_path / "out")


def test_broken_files_are_named(timed: dict[str, Path], tmp_path: Path) -> None:
    (timed["int4"] / "ledger.parquet").write_bytes(b"PAR1 and no more")
    (timed["int4"] / "config.yaml").write_text("- [")
    (timed["sign"] / "summary.json").write_text("{")
    found = texts(warnings_of(*timed.values()), "missing file")
    assert "ledger.parquet cannot be read" in found
    assert "config.yaml cannot be read" in found
    assert "summary.json cannot be read" in found
    shown(*timed.values())


@pytest.mark.parametrize(("ratio", "is_bad"), few([(0.995, False), (1.002, False), (0.98, True), (1.2, True)], 2))
def test_interfaces_that_sent_something_else(timed: dict[str, Path], ratio: float, is_bad: bool) -> None:
    host = {"host": "a", "ranks": [0, 1], "interfaces": {"lo": {"sent": 1000, "received": 1000}}}
    found = {"hosts": [host], "sent": 10**6, "counted": round(10**6 / ratio), "ratio": ratio}
    run = with_summary(timed["int4"], interface=found)
    assert bool(texts(warnings_of(run), "interface")) == is_bad
    assert [row["sent"] for row in shown(run)["interfaces"]] == [1000, 10**6]
    low, high = interface_limits({"hosts": [{"interfaces": {"eth0": {}}}]})
    assert low < 1 < 1.05 < high < 1.12


# ---- the page ------------------------------------------------------------------------------------------------------


def render_of(*paths: Path) -> str:
    study = study_of(*paths)
    return render(study, make_charts(study), find_cautions(study))


class _Outline(HTMLParser):
    """Collects what a page loads from elsewhere, its elements and its text."""

    def __init__(self) -> None:
        super().__init__()
        self.foreign: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.foreign += [str(v) for k, v in attributes if k in ("src", "href") and v and not v.startswith("#")]


def test_the_page_is_one_file_with_all_sections(report: ReportFiles) -> None:
    page = report.page.read_text()
    outline = _Outline()
    outline.feed(page)
    assert outline.foreign == []
    assert "@import" not in page.partition("</style>")[0]
    for section in ("results", "learning", "tradeoff", "bytes", "time", "clients", "histograms", "runs"):
        assert f'<section id="{section}">' in page
    assert "total seconds = measured computation + 8 x bytes on the link / bandwidth" in page
    assert len(page) < 3_000_000
    assert "int4" in report.text.read_text()


def test_figures_are_pictures_and_drawings_of_the_pages_charts(report: ReportFiles) -> None:
    names = {file.stem for file in report.figures}
    assert names >= FIGURES
    for file in report.figures:
        if file.suffix == ".png":
            assert file.read_bytes().startswith(b"\x89PNG")
        else:
            assert ElementTree.parse(file).getroot().tag.endswith("svg")


def test_the_same_runs_give_the_same_tables(runs: list[Path], tables: Path, tmp_path: Path) -> None:
    study = study_of(runs[0].parent)
    for file in write_tables(all_tables(study, find_cautions(study)), tmp_path):
        assert file.read_bytes() == (tables / file.name).read_bytes()


def test_names_from_runs_are_text(timed: dict[str, Path], tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>$x$ & \"'"
    run = timed["int4"].rename(tmp_path / "<img src=x onerror=alert(2)>-seed0")
    with_summary(run, dataset=evil, model=evil, uplink=evil, server=evil, cpu=evil, command=f"train.py {evil}")
    page = render_of(run, timed["fp32"])
    outline = _Outline()
    outline.feed(page)
    assert "img" not in outline.tags
    assert outline.tags.count("script") == 3
    assert "<script>alert" not in page
    charts = make_charts(study_of(run, timed["fp32"]))
    write_figures([charts.learning[0], *charts.others[:1], *charts.others[-1:]], tmp_path)


def test_json_in_a_script_cannot_end_it() -> None:
    text = in_script({"a": "</script><!--\u2028"})
    assert "<" not in text
    assert json.loads(text) == {"a": "</script><!--\u2028"}


def test_runs_alone_have_a_report_without_bytes(runs: list[Path]) -> None:
    run = runs[0].parent / "others" / "alone"
    assert "nothing was sent" in render_of(run)
    assert "trained alone" in texts(warnings_of(run), "no exchange")
    assert not [name for name in shown(run) if name.startswith("bytes")]


@pytest.mark.slow
def test_many_arms_stay_small(timed: dict[str, Path], tmp_path: Path) -> None:
    many = []
    for i in range(38):
        run = copied(timed["int4"], tmp_path / f"arm-{chr(97 + i % 26)}{chr(97 + i // 26)}-seed0")
        many.append(with_config(run, "local", lr=0.01 * (i + 1)))
    study = study_of(*many)
    assert len(study.arms) == 38
    assert len(render(study, make_charts(study), find_cautions(study))) < 3_000_000


@given(st.integers(1, 500), st.integers(2, 60))
def test_thinned_keeps_the_ends(num: int, most: int) -> None:
    kept = thinned(range(num), most)
    assert len(kept) == min(num, most)
    assert (kept[0], kept[-1]) == (0, num - 1)
    assert kept == sorted(set(kept))
    assert MOST_POINTS > 100


@given(st.lists(st.text(min_size=1, max_size=60), max_size=8))
def test_categories_of_an_axis_differ_and_fit(names: list[str]) -> None:
    labels = category_labels(names)
    assert len(set(labels)) == len(labels) == len(names)
    assert all(len(line) <= 20 for label in labels for line in label.split("\n"))


def test_the_command_of_a_run_is_shown_as_it_was_given(runs: list[Path]) -> None:
    (row,) = shown(runs[0])["runs"]
    assert row["command"] == json.loads((runs[0] / "summary.json").read_text())["command"]
    assert row["command"].startswith("python ")
    if is_all():
        assert row["command"] in html.unescape(render_of(runs[0]))


@pytest.mark.slow
def test_the_command(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["fedq"])
    assert main(["report", str(runs[0]), "--out", str(tmp_path / "out"), "--title", "Mine"]) == 0
    assert "Mine" in capsys.readouterr().out
    assert (tmp_path / "out" / "report.html").exists()
    assert main(["report", str(tmp_path / "nowhere")]) == 2
    assert "a folder that exists" in capsys.readouterr().err


def test_without_bokeh_the_report_says_how_to_install_it(
    runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "bokeh", None)
    with pytest.raises(FieldError, match="pip install 'bokeh"):
        write_report([runs[0]], tmp_path)

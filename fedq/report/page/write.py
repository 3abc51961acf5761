"""A report's folder: the page, its tables and figures, and its text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fedq.files import replacing
from fedq.report.figures import check_matplotlib, make_folder
from fedq.report.page.cautions import find_cautions
from fedq.report.page.charts import make_charts
from fedq.report.page.draw_bokeh import check_bokeh
from fedq.report.page.draw_matplotlib import write_figures
from fedq.report.page.evidence import read_evidence
from fedq.report.page.html import render
from fedq.report.page.study import make_study
from fedq.report.page.tables import all_tables, write_tables
from fedq.report.page.text import as_text


@dataclass(frozen=True)
class ReportFiles:
    """What `write_report` wrote.

    Args:
        page: Path of `report.html`.
        text: Path of `report.txt`.
        tables: Paths of `tables/*.csv`.
        figures: Paths of `figures/*.png` and `*.svg`.
    """

    page: Path
    text: Path
    tables: tuple[Path, ...]
    figures: tuple[Path, ...]


def write_report(paths: Sequence[Path], out: Path, *, title: str | None = None) -> ReportFiles:
    """Write the report of some runs, from their files alone; the same files give the same report.

    Args:
        paths: Folders of runs, or folders that hold some.
        out: Folder of the report; made if it does not exist. Files of an older report are replaced.
        title: Title of the page. Default: data, model, and the arm or the number of arms.

    Raises:
        FieldError: A folder is no run, no run has a round to show, Bokeh or matplotlib is missing, or `out` cannot be
            written.
    """
    check_bokeh()
    check_matplotlib()
    study = make_study(read_evidence(paths), title)
    make_folder(out)
    cautions = find_cautions(study)
    charts = make_charts(study)
    for name, text in (("report.html", render(study, charts, cautions)), ("report.txt", as_text(study, cautions))):
        with replacing(out / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return ReportFiles(
        out / "report.html",
        out / "report.txt",
        tuple(write_tables(all_tables(study, cautions), out / "tables")),
        tuple(write_figures(charts.as_files(), out / "figures")),
    )

"""One self-contained HTML page of runs, with the same tables as CSV, the same figures as PNG and SVG, and as text."""

from fedq.report.page.write import ReportFiles, write_report

__all__ = ["ReportFiles", "write_report"]

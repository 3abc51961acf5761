"""Show runs to people. Everything here reads a run's files only."""

from fedq.report.compare import comparison
from fedq.report.runs import RunStatus, find_runs, print_runs
from fedq.report.terminal import (
    NETWORK_SERVER,
    RoundProgress,
    human_seconds,
    print_header,
    print_summary,
    read_summary,
    round_progress,
)
from fedq.text import human_bytes

__all__ = [
    "NETWORK_SERVER",
    "RoundProgress",
    "RunStatus",
    "comparison",
    "find_runs",
    "human_bytes",
    "human_seconds",
    "print_header",
    "print_runs",
    "print_summary",
    "read_summary",
    "round_progress",
]

"""The benchmark of predictions: its table, its verdict, and a whole small run on plain loopback."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import bench_links
import pytest

SCRIPT = Path(bench_links.__file__)
ABOUT = {"hardware": "h", "torch": "t", "date": "d", "model": "m", "batch_size": 1, "probe_seconds": 15}


def row(predicted_ms: float, measured_ms: float, **given: Any) -> bench_links.Row:
    values = {
        "link": "1gbit",
        "ranks": 2,
        "codec": "int4",
        "schedule": "one_phase",
        "compute_ms": 1.0,
        "spread": 0.1,
        "predicted_bytes": 1000.0,
        "measured_bytes": 1000.0,
    }
    return bench_links.Row(predicted_ms=predicted_ms, measured_ms=measured_ms, **values | given)


@pytest.mark.parametrize(("worst", "word"), [(114, "met"), (116, "MISSED")])
def test_the_verdict_is_the_median_of_absolute_errors(worst: float, word: str) -> None:
    lines = bench_links.verdict([row(100, 100), row(worst, 100), row(50, 100)])
    assert f"{worst - 100:.1f} %" in lines[0]
    assert f"15 %, {word})" in lines[0]
    assert "at most 50 %" in lines[2]


def test_the_table_says_when_bytes_differ() -> None:
    assert "are the same in every row" in bench_links.table([row(1, 1)], ABOUT)
    assert "are NOT the same in every row" in bench_links.table([row(1, 1, measured_bytes=999.0)], ABOUT)


@pytest.mark.slow
def test_a_run_on_loopback_predicts_its_bytes_and_is_not_repeated(tmp_path: Path) -> None:
    flags = ["--links", "none", "--ranks", "2", "--model", "cnn62k", "--batch-size", "4", "--seconds-per-arm", "0.2"]
    flags += ["--probe-seconds", "1", "--codecs", "fp32", "int4", "--work", str(tmp_path / "work")]
    out = tmp_path / "rows.json"
    command = [sys.executable, str(SCRIPT), *flags, "--out", str(out)]
    first = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert first.returncode == 0, first.stdout + first.stderr
    rows = json.loads(out.read_text())
    assert [found["codec"] for found in rows] == ["fp32", "int4"]
    for found in rows:
        assert found["predicted_bytes"] == found["measured_bytes"]
        assert found["predicted_ms"] >= found["compute_ms"]
    assert first.stdout.count("| none | 2 |") == 2
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "work").iterdir()}
    subprocess.run(command, check=True, capture_output=True, timeout=240)
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "work").iterdir()}

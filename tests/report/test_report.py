from __future__ import annotations

import io
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from fedq.errors import FieldError
from fedq.report import human_bytes, human_seconds, print_header, print_summary, read_summary, round_progress

SUMMARY = {
    "dataset": "digits",
    "model": "resnet18",
    "num_params": 11_173_962,
    "world_size": 2,
    "launcher": "torchrun",
    "exchange": "round",
    "uplink": "int4:block=256",
    "downlink": "int8",
    "server": "fedavg",
    "rounds": 10,
    "test_accuracy": 0.9722,
    "test_balanced_accuracy": 0.95,
    "best_val_accuracy": 0.981,
    "uplink_bytes": 5_720_000,
    "uplink_bytes_fp32": 44_800_000,
    "downlink_bytes": 11_500_000,
    "downlink_bytes_fp32": 44_800_000,
    "wire_bytes": 30_000_000,
    "seconds": 155.2,
    "seconds_per_round": 15.52,
    "seed": 0,
    "git_commit": None,
    "versions": {},
    "num_clients": 4,
    "cohort": 2,
    "downlink_to": "cohort",
    "left_out": [{"round": 2, "client": 3, "reason": "NaN in fc.weight [bold]"}],
}


def run_folder(parent, **changes):
    folder = parent / ("long-name-" * 12)
    folder.mkdir()
    (folder / "summary.json").write_text(json.dumps(SUMMARY | changes))
    return folder


def capture(force_terminal=False, **options):
    return Console(file=io.StringIO(), force_terminal=force_terminal, **options)


def printed(folder, **options):
    console = capture(**options)
    print_summary(folder, console)
    return console.file.getvalue()


@pytest.mark.parametrize(
    ("n", "text"),
    [
        (0, "0 B"),
        (812, "812 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (999_499, "999 kB"),
        (999_500, "1 MB"),
        (1_430_000, "1.43 MB"),
        (44_800_000, "44.8 MB"),
        (2_100_000_000, "2.1 GB"),
        (7.5e15, "7.5 PB"),
        (1.234e19, "12,340 PB"),
    ],
)
def test_human_bytes(n, text):
    assert human_bytes(n) == text


@given(st.integers(0, 10**18))
def test_human_bytes_is_right_to_three_digits(n):
    number, unit = human_bytes(n).split()
    back = float(number.replace(",", "")) * 1000 ** ["B", "kB", "MB", "GB", "TB", "PB"].index(unit)
    assert back == pytest.approx(n, rel=0.0051)  # half a unit of the third digit, at worst of 1.00
    assert "e" not in number


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.424, "0.42 s"),
        (95.34, "95.3 s"),
        (155.2, "2 min 35 s"),
        (119.96, "2 min 00 s"),
        (3599.6, "1 h 00 min"),
        (11_100, "3 h 05 min"),
    ],
)
def test_human_seconds(seconds, text):
    assert human_seconds(seconds) == text


def test_plain_summary_says_what_was_learned_and_what_it_cost(tmp_path):
    folder = run_folder(tmp_path)
    text = printed(folder)
    assert "\x1b" not in text
    assert dict(line.split(maxsplit=1) for line in text.splitlines() if line[0] in "dmu") == {
        "data": "digits",
        "model": "resnet18, 11,173,962 parameters",
        "uplink": "int4:block=256: 5.72 MB, float32 44.8 MB, 12.8 %, 7.8x less",
        "downlink": "int8: 11.5 MB, float32 44.8 MB, 25.7 %, 3.9x less, charged to each round's cohort",
    }
    assert "4 clients, 2 a round, 10 rounds, server fedavg, 2 ranks (torchrun)" in text
    assert "97.22 %" in text
    assert "balanced accuracy 95.00 %" in text
    assert "98.10 %" in text
    assert "30 MB in all" in text
    assert "2 min 35 s, 15.5 s a round" in text
    assert "client 3 in round 2: NaN in fc.weight [bold]" in text
    assert text.splitlines()[-1].endswith(str(folder))  # longer than 80 columns, and whole on one line


def test_terminal_summary_is_a_table_that_loses_nothing(tmp_path):
    folder = run_folder(tmp_path)
    text = printed(folder, force_terminal=True, width=50, color_system=None)
    assert "fedq run" in text
    table, path_line = text.rstrip().rsplit("\n", 1)
    cells = "".join("".join(line.split("│")[2:3]).strip() for line in table.splitlines()).replace(" ", "")
    assert "int4:block=256:5.72MB,float3244.8MB,12.8%,7.8xless" in cells
    assert "NaNinfc.weight[bold]" in cells
    assert path_line.endswith(str(folder))


def test_missing_figures_are_dashes(tmp_path):
    (tmp_path / "summary.json").write_text('{"test_accuracy": null}')
    lines = printed(tmp_path).splitlines()
    assert [line.split()[-1] for line in lines if line.startswith(("data", "test"))] == ["-", "-"]
    assert len(lines) == 11


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"downlink_to": "all"}, "charged to every client"),
        ({"uplink_bytes": 44_900_000}, "44.9 MB, float32 44.8 MB, 100 %, about the same"),
        ({"uplink_bytes": 89_600_000}, "200 %, 2.0x more"),
        ({"uplink_bytes": 44_800_000 // 175}, "256 kB, float32 44.8 MB, 0.57 %, 175x less"),
        ({"exchange": "none"}, "none: clients trained alone, nothing was sent"),
        ({"world_size": 1, "rounds": 1}, "1 round, server fedavg, 1 rank (torchrun)"),
        ({"left_out": [{"round": r, "client": 0, "reason": "NaN"} for r in range(9)]}, "and 4 more"),
        ({"backend": "gloo", "device": "cpu"}, "(torchrun, gloo, cpu)"),
    ],
)
def test_summary_words(tmp_path, changes, says):
    assert says in printed(run_folder(tmp_path, **changes))


@pytest.mark.parametrize("content", [None, "{", "[]"])
def test_a_folder_that_is_no_run_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "summary.json").write_text(content)
    with pytest.raises(FieldError, match=r"folder=.*is not allowed; allowed: the folder of a finished run"):
        read_summary(tmp_path)


def test_summary_goes_to_standard_output_by_default(tmp_path, capsys):
    print_summary(run_folder(tmp_path))
    assert "11,173,962" in capsys.readouterr().out


def test_header_lines_are_printed_as_they_are():
    console = capture()
    lines = ["fedq: [bold]digits[/bold] :smile: " + "x" * 200, "2 ranks"]
    print_header(lines, console)
    assert console.file.getvalue().splitlines() == lines


def test_progress_outside_a_terminal_is_a_line_a_round():
    console = capture()
    with round_progress(2, enabled=True, console=console) as progress:
        progress.update(1, "val 50.0 %, 1.2 MB [x]")
        progress.update(2, "val 60.0 %")
    first, second = console.file.getvalue().splitlines()
    assert first.startswith("round 1/2  val 50.0 %, 1.2 MB [x]  (")
    assert second.startswith("round 2/2  val 60.0 %  (")


def test_progress_in_a_terminal_is_a_live_bar():
    console = capture(force_terminal=True, width=100)
    with round_progress(2, enabled=True, console=console) as progress:
        progress.update(1, "val 50.0 %")
        progress.update(2, "val 60.0 % [x]")
    text = console.file.getvalue()
    assert "\x1b" in text
    assert "2/2" in text
    assert "val 60.0 % [x]" in text


def test_progress_of_other_ranks_is_silent(capsys):
    console = capture(force_terminal=True)
    with round_progress(2, enabled=False, console=console) as progress:
        progress.update(1, "val 50.0 %")
    assert console.file.getvalue() == ""
    assert capsys.readouterr().out == ""

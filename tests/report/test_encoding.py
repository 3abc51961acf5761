"""What a terminal cannot show is written with ASCII characters: by every command, in every kind of plain terminal."""

# ruff: noqa: RUF001 - look-alikes are what this is about

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
from jobs import SMALL
from launched import environ

from fedq.cli import _COMMANDS, main
from fedq.report import encoding
from fedq.report.encoding import make_readable, plain

LIMIT_S = 200
_ALL = """
import json, sys
from fedq.cli import main
for command in json.loads(sys.argv[1]):
    try:
        code = main(command)
    except SystemExit as stop:
        code = stop.code
    print("code", code, *command[:2], flush=True)
"""


def written(text: str, name: str, monkeypatch: pytest.MonkeyPatch, **variables: str) -> bytes:
    """Return what a program's standard output gets of a text, by its encoding."""
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=name, errors="strict"))
    make_readable(variables)
    print(text, end="", flush=True)
    return raw.getvalue()


def test_meaning_is_kept_in_ascii(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "5 ± 1, 3×3 → “a”… 2–3 ≤ 4·µ²"
    assert written(text, "ascii", monkeypatch) == b'5 +- 1, 3x3 -> "a"... 2-3 <= 4*u^2'
    assert written(text, "utf-8", monkeypatch) == text.encode()
    assert written("5 ± 1 → 2·x", "latin-1", monkeypatch) == "5 ± 1 -> 2·x".encode("latin-1")


def test_what_has_no_equivalent_is_spelt_out(monkeypatch: pytest.MonkeyPatch) -> None:
    assert written("größe 文\U0001f600", "ascii", monkeypatch) == rb"gr\xf6\xdfe \u6587\U0001f600"
    name = os.fsdecode(b"odd\xff")  # of a file, as the system gives it
    assert written(name, "utf-8", monkeypatch) == rb"odd\udcff"


def test_frames_are_drawn_with_plus_minus_and_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    assert written("╭─┬━╮│┃║╠═╬╯└┘", "ascii", monkeypatch) == b"+-+-+|||+-++++"
    assert {plain(chr(number)) for number in range(0x2500, 0x2580)} == set("+-|")
    assert {plain(chr(number)) for number in range(0x2580, 0x25A0)} == {"#"}


def test_every_equivalent_is_ascii_and_none_is_a_question_mark() -> None:
    for number in range(sys.maxunicode + 1):
        if unicodedata.category(chr(number)) != "Cn" and number > 127:
            text = plain(chr(number))
            assert text, hex(number)
            assert text.isascii(), hex(number)
            assert "?" not in text, hex(number)


@pytest.mark.parametrize(
    ("variables", "is_ascii"),
    [
        ({"LC_ALL": "C"}, True),
        ({"LC_ALL": "POSIX", "LANG": "de_DE.UTF-8"}, True),
        ({"LC_ALL": "C", "PYTHONUTF8": "1"}, False),
        ({"LC_ALL": "C", "PYTHONIOENCODING": "utf-8"}, False),
        ({"LC_ALL": "C.UTF-8"}, False),
        ({}, False),
    ],
)
def test_a_c_locale_that_was_asked_for_is_ascii(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], is_ascii: bool
) -> None:
    monkeypatch.setattr(encoding.sys, "_xoptions", {})
    assert written("±", "utf-8", monkeypatch, **variables) == (b"+-" if is_ascii else "±".encode())


def test_streams_of_another_kind_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = io.StringIO()
    monkeypatch.setattr(sys, "stdout", ours)
    monkeypatch.setattr(sys, "stderr", None)
    make_readable({"LC_ALL": "C"})
    print("±", end="")
    assert ours.getvalue() == "±"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    for seed in ("1", "2"):
        given = SMALL | {"rounds": 1, "out": folder / f"run{seed}", "seed": seed}
        flags = [text for name, value in given.items() for text in (f"--{name.replace('_', '-')}", str(value))]
        assert main(flags) == 0
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variables", "allowed"),
    [
        ({"LC_ALL": "C"}, "ascii"),
        ({"LC_ALL": "C", "PYTHONUTF8": "0"}, "ascii"),
        ({"LC_ALL": "C.UTF-8", "PYTHONIOENCODING": "ascii"}, "ascii"),
        ({"LC_ALL": "C.UTF-8", "PYTHONIOENCODING": "latin-1"}, "latin-1"),
    ],
)
def test_every_command_can_be_read_in_a_plain_terminal(
    tmp_path: Path, runs: Path, variables: dict[str, str], allowed: str
) -> None:
    train = [text for name, value in SMALL.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    plan = ["--bandwidth", "1Gbit", "--latency", "1ms", "--world", "2", "--model", "cnn62k", "--compute-ms", "5"]
    arms = {"a ± é": "--uplink int8"}
    sweep = {"title": "± 1 → x", "common": " ".join([*train, "--rounds", "1"]), "arms": arms, "seeds": [1, 2]}
    (tmp_path / "plan.yaml").write_text(json.dumps(sweep), encoding="utf-8")  # JSON is YAML, too
    commands = [*([name, "--help"] for name in _COMMANDS), ["--help"], ["--dataset", "nö±"]]
    commands += [["runs", str(runs)], ["runs", "--compare", str(runs)], ["report", str(runs)], ["plan", *plan]]
    commands += [["sweep", "plan.yaml"], [*train, "--rounds", "1", "--out", "run"], ["doctor"]]
    done = subprocess.run(
        [sys.executable, "-c", _ALL, json.dumps(commands)],
        cwd=tmp_path,
        env={name: text for name, text in environ(**variables).items() if name != "LANG"},
        capture_output=True,
        timeout=LIMIT_S,
    )
    said = (done.stdout + done.stderr).decode(allowed)  # which fails where it is anything else
    assert "Traceback" not in said, said
    codes = [line.split()[1] for line in said.splitlines() if line.startswith("code ")]
    assert codes == ["0"] * (len(_COMMANDS) + 1) + ["2"] + ["0"] * 7, said
    assert ("a ± é" if allowed == "latin-1" else r"a +- \xe9") in said  # of the sweep
    assert ("±" if allowed == "latin-1" else "+-") in said  # of the report
    assert "\N{REPLACEMENT CHARACTER}" not in said

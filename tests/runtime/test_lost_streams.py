"""Nobody reads standard output any more, the terminal is closed, Ctrl-C is pressed twice: no traceback, no lost run."""

from __future__ import annotations

import io
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from jobs import file_hash
from launched import command, environ, files_of, until
from properties import few

from fedq.checkpoint import Checkpoints
from fedq.cli import main
from fedq.runtime import lasting_streams
from fedq.runtime.streams import Lasting

LIMIT_S = 120


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert main(command(folder)[2:]) == 0
    return folder


def with_reader_gone(arguments: Sequence[str], num_bytes: int) -> tuple[int, bytes]:
    """Run a command whose reader goes after so many bytes; return its exit code, and what it said on stderr."""
    reading, writing = os.pipe()
    with subprocess.Popen(arguments, stdout=writing, stderr=subprocess.PIPE, env=environ()) as process:
        os.close(writing)
        left = num_bytes
        while left and (data := os.read(reading, left)):
            left -= len(data)
        os.close(reading)
        _, errors = process.communicate(timeout=LIMIT_S)
        return process.returncode, errors


@pytest.mark.parametrize("num_bytes", few([1, 0], 1))
def test_training_goes_on_to_its_end_without_a_reader(whole: Path, tmp_path: Path, num_bytes: int) -> None:
    code, errors = with_reader_gone(command(tmp_path / "run"), num_bytes)
    assert (code, errors) == (0, b"")
    assert files_of(tmp_path / "run") == files_of(whole)
    assert file_hash(tmp_path / "run" / "model.safetensors") == file_hash(whole / "model.safetensors")


@pytest.mark.slow
def test_training_goes_on_without_streams_at_all_and_on_a_full_device(whole: Path, tmp_path: Path) -> None:
    for number, where in enumerate((">&- 2>&-", "> /dev/full 2> /dev/full", "2>&-")):
        folder = tmp_path / str(number)
        done = subprocess.run(
            f"{shlex.join(command(folder))} {where}", shell=True, env=environ(), capture_output=True, timeout=LIMIT_S
        )
        assert done.returncode == 0
        assert files_of(folder) == files_of(whole)


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    few(
        ["runs RUN", "report RUN --out OUT", "runs --compare RUN", "inspect RUN/model.safetensors", "report --help"], 1
    ),
)
def test_commands_end_quietly_without_a_reader(whole: Path, tmp_path: Path, words: str) -> None:
    given = [word.replace("RUN", str(whole)).replace("OUT", str(tmp_path)) for word in words.split()]
    assert with_reader_gone([sys.executable, "-m", "fedq", *given], 1) == (0, b"")


class Broken(io.StringIO):
    """A stream without a descriptor, of which nobody reads more than the first words."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def flush(self) -> None:
        if self.getvalue():
            raise self.error


@pytest.mark.parametrize(
    "error", [BrokenPipeError(32, "Broken pipe"), OSError(5, "Input/output error"), ValueError("closed file")]
)
def test_a_stream_that_fails_is_silent_from_then_on(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    broken = Broken(error)
    monkeypatch.setattr(sys, "stdout", broken)
    with lasting_streams():
        for _ in range(3):
            print("words", flush=True)
        assert isinstance(sys.stdout, Lasting)
        assert sys.stdout.isatty() is False
    assert sys.stdout is broken
    assert broken.getvalue() == "words\n"


def test_what_can_be_read_is_read_and_other_errors_stay(capsys: pytest.CaptureFixture[str]) -> None:
    with lasting_streams():
        print("said")
        print("told", file=sys.stderr)
    assert capsys.readouterr() == ("said\n", "told\n")
    ascii_only = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    with pytest.raises(UnicodeEncodeError):
        Lasting(ascii_only).write("\u00e4")


# ---- signals ----


def has_round(folder: Path) -> bool:
    return bool(list(folder.glob("checkpoints/0*")))


@pytest.mark.slow
@pytest.mark.parametrize("is_terminal_gone", few([False, True], 1))
def test_a_closed_terminal_ends_a_job_as_sigterm_does(tmp_path: Path, is_terminal_gone: bool) -> None:
    folder = tmp_path / "run"
    control, terminal = os.openpty()
    with subprocess.Popen(
        command(folder, "--rounds", "4000"),
        stdout=terminal,
        stderr=terminal,
        env=environ() | {"TERM": "dumb"},
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # the tests themselves may run under nohup
    ) as process:
        os.close(terminal)
        os.set_blocking(control, False)
        said = b""
        try:
            until(lambda: _drain(control) is None and has_round(folder), "a round")
            if is_terminal_gone:
                os.close(control)
            process.send_signal(signal.SIGHUP)
            if not is_terminal_gone:
                until(lambda: process.poll() is not None, "the end")
                said = _drain(control, keep=True) or b""
            assert process.wait(LIMIT_S) == 0
        finally:
            process.kill()
    if not is_terminal_gone:
        os.close(control)
        assert b"stopped by SIGHUP after round" in said
    assert not (folder / "lock").exists()
    more = Checkpoints(folder / "checkpoints").numbers()[-1] + 1
    assert main(["--resume", str(folder), "--rounds", str(more)]) == 0


def _drain(descriptor: int, keep: bool = False) -> bytes | None:
    """Read what a terminal shows, so that it does not fill up."""
    data = b""
    try:
        while more := os.read(descriptor, 1 << 16):
            data += more
    except OSError:
        pass
    return data if keep else None


@pytest.mark.slow
def test_nohup_goes_on(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    ignoring = (
        "import os, signal, sys; signal.signal(signal.SIGHUP, signal.SIG_IGN); os.execv(sys.argv[1], sys.argv[1:])"
    )
    with subprocess.Popen(
        [sys.executable, "-c", ignoring, *command(folder)], stdout=subprocess.DEVNULL, env=environ()
    ) as process:
        until((folder / "starts").exists, "the start")
        process.send_signal(signal.SIGHUP)
        assert process.wait(LIMIT_S) == 0
    assert file_hash(folder / "model.safetensors") == file_hash(whole / "model.safetensors")


@pytest.mark.parametrize("when", few(["in a round", "in the imports"], 1))
def test_ctrl_c_thrice_shows_no_traceback(tmp_path: Path, when: str) -> None:
    folder = tmp_path / "run"
    with subprocess.Popen(
        command(folder, "--rounds", "4000"), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environ(), text=True
    ) as process:
        loaded = Path(f"/proc/{process.pid}/maps")
        until(lambda: has_round(folder) if when == "in a round" else "numpy" in loaded.read_text(), when)
        for _ in range(3):
            process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=LIMIT_S)
    assert "Traceback" not in said
    assert "Exception ignored" not in said
    if when == "in a round":
        assert process.returncode == 130
        assert "stopped by SIGINT after round" in said
    else:
        assert process.returncode in (130, -signal.SIGINT)


def test_ctrl_c_in_a_command_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*_: object) -> int:
        raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr("fedq.report.find_runs", interrupted)
    try:
        assert main(["runs"]) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err == "stopped by SIGINT\n"

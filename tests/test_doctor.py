"""What the doctor says about a machine, and when it fails."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import warm
from properties import is_all

from fedq import cli, doctor
from fedq.doctor import Finding
from fedq.kernels import cpu


def doctor_of(**environment: str) -> tuple[int, str]:
    clean = {k: v for k, v in os.environ.items() if k not in ("FEDQ_KERNELS", "FEDQ_ISA", "FEDQ_LIBRARY")}
    env, cwd = clean | environment, Path(__file__).parents[1]
    if is_all():  # as a new process, which imports PyTorch first
        command = [sys.executable, "-m", "fedq.doctor"]
        done = subprocess.run(command, env=env, cwd=cwd, capture_output=True, text=True, timeout=120)
    else:
        done = warm.run(["-m", "fedq", "doctor"], env=env, cwd=cwd, limit_s=120)
    assert not done.stderr
    return done.returncode, done.stdout


def test_it_reports_versions_processor_memory_and_what_serves(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor"]) == 0
    said = capsys.readouterr().out
    for name in ("fedq", "python", "torch", "processor", "memory", "collectives", "C++ kernels", "triton"):
        assert f"\n{name} " in f"\n{said}"
    serves = "reference" if cpu.why_missing() else "cpp"
    assert any(line.split() == ["serves", "cpu", serves] for line in said.splitlines())


def test_a_missing_library_is_no_failure_and_its_remedy_is_said_once(tmp_path: Path) -> None:
    code, said = doctor_of(FEDQ_LIBRARY=str(tmp_path / "none.so"))
    assert code == 0
    assert "the reference serves" in said
    assert said.count("apt install g++") == 1


def test_a_library_that_does_not_load_is_told(tmp_path: Path) -> None:
    (tmp_path / "broken.so").write_bytes(b"not a library")
    code, said = doctor_of(FEDQ_LIBRARY=str(tmp_path / "broken.so"))
    assert code == 0
    assert "does not load" in said


@pytest.mark.skipif(bool(cpu.why_missing()), reason="needs the C++ kernels")
@pytest.mark.parametrize(
    ("variable", "value", "fails", "told"),
    [
        ("FEDQ_ISA", "mmx", True, ["FEDQ_ISA='mmx'", "portable", "unset FEDQ_ISA"]),
        ("FEDQ_KERNELS", "fortran", True, ["unset FEDQ_KERNELS"]),
        ("FEDQ_ISA", "portable", False, ["portable (FEDQ_ISA)"]),
    ],
)
def test_it_fails_on_settings_that_fedq_cannot_use(variable: str, value: str, fails: bool, told: list[str]) -> None:
    code, said = doctor_of(**{variable: value})
    assert code == fails
    assert all(text in said for text in told)


def test_missing_packages_are_named_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = ["numpy>=1.26", "no-such-package[extra]>=2; python_version > '3'", 'pytest>=8; extra == "test"']
    monkeypatch.setattr(doctor, "requires", lambda name: wanted)
    (finding,) = (f for f in doctor.examine() if f.name == "packages")
    assert finding == Finding("packages", "missing: no-such-package", "pip install no-such-package", True)


def test_the_report_lines_up_and_ends_with_what_is_missing() -> None:
    findings = [Finding("a", "one"), Finding("long", "two", "get two"), Finding("b", "three", "get three", True)]
    expected = "a     one\nlong  two\nb     three\n\nmissing\n  long: get two\n  b (needed): get three"
    assert doctor.report(findings) == expected


def test_bandwidth_is_a_positive_number_and_leaves_the_threads_alone() -> None:
    import torch

    before = torch.get_num_threads()
    assert 0 < doctor.memory_bandwidth(before + 1) < 1e6
    assert torch.get_num_threads() == before

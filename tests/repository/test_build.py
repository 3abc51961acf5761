"""Building and installing: a wheel for any Python 3 whose library loads, and an install that needs no compiler."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

from fedq.kernels.cpu.library import ABI

ROOT = Path(__file__).parents[2]
NOTICE = "fedq: the C++ kernels were not built"
NO_COMPILER = {"CC": "/nonexistent/cc", "CXX": "/nonexistent/c++"}
# Builds run with what is installed here: no network.
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-v"]
OFFLINE = ["--no-deps", "--no-build-isolation", "--no-index"]


def reason_to_skip() -> str:
    try:
        major = int(version("setuptools").partition(".")[0])
        version("pip")
    except PackageNotFoundError as error:
        return f"needs {error.name}"
    return "" if major >= 77 else "needs setuptools 77 or newer"


pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.skipif(bool(reason_to_skip()), reason=reason_to_skip()),
]
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


def run(*command: str | Path, **environment: str) -> str:
    done = subprocess.run(
        [str(part) for part in command],
        cwd=environment.pop("cwd", None),
        env={**os.environ, "PYTHONPATH": "", **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def checkout(target: Path) -> Path:
    """Copy what a build reads, without what earlier builds left behind."""
    target.mkdir()
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, target)
    shutil.copytree(ROOT / "fedq", target / "fedq", ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    return target


def build_wheel(source: Path, target: Path, **environment: str) -> tuple[Path, str]:
    said = run(*PIP, "wheel", *OFFLINE, "--wheel-dir", target, source, **environment)
    (wheel,) = target.glob("*.whl")
    return wheel, said


def fresh_python(folder: Path) -> Path:
    """Make a virtual environment that sees this one's packages, but none of its editable installs."""
    venv.create(folder, with_pip=False)
    (site,) = folder.glob("lib/python*/site-packages")
    # A folder that a .pth file names is searched, but its own .pth files are not read.
    (site / "packages.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin" / "python"


SAY = """
import fedq, torch
from fedq import doctor, kernels
from fedq.kernels import cpu
payload = fedq.codec("blocktopk:k=1,block=64,bits=2").encode(torch.ones(1000), seed=0)
assert payload.decode().sum() > 0
print(fedq.__file__, kernels.implementation("cpu"), cpu.why_missing() or cpu.isa())
assert doctor.main() == 0
"""


@pytest.mark.slow
@needs_compiler
def test_the_wheel_fits_any_python_and_its_library_loads(tmp_path: Path) -> None:
    wheel, said = build_wheel(checkout(tmp_path / "source"), tmp_path / "wheels")
    assert NOTICE not in said
    assert wheel.name.partition("-0.1.0-")[2].startswith("py3-none-")
    assert "any" not in wheel.name
    names = zipfile.ZipFile(wheel).namelist()
    assert "fedq/kernels/libfedq.so" in names
    assert "fedq/py.typed" in names
    assert not [name for name in names if "csrc" in name]

    python = fresh_python(tmp_path / "venv")
    run(*PIP, "--python", python, "install", "--no-deps", "--no-index", wheel)
    said = run(python, "-c", SAY, cwd=str(tmp_path), FEDQ_KERNELS="", FEDQ_ISA="", FEDQ_LIBRARY="")
    file, serves, isa = said.splitlines()[0].split()
    assert Path(file).is_relative_to(tmp_path / "venv")
    assert serves == "cpp"
    assert isa in ("avx512", "avx2", "portable")


@pytest.mark.slow
def test_without_a_compiler_the_reference_serves(tmp_path: Path) -> None:
    wheel, said = build_wheel(checkout(tmp_path / "source"), tmp_path / "wheels", **NO_COMPILER)
    assert said.count(NOTICE) == 1
    python = fresh_python(tmp_path / "venv")
    run(*PIP, "--python", python, "install", "--no-deps", "--no-index", wheel)
    said = run(python, "-c", SAY, cwd=str(tmp_path), FEDQ_KERNELS="", FEDQ_ISA="", FEDQ_LIBRARY="")
    assert said.split()[1] == "reference"
    assert said.count("apt install g++") == 1


STUB = 'extern "C" __attribute__((visibility("default"))) long fedq_abi() {{ return {number}; }}\n'


@pytest.mark.slow
@needs_compiler
def test_an_editable_install_builds_and_builds_again(tmp_path: Path) -> None:
    source, python = checkout(tmp_path / "source"), fresh_python(tmp_path / "venv")
    csrc, library = source / "fedq/kernels/csrc", source / "fedq/kernels/libfedq.so"
    for unit in csrc.glob("*.cpp"):  # the real ones take a minute
        unit.unlink()
    for number in (41, 42):
        (csrc / "stub.cpp").write_text(STUB.format(number=number))
        run(*PIP, "--python", python, "install", *OFFLINE, "--editable", source)
        said = run(python, "-c", f"import ctypes; print(ctypes.CDLL({str(library)!r}).fedq_abi())")
        assert said == f"{number}\n"
    # A library that no longer fits its sources is not left behind.
    run(*PIP, "--python", python, "install", *OFFLINE, "--editable", source, **NO_COMPILER)
    assert not library.exists()


def test_the_source_distribution_has_the_sources(tmp_path: Path) -> None:
    source = checkout(tmp_path / "source")
    run(sys.executable, "setup.py", "-q", "sdist", "--dist-dir", tmp_path, cwd=str(source))
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        inside = {Path(name).name for name in opened.getnames()}
    assert {path.name for path in (ROOT / "fedq/kernels/csrc").glob("*.*")} <= inside


@needs_compiler
def test_the_library_names_nothing_but_its_own_functions() -> None:
    library = ROOT / "fedq/kernels/libfedq.so"
    if not library.exists() or shutil.which("nm") is None:
        pytest.skip("needs the built library and nm")
    symbols = [line.split()[-1] for line in run("nm", "-D", "--defined-only", library).splitlines()]
    assert {"fedq_abi", "fedq_isa", "fedq_select", "fedq_sparse_decode"} <= set(symbols)
    # Weak symbols of the standard library are allowed: the pool is compiled for any processor.
    assert not [name for name in symbols if not name.startswith(("fedq_", "_ZNS", "_ZNKS", "_ZS"))]
    assert ctypes.CDLL(str(library)).fedq_abi() == ABI

"""Compare the lines that the default tests reach with those that all tests reach, by package.

    python tests/stress/coverage_by_package.py [--out FOLDER] [-- OPTIONS OF PYTEST]

runs ``pytest`` and ``pytest --all`` under coverage (``pip install coverage``), ranks and commands that tests start
included, and prints a table; it exits with 1 if a package of the default tests is more than two points behind. Lines of
processes that are killed on purpose do not count, in either run. Coverage costs time: what the table says of seconds is
for comparison.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MOST_POINTS = 2.0  # that a package may lose without the slow tests
SETTINGS = """
[run]
source = {root}/fedq
data_file = {folder}/data
parallel = true
patch = subprocess, _exit
concurrency = multiprocessing,thread
sigterm = true
"""


def measure(folder: Path, *options: str) -> tuple[dict[str, Counter], float]:
    """Run the tests; return by package how many lines there are and how many were reached, and the seconds."""
    folder.mkdir(parents=True)
    settings = folder / "coverage.ini"
    settings.write_text(SETTINGS.format(root=ROOT, folder=folder))
    coverage = (sys.executable, "-m", "coverage")
    start = time.monotonic()
    tests = subprocess.run([*coverage, "run", f"--rcfile={settings}", "-m", "pytest", *options], cwd=ROOT)
    seconds = time.monotonic() - start
    if tests.returncode:
        print(f"pytest {' '.join(options)} ended with {tests.returncode}", file=sys.stderr)
    report = folder / "report.json"
    quiet = {"cwd": ROOT, "check": True, "stdout": subprocess.DEVNULL}
    subprocess.run([*coverage, "combine", f"--rcfile={settings}"], **quiet)
    subprocess.run([*coverage, "json", f"--rcfile={settings}", "-o", str(report)], **quiet)
    return by_package(json.loads(report.read_text())["files"]), seconds


def by_package(files: dict[str, dict]) -> dict[str, Counter]:
    """Add up the files of each package of fedq, and each module that stands alone."""
    packages: dict[str, Counter] = {}
    for name, found in files.items():
        inside = Path(name).parts[Path(name).parts.index("fedq") + 1 :]
        package = packages.setdefault(Path(inside[0]).stem, Counter())
        package["lines"] += found["summary"]["num_statements"]
        package["reached"] += found["summary"]["covered_lines"]
    return packages


def percent(package: Counter) -> float:
    return 100 * package["reached"] / max(1, package["lines"])


def table(few: dict[str, Counter], everything: dict[str, Counter], seconds: tuple[float, float]) -> list[str]:
    """Return the rows of the table, the whole at the end."""
    rows = ["| package | lines | default, % | all, % | difference |", "|---|---|---|---|---|"]
    totals = (sum(few.values(), Counter()), sum(everything.values(), Counter()))
    cases = [(name, few[name], everything[name]) for name in sorted(everything) if everything[name]["lines"]]
    for name, default, all_ in [*cases, ("**fedq**", *totals)]:
        points = percent(all_) - percent(default)
        rows.append(f"| {name} | {all_['lines']:,} | {percent(default):.1f} | {percent(all_):.1f} | {points:.1f} |")
    return [*rows, "| seconds | | " + " | ".join(f"{second:.0f}" for second in seconds) + " | |"]


def behind(few: dict[str, Counter], everything: dict[str, Counter]) -> list[str]:
    """Return the packages of which the default tests reach too little."""
    return [name for name in everything if percent(everything[name]) - percent(few[name]) > MOST_POINTS]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="keep the data here (a new folder)")
    parser.add_argument("options", nargs="*", help="for pytest")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temp:
        folder = Path(os.path.abspath(given.out or Path(temp, "coverage")))
        (few, few_s), (everything, all_s) = (
            measure(folder / name, *flags, *given.options) for name, flags in (("default", ()), ("all", ("--all",)))
        )
    print("\n".join(table(few, everything, (few_s, all_s))))
    return int(bool(behind(few, everything)))


if __name__ == "__main__":
    sys.exit(main())

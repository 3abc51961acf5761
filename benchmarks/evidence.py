"""Run a sweep and put its table into a document, in place of the section of the same title.

    python benchmarks/evidence.py benchmarks/plans/cifar_codecs.yaml --data-dir DIR --work DIR --table docs/results.md

The sweep is `fedq.sweep`'s: an arm that has a summary already is not run again and one that was interrupted is resumed.
Differences to the first arm are paired by seed; their 95 % interval is Student's t. What a person wrote in the section
stays.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from fedq.report.encoding import make_readable
from fedq.sweep import finished_runs, markdown, read_plan, run_tasks

ROOT = Path(__file__).resolve().parent.parent


def replace_section(path: Path, title: str, section: str) -> None:
    """Put a section in place of the one with the same title, or at the end; what a person wrote about it stays."""
    text = path.read_text() if path.exists() else "# Results\n"
    pattern = re.compile(rf"^## {re.escape(title)}\n.*?(?=^## |\Z)", re.M | re.S)
    old = pattern.search(text)
    comment = re.search(r"^What it says:\n.*?(?=^Re-made by)", old[0], re.M | re.S) if old else None
    if comment:
        section = section.replace("Re-made by", comment[0] + "Re-made by", 1)
    new = pattern.sub(lambda _: section + "\n", text) if old else text.rstrip() + "\n\n" + section
    path.write_text(new.rstrip() + "\n")


def main() -> None:
    make_readable()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", type=Path)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="where the runs' folders go")
    parser.add_argument("--data-note", default="", help="what a reader must know of these files, e.g. JPEG quality")
    parser.add_argument("--workers", type=int, default=1, help="jobs side by side")
    parser.add_argument("--table", type=Path, help="Markdown file whose section is replaced; default: print")
    args = parser.parse_args()
    plan = read_plan(args.plan)
    data = ["--data-dir", str(args.data_dir)]
    failed = run_tasks(plan, args.work, extra=data, workers=args.workers, train=[str(ROOT / "train.py")])
    if failed:
        sys.exit(f"{len(failed)} of {len(plan.tasks)} runs are not finished")
    command = f"python benchmarks/evidence.py benchmarks/{args.plan.name} --data-dir DIR --work DIR "
    command += f'--data-note "{args.data_note}" ' * bool(args.data_note) + "--table docs/results.md"
    section = markdown(plan, finished_runs(plan, args.work), data_note=args.data_note, command=command)
    if args.table:
        replace_section(args.table, plan.title, section)
    else:
        print(section)


if __name__ == "__main__":
    main()

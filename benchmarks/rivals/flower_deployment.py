"""The network benchmark's task in plain Flower, deployed: a SuperLink and SuperNodes, each on a link of its own.

    python benchmarks/rivals/flower_deployment.py --task DIR --report FILE --ends FILE --work DIR

Run by the interpreter that has Flower. ``--ends`` is JSON: the server's address, and for server and clients what goes
in front of their commands. Connections are without TLS, as in Flower's own examples.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "network"))
from flower_runs import deployment

LIMIT_S = 1800


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("--task", "--report", "--ends", "--work"):
        parser.add_argument(name, type=Path, required=True)
    args = parser.parse_args()
    ends = json.loads(args.ends.read_text())
    clients = len(ends["prefixes"]) - 1
    environ = {"PYTHONPATH": os.environ.get("PYTHONPATH", ""), "OMP_NUM_THREADS": "1"}
    with deployment(args.work, environ, clients, ends["prefixes"], ends["address"]) as engine:
        told = {"task": args.task, "report": args.report, "num-clients": clients}
        engine.run(HERE / "flower_network", told, LIMIT_S)


if __name__ == "__main__":
    main()

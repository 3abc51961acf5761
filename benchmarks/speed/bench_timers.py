"""What the timers of a run cost: the cost of one, times how often they were used, as a share of the time of the rounds.

python benchmarks/speed/bench_timers.py runs/one runs/two
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # of what the benchmarks share

from federated_task import hardware

from fedq.phases import PhaseTimer
from fedq.report.encoding import make_readable

REPETITIONS, CALLS = 15, 20_000


def cost_of_one() -> float:
    """Return the seconds that entering and leaving a phase takes, beside a timer's work of adding up: the median."""
    costs = []
    for _ in range(REPETITIONS):
        timer = PhaseTimer()
        begin = time.perf_counter()
        with timer.phase("compute"):
            for _ in range(CALLS):
                with timer.phase("encode"):
                    pass
        timer.take()
        costs.append((time.perf_counter() - begin) / CALLS)
    return statistics.median(costs)


def main() -> None:
    make_readable()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, nargs="+", help="folders of finished runs")
    args = parser.parse_args()
    cost = cost_of_one()
    print(f"one timer: {1e6 * cost:.2f} us ({hardware()})\n")
    print("| run | calls a rank | rounds, s | share |\n|---|---|---|---|")
    for run in args.run:
        phases = pq.read_table(run / "phases.parquet")
        calls = sum(phases["calls"].to_pylist()) / json.loads((run / "summary.json").read_text())["world_size"]
        lines = (run / "metrics.jsonl").read_text().splitlines()
        seconds = sum(json.loads(line).get("seconds", 0.0) for line in lines)
        print(f"| {run.name} | {calls:.0f} | {seconds:.1f} | {100 * calls * cost / seconds:.4f} % |")


if __name__ == "__main__":
    main()

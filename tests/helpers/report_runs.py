"""Real small runs for the tests of the report, and ways to make bad ones of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from distributed import run_group
from jobs import small_config
from stopped_jobs import run_jobs

ARMS: dict[str, dict[str, Any]] = {
    "fp32": {"uplink": "fp32", "downlink": "fp32"},
    "int4": {"uplink": "int4", "downlink": "int8"},
    "sign": {"uplink": "sign", "downlink": "int8"},
}
FEW = {"num_clients": 3, "cohort": 2, "rounds": 3, "local_steps": 1}


def make_runs(root: Path, seeds: Sequence[int] = (0, 1)) -> list[Path]:
    """Train three arms of some seeds, and clients alone; return the arms' folders."""
    folders = {root / f"{name}-seed{seed}": flags | {"seed": seed} for name, flags in ARMS.items() for seed in seeds}
    configs = [small_config(path, **FEW, **flags) for path, flags in folders.items()]
    few = {"num_clients": 3, "cohort": None, "rounds": 2, "local_steps": 1}
    configs.append(small_config(root / "others" / "alone", **few, algorithm="local", uplink="fp32", downlink="fp32"))
    run_group(1, run_jobs, [(config, None) for config in configs])
    return list(folders)


def copied(run: Path, to: Path) -> Path:
    """Return a copy of a run under another name."""
    shutil.copytree(run, to)
    return to


def with_summary(run: Path, **changes: Any) -> Path:
    """Change a run's summary."""
    file = run / "summary.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return run


def with_config(run: Path, section: str, **changes: Any) -> Path:
    """Change a run's settings."""
    import yaml

    file = run / "config.yaml"
    config = yaml.safe_load(file.read_text())
    config[section] |= changes
    file.write_text(yaml.safe_dump(config, sort_keys=False))
    return run


def with_table(run: Path, name: str, change: Callable[[pa.Table], pa.Table]) -> Path:
    """Change a Parquet table."""
    file = run / f"{name}.parquet"
    pq.write_table(change(pq.read_table(file)), file)
    return run


def with_phases(run: Path, exchange_s: float) -> Path:
    """Add a phases.parquet of two ranks: half of each round is computation, the exchange takes given seconds."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    rows = []
    for line in map(json.loads, lines):
        for rank in (0, 1):
            for phase, seconds, hidden in (("compute", line["seconds"] / 2, 0.0), ("exchange", exchange_s, 0.25)):
                row = {"round": line["round"], "rank": rank, "phase": phase, "seconds": seconds}
                rows.append(row | {"hidden_seconds": hidden, "calls": 2})
    kinds = {"round": pa.int32(), "rank": pa.int32(), "phase": pa.string(), "seconds": pa.float64()}
    kinds |= {"hidden_seconds": pa.float64(), "calls": pa.int64()}
    schema = pa.schema(list(kinds.items()), metadata={"schema_version": "1"})
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), run / "phases.parquet")
    return run

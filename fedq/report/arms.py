"""Runs grouped into arms: those that differ in nothing but the seed. What figures compare."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fedq.errors import FieldError
from fedq.lowbit import quantizer
from fedq.report.metric import OWN_DATA_KEYS, Measure, measure_of, with_own_data

FLOAT_BITS = 32.0


@dataclass(frozen=True)
class Run:
    """A finished run's numbers.

    Args:
        path: The run's folder.
        summary: Contents of `summary.json`.
        config: Contents of `config.yaml`; of a run on data of one's own with its model and metric, see `with_own_data`.
    """

    path: Path
    summary: dict[str, Any]
    config: dict[str, Any]

    @property
    def spec(self) -> str:
        """What the models' weights are: ``binary``, ``int4``; of personal models their clients' bits, as ``int2``."""
        bits = str(self.config.get("personal", {}).get("client_bits", "32"))
        if self.algorithm in ("quped", "qupel") and bits != "32":
            return {"1": "binary"}.get(bits, f"int{bits}" if bits.isdigit() else bits)
        return str(self.summary.get("weights", "float"))

    @property
    def measure(self) -> Measure:
        """What the run is judged by."""
        return measure_of(self.summary)

    @property
    def algorithm(self) -> str:
        """Name of the algorithm."""
        return str(self.summary.get("algorithm", "fedavg"))

    @property
    def bits(self) -> float | None:
        """Bits of a weight; None where layers or clients differ."""
        if self.spec == "float":
            return FLOAT_BITS
        try:
            return quantizer(self.spec).bits_per_weight
        except FieldError:  # a list
            return None

    def metrics(self) -> list[dict[str, Any]]:
        """Return the rows of `metrics.jsonl`, by round."""
        lines = (self.path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]

    def table(self, name: str) -> list[dict[str, Any]]:
        """Return the rows of a Parquet table, none if the run has no such file."""
        import pyarrow.parquet as pq

        file = self.path / f"{name}.parquet"
        return pq.read_table(file).to_pylist() if file.exists() else []


@dataclass(frozen=True)
class Arm:
    """Runs with the same settings and different seeds.

    Args:
        name: Words that set the arm apart from the others.
        runs: The arm's runs, by seed.
    """

    name: str
    runs: tuple[Run, ...]

    @property
    def first(self) -> Run:
        """The run of the first seed."""
        return self.runs[0]


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Read finished runs.

    Raises:
        FieldError: No run is finished, or a file cannot be read.
    """
    runs = []
    for path in paths:
        if not (path / "summary.json").exists():
            continue
        try:
            summary = json.loads((path / "summary.json").read_text(encoding="utf-8"))
            config = yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise FieldError("runs", str(path), f"a folder with summary.json and config.yaml ({error})") from None
        runs.append(Run(path, summary, with_own_data(config, summary)))
    if not runs:
        raise FieldError("runs", ", ".join(map(str, paths)), "at least one finished run")
    return runs


def group(runs: Sequence[Run]) -> list[Arm]:
    """Return the arms, from few bits to many, then by name.

    An arm is called as its runs' folders are without the seed (``two-bits-seed0``, ``two-bits-seed1``), or else by the
    settings in which arms differ.
    """
    settings = [_settings(run) for run in runs]
    keys = dict.fromkeys([*_PLAIN, *(key for own in settings for key in own)])
    # A setting that a run does not have is newer than the run, which did what is its default now.
    differing = [key for key in keys if len({repr(own[key]) for own in settings if key in own}) > 1]
    by_words: dict[str, list[Run]] = {}
    for run, own in zip(runs, settings, strict=True):
        known = [key for key in differing if key in own or key not in OWN_DATA_KEYS]
        by_words.setdefault(", ".join(_words(key, own.get(key)) for key in known), []).append(run)
    folders = [{_SEED.sub("", run.path.resolve().name) for run in members} for members in by_words.values()]
    named = all(len(names) == 1 for names in folders) and len(set().union(*folders)) == len(folders)
    found = [
        Arm(next(iter(names)) if named else words or members[0].spec, tuple(sorted(members, key=_seed)))
        for (words, members), names in zip(by_words.items(), folders, strict=True)
    ]
    return sorted(found, key=lambda arm: (arm.first.bits or 2 * FLOAT_BITS, arm.name))


_SEED = re.compile(r"[-_]?(seed)?[-_=]?\d+$")
"""Pattern of the end of a folder's name that says which seed it is."""


def _seed(run: Run) -> int:
    return int(run.summary["seed"])


def _settings(run: Run) -> dict[str, Any]:
    """Return what makes an arm: every setting but those of where and how it ran."""
    flat = {
        k: v
        for name in ("data", "clients", "local", "exchange", "lowbit", "personal")
        for k, v in run.config.get(name, {}).items()
    }
    flat["rounds"] = run.config.get("run", {}).get("rounds")
    if run.algorithm in _ONE_MODEL:
        idle = run.config.get("personal", {}).keys() - {"algorithm", "personal_test"}
        flat = {key: value for key, value in flat.items() if key not in idle}
    for key in ("data_dir", "download", "aggregate", "schedule"):
        flat.pop(key, None)
    return flat


_ONE_MODEL = ("fedavg", "fedbat", "local")
"""Algorithms without personal models: settings of those do not concern them."""


_PLAIN = ("weights", "uplink", "algorithm", "model", "partition")
"""Settings whose value needs no name beside it."""


def _words(key: str, value: Any) -> str:
    return str(value) if key in _PLAIN else f"{key.replace('_', ' ')} {value}"

"""What a sweep consists of, read from YAML and checked before anything runs."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from fedq.errors import FieldError, one_of

Check = Callable[[Sequence[str]], object]
"""Function that refuses a job's flags that cannot be used, with a `FieldError`."""


@dataclass(frozen=True)
class Task:
    """One run of a sweep.

    Args:
        arm: Name of the task's arm.
        seed: Seed of the run.
        folder: Name of the run's folder in that of the sweep.
        flags: Flags of the job, but for the folder to which it writes.
    """

    arm: str
    seed: int
    folder: str
    flags: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """What to run.

    Args:
        title: Heading of the table and the report.
        arms: Flags of each arm by its name; differences are to the first.
        note: Text on the set-up that a reader should know.
        ranks: Number of ranks of each run, on one machine.
        common: Flags of every run.
        seeds: Seeds of each arm.
        budgets_mb: Megabytes of uplink at which accuracies are compared as well.
    """

    title: str
    arms: dict[str, str]
    note: str = ""
    ranks: int = 1
    common: str = ""
    seeds: list[int] = field(default_factory=lambda: [0])
    budgets_mb: list[float] = field(default_factory=list)

    def flags(self, arm: str, seed: int) -> str:
        """Return the flags of one run."""
        return f"{self.common} {self.arms[arm]} --seed {seed}"

    def command(self, arm: str) -> str:
        """Return the command that runs an arm by itself."""
        launcher = "python" if self.ranks == 1 else f"torchrun --nproc-per-node {self.ranks}"
        return f"{launcher} train.py {self.common} {self.arms[arm]}".replace("\n", " ")

    @property
    def tasks(self) -> list[Task]:
        """Every run. Seeds are outside: an interrupted sweep has every arm of the seeds it has."""
        return [
            Task(arm, seed, f"{folder_name(arm)}-seed{seed}", tuple(shlex.split(self.flags(arm, seed))))
            for seed in self.seeds
            for arm in self.arms
        ]


def folder_name(arm: str) -> str:
    """Return an arm's name as the beginning of a folder's."""
    return re.sub(r"[^A-Za-z0-9]+", "-", arm)


def read_plan(path: Path, check: Check | None = None) -> Plan:
    """Read a plan and refuse what could not run.

    Args:
        path: A YAML file with the fields of `Plan`.
        check: Function that is given the flags of every run and refuses wrong ones; None: no check.

    Raises:
        FieldError: The file, a field of it, or a flag of an arm cannot be used.
    """
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        words = " ".join(str(error).split())
        raise FieldError("plan", str(path), f"a YAML file that can be read ({words})") from None
    plan = _plan(tree, path)
    for task in plan.tasks if check else []:
        assert check is not None
        try:
            check(task.flags)
        except FieldError as error:
            raise FieldError(f"arm {task.arm!r}: {error.field}", error.value, error.allowed) from None
        except SystemExit:  # a flag that there is not: the parser has said so
            raise FieldError("arm", task.arm, "flags of train.py") from None
    return plan


def _plan(tree: Any, path: Path) -> Plan:
    names = [f.name for f in fields(Plan)]
    if not isinstance(tree, Mapping):
        raise FieldError("plan", str(path), f"a mapping with {', '.join(names)}")
    for key in tree:
        if key not in names:
            raise FieldError("plan", key, one_of(names, str(key)))
    for key in ("title", "arms"):
        if key not in tree:
            raise FieldError(key, None, f"given in {path}")
    _check_values(tree)
    plan = Plan(**tree)
    folders: dict[str, str] = {}
    for arm in plan.arms:
        other = folders.setdefault(folder_name(arm).lower(), arm)
        if other != arm:
            raise FieldError("arms", arm, f"a name whose letters and digits differ from those of {other!r}")
    return plan


def _check_values(tree: Mapping[str, Any]) -> None:
    arms, seeds, ranks = tree["arms"], tree.get("seeds", [0]), tree.get("ranks", 1)
    if not isinstance(arms, Mapping) or not arms:
        raise FieldError("arms", arms, 'at least one, as in {float32: "--uplink fp32"}')
    for name, flags in arms.items():
        if not isinstance(name, str) or not isinstance(flags, str):
            raise FieldError("arms", {name: flags}, "a name and the flags of train.py, both text (in quotes)")
        if {"--seed", "--out", "--resume"} & {word.split("=")[0] for word in shlex.split(flags)}:
            raise FieldError(f"arm {name!r}", flags, "flags without --seed, --out and --resume, which the sweep gives")
    whole = isinstance(seeds, list) and all(isinstance(s, int) and not isinstance(s, bool) and s >= 0 for s in seeds)
    if not whole or not seeds or len(set(seeds)) != len(seeds):
        raise FieldError("seeds", seeds, "a list of different whole numbers, 0 or more")
    if not isinstance(ranks, int) or isinstance(ranks, bool) or ranks < 1:
        raise FieldError("ranks", ranks, "a whole number, 1 or more")

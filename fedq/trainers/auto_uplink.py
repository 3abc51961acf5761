"""``--uplink auto``: measures links and a step before training, and chooses a codec, or none, as `fedq plan` would."""

from __future__ import annotations

import copy
import json
import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from torch import nn
from torch.nn import functional

from fedq.config import AUTO, Config
from fedq.data import Dataset
from fedq.engines import Precision
from fedq.errors import FieldError
from fedq.files import replace_file
from fedq.planning.advice import TRUSTED
from fedq.planning.cluster import Cluster
from fedq.planning.command import plan_rounds, plan_steps
from fedq.planning.probe import Clock, measure
from fedq.planning.rounds import RoundJob
from fedq.planning.step import Job
from fedq.planning.traffic import Shapes
from fedq.report import print_header
from fedq.runtime import Runtime, from_root, on_root
from fedq.trainers.fingerprint import Fingerprint

_log = logging.getLogger(__name__)

_PROBE_S = 6.0
_STEPS = 5
"""Most steps that are timed."""
_FILE = "auto_uplink.json"
_Schedule = Literal["auto", "reduce", "one_phase", "two_phase", "hierarchical"]


def is_auto(config: Config) -> bool:
    """Whether the uplink is still to be chosen."""
    return config.exchange.uplink == AUTO


def keep_choice(config: Config) -> Config:
    """Return the settings of a run that is resumed with what ``auto`` was when it was started."""
    if config.run.resume is None or not is_auto(config):
        return config
    before = Fingerprint.kept(config.run.resume, type(config)).settings
    chosen = {name: before[name] for name in ("uplink", "schedule")}
    return replace(config, exchange=replace(config.exchange, **chosen, link=None))


def why_this_uplink(path: Path) -> str | None:
    """Return why a run has the uplink that it has; None if it was given, or nobody can read it any more."""
    file = path / _FILE
    if not os.path.lexists(file):
        return None
    try:
        return str(json.loads(file.read_text(encoding="utf-8"))["because"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        _log.warning("%s cannot be read (%s): the summary does not say why the uplink was chosen", file, error)
        return None


def choose_uplink(
    config: Config, runtime: Runtime, model: nn.Module, data: Dataset, precision: Precision, path: Path
) -> Config:
    """Return the settings with a codec for ``auto``, the same on all ranks; the reason is printed and kept.

    Nothing random is used up: the job goes on as one that was given the codec.

    Args:
        config: Settings with ``uplink`` as ``auto``.
        runtime: This rank's place in its process group.
        model: Model of the job; only a copy of it takes steps.
        data: Data set of the job.
        precision: Arithmetic of training.
        path: The run's folder, in which rank 0 keeps the links and the reason.

    Raises:
        FieldError: The ``link`` file cannot be read, or was measured with other ranks.
    """
    with torch.random.fork_rng():
        compute_s = _compute_s(config, runtime, model, data, precision)
        cluster = _cluster(config, runtime)
    choice = on_root(runtime, lambda: _choose(config, cluster, data, compute_s))
    codec, schedule, words = from_root(runtime, choice) or (AUTO, "auto", "")
    if runtime.is_root:
        cluster.save(path / "link.json")
        replace_file(path / _FILE, json.dumps({"uplink": codec, "because": words}).encode())
        print_header([f"uplink auto: {codec}, because {words}"])
    return replace(config, exchange=replace(config.exchange, uplink=codec, schedule=schedule, link=None))


def _cluster(config: Config, runtime: Runtime) -> Cluster:
    """Return the cluster of the file that rank 0 was given, or measure it."""
    path = config.exchange.link
    if path is None:
        return measure(runtime, [*TRUSTED, config.exchange.downlink], budget_s=_PROBE_S)
    return from_root(runtime, on_root(runtime, lambda: _load(path, runtime)))  # type: ignore[return-value]


def _compute_s(config: Config, runtime: Runtime, model: nn.Module, data: Dataset, precision: Precision) -> float:
    """Return the seconds of forward and backward pass on one batch of noise, while all ranks do the same."""
    copied = copy.deepcopy(model).train()
    x = torch.randn(config.local.batch_size, *data.image_shape, device=runtime.device)
    if precision.channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    y = torch.zeros(len(x), dtype=torch.int64, device=runtime.device)

    def step() -> None:
        with precision.autocast():
            outputs = copied(x)
        functional.cross_entropy(outputs.float(), y).backward()

    step()
    return Clock(runtime).median(step, 1.0, most=_STEPS)[0]


def _load(path: Path, runtime: Runtime) -> Cluster:
    cluster = Cluster.load(path)
    before, now = (cluster.world_size, cluster.ranks_per_node), (runtime.world_size, runtime.local_world_size)
    if before != now:
        allowed = f"one measured with {now[0]} ranks, {now[1]} a node (this has {before[0]}, {before[1]})"
        raise FieldError("link", str(path), allowed)
    return cluster


def _choose(config: Config, cluster: Cluster, data: Dataset, compute_s: float) -> tuple[str, _Schedule, str]:
    """Return the codec, the schedule of gradients, and the reason."""
    exchange, local = config.exchange, config.local
    schedule: _Schedule = exchange.schedule
    shapes = Shapes.of(local.model, num_classes=data.num_classes, image=data.image_shape, norm=local.norm)
    if exchange.exchange == "step":
        schedules = None if schedule == "auto" else [schedule]
        advice = plan_steps(Job(shapes, compute_s), cluster, TRUSTED, exchange.downlink, schedules)[1]
        if schedule == "auto" and advice.compresses:
            schedule = advice.schedule  # type: ignore[assignment]
    else:
        num_examples = len(data.train) // config.clients.num_clients
        steps = local.local_steps or local.local_epochs * max(1, num_examples // local.batch_size)
        job = RoundJob(shapes, config.clients.num_clients, config.cohort_size, steps, compute_s, exchange.downlink)
        advice = plan_rounds(job, cluster, TRUSTED, exchange.aggregate)[1]
    return advice.codec, schedule, f"{advice.because} ({1e3 * compute_s:.3g} ms of computation a step); {advice.note}"

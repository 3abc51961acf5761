"""Accelerate's `Accelerator`, made to see this job's ranks and device as they are, and its experiment trackers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fedq.engines.environ import defaults_in_environ
from fedq.errors import FieldError, one_of


class Trackers:
    """Accelerate's trackers, whoever started the job; fed on rank 0, but made on every rank.

    Args:
        names: Names of trackers, separated by commas, such as ``wandb,mlflow``.
        device: Device that this rank trains on.
        folder: Folder for trackers that write files.
        config: The run's settings, nested by group.

    Raises:
        FieldError: Accelerate is not installed, or a tracker is not.
    """

    def __init__(self, names: str, device: torch.device, folder: Path, config: Mapping[str, Mapping[str, Any]]) -> None:
        wanted = [name.strip() for name in names.split(",") if name.strip()]
        self.accelerator = accelerator = make_accelerator(device, wanted, folder)
        flat = {f"{group}.{key}": value for group, values in config.items() for key, value in values.items()}
        plain = {key: value for key, value in flat.items() if isinstance(value, (bool, int, float, str))}
        try:
            accelerator.init_trackers("fedq", config=plain)
        except Exception as error:  # each tracker has its own: no server, no login, a store that it cannot use
            allowed = f"trackers that can be started; {type(error).__name__}: {' '.join(str(error).split())}"
            raise FieldError("log_with", names, allowed) from error

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Pass a round's numbers on."""
        self.accelerator.log(dict(values), step=step)

    def close(self) -> None:
        """Finish the trackers; `Accelerator.end_training` would destroy the process group too."""
        for tracker in self.accelerator.trackers:
            tracker.finish()


def make_accelerator(device: torch.device, trackers: Sequence[str] = (), folder: Path | None = None) -> Any:
    """Return an `Accelerator` for this device that sees the process group as it is.

    Args:
        device: Device that this rank trains on.
        trackers: Names of Accelerate's trackers, such as wandb.
        folder: Folder for trackers that write files; None: Accelerate is given none.

    Raises:
        FieldError: Accelerate is not installed, does not know a tracker, or sees another number of ranks.
    """
    try:
        from accelerate import Accelerator, DistributedDataParallelKwargs
    except ImportError as error:
        allowed = f"an installed Accelerate: pip install 'fedq[accelerate]' ({error})"
        raise FieldError("accelerate", None, allowed) from None
    _check_trackers(trackers)
    ddp = DistributedDataParallelKwargs()
    # It knows no init_sync: the trainer shares the start, and counts it.
    ddp.to_kwargs = lambda: {"init_sync": False}
    # Without these it would choose threads and a device by itself.
    ours = {"OMP_NUM_THREADS": str(torch.get_num_threads()), "ACCELERATE_TORCH_DEVICE": str(device)}
    with defaults_in_environ(ours):
        accelerator = Accelerator(
            cpu=device.type == "cpu",
            mixed_precision="no",
            kwargs_handlers=[ddp],
            log_with=list(trackers) or None,
            project_dir=None if folder is None else str(folder),
        )
    num_ranks = dist.get_world_size() if dist.is_initialized() else 1
    if accelerator.num_processes != num_ranks:
        works = f"ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes {num_ranks} train.py"
        raise FieldError("num_processes", accelerator.num_processes, f"{num_ranks}, as WORLD_SIZE says; try: {works}")
    return accelerator


def _check_trackers(names: Sequence[str]) -> None:
    """Refuse trackers that are not installed, which Accelerate would leave out without a word."""
    if not names:
        return
    from accelerate.tracking import get_available_trackers

    available = [str(tracker) for tracker in get_available_trackers()]
    for name in names:
        if name not in available:
            raise FieldError("log_with", name, f"installed trackers: {one_of(available, name)}")

"""--profile: a PyTorch profiler's trace of the first round, with fedq's phases in it."""

from __future__ import annotations

from pathlib import Path

import torch

from fedq.phases import PhaseTimer
from fedq.runfolder import SideOutput

SKIPPED_STEPS = 3
"""Steps at the beginning that are not traced: they are slower than the others."""
MAX_STEPS = 500
"""Steps after which a trace ends, so that it can still be opened."""


class StepTrace:
    """Records from a rank's first steps on, until it is told to stop or has seen enough.

    Args:
        is_on: Whether anything is recorded at all.
        path: Folder of ``trace-rank<n>.json.gz``, which chrome://tracing and Perfetto open.
        rank: Number of this rank.
        device: Device that this rank computes on.
        timer: Timer whose phases are shown in the trace.
    """

    def __init__(self, is_on: bool, path: Path, rank: int, device: torch.device, timer: PhaseTimer) -> None:
        self.file = path / f"trace-rank{rank}.json.gz"
        self._timer = timer
        self._num_steps = 0
        self._is_done = not is_on
        self._kinds = [torch.profiler.ProfilerActivity.CPU]
        if device.type == "cuda":
            self._kinds.append(torch.profiler.ProfilerActivity.CUDA)
        self._profiler: torch.profiler.profile | None = None

    def step(self) -> None:
        """Note an optimizer step."""
        if self._is_done:
            return
        self._num_steps += 1
        if self._num_steps == SKIPPED_STEPS:
            self._profiler = torch.profiler.profile(activities=self._kinds)
            self._profiler.start()
            self._timer.annotate(True)
        elif self._num_steps == SKIPPED_STEPS + MAX_STEPS:
            self.stop()

    def stop(self) -> None:
        """Write the trace, if it was begun; it is not begun again."""
        if self._profiler is None:
            return
        self._is_done = True
        self._timer.annotate(False)
        self._profiler.stop()
        with SideOutput(self.file.name).trying():
            self._profiler.export_chrome_trace(str(self.file))
        self._profiler = None

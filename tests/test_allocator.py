"""Freed memory is kept: training's activations are not faulted in again every step."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import resource
import torch
from fedq.trainers.allocator import keep_freed_memory

assert keep_freed_memory()

def step():
    tensors = [torch.ones(6_500_000, dtype=torch.uint8) for _ in range(4)]

step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_steps_take_the_memory_that_earlier_ones_freed() -> None:
    """Without it the same steps fault nearly every page in again, or some, as the heap happens to lie."""
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    num_pages = 20 * 4 * 6_500_000 // 4096
    assert int(done.stdout) < num_pages // 20

"""Freed memory is kept: training's activations are not faulted in again every step."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest
from properties import few

SCRIPT = """
import resource
import sys
import threading
import torch
from fedq.runtime.allocator import keep_freed_memory

nbytes = int(sys.argv[1])
assert keep_freed_memory(of_any_size=nbytes > 32 << 20)

def step():
    tensors = [torch.ones(nbytes, dtype=torch.uint8) for _ in range(4)]

def steps():
    for _ in range(5):  # until the heap is as large as it gets
        step()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        step()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

if nbytes > 32 << 20:
    thread = threading.Thread(target=steps)
    thread.start()
    thread.join()
else:
    steps()
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
@pytest.mark.parametrize("nbytes", few([6_500_000, 45_000_000], 1))
def test_steps_take_the_memory_that_earlier_ones_freed(nbytes: int) -> None:
    """Without it the same steps fault nearly every page in again, or some, as the heap happens to lie.

    The larger ones are taken by a thread, as a server's messages are.
    """
    command = [sys.executable, "-c", SCRIPT, str(nbytes)]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    num_pages = 20 * 4 * nbytes // 4096
    assert int(done.stdout) < num_pages // 20

"""A rank that raises ends the job with its traceback, wherever it raises; processes of their own, to their very end."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from properties import few, is_all
from warm import Command

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 30.0
"""From the end of the rank that raised to the end of the other."""

SCRIPT = """
import sys
import torch
import torch.distributed as dist
from torch import nn
from fedq import hooks

rank, store, where, spec = int(sys.argv[1]), *sys.argv[2:]
torch.set_num_threads(1)
dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
step = 0

def fail(place):
    if (step, rank, where) == (3, 1, place):
        raise RuntimeError("injected")

class Failing(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        fail("backward")
        return gradient

class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(200, 200) for _ in range(6))

    def forward(self, x):
        fail("forward")
        for number, layer in enumerate(self.layers):
            x = layer(Failing.apply(x) if number == 3 else x)
        return x

model = nn.parallel.DistributedDataParallel(Network(), bucket_cap_mb=0.1)
state = hooks.register(model, spec)
average = state._unscaled
state._unscaled = lambda *args: fail("background") or average(*args)
for step in range(5):
    model.zero_grad()
    model(torch.randn(8, 200)).square().mean().backward()
"""


PLACES = [("backward", "int4"), ("forward", "int4"), ("background", "powersgd:start=2")]


@pytest.mark.parametrize(("where", "spec"), few(PLACES, 1))
def test_a_rank_that_raises_ends_the_job(where: str, spec: str, tmp_path: Path) -> None:
    environ = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    outputs = [tmp_path / f"stderr{rank}" for rank in range(2)]
    ranks: list[subprocess.Popen | Command] = []
    try:
        for rank, path in enumerate(outputs):
            command = ["-c", SCRIPT, str(rank), str(tmp_path / "store"), where, spec]
            if rank == 0 and not is_all():  # whose end is the other's doing: it costs less if it is forked
                ranks.append(Command(command, output=tmp_path / "stdout0", errors=path, env=environ, cwd=tmp_path))
                continue
            with path.open("w") as output:
                ranks.append(subprocess.Popen([sys.executable, *command], env=environ, stderr=output))
        assert ranks[1].wait(120) == 1, outputs[1].read_text()  # an ordinary exit after an exception: no abort
        ended = time.monotonic()
        assert ranks[0].wait(LIMIT_S) == 1, outputs[0].read_text()
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    assert time.monotonic() - ended < LIMIT_S
    text = outputs[1].read_text()
    assert "Traceback" in text
    assert "injected" in text
    assert "in fail" in text or "): fail" in text, "where it happened"

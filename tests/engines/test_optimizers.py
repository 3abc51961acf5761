"""Optimizers without torch's compiler: the same bits, the same behaviour, and the compiler stays unimported."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from properties import few
from torch import nn
from torch.optim import Optimizer

from fedq.engines.optimizers import lean
from fedq.federated.optim import FedAdam

OPTIONS = [
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3, "fused": True}),
    (torch.optim.SGD, {"lr": 0.1}),
    (torch.optim.AdamW, {"lr": 0.01, "fused": True}),
    (torch.optim.Adagrad, {"lr": 0.01}),
    (FedAdam, {"lr": 0.01}),
]


def trained(cls: type[Optimizer], options: dict) -> tuple[list[torch.Tensor], dict]:
    """Five steps, the last two after a round trip through the state's dictionary."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 5))
    optimizer = cls(model.parameters(), **options)
    for step in range(5):
        for param in model.parameters():  # drawn: what is compared bit for bit must not hang on a product's order
            param.grad = torch.randn_like(param)
        optimizer.step()
        if step == 2:
            state = copy.deepcopy(optimizer.state_dict())
            optimizer = cls(model.parameters(), **options)
            optimizer.load_state_dict(state)
    return [p.detach() for p in model.parameters()], optimizer.state_dict()


@pytest.mark.parametrize(("cls", "options"), OPTIONS)
def test_the_same_bits_as_the_original(cls: type[Optimizer], options: dict) -> None:
    (ours, our_state), (theirs, their_state) = trained(lean(cls), options), trained(cls, options)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert our_state["param_groups"] == their_state["param_groups"]
    assert issubclass(lean(cls), cls)
    assert lean(cls) is lean(cls)


def test_a_step_records_no_gradients_and_runs_a_closure_with_them() -> None:
    param = nn.Parameter(torch.ones(3))
    optimizer = lean(torch.optim.SGD)([param], lr=0.5)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = param.square().sum()
        loss.backward()
        return loss

    assert float(optimizer.step(closure).detach()) == 3.0
    assert torch.equal(param.detach(), torch.zeros(3))
    assert param.grad_fn is None


JOB = """
import sys
from fedq.cli import main
flags = "--dataset digits --model cnn62k --num-clients 2 --local-steps 1 --rounds 2 --device cpu --threads 1 --server"
assert main([*flags.split(), sys.argv[2], "--out", sys.argv[1]]) == 0
print("torch._dynamo" in sys.modules)
"""


@pytest.mark.slow
@pytest.mark.parametrize("server", few(["fedavg", "adamw:lr=0.01"], 1))
def test_a_job_does_not_import_the_compiler(tmp_path: Path, server: str) -> None:
    command = [sys.executable, "-c", JOB, str(tmp_path / "run"), server]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "False"

"""Averaging gradients without DDP: the same bits, bytes and residuals as the DDP hook's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from distributed import own_state, run_group
from properties import few
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fedq import hooks
from fedq.hooks.gradients import gradient_runs

STEPS = 4


class TwoHeads(nn.Module):
    """A network of which each rank may use another head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 50))
        self.heads = nn.ModuleList(nn.Linear(50, 4) for _ in range(2))

    def forward(self, x: Tensor, head: int = 0) -> Tensor:
        return self.heads[head](self.body(x))


def batch(rank: int, step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 * step + rank)
    return torch.randn(6, 3, 8, 8, generator=generator), torch.randint(4, (6,), generator=generator)


def train(model: nn.Module, rank: int, *, state: hooks.StepExchange | None = None) -> np.ndarray:
    """Train with the rank's own head, averaging with ``state`` where DDP does not, and return the parameters."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for step in range(STEPS):
        optimizer.zero_grad()
        x, y = batch(rank, step)
        x = x.to(next(model.parameters()).dtype)
        nn.functional.cross_entropy(model(x, rank % 2).float(), y).backward()
        if state is not None:
            state.average_gradients()
        optimizer.step()
    return torch.cat([p.detach().reshape(-1).float() for p in model.parameters()]).numpy()


def _beside_ddp(rank: int, spec: str, kind: dict[str, Any], limit_bytes: int) -> None:
    ddp = DistributedDataParallel(
        TwoHeads().to(**kind), bucket_cap_mb=0.01, broadcast_buffers=False, find_unused_parameters=True
    )
    hooked = hooks.register(ddp, spec, seed=3)
    expected = train(ddp, rank)
    plain = TwoHeads().to(**kind)
    state = hooks.step_state(plain, spec, seed=3)
    if limit_bytes:
        state._runs = gradient_runs(dict(enumerate(plain.parameters())), limit_bytes)  # type: ignore[attr-defined]
    assert np.array_equal(train(plain, rank, state=state), expected)
    assert state.sent == hooked.sent
    assert state.sent.first
    ours, theirs = own_state(state), own_state(hooked)
    assert ours["step"] == theirs["step"] == STEPS
    for leg in ("first", "second"):
        assert ours[leg].keys() == theirs[leg].keys()
        assert all(torch.equal(value, theirs[leg][key]) for key, value in ours[leg].items())


@pytest.mark.parametrize(
    ("world_size", "spec", "kind", "limit_bytes"),
    few(
        [
            (2, "int4", {}, 0),
            (3, "sign", {}, 0),
            (3, "int4", {"memory_format": torch.channels_last}, 3000),
            (2, "fp32", {}, 0),
            (2, "int8", {"dtype": torch.bfloat16}, 1),
        ],
        2,
    ),
)
def test_it_equals_the_ddp_hook(world_size: int, spec: str, kind: dict, limit_bytes: int) -> None:
    run_group(world_size, _beside_ddp, spec, kind, limit_bytes)


def _scaled(rank: int, dtype: torch.dtype) -> tuple[np.ndarray, np.ndarray]:
    module = nn.Linear(40, 30).to(dtype)
    state = hooks.step_state(module, "sign", grad_scaler=lambda: 2.0**14)
    for param in module.parameters():
        # unscaled below the smallest float16
        param.grad = torch.full_like(param, 2.0**-14 * (1 + rank))
    state.average_gradients()
    return module.weight.grad.numpy(), own_state(state)["first"]["weight/0"].numpy()


def test_a_scale_may_come_from_a_function_and_spares_float16() -> None:
    for grad, residual in run_group(2, _scaled, torch.float16):
        np.testing.assert_allclose(grad, 1.5 * 2.0**-14, rtol=0.01)  # one scale for equal values, bfloat16
        assert np.abs(residual).max() < 2.0**-34


def test_runs_keep_to_the_limit_and_to_one_type() -> None:
    sizes = [10, 10, 30, 5, 5, 5]
    params = [
        nn.Parameter(torch.zeros(n, dtype=torch.bfloat16 if i == 4 else torch.float32)) for i, n in enumerate(sizes)
    ]
    runs = gradient_runs(dict(enumerate(params)), limit_bytes=80)
    assert [run.numbers for run in runs] == [[0, 1], [2], [3], [4], [5]]
    for param in params:
        param.grad = torch.ones_like(param)
    assert runs[1].load().data_ptr() == params[2].grad.data_ptr(), "a large gradient stays where it is"
    assert runs[0].load().data_ptr() == runs[2].load().data_ptr(), "small ones share a buffer"


def test_one_rank_keeps_its_gradients() -> None:
    module = nn.Linear(4, 3)
    state = hooks.step_state(module, "sign")
    module.weight.grad = torch.randn(3, 4)
    before = module.weight.grad.clone()
    state.average_gradients()
    assert torch.equal(module.weight.grad, before)
    assert module.bias.grad is None
    assert state.step == 1

"""A DeepSpeed engine of somebody's own script: its all-reduce is switched off, or an error says why it cannot be."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from distributed import Spy, run_group
from properties import few
from torch import nn

from fedq import hooks
from fedq.errors import FieldError

pytest.importorskip("deepspeed")
from deepspeed.accelerator import get_accelerator

STEPS = 4


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 4))


def engine_of(module: nn.Module, rank: int, **config: Any) -> Any:
    os.environ |= {"LOCAL_RANK": "0", "DS_ACCELERATOR": "cpu"}
    import deepspeed

    deepspeed.ops.__compatible_ops__ = {}  # not compiled for this test
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    config = {"train_micro_batch_size_per_gpu": 8, "zero_allow_untested_optimizer": True} | config
    return deepspeed.initialize(args=SimpleNamespace(), model=module, optimizer=optimizer, config=config)[0]


def _x(rank: int, step: int) -> torch.Tensor:
    return torch.randn(8, 16, generator=torch.Generator().manual_seed(100 * step + rank))


def flat_of(module: nn.Module) -> np.ndarray:
    return torch.cat([p.detach().float().reshape(-1) for p in module.parameters()]).numpy().copy()


def _in_an_engine(rank: int, spec: str) -> None:
    module, plain = network(), network()
    engine = engine_of(module, rank)
    state = hooks.step_state(engine, spec)
    sums = hooks.step_state(plain, spec)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    for step in range(STEPS):
        x = _x(rank, step)
        with pytest.MonkeyPatch.context() as patch:
            spy = Spy(patch)
            engine.backward(engine(x).square().mean())
            assert spy.sent == 0, "DeepSpeed would average first"
        state.average_gradients()
        engine.step()
        optimizer.zero_grad()
        plain(x).square().mean().backward()
        sums.average_gradients()
        optimizer.step()
    # the same layers and codes; a product's terms may be summed in another order
    np.testing.assert_allclose(flat_of(module), flat_of(plain), atol=1e-6)
    assert state.sent == sums.sent
    own = torch.from_numpy(flat_of(module))
    everyones = [torch.empty_like(own) for _ in range(2)]
    dist.all_gather(everyones, own)
    assert torch.equal(*everyones)


@pytest.mark.parametrize("spec", few(["int4", "fp32"], 1))
def test_an_engine_trains_with_our_mean_alone(spec: str) -> None:
    run_group(2, _in_an_engine, spec, fresh=True)


def _refused(rank: int, stage: int) -> None:
    engine = engine_of(network(), rank, zero_optimization={"stage": stage})
    with pytest.raises(FieldError, match=rf"ZeRO stage {stage}.*ZeRO stage 0"):
        hooks.step_state(engine, "int4")


@pytest.mark.slow
@pytest.mark.parametrize("stage", few([1, 2, 3], 1))
def test_zero_is_refused_by_name(stage: int) -> None:
    run_group(2, _refused, stage, fresh=True)


def _scaled(rank: int) -> None:
    engine = engine_of(network(), rank, fp16={"enabled": True, "initial_scale_power": 10})
    state = hooks.step_state(engine, "int4")
    assert state.grad_scaler is not None
    assert state.grad_scaler() == engine.optimizer.loss_scale == 2.0**10  # type: ignore[operator]


@pytest.mark.skipif(not get_accelerator().is_fp16_supported(), reason="DeepSpeed has no float16 on this processor")
def test_the_engines_own_loss_scale_is_used() -> None:
    run_group(2, _scaled, fresh=True)

"""Ranks that were given different things say so, alike and at once, instead of training apart or hanging."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed import Spy, run_group
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fedq import hooks
from fedq.errors import FieldError

POWERSGD = "powersgd:rank=2,start=2"


def network(bias: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 64), nn.Linear(64, 64, bias=bias), nn.Linear(64, 4))


def _two() -> float:
    return 2.0


def _refusal(rank: int, how: str, options: list[dict[str, Any]]) -> tuple[str, object, str]:
    """Register with the rank's own options, and return the error's parts; the ranks still work together after it."""
    given = {"spec": "int4"} | options[rank]
    register, model = hooks.step_state, network()
    if how == "register":
        register, model = hooks.register, DistributedDataParallel(model)  # type: ignore[assignment]
    with pytest.raises(FieldError) as refused:
        register(model, **given)
    total = torch.ones(1)
    dist.all_reduce(total)
    assert int(total) == len(options)
    return refused.value.field, str(refused.value.value), refused.value.allowed


@pytest.mark.parametrize("how", ["register", "step_state"])
@pytest.mark.parametrize(
    ("options", "field", "value"),
    [
        ([{}, {"spec": "int8"}], "spec", "int4 on rank 0; int8 on rank 1"),
        ([{}, {"spec": "int4:rotate=false"}], "spec", "int4 on rank 0; int4:rotate=false on rank 1"),
        ([{"spec": POWERSGD}, {}], "spec", f"{POWERSGD} on rank 0; int4 on rank 1"),
        ([{"spec": POWERSGD}, {"spec": "powersgd:start=2,rank=3"}], "spec", None),
        ([{}, {"second": "int6"}], "second", "int4 on rank 0; int6 on rank 1"),
        ([{"feedback": False}, {}], "feedback", "False on rank 0; True on rank 1"),
        ([{"seed": 1}, {"seed": 0}, {"seed": 1}], "seed", "1 on ranks 0, 2; 0 on rank 1"),
        ([{"spec": POWERSGD, "seed": 1}, {"spec": POWERSGD}], "seed", "1 on rank 0; 0 on rank 1"),
        ([{}, {"schedule": "two_phase"}], "schedule", "one_phase on rank 0; two_phase on rank 1"),
        ([{}, {"grad_scaler": _two}], "grad_scaler", "None on rank 0; given on rank 1"),
        ([{"ranks_per_node": 2}, {}], "ranks_per_node", "2 on rank 0; 1 on rank 1"),
        # what a rank cannot have at all stops the others too
        ([{}, {"spec": "int99"}], "codec", "'int99' on rank 1"),
        ([{}, {"schedule": "nonsense"}], "schedule", "'nonsense' on rank 1"),
        ([{}, {"spec": "powersgd:rank=0"}], "powersgd:rank", "'0' on rank 1"),
        ([{"spec": "threshold:value=0.1"}] * 2, "codec", "'threshold:value=0.1'"),
    ],
)
def test_every_rank_raises_the_same(how: str, options: list[dict], field: str, value: str | None) -> None:
    errors = run_group(len(options), _refusal, how, options)
    assert all(error == errors[0] for error in errors)
    assert errors[0][0] == field
    assert value is None or errors[0][1] == value


def _different_model(rank: int, how: str) -> str:
    module = network()
    if rank == 1:
        with torch.no_grad():
            if how == "shape":
                module[2] = nn.Linear(64, 5)
            elif how == "name":
                module = network(bias=False)
            elif how == "type":
                module[1].bfloat16()
            elif how == "frozen":
                module[1].weight.requires_grad_(False)
            elif how == "value":
                module[1].bias[3] += 1e-6
    with pytest.raises(FieldError) as refused:
        hooks.step_state(module, "int4")
    return str(refused.value)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("shape", "parameter 2.weight=4x64 float32 on rank 0; 5x64 float32 on rank 1"),
        ("name", "parameter 1.bias=64 float32 on rank 0; not there on rank 1"),
        ("type", "parameter 1.weight=64x64 float32 on rank 0; 64x64 bfloat16 on rank 1"),
        ("frozen", "parameter 1.weight=64x64 float32 on rank 0; 64x64 float32 (frozen) on rank 1"),
        ("value", "parameter 1.bias=values with checksum"),
    ],
)
def test_models_that_differ_are_named(how: str, message: str) -> None:
    errors = run_group(2, _different_model, how)
    assert errors[0] == errors[1]
    assert errors[0].startswith(message)


def _changed_after_ddp(rank: int) -> None:
    ddp = DistributedDataParallel(network())
    if rank == 0:  # a checkpoint that rank 0 alone has loaded
        with torch.no_grad():
            ddp.module[0].weight += 1
    with pytest.raises(FieldError, match=r"parameter 0\.weight=values with checksum"):
        hooks.register(ddp, "int4")


def test_weights_that_one_rank_alone_has_loaded_are_seen() -> None:
    run_group(2, _changed_after_ddp)


def _costs(rank: int) -> int:
    with pytest.MonkeyPatch.context() as patch:
        spy = Spy(patch)
        hooks.step_state(network(), "int4")
        return spy.sent


def test_agreeing_costs_some_hundred_bytes() -> None:
    assert all(0 < sent < 1000 for sent in run_group(2, _costs))


def _twice(rank: int) -> None:
    ddp = DistributedDataParallel(network())
    hooks.register(ddp, "int4")
    with pytest.raises(FieldError, match=r"model=.*communication hook.*without"):
        hooks.register(ddp, "int4")


def test_a_second_hook_is_refused() -> None:
    run_group(2, _twice)


def test_options_are_spelt_out() -> None:
    with pytest.raises(TypeError, match="shedule"):
        hooks.step_state(network(), "int8", shedule="two_phase")  # type: ignore[call-arg]
    assert hooks.step_state(network(), "int8").settings()["spec"] == "int8"


# ---- a gradient scaler that nobody handed over ------------------------------------------------------------------


def _scaled(rank: int, handed_over: bool, grows: bool) -> list[str]:
    model = network()
    ddp = DistributedDataParallel(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2 if grows else 1000)
    hooks.register(ddp, "int4", grad_scaler=scaler if handed_over else None)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.01)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(6):
            optimizer.zero_grad()
            scaler.scale(ddp(torch.randn(8, 16)).square().mean()).backward()
            scaler.step(optimizer)
            scaler.update()
    return [str(one.message) for one in caught if "GradScaler" in str(one.message)]


@pytest.mark.parametrize(("handed_over", "grows", "times"), [(False, True, 1), (True, True, 0), (False, False, 0)])
def test_a_scale_that_changes_behind_our_back_is_said_once(handed_over: bool, grows: bool, times: int) -> None:
    for said in run_group(2, _scaled, handed_over, grows):
        assert len(said) == times
        assert all("from 1024 to 2048" in text and "grad_scaler" in text for text in said)

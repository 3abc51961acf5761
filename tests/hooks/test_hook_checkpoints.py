"""Residuals in everybody's checkpoints: each rank gets its own back. And copies, which leave group and thread out."""

from __future__ import annotations

import copy
import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from distributed import own_state, run_group
from properties import few
from torch import nn
from torch.distributed.checkpoint.stateful import Stateful
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from fedq import hooks
from fedq.errors import FieldError

POWERSGD = "powersgd:rank=2,start=2"
KINDS = [("int4", "two_phase"), ("sign", "one_phase"), (POWERSGD, "auto")]
STEPS, HALF = 6, 3


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))


def train(model: nn.Module, rank: int, steps: range, state: hooks.StepExchange | None = None) -> np.ndarray:
    for step in steps:
        model.zero_grad()
        x = torch.randn(8, 16, generator=torch.Generator().manual_seed(100 * step + rank))
        model(x).square().mean().backward()
        if state is not None:
            state.average_gradients()
        with torch.no_grad():
            for param in model.parameters():
                param -= 0.1 * param.grad
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()]).numpy().copy()


def _halfway(rank: int, spec: str, schedule: str) -> tuple[np.ndarray, nn.Module, hooks.StepExchange]:
    """Return what a whole run ends with, and model and state of one that has done half of it."""
    whole, half = network(), network()
    end = train(whole, rank, range(STEPS), hooks.step_state(whole, spec, schedule=schedule))
    state = hooks.step_state(half, spec, schedule=schedule)
    train(half, rank, range(HALF), state)
    return end, half, state


def _same(ours: dict[str, Any], theirs: dict[str, Any]) -> bool:
    tensors = [(ours[part], theirs[part]) for part in ours if isinstance(ours[part], dict)]
    return all(a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a) for a, b in tensors)


# ---- torch.distributed.checkpoint -------------------------------------------------------------------------------


def _distributed_checkpoint(rank: int, spec: str, schedule: str, folder: str) -> None:
    end, half, state = _halfway(rank, spec, schedule)
    assert isinstance(state, Stateful)
    dcp.save({"model": half, "exchange": state}, checkpoint_id=folder)
    again = network()
    fresh = hooks.step_state(again, spec, schedule=schedule)
    dcp.load({"model": again, "exchange": fresh}, checkpoint_id=folder)
    assert fresh.step == HALF
    assert _same(own_state(fresh), own_state(state))
    assert np.array_equal(train(again, rank, range(HALF, STEPS), fresh), end)


@pytest.mark.parametrize(("spec", "schedule"), few(KINDS, 1))
def test_a_distributed_checkpoint_brings_every_rank_its_own_back(spec: str, schedule: str, tmp_path: Path) -> None:
    run_group(3, _distributed_checkpoint, spec, schedule, str(tmp_path))


# ---- Accelerate, and whoever else has rank 0 write for all -------------------------------------------------------


def _accelerated(rank: int, spec: str, schedule: str, folder: str) -> None:
    from accelerate import Accelerator

    end, half, state = _halfway(rank, spec, schedule)
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1",
        "LOCAL_RANK": str(rank),
    }  # asked for, and not used
    accelerator = Accelerator(cpu=True)
    accelerator.register_for_checkpointing(state.gathered())
    accelerator.save_state(folder)
    again = network()
    again.load_state_dict(half.state_dict())
    fresh = hooks.step_state(again, spec, schedule=schedule)
    accelerator._custom_objects.clear()
    accelerator.register_for_checkpointing(fresh.gathered())
    dist.barrier()
    accelerator.load_state(folder)
    assert _same(own_state(fresh), own_state(state))
    assert np.array_equal(train(again, rank, range(HALF, STEPS), fresh), end)


@pytest.mark.parametrize(("spec", "schedule"), few(KINDS, 1))
def test_accelerate_brings_every_rank_its_own_back(spec: str, schedule: str, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    run_group(2, _accelerated, spec, schedule, str(tmp_path), fresh=True)


def _rank_0s(rank: int) -> None:
    *_, state = _halfway(rank, "int4", "two_phase")
    rank_0s = [state.state_dict()]
    dist.broadcast_object_list(rank_0s)
    if rank == 0:
        state.load_state_dict(*rank_0s)
        return
    before = own_state(state)
    with pytest.raises(FieldError, match=r"states='rank0of2'.*rank1of2, this rank's own.*gathered\(\)"):
        state.load_state_dict(*rank_0s)
    assert _same(own_state(state), before), "nothing is lost"


def test_one_ranks_state_does_not_go_to_all() -> None:
    run_group(2, _rank_0s)


# ---- another number of ranks ------------------------------------------------------------------------------------


def _gathered(rank: int, spec: str) -> bytes:
    _, _, state = _halfway(rank, spec, "auto")
    written = io.BytesIO()
    torch.save(state.gathered().state_dict(), written)
    return written.getvalue()


def _on_two(rank: int, spec: str, data: bytes) -> None:
    saved = torch.load(io.BytesIO(data), weights_only=True)
    state = hooks.step_state(network(), spec)
    with pytest.raises(FieldError, match=r"rank0of3, rank1of3, rank2of3.*mean=True"):
        state.load_state_dict(saved)
    with pytest.raises(FieldError, match=r"all 3 old ranks; missing: \[1\]"):
        state.load_state_dict({key: one for key, one in saved.items() if key != "rank1of3"}, mean=True)
    state.load_state_dict(saved, mean=True)
    part = "error" if spec == POWERSGD else "first"
    for key, value in own_state(state)[part].items():
        wanted = np.mean([one[part][key].numpy() for one in saved.values()], axis=0)
        np.testing.assert_allclose(value.numpy(), wanted, atol=1e-6)
    by_rank = hooks.step_state(network(), spec)
    by_rank.load_state_dict(*({key: one} for key, one in saved.items()))
    assert _same(own_state(by_rank), own_state(state))


@pytest.mark.parametrize("spec", few([POWERSGD, "sign"], 1))
def test_another_number_of_ranks_starts_from_the_mean_where_that_is_asked_for(spec: str) -> None:
    saved = run_group(3, _gathered, spec)
    run_group(2, _on_two, spec, saved[0])


@pytest.mark.parametrize(
    ("states", "message"),
    [
        ({}, "states=''"),
        ({"step": 3, "first": {}}, "what state_dict returned"),
        ({"rank0of1": {"step": 3}}, "schema_version=None"),
        ({"rank0of1": {"schema_version": 1, "step": 3}}, "schema_version=1"),
        ({"rank0of2": {}, "rank0of3": {}}, "what state_dict returned"),
    ],
)
def test_what_is_no_state_is_refused(states: dict, message: str) -> None:
    state = hooks.step_state(network(), "int4")
    with pytest.raises(FieldError, match=message):
        state.load_state_dict(states, mean=True)


def test_residuals_of_another_size_are_refused() -> None:
    state = hooks.step_state(network(), "int4")
    kept = own_state(state)
    kept["first"]["0.weight/0"] = torch.zeros(3)
    with pytest.raises(FieldError, match=r"residual of 0\.weight/0=3.*1024"):
        state.load_state_dict({"rank0of1": kept})


# ---- the compiler -----------------------------------------------------------------------------------------------


def _compiled(rank: int) -> None:
    module = network()
    compiled = torch.compile(module, backend="eager")
    state = hooks.step_state(compiled, "int4", schedule="two_phase")
    train(compiled, rank, range(HALF), state)
    plain = network()
    plain.load_state_dict(module.state_dict())
    resumed = hooks.step_state(plain, "int4", schedule="two_phase")
    resumed.load_state_dict(state.state_dict())
    assert _same(own_state(resumed), own_state(state))
    ends = [train(compiled, rank, range(HALF, STEPS), state), train(plain, rank, range(HALF, STEPS), resumed)]
    assert np.array_equal(*ends)


def test_what_was_saved_compiled_goes_on_without_the_compiler() -> None:
    run_group(2, _compiled)


# ---- copies -----------------------------------------------------------------------------------------------------


def _copied(rank: int, spec: str) -> None:
    ddp = DistributedDataParallel(network(), bucket_cap_mb=0.01)
    scale = lambda: 1.0  # noqa: E731 - what pickle cannot take
    state = hooks.register(ddp, spec, grad_scaler=scale)
    train(ddp, rank, range(HALF))
    written = io.BytesIO()
    torch.save(ddp, written)
    written.seek(0)
    copies = [copy.deepcopy(ddp), AveragedModel(ddp).module, torch.load(written, weights_only=False)]
    before = own_state(state)
    for copied in copies:
        assert all(torch.equal(a, b) for a, b in zip(copied.parameters(), ddp.parameters(), strict=True))
        (kept, _), *_ = ((one, hook) for hook, one in copied._comm_hooks)
        assert _same(own_state(kept), before)
        with pytest.raises(FieldError, match="exchange='a copy'"):
            kept.average_gradients()
    alone = copy.deepcopy(state)
    assert _same(own_state(alone), before)
    assert not alone.sent.first
    # the original goes on, and a copy of the model may be given a hook of its own
    again = hooks.register(copies[0], spec)
    again.load_state_dict(state.state_dict())
    assert np.array_equal(train(copies[0], rank, range(HALF, STEPS)), train(ddp, rank, range(HALF, STEPS)))


@pytest.mark.parametrize("spec", few([POWERSGD, "int4"], 1))
def test_a_ddp_model_can_be_copied_and_pickled(spec: str) -> None:
    run_group(2, _copied, spec)


# ---- states of version 1, which did not name their rank -----------------------------------------------------------


def _first_version(rank: int, spec: str, schedule: str) -> None:
    end, half, state = _halfway(rank, spec, schedule)
    (own,) = state.state_dict().values()
    again = network()
    again.load_state_dict(half.state_dict())
    fresh = hooks.step_state(again, spec, schedule=schedule)
    fresh.load_state_dict({**own, "schema_version": 1})
    assert np.array_equal(train(again, rank, range(HALF, STEPS), fresh), end)


@pytest.mark.parametrize(("spec", "schedule"), few(KINDS, 1))
def test_a_state_of_version_1_is_this_ranks_own(spec: str, schedule: str) -> None:
    run_group(2, _first_version, spec, schedule)


def test_states_of_version_1_are_those_of_all_ranks_in_order() -> None:
    model, other = network(), network()
    state, fresh = (hooks.step_state(one, "sign", schedule="one_phase") for one in (model, other))
    train(model, 0, range(HALF), state)
    (own,) = state.state_dict().values()
    twice = {**own, "schema_version": 1, "first": {key: 3 * value for key, value in own["first"].items()}}
    fresh.load_state_dict({**own, "schema_version": 1}, twice)
    assert fresh.step == HALF
    for key, value in own_state(fresh)["first"].items():
        torch.testing.assert_close(value, 2 * own["first"][key])  # the mean of one and three times

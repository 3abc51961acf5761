"""The DDP hook: against DDP without one, against one process, and over everything that DDP does with its buckets."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from distributed import own_state, run_group
from properties import few, is_all
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fedq import hooks
from fedq.errors import FieldError

SPECS = ["bf16", "int8", "int4", "sign", "ternary", "blocktopk:k=2,block=64,bits=2", "randk:density=0.2"]
STEPS = 6
LONG = 50


def network() -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 50), nn.ReLU(), nn.Linear(50, 4)
    )


def batch(rank: int, step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 * step + rank)
    return torch.randn(6, 3, 8, 8, generator=generator), torch.randint(4, (6,), generator=generator)


def flat_of(module: nn.Module) -> np.ndarray:
    return torch.cat([p.detach().reshape(-1).float() for p in module.parameters()]).numpy().copy()


def wrapped(**options: Any) -> DistributedDataParallel:
    """A DDP model with many small buckets, which DDP rebuilds after the first step."""
    return DistributedDataParallel(network(), bucket_cap_mb=0.01, broadcast_buffers=False, **options)


def train(ddp: nn.Module, rank: int, steps: range, *, accumulate: bool = False) -> None:
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.05)
    for step in steps:
        optimizer.zero_grad()
        if accumulate:
            with ddp.no_sync():
                _backward(ddp, *batch(rank, 1000 + step))
        _backward(ddp, *batch(rank, step))
        optimizer.step()


def _backward(model: nn.Module, x: Tensor, y: Tensor) -> None:
    nn.functional.cross_entropy(model(x), y).backward()


# ---- float32: DDP's own result ----------------------------------------------------------------------------------

OPTIONS: list[dict] = [{}, {"gradient_as_bucket_view": True}, {"static_graph": True}]


def _exact(rank: int) -> None:
    for options in OPTIONS:
        for accumulate in (False, True)[: 1 if "static_graph" in options else 2]:  # torch refuses both together
            plain, hooked = wrapped(**options), wrapped(**options)
            state = hooks.register(hooked, "fp32")
            for ddp in (plain, hooked):
                train(ddp, rank, range(STEPS), accumulate=accumulate)
            ours, ddps = flat_of(hooked), flat_of(plain)
            if dist.get_world_size() == 2:  # a sum of two is the same in either order
                assert np.array_equal(ours, ddps), (options, accumulate)
            else:
                # Gloo sums in an order that is its own business; gradients are below 1, so each of the steps may round
                # a parameter otherwise by some 2^-24 times the learning rate, and the next gradients follow from it.
                np.testing.assert_allclose(ours, ddps, rtol=0, atol=STEPS * 2.0**-22)
            assert state.step == STEPS


@pytest.mark.parametrize("world_size", few([2, 3, 4], 1))
def test_float32_is_ddp_itself(world_size: int) -> None:
    run_group(world_size, _exact)


# ---- every codec: all ranks alike, and one process --------------------------------------------------------------


def _all_codecs(rank: int, num_steps: int) -> dict[str, np.ndarray]:
    results = {}
    for spec in SPECS:
        ddp = wrapped()
        state = hooks.register(ddp, spec, schedule="auto" if spec == "bf16" else "two_phase", seed=3)
        train(ddp, rank, range(num_steps))
        results[spec] = flat_of(ddp)
        assert state.sent.first > 0
    return results


@pytest.mark.parametrize("world_size", few([3, 2, 4], 1))
def test_ranks_end_alike(world_size: int) -> None:
    results = run_group(world_size, _all_codecs, LONG if is_all() else STEPS)  # what differs stays different
    start = flat_of(network())
    for spec in SPECS:
        assert all(np.array_equal(result[spec], results[0][spec]) for result in results)
        assert not np.array_equal(results[0][spec], start)


def _buckets(rank: int, bucket_cap_mb: float) -> np.ndarray:
    ddp = DistributedDataParallel(network(), bucket_cap_mb=bucket_cap_mb, broadcast_buffers=False)
    hooks.register(ddp, "sign", schedule="one_phase", seed=3)
    train(ddp, rank, range(STEPS))
    return flat_of(ddp)


def test_codes_do_not_depend_on_buckets() -> None:
    small, large = (run_group(2, _buckets, size) for size in (0.001, 25))
    assert np.array_equal(small[0], large[0])


# ---- residuals --------------------------------------------------------------------------------------------------


def _telescoping(rank: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the sums of what was applied and of this rank's gradients, and its last residual."""
    ddp = wrapped()
    state = hooks.register(ddp, "sign", schedule="one_phase")
    applied, own = 0.0, 0.0
    for step in range(STEPS):
        ddp.zero_grad()
        alone = network()
        alone.load_state_dict(ddp.module.state_dict())
        _backward(alone, *batch(rank, step))
        own = own + torch.cat([p.grad.reshape(-1) for p in alone.parameters()])
        _backward(ddp, *batch(rank, step))
        applied = applied + torch.cat([p.grad.reshape(-1) for p in ddp.parameters()])
    named = own_state(state)["first"]
    residual = torch.cat(
        [named.get(f"{n}/0", torch.zeros(p.numel())).reshape(-1) for n, p in ddp.module.named_parameters()]
    )
    return applied.numpy(), own.numpy(), residual.numpy()


def test_what_was_applied_and_what_was_meant_differ_by_the_residuals() -> None:
    results = run_group(2, _telescoping)
    assert np.array_equal(results[0][0], results[1][0])
    weights = torch.cat([torch.full((p.numel(),), float(p.dim() > 1)) for p in network().parameters()]).numpy() > 0
    meant = np.mean([own for _, own, _ in results], axis=0)
    kept = np.mean([residual for _, _, residual in results], axis=0)
    # each step rounds at float32's precision at the size of what was applied or kept, below 1
    np.testing.assert_allclose((results[0][0] + kept - meant)[weights], 0, atol=STEPS * 4 * 2.0**-23)


def _resumed(rank: int, half: int) -> tuple[np.ndarray, np.ndarray]:
    through = wrapped()
    hooks.register(through, "int4", schedule="two_phase", seed=1)
    train(through, rank, range(STEPS))
    first = wrapped()
    state = hooks.register(first, "int4", schedule="two_phase", seed=1)
    train(first, rank, range(half))
    second = wrapped()
    second.module.load_state_dict(first.module.state_dict())
    hooks.register(second, "int4", schedule="two_phase", seed=1).load_state_dict(state.state_dict())
    train(second, rank, range(half, STEPS))
    return flat_of(through), flat_of(second)


def test_resumed_steps_are_those_of_one_run() -> None:
    for through, resumed in run_group(3, _resumed, 3):
        assert np.array_equal(through, resumed)


def _states(rank: int) -> dict[str, Any]:
    ddp = wrapped()
    state = hooks.register(ddp, "sign", schedule="two_phase")
    train(ddp, rank, range(3))
    saved = own_state(state)
    return {leg: {key: value.numpy() for key, value in saved[leg].items()} for leg in ("first", "second")}


def _fewer(rank: int, old: list[dict]) -> None:
    kept = [{"schema_version": 2, "step": 3, **{leg: _tensors(s[leg]) for leg in ("first", "second")}} for s in old]
    states = [{f"rank{rank}of{len(old)}": one} for rank, one in enumerate(kept)]
    ddp = wrapped()
    state = hooks.register(ddp, "sign", schedule="two_phase")
    state.load_state_dict(*states)
    for key, value in own_state(state)["first"].items():
        expected = np.mean([s["first"][key] for s in old], axis=0)
        np.testing.assert_allclose(value.numpy(), expected, atol=1e-7)
    train(ddp, rank, range(3, STEPS))


def _tensors(arrays: dict[str, np.ndarray]) -> dict[str, Tensor]:
    return {key: torch.from_numpy(value) for key, value in arrays.items()}


def test_another_number_of_ranks_starts_from_the_mean_residual() -> None:
    run_group(2, _fewer, run_group(3, _states))


# ---- float16, bfloat16, overflow --------------------------------------------------------------------------------


def _half(rank: int, dtype: torch.dtype) -> np.ndarray:
    ddp = DistributedDataParallel(network().to(dtype), bucket_cap_mb=0.01, broadcast_buffers=False)
    hooks.register(ddp, "int8")
    x, y = batch(rank, 0)
    nn.functional.cross_entropy(ddp(x.to(dtype)).float(), y).backward()
    assert all(p.grad.dtype == dtype for p in ddp.parameters())
    return torch.cat([p.grad.reshape(-1).float() for p in ddp.parameters()]).numpy()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_buckets(dtype: torch.dtype) -> None:
    a, b = run_group(2, _half, dtype)
    assert np.array_equal(a, b)
    assert np.isfinite(a).all()


def _overflow(rank: int) -> None:
    ddp = wrapped()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    state = hooks.register(ddp, "int4", grad_scaler=scaler)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.05)
    for step in range(4):
        optimizer.zero_grad()
        before, (x, y) = flat_of(ddp), batch(rank, step)
        if step == 2 and rank == 1:
            x[0] = float("inf")
        scaler.scale(nn.functional.cross_entropy(ddp(x), y)).backward()
        scaler.step(optimizer)
        scaler.update()
        assert np.array_equal(flat_of(ddp), before) == (step == 2), "an overflow skips the step on every rank"
        kept = own_state(state)
        assert all(value.isfinite().all() for leg in ("first", "second") for value in kept[leg].values())
    assert scaler.get_scale() == 2.0**9


def test_an_overflow_is_seen_by_the_scaler_and_leaves_no_nan() -> None:
    run_group(2, _overflow)


def _unscaled(rank: int, scale: float) -> dict[str, np.ndarray]:
    ddp = wrapped()
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    state = hooks.register(ddp, "sign", grad_scaler=scaler)
    scaler.scale(nn.functional.cross_entropy(ddp(batch(rank, 0)[0]), batch(rank, 0)[1])).backward()
    return {key: value.numpy() for key, value in own_state(state)["first"].items()}


def test_residuals_are_kept_unscaled() -> None:
    one, other = run_group(2, _unscaled, 1.0)[0], run_group(2, _unscaled, 1024.0)[0]
    for key, value in one.items():
        np.testing.assert_allclose(other[key], value, rtol=1e-5, atol=1e-9)


# ---- errors -----------------------------------------------------------------------------------------------------


def test_what_cannot_be_hooked_is_refused() -> None:
    with pytest.raises(FieldError, match="DistributedDataParallel"):
        hooks.register(network(), "int4")  # type: ignore[arg-type]


def _refused(rank: int) -> None:
    with pytest.raises(FieldError, match="threshold"):
        hooks.register(wrapped(), "threshold:value=0.1")
    state = hooks.register(wrapped(), "int4")
    kept = own_state(state) | {"first": {"nowhere/0": torch.zeros(2)}}
    with pytest.raises(FieldError, match="residual of='nowhere'"):
        state.load_state_dict({f"rank{rank}of2": kept})


def test_wrong_codecs_and_states_are_refused() -> None:
    run_group(2, _refused)


def _failing(rank: int) -> str:
    ddp = wrapped()
    state = hooks.register(ddp, "int4")
    state._codecs_of = None  # type: ignore[assignment,method-assign]
    try:
        train(ddp, rank, range(1))
    except Exception as error:
        return type(error).__name__
    return ""


def test_a_failure_reaches_the_training_loop() -> None:
    assert all(run_group(2, _failing))

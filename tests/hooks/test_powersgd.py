"""PowerSGD as an exchange: against PyTorch's own hook on one bucket, over DDP's buckets, and what it keeps."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from distributed import Spy, own_state, run_group
from properties import few, is_all
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

import fedq
from fedq import hooks
from fedq.errors import FieldError

SPEC = "powersgd:rank=2,start=2"
STEPS = 7


def network(*, bias: bool = True) -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, bias=bias),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(576, 50, bias=bias),
        nn.ReLU(),
        nn.Linear(50, 50, bias=bias),
        nn.ReLU(),
        nn.Linear(50, 12, bias=bias),
    )


def wrapped(module: nn.Module | None = None, *, bucket_cap_mb: float = 0.01, **options: Any) -> DistributedDataParallel:
    module = network() if module is None else module
    return DistributedDataParallel(module, bucket_cap_mb=bucket_cap_mb, **options)


def batch(rank: int, step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 * step + rank)
    return torch.randn(6, 3, 8, 8, generator=generator), torch.randint(12, (6,), generator=generator)


def flat_of(module: nn.Module) -> np.ndarray:
    return torch.cat([p.detach().reshape(-1).float() for p in module.parameters()]).numpy().copy()


def train(model: nn.Module, rank: int, steps: range, *, state: hooks.StepExchange | None = None) -> np.ndarray:
    """Train, averaging with ``state`` where the model does not do it by itself, and return the parameters."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in steps:
        optimizer.zero_grad()
        x, y = batch(rank, step)
        nn.functional.cross_entropy(model(x), y).backward()
        if state is not None:
            state.average_gradients()
        optimizer.step()
    return flat_of(model)


# ---- PyTorch's own hook -----------------------------------------------------------------------------------------


class Ordered(nn.Module):
    """Names the parameters of a network in the order in which DDP lays them in its bucket: the last layer first."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.ordered = nn.ParameterList(reversed(list(inner.parameters())))
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def _beside_torch(rank: int, bias: bool, columns: int) -> None:
    theirs = wrapped(Ordered(network(bias=bias)), bucket_cap_mb=25)
    state = powerSGD_hook.PowerSGDState(None, columns, start_powerSGD_iter=2)
    theirs.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
    ours = wrapped(Ordered(network(bias=bias)))
    kept = hooks.register(ours, f"powersgd:rank={columns},start=2")
    start, expected, actual = flat_of(ours), train(theirs, rank, range(STEPS)), train(ours, rank, range(STEPS))
    assert kept.step == STEPS
    assert np.abs(expected - start).max() > 1e-3
    # The products of matrices are torch's on both sides, but their operands lie elsewhere, and a library may sum the
    # terms of a product (576 at most here) in an order that depends on that; a bias's error memory is zero in sum but
    # for rounding too. Weights and gradients are below 1: a rounding is 2^-24, and every step adds some.
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("world_size", "bias", "columns"), few([(2, True, 2), (3, False, 1), (2, False, 2), (2, False, 3)], 1)
)
def test_it_is_torchs_hook(world_size: int, bias: bool, columns: int) -> None:
    run_group(world_size, _beside_torch, bias, columns)


# ---- DDP's buckets, and none ------------------------------------------------------------------------------------


WAYS: list[dict[str, Any]] = [{"bucket_cap_mb": 25}, {}, {"gradient_as_bucket_view": True}, {"static_graph": True}]


def _in_every_way(rank: int, ways: list[dict[str, Any]]) -> list[np.ndarray]:
    results = []
    for options in ways:
        ddp = wrapped(**options)
        hooks.register(ddp, SPEC)
        results.append(train(ddp, rank, range(STEPS)))
    plain = network()
    results.append(train(plain, rank, range(STEPS), state=hooks.step_state(plain, SPEC)))
    return results


def test_results_do_not_depend_on_buckets() -> None:
    first, second = run_group(2, _in_every_way, WAYS if is_all() else WAYS[:2])
    for a, b in zip(first, second, strict=True):
        assert np.array_equal(a, b)
    for other in first[1:]:
        assert np.array_equal(other, first[0])


def _channels_last(rank: int) -> None:
    plain = network()
    lasting = network().to(memory_format=torch.channels_last)
    states = [hooks.step_state(module, SPEC) for module in (plain, lasting)]
    for step in range(4):
        generator = torch.Generator().manual_seed(10 * step + rank)
        for one, other in zip(plain.parameters(), lasting.parameters(), strict=True):
            one.grad = torch.randn(one.shape, generator=generator)
            other.grad = torch.empty_like(other).copy_(one.grad)
        for state in states:
            state.average_gradients()
        for one, other in zip(plain.parameters(), lasting.parameters(), strict=True):
            assert torch.equal(one.grad, other.grad)


def test_memory_formats_do_not_matter() -> None:
    run_group(2, _channels_last)


def test_one_rank_trains_as_without_it() -> None:
    expected, model = train(network(), 0, range(STEPS)), network()
    state = hooks.step_state(model, SPEC)
    assert np.array_equal(train(model, 0, range(STEPS), state=state), expected)
    assert (state.step, state.sent.first, state.sent.second) == (STEPS, 0, 0)


def _small(rank: int) -> None:
    module = nn.Sequential(nn.LayerNorm(4), nn.PReLU())
    module.register_parameter("scale", nn.Parameter(torch.tensor(2.0)))
    module.register_parameter("nothing", nn.Parameter(torch.empty(0, 3)))
    state = hooks.step_state(module, SPEC)
    for step in range(4):
        for number, param in enumerate(module.parameters()):
            param.grad = torch.full_like(param, float(number + rank)) if number else None
        state.average_gradients()
        means = [float(number) + 0.5 if number else 0.0 for number in range(5)]
        for mean, param in zip(means, module.parameters(), strict=True):
            assert (param.grad == mean).all(), step
    assert not state.sent.second


def test_a_model_without_matrices_travels_as_it_is() -> None:
    run_group(2, _small)


# ---- bytes ------------------------------------------------------------------------------------------------------


def _counted(rank: int) -> tuple[int, int, int]:
    ddp = wrapped()
    state = hooks.register(ddp, SPEC)
    train(ddp, rank, range(2))
    before = state.sent
    assert before.first == 2 * _ring(4 * sum(p.numel() for p in ddp.parameters()))
    assert not before.second
    with pytest.MonkeyPatch.context() as patch:
        spy = Spy(patch)
        train(ddp, rank, range(2, 3))
    first, second = (sum(nbytes for _, _, nbytes in state.makeup(leg)) for leg in ("first", "second"))
    assert abs(state.sent.second - _ring(second)) < 4
    return (
        state.sent.first - 2 * _ring(4 * sum(p.numel() for p in ddp.parameters())),
        _ring(first),
        spy.sent - state.sent.second,
    )


def _ring(nbytes: int) -> int:
    return 2 * 2 * nbytes // 3


def test_bytes_are_those_of_a_ring() -> None:
    for sent, formula, seen in run_group(3, _counted):
        assert sent == seen
        assert abs(sent - formula) < 4  # three buffers round on their own


# ---- state ------------------------------------------------------------------------------------------------------


def _resumed(rank: int, half: int) -> None:
    through = wrapped()
    hooks.register(through, SPEC, seed=1)
    train(through, rank, range(STEPS))
    first = wrapped()
    state = hooks.register(first, SPEC, seed=1)
    train(first, rank, range(half))
    saved = state.state_dict()
    module = network()
    module.load_state_dict(first.module.state_dict())
    again = wrapped(module)
    hooks.register(again, SPEC, seed=1).load_state_dict(saved)
    train(again, rank, range(half, STEPS))
    assert np.array_equal(flat_of(again), flat_of(through))


@pytest.mark.parametrize("half", few([4, 1], 1))
def test_resume_is_bitwise(half: int) -> None:
    run_group(2, _resumed, half)


def _state(rank: int) -> dict[str, dict[str, np.ndarray]]:
    ddp = wrapped()
    state = hooks.register(ddp, SPEC)
    train(ddp, rank, range(4))
    saved = own_state(state)
    assert all(name.endswith("weight") for name in saved["error"])
    return {part: {name: value.numpy() for name, value in saved[part].items()} for part in ("error", "q")}


def _fewer(rank: int, old: list[dict]) -> None:
    kept = [{k: {n: torch.from_numpy(a) for n, a in v.items()} for k, v in s.items()} for s in old]
    states = [{f"rank{r}of{len(old)}": {"schema_version": 2, "step": 4} | one} for r, one in enumerate(kept)]
    ddp = wrapped()
    state = hooks.register(ddp, SPEC)
    state.load_state_dict(*states)
    saved = own_state(state)
    for name, value in saved["error"].items():
        np.testing.assert_allclose(value, np.mean([s["error"][name] for s in old], axis=0), atol=1e-7)
        assert np.array_equal(saved["q"][name], old[1]["q"][name])
    train(ddp, rank, range(4, STEPS))


def test_another_number_of_ranks_starts_from_the_mean_error() -> None:
    run_group(2, _fewer, run_group(3, _state))


def _recovering(rank: int, spec: str) -> None:
    ddp, scaler = wrapped(), torch.amp.GradScaler("cpu", init_scale=2.0**10)
    state = hooks.register(ddp, spec, grad_scaler=scaler)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.05)
    for step in range(STEPS):
        optimizer.zero_grad()
        before, kept, (x, y) = flat_of(ddp), own_state(state), batch(rank, step)
        if step in (2, 5) and rank == 1:  # the first compressed step, and a later one
            x[0] = float("inf")
        scaler.scale(nn.functional.cross_entropy(ddp(x), y)).backward()
        scaler.step(optimizer)
        scaler.update()
        assert np.array_equal(flat_of(ddp), before) == (step in (2, 5)), "an overflow skips the step on every rank"
        after = own_state(state)
        assert all(value.isfinite().all() for part in ("error", "q") for value in after[part].values())
        if step in (2, 5):
            assert all(torch.equal(after[part][n], v) for part in ("error", "q") for n, v in kept[part].items())


@pytest.mark.parametrize("columns", few([2, 3], 1))
def test_an_overflow_leaves_the_state_alone(columns: int) -> None:
    run_group(2, _recovering, f"powersgd:rank={columns},start=2")


def _idle_layer(rank: int, columns: int) -> None:
    module = nn.Linear(40, 30, bias=False)
    state = hooks.step_state(module, f"powersgd:rank={columns},start=2")
    generator = torch.Generator().manual_seed(3)
    gradient = torch.randn(30, columns, generator=generator) @ torch.randn(columns, 40, generator=generator)
    for step in range(9):
        module.weight.grad = gradient * (step not in (2, 3, 4))
        state.average_gradients()
        assert module.weight.grad.isfinite().all()
    # a matrix of rank r is its own best approximation of rank r
    torch.testing.assert_close(module.weight.grad, gradient, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("columns", few([2, 1, 3], 1))
def test_a_layer_that_had_no_gradient_comes_back(columns: int) -> None:
    run_group(2, _idle_layer, columns)


def _half(rank: int, dtype: torch.dtype) -> np.ndarray:
    ddp = wrapped(network().to(dtype))
    state = hooks.register(ddp, SPEC)
    for step in range(4):
        ddp.zero_grad()
        x, y = batch(rank, step)
        nn.functional.cross_entropy(ddp(x.to(dtype)).float(), y).backward()
    assert all(value.dtype == torch.float32 for value in own_state(state)["error"].values())
    return torch.cat([p.grad.reshape(-1).float() for p in ddp.parameters()]).numpy()


@pytest.mark.parametrize("dtype", few([torch.bfloat16, torch.float16], 1))
def test_half_precision_gradients_are_averaged_in_float32(dtype: torch.dtype) -> None:
    a, b = run_group(2, _half, dtype)
    assert np.array_equal(a, b)
    assert np.isfinite(a).all()


# ---- settings ---------------------------------------------------------------------------------------------------


def test_it_is_no_codec_and_says_what_it_is() -> None:
    with pytest.raises(FieldError, match=r"--exchange step --uplink powersgd:rank=2"):
        fedq.codec("powersgd:rank=2")


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        ("powersgd:rnak=2", {}, "powersgd:option='rnak'.*did you mean 'rank'"),
        ("powersgd:rank=0", {}, "powersgd:rank='0'.*1 or more"),
        ("powersgd:rank=two", {}, "powersgd:rank='two'.*whole number"),
        ("powersgd:start=1", {}, "powersgd:start='1'.*2 or more"),
        ("powersgd", {"second": "int4"}, "second='int4'"),
        ("powersgd", {"schedule": "two_phase"}, "schedule='two_phase'"),
        ("powersgd", {"feedback": False}, "feedback=False"),
    ],
)
def test_settings_it_cannot_have_are_refused(spec: str, options: dict, message: str) -> None:
    with pytest.raises(FieldError, match=message):
        hooks.step_state(network(), spec, **options)


def test_a_state_of_another_rank_is_refused() -> None:
    state = hooks.step_state(network(), SPEC)
    kept = {"step": 3, "error": {"3.weight": torch.zeros(2, 2)}, "q": {"3.weight": torch.zeros(2, 3)}}
    with pytest.raises(FieldError, match="the same model and rank"):
        state.load_state_dict({"rank0of1": {"schema_version": 2} | kept})
    with pytest.raises(FieldError, match="states"):
        state.load_state_dict()

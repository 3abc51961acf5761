"""What a module may bring to the hook: complex numbers, branches without a gradient, layers that thaw, and what not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from distributed import own_state, run_group
from properties import few
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import fedq
from fedq import hooks
from fedq.collectives.mean import Residuals, encode, encode_unless_zero
from fedq.collectives.segments import SEGMENT, cut
from fedq.errors import FieldError
from fedq.hooks.gradients import gradient_runs
from fedq.hooks.parameters import Parameters, check_bucket

POWERSGD = "powersgd:rank=2,start=2"
FED_BACK = ["int4", "int2", "sign", "ternary", "blocktopk:k=2,block=64,bits=2", "randk:density=0.2", "topk:density=0.1"]


def ranks_agree(module: nn.Module, *, gradients: bool = False) -> bool:
    """Say whether all ranks hold the same parameters, or gradients, bit for bit."""
    tensors = [p.grad if gradients else p.detach() for p in module.parameters()]
    flat = torch.cat([torch.view_as_real(t).reshape(-1) if t.is_complex() else t.reshape(-1) for t in tensors])
    everyones = [torch.empty_like(flat) for _ in range(dist.get_world_size())]
    dist.all_gather(everyones, flat)
    return all(torch.equal(one, flat) for one in everyones)


# ---- complex parameters -----------------------------------------------------------------------------------------


class Wave(nn.Module):
    """A matrix and a bias of complex numbers, and real ones."""

    def __init__(self, dtype: torch.dtype = torch.complex64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(40, 30, dtype=dtype))
        self.bias = nn.Parameter(torch.randn(30, dtype=dtype))
        self.real = nn.Linear(30, 1)

    def forward(self, x: Tensor) -> Tensor:
        z = x.to(self.weight.dtype) @ self.weight + self.bias
        return self.real((z.abs() + z.imag).float())


def _x(rank: int, step: int) -> Tensor:
    return torch.randn(8, 40, generator=torch.Generator().manual_seed(100 * step + rank))


def _complex(rank: int, how: str, spec: str, tolerance: float) -> dict[str, int]:
    module, meant = Wave(), Wave()
    model: nn.Module = module
    if how == "ddp":
        model = DistributedDataParallel(module, bucket_cap_mb=0.001)
        state = hooks.register(model, spec)
    else:
        state = hooks.step_state(module, spec)
    for step in range(5):
        module.zero_grad()
        meant.zero_grad()
        meant.load_state_dict(module.state_dict())
        (sum(meant(_x(r, step)).square().mean() for r in range(2)) / 2).backward()
        model(_x(rank, step)).square().mean().backward()
        if how == "step_state":
            state.average_gradients()
        for got, wanted in zip(module.parameters(), meant.parameters(), strict=True):
            error = (got.grad - wanted.grad).abs().max()
            assert error <= tolerance * wanted.grad.abs().max(), (step, got.shape)
        assert ranks_agree(module, gradients=True)
        with torch.no_grad():
            for param in module.parameters():
                param -= 0.01 * param.grad
    assert ranks_agree(module)
    assert state.numels == {"weight": 2400, "bias": 60, "real.weight": 30, "real.bias": 1}
    return {part: nbytes for name, part, nbytes in state.makeup("first") if name == "bias"}


# fp32: sums in another order than autograd's; int4 has 15 values a block, and adds what it lost to the next step
TOLERANCES = [("int4", 0.3), ("fp32", 1e-5), (POWERSGD, 2.0)]


@pytest.mark.parametrize(
    ("how", "spec", "tolerance"), few([(how, *each) for how in ("ddp", "step_state") for each in TOLERANCES], 2)
)
def test_complex_parameters_are_averaged_as_real_and_imaginary_parts(how: str, spec: str, tolerance: float) -> None:
    for parts in run_group(2, _complex, how, spec, tolerance):
        assert set(parts) == {"exempt"}, "a vector of complex numbers is a vector"


def _conjugate(rank: int) -> None:
    module = nn.ParameterList([nn.Parameter(torch.zeros(5, 3, dtype=torch.complex128)) for _ in range(2)])
    state = hooks.step_state(module, "fp32")
    for limit_bytes in (1 << 20, 1):  # together in a buffer, and each where it lies
        state._runs = gradient_runs(dict(enumerate(module)), limit_bytes)  # type: ignore[attr-defined]
        for param in module:
            param.grad = torch.full((5, 3), complex(rank, 2 * rank), dtype=torch.complex128).conj()
            assert param.grad.is_conj()
        state.average_gradients()
        for param in module:
            assert torch.equal(param.grad, torch.full((5, 3), 0.5 - 1j, dtype=torch.complex128))


def test_conjugate_gradients_are_read_as_what_they_mean() -> None:
    run_group(2, _conjugate)


# ---- segments of zeros ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", FED_BACK)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zeros_travel_as_zeros_and_leave_the_residual_alone(spec: str, dtype: torch.dtype) -> None:
    chosen = fedq.codec(spec).resolved(feedback=True)
    numels = [SEGMENT + 100, 300]
    segments = cut(numels, [(chosen, chosen)] * 2, [0, 1])
    flat = torch.randn(sum(numels), generator=torch.Generator().manual_seed(1)).to(dtype)
    residuals = Residuals()
    encode(segments, "first", flat, 1, residuals)
    assert len(residuals.first) == (3 if chosen.wants_feedback else 0)
    before = {key: value.clone() for key, value in residuals.first.items()}
    flat[SEGMENT : SEGMENT + 100] = 0  # the second segment of the first parameter
    flat[0] = 0  # and a first element that does not tell
    data = encode(segments, "first", flat, 2, residuals)
    parts = data.split([segment.nbytes["first"] for segment in segments])
    decoded = fedq.Payload(parts[1], chosen, (100,), torch.float32, segments[1].seed(2)).decode()
    assert not decoded.any()
    for key, value in residuals.first.items():
        assert torch.equal(value, before[key]) == (key == (0, 1)), key


@pytest.mark.parametrize("spec", FED_BACK)
def test_what_waits_for_no_gpu_gives_the_same(spec: str) -> None:
    chosen = fedq.codec(spec).resolved(feedback=True)
    x, generator = torch.randn(1000), torch.Generator().manual_seed(3)
    for values in (x, torch.zeros(1000), torch.full((1000,), float("nan"))):
        residual = torch.randn(1000, generator=generator)
        expected, kept = residual.clone(), residual.clone()
        wanted = (
            chosen.encode_with_residual(values, expected, seed=5).data
            if values.any()
            else chosen.encode(values, seed=5).data
        )
        out = torch.empty_like(wanted)
        encode_unless_zero(chosen, values, kept, seed=5, out=out)
        assert torch.equal(out, wanted)
        assert torch.equal(kept, expected)


class Branches(nn.Module):
    """A network with a branch that is used now and then."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(16, 64), nn.Linear(64, 64), nn.Linear(64, 4)

    def forward(self, x: Tensor, use: bool) -> Tensor:
        h = self.a(x)
        return self.c(h + self.b(h) if use else h)


def _used(rank: int, step: int, pattern: str) -> bool:
    return {"nobody": step % 2 == 0, "one": step % 2 == 0 or rank == 0, "in turn": step % 2 == rank % 2}[pattern]


def _unused(rank: int, spec: str, pattern: str, schedule: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the branch's summed gradients as applied and as meant on this rank, and what this rank still keeps."""
    module = Branches()
    ddp = DistributedDataParallel(module, find_unused_parameters=True)
    a_node = 2 if schedule == "hierarchical" else 1
    state = hooks.register(ddp, spec, schedule=schedule, ranks_per_node=a_node)
    applied, own = torch.zeros(64, 64), torch.zeros(64, 64)
    for step in range(8):
        x = torch.randn(8, 16, generator=torch.Generator().manual_seed(100 * step + rank))
        alone, use = copy.deepcopy(module), _used(rank, step, pattern)
        alone(x, use).square().mean().backward()
        own += alone.b.weight.grad if use else 0.0
        module.zero_grad()
        ddp(x, use).square().mean().backward()
        applied += 0.0 if module.b.weight.grad is None else module.b.weight.grad
    kept = own_state(state)
    if spec == POWERSGD:
        left = kept["error"]["b.weight"]
    else:
        # A node's residual is of the mean of its ranks, an owner's of the mean of all: in a sum over ranks they count
        # as often as there are such ranks.
        first, second = (kept[leg].get("b.weight/0", torch.zeros(4096)) for leg in ("first", "second"))
        left = a_node * first + dist.get_world_size() * second
    return applied.numpy(), own.numpy(), left.view(64, 64).numpy()


@pytest.mark.parametrize("pattern", few(["in turn", "nobody", "one"], 1))
@pytest.mark.parametrize(
    ("spec", "schedule", "world_size"),
    [
        ("sign", "one_phase", 2),
        (POWERSGD, "auto", 2),
        ("int2", "two_phase", 3),
        pytest.param("sign", "hierarchical", 4, marks=pytest.mark.slow),
    ],
)
def test_nothing_of_a_branch_that_is_used_now_and_then_is_lost(
    pattern: str, spec: str, schedule: str, world_size: int
) -> None:
    results = run_group(world_size, _unused, spec, pattern, schedule)
    applied = results[0][0]
    meant = np.mean([own for _, own, _ in results], axis=0)
    kept = np.mean([left for *_, left in results], axis=0)
    assert np.abs(meant).max() > 1e-3
    # each step rounds in float32 at the size of what was applied or kept, below 1
    np.testing.assert_allclose(applied + kept, meant, atol=8 * 4 * 2.0**-23)


def _discarded_by_nobody(rank: int) -> None:
    module = nn.Linear(64, 64, bias=False)
    state = hooks.step_state(module, "sign", feedback=True)
    generator = torch.Generator().manual_seed(rank)
    module.weight.grad = torch.randn(64, 64, generator=generator)
    state.average_gradients()
    before = own_state(state)["first"]["weight/0"]
    module.weight.grad = None
    state.average_gradients()
    assert not module.weight.grad.any(), "a parameter without a gradient on any rank is not moved by an old residual"
    assert torch.equal(own_state(state)["first"]["weight/0"], before)


def test_without_ddp_a_parameter_without_a_gradient_stays() -> None:
    run_group(2, _discarded_by_nobody)


# ---- frozen, thawed, added --------------------------------------------------------------------------------------


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))


def _step(model: nn.Module, rank: int, step: int) -> None:
    model.zero_grad()
    x = torch.randn(8, 16, generator=torch.Generator().manual_seed(100 * step + rank))
    model(x).square().mean().backward()


def _thaw(rank: int) -> tuple[list[np.ndarray], dict[str, Any]]:
    """Freeze and thaw layers under `step_state`, and return gradients of all steps."""
    module, seen = network(), []
    module[0].requires_grad_(False)
    state = hooks.step_state(module, "int4", seed=2, schedule="two_phase")
    for step in range(6):
        if step in (2, 4):
            module[0].requires_grad_(step == 2)
            module[2].requires_grad_(step == 4)
        _step(module, rank, step)
        state.average_gradients()
        grads = [p.grad for p in module.parameters() if p.requires_grad]
        assert all(p.grad is None for p in module.parameters() if not p.requires_grad)
        seen.append(torch.cat([grad.reshape(-1) for grad in grads]).numpy().copy())
    return seen, state.makeup("first")


def test_layers_that_are_frozen_and_thawed_are_averaged_while_they_are_trained() -> None:
    (first, parts), (second, _) = run_group(2, _thaw)
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
    body, head = 64 * 64 + 64, 64 * 4 + 4
    assert [len(grads) for grads in first] == [body + head] * 2 + [16 * 64 + 64 + head] * 2 + [body + head] * 2
    assert {name for name, *_ in parts} == {"2.weight", "2.bias", "4.weight", "4.bias"}


def _same_numbers_however_frozen(rank: int) -> None:
    """A state keeps its place when layers thaw: residuals of one pattern load into the other."""
    frozen, whole = network(), network()
    frozen[0].requires_grad_(False)
    states = [hooks.step_state(module, "sign", schedule="two_phase") for module in (frozen, whole)]
    _step(frozen, rank, 0)
    states[0].average_gradients()
    states[1].load_state_dict(states[0].state_dict())
    ours, theirs = own_state(states[1]), own_state(states[0])
    for leg in ("first", "second"):
        assert theirs[leg].keys() <= ours[leg].keys(), "the same owners"
        assert all(torch.equal(ours[leg][key], value) for key, value in theirs[leg].items())


def test_owners_do_not_depend_on_what_is_frozen() -> None:
    run_group(3, _same_numbers_however_frozen)


def _frozen_before(rank: int, spec: str) -> None:
    ddp = DistributedDataParallel(network(), find_unused_parameters=True)
    ddp.module[0].requires_grad_(False)
    hooks.register(ddp, spec)
    for step in range(4):
        if step == 2:
            ddp.module[2].requires_grad_(False)
        _step(ddp, rank, step)
        assert [p.grad is not None for p in ddp.parameters()] == [False] * 2 + [step < 2] * 2 + [True] * 2
        assert ranks_agree(ddp.module[4], gradients=True)


@pytest.mark.parametrize("spec", few([POWERSGD, "int4"], 1))
def test_layers_may_be_frozen_under_ddp(spec: str) -> None:
    run_group(2, _frozen_before, spec)


def _thawed_under_ddp(rank: int, spec: str) -> None:
    module = network()
    module[0].requires_grad_(False)
    ddp = DistributedDataParallel(module)
    hooks.register(ddp, spec)
    _step(ddp, rank, 0)
    module[0].requires_grad_(True)
    with pytest.raises(FieldError, match=r"parameters=.*0\.weight, 0\.bias.*DDP averages"):
        _step(ddp, rank, 1)


@pytest.mark.parametrize("spec", few(["int4", POWERSGD], 1))
def test_what_ddp_does_not_average_is_refused_by_name(spec: str) -> None:
    run_group(2, _thawed_under_ddp, spec)


def _thawed_before_registration(rank: int, resumed: bool) -> None:
    module = network()
    module[0].requires_grad_(False)
    ddp = DistributedDataParallel(module)
    module[0].requires_grad_(True)
    state = hooks.register(ddp, "int4")
    if resumed:
        state.load_state_dict({f"rank{rank}of2": own_state(state) | {"step": 7}})
    with pytest.raises(FieldError, match=r"0\.weight, 0\.bias"):
        _step(ddp, rank, 0)


@pytest.mark.parametrize("resumed", few([True, False], 1))
def test_what_was_thawed_between_ddp_and_registration_is_refused_too(resumed: bool) -> None:
    run_group(2, _thawed_before_registration, resumed)


def _ignored(rank: int) -> None:
    module = network()
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, ["0.weight", "0.bias"])
    ddp = DistributedDataParallel(module)
    hooks.register(ddp, "int4")
    for step in range(2):
        _step(ddp, rank, step)
    assert ranks_agree(module[4], gradients=True)


def test_what_ddp_was_asked_to_ignore_is_its_users_business() -> None:
    run_group(2, _ignored)


def _add_layer(module: nn.Sequential) -> None:
    module.append(nn.Linear(4, 4))


def _replace_parameter(module: nn.Sequential) -> None:
    module[2].weight = nn.Parameter(module[2].weight.detach().clone())


def _add_frozen_then_thaw(module: nn.Sequential) -> None:
    layer = nn.Linear(4, 4).requires_grad_(False)
    module.append(layer)


def _added(rank: int, spec: str, change: Callable[[nn.Sequential], None], name: str) -> None:
    module = network()
    state = hooks.step_state(module, spec)
    _step(module, rank, 0)
    state.average_gradients()
    change(module)
    _step(module, rank, 1)
    if change is _add_frozen_then_thaw:
        state.average_gradients()
        module[-1].requires_grad_(True)
        _step(module, rank, 2)
    with pytest.raises(FieldError, match=name):
        state.average_gradients()


@pytest.mark.parametrize("spec", few(["int4", POWERSGD], 1))
@pytest.mark.parametrize(
    ("change", "name"),
    [
        (_add_layer, r"5\.weight, 5\.bias"),
        (_replace_parameter, r"2\.weight"),
        (_add_frozen_then_thaw, r"5\.weight, 5\.bias"),
    ],
)
def test_parameters_that_are_new_are_refused_by_name(spec: str, change: Callable, name: str) -> None:
    run_group(2, _added, spec, change, name)


def _thawed_under_powersgd(rank: int) -> None:
    module = network()
    module[0].requires_grad_(False)
    state = hooks.step_state(module, POWERSGD)
    module[0].requires_grad_(True)
    _step(module, rank, 0)
    with pytest.raises(FieldError, match=r"0\.weight, 0\.bias.*under powersgd"):
        state.average_gradients()


def test_powersgd_refuses_what_thaws() -> None:
    run_group(2, _thawed_under_powersgd)


# ---- what is refused at registration ----------------------------------------------------------------------------


def _sharded(rank: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    whole = network()
    fully_shard(whole, mesh=mesh)
    parallel = parallelize_module(network(), mesh, {"2": ColwiseParallel()})
    for module, name in ((whole, r"0\.weight"), (parallel, r"2\.weight")):
        with pytest.raises(FieldError, match=rf"parameter='{name}, a DTensor \(S\(0\)\)'.*FSDP2"):
            hooks.step_state(module, "int4")
    flat = FullyShardedDataParallel(network(), device_id=torch.device("cpu"))
    with pytest.raises(FieldError, match="FullyShardedDataParallel"):
        hooks.step_state(flat, "int4")
    with pytest.raises(FieldError, match=r"DistributedDataParallel.*hooks\.register"):
        hooks.step_state(DistributedDataParallel(network()), "int4")


def test_sharded_parameters_are_refused_by_name() -> None:
    run_group(2, _sharded)


class Lookup(nn.Module):
    """Has sparse gradients that nobody can see beforehand."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.ones(20, 4))

    def forward(self, rows: Tensor) -> Tensor:
        return nn.functional.embedding(rows, self.table, sparse=True)


def _sparse(rank: int) -> None:
    for make in (
        lambda module: hooks.step_state(module, "int4"),
        lambda module: hooks.register(DistributedDataParallel(module), "int4"),
    ):
        with pytest.raises(FieldError, match=r"gradient='sparse, of 1\.weight'.*dense"):
            make(nn.Sequential(nn.Flatten(), nn.Embedding(20, 4, sparse=True)))
    unseen = Lookup()
    state = hooks.step_state(unseen, "int4")
    unseen(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(FieldError, match=r"gradient='sparse'.*dense"):
        state.average_gradients()


def test_sparse_gradients_are_refused() -> None:
    run_group(2, _sparse)


def test_what_has_no_values_or_nothing_to_train_is_refused() -> None:
    with pytest.raises(FieldError, match=r"parameter='0\.weight, without values yet'"):
        hooks.step_state(nn.Sequential(nn.LazyLinear(8)), "int4")
    with pytest.raises(FieldError, match="requires a gradient"):
        hooks.step_state(network().requires_grad_(False), "int4")


def test_a_bucket_of_another_length_is_refused() -> None:
    params = [torch.zeros(3, 2), torch.zeros(4, dtype=torch.complex64)]
    check_bucket(torch.zeros(14), params, ["a", "b"])
    with pytest.raises(FieldError, match=r"bucket='13 numbers for a, b'.*14"):
        check_bucket(torch.zeros(13), params, ["a", "b"])


def test_names_are_those_without_the_compiler() -> None:
    module = network()
    whole, inner = torch.compile(module), network()
    inner[2] = torch.compile(inner[2])
    names = [name for name, _ in module.named_parameters()]
    assert any("_orig_mod" in name for name, _ in whole.named_parameters())
    assert Parameters(whole).names == names
    assert Parameters(inner).names == names

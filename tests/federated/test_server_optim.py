"""Server optimizers: against the published equations in float64, against torch's SGD, and by their spec strings."""

from __future__ import annotations

import copy
import inspect
import io
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from properties import tried
from torch import Tensor, nn

from fedq.errors import FieldError
from fedq.federated.optim import (
    SERVER_OPTIMIZERS,
    FedAdagrad,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedYogi,
    server_optimizer,
)

ALL = (FedAvg, FedAvgM, FedAdagrad, FedAdam, FedYogi)

needs_muon = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon (2.9 and later do)")


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


def follow(optimizer: torch.optim.Optimizer, param: nn.Parameter, updates: np.ndarray) -> np.ndarray:
    """Return the parameter after each mean client update."""
    path = []
    for update in updates:
        param.grad = -torch.from_numpy(update)
        optimizer.step()
        path.append(param.detach().numpy().copy())
    return np.stack(path)


# The equations of the papers, in float64, written with the update D and not with a gradient.


def fedavg(x, updates, lr):
    for d in updates:
        x = x + lr * d
        yield x


def fedavgm(x, updates, lr, momentum, nesterov=False):
    velocity = np.zeros_like(x)
    for d in updates:
        velocity = momentum * velocity + d
        x = x + lr * (d + momentum * velocity if nesterov else velocity)
        yield x


def fedadagrad(x, updates, lr, tau, v0=0.0):
    v = np.full_like(x, v0)
    for d in updates:
        v = v + d**2
        x = x + lr * d / (np.sqrt(v) + tau)
        yield x


def fedadam(x, updates, lr, betas, tau, v0=0.0):
    m, v = np.zeros_like(x), np.full_like(x, v0)
    for d in updates:
        m = betas[0] * m + (1 - betas[0]) * d
        v = betas[1] * v + (1 - betas[1]) * d**2
        x = x + lr * m / (np.sqrt(v) + tau)
        yield x


def fedyogi(x, updates, lr, betas, tau, v0=0.0):
    m, v = np.zeros_like(x), np.full_like(x, v0)
    for d in updates:
        m = betas[0] * m + (1 - betas[0]) * d
        v = v - (1 - betas[1]) * d**2 * np.sign(v - d**2)
        x = x + lr * m / (np.sqrt(v) + tau)
        yield x


CASES = [
    (FedAvg, fedavg, {"lr": 0.7}),
    (FedAvgM, fedavgm, {"lr": 0.3, "momentum": 0.9}),
    (FedAvgM, fedavgm, {"lr": 0.3, "momentum": 0.8, "nesterov": True}),
    (FedAdagrad, fedadagrad, {"lr": 0.1, "tau": 1e-3}),
    (FedAdagrad, fedadagrad, {"lr": 0.1, "tau": 1e-2, "v0": 1e-4}),
    (FedAdam, fedadam, {"lr": 0.01, "betas": (0.9, 0.99), "tau": 1e-3}),
    (FedAdam, fedadam, {"lr": 0.05, "betas": (0.0, 0.9), "tau": 1e-2, "v0": 0.25}),
    (FedYogi, fedyogi, {"lr": 0.01, "betas": (0.9, 0.99), "tau": 1e-3}),
    (FedYogi, fedyogi, {"lr": 0.05, "betas": (0.5, 0.9), "tau": 1e-2, "v0": 0.25}),
]


@pytest.mark.parametrize(("cls", "equations", "options"), CASES)
@tried(20)
@given(seed=st.integers(0, 2**32 - 1))
def test_trajectories_follow_the_published_equations(
    cls: type[torch.optim.Optimizer], equations: Callable, options: dict, seed: int
):
    rng = np.random.default_rng(seed)
    updates = rng.normal(size=(8, 5)).astype(np.float32) * np.float32([0.01, 0.1, 1, 3, 1])
    updates[3] = 0  # nobody moved
    updates[:, 4] = 0  # a parameter that never moves
    start = rng.normal(size=5).astype(np.float32)
    param = nn.Parameter(torch.from_numpy(start.copy()))
    path = follow(cls([param], **options), param, updates)
    expected = np.stack(list(equations(start.astype(np.float64), updates.astype(np.float64), **options)))
    # Eight steps of about ten float32 operations, each wrong by at most 2^-24 of the largest number it meets.
    tolerance = 80 * 2**-24 * max(1.0, np.abs(expected).max())
    np.testing.assert_allclose(path, expected, rtol=0, atol=tolerance)
    assert (path[:, 4] == start[4]).all()


def test_yogi_takes_both_signs_where_adam_only_decays():
    # D^2 = 1 grows v from 0.01 to 0.02; D^2 = 0.0001 is below v and shrinks it by 1 % of D^2, not by 1 % of v.
    param = nn.Parameter(torch.zeros(1))
    optimizer = FedYogi([param], betas=(0.9, 0.99))
    seen = []
    for update in (1.0, 1.0, 0.01, 0.0):
        param.grad = torch.tensor([-update])
        optimizer.step()
        seen.append(optimizer.state[param]["second_moment"].item())
    # By hand; float32 rounding of numbers near 0.02 is 1e-9.
    assert seen == pytest.approx([0.01, 0.02, 0.02 - 0.01 * 1e-4, 0.02 - 0.01 * 1e-4], abs=4e-9)


@pytest.mark.parametrize(
    ("cls", "step"),
    [
        # After one update D = 2 from x = 1, by hand from the documented defaults.
        (FedAvg, 2.0),
        (FedAvgM, 2.0),
        (FedAdagrad, 0.1 * 2 / (2 + 1e-3)),
        (FedAdam, 0.01 * 0.2 / (0.2 + 1e-3)),
        (FedYogi, 0.01 * 0.2 / (0.2 + 1e-3)),
    ],
)
def test_default_options_are_the_documented_ones(cls, step):
    param = nn.Parameter(torch.ones(()))
    param.grad = torch.tensor(-2.0)
    cls([param]).step()
    assert param.item() == pytest.approx(1 + step, abs=1e-6)  # a few roundings of numbers near 1 and 3


@pytest.mark.parametrize("cls", ALL)
def test_without_any_update_nothing_moves_and_nothing_is_nan(cls):
    param = nn.Parameter(torch.randn(4))
    before = param.detach().clone()
    optimizer = cls([param])
    for _ in range(3):
        param.grad = torch.zeros(4)
        optimizer.step()
    assert torch.equal(param, before)


def model_and_updates() -> tuple[nn.Module, list[list[Tensor]]]:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 5))
    model = model.to(memory_format=torch.channels_last)
    return model, [[torch.randn_like(p) for p in model.parameters()] for _ in range(6)]


def apply(optimizer: torch.optim.Optimizer, model: nn.Module, updates: list[list[Tensor]]) -> None:
    for update in updates:
        for param, d in zip(model.parameters(), update, strict=True):
            param.grad = -d
        optimizer.step()


def test_fedavg_with_lr_one_adds_the_update_exactly():
    model, updates = model_and_updates()
    before = [param.detach().clone() for param in model.parameters()]
    apply(FedAvg(model.parameters()), model, updates[:1])
    for param, x, d in zip(model.parameters(), before, updates[0], strict=True):
        assert torch.equal(param, x + d)


@pytest.mark.parametrize(
    ("spec", "torch_spec"),
    [
        ("fedavg", "SGD:lr=1"),
        ("fedavg:lr=0.3", "sgd:lr=0.3"),
        ("fedavgm", "SGD:lr=1,momentum=0.9"),
        ("fedavgm:lr=0.5,momentum=0.7,nesterov=true", "SGD:lr=0.5,momentum=0.7,nesterov=true"),
    ],
)
def test_fedavg_and_fedavgm_equal_torchs_sgd_bitwise(spec, torch_spec):
    model, updates = model_and_updates()
    twin = copy.deepcopy(model)
    apply(server_optimizer(spec, model.parameters()), model, updates)
    apply(server_optimizer(torch_spec, twin.parameters()), twin, updates)
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", SERVER_OPTIMIZERS)
def test_state_dict_round_trip_continues_bitwise(name):
    model, updates = model_and_updates()
    optimizer = server_optimizer(f"{name}:lr=0.02", model.parameters())
    apply(optimizer, model, updates[:3])
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    twin = copy.deepcopy(model)
    resumed = server_optimizer(name, twin.parameters())
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert optimizer.state[ours].keys() == resumed.state[theirs].keys()
        for key, value in optimizer.state[ours].items():
            assert value.dtype == torch.float32
            assert torch.equal(value, resumed.state[theirs][key])
    apply(optimizer, model, updates[3:])
    apply(resumed, twin, updates[3:])
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("cls", ALL)
def test_parameters_without_a_gradient_stay_and_groups_have_their_own_rate(cls):
    moved, still, idle = (nn.Parameter(torch.ones(2)) for _ in range(3))
    optimizer = cls([{"params": [moved, idle]}, {"params": [still], "lr": 0.0}])
    moved.grad = still.grad = -torch.ones(2)
    assert optimizer.step(lambda: 3.0) == 3.0
    assert (moved > 1).all()
    assert torch.equal(still, torch.ones(2))
    assert torch.equal(idle, torch.ones(2))
    assert idle not in optimizer.state


def test_only_float32_parameters_are_accepted():
    optimizer = FedAdam([nn.Parameter(torch.zeros(2))])
    with pytest.raises(FieldError, match=r"params='torch.bfloat16' .*torch.float32"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))]})
    assert len(optimizer.param_groups) == 1


TORCHS = [
    name
    for name, cls in vars(torch.optim).items()
    if inspect.isclass(cls)
    and issubclass(cls, torch.optim.Optimizer)
    and name not in ("Optimizer", "LBFGS", "SparseAdam")
]


@pytest.mark.parametrize("name", [*SERVER_OPTIMIZERS, *TORCHS])
def test_every_name_in_any_case_moves_the_model_towards_the_clients(name):
    for spelled in (name, name.lower(), name.upper()):
        param = nn.Parameter(torch.randn(3, 4))
        before = param.detach().clone()
        optimizer = server_optimizer(f"{spelled}:lr=0.01", [param])
        assert type(optimizer).__name__.lower() == name.lower()
        update = torch.randn(3, 4)
        param.grad = -update
        optimizer.step()
        assert torch.dot((param.detach() - before).flatten(), update.flatten()) > 0


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("fedadam:lr=0.5,tau=0.01,betas=0.5/0.75,v0=1e-6", {"lr": 0.5, "tau": 0.01, "betas": (0.5, 0.75), "v0": 1e-6}),
        (" FedAvgM : lr = 2 , nesterov = True ", {"lr": 2.0, "momentum": 0.9, "nesterov": True}),
        ("AdamW:lr=1e-3,betas=0.8/0.9,amsgrad=true", {"lr": 1e-3, "betas": (0.8, 0.9), "amsgrad": True}),
        ("SGD:lr=0.5,momentum=0.9,foreach=none", {"lr": 0.5, "momentum": 0.9, "foreach": None}),
        ("adafactor:eps=none/0.01", {"eps": (None, 0.01)}),
        pytest.param(
            "Muon:ns_steps=3,adjust_lr_fn=original", {"ns_steps": 3, "adjust_lr_fn": "original"}, marks=needs_muon
        ),
    ],
)
def test_options_reach_the_class(spec, expected):
    optimizer = server_optimizer(spec, [nn.Parameter(torch.zeros(2, 2))])
    assert {key: optimizer.defaults[key] for key in expected} == expected


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("", "adadelta.*fedyogi"),
        ("fedadm", r"\(did you mean 'fedadam'\?\)"),
        ("AdmW:lr=1", r"\(did you mean 'adamw'\?\)"),
        ("optimizer", "allowed: adadelta"),
        ("LBFGS", "any optimizer but lbfgs: it evaluates the loss again and again"),
        ("SparseAdam:lr=1", "any optimizer but sparseadam: it takes sparse gradients only"),
        ("fedavg:", "name=value, each name once, of lr"),
        ("fedavg:0.1", "name=value, each name once, of lr"),
        ("fedadam:lr=1,lr=2", "each name once"),
        ("fedadam:taw=1", r"betas, lr, tau, v0 \(did you mean 'tau'\?\)"),
        ("fedadam:params=1", "betas, lr, tau, v0"),
        ("sgd:maximize=true", "dampening, foreach, fused, lr, momentum, nesterov, weight_decay"),
        ("fedavg:lr=fast", "lr=a finite number"),
        ("fedavg:lr=nan", "lr=a finite number"),
        ("sgd:lr=inf", "lr=a finite number"),
        ("fedavgm:nesterov=1", "nesterov=true or false"),
        ("adam:foreach=maybe", "foreach=none or true or false"),
        pytest.param("muon:ns_steps=2.5", "ns_steps=an integer", marks=needs_muon),
        ("adamw:betas=0.9", "betas=a finite number/a finite number"),
        ("adamw:betas=0.9/0.99/0.999", "betas=a finite number/a finite number"),
        ("fedavg:lr=-1", "lr: a finite number of at least 0"),
        ("fedavgm:momentum=1", "momentum: 0 to below 1"),
        ("fedadagrad:tau=0", "tau: a finite number above 0"),
        ("fedyogi:betas=0.9/1", "betas: two of 0 to below 1"),
        ("fedadam:v0=-1", "v0: a finite number of at least 0"),
        ("sgd:lr=-1", "what SGD accepts; it says: Invalid learning rate"),
        pytest.param("muon", "what Muon accepts; it says: Muon only supports 2D", marks=needs_muon),
        ("adamw:fused=true,foreach=true", "what AdamW accepts; it says: .*fused"),
    ],
)
def test_bad_specs_are_named(spec, message):
    with pytest.raises(FieldError, match=message) as caught:
        server_optimizer(spec, [nn.Parameter(torch.zeros(2))])
    assert (caught.value.field, caught.value.value) == ("server", spec)
    assert str(caught.value).startswith(f"server={spec!r} is not allowed")

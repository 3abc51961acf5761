"""The server against float64 arithmetic by hand: averages, steps, statistics, and the replica that follows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from properties import tried
from torch import Tensor, nn

from fedq.errors import FieldError
from fedq.federated.aggregate import aggregate, apply_change
from fedq.federated.optim import server_optimizer
from fedq.federated.server import Server
from fedq.federated.training import RoundContext
from fedq.layout import Layout
from fedq.wire import Frame, Kind, join_payloads

CPU = torch.device("cpu")
EPS = 2.0**-23  # one float32 rounding, relative


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 36, 10))


def update(layout: Layout, seed: int, scale: float = 0.1) -> Tensor:
    return scale * torch.randn(layout.numel, generator=torch.Generator().manual_seed(seed))


def frame(layout: Layout, client: int, weight: float, flat: Tensor | None) -> Frame:
    seed = client << 32 | 5
    body = torch.empty(0, dtype=torch.uint8) if flat is None else join_payloads(layout, layout.encode(flat, seed=seed))
    kind = Kind.LEFT_OUT if flat is None else Kind.UPDATE
    return Frame(kind, 0, client, layout.hash, seed, weight, 0.0, 0.0, body)


def decoded(layout: Layout, flat: Tensor, client: int) -> np.ndarray:
    parts = [payload.decode().flatten() for payload in layout.encode(flat, seed=client << 32 | 5)]
    return torch.cat(parts).double().numpy()


def server_of(layout: Layout, initial: Tensor, spec: str = "fedavg") -> Server:
    return Server(initial, layout, lambda params: server_optimizer(spec, params))


# ---- averaging ----


@pytest.mark.parametrize("spec", ["fp32", "int4", "sign", "topk:density=0.1", "threshold:value=0.1"])
def test_the_mean_is_the_weighted_mean_of_decoded_payloads(model: nn.Module, spec: str) -> None:
    layout, weights = Layout.of(model, spec), [30.0, 7.0, 63.0]
    updates = [update(layout, i) for i in range(3)]
    frames = [frame(layout, i, w, u) for i, (w, u) in enumerate(zip(weights, updates, strict=True))]
    result = aggregate(layout, frames, CPU)
    expected = np.average([decoded(layout, u, i) for i, u in enumerate(updates)], axis=0, weights=weights)
    assert result.left_out == {}
    # three products and three sums in float32, of values of at most a few tenths
    np.testing.assert_allclose(result.mean.numpy(), expected, rtol=0, atol=6 * EPS * np.abs(expected).max())
    backwards = aggregate(layout, frames[::-1], CPU)
    assert torch.equal(backwards.mean, result.mean)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_bad_updates_are_left_out_and_named(model: nn.Module, bad: float) -> None:
    layout = Layout.of(model, "fp32")
    broken = update(layout, 9)
    broken[17] = bad
    frames = [
        frame(layout, 0, 10.0, update(layout, 0)),
        frame(layout, 4, 1000.0, None),
        frame(layout, 6, 500.0, broken),
        frame(layout, 7, 30.0, update(layout, 7)),
    ]
    result = aggregate(layout, frames, CPU)
    assert result.left_out == {4: "update is not finite", 6: "decoded update is not finite"}
    kept = [decoded(layout, update(layout, i), i) for i in (0, 7)]
    expected = np.average(kept, axis=0, weights=[10.0, 30.0])
    np.testing.assert_allclose(result.mean.numpy(), expected, rtol=0, atol=4 * EPS * np.abs(expected).max())


@pytest.mark.parametrize("spec", ["int4", "int8:block=256", "sign", "topk:density=0.5"])
def test_a_nan_under_a_lossy_codec_is_seen_after_decoding(model: nn.Module, spec: str) -> None:
    layout = Layout.of(model, spec)
    frames = [frame(layout, i, 1.0, torch.full((layout.numel,), float("nan")) if i else None) for i in range(3)]
    result = aggregate(layout, frames, CPU)
    assert result.mean is None
    assert sorted(result.left_out) == [0, 1, 2]


def test_nobody_left_gives_no_mean(model: nn.Module) -> None:
    layout = Layout.of(model, "int4")
    assert aggregate(layout, [frame(layout, 3, 5.0, None)], CPU).mean is None
    assert aggregate(layout, [], CPU).mean is None


@pytest.mark.parametrize("other", ["int8", "int4:block=64"])
def test_a_frame_of_another_layout_is_refused(model: nn.Module, other: str) -> None:
    layout, foreign = Layout.of(model, "int4"), Layout.of(model, other)
    sent = frame(foreign, 0, 1.0, update(foreign, 0))
    with pytest.raises(FieldError, match=f"frame layout='{foreign.hash:016x}'.*{layout.hash:016x}"):
        aggregate(layout, [sent], CPU)
    with pytest.raises(FieldError, match="frame layout"):
        apply_change(layout, sent, torch.zeros(layout.numel))


# ---- stepping ----


def _adaptive(rule):
    def move(x, updates):
        m, v, tau, lr = 0.0, 0.0, 1e-3, 0.1
        for d in updates:
            m, v = rule(m, v, d)
            x = x + lr * m / (np.sqrt(v) + tau)
        return x

    return move


def _momentum(x, updates):
    velocity = 0.0
    for d in updates:
        velocity = 0.9 * velocity + d
        x = x + velocity
    return x


BY_HAND = {
    "fedavg": lambda x, updates: x + sum(updates),
    "fedavg:lr=0.5": lambda x, updates: x + 0.5 * sum(updates),
    "fedavgm": _momentum,
    "fedadagrad:lr=0.1": _adaptive(lambda m, v, d: (d, v + d * d)),
    "fedadam:lr=0.1": _adaptive(lambda m, v, d: (0.9 * m + 0.1 * d, 0.99 * v + 0.01 * d * d)),
    "fedyogi:lr=0.1": _adaptive(lambda m, v, d: (0.9 * m + 0.1 * d, v - 0.01 * d * d * np.sign(v - d * d))),
    "sgd:lr=0.3": lambda x, updates: x + 0.3 * sum(updates),
}


@pytest.mark.parametrize("spec", BY_HAND)
def test_a_step_moves_parameters_by_the_optimizer_and_statistics_by_the_mean(model: nn.Module, spec: str) -> None:
    layout = Layout.of(model, "fp32")
    initial, updates = layout.flatten(model), [update(layout, seed, 0.01) for seed in range(4)]
    server = server_of(layout, initial, spec)
    for mean in updates:
        server.step(mean)
    x, exact = initial.double().numpy(), [u.double().numpy() for u in updates]
    params, stats = slice(0, layout.num_params), slice(layout.num_params, layout.numel)
    expected = BY_HAND[spec](x[params], [d[params] for d in exact])
    # a few float32 roundings in each of four steps on values of about 1; the adaptive rules divide by small roots
    np.testing.assert_allclose(server.master[params].numpy(), expected, rtol=2e-5, atol=2e-6)
    np.testing.assert_allclose(server.master[stats].numpy(), x[stats] + sum(d[stats] for d in exact), atol=2e-6)
    assert not torch.equal(server.master, initial)
    assert torch.equal(initial, layout.flatten(model)), "the server moves a copy"


def test_a_variance_never_becomes_negative(model: nn.Module) -> None:
    layout = Layout.of(model, "int4")
    server = server_of(layout, layout.flatten(model))
    server.step(torch.full((layout.numel,), -5.0))
    views = layout.views(server.master)
    assert torch.equal(views["1.running_var"], torch.zeros(8))
    assert torch.equal(views["1.running_mean"], torch.full((8,), -5.0))


def test_integer_buffers_never_travel(model: nn.Module) -> None:
    layout = Layout.of(model, "int4")
    assert all("num_batches_tracked" not in span.name for span in layout.spans)
    model[1].num_batches_tracked.fill_(7)
    layout.unflatten_(update(layout, 0), model)
    assert int(model[1].num_batches_tracked) == 7
    model[1].num_batches_tracked.zero_()


# ---- the replica ----


@tried(12)
@given(st.sampled_from(["int8", "int4", "sign", "topk:density=0.1", "bf16"]), st.integers(1, 6), st.integers(0, 99))
def test_what_the_downlink_loses_stays_in_the_difference(model: nn.Module, spec: str, rounds: int, seed: int) -> None:
    layout = Layout.of(model, spec)
    initial = torch.randn(layout.numel, generator=torch.Generator().manual_seed(seed)).abs()
    server, replica = server_of(layout, initial), initial.clone()
    sent = np.zeros(layout.numel)
    for number in range(rounds):
        server.step(update(layout, 1000 * seed + number))
        gap = server.master - replica
        change = server.change(replica, RoundContext(number, 0.1, seed))
        decoded_change = torch.zeros(layout.numel)
        apply_change(layout, change, decoded_change)
        apply_change(layout, Frame.unpack(change.pack()), replica)
        sent += decoded_change.double().numpy()
        # the residual is what this change lost; one float32 rounding of the replica, whose values are below 8
        lost = (gap - decoded_change).double().numpy()
        np.testing.assert_allclose((server.master - replica).double().numpy(), lost, rtol=0, atol=8 * EPS)
    total = (server.master.double() - initial.double()).numpy()
    residual = (server.master.double() - replica.double()).numpy()
    np.testing.assert_allclose(total - sent, residual, rtol=0, atol=8 * EPS * rounds)


def test_a_replica_follows_a_float32_downlink_to_rounding(model: nn.Module) -> None:
    layout = Layout.of(model, "fp32")
    server, replica = server_of(layout, layout.flatten(model)), layout.flatten(model)
    for number in range(10):
        server.step(update(layout, number))
        apply_change(layout, server.change(replica, RoundContext(number, 0.1, 0)), replica)
        assert bool(((replica - server.master).abs() <= EPS * server.master.abs().clamp(min=0.1)).all())


def test_a_resting_master_is_reached(model: nn.Module) -> None:
    """Every element is sent once topk has had its turns; nothing is lost for ever."""
    layout = Layout.of(model, "topk:density=0.3")
    server, replica = server_of(layout, layout.flatten(model)), layout.flatten(model)
    server.step(update(layout, 0))
    for number in range(12):
        apply_change(layout, server.change(replica, RoundContext(number, 0.1, 0)), replica)
    torch.testing.assert_close(replica, server.master, rtol=1e-6, atol=1e-7)

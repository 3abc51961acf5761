"""Local training against a plain loop, and the message that an update becomes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from clients import client_on
from local_training import DECAY, MEAN, MOMENTUM, STD, small_model, start_of, training
from torch import Tensor, nn
from torch.nn import functional

from fedq.data import Split
from fedq.engines.precision import choose_precision
from fedq.errors import FieldError
from fedq.federated.client import Client
from fedq.federated.training import RoundContext, is_finite
from fedq.feedback import ErrorFeedback, NoFeedback, ResidualStore
from fedq.layout import Layout, LayoutSchedule
from fedq.wire import Kind, split_body


@pytest.fixture(scope="module")
def split() -> Split:
    generator = torch.Generator().manual_seed(3)
    images = torch.randint(256, (60, 3, 8, 8), dtype=torch.uint8, generator=generator)
    return Split(images, torch.randint(4, (60,), generator=generator))


def plain_loop(split: Split, order: list[Tensor], lr: float, mu: float, dtype: torch.dtype) -> nn.Module:
    """Ten lines of PyTorch: SGD on the cross-entropy plus mu / 2 |w - w_0|^2, by autograd."""
    model = small_model().to(dtype).train()
    first = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=MOMENTUM, weight_decay=DECAY, foreach=False)
    mean, std = (torch.tensor(v, dtype=dtype).view(3, 1, 1) for v in (MEAN, STD))
    for picked in order:
        loss = functional.cross_entropy(
            model((split.images[picked].to(dtype) / 255 - mean) / std), split.labels[picked]
        )
        for param, anchor in zip(model.parameters(), first, strict=True):
            loss = loss + mu / 2 * (param - anchor).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def orders(indices: Tensor, batch: int, passes: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        part for _ in range(passes) for part in indices[torch.randperm(len(indices), generator=generator)].split(batch)
    ]


@pytest.mark.parametrize("mu", [0.0, 0.5])
@pytest.mark.parametrize(("epochs", "steps"), [(2, None), (1, 3), (1, 9)])
def test_local_training_is_a_plain_loop(split: Split, mu: float, epochs: int, steps: int | None) -> None:
    local, indices = training(split, prox_mu=mu, epochs=epochs, steps=steps), torch.arange(5, 45, 2)
    trained = local.run(start_of(local), indices, lr=0.05, seed=11)
    order = orders(indices, 8, 4 if steps else epochs, 11)[:steps]
    expected = local.layout.flatten(plain_loop(split, order, 0.05, mu, torch.float64)).double()
    assert trained.num_steps == len(order)
    moved = float((expected - start_of(local)).abs().max())
    # at most nine float32 steps against float64: rounding of 2^-24 amplified by BatchNorm, far below the movement
    torch.testing.assert_close(trained.flat.double(), expected, rtol=1e-4, atol=1e-4 * moved)


def test_prox_pulls_towards_the_start(split: Split) -> None:
    def distance(mu: float) -> float:
        local = training(split, prox_mu=mu, epochs=3)
        trained = local.run(start_of(local), torch.arange(40), lr=0.05, seed=0)
        return float((trained.flat - start_of(local))[: local.layout.num_params].norm())

    assert distance(4.0) < 0.7 * distance(0.0)


def test_loss_and_accuracy_are_means_over_the_images_seen(split: Split) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
    frozen = training(split, model, make_optimizer=lambda params, lr: torch.optim.SGD(params, lr=0.0))
    indices = torch.arange(21)  # batches of 8, 8 and 5
    trained = frozen.run(frozen.layout.flatten(model), indices, lr=0.1, seed=0)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    logits = model((split.images[indices] / 255 - mean) / std).detach()
    assert trained.loss == pytest.approx(float(functional.cross_entropy(logits, split.labels[indices])), rel=1e-5)
    assert trained.accuracy == pytest.approx(float((logits.argmax(1) == split.labels[indices]).double().mean()))


@pytest.mark.parametrize(
    ("num", "epochs", "steps", "expected"),
    [(5, 1, None, 1), (5, 1, 3, 3), (17, 2, None, 4), (16, 1, None, 2), (1, 1, None, 1), (40, 1, 2, 2)],
)
def test_the_number_of_steps(split: Split, num: int, epochs: int, steps: int | None, expected: int) -> None:
    """5 images make one batch of 5; 17 make two of 8, because BatchNorm cannot train on the one that is left."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
    local = training(split, model, epochs=epochs, steps=steps)
    assert local.run(local.layout.flatten(model), torch.arange(num), lr=0.1, seed=0).num_steps == expected


def test_everything_random_follows_from_the_seed(split: Split) -> None:
    local = training(split, small_model(dropout=0.5), augment=True, flip=True)

    def result(seed: int) -> Tensor:
        torch.rand(seed + 1)  # the global generator's state does not matter
        return local.run(start_of(local), torch.arange(30), lr=0.05, seed=seed).flat

    assert torch.equal(result(4), result(4))
    assert not torch.equal(result(4), result(5))
    one_batch = replace(local, augment=False, batch_size=30)  # the seed decides order and dropout, and order is moot
    a, b = (one_batch.run(start_of(local), torch.arange(30), lr=0.05, seed=s).flat for s in (4, 5))
    assert not torch.allclose(a, b, rtol=1e-2)


def test_optimizer_state_is_new_each_round(split: Split) -> None:
    local = training(split)
    first, second = (local.run(start_of(local), torch.arange(30), lr=0.05, seed=2).flat for _ in range(2))
    assert torch.equal(first, second)


def test_integer_buffers_do_not_tell_who_trained_here(split: Split) -> None:
    local = training(split)
    local.run(start_of(local), torch.arange(30), lr=0.05, seed=2)
    assert int(local.model[1].num_batches_tracked) == 0


@pytest.mark.parametrize("mu", [0.0, 0.5])
@pytest.mark.parametrize(("name", "tolerance"), [("bf16", 0.15), ("fp16", 0.05)])
def test_low_precision_trains_alike(split: Split, name: str, tolerance: float, mu: float) -> None:
    """Rounding of 2^-8 (bf16) or 2^-11 (fp16) in each layer of 5 steps, not more; no step is skipped."""
    local = training(split, prox_mu=mu)
    low = replace(local, precision=choose_precision(name, torch.device("cpu")))
    start, indices = start_of(local), torch.arange(40)
    exact, rounded = (t.run(start, indices, lr=0.05, seed=0).flat - start for t in (local, low))
    assert float((exact - rounded).norm() / exact.norm()) < tolerance


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(FieldError, match="precision='int8' is not allowed; allowed: auto, fp32, bf16, fp16"):
        choose_precision("int8", torch.device("cpu"))


# ---- messages ----


def client(split: Split, spec: str = "int4", feedback: bool = True, number: int = 3) -> Client:
    local = training(split)
    layout = Layout.of(local.model, spec)
    return client_on(
        number,
        torch.arange(20),
        local,
        LayoutSchedule.always(layout),
        ErrorFeedback(ResidualStore()) if feedback else NoFeedback(),
    )


def sent(who: Client, round: int = 0, change: Callable[[Tensor], Tensor] = lambda update: update, seed: int = 0):
    context = RoundContext(round, 0.05, seed)
    replica = start_of(who.training)
    trained = who.train(replica, context)
    update = change(trained.flat - replica)
    return update, who.message(update, trained, context)


def decoded(who: Client, frame) -> Tensor:
    out = torch.zeros(who.layouts.at(0).numel)
    who.layouts.at(0).decode_add(split_body(who.layouts.at(0), frame.body), out, seed=frame.seed)
    return out


def residual(who: Client) -> Tensor:
    return who.feedback.store.get(who.number, who.layouts.at(0).num_params).clone()


def test_a_message_says_who_when_and_how_much(split: Split) -> None:
    who = client(split, "fp32", feedback=False)
    update, frame = sent(who, round=7)
    assert (frame.kind, frame.client, frame.round, frame.weight) == (Kind.UPDATE, 3, 7, 20.0)
    assert frame.layout_hash == who.layouts.at(0).hash
    assert frame.loss > 0
    assert 0 <= frame.accuracy <= 1
    assert torch.equal(decoded(who, frame), update)  # fp32 loses nothing, statistics included


def test_the_same_seed_gives_the_same_bytes(split: Split) -> None:
    first, again, other = (sent(client(split), seed=seed)[1].pack() for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_clients_share_the_low_half_of_a_seed_and_have_noise_of_their_own() -> None:
    seeds = [RoundContext(round, 0.1, 5).uplink_seed(c) for round in (0, 1) for c in (0, 1, 2)]
    low, high = [s & 0xFFFFFFFF for s in seeds], [s >> 32 for s in seeds]
    assert low[0] == low[1] == low[2] != low[3] == low[4] == low[5]
    assert len(set(high)) == 6
    assert max(high) < 2**32
    assert RoundContext(0, 0.1, 5).downlink_seed() not in seeds


@pytest.mark.parametrize("spec", ["int4", "sign", "topk:density=0.1"])
def test_residuals_hold_what_was_not_sent(split: Split, spec: str) -> None:
    who, meant, arrived = client(split, spec), 0.0, 0.0
    params = slice(0, who.layouts.at(0).num_params)
    for round in range(4):
        update, frame = sent(who, round)
        meant, arrived = meant + update.double(), arrived + decoded(who, frame).double()
        # each round rounds update + residual and the new residual once; values are below 1
        atol = 4 * (round + 1) * 2.0**-24
        torch.testing.assert_close((meant - arrived)[params], residual(who)[params].double(), rtol=0, atol=atol)
    assert float(residual(who).abs().max()) > 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_update_that_is_not_finite_is_not_sent(split: Split, bad: float) -> None:
    who = client(split)
    sent(who)
    before = residual(who)
    for place in (0, -1):  # a weight, a running variance
        frame = sent(who, 1, lambda update, i=place: update.index_fill(0, torch.tensor(i % len(update)), bad))[1]
        assert (frame.kind, frame.body.numel(), frame.weight) == (Kind.LEFT_OUT, 0, 20.0)
        assert torch.equal(residual(who), before)
    assert sent(who, 2)[1].kind == Kind.UPDATE
    assert not torch.equal(residual(who), before)


@pytest.mark.parametrize("num", [1, 7, 1000])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 3e38])
def test_finite_means_every_value(num: int, bad: float) -> None:
    for place in {0, num // 2, num - 1}:
        values = torch.full((num,), -2.0).index_fill(0, torch.tensor(place), bad)
        assert is_finite(values) == bool(torch.isfinite(values).all())

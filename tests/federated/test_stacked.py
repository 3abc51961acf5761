"""Clients trained side by side end where they end one by one, to float tolerance."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from jobs import small_config
from properties import few
from safetensors.torch import load_file
from torch import Tensor, nn

from fedq.data import Split
from fedq.engines.precision import Precision
from fedq.federated import rank_delivery
from fedq.federated.image_training import LocalTraining
from fedq.federated.stacked import can_stack, train_stacked
from fedq.layout import Layout
from fedq.models import build_model
from fedq.trainers.run import run_job

FP32 = Precision("fp32", "cpu", channels_last=False)
LR, SEEDS = 0.05, [11, 12, 2**31]


@pytest.fixture(scope="module")
def split() -> Split:
    generator = torch.Generator().manual_seed(3)
    images = torch.randint(256, (90, 3, 16, 16), dtype=torch.uint8, generator=generator)
    return Split(images, torch.randint(4, (90,), generator=generator))


def plain() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(294, 9), nn.ReLU(), nn.Linear(9, 4)
    )


def normed() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 196, 4))


def frozen_stem() -> nn.Module:
    model = normed()
    model[0].requires_grad_(False)
    return model


def convnet() -> nn.Module:
    torch.manual_seed(1)
    return build_model("resnet20", num_classes=4, image_size=16)


def sgd(params: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=lr, momentum=0.9, weight_decay=5e-4, fused=True)


def adamw(params: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=lr / 10, weight_decay=0.1, fused=True)


def training(split: Split, model: nn.Module, **changes: object) -> LocalTraining:
    made = LocalTraining(model, Layout.of(model, "fp32"), split, (0.4,) * 3, (0.2,) * 3, sgd, FP32, batch_size=8)
    return replace(made, **changes)


EQUAL = [torch.arange(0, 24), torch.arange(30, 54), torch.arange(60, 84)]
UNEQUAL = [torch.arange(0, 21), torch.arange(30, 35), torch.arange(36, 90)]


@pytest.mark.parametrize("parts", [EQUAL, UNEQUAL], ids=["equal", "unequal"])
@pytest.mark.parametrize(
    ("make", "changes"),
    [
        (plain, {}),
        (plain, {"make_optimizer": adamw, "epochs": 2}),
        (plain, {"flip": True, "prox_mu": 0.5}),
        (plain, {"augment": False, "steps": 5}),
        (normed, {"epochs": 2}),
        (frozen_stem, {}),
        pytest.param(convnet, {}, marks=pytest.mark.slow),
    ],
    ids=["sgd", "adamw", "prox", "steps", "batchnorm", "frozen", "resnet20"],
)
def test_side_by_side_equals_one_by_one(split: Split, make, changes: dict, parts: list[Tensor]) -> None:
    local = training(split, make(), **changes)
    start = local.layout.flatten(make())
    expected = [local.run(start, part, lr=LR, seed=seed) for part, seed in zip(parts, SEEDS, strict=True)]
    found = train_stacked(local, start, parts, lr=LR, seeds=SEEDS)
    for one, other in zip(expected, found, strict=True):
        moved = float((one.flat - start).abs().max())
        # the same sums in another order: 2^-24 a step, amplified by normalisation, far below the movement
        torch.testing.assert_close(other.flat, one.flat, rtol=1e-4, atol=2e-3 * moved)
        assert other.num_steps == one.num_steps
        assert other.loss == pytest.approx(one.loss, rel=1e-3)
        assert other.accuracy == pytest.approx(one.accuracy, abs=0.07)


def test_clients_do_not_see_each_other(split: Split) -> None:
    """Each client's result is that of a stack with other neighbours; dropout draws its own masks."""
    local = training(split, normed())
    start = local.layout.flatten(normed())
    three = train_stacked(local, start, UNEQUAL, lr=LR, seeds=SEEDS)
    two = train_stacked(local, start, [UNEQUAL[2], UNEQUAL[0]], lr=LR, seeds=[SEEDS[2], SEEDS[0]])
    torch.testing.assert_close(two[0].flat, three[2].flat, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(two[1].flat, three[0].flat, rtol=1e-4, atol=1e-5)


def test_dropout_differs_between_clients(split: Split) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(768, 4))
    local = training(split, model, augment=False, batch_size=30)
    part = torch.arange(30)
    a, b = train_stacked(local, local.layout.flatten(model), [part, part], lr=LR, seeds=[1, 1])
    assert not torch.allclose(a.flat, b.flat, rtol=1e-2)


def test_the_module_is_left_as_it_was(split: Split) -> None:
    model = normed()
    local = training(split, model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    train_stacked(local, torch.zeros(local.layout.numel), EQUAL, lr=LR, seeds=SEEDS)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_float16_is_not_stacked(split: Split) -> None:
    assert can_stack(training(split, plain()))
    assert not can_stack(training(split, plain(), precision=Precision("fp16", "cpu", channels_last=True)))


def model_of(folder: Path, **flags: object) -> tuple[dict, Tensor]:
    summary = run_job(small_config(folder, **flags))
    assert summary is not None
    return summary, torch.cat([value.view(-1).double() for value in load_file(folder / "model.safetensors").values()])


@pytest.mark.parametrize("chaos", few(["fail=0.3,seed=2", ""], 1))
def test_a_job_side_by_side_equals_one_by_one(tmp_path: Path, chaos: str) -> None:
    flags = {"uplink": "fp32", "downlink": "fp32", "chaos": chaos}
    one, expected = model_of(tmp_path / "one", **flags)
    stacked, found = model_of(tmp_path / "stacked", side_by_side=3, **flags)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
    for key in ("uplink_bytes", "downlink_bytes", "left_out"):
        assert stacked[key] == one[key]


def test_a_stack_that_fails_is_trained_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("out of memory")

    _, expected = model_of(tmp_path / "one", rounds=1)
    monkeypatch.setattr(rank_delivery, "train_stacked", fail)
    _, found = model_of(tmp_path / "stacked", rounds=1, side_by_side=4)
    assert torch.equal(found, expected)
    assert "out of memory" in caplog.text

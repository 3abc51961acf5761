"""Evaluation against a plain pass in float64, and the same numbers at every world size."""

from __future__ import annotations

import pytest
import torch
from distributed import run_group
from torch import nn
from torch.nn import functional

from fedq.collectives import Moved, Transport
from fedq.data import Split
from fedq.engines.precision import choose_precision
from fedq.federated.evaluate import Evaluator

MEAN, STD = (0.5,), (0.25,)


def setting(precision: str = "fp32", num: int = 73) -> tuple[Evaluator, nn.Module, Split]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Dropout(0.5), nn.Linear(144, 5))
    model(torch.randn(32, 1, 8, 8))  # running statistics that are not the defaults
    split = Split(torch.randint(256, (num, 1, 8, 8), dtype=torch.uint8), torch.randint(5, (num,)))
    transport = Transport()
    chosen = choose_precision(precision, torch.device("cpu"))
    return Evaluator(MEAN, STD, chosen, transport, batch_size=10), model, split


def by_hand(model: nn.Module, split: Split) -> tuple[float, float]:
    model = model.double().eval()
    with torch.no_grad():
        logits = model((split.images.double() / 255 - 0.5) / 0.25)
    loss = functional.cross_entropy(logits, split.labels)
    return float(loss), float((logits.argmax(1) == split.labels).double().mean())


@pytest.mark.parametrize(("precision", "rel", "mistakes"), [("fp32", 1e-5, 0), ("bf16", 2e-2, 3)])
def test_loss_and_accuracy(precision: str, rel: float, mistakes: int) -> None:
    """Float32 keeps 24 bits and decides as float64 does; bf16 keeps 8 and may turn a close call."""
    evaluator, model, split = setting(precision)
    model.train()
    loss, accuracy, moved = evaluator.run(model, split)
    expected_loss, expected_accuracy = by_hand(model, split)
    assert loss == pytest.approx(expected_loss, rel=rel)
    assert abs(accuracy - expected_accuracy) <= mistakes / len(split) + 1e-12
    assert moved == Moved()


def test_nothing_of_the_model_changes() -> None:
    evaluator, model, split = setting()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    evaluator.run(model, split)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def _evaluate(rank: int) -> list[tuple[float, float, int]]:
    results = []
    for num in (73, 10, 0):
        loss, accuracy, moved = Evaluator.run(*setting(num=num))
        results.append((loss, accuracy, moved.payload))
    return results


def test_every_rank_gets_the_same_numbers_at_every_world_size() -> None:
    (alone,) = run_group(1, _evaluate)
    assert alone[2] == (0.0, 0.0, 0)
    for world_size in (2, 3):
        for of_rank in run_group(world_size, _evaluate):
            assert [numbers[:2] for numbers in of_rank] == [numbers[:2] for numbers in alone]
            # two float64 sums for each of 8, 1 and 0 batches, from every rank to every other
            assert [n[2] for n in of_rank] == [16 * b * world_size * (world_size - 1) for b in (8, 1, 0)]

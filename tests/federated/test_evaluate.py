"""Evaluation against a plain pass in float64, and the same numbers at every world size."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace

import pytest
import torch
from distributed import run_group
from sklearn.metrics import balanced_accuracy_score
from torch import nn
from torch.nn import functional

from fedq.collectives import Moved, Transport
from fedq.data import Split
from fedq.engines.precision import choose_precision
from fedq.federated.evaluate import Evaluator, Scores

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
    scores, moved = evaluator.run(model, split)
    expected_loss, expected_accuracy = by_hand(model, split)
    assert scores.loss == pytest.approx(expected_loss, rel=rel)
    assert abs(scores.accuracy - expected_accuracy) <= mistakes / len(split) + 1e-12
    assert math.isnan(scores.balanced_accuracy), "nobody asked for it"
    assert moved == Moved()


def test_nothing_of_the_model_changes() -> None:
    evaluator, model, split = setting()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    evaluator.run(model, split)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("present", [(0, 1, 2, 3, 4), (1, 3), (2,)])
def test_balanced_accuracy_is_that_of_scikit_learn(present: tuple[int, ...]) -> None:
    """Also where the split lacks classes: the model may name them, but they do not count."""
    evaluator, model, split = setting()
    split = Split(split.images, torch.tensor(present)[(torch.arange(73) ** 2 // 7) % len(present)])
    scores, _ = evaluator.run(model, split, num_classes=5)
    with torch.no_grad():
        said = model.eval()((split.images.float() / 255 - 0.5) / 0.25).argmax(1)
    with warnings.catch_warnings():  # scikit-learn warns of classes that are named but absent
        warnings.simplefilter("ignore")
        expected = balanced_accuracy_score(split.labels, said)
    assert scores.balanced_accuracy == pytest.approx(expected, abs=1e-12)


def test_a_constant_answer_is_worth_one_class() -> None:
    """On a split of which 88 % are of one class, its accuracy is 88 %, and its balanced accuracy 20 %."""
    evaluator, model, split = setting(num=100)
    last = model[-1]
    assert isinstance(last, nn.Linear)
    with torch.no_grad():
        last.weight.zero_()
        last.bias.copy_(torch.tensor([0.0, 0.0, 9.0, 0.0, 0.0]))
    labels = torch.tensor([2] * 88 + [0, 1, 3, 4] * 3)
    scores, _ = evaluator.run(model, Split(split.images, labels), num_classes=5)
    assert (scores.accuracy, scores.balanced_accuracy) == pytest.approx((0.88, 0.2))


def _evaluate(rank: int) -> list[tuple[Scores, int]]:
    results = []
    for num_classes in (0, 5):
        for num in (73, 10, 0):
            scores, moved = Evaluator.run(*setting(num=num), num_classes=num_classes)
            results.append((scores if num_classes else replace(scores, balanced_accuracy=0.0), moved.payload))
    return results


def test_every_rank_gets_the_same_numbers_at_every_world_size() -> None:
    (alone,) = run_group(1, _evaluate)
    assert alone[2] == alone[5] == (Scores(0.0, 0.0, 0.0), 0)
    for world_size in (2, 3):
        for of_rank in run_group(world_size, _evaluate):
            assert [scores for scores, _ in of_rank] == [scores for scores, _ in alone]
            # Two float64 sums for each of 8, 1 and 0 batches, from every rank to every other; then one a class too.
            sums = [2 * num_batches + num_classes for num_classes in (0, 5) for num_batches in (8, 1, 0)]
            assert [moved for _, moved in of_rank] == [8 * num * world_size * (world_size - 1) for num in sums]

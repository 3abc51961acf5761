"""A client of several ranks trains as it should: in step with one big batch, in rounds as the mean of its ranks."""

from __future__ import annotations

import pytest
import torch
from distributed import run_group
from torch import Tensor, nn

from fedq.config import Config
from fedq.data import Split
from fedq.engines import Precision
from fedq.federated.image_training import LocalTraining
from fedq.kernels import derive_seed
from fedq.layout import Layout
from fedq.network.multi_rank_client import MultiRankClient
from fedq.runtime import distributed

INDICES = torch.arange(3, 19)
LR, SEED = 0.1, 7


def _training(batch_size: int, steps: int | None) -> LocalTraining:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.ReLU(), nn.Linear(8, 4))
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (24, 3, 8, 8), generator=generator, dtype=torch.uint8)
    split = Split(images, torch.randint(0, 4, (24,), generator=generator))
    return LocalTraining(
        model=model,
        layout=Layout.of(model, "fp32"),
        split=split,
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
        make_optimizer=lambda params, lr: torch.optim.SGD(params, lr=lr),
        precision=Precision("fp32", "cpu", channels_last=False),
        batch_size=batch_size,
        steps=steps,
        augment=False,
    )


def _start() -> Tensor:
    training = _training(8, 1)
    return training.layout.flatten(training.model)


def _run(rank: int, exchange: str, uplink: str, times: int) -> list[list[float]]:
    """Train on this rank; rank 0 returns the models of each time it was asked."""
    training = _training(8, 1 if exchange == "step" else 2)
    with distributed("cpu", 1) as runtime:
        client = MultiRankClient(
            runtime, training, INDICES, Config(), exchange=exchange, uplink=uplink, downlink=uplink
        )  # the same on both ranks
        if rank:
            client.follow()
            return []
        trained = [client.run(_start(), INDICES, lr=LR, seed=SEED) for _ in range(times)]
        client.dismiss()
        assert all(one.loss > 0 and 0 <= one.accuracy <= 1 for one in trained)
        return [one.flat.tolist() for one in trained]


def test_a_step_of_two_ranks_is_one_of_a_batch_of_both() -> None:
    models, _ = run_group(2, _run, "step", "fp32", 2)
    whole = _training(16, 1).run(_start(), INDICES, lr=LR, seed=SEED)  # all 16 images are one batch, in any order
    torch.testing.assert_close(torch.tensor(models[0]), whole.flat, rtol=1e-5, atol=1e-6)
    assert models[0] == models[1]  # nothing of a round is left for the next


@pytest.mark.parametrize("uplink", ["fp32", "int8"])
def test_a_round_of_two_ranks_is_the_mean_of_both(uplink: str) -> None:
    models, _ = run_group(2, _run, "round", uplink, 2)
    alone = [
        _training(8, 2).run(_start(), INDICES[rank::2], lr=LR, seed=derive_seed(SEED, "local", 0, rank)).flat
        for rank in range(2)
    ]
    mean = (alone[0].double() + alone[1].double()) / 2
    moved = float((mean - _start().double()).abs().max())
    tolerance = 1e-6 if uplink == "fp32" else 0.02
    torch.testing.assert_close(torch.tensor(models[0], dtype=torch.float64), mean, rtol=0, atol=tolerance * moved)
    assert models[0] == models[1]

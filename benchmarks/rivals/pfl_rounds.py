"""The task in pfl-research (https://github.com/apple/pfl-research): FederatedAveraging on its SimulatedBackend.

    PYTHONPATH=. torchrun --nproc-per-node 2 benchmarks/rivals/pfl_rounds.py --task DIR --report FILE

Clients are sampled in the order of the task's cohorts. ``--bf16`` is pfl's own ``amp_dtype``.
"""

from __future__ import annotations

import itertools
from importlib.metadata import version

import numpy as np
import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.hyperparam.base import NNTrainHyperParams
from pfl.metrics import Metrics, Weighted
from pfl.model.pytorch import PyTorchModel
from task import Report, Task, arguments
from torch import Tensor, nn
from torch.nn import functional


class Network(nn.Module):
    """The network with the two methods that pfl wants."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        self.train()
        return functional.cross_entropy(self.net(x).float(), y)

    @torch.no_grad()
    def metrics(self, x: Tensor, y: Tensor) -> dict[str, Weighted]:  # pfl evaluates the users of its first round
        return {"loss": Weighted(float(self.loss(x, y)) * len(y), len(y))}


class Clock(TrainingProcessCallback):
    """Notes when rounds end."""

    def __init__(self, report: Report) -> None:
        self.report = report

    def after_central_iteration(self, aggregate_metrics: Metrics, model: PyTorchModel, *, central_iteration: int):  # type: ignore[no-untyped-def]
        self.report.round_done()
        return False, Metrics()


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    task, report = Task.load(args.task), Report(args.report)
    np.random.seed(0)
    users = itertools.chain.from_iterable(task.cohorts)

    def make_user(user: int) -> Dataset:
        x, y = task.client(user)
        order = torch.randperm(len(y))
        return Dataset((x[order].contiguous(memory_format=args.memory_format), y[order]), user_id=str(user))

    net = Network(task.build(args.memory_format))
    model = PyTorchModel(
        net,
        torch.optim.SGD,
        torch.optim.SGD(net.parameters(), lr=1.0),
        amp_dtype=torch.bfloat16 if args.bf16 else None,
    )
    data = FederatedDataset(make_user, lambda: next(users))
    FederatedAveraging().run(
        algorithm_params=NNAlgorithmParams(
            central_num_iterations=task.num_rounds,
            evaluation_frequency=10**9,
            train_cohort_size=len(task.cohorts[0]),
            val_cohort_size=None,
        ),
        backend=SimulatedBackend(training_data=data, val_data=None),
        model=model,
        model_train_params=NNTrainHyperParams(
            local_num_epochs=1, local_learning_rate=task.lr, local_batch_size=task.batch_size
        ),
        callbacks=[Clock(report)],
    )
    if args.rank == 0:
        moved = 8 * (args.world_size - 1) * sum(p.numel() for p in net.parameters())
        versions = {"pfl": version("pfl"), "torch": torch.__version__}
        report.write(accuracy=task.accuracy(net.net), mb_a_round=moved / 1e6, versions=versions)


if __name__ == "__main__":
    main()

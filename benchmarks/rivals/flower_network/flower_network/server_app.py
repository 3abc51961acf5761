"""The server: Flower's FedAvg until the task's target is reached."""

from __future__ import annotations

import contextlib
import time
from importlib.metadata import version
from pathlib import Path

import torch
from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from network_task import NetworkTask
from task import Report

app = ServerApp()


class Reached(Exception):
    """The target accuracy is reached; Flower's strategies have no earlier end."""


@app.main()
def serve(grid: Grid, context: Context) -> None:
    config = context.run_config
    torch.set_num_threads(1)
    task, report = NetworkTask.load(Path(str(config["task"]))), Report(Path(str(config["report"])))
    clients, model, accuracies = int(config["num-clients"]), task.build(), []
    while len(list(grid.get_node_ids())) < clients:
        time.sleep(0.1)
    begin = time.time()

    def round_done(round: int, arrays: ArrayRecord) -> None:
        if round == 0:  # the first call comes before the first round
            return
        model.load_state_dict(arrays.to_torch_state_dict())
        accuracies.append(task.val_accuracy(model))
        report.round_done()
        if accuracies[-1] >= task.target:
            raise Reached

    strategy = FedAvg(fraction_evaluate=0.0, min_train_nodes=clients, min_available_nodes=clients)
    with contextlib.suppress(Reached):
        strategy.start(grid, ArrayRecord(model.state_dict()), task.num_rounds, evaluate_fn=round_done)
    versions = {name: version(name) for name in ("flwr", "torch")}
    report.write(begin=begin, val_accuracies=accuracies, test_accuracy=task.accuracy(model), versions=versions)

"""The task in Flower (https://flower.ai): FedAvg in its simulation engine, clients in Ray actors.

    PYTHONPATH=.:benchmarks/rivals python benchmarks/rivals/flower_rounds.py --task DIR --report FILE --processes 2

Flower samples the clients itself. Clients are in `flower_client.py`.
"""

from __future__ import annotations

import os
from importlib.metadata import version

os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

import torch
from flower_client import app
from flwr.app import ArrayRecord, ConfigRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from task import Report, Task, arguments


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    task, report = Task.load(args.task), Report(args.report)
    model = task.build()
    config = ConfigRecord(
        {
            "task": str(args.task.resolve()),
            "threads": args.threads,
            "bf16": args.bf16,
            "channels-last": args.channels_last,
        }
    )
    server = ServerApp()

    def round_done(round: int, arrays: ArrayRecord) -> None:
        if round > 0:  # the first call comes before the first round
            report.round_done()

    @server.main()
    def serve(grid: Grid, context: Context) -> None:
        cohort, clients = len(task.cohorts[0]), len(task.shares)
        strategy = FedAvg(fraction_train=cohort / clients, fraction_evaluate=0.0, min_available_nodes=clients)
        result = strategy.start(
            grid, ArrayRecord(model.state_dict()), task.num_rounds, train_config=config, evaluate_fn=round_done
        )
        model.load_state_dict(result.arrays.to_torch_state_dict())

    run_simulation(
        server_app=server,
        client_app=app,
        num_supernodes=len(task.shares),
        backend_config={
            "init_args": {"num_cpus": args.processes * args.threads},
            "client_resources": {"num_cpus": args.threads, "num_gpus": 0.0},
        },
    )
    moved = 2 * len(task.cohorts[0]) * 4 * sum(tensor.numel() for tensor in model.state_dict().values())
    versions = {name: version(name) for name in ("flwr", "ray")} | {"torch": torch.__version__}
    report.write(accuracy=task.accuracy(model), mb_a_round=moved / 1e6, versions=versions)


if __name__ == "__main__":
    main()

"""The server. Without fedq, the import and the line with ``compressed`` would not be there."""

from __future__ import annotations

import json
import time
from pathlib import Path

from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from fedq.flower import compressed
from flower_mnist import task

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Average the clients' models, and test each average."""
    config = context.run_config
    data = task.load(str(config["data-dir"]), int(config["train-examples"]), int(config["seed"]))
    model = task.network(data, int(config["seed"]))
    num_clients, fractions = int(config["num-clients"]), (config["fraction-train"], config["fraction-evaluate"])
    strategy = FedAvg(
        fraction_train=float(fractions[0]),
        fraction_evaluate=float(fractions[1]),
        min_train_nodes=1,
        min_evaluate_nodes=1,
        min_available_nodes=num_clients,
    )
    if config["compress"]:
        ledger = str(config["ledger"]) or None
        strategy = compressed(strategy, str(config["uplink"]), str(config["downlink"]), ledger=ledger)
    rows: list[dict] = []

    def test(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        model.load_state_dict(arrays.to_torch_state_dict())
        rows.append({"round": server_round, "time": time.time(), "accuracy": task.accuracy(model, data, data.test)})
        return MetricRecord({"accuracy": rows[-1]["accuracy"]})

    strategy.start(grid, ArrayRecord(model.state_dict()), int(config["rounds"]), timeout=600, evaluate_fn=test)
    if config["report"]:
        Path(str(config["report"])).write_text(json.dumps({"data": data.description, "rounds": rows}))

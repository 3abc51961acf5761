"""A client; Flower starts a process with this module for every message."""

from __future__ import annotations

from pathlib import Path

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from network_task import NetworkTask

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train a client for one epoch from the arrays that the server sent."""
    torch.set_num_threads(1)
    task = NetworkTask.load(Path(str(context.run_config["task"])))
    model = task.build()
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    round = int(message.content["config"]["server-round"]) - 1
    number = task.train(model, int(context.node_config["partition-id"]), round)
    metrics = MetricRecord({"num-examples": number})
    return Message(RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics}), reply_to=message)

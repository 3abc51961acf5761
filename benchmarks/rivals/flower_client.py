"""A client of Flower's simulation, in a module of its own because Ray's actors import it.

Flower has no setting for precision: ``bf16`` is torch's autocast in the client's code.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import lru_cache
from pathlib import Path

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from task import Task
from torch import nn
from torch.nn import functional

app = ClientApp()


@lru_cache(maxsize=1)
def opened(folder: str, memory_format: torch.memory_format, threads: int) -> tuple[Task, nn.Module]:
    """Return the task and a network to train in; kept in an actor from one client to the next."""
    torch.set_num_threads(threads)
    task = Task.load(Path(folder))
    return task, task.build(memory_format)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train a client for one epoch from the arrays that the server sent."""
    config = message.content["config"]
    memory_format = torch.channels_last if config["channels-last"] else torch.contiguous_format
    task, model = opened(str(config["task"]), memory_format, int(config["threads"]))
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=task.lr)
    x, y = task.client(int(context.node_config["partition-id"]))
    for picked in torch.randperm(len(y)).split(task.batch_size):
        with torch.autocast("cpu", dtype=torch.bfloat16) if config["bf16"] else nullcontext():
            logits = model(x[picked].contiguous(memory_format=memory_format))
        loss = functional.cross_entropy(logits.float(), y[picked])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    metrics = MetricRecord({"num-examples": len(y)})
    return Message(RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics}), reply_to=message)

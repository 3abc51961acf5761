"""The clients. Without fedq, the import and ``mods=[fedq_mod()]`` would not be there; nothing else would differ."""

from __future__ import annotations

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedq.flower import fedq_mod
from flower_mnist import task

app = ClientApp(mods=[fedq_mod()])


def _task(context: Context) -> tuple:
    config, node = context.run_config, context.node_config
    data = task.load(str(config["data-dir"]), int(config["train-examples"]), int(config["seed"]))
    number, num = int(node["partition-id"]), int(node["num-partitions"])
    return data, number, task.share_of(data, number, num, int(config["seed"]))


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train from the server's model on this client's images."""
    config, (data, number, share) = context.run_config, _task(context)
    model = task.network(data, 0)
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    server_round = int(message.content["config"]["server-round"])
    loss = task.train(
        model,
        data,
        share,
        epochs=int(config["local-epochs"]),
        batch_size=int(config["batch-size"]),
        lr=float(config["lr"]),
        momentum=float(config["momentum"]),
        seed=1_000_003 * int(config["seed"]) + 1_009 * server_round + number,
    )
    metrics = MetricRecord({"num-examples": len(share), "loss": loss})
    return Message(RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics}), reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Say how the model does on this client's images."""
    data, _, share = _task(context)
    model = task.network(data, 0)
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    metrics = MetricRecord({"num-examples": len(share), "accuracy": task.accuracy(model, data, share)})
    return Message(RecordDict({"metrics": metrics}), reply_to=message)
